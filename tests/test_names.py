"""Our names work in every Trainer, are pickled so that any process can load them, and fail loudly where they cannot."""

import copy
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import transformers.trainer_optimizer
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_momentum
from hf_momentum import AdaTAMW, InputError, MomentumTrainer, MomentumTrainingArguments
from hf_momentum.integrations import OPTIMIZERS, transformers_hook
from hf_momentum.integrations.registry import OptimizerSpec, _table


def arguments(tmp_path, cls=TrainingArguments, **kwargs):
    return cls(output_dir=str(tmp_path), use_cpu=True, report_to="none", **kwargs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_trainer_builds_the_registered_class(name, tmp_path):
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=name, learning_rate=0.25))
    assert cls is OPTIMIZERS[name].cls
    assert kwargs["lr"] == 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_name_is_accepted_on_the_command_line(name, tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--optim", name]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    assert args.optim == name
    assert args.to_dict()["optim"] == name


def test_transformers_own_optimizers_are_untouched(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch")
    for trainer in (Trainer, MomentumTrainer):
        assert trainer.get_optimizer_cls_and_kwargs(args)[0] is torch.optim.AdamW
    with pytest.raises(ValueError, match="not a valid OptimizerNames"):
        arguments(tmp_path, optim="no_such")


def test_adam_arguments_and_optim_args_reach_the_optimizers_that_have_them(tmp_path):
    common = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="adatamw", **common))
    assert (kwargs["betas"], kwargs["eps"]) == ((0.8, 0.95), 1e-5)
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(
        arguments(tmp_path, optim="adatamw", optim_args="betas=0.7:0.9,gamma=0.95", **common)
    )
    assert (kwargs["betas"], kwargs["gamma"]) == ((0.7, 0.9), 0.95)
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="tam", **common))
    assert set(kwargs) == {"lr"}


class Quadratic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        return {"loss": ((self.linear(x) - labels) ** 2).mean()}


def data():
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(8, 2, generator=generator)
    return [{"x": x, "labels": x.sum(0, keepdim=True)} for x in xs]


def trained_weights(trainer):
    trainer.train()
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]), trainer.optimizer.optimizer


def test_every_road_trains_to_the_same_weights(tmp_path):
    """Plain Trainer by name, plain Trainer by class, MomentumTrainer, and a loop with the factory."""

    def model():
        torch.manual_seed(0)
        return Quadratic()

    common = {"max_steps": 5, "learning_rate": 0.1, "per_device_train_batch_size": 8, "weight_decay": 0.1}
    common |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True}
    by_name = Trainer(
        model(), arguments(tmp_path, optim="tam", optim_args="gamma=0.95", **common), train_dataset=data()
    )
    by_class = Trainer(
        model(),
        arguments(tmp_path, **common),
        train_dataset=data(),
        optimizer_cls_and_kwargs=hf_momentum.optimizer_cls_and_kwargs("tam", lr=0.1, gamma=0.95),
    )
    ours = MomentumTrainer(
        model(),
        arguments(tmp_path, MomentumTrainingArguments, optim="tam", optim_args="gamma=0.95", **common),
        train_dataset=data(),
    )
    expected, optimizer = trained_weights(by_name)
    assert type(optimizer) is hf_momentum.TAM
    assert torch.equal(expected, trained_weights(by_class)[0])
    assert torch.equal(expected, trained_weights(ours)[0])

    network = model()
    optimizer = hf_momentum.create_optimizer("tam", network, lr=0.1, weight_decay=0.1, gamma=0.95)
    batch = transformers.default_data_collator(data())
    for _ in range(5):
        optimizer.zero_grad()
        network(**batch)["loss"].backward()
        optimizer.step()
    weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    # The Trainer shuffles the batch, so its sums may round otherwise.
    assert (expected - weights).abs().max() <= 1e-6 * expected.abs().max()


def test_saved_arguments_load_in_a_process_that_imported_nothing_and_name_the_package_where_it_is_missing(tmp_path):
    path = tmp_path / "training_args.bin"
    args = arguments(tmp_path, optim="tam")
    torch.save(args, path)
    assert pickle.loads(pickle.dumps(args)).optim is OptimizerNames("tam")
    assert copy.deepcopy(args).optim is OptimizerNames("tam")
    load = f"import torch; print(torch.load({str(path)!r}, weights_only=False).optim.value)"
    fresh = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == ["tam"]
    without = f"import sys; sys.modules['hf_momentum'] = None; {load}"
    missing = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert missing.returncode != 0
    assert "hf_momentum" in missing.stderr.splitlines()[-1]


@pytest.mark.parametrize("order", ["import hf_momentum, transformers", "import transformers, hf_momentum"])
def test_order_of_imports_does_not_matter(order):
    code = f"{order}; print(transformers.TrainingArguments(output_dir='o', optim='tam', use_cpu=True).optim.value)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["tam"]


# ---- the guard around transformers' private tables ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("register", "module", "missing"),
    [
        (transformers_hook.add_names, {}, "OptimizerNames"),
        (transformers_hook.add_names, {"OptimizerNames": ["tam"]}, "OptimizerNames"),
        (transformers_hook.add_handlers, {}, "_OPTIMIZER_HANDLERS"),
        (transformers_hook.add_handlers, {"_OPTIMIZER_HANDLERS": {"a": print}}, "OptimizerContext"),
    ],
)
def test_a_transformers_without_the_tables_gets_one_clear_message(register, module, missing):
    changed = types.ModuleType("changed")
    vars(changed).update(module)
    with pytest.raises(
        transformers_hook.HookError, match=rf"{missing}.*tested: 5.*MomentumTrainer.*optimizer_cls_and_kwargs"
    ):
        register(changed)
    with pytest.warns(RuntimeWarning, match=missing):
        transformers_hook._or_warn(register)(changed)


def test_momentum_trainer_does_not_need_the_tables(tmp_path, monkeypatch):
    monkeypatch.delitem(OptimizerNames._value2member_map_, "adatamw")
    monkeypatch.setattr(OptimizerNames, "_member_names_", [n for n in OptimizerNames._member_names_ if n != "ADATAMW"])
    monkeypatch.delitem(transformers.trainer_optimizer._OPTIMIZER_HANDLERS, "adatamw")
    with pytest.raises(ValueError):
        arguments(tmp_path, optim="adatamw")
    args = arguments(tmp_path, MomentumTrainingArguments, optim="adatamw")
    assert MomentumTrainer.get_optimizer_cls_and_kwargs(args)[0] is AdaTAMW


def test_installing_twice_changes_nothing():
    before = list(OptimizerNames._member_names_)
    transformers_hook.install()
    assert list(OptimizerNames._member_names_) == before
    assert len(set(before)) == len(before)


def test_a_name_is_registered_once():
    spec = OPTIMIZERS["tam"]
    with pytest.raises(ValueError, match="two optimizers are registered under the name 'tam'"):
        _table(spec, OptimizerSpec("tam", AdaTAMW, "", "", True))
    with pytest.raises(TypeError):
        OPTIMIZERS["new"] = spec


@pytest.mark.parametrize("backend", ["MEGATRON_LM", "XLA"])
def test_backends_that_were_never_run_are_refused(backend, monkeypatch):
    from accelerate import DistributedType, PartialState

    PartialState(cpu=True)
    transformers_hook.require_supported_backend()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[backend])
    with pytest.raises(InputError, match=f"{backend}.*whole tensors.*Supported: one process"):
        transformers_hook.require_supported_backend()


def test_importing_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers_hook.install()
    assert Path(hf_momentum.__file__).is_file()
