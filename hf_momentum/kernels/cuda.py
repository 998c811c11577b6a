"""The kernels on lists of CUDA tensors: `triton_kernels.py`, launched over tables of pointers.

Nothing here waits for the device. A table of pointers is filled in pinned memory and copied behind the host's back; an
unchanged list of tensors finds its table still there. Every table that is copied has a pinned buffer of its own, so
none is rewritten while it is read: once dropped it goes back to torch's allocator of pinned memory, which hands it out
again only after the copy. A CUDA graph reads the buffer at every replay, so what is copied while one is being captured
stays for as long as this module; and the graph gets tables of its own, since those of the caches may be dropped.

Numbers that the host knows are filled in on the device and those that are tensors copied there, so that a captured
step computes with what the tensors hold at each replay.

Under TRITON_INTERPRET=1 the same code takes CPU tensors, as slowly as tests can bear.
"""

import functools
import itertools
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_momentum.kernels.rounding import Packed
from hf_momentum.kernels.work import Gradients, Numbers, Reduced, State, Work

# Elements that a program takes and those that it holds at a time: 8 for each thread, of bfloat16 one 128-bit load.
# The tables then take 12 bytes for 16384 elements, and a tensor of 4M is enough for all processors of a large GPU.
_CHUNK, _TILE, _WARPS = 16384, 2048, 8

# Triton 3.9 announces another default for the fusion of a product and a sum.
_OPTIONS = {"enable_fp_fusion": True}

# Rows that a program adds up at a time in the second stage of the sums.
_ROWS = 512

# The rows of the tables that programs read.
_ROLES = ("weights", "grads", "first", "squares", "previous", "first_scales", "squares_scales")
_KINDS = {"STATE": "first", "SQUARES": "squares", "PREVIOUS": "previous"}
_NUMBERS = ("sign", "keep", "enter", "rate", "shrink", "unbias", "weight_seed", "state_seed")


@dataclass(frozen=True)
class _Kernel:
    """What a kernel of cpu_kernels.c is called in triton_kernels.py, and the numbers that it needs."""

    rule: str
    phase: str
    numbers: tuple[str, ...]


_KERNELS = {
    "alignment_sums": _Kernel("ALIGNMENT", "STEP", ("sign",)),
    "squared_norms": _Kernel("NORM", "STEP", ("sign",)),
    "squared_changes": _Kernel("CHANGE", "STEP", ("sign", "unbias")),
    "momentum_step": _Kernel("UPDATE", "STEP", ("sign", "keep", "enter", "rate", "shrink")),
    "momentum_advance": _Kernel("UPDATE", "ADVANCE", ("sign", "keep", "enter")),
    "momentum_apply": _Kernel("UPDATE", "APPLY", ("rate", "shrink")),
    "momentum_project": _Kernel("PROJECT", "STEP", ("keep", "enter", "rate")),
    "adam_step": _Kernel("UPDATE", "STEP", ("sign", "keep", "enter", "rate", "shrink", "unbias")),
    "adam_advance": _Kernel("UPDATE", "ADVANCE", ("sign", "keep", "enter", "rate", "unbias")),
    "adam_apply": _Kernel("UPDATE", "APPLY", ("rate", "shrink", "unbias")),
}


# ---- whether they can be had ----------------------------------------------------------------------------------------


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and if not, why. Runs the smallest of them at the first call.

    Example:
        >>> there, why_not = available()
        >>> there == (why_not == "")
        True
    """
    try:
        import triton
    except ImportError as error:
        return False, f"Triton cannot be imported ({error}); install triton"
    try:
        interpreted = triton.knobs.runtime.interpret
        if not (interpreted or torch.cuda.is_available()):
            return False, "no CUDA device found"
        one = [torch.ones(1, device="cpu" if interpreted else "cuda")]
        _made("squared_norms", Work(grads=Gradients(one, one), written=False), 1)
    except Exception as error:  # Triton compiles for this very device and has no common class for what may go wrong
        reason = (str(error).strip().splitlines() or [""])[0]
        return False, f"Triton does not run here ({type(error).__name__}: {reason})"
    return True, ""


# ---- tables on the device -------------------------------------------------------------------------------------------

_T = TypeVar("_T")

_captured: list[Tensor] = []  # pinned memory that CUDA graphs read at every replay


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _copied(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, without waiting."""
    if device.type == "cpu":
        return host
    pinned = host.pin_memory()
    if _capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _remembered(function: "functools._lru_cache_wrapper[_T]", device: torch.device, *key: Any) -> _T:
    """`function(*key, device, stream)` out of its cache, but made anew for a CUDA graph.

    What one stream has been told to copy another must not read: so a stream is part of the key.
    """
    if _capturing(device):
        return function.__wrapped__(*key, device, 0)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return function(*key, device, stream)


