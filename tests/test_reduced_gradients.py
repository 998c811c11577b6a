"""Gradients of two losses, written between backward and step, under every layout: the arithmetic of one process.

Each layout is one launch of real processes with the real launcher file, on CPU by way of `cpu_shims`. The job goes
through eight kinds of steps one after the other, so that what one leaves behind shows in the next, and every step is
clipped, so that a norm of anything but the combination shows in the weights.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_momentum.sharding import UnsupportedLayoutError
from hf_momentum.sharding.zero_gradients import reduced_gradients
from tests.launching import free_port
from tests.test_matrix import CONFIGS, ROOT, environment

pytest.importorskip("deepspeed")

TOLERANCE, SENSITIVITY = 1e-6, 1e-2
pytestmark = pytest.mark.xdist_group("two processes")

EVERYWHERE = [{"label": "one micro-batch", "micros": 1}, {"label": "two micro-batches", "micros": 2}]
SCALED = [{"label": "scaled loss", "micros": 2, "loss_scale": 8.0}]
# Gradients are summed over processes in float32: then even 16-bit weights have the gradients of one process.
FLOAT32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
HALF = [
    {"label": f"bf16, {micros}", "micros": micros, "dtype": "bfloat16", "deepspeed": FLOAT32_SUMS} for micros in (1, 2)
]
FP16 = [{"label": "fp16", "micros": 2, "dtype": "float16", "deepspeed": FLOAT32_SUMS}]
OPTIONS = [
    {"label": f"{name}={value}", "micros": 2, "zero": {name: value}}
    for name, value in {
        "round_robin_gradients": True,
        "parameter_alignment": True,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
    }.items()
]
STAGE_1 = [{**case, "label": f"{case['label']}, stage 1", "stage": 1} for case in EVERYWHERE]


def fault(method: str, form: str) -> dict[str, Any]:
    """A method that does nothing, in three steps of one kind that need it."""
    return {"label": f"without {method}", "micros": 1, "faults": [method], "forms": [form] * 3}


@dataclass(frozen=True)
class Launch:
    """One layout: its launcher file, how many processes, what must really run, and with which cases."""

    config: str | None
    processes: int
    distributed_type: str
    kind: str
    gradients: str
    cases: list[dict[str, Any]]
    faults: list[dict[str, Any]] = field(default_factory=list)


ZERO12, ZERO3 = ("DEEPSPEED", "ZeRO-1/2"), ("DEEPSPEED", "ZeRO-3")
PARTITION, PARTITIONED = (*ZERO12, "PartitionGradients"), (*ZERO3, "Zero3Gradients")
LAUNCHES = {
    "one process": Launch(None, 1, "NO", "whole tensors", "WholeGradients", EVERYWHERE),
    "DDP": Launch("ddp", 2, "MULTI_CPU", "whole tensors", "WholeGradients", EVERYWHERE),
    "FSDP2": Launch("fsdp2", 2, "FSDP", "FSDP2", "WholeGradients", EVERYWHERE),
    "HSDP": Launch("hsdp", 4, "FSDP", "HSDP", "WholeGradients", EVERYWHERE),
    "ZeRO-0": Launch("zero0", 2, "DEEPSPEED", "whole tensors", "WholeGradients", EVERYWHERE),
    "ZeRO-1": Launch("zero1", 2, *PARTITION, EVERYWHERE, [fault("keep", "auxiliary_first")]),
    "ZeRO-2": Launch("zero2", 2, *PARTITION, EVERYWHERE, [fault("keep", "main_first")]),
    "ZeRO-3": Launch("zero3", 2, *PARTITIONED, EVERYWHERE, [fault("drop", "auxiliary_first")]),
    "ZeRO-1, options": Launch("zero1", 2, *PARTITION, SCALED + OPTIONS + FP16),
    "ZeRO-2, options": Launch("zero2", 2, *PARTITION, SCALED + OPTIONS + FP16 + HALF),
    "ZeRO-3, options": Launch("zero3", 2, *PARTITIONED, SCALED + FP16 + HALF),
    "ZeRO-1, bf16, float32 accumulation": Launch(
        "zero1",
        2,
        *ZERO12,
        "BF16Gradients",
        HALF,
        [HALF[0] | fault("keep", "auxiliary_first"), HALF[0] | fault("settle", "auxiliary_first")],
    ),
    "ZeRO-2 offload": Launch(
        "zero2_offload",
        2,
        *ZERO12,
        "OffloadedGradients",
        EVERYWHERE + SCALED + STAGE_1 + HALF + FP16,
        [fault("keep", "main_first"), fault("settle", "auxiliary_first"), fault("drop", "auxiliary_first")],
    ),
    "ZeRO-3 offload": Launch(
        "zero3_offload",
        2,
        *PARTITIONED,
        EVERYWHERE + SCALED + HALF,
        [fault("settle", "auxiliary_first"), fault("drop", "auxiliary_first")],
    ),
    "ZeRO-1, 3 processes": Launch("zero1", 3, *PARTITION, EVERYWHERE),
    "ZeRO-2, 3 processes": Launch("zero2", 3, *PARTITION, EVERYWHERE),
    "ZeRO-3, 3 processes": Launch("zero3", 3, *PARTITIONED, EVERYWHERE),
}
SHORT = ("ZeRO-2", "ZeRO-3")


def parameters(which: str) -> list[Any]:
    return [
        pytest.param(layout, case["label"], marks=[] if layout in SHORT else [pytest.mark.slow])
        for layout, launch in LAUNCHES.items()
        for case in getattr(launch, which)
    ]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs a layout once, and gives the facts of its cases by label; judged by the file that the job writes."""
    base, done = tmp_path_factory.mktemp("gradients"), {}

    def launch(layout: str) -> dict[str, Any]:
        if layout not in done:
            what, folder = LAUNCHES[layout], base / layout.replace(" ", "_").replace(",", "")
            done[layout] = run_job(folder, what.cases + what.faults, what.config, what.processes)
        return done[layout]

    return launch


