"""What a foreign trainer fed to its model, fed to our own Trainer."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_momentum import MomentumTrainer, MomentumTrainingArguments

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Run:
    """A finished training: the optimizer inside of all wrappers, what the model was called with, what came of it."""

    optimizer: str
    groups: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    steps: int
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


def trained_by(folder: Path, module: str, *words: object, **environment: str) -> Run:
    """Run a foreign trainer's module in a process of its own, where it may patch what it wants."""
    file = folder / "run.pt"
    command = [sys.executable, "-m", "tests.adapters.spied", file, module, *words]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and file.is_file(), done.stderr[-4000:]
    return Run(**torch.load(file, weights_only=True))


class InOrder(torch.utils.data.IterableDataset):
    """Whole batches as they came; nothing shuffles what can only be iterated over."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(copy.deepcopy(self.batches))


def ours(run: Run, network: torch.nn.Module, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The weights after our own Trainer, from the same weights, on the same batches, with these settings."""
    network = copy.deepcopy(network)
    network.load_state_dict(run.before)
    args = MomentumTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=1, max_steps=run.steps, remove_unused_columns=False, **settings,
    )  # fmt: skip
    MomentumTrainer(network, args, train_dataset=InOrder(run.batches), data_collator=lambda rows: rows[0]).train()
    return network.state_dict()


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between weights of the same names."""
    assert set(one) == set(other) and one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# Each of them is given to our Trainer in place of what the foreign one had, and must be seen in the weights.
OTHERWISE = ({"weight_decay": 0.0}, {"max_grad_norm": 1e9}, {"lr_scheduler_type": "constant"}, {"optim_args": ""})


def check(run: Run, network: torch.nn.Module, folder: Path, otherwise: Any = OTHERWISE, **settings: Any) -> None:
    """The foreign run's weights are those of our Trainer, and would not be with any one of its settings different.

    1e-6 and not zero: a foreign Trainer multiplies gradients by what clips them before the step, ours inside of it.
    """
    same = furthest(run.after, ours(run, network, folder, **settings))
    print(f"weights moved by {furthest(run.before, run.after):.3g}; away from ours {same:.3g}")
    assert same < 1e-6
    for changed in otherwise:
        assert furthest(run.after, ours(run, network, folder, **{**settings, **changed})) > 1e-4, changed