@dataclass(frozen=True)
class _Table:
    """Addresses of tensors, `[role, tensor]` on the device; of each tensor, whether all are multiples of 16."""

    addresses: Tensor
    aligned: tuple[bool, ...]


@functools.lru_cache(maxsize=64)
def _table(words: bytes, tensors: int, device: torch.device, stream: int) -> _Table:
    host = torch.frombuffer(bytearray(words), dtype=torch.int64).view(len(_ROLES), tensors)
    aligned = (host[: _ROLES.index("first_scales")] & 15).eq(0).all(0)  # scales are read one by one
    return _Table(_copied(host, device), tuple(aligned.tolist()))


@dataclass(frozen=True)
class _Chunks:
    """How tensors are cut, on the device: first the chunks of aligned tensors, then the others.

    Attributes:
        owners: chunk -> tensor.
        begins: chunk -> its first element in the tensor.
        numels: of the tensors.
        starts: tensor -> how many chunks the tensors before it have; and one entry for all.
        aligned: the number of chunks of aligned tensors.
        total: the number of chunks.
    """

    owners: Tensor
    begins: Tensor
    numels: Tensor
    starts: Tensor
    aligned: int
    total: int


@functools.lru_cache(maxsize=32)
def _chunks(
    numels: tuple[int, ...], aligned: tuple[bool, ...], size: int, device: torch.device, stream: int
) -> _Chunks:
    lengths = torch.tensor(numels, dtype=torch.int64)
    counts = (lengths + size - 1) // size
    order = torch.tensor(sorted(range(len(numels)), key=lambda t: not aligned[t]), dtype=torch.int64)
    owners = order.repeat_interleave(counts[order])
    before = (counts[order].cumsum(0) - counts[order]).repeat_interleave(counts[order])
    begins = (torch.arange(len(owners)) - before) * size
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return _Chunks(
        owners=_copied(owners.int(), device),
        begins=_copied(begins, device),
        numels=_copied(lengths, device),
        starts=_copied(starts, device),
        aligned=int(counts[torch.tensor(aligned)].sum()),
        total=len(owners),
    )


def _numbers(kernel: _Kernel, work: Work, seeds: dict[str, Tensor | None], device: torch.device) -> Tensor:
    """The numbers that a kernel needs, `[role, tensor]`; 0 in other rows."""
    table = torch.zeros(len(_NUMBERS), len(work.pieces()), dtype=torch.float64, device=device)
    sign = 1.0 if work.grads is None else work.grads.sign * work.grads.factor
    values: dict[str, Numbers | None] = {name: getattr(work, name) for name in kernel.numbers if name != "sign"}
    for name, row in zip(_NUMBERS, table.unbind(), strict=True):
        value = {"sign": sign, **values, **seeds}.get(name)
        if isinstance(value, Tensor) and value.dim():
            row.copy_(value)
        elif value is not None:
            row.fill_(value)
    return table


# ---- one pass -------------------------------------------------------------------------------------------------------


def _stored(state: State) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """State tensors as they lie in memory, and the scales of their blocks where they have any."""
    if not isinstance(state, Reduced):
        return state, ()
    packed = [part for part in state.parts if isinstance(part, Packed)]
    if packed:
        return [part.codes for part in packed], [part.scales for part in packed]
    return [part for part in state.parts if isinstance(part, Tensor)], ()


def _roles(work: Work) -> dict[str, Sequence[Tensor]]:
    """The lists of tensors of a pass, some of them empty, in the order of `_ROLES`."""
    first, first_scales = _stored(work.first)
    squares, squares_scales = _stored(work.squares or ())
    grads = work.grads or Gradients((), ())
    lists = (
        work.weights or (grads.weights if grads.decay else ()),
        grads.raw,
        first,
        squares,
        work.previous or (),
        first_scales,
        squares_scales,
    )
    return dict(zip(_ROLES, lists, strict=True))


def _seeds(work: Work) -> dict[str, Tensor | None]:
    """The seeds for what is rounded at random: bfloat16 weights if told so, and reduced state."""
    bfloat16 = bool(work.weights) and work.pieces()[0].dtype == torch.bfloat16
    reduced = [state.seeds for state in (work.first, work.squares) if isinstance(state, Reduced)]
    return {"weight_seed": work.seeds if bfloat16 else None, "state_seed": reduced[0] if reduced else None}