def run_job(folder: Path, cases: list[dict[str, Any]], config: str | None, processes: int) -> dict[str, Any]:
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(cases))
    command = [sys.executable]
    if config is not None:
        path = CONFIGS / f"{config}.yaml"
        if config == "zero0":
            path = folder / "zero0.yaml"
            path.write_text((CONFIGS / "zero1.yaml").read_text().replace("zero_stage: 1", "zero_stage: 0"))
        command += ["-m", "accelerate.commands.launch", "--config_file", str(path)]
        command += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    command += [str(ROOT / "tests" / "gradients_job.py"), str(folder / "plan.json")]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (folder / "facts.json").is_file(), (result.stdout + result.stderr)[-4000:]
    return {facts["label"]: facts for facts in json.loads((folder / "facts.json").read_text())}


@pytest.mark.parametrize(("layout", "label"), parameters("cases"))
def test_gradients_norms_and_weights_are_those_of_one_process(layout, label, launched):
    """After each loss, after writing and adding, after taking, after dropping, and the weights after every step."""
    what, found = LAUNCHES[layout], launched(layout)[label]
    assert "error" not in found, found
    assert (found["num_processes"], found["distributed_type"]) == (what.processes, what.distributed_type)
    assert (found["kind"], found["gradients"]) == (what.kind, what.gradients)
    assert found["rows"] == [row for row in range(16) if row != found["frozen"]], "all but the frozen tensor's"
    assert (found["cut"] > 0) == (what.kind != "whole tensors"), "some tensor is cut between processes"
    assert found["least_clipped"] > 2, "every step was clipped"
    assert found["loss_scale"] == {"scaled loss": 8.0, "fp16": 16.0}.get(label, 1.0)
    # A boundary in the middle is a matter of wrappers that reduce without it.
    assert (found["steps"], len(found["claims"])) == ((11, 13) if found["boundary"] else (12, 14))
    print(f"{layout}, {label}: largest relative difference {max(found['claims'].values()):.1e}")
    assert {name: value for name, value in found["claims"].items() if not value <= TOLERANCE} == {}


@pytest.mark.parametrize(("layout", "label"), parameters("faults"))
def test_a_method_that_does_nothing_shows(layout, label, launched):
    """Else the test above would prove nothing about it."""
    found = launched(layout)[label]
    assert max(found["claims"].values()) > SENSITIVITY


@pytest.mark.slow
def test_half_precision_without_zero_is_refused(tmp_path):
    case = {"label": "bf16", "micros": 1, "dtype": "bfloat16"}
    error = run_job(tmp_path / "job", [case], "zero0", 2)["bf16"]["error"]
    assert "DeepSpeed keeps the gradients in its FP16_UnfusedOptimizer" in error and "ZeRO stage to 1, 2 or 3" in error


def engine_of(zero: Any, **differences: Any) -> Any:
    plain = {
        "zenflow": False,
        "is_deepcompile_enabled": lambda: False,
        "managed_gradient_accumulation": lambda: True,
        "fp16_master_weights_and_gradients": lambda: False,
        "bf16_master_weights_and_gradients": lambda: False,
        "basic_optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
    }
    return SimpleNamespace(**plain | differences, optimizer=zero)


class Muon(torch.optim.SGD):
    """Known to DeepSpeed by its name."""


@pytest.mark.parametrize(
    ("message", "differences"),
    [
        ("swapped to NVMe", {}),
        ("runs with zenflow", {"zenflow": True}),
        ("runs with DeepCompile", {"is_deepcompile_enabled": lambda: True}),
        ("managed_gradient_accumulation: false", {"managed_gradient_accumulation": lambda: False}),
        ("master weights in 16 bits", {"bf16_master_weights_and_gradients": lambda: True}),
        ("Muon", {"basic_optimizer": Muon([torch.nn.Parameter(torch.zeros(1))], lr=1.0)}),
    ],
)
def test_what_was_not_looked_at_is_refused(message, differences):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    zero = object.__new__(DeepSpeedZeroOptimizer_Stage3)
    zero.torch_autocast_gradscaler, zero.swap_optimizer, zero.params_in_nvme_and_cpu = None, True, False
    with pytest.raises(UnsupportedLayoutError, match=message):
        reduced_gradients(engine_of(zero, **differences), None, [])


def test_an_unknown_wrapper_is_refused_by_name():
    with pytest.raises(UnsupportedLayoutError, match="DeepSpeed keeps the gradients in its SimpleNamespace"):
        reduced_gradients(engine_of(SimpleNamespace()), None, [])
