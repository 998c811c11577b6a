"""A process killed in mid-step or in mid-save costs the steps since the last complete checkpoint, and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_momentum.training.checkpoints import faults
from tests.launching import facts_of, launch

# One worker runs the whole module: every case starts several processes.
pytestmark = pytest.mark.xdist_group("two processes")

STEPS, EVERY = 6, 2
MID_STEP, MID_SAVE = "step:4", "save:4"


@dataclass(frozen=True)
class Case:
    layout: str
    optim: str
    kill: str

    def __str__(self) -> str:
        return f"{self.layout}-{self.optim}-{self.kill.replace(':', '')}"


def cases() -> list:
    short = Case("ddp", "tam", MID_SAVE)
    long = [Case("ddp", "tam", MID_STEP)]
    long += [
        Case(layout, "tam", kill) for layout in ("fsdp2-sharded", "zero2", "zero3") for kill in (MID_STEP, MID_SAVE)
    ]
    return [short, *(pytest.param(case, marks=pytest.mark.slow) for case in long)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run of a layout and optimizer, launched once."""
    done: dict[tuple[str, str], Path] = {}

    def folder(case: Case) -> Path:
        if case.layout.startswith("zero"):
            pytest.importorskip("deepspeed")
        key = (case.layout, case.optim)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("straight") / case.layout
            result = launch(case.layout, done[key], "--optim", case.optim, "--steps", STEPS, "--save_steps", EVERY)
            assert facts_of(done[key], result)["processes"] == 2
        return done[key]

    return folder


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_killed_process_costs_only_the_steps_since_the_last_complete_checkpoint(case, straight, tmp_path):
    whole = straight(case)
    words = ["--optim", case.optim, "--steps", STEPS, "--save_steps", EVERY]

    killed = launch(case.layout, tmp_path, *words, "--kill", case.kill)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-3000:]
    assert not (tmp_path / "facts.json").exists(), "the run ended before its end"
    first, second = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    assert not faults(first)
    assert second.exists() == (case.kill == MID_SAVE)
    if second.exists():
        assert faults(second) == ["complete.json is missing"]

    resumed = launch(case.layout, tmp_path, *words, "--resume", "true")
    facts = facts_of(tmp_path, resumed)
    assert facts["error"] is None
    assert ("checkpoint-4 is torn: complete.json is missing; skipped" in resumed.stdout) == (case.kill == MID_SAVE)
    assert resumed.stdout.count("is torn") <= 1, "one process speaks"
    assert not faults(second), "the torn one was written anew"
    # The log of a resumed run begins with the checkpoint's own: it went on after step 2, not from the start.
    assert len(facts["losses"]) == STEPS

    expected, found = (load_file(folder / "final.safetensors") for folder in (whole, tmp_path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    before = load_file(whole / "truth-2.safetensors")
    assert any(not torch.equal(expected[name], before[name]) for name in expected), "the weights moved after step 2"
