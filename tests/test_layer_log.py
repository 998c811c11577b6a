"""What is logged of each layer group is what plain torch says, read back once, in every Trainer and layout."""

import itertools
import json
import math

import pytest
import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_momentum import InputError, MomentumTrainer, MomentumTrainingArguments
from hf_momentum.diagnosis.groups import layer_groups
from hf_momentum.training import LayerGradientLog
from hf_momentum.training.layer_log import noise_share, write_layers


def model_of(lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, max_position_embeddings=32, **sizes))
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def examples() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(64, (24, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


class Watch(TrainerCallback):
    """Copies gradients and weights around every step, by the names of parameters."""

    def __init__(self):
        self.gradients, self.weights, self.logs = [], [], []

    @staticmethod
    def trained(model):
        return {name: param for name, param in model.named_parameters() if param.requires_grad}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: param.grad.double() for name, param in self.trained(model).items()})
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: param.detach().double() for name, param in self.trained(model).items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(tmp_path, log=None, model=None, kind=Trainer, resume=None, write=False, **fields):
    """Entries of the log, and what `Watch` saw. Pictures take longer than the training, so few tests `write` them."""
    arguments = MomentumTrainingArguments if kind is MomentumTrainer else TrainingArguments
    common = {"max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 4, "logging_steps": 3, "seed": 1}
    common |= {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True, "optim": "sgd"}
    watch = Watch()
    args = arguments(output_dir=str(tmp_path), **{**common, **fields})
    trainer = kind(model or model_of(), args, train_dataset=examples(), callbacks=[watch])
    if log is not None:
        log.attach(trainer)
        if not write:
            log.on_train_end = lambda *args, **kwargs: None
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss" in entry], watch


def norms(tensors: dict[str, torch.Tensor], group) -> float:
    members = [tensors[name].flatten() for name in (*group.weights, *group.adapters) if name in tensors]
    return torch.cat(members).norm().item() if members else math.nan


# ---- against plain torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("split", ["blocks", "parts"])
def test_norms_and_updates_of_every_group_are_those_of_plain_torch(lora, split, tmp_path):
    model = model_of(lora)
    groups = layer_groups(model, split)
    entries, watch = train(tmp_path, LayerGradientLog(split), model, logging_first_step=True, max_grad_norm=0.5)
    assert [entry["step"] for entry in entries] == [1, 3, 6]
    seen = 0
    for entry in entries:
        at = entry["step"] - 1
        before, after = watch.weights[2 * at], watch.weights[2 * at + 1]
        moved = {name: after[name] - before[name] for name in before}
        for group in groups:
            expected = norms(watch.gradients[at], group)
            if math.isnan(expected):
                assert f"grad_norm/{group.name}" not in entry, "a frozen group is left out"
                continue
            seen += 1
            assert entry[f"grad_norm/{group.name}"] == pytest.approx(expected, rel=1e-9)
            ratio = norms(moved, group) / norms(before, group)
            assert entry[f"update_ratio/{group.name}"] == pytest.approx(ratio, rel=1e-5)
    assert seen == 3 * {(False, "blocks"): 5, (True, "blocks"): 2, (False, "parts"): 9, (True, "parts"): 4}[lora, split]


def test_gradients_are_those_of_the_whole_accumulation(tmp_path):
    for accumulation, size in ((1, 4), (4, 1)):
        fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size}
        entries, watch = train(tmp_path, LayerGradientLog(), max_steps=3, **fields)
        group = layer_groups(model_of())[1]
        assert len(watch.gradients) == 3
        assert entries[0][f"grad_norm/{group.name}"] == pytest.approx(norms(watch.gradients[2], group), rel=1e-9)


@pytest.mark.parametrize(("kind", "optim"), [(Trainer, "sgd"), (Trainer, "tam"), (MomentumTrainer, "tam")])
def test_norms_are_those_after_clipping_wherever_it_is_clipped(kind, optim, tmp_path):
    """MomentumTrainer leaves clipping to the optimizer, which has not clipped yet when the gradients are looked at."""
    entries, watch = train(tmp_path, LayerGradientLog(), kind=kind, optim=optim, max_grad_norm=0.5, max_steps=3)
    (entry,) = entries
    whole = math.sqrt(sum(value**2 for name, value in entry.items() if name.startswith("grad_norm/")))
    assert entry["grad_norm"] > 1.0, "the test needs gradients that are clipped"
    assert whole == pytest.approx(0.5, rel=1e-5)
    raw = torch.cat([gradient.flatten() for gradient in watch.gradients[2].values()]).norm()
    assert (raw > 1.0) == (kind is MomentumTrainer)


