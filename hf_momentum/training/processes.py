"""How the processes of a run were launched, and how they share the model.

The launcher speaks through environment variables. This file is where they are read, for the whole room.
"""

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from hf_momentum.errors import InputError

# What `accelerate launch` and torch's launcher put into the environment of the processes that they start.
_LAUNCHERS_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
_LAUNCHERS_NAMES = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def launched_processes() -> int:
    """The number of processes that the launcher started, over all machines; 1 without a launcher.

    Example:
        >>> launched_processes()
        1
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_for() -> DistributedType | None:
    """What the launcher was told to shard the model with: `FSDP`, `DEEPSPEED`, or None for neither.

    Example:
        >>> launched_for() is None
        True
    """
    for name, kind in (("DEEPSPEED", DistributedType.DEEPSPEED), ("FSDP", DistributedType.FSDP)):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return kind
    return None


def own_device() -> str | None:
    """The accelerator of this process among those that a launcher started; None without a launcher, or on CPUs.

    Example:
        >>> own_device() is None
        True
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if launched_processes() == 1 or accelerator is None:
        return None
    return f"{accelerator.type}:{int(os.environ.get('LOCAL_RANK', '0')) % torch.accelerator.device_count()}"


def environment_of_one_process(device: torch.device) -> dict[str, str]:
    """This process's environment without the launcher's variables, and with `device` as the only GPU.

    Args:
        device: where this process trains; a plain process that saw several GPUs would split its batches over them.

    Example:
        >>> "WORLD_SIZE" in environment_of_one_process(torch.device("cpu"))
        False
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHERS_NAMES and not name.startswith(_LAUNCHERS_PREFIXES)
    }
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        index = device.index or 0
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    return kept


def check_launch(state: PartialState | AcceleratorState) -> None:
    """Refuse to train when the launcher was told to shard the model and Accelerate does not.

    Accelerate leaves FSDP out on CPU processes, and DeepSpeed under `use_cpu`, and says nothing.

    Args:
        state: of the processes, as they are before an Accelerator exists, or of the Accelerator.

    Raises:
        InputError: the model would be replicated, or each process would train alone.

    Example:
        >>> check_launch(PartialState(cpu=True))
    """
    asked, got = launched_for(), state.distributed_type
    # FSDP gets its own type with the Accelerator, on the processes of any device but the CPU.
    becomes_fsdp = (
        isinstance(state, PartialState) and got.value.startswith("MULTI_") and got != DistributedType.MULTI_CPU
    )
    if asked is not None and got != asked and not (asked == DistributedType.FSDP and becomes_fsdp):
        name = "FSDP" if asked == DistributedType.FSDP else "DeepSpeed"
        why = "use_cpu is set" if torch.accelerator.is_available() else f"the processes run on {state.device.type}"
        raise InputError(
            f"the launcher was told to shard the model with {name}, but {why}, and Accelerate then leaves it out "
            f"(distributed type {got.value}). Train on GPUs without use_cpu, or launch with ddp or single"
        )
    launched = launched_processes()
    if state.num_processes != launched:
        raise InputError(
            f"the launcher started {launched} processes, but this one sees {state.num_processes} (distributed type "
            f"{got.value}, device {state.device.type}), and would train alone. Train on GPUs, or launch with ddp or "
            "single"
        )


def layout(accelerator: Accelerator) -> str:
    """How the processes share the model, in a few words.

    Returns:
        Such as "one process", "DDP, 2 processes", "FSDP2, 8 processes", "HSDP 2x4" (two copies, each sharded over
        four processes) or "ZeRO-3 with optimizer offload, 8 processes".

    Example:
        >>> layout(Accelerator(cpu=True))
        'one process'
    """
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    count = "one process" if processes == 1 else f"{processes} processes"
    if kind == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return f"ZeRO-{zero['stage']}{_offload(zero)}, {count}"
    if kind == DistributedType.FSDP:
        plugin, parallelism = accelerator.state.fsdp_plugin, accelerator.parallelism_config
        offload = " with CPU offload" if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else ""
        if parallelism is not None and parallelism.dp_replicate_size > 1:
            return f"HSDP {parallelism.dp_replicate_size}x{parallelism.dp_shard_size}{offload}"
        return f"FSDP{plugin.fsdp_version}{offload}, {count}"
    return count if processes == 1 else f"DDP, {count}"


def _offload(zero: Mapping[str, dict[str, str]]) -> str:
    """Such as " with optimizer and parameter offload", or nothing."""
    parts = [
        part
        for part, key in (("optimizer", "offload_optimizer"), ("parameter", "offload_param"))
        if (zero.get(key) or {}).get("device") not in (None, "none")
    ]
    return f" with {' and '.join(parts)} offload" if parts else ""
