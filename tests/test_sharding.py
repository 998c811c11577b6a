"""Reductions over pieces are exact, and what is not supported is refused in one clear sentence."""

import json
import os
import subprocess
import sys
import warnings
from types import ModuleType

import pytest
import torch

from hf_momentum import TAM, InputError
from hf_momentum.integrations import OPTIMIZERS, deepspeed_hook
from hf_momentum.integrations.what_runs import WhatRunsCallback
from tests.launching import free_port
from tests.test_matrix import CONFIGS, ROOT, case, run_job

pytestmark = pytest.mark.xdist_group("two processes")


@pytest.mark.parametrize("processes", [3, 4])
def test_reductions_are_bitwise_those_of_whole_tensors(processes, record_refused):
    """Integer values on 3 and on 4 processes (there also HSDP), with tensors of fewer rows than processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(free_port()), str(ROOT / "tests" / "reduction_job.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert f"all reductions exact on {processes} processes" in result.stdout, result.stderr[-4000:]
    record_refused("FSDP1")
    record_refused("tensor parallelism")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offload_optimizer", {"device": "nvme"}, r"offload_optimizer\.device is 'nvme'.*Accepted: 'none' or 'cpu'"),
        ("offload_param", {"device": "nvme"}, r"offload_param\.device is 'nvme'"),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, r"offload_optimizer\.ratio is 0\.5"),
        ("zero_hpz_partition_size", 4, "zero_hpz_partition_size is 4"),
        ("mics_shard_size", 2, "mics_shard_size is 2"),
        ("zenflow", {"topk_ratio": 0.1}, "zenflow is True"),
    ],
)
def test_untested_deepspeed_settings_are_refused(key, value, message, record_refused):
    with pytest.raises(InputError, match=rf"{message}.*Supported: one process"):
        deepspeed_hook.check_config({"zero_optimization": {"stage": 2, key: value}})
    if value == {"device": "nvme"}:
        record_refused("ZeRO with NVMe offload")


def test_forcing_deepspeeds_own_adam_is_refused_and_leaving_the_key_out_is_not():
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    deepspeed_hook.check_config(config)
    with pytest.raises(InputError, match=r"zero_force_ds_cpu_optimizer is true.*Set it to false"):
        deepspeed_hook.check_config({**config, "zero_force_ds_cpu_optimizer": True})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_deepspeed_block_may_name_any_optimizer_by_class_or_by_name(name):
    for written in (name, OPTIMIZERS[name].cls.__name__):
        assert deepspeed_hook.named_in({"optimizer": {"type": written}}) is OPTIMIZERS[name]


def test_accelerate_hands_our_optimizers_over_as_they_are_and_maps_others():
    import accelerate.accelerator

    ours = TAM([torch.nn.Parameter(torch.zeros(2))])
    assert accelerate.accelerator.map_pytorch_optim_to_deepspeed(ours) is ours
    assert deepspeed_hook._mapped(lambda optimizer: "replaced", None, ("another",), {}) == "replaced"


def test_a_missing_function_is_told_where_deepspeed_is_installed_and_only_there(monkeypatch):
    """Without DeepSpeed Accelerate has no such function: everybody who only wants `--optim tam` would be warned."""
    accelerator = ModuleType("accelerate.accelerator")
    with pytest.warns(RuntimeWarning, match="map_pytorch_optim_to_deepspeed is missing"):
        deepspeed_hook.keep_under_accelerate(accelerator)
    monkeypatch.setattr(deepspeed_hook, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepspeed_hook.keep_under_accelerate(accelerator)


def test_another_optimizer_than_the_one_asked_for_stops_before_the_first_step(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), optim="tam", use_cpu=True)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(
        InputError, match=r"--optim tam was asked for, but torch\.optim\.adamw\.AdamW is what would run"
    ):
        WhatRunsCallback().on_train_begin(args, TrainerState(), TrainerControl(), optimizer=other)


def block(kind: str, **params: object) -> dict[str, object]:
    return {"optimizer": {"type": kind, "params": params}}


REFUSALS = [
    {**case("block", "adamw_torch", steps=2), "deepspeed": block("TAM", lr=0.05, gamma=0.8)},
    {**case("bad-block", "adamw_torch", steps=2), "deepspeed": block("TAM", lr=0.05, gama=0.8)},
    {**case("other-block", "tam", steps=2), "deepspeed": block("AdamW", lr=0.05, torch_adam=True)},
    {**case("nvme", "tam", steps=2), "deepspeed": {"zero_optimization.offload_optimizer": {"device": "nvme"}}},
]


def test_deepspeed_json_blocks_build_ours_and_never_swap_it_silently(tmp_path):
    """One launch of real ZeRO-2 engines."""
    pytest.importorskip("deepspeed")
    facts = run_job(tmp_path / "run", REFUSALS, 2, CONFIGS / "zero2.yaml")
    assert facts["block"]["optimizer"] == "TAM" and facts["block"]["wrapper"] == "DeepSpeedZeroOptimizer"
    assert "no argument 'gama' (did you mean 'gamma'" in facts["bad-block"]["error"]
    assert "--optim tam was asked for, but torch.optim.adamw.AdamW is what would run" in facts["other-block"]["error"]
    assert "offload_optimizer.device is 'nvme'" in facts["nvme"]["error"]
    line = "hf-momentum: TAM inside DeepSpeedZeroOptimizer on ZeRO-1/2: 21 tensors in 1 group, in 2 shards each; one"
    assert (tmp_path / "run" / "log.txt").read_text().count(line) == 1, "one process speaks"


def test_half_precision_weights_without_zero_are_refused(tmp_path, record_refused):
    """DeepSpeed's wrapper for them steps once with zero gradients at its start, and loses which tensor is which."""
    pytest.importorskip("deepspeed")
    config = tmp_path / "zero0.yaml"
    text = (CONFIGS / "zero1.yaml").read_text()
    config.write_text(text.replace("zero_stage: 1", "zero_stage: 0"))
    facts = run_job(tmp_path / "run", [case("bf16", "tam", steps=2, bf16=True)], 2, config)
    assert "set the ZeRO stage to 1, 2 or 3" in facts["bf16"]["error"]
    record_refused("ZeRO-0 with half-precision weights")


def test_the_tables_of_support_are_what_the_matrix_found():
    """README and docs are generated from docs/support.json, which holds every optimizer."""
    script = ROOT / "scripts" / "support_table.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((ROOT / "docs" / "support.json").read_text())
    for name in OPTIMIZERS:
        assert {"DDP", "FSDP2", "HSDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"} <= set(found["differences"][name])
    assert max(max(row.values()) for label, row in found["differences"].items() if "bf16" not in label) <= 1e-6
