"""Bloop under every layout ends with the weights of one process, and continues from a checkpoint bit for bit.

Real launches, as in test_matrix.py; `make test` runs a short form of two layouts, `make matrix-bloop` all of them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_matrix import CONFIGS, LAUNCHES, SENSITIVITY, STEPS, TOLERANCE, relative_difference, run_job

pytest.importorskip("deepspeed")


def case(label: str, optim: str = "adamw_torch", **fields: Any) -> dict[str, Any]:
    rate = 0.05 if optim in ("tam", "ahb_sgd") else 2e-4
    arguments = {"lam": [0.7], "rho": 0.1, **fields.pop("bloop", {})}
    return {"label": label, "optim": optim, "lr": rate, "bloop": arguments, **fields}


EVERYWHERE = [
    case("adamw"),
    case("tam", "tam"),
    case("accumulation", accumulation=2),
    case("lora", lora=True, optim="tam"),
    case("intact", "tam", bloop={"skip_nonfinite": True}),
    case("pcgrad", "tam", bloop={"surgery": "pcgrad"}),
]
MORE = [
    case("ema_first", "tam", bloop={"ema_order": "ema_first"}),
    case("ema_first-accumulation", "tam", accumulation=2, bloop={"ema_order": "ema_first"}),
    case("two", "tam", auxiliaries=2, bloop={"lam": [0.7, 0.3]}),
    case("two-ema_first", "tam", auxiliaries=2, bloop={"lam": [0.7, 0.3], "ema_order": "ema_first"}),
    case("first_gradient", "ahb_sgd", bloop={"ema_init": "first_gradient"}),
    case("auto", "tam", bloop={"rho": "auto"}),
    case("adam metric", bloop={"surgery_metric": "adam"}),
    case("l2", "tam", auxiliaries=0, bloop={"lam": [0.01], "aux_loss": "l2"}),
    case("distance", "tam", bloop={"aux_loss": "distance", "lam": [0.7, 0.01]}),
    case("mixed", "tam", bloop={"surgery": "mixed"}),
    case("dynamic_barrier", "tam", bloop={"surgery": "dynamic_barrier"}),
    case("simple", "tam", bloop={"surgery": "simple"}),
    case("tied", "tam", tied=True),
    case("unclipped", "tam", max_grad_norm=0.0),
    case("checkpointing", "tam", fields={"gradient_checkpointing": True}),
]
THIRDS = case("thirds", accumulation=3)
ODD = [case("odd", "tam", size="odd"), case("odd-accumulation", "tam", size="odd", accumulation=2)]
SAVED = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
STRAIGHT = [case(f"straight-{optim}", optim, fields=SAVED, bloop={"rho": "auto"}) for optim in ("tam", "adamw_torch")]
RESUMED = [{**entry, "label": entry["label"].replace("straight", "resumed"), "resumes": True} for entry in STRAIGHT]
HALF = [case("bf16", "tam", bf16=True)]
ALL = EVERYWHERE + MORE + STRAIGHT + RESUMED
CASES = {
    "DDP": ALL,
    "FSDP2": ALL,
    # Four processes share a batch of 12.
    "HSDP": [*EVERYWHERE[:2], THIRDS, *EVERYWHERE[3:]],
    "ZeRO-0": [*EVERYWHERE[:3], MORE[0]],
    "ZeRO-1": EVERYWHERE + MORE[:3],
    "ZeRO-2": ALL,
    "ZeRO-3": ALL,
    "ZeRO-2 offload": EVERYWHERE + MORE[:3],
    "ZeRO-3 offload": EVERYWHERE + MORE[:3],
    "FSDP2, bf16": HALF,
    "ZeRO-2, bf16": HALF,
    "ZeRO-1, bf16, float32 accumulation": HALF,
    "DDP, 3 processes": ODD,
    "FSDP2, 3 processes": ODD,
    "ZeRO-1, 3 processes": ODD,
    "ZeRO-2, 3 processes": ODD,
    "ZeRO-3, 3 processes": ODD,
}
SHORT = ["adamw", "accumulation", "ema_first", "two", "straight-tam", "resumed-tam"]
SHORT_LAYOUTS = ("FSDP2", "ZeRO-3")
EVERY = {entry["label"]: entry for entry in [*ALL, THIRDS, *ODD, *HALF]}
# Where gradients are rounded to bf16; as in test_matrix.py.
HALF_TOLERANCE = 5e-3


def parameters() -> list[Any]:
    return [
        pytest.param(
            layout,
            entry["label"],
            marks=[] if layout in SHORT_LAYOUTS and entry["label"] in SHORT else [pytest.mark.slow],
            id=f"{layout}-{entry['label']}",
        )
        for layout, cases in CASES.items()
        for entry in cases
    ]


@pytest.fixture(scope="session")
def asked(request) -> dict[str, set[str]]:
    """The labels of each layout that this run of the suite asks for."""
    found: dict[str, set[str]] = {}
    for item in request.session.items:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == Path(__file__) and "label" in chosen:
            found.setdefault(chosen["layout"], set()).add(chosen["label"])
    return found


@pytest.fixture(scope="session")
def single(tmp_path_factory, asked):
    """Every case that any layout runs, on one process."""
    labels = set().union(*asked.values())
    folder = tmp_path_factory.mktemp("bloop_single") / "one"
    # Against gradient accumulation stands a plain batch of the same size.
    wanted = [entry for label, entry in EVERY.items() if label in labels and "resumes" not in entry]
    cases = [{**entry, "accumulation": 1} for entry in wanted]
    return folder, run_job(folder, cases, 1, None)


@pytest.fixture(scope="session")
def launched(tmp_path_factory, asked):
    """Runs a layout once, and gives its folder and facts."""
    base, done = tmp_path_factory.mktemp("bloop_matrix"), {}

    def launch(layout: str) -> tuple[Path, dict[str, Any]]:
        if layout not in done:
            what, folder = LAUNCHES[layout], base / layout.replace(" ", "_").replace(",", "")
            config = CONFIGS / f"{what.config}.yaml"
            if what.config == "zero0":
                config = base / "zero0.yaml"
                config.write_text((CONFIGS / "zero1.yaml").read_text().replace("zero_stage: 1", "zero_stage: 0"))
            cases = []
            for entry in CASES[layout]:
                if entry["label"] in asked[layout]:
                    entry = {**entry, "deepspeed": {**what.deepspeed, **entry.get("deepspeed", {})}}
                    if entry.get("resumes"):
                        run = folder / "runs" / entry["label"].replace("resumed", "straight")
                        entry["resume"] = str(run / "checkpoint-10")
                    cases.append(entry)
            done[layout] = folder, run_job(folder, cases, what.processes, config)
        return done[layout]

    return launch


@pytest.mark.parametrize(("layout", "label"), parameters())
def test_the_single_process_trajectory(layout, label, launched, single):
    what = LAUNCHES[layout]
    folder, facts = launched(layout)
    found = facts[label]
    assert "error" not in found, found
    assert (found["num_processes"], found["distributed_type"]) == (what.processes, what.distributed_type)
    assert found["steps"] == STEPS and found["moved"] > 1e-3, "the weights moved"
    alone = label.replace("resumed", "straight")
    if label != alone:
        one, other = (torch.load(folder / f"{name}.pt") for name in (label, alone))
        assert all(torch.equal(one[name], other[name]) for name in one), "a resumed run has the same bits"
    difference = relative_difference(single[0] / f"{alone}.pt", folder / f"{label}.pt")
    print(f"{layout}, {label}: largest relative difference {difference:.1e}")
    assert difference <= (HALF_TOLERANCE if label.endswith("bf16") else TOLERANCE)
    surgery, wanted = found["surgery"], single[1][alone]["surgery"]
    if EVERY[label]["bloop"].get("surgery", "bloop") != "bloop" or label in ("l2", "distance", "two", "two-ema_first"):
        return
    # A wrong projection shows only where there is something to remove.
    assert max(surgery["removed_fraction"]) > 0.01
    if not label.endswith("bf16") and label == alone:
        for name in ("aux_loss", "aux_cosine", "removed_fraction", "noise_ratio", "rho"):
            # After one step Adam's weights 1 / (sqrt(v) + eps) are largest where v is little more than rounding.
            tolerance = 1e-3 if label == "adam metric" else 1e-4
            assert surgery[name] == pytest.approx(wanted[name], rel=tolerance, abs=1e-6), name
    kept = found["averages"]
    assert kept["elements"] == kept["held"] > 0, "the average is cut like the parameters"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout, cases in CASES.items() if cases is ALL])
def test_a_projection_left_out_would_be_seen(layout, launched):
    """The same run with the plain mixture ends elsewhere."""
    folder, _ = launched(layout)
    assert relative_difference(folder / "mixed.pt", folder / "tam.pt") > SENSITIVITY