def _device(lists: Sequence[Sequence[Tensor]]) -> torch.device:
    """The one device of all tensors."""
    devices: set[torch.device] = set(map(attrgetter("device"), itertools.chain(*lists)))
    if len(devices) > 1:
        raise ValueError(f"one pass takes tensors on one device, got {sorted(map(str, devices))}")
    return devices.pop()


def _tables(lists: Sequence[Sequence[Tensor]], numels: tuple[int, ...], device: torch.device) -> tuple[_Table, _Chunks]:
    none = [0] * len(numels)
    words = array("q")
    for tensors in lists:
        words.extend(map(Tensor.data_ptr, tensors) if tensors else none)
    table = _remembered(_table, device, words.tobytes(), len(numels))
    return table, _remembered(_chunks, device, numels, table.aligned, _CHUNK)


def _forms(kernel: _Kernel, work: Work, roles: dict[str, Sequence[Tensor]], seeded: bool) -> dict[str, Any]:
    """What a pass is compiled for."""
    from hf_momentum.kernels import triton_kernels as programs

    kinds = {form: roles[role] for form, role in _KINDS.items()}
    change = kernel.rule == "CHANGE"
    return {
        **{form: programs.KINDS[tensors[0].dtype] if tensors else None for form, tensors in kinds.items()},
        "KIND": programs.KINDS[work.pieces()[0].dtype],
        "RULE": getattr(programs, kernel.rule).value,
        "PHASE": getattr(programs, kernel.phase).value,
        "FORM": int(work.divide_change) if change else work.nesterov,
        "COUPLED": work.grads is not None and work.grads.decay != 0 and not change,
        "SEEDED": seeded,
    }


def _made(name: str, work: Work, width: int) -> Tensor:
    """The pass, made whether or not the kernels are known to run."""
    from hf_momentum.kernels import triton_kernels as programs

    kernel, roles, seeds, tensors = _KERNELS[name], _roles(work), _seeds(work), len(work.pieces())
    forms = {**_forms(kernel, work, roles, seeds["weight_seed"] is not None), "WIDTH": width}
    sizes = {"CHUNK": _CHUNK, "TILE": _TILE, "num_warps": _WARPS}
    scalars = (work.grads.decay if work.grads else 0.0, work.beta2, 1.0 - work.beta2, work.eps)
    device = _device(list(roles.values()))
    if (device.type == "cpu") != programs.INTERPRETED:
        raise ValueError(f"Triton takes CPU tensors under TRITON_INTERPRET=1 and no others, got some on {device}")
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        table, chunks = _tables(list(roles.values()), tuple(map(Tensor.numel, work.pieces())), device)
        partial = torch.empty(chunks.total, width, dtype=torch.float64, device=device)
        sums = torch.empty(tensors, width, dtype=torch.float64, device=device)
        skip = None if work.skip is None else work.skip.float()
        where = (chunks.owners, chunks.begins, chunks.numels, chunks.starts, table.addresses)
        arguments = (*where, _numbers(kernel, work, seeds, device), partial, skip, tensors)
        for base, stop, aligned in ((0, chunks.aligned, True), (chunks.aligned, chunks.total, False)):
            if stop > base:
                grid = programs.one_pass[(stop - base,)]
                grid(*arguments, base, *map(float, scalars), **forms, ALIGNED=aligned, **sizes, **_OPTIONS)
        if sums.numel():
            grid = programs.chunk_sums[(tensors, width)]
            grid(partial, chunks.starts, sums, skip, WIDTH=width, ROWS=_ROWS, num_warps=4, **_OPTIONS)
    written = [*(work.weights or ()), *(work.previous or ())]
    if work.written:
        written += [*roles["first"], *roles["squares"]]
    torch.autograd.graph.increment_version(written)  # autograd does not see what is written past it
    return sums


def launch(kernel: str, work: Work, width: int) -> Tensor:
    """Make one pass; the sums over each tensor, `[tensors, width]` in float64 on the tensors' device.

    Args:
        kernel: a function of cpu_kernels.c.
        work: what it is given.
        width: how many sums it forms.

    Raises:
        RuntimeError: the kernels are not available.
        ValueError: the tensors lie on several devices, or not on one that Triton runs on.

    Example:
        >>> m, g = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]
        >>> work = Work(grads=Gradients(g, g), first=m, written=False)
        >>> launch("alignment_sums", work, 3).cpu() if available()[0] else torch.tensor([[3.0, 5.0, 9.0]]).double()
        tensor([[3., 5., 9.]], dtype=torch.float64)
    """
    there, why_not = available()
    if not there:
        raise RuntimeError(f"the Triton kernels are not available: {why_not}")
    return _made(kernel, work, width) if work.pieces() else torch.zeros(0, width, dtype=torch.float64)