# ---- noise -----------------------------------------------------------------------------------------------------------


class Known(nn.Module):
    """Two layers whose gradients are what the batch says: a constant plus noise of a known size, and noise alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(60, 50, bias=False), nn.Linear(60, 50, bias=False)])

    def forward(self, first, second, labels=None):
        loss = (self.layers[0].weight * first[0]).sum() + (self.layers[1].weight * second[0]).sum()
        return {"loss": loss}


@pytest.mark.parametrize(("every", "noise"), [(8, 0.0), (8, 0.7), (20, 1.5), (20, 0.1)])
def test_noise_share_is_the_share_of_known_noise(every, noise, tmp_path):
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(50, 60, generator=generator)
    draws = torch.randn(2, 40, 50, 60, generator=generator)
    data = [{"first": mean + noise * a, "second": b, "labels": torch.zeros(1)} for a, b in zip(*draws, strict=True)]
    args = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=1, logging_steps=every, max_grad_norm=0, use_cpu=True,
        optim="sgd", report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(Known(), args, train_dataset=data)
    log = LayerGradientLog()
    log.attach(trainer)
    log.on_train_end = lambda *args, **kwargs: None
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 40 // every
    for entry in entries:
        assert entry["noise/block.0"] == pytest.approx(noise**2 / (1 + noise**2), abs=0.06)
        assert entry["noise/block.1"] > 0.93


def test_a_window_of_one_step_has_no_noise_and_the_window_is_not_cut_by_a_log_of_the_first_step(tmp_path):
    entries, _ = train(tmp_path, LayerGradientLog(), logging_steps=1, max_steps=2)
    assert all("grad_norm/head" in entry and "noise/head" not in entry for entry in entries)
    logs = (train(tmp_path, LayerGradientLog(), logging_first_step=flag, max_steps=3)[0][-1] for flag in (False, True))
    first, second = ({name: value for name, value in log.items() if name.startswith("noise/")} for log in logs)
    assert len(first) == 5 and first == second
    assert any(0 < value < 1 for value in first.values())


def test_steps_that_are_not_finite_are_left_out_of_the_noise():
    """As under a loss scaler that overflows."""
    sketches = torch.randn(2, 5, 101, generator=torch.Generator().manual_seed(0)).double() + 1
    broken = sketches.clone()
    broken[:, 2, 7] = math.inf
    kept = noise_share(sketches[:, [0, 1, 3, 4]])
    torch.testing.assert_close(noise_share(broken), kept, rtol=1e-12, atol=0)
    broken[0, :4, 0] = math.nan
    assert noise_share(broken)[0].isnan() and noise_share(broken)[1] == pytest.approx(kept[1].item())


# ---- in the log ------------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts what brings values of tensors to the host. On a CPU `tolist` goes unseen; it is counted by its name."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = self.lists = 0
        inner = torch.Tensor.tolist

        def counted(tensor):
            self.lists += 1
            return inner(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_values_are_read_back_once_per_logging_step_and_never_in_between(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), logging_steps=4, use_cpu=True, report_to="none", optim="tam")
    trainer = Trainer(model_of(), args, train_dataset=examples())
    trainer.create_optimizer()
    log, state = LayerGradientLog(), trainer.state
    state.logging_steps, given = 4, {"model": trainer.model, "optimizer": trainer.optimizer}
    log.on_train_begin(args, state, trainer.control, **given)
    lists = []
    with Copies(monkeypatch) as copies:
        for step in range(8):
            for param in trainer.model.parameters():
                param.grad = torch.full_like(param, 0.1 * step)
            state.global_step = step
            log.on_pre_optimizer_step(args, state, trainer.control, **given)
            log.on_optimizer_step(args, state, trainer.control, **given)
            state.global_step = step + 1
            state.log_history.append({})
            if (step + 1) % 4 == 0:
                log.on_log(args, state, trainer.control, logs={"eval_loss": 1.0}, **given)
                log.on_log(args, state, trainer.control, logs={"loss": 1.0}, **given)
            lists.append(copies.lists)
        assert lists == [0, 0, 0, 1, 1, 1, 1, 2] and copies.reads == 0
        trainer.model.lm_head.weight[0, 0].item()
        assert copies.reads == 1, "the harness sees a value that is read"
    assert {"grad_norm/head", "update_ratio/head", "noise/head"} <= set(state.log_history[-1])


def test_reporters_and_history_see_the_values_and_only_finite_ones(tmp_path):
    class Broken(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.grad[0, 0] = math.inf

    log = LayerGradientLog()
    trainer_log, watch = train(tmp_path, log, max_steps=3)
    told = [logs for logs in watch.logs if "loss" in logs]
    assert [logs["grad_norm/head"] for logs in told] == [entry["grad_norm/head"] for entry in trainer_log]

    args = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to="none", optim="sgd")
    trainer = Trainer(model_of(), args, train_dataset=examples())
    log.attach(trainer)
    trainer.callback_handler.callbacks.insert(0, Broken())
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "grad_norm/head" not in entry and entry["grad_norm/block.0"] > 0
    json.dumps({name: value for name, value in entry.items() if "/" in name}, allow_nan=False)


def test_arguments_of_momentum_trainer_attach_it(tmp_path):
    fields = {"log_layers": True, "log_layers_split": "parts", "optim": "adatamw", "learning_rate": 1e-3}
    entries, _ = train(tmp_path, kind=MomentumTrainer, max_steps=3, **fields)
    assert "update_ratio/block.1.attention" in entries[-1]
    args = MomentumTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    callbacks = MomentumTrainer(model_of(), args).callback_handler.callbacks
    assert not any(isinstance(one, LayerGradientLog) for one in callbacks), "off unless asked for"


def test_parts_can_be_left_out(tmp_path):
    entries, _ = train(tmp_path, LayerGradientLog(updates=False, noise=False), max_steps=3)
    assert {name.split("/")[0] for name in entries[0] if "/" in name} == {"grad_norm"}


def test_looking_changes_nothing(tmp_path):
    """The weights of a run that is watched are those of one that is not, bit for bit."""
    runs = [train(tmp_path, log, optim="tam")[1].weights[-1] for log in (None, LayerGradientLog())]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_hold_what_was_logged_also_before_a_resume(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9, "optim": "tam"}
    straight, _ = train(tmp_path / "a", LayerGradientLog(), **fields)
    again = {"resume": str(tmp_path / "a" / "checkpoint-3"), "write": True, **fields}
    resumed, _ = train(tmp_path / "a", LayerGradientLog(folder=tmp_path / "b"), **again)
    assert resumed[1:] == straight[1:]
    whole = json.loads((tmp_path / "b" / "layers.json").read_text())
    assert whole["steps"] == [3, 6, 9] and whole["groups"] == ["embeddings", "block.0", "block.1", "norm", "head"]
    for quantity, (row, group) in itertools.product(("grad_norm", "update_ratio", "noise"), enumerate(whole["groups"])):
        assert whole[quantity][row] == [entry[f"{quantity}/{group}"] for entry in straight]
    pictures = {"curves.png", "heatmap.png", "heatmap_update_ratio.png", "heatmap_noise.png"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == pictures | {"layers.json"}
    assert all((tmp_path / "b" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_log_without_layers_writes_nothing(tmp_path):
    assert write_layers([{"step": 1, "loss": 2.0}], ["head"], tmp_path / "none")["steps"] == []
    assert not (tmp_path / "none").exists()


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_a_strategy_whose_steps_it_cannot_know_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"logging_strategy is 'epoch': set it to 'steps'"):
        train(tmp_path, LayerGradientLog(), logging_strategy="epoch")


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(InputError, match=r"DeepSpeed, which steps before.*FSDP2"):
        LayerGradientLog().on_train_begin(args, None, None)


def test_an_optimizer_that_does_not_hold_the_models_tensors_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InputError, match="none of the model's parameters in SGD"):
        LayerGradientLog().on_train_begin(args, None, None, model=model_of(), optimizer=optimizer)
