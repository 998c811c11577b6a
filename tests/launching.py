"""Starts programs under `accelerate launch` as two CPU processes, with the layouts that a checkpoint can have."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
JOB = ROOT / "tests" / "checkpoint_job.py"

_COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "num_machines": 1,
    "machine_rank": 0,
    "num_processes": 2,
    "mixed_precision": "no",
    "rdzv_backend": "static",
    "same_network": True,
    "main_training_function": "main",
}


def _fsdp(state_dict: str) -> dict:
    return {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": state_dict,
            "fsdp_cpu_ram_efficient_loading": False,
        },
    }


def _zero(stage: int) -> dict:
    zero = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": 500000}
    if stage == 3:
        # Small enough that the tiny model fills several sub-groups.
        zero |= {"sub_group_size": 15000, "stage3_gather_16bit_weights_on_model_save": True}
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 100000}
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 1000000,
    }
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": config}}


LAYOUTS = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2-sharded": _fsdp("SHARDED_STATE_DICT"),
    "fsdp2-full": _fsdp("FULL_STATE_DICT"),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
}


def config_of(layout: str, folder: Path) -> Path:
    config = {**_COMMON, **LAYOUTS[layout]}
    if "deepspeed_config" in config:
        file = folder / f"{layout}.json"
        file.write_text(json.dumps(config["deepspeed_config"]["deepspeed_config_file"]))
        del config["mixed_precision"]  # Accelerate wants it in the file alone
        config["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": False}
    path = folder / f"{layout}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(layout: str, folder: Path, *words: object, processes: int = 2) -> subprocess.CompletedProcess:
    """Run the checkpoint job in `folder`; results lie in files there, for a launcher's exit status can mislead."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "cpu_shims"), str(ROOT)])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_of(layout, folder)]
    command += ["--main_process_port", free_port(), "--num_processes", processes, JOB, folder, *words]
    return subprocess.run(
        list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def facts_of(folder: Path, result: subprocess.CompletedProcess) -> dict:
    """What the job wrote at its end; fails with the program's last words if it did not get there."""
    assert (folder / "facts.json").is_file(), result.stderr[-3000:]
    return json.loads((folder / "facts.json").read_text())
