"""Trainers of others that live beside our own environment, with our optimizers: the class that ran, and its weights."""

import copy

import pytest
import torch
import transformers
from torch import nn

import hf_momentum
from hf_momentum import InputError
from hf_momentum.run import run as run_with_our_names
from tests.adapters.replay import InOrder, Run, check, furthest
from tests.adapters.specimen import SETTINGS, loaded, texts, tiny_llama
from tests.adapters.spied import Spy, give_to_every_trainer


@pytest.fixture
def spy(monkeypatch):
    """On whatever Trainer the test makes."""
    monkeypatch.setattr(transformers.Trainer, "__init__", transformers.Trainer.__init__)
    give_to_every_trainer(spy := Spy())
    return spy


# TRL


def sft_words(tmp_path, **fields) -> list[str]:
    data = tmp_path / "data"
    data.mkdir()
    common = {
        "model_name_or_path": tiny_llama(tmp_path / "model"), "dataset_name": texts(data / "train.jsonl").parent,
        "max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "dtype": "float32", "attn_implementation": "eager",
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    return [str(word) for key, value in (common | SETTINGS | fields).items() for word in (f"--{key}", value)]


def test_trl_sft_trains_as_our_trainer_does(tmp_path, spy):
    pytest.importorskip("trl", reason="TRL is not installed")
    run_with_our_names(["trl", "sft", *sft_words(tmp_path, optim="tam")])
    run = Run(**spy.seen)
    assert run.optimizer == "TAM" and [group["gamma"] for group in run.groups] == [0.95, 0.95]
    assert (run.steps, len(run.batches)) == (4, 8)
    check(run, loaded(tmp_path / "model"), tmp_path / "ours", optim="tam", **SETTINGS)


def test_what_trl_would_hand_to_the_launcher_is_refused_and_not_passed_over(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    with pytest.raises(
        InputError, match=r"does not know --num_processes 2.*accelerate launch ... -m hf_momentum.run trl"
    ):
        run_with_our_names(["trl", "sft", *sft_words(tmp_path, optim="tam", num_processes=2)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trl"], "name a training script, such as sft or dpo; got none"),
        (["trl", "stf"], "got 'stf' .did you mean 'sft'"),
        (["trl", "utils"], "got 'utils'"),
        (["no_such_module"], "neither a file nor a module or command"),
        (["tests"], "neither a file nor a module or command"),  # a package without a __main__
    ],
)
def test_what_cannot_be_run_is_refused(words, message):
    pytest.importorskip("trl", reason="TRL is not installed")
    with pytest.raises(InputError, match=message):
        run_with_our_names(words)


def test_an_installed_command_runs_in_this_process(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_with_our_names(["accelerate-estimate-memory", "--help"])
    assert stopped.value.code == 0 and "usage" in capsys.readouterr().out


# Loops: one network, one set of batches


class Network(nn.Module):
    """Has weights that decay and weights that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x, labels):
        return {"loss": (self.last(torch.tanh(self.norm(self.first(x)))) - labels).square().mean()}


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    xs = torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": x.sum(1, keepdim=True)} for x in xs]


def made_by(network: nn.Module, **settings) -> torch.optim.Optimizer:
    return hf_momentum.create_optimizer("tam", network, lr=0.05, weight_decay=0.1, gamma=0.95, **settings)


def linear(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return transformers.get_linear_schedule_with_warmup(optimizer, 0, 4)


def finished(before: nn.Module, after: nn.Module) -> Run:
    return Run("TAM", [], batches(), 4, copy.deepcopy(before.state_dict()), copy.deepcopy(after.state_dict()))


def accelerated(network: nn.Module, rows: list, folder=None, resume: bool = False) -> object:
    """A plain loop; with `folder`, its state is saved there after two of four steps, or taken from there."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = made_by(network)
    loader = torch.utils.data.DataLoader(InOrder(rows), batch_size=None)
    model, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, linear(optimizer))
    if resume:
        accelerator.load_state(folder)
    for done, row in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(**row)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if folder is not None and not resume and done == 3:
            accelerator.save_state(folder)
    return optimizer


def test_an_accelerate_loop_trains_as_our_trainer_does(tmp_path):
    network, before = Network(), Network()
    before.load_state_dict(network.state_dict())
    optimizer = accelerated(network, batches())
    assert type(optimizer.optimizer) is hf_momentum.TAM and len(optimizer.param_groups) == 2
    check(finished(before, network), before, tmp_path, optim="tam", **SETTINGS)


def test_an_accelerate_loop_continues_from_its_saved_state_bit_for_bit(tmp_path):
    network = Network()
    start = copy.deepcopy(network.state_dict())
    accelerated(network, batches(), tmp_path / "state")
    continued = Network()
    accelerated(continued, batches()[4:], tmp_path / "state", resume=True)
    assert furthest(network.state_dict(), continued.state_dict()) == 0
    fresh = Network()
    fresh.load_state_dict(start)
    accelerated(fresh, batches()[:4])
    accelerated(fresh, batches()[4:])  # the same weights with a fresh optimizer and schedule
    assert furthest(network.state_dict(), fresh.state_dict()) > 1e-4
