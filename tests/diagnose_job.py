"""A program for `accelerate launch`: diagnoses of models in folders, one after the other, on all processes.

`plan.json` holds a list of cases; what each found goes to `facts.json` beside it. A case with a fault leaves one thing
out that several processes need.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

from hf_momentum.errors import InputError
from hf_momentum.sharding import Layout
from hf_momentum.training import differentiable, samples
from hf_momentum.training.diagnose import diagnose, settings_of


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    """Without the factor that undoes the average, without sums over shards, or without sums of their sketches."""
    collect = differentiable.collect

    def averaged(batches: Any, loss_of: Any, *args: Any, **keywords: Any) -> Any:
        def average_of(batch: Any) -> tuple[torch.Tensor, int]:
            loss, count = loss_of(batch)
            return loss / dist.get_world_size(), count

        return collect(batches, average_of, *args, **keywords)

    faults = {
        None: patch.dict(os.environ),
        "averaged": patch.object(differentiable, "collect", averaged),
        "unreduced": patch.object(Layout, "totals", lambda self, table: table),
        "unjoined": patch.object(Layout, "joined", lambda self, parts, shape: sum(parts.values())),
    }
    with faults[name]:
        yield


def live_bytes() -> int:
    """Of all tensors that Python knows of; each storage once."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and not isinstance(one, DTensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(storages.values())


def facts_of(case: dict[str, Any]) -> dict[str, Any]:
    """One diagnosis, and what it ran on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    kinds: list[str] = []
    found = differentiable.reduced_gradients

    def noted(*args: Any) -> Any:
        gradients = found(*args)
        kinds.append(gradients.layout.kind)
        return gradients

    collect, held = differentiable.collect, []

    def weighed(*args: Any, **keywords: Any) -> Any:
        held.append(live_bytes())
        return collect(*args, **keywords)

    before = live_bytes()
    measured = patch.object(differentiable, "collect", weighed)
    units = patch.object(samples, "_UNITS", case["units"])
    with units, measured, patch.object(differentiable, "reduced_gradients", noted), fault(case.get("fault")):
        report = diagnose(settings_of(case["settings"]))
    state = AcceleratorState() if dist.is_initialized() else PartialState()
    facts = {
        "label": case["label"],
        "num_processes": state.num_processes,
        "distributed_type": state.distributed_type.value,
        "kinds": kinds,
    }
    if report is None:
        return facts
    return {
        **facts,
        "counts": [report.looked_at, report.errors, report.right],
        "trained": asdict(report.trained),
        "random": report.random and asdict(report.random),
        "chosen": report.chosen,
        "groups": [asdict(group) for group in report.groups],
        "model": report.facts["model"],
        "held": (max(held) - before) / (4 * sum(group.parameters for group in report.groups)),
    }


def main() -> None:
    """Run the plan."""
    path = Path(sys.argv[1])
    facts = []
    for case in json.loads(path.read_text()):
        try:
            facts.append(facts_of(case))
        except InputError as error:
            facts.append({"label": case["label"], "error": str(error)})
    if not dist.is_initialized() or dist.get_rank() == 0:
        (path.parent / "facts.json").write_text(json.dumps(facts, indent=1))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
