"""The machine that a run would find: its devices, their memory, and what they compute in."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Hardware:
    """What settings are chosen for.

    Attributes:
        name: of the device, as people call it.
        kind: "cuda", "cpu" or another type of torch's.
        count: devices of that kind; 1 for the CPU.
        memory: bytes of one device; of the host for the CPU.
        bf16: whether mixed precision in bfloat16 is worth while.
        fp16: whether mixed precision in float16 is, where bfloat16 is not.
    """

    name: str
    kind: str
    count: int
    memory: int
    bf16: bool
    fp16: bool

    @property
    def usable(self) -> float:
        """Bytes that a run may take: other programs, the allocator's gaps and what no estimate knows need the rest."""
        return self.memory * (0.5 if self.kind == "cpu" else 0.8)

    def __str__(self) -> str:
        """Such as "one CPU with 16 GiB".

        Example:
            >>> str(Hardware("H100", "cuda", 2, 80 * 2**30, True, False))
            '2 x H100 with 80 GiB each'
        """
        many = f"{self.count} x " if self.count > 1 else ""
        return f"{many}{self.name} with {self.memory / 2**30:.0f} GiB{' each' if self.count > 1 else ''}"


def find_hardware() -> Hardware:
    """The accelerators of this machine, or its CPU.

    Example:
        >>> find_hardware().count >= 1
        True
    """
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(properties.name, "cuda", torch.cuda.device_count(), properties.total_memory, bf16, not bf16)
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        kind = "cpu" if device is None else device.type
        # Of other devices neither memory nor formats are asked alike: half of the host's memory is a careful guess.
        return Hardware(kind, kind, torch.accelerator.device_count(), host_memory() // 2, False, False)
    cores = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1
    return Hardware(f"CPU ({cores} cores)", "cpu", 1, host_memory(), False, False)


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its container's if that is less.

    Example:
        >>> host_memory() > 2**28
        True
    """
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    known = [int(text) for text in (path.read_text().strip() for path in limits if path.is_file()) if text.isdigit()]
    return min([whole, *known])


def operations_per_second() -> float:
    """What this CPU does in float32, from a twentieth of a second of matrix products.

    Example:
        >>> operations_per_second() > 1e8
        True
    """
    square = torch.ones(256, 256)
    square @ square
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 0.05:
        square @ square
        count += 1
    return float(2 * 256**3 * count / seconds)
