"""Saved and resumed under a sharded layout: bit for bit on as many processes, the same trajectory on another number."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_momentum.training.export import export
from tests.launching import LAYOUTS, config_of
from tests.test_matrix import TOLERANCE, case, relative_difference, run_job

pytestmark = pytest.mark.xdist_group("two processes")

STEPS, HALF = 20, 10
# Numbers per tensor, per group and over the model; state of one, two and three buffers; Python numbers in the groups.
OPTIMIZERS = {
    "tam-tensor": case("tam-tensor", "tam", optim_args="granularity=tensor"),
    "ahb_adamw": case("ahb_adamw", "ahb_adamw", optim_args="difference=preconditioned"),
    "vradam": case("vradam", "vradam"),
    "critical_sgd": case("critical_sgd", "critical_sgd", optim_args="law=critical_nesterov,curvature=measured"),
    "schedule": case("schedule", "tam", momentum_schedule="hybrid", momentum_schedule_args="switch=fraction"),
    "tam-lora": case("tam-lora", "tam", lora=True),
}
SHORT = {"fsdp2-sharded": ["tam-tensor"], "zero3": ["ahb_adamw"]}


def straight_and_resumed(label: str, folder: Path) -> list[dict[str, Any]]:
    """20 steps with a checkpoint at the half; and from there again, in a folder of its own."""
    fields = {"save_strategy": "steps", "save_steps": HALF, "max_steps": STEPS}
    straight = {**OPTIMIZERS[label], "label": f"{label}-straight", "fields": fields}
    checkpoint = folder / "runs" / f"{label}-straight" / f"checkpoint-{HALF}"
    again = {**OPTIMIZERS[label], "label": f"{label}-again", "resume": str(checkpoint), "fields": fields}
    return [straight, again]


def launches() -> list[Any]:
    found = []
    for layout in LAYOUTS:
        for label in OPTIMIZERS:
            marks = [] if label in SHORT.get(layout, []) else [pytest.mark.slow]
            found.append(pytest.param(layout, label, marks=marks, id=f"{layout}-{label}"))
    return found


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """A layout's folder after one launch of all its cases that were asked for."""
    done: dict[str, Path] = {}
    chosen = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]

    def launch(layout: str) -> Path:
        if layout.startswith("zero"):
            pytest.importorskip("deepspeed")
        if layout not in done:
            base = tmp_path_factory.mktemp("resume")
            folder = base / layout
            labels = list(dict.fromkeys(one["label"] for one in chosen if one["layout"] == layout))
            cases = [entry for label in labels for entry in straight_and_resumed(label, folder)]
            facts = run_job(folder, cases, 2, config_of(layout, base))
            assert not [one for one in facts.values() if "error" in one], facts
            done[layout] = folder
        return done[layout]

    return launch


@pytest.mark.parametrize(("layout", "label"), launches())
def test_a_resumed_run_ends_bit_for_bit(layout, label, runs):
    folder = runs(layout)
    straight, again = (torch.load(folder / f"{label}-{kind}.pt") for kind in ("straight", "again"))
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize(
    ("layout", "label"),
    [
        *[
            (layout, label)
            for layout in ("ddp", "fsdp2-sharded", "fsdp2-full")
            for label in ("tam-tensor", "ahb_adamw")
        ],
        *[(layout, label) for layout in ("zero1", "zero2", "zero3") for label in ("tam-tensor", "ahb_adamw")],
    ],
)
def test_a_checkpoint_of_two_processes_continues_on_another_number(layout, label, processes, runs, tmp_path):
    """FSDP2 and DDP directly; ZeRO by way of a plain checkpoint, under the same layout again."""
    folder = runs(layout)
    checkpoint = folder / "runs" / f"{label}-straight" / f"checkpoint-{HALF}"
    if layout.startswith("zero"):
        checkpoint = export(checkpoint, tmp_path / "plain", resumable=True)
    again = {**straight_and_resumed(label, folder)[1], "resume": str(checkpoint), "launched": True}
    if layout.startswith("fsdp"):  # a single CPU process makes a process group, and so shards over itself, only if told
        again["fields"] = {**again["fields"], "use_cpu": True}
    facts = run_job(tmp_path / "run", [again], processes, config_of(layout, tmp_path))
    assert facts[f"{label}-again"]["num_processes"] == processes, facts
    difference = relative_difference(folder / f"{label}-straight.pt", tmp_path / "run" / f"{label}-again.pt")
    print(f"{layout}, {label}, from 2 to {processes} processes: {difference:.1e}")
    assert difference <= TOLERANCE
    shutil.rmtree(tmp_path, ignore_errors=True)
