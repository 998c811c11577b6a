"""One trajectory: every optimizer ends with the single process's weights under every layout.

`make test` runs a short form of three layouts; `make matrix` all of them, and writes `docs/support.json`, from which
README's table is made. Each layout is one launch of real processes with the real launcher file, on CPU by way of
`cpu_shims`, and every launch proves what it was: number of processes, backend, layout, and collectives per step.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.kernels import SMALLEST
from tests.launching import free_port
from tests.sharded_job import model_of

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "accelerate_configs"
STEPS, TOLERANCE, SENSITIVITY = 20, 1e-6, 1e-5
# One worker runs the launches, so that they do not crowd each other out.
pytestmark = pytest.mark.xdist_group("two processes")

# Adam divides by the root of small second moments, which magnifies the rounding of gradients: at ten times these rates
# DDP alone, where nothing is sharded, ends 2e-6 to 4e-6 away from one process. A wrong sum scales with the rate, too.
ADAM_RATE, RATES = 2e-4, {"adatam": 1e-5, "adatamw": 1e-5}
VARIANTS = {
    "tam-tensor": ("tam", "granularity=tensor"),
    "adatamw-tensor": ("adatamw", "granularity=tensor,bias_correction=true"),
    "ahb_sgd-tensor": ("ahb_sgd", "granularity=tensor"),
    "ahb_adamw-preconditioned": ("ahb_adamw", "difference=preconditioned,granularity=tensor"),
    "vradam-tensor": ("vradam", "norm_scope=tensor"),
    "vradam-group": ("vradam", "norm_scope=group"),
    "vradam-update": ("vradam", "norm_of=update,beta3=1e-4"),
    "critical_sgd-measured": ("critical_sgd", "law=critical_nesterov,curvature=measured"),
    "critical_adamw-measured": ("critical_adamw", "curvature=measured"),
}


def case(label: str, optim: str, **fields: Any) -> dict[str, Any]:
    adam = optim not in OPTIMIZERS or OPTIMIZERS[optim].adam_arguments
    rate = RATES.get(optim, ADAM_RATE if adam else 0.05)
    return {"label": label, "optim": optim, "lr": rate, **fields}


NAMES = [case(name, name) for name in OPTIMIZERS]
OPTIONS = [case(label, optim, optim_args=text) for label, (optim, text) in VARIANTS.items()]
for entry in OPTIONS:
    if entry["label"] in ("adatamw-tensor", "vradam-update"):
        entry["lr"] = (
            1e-4 if entry["optim"] == "adatamw" else 1e-3
        )  # bias correction and a gate that brakes: small steps
LORA = [case(f"{name}-lora", name, lora=True) for name in OPTIMIZERS]
ACCUMULATION = [case(f"{name}-accumulation", name, accumulation=2) for name in OPTIMIZERS]
ODD = [case(f"{name}-odd", name, size="odd") for name in OPTIMIZERS]
# So hard that every step is clipped; on one process by torch's clip_grad_norm_ before the step.
CLIPPED = [
    case(f"{name}-clipped", name, max_grad_norm=0.05, alone={"clips_first": True})
    for name in ("tam", "vradam", "ahb_sgd", "critical_adamw")
]
REST = [
    case("tam-tied", "tam", tied=True),
    case("tam-unclipped", "tam", max_grad_norm=0.0),
    case("schedule-hybrid", "adamw_torch", momentum_schedule="hybrid", momentum_schedule_args="switch=fraction"),
    case("schedule-onecycle", "tam", momentum_schedule="onecycle"),
]
# State in fewer bits, against float32 state on one process. ZeRO-3's sub-groups hold large and small pieces together.
FEW_BITS = [
    case(
        f"{name}-{dtype}",
        name,
        size="wide",
        optim_args=f"state_dtype={dtype}",
        deepspeed={"zero_optimization.sub_group_size": 20000},
        alone={"optim_args": None},
    )
    for name in ("tam", "adatamw", "vradam", "ahb_adamw")
    for dtype in ("int8", "bfloat16")
]
# Nothing here divides by the number of processes, and every step is clipped, by the optimizer itself.
LAYERS = [
    case(
        "tam-layers", "tam", size="odd", max_grad_norm=0.05, alone={"clips_first": True},
        fields={"log_layers": True, "log_layers_split": "parts", "logging_steps": 5, "logging_first_step": True},
    )
]  # fmt: skip
NAIVE = [{"label": "naive", "naive": True, "lr": 0.05}]
# Gradients in bf16, state and sums in float32. ZeRO's weights are rounded to bf16 as well, which shows as 1e-3.
HALF = [case(f"{name}-bf16", name, bf16=True) for name in ("tam", "vradam", "ahb_adamw")]
HALF_TOLERANCE = 5e-3
# Measured, over all layouts: 8e-3 to 2.7e-2 in eight bits, 2e-3 to 3e-3 in bfloat16.
STRAYS = {"int8": 4e-2, "bfloat16": 5e-3}
ALWAYS = ["tam", "adatamw-tensor", "ahb_adamw-preconditioned", "vradam", "critical_sgd-measured", "tam-lora", "naive"]
EVERY = {
    e["label"]: e
    for e in NAMES + OPTIONS + LORA + ACCUMULATION + ODD + CLIPPED + REST + HALF + FEW_BITS + NAIVE + LAYERS
}


@dataclass(frozen=True)
class Launch:
    """One layout: its launcher file, how many processes, what must really run, and with which cases."""

    config: str
    processes: int
    distributed_type: str
    kind: str
    cases: list[dict[str, Any]]
    deepspeed: dict[str, Any] = field(default_factory=dict)
    wrapper: str | None = None


FULL = NAMES + OPTIONS + LORA + ACCUMULATION + CLIPPED + REST + FEW_BITS + NAIVE
ZERO2 = {"wrapper": "DeepSpeedZeroOptimizer"}
# The small sub-groups make ZeRO-3 call `step` many times for one update.
ZERO3 = {"wrapper": "DeepSpeedZeroOptimizer_Stage3", "deepspeed": {"zero_optimization.sub_group_size": 3000}}
ROUND_ROBIN = {"zero_optimization.round_robin_gradients": True}
LAUNCHES = {
    "DDP": Launch("ddp", 2, "MULTI_CPU", "whole tensors", FULL + LAYERS),
    "FSDP2": Launch("fsdp2", 2, "FSDP", "FSDP2", FULL + LAYERS),
    "HSDP": Launch("hsdp", 4, "FSDP", "HSDP", NAMES + CLIPPED + FEW_BITS + NAIVE + LAYERS),
    "ZeRO-0": Launch("zero0", 2, "DEEPSPEED", "whole tensors", NAMES + CLIPPED),
    "ZeRO-1": Launch("zero1", 2, "DEEPSPEED", "ZeRO-1/2", NAMES + NAIVE, **ZERO2),
    "ZeRO-2": Launch("zero2", 2, "DEEPSPEED", "ZeRO-1/2", FULL, **ZERO2),
    "ZeRO-3": Launch("zero3", 2, "DEEPSPEED", "ZeRO-3", FULL, **ZERO3),
    "ZeRO-2 offload": Launch("zero2_offload", 2, "DEEPSPEED", "ZeRO-1/2", NAMES, **ZERO2),
    "ZeRO-3 offload": Launch("zero3_offload", 2, "DEEPSPEED", "ZeRO-3", NAMES + FEW_BITS, **ZERO3),
    "ZeRO-2 round robin": Launch("zero2", 2, "DEEPSPEED", "ZeRO-1/2", NAMES[:1], ROUND_ROBIN, ZERO2["wrapper"]),
    "DDP, bf16": Launch("ddp", 2, "MULTI_CPU", "whole tensors", HALF),
    "FSDP2, bf16": Launch("fsdp2", 2, "FSDP", "FSDP2", HALF),
    "ZeRO-2, bf16": Launch("zero2", 2, "DEEPSPEED", "ZeRO-1/2", HALF, **ZERO2),
    "ZeRO-3, bf16": Launch("zero3", 2, "DEEPSPEED", "ZeRO-3", HALF, **ZERO3),
    # DeepSpeed's own optimizer for this: one call of `step` for all groups.
    "ZeRO-1, bf16, float32 accumulation": Launch(
        "zero1", 2, "DEEPSPEED", "ZeRO-1/2", HALF, {"data_types.grad_accum_dtype": "fp32"}, "BF16_Optimizer"
    ),
    "DDP, 3 processes": Launch("ddp", 3, "MULTI_CPU", "whole tensors", ODD),
    "FSDP2, 3 processes": Launch("fsdp2", 3, "FSDP", "FSDP2", ODD),
    "ZeRO-1, 3 processes": Launch("zero1", 3, "DEEPSPEED", "ZeRO-1/2", ODD, **ZERO2),
    "ZeRO-2, 3 processes": Launch("zero2", 3, "DEEPSPEED", "ZeRO-1/2", ODD, **ZERO2),
    "ZeRO-3, 3 processes": Launch("zero3", 3, "DEEPSPEED", "ZeRO-3", ODD, **ZERO3),
}
IN_SHORT = {
    "FSDP2": [*ALWAYS, *[entry["label"] for entry in CLIPPED], "tam-int8", "vradam-bfloat16", "tam-layers"],
    "ZeRO-2": ALWAYS,
    "ZeRO-3": [*ALWAYS, "adatamw-int8"],
}


def parameters(few_bits: bool) -> Iterator[Any]:
    for layout, launch in LAUNCHES.items():
        for entry in launch.cases:
            if (entry in FEW_BITS) == few_bits:
                marks = [] if entry["label"] in IN_SHORT.get(layout, []) else [pytest.mark.slow]
                yield pytest.param(layout, entry["label"], marks=marks, id=f"{layout}-{entry['label']}")


def environment() -> dict[str, str]:
    paths = f"{ROOT / 'tests' / 'cpu_shims'}{os.pathsep}{ROOT}"
    added = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    return {**os.environ, **added}


def run_job(folder: Path, cases: list[dict[str, Any]], processes: int, config: Path | None) -> dict[str, Any]:
    """The facts of each case by label; judged by the file that the job writes, not by its exit status."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({"cases": cases, "processes": processes}))
    job = [str(ROOT / "tests" / "sharded_job.py"), str(folder / "plan.json")]
    if config is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        job = [*launcher, "--num_processes", str(processes), "--main_process_port", str(free_port()), *job]
    result = subprocess.run(
        [sys.executable, *job], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    (folder / "log.txt").write_text(result.stdout + result.stderr)
    assert (folder / "facts.json").is_file(), (result.stdout + result.stderr)[-4000:]
    return {facts["label"]: facts for facts in json.loads((folder / "facts.json").read_text())}


@pytest.fixture(scope="session")
def wanted(request) -> Callable[[str], list[dict[str, Any]]]:
    """The cases of a layout that this run of the suite asks for."""
    asked: dict[str, set[str]] = {}
    for item in request.session.items:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        if "label" in chosen:
            asked.setdefault(chosen["layout"], set()).add(chosen["label"])
    return lambda layout: [entry for entry in LAUNCHES[layout].cases if entry["label"] in asked[layout]]


@pytest.fixture(scope="session")
def launched(tmp_path_factory, wanted) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Runs a layout once, and gives its folder and facts."""
    base, done = tmp_path_factory.mktemp("matrix"), {}

    def launch(layout: str) -> tuple[Path, dict[str, Any]]:
        if layout not in done:
            what, folder = LAUNCHES[layout], base / layout.replace(" ", "_")
            config = CONFIGS / f"{what.config}.yaml"
            if what.config == "zero0":  # the launcher's plain way to say "DeepSpeed, but nothing is sharded"
                config = base / "zero0.yaml"
                config.write_text((CONFIGS / "zero1.yaml").read_text().replace("zero_stage: 1", "zero_stage: 0"))
            cases = [{**e, "deepspeed": {**what.deepspeed, **e.get("deepspeed", {})}} for e in wanted(layout)]
            done[layout] = folder, run_job(folder, cases, what.processes, config)
        return done[layout]

    return launch


@pytest.fixture(scope="session")
def single(tmp_path_factory, wanted) -> tuple[Path, dict[str, Any]]:
    """Every case that any layout runs, on one process."""
    labels = {entry["label"] for layout in LAUNCHES for entry in _asked(wanted, layout)}
    folder = tmp_path_factory.mktemp("single") / "one"
    cases = [{**entry, **entry.get("alone", {})} for label, entry in EVERY.items() if label in labels]
    return folder, run_job(folder, cases, 1, None)


def _asked(wanted: Callable[[str], list[dict[str, Any]]], layout: str) -> list[dict[str, Any]]:
    try:
        return wanted(layout)
    except KeyError:
        return []


def relative_difference(one: Path, other: Path) -> float:
    """The largest difference of any weight over the largest weight."""
    a, b = torch.load(one), torch.load(other)
    assert a.keys() == b.keys()
    scale = max(value.abs().max() for value in a.values())
    return float(max((a[key] - b[key]).abs().max() for key in a) / scale)


@pytest.mark.parametrize(("layout", "label"), list(parameters(few_bits=False)))
def test_the_single_process_trajectory(layout, label, launched, single, record_support):
    what = LAUNCHES[layout]
    folder, facts = launched(layout)
    found = facts[label]
    assert "error" not in found, found
    assert (found["num_processes"], found["distributed_type"]) == (what.processes, what.distributed_type)
    assert found["steps"] == STEPS and found["moved"] > 1e-3, "the weights moved"
    difference = relative_difference(single[0] / f"{label}.pt", folder / f"{label}.pt")
    print(f"{layout}, {label}: largest relative difference {difference:.1e}")
    if label == "naive":
        sharded = what.kind != "whole tensors"
        assert difference > SENSITIVITY if sharded else difference <= TOLERANCE
        return
    if EVERY[label] not in LAYERS:  # which is no optimizer's support
        record_support(label, layout, difference)
    assert difference <= (HALF_TOLERANCE if label.endswith("bf16") else TOLERANCE)
    if found["kind"] is None:
        return  # an optimizer of torch's, under a momentum schedule
    assert found["optimizer"] == OPTIMIZERS[EVERY[label]["optim"]].cls.__name__
    assert (found["kind"], found["wrapper"]) == (what.kind, what.wrapper)
    assert found["clips_inside"] == ("DEEPSPEED" not in what.distributed_type)
    assert found["collectives"] == STEPS * all_reduces(label, found), "whatever the number of groups"


def all_reduces(label: str, found: dict[str, Any]) -> int:
    """How often a step communicates: once for its sums, if it has any, in which the norm comes along if it can."""
    if found["kind"] == "whole tensors":
        return 0
    critical = found["optimizer"].startswith("Critical")
    sums = not critical or "measured" in label
    # Sums over what the clipped gradients have entered come too late for the norm.
    norm_comes_along = not critical and found["optimizer"] != "VRMomentum" and label != "vradam-update"
    clips = found["clips_inside"] and EVERY[label].get("max_grad_norm", 1.0) > 0
    return int(sums) + int(clips and not norm_comes_along)


@pytest.mark.parametrize(
    ("layout", "label"),
    [
        p
        for p in parameters(few_bits=False)
        if p.values[1] in [entry["label"] for entry in CLIPPED]
        if p.values[0] != "ZeRO-0"  # DeepSpeed tells no norm there
    ],
)
def test_the_logged_norm_is_that_of_one_process(layout, label, launched, single):
    """Every step was clipped, and where this package clips the norm is that before clipping."""
    alone, found = single[1][label], launched(layout)[1][label]
    assert not alone["clips_inside"] and len(alone["grad_norms"]) == len(found["grad_norms"]) == STEPS
    assert min(alone["grad_norms"]) > 2 * EVERY[label]["max_grad_norm"]
    assert found["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "label"), [p for p in parameters(few_bits=False) if p.values[1] in [entry["label"] for entry in LAYERS]]
)
def test_the_log_of_layers_is_that_of_one_process(layout, label, launched, single):
    """Norms, updates and noise of every group; the sketch of shards is the sketch of the whole."""
    alone, found = single[1][label]["layers"], launched(layout)[1][label]["layers"]
    assert len(alone) == 5 and len(alone[0]) == 2 * 12 and len(alone[4]) == 3 * 12
    for expected, entry in zip(alone, found, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("layout", "label"), list(parameters(few_bits=True)))
def test_state_in_few_bits_follows_float32_state_on_one_process(layout, label, launched, single):
    """The distance of the weights from those of float32 state, over the way that these went."""
    what = LAUNCHES[layout]
    folder, facts = launched(layout)
    found = facts[label]
    assert "error" not in found, found
    assert (found["num_processes"], found["distributed_type"]) == (what.processes, what.distributed_type)
    assert (found["kind"], found["wrapper"], found["steps"]) == (what.kind, what.wrapper, STEPS)
    dtype = label.rpartition("-")[2]
    for process in found["held"]:
        elements, size = process["counts"][dtype]
        assert elements >= 2 * SMALLEST and size <= {"int8": 1.1, "bfloat16": 2}[dtype] * elements
        assert process["largest_float32"] < SMALLEST, "all momenta and second moments of large pieces are reduced"
    strayed = strays(folder / f"{label}.pt", single[0] / f"{label}.pt", EVERY[label]["size"])
    print(f"{layout}, {label}: strayed {strayed:.1e}")
    assert 1e-5 < strayed <= STRAYS[dtype]
    if what.kind in ("whole tensors", "HSDP"):
        copies = {(process["shard"], process["weights"], process["state"]) for process in found["held"]}
        assert len(copies) == (1 if what.kind == "whole tensors" else 2), "replicas hold the same bits"
    if what.kind == "ZeRO-1/2":
        assert len({process["weights"] for process in found["held"]}) == 1


@pytest.mark.slow
def test_the_bounds_of_few_bits_see_a_scale_that_is_wrong_by_a_tenth(tmp_path):
    """On one process; and that another method is far outside."""
    entries = {label: entry for label, entry in EVERY.items() if entry in FEW_BITS}
    cases = [
        {**entry, "optim_args": f"{entry['optim_args']},fused=false", "wrong_scale": scale, "label": f"{label}-{scale}"}
        for label, entry in entries.items()
        for scale in (1.0, 1.1)
    ]
    cases += [{**entry, **entry["alone"], "label": f"{entry['optim']}-float32"} for entry in FEW_BITS[::2]]
    cases.append({**EVERY["vradam-int8"], **EVERY["vradam-int8"]["alone"], "optim": "ahb_adamw", "label": "another"})
    run_job(tmp_path / "run", cases, 1, None)
    far = {
        case["label"]: strays(
            tmp_path / "run" / f"{case['label']}.pt", tmp_path / "run" / f"{case['optim']}-float32.pt", "wide"
        )
        for case in cases[: 2 * len(entries)]
    }
    far["another"] = strays(tmp_path / "run" / "another.pt", tmp_path / "run" / "vradam-float32.pt", "wide")
    print(", ".join(f"{label}: strayed {distance:.1e}" for label, distance in far.items()))
    for label in entries:
        bound = STRAYS[label.rpartition("-")[2]]
        assert far[f"{label}-1.0"] <= bound
        assert far[f"{label}-1.1"] > 2 * bound
    assert far["another"] > 2 * STRAYS["int8"]


def strays(one: Path, reference: Path, size: str) -> float:
    """|w - w_ref| over |w_ref - w_0|, over all weights."""
    start = dict(model_of(size, False, False).named_parameters())
    a, b = torch.load(one), torch.load(reference)
    assert a.keys() == b.keys()
    away, gone = (torch.cat([(x[k] - y[k]).detach().view(-1) for k in b]).norm() for x, y in ((a, b), (b, start)))
    return float(away / gone)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in IN_SHORT else [pytest.mark.slow])
        for name, launch in LAUNCHES.items()
        if "tam" in [c["label"] for c in launch.cases]
    ],
)
@pytest.mark.usefixtures("wanted")
def test_the_gradients_were_correlated_and_the_wrapper_called_in_parts(layout, launched):
    """With uncorrelated batches the cosine is near 0 and a wrong one would not show."""
    _, facts = launched(layout)
    found = facts["tam"]
    assert len(found["cosines"]) == STEPS and max(found["cosines"]) > 0.3
    if LAUNCHES[layout].kind.startswith("ZeRO"):
        assert found["calls"] >= 2 * STEPS, "DeepSpeed calls `step` at least once for each of two groups"
