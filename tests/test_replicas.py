"""Rounding at random takes the same random bits on every replica, and again in every run."""

import pytest
import torch

from tests.test_matrix import CONFIGS, case, run_job

pytestmark = pytest.mark.xdist_group("two processes")

NAMES = ("tam", "adatamw")


def rounded(label: str, name: str, options: str) -> dict:
    return case(label, name, size="wide", model_dtype="bfloat16", optim_args=options)


def test_bfloat16_weights_rounded_at_random_are_the_same_on_both_processes_and_in_both_runs(tmp_path):
    cases = []
    for name in NAMES:
        options = "stochastic_rounding=true,state_dtype=int8"
        cases += [rounded(f"{name}-first", name, options), rounded(f"{name}-second", name, options)]
        cases.append(rounded(f"{name}-nearest", name, "state_dtype=int8"))
    facts = run_job(tmp_path / "run", cases, 2, CONFIGS / "ddp.yaml")
    for name in NAMES:
        for run in ("first", "second", "nearest"):
            one, two = facts[f"{name}-{run}"]["held"]
            assert facts[f"{name}-{run}"]["steps"] == 20
            assert one["weights"] == two["weights"] and one["state"] == two["state"], (name, run)
            assert one["counts"]["int8"][0] > one["counts"].get("float32", [0])[0]
        found = {run: torch.load(tmp_path / "run" / f"{name}-{run}.pt") for run in ("first", "second", "nearest")}
        assert all(torch.equal(value, found["second"][key]) for key, value in found["first"].items())
        assert any(not torch.equal(value, found["nearest"][key]) for key, value in found["first"].items())
