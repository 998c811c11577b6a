"""The passes of a surgery over memory: what is done to gradients and to the average of main gradients.

One buffer beside the gradient is enough. The auxiliary gradient comes first, into the gradient buffer b. It is
projected with the old average e, and what is left of it, p, is lent to e. The backward pass of the main loss adds its
gradient g to the same buffer, and when e then absorbs rate times the buffer, what was lent cancels:

    p = b - c e                     b = p
    e = keep e - lend p
    b = p + g                       that backward pass
    e = e + rate b                  with rate = lend:  keep e + rate g

So what enters e is p as b holds it, rounded to b's dtype.

The two functions are the mathematics in plain torch. `Passes` chooses: kernels where they can be had, and these
functions for what kernels do not take.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, call, is_, itemgetter
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from hf_momentum.errors import InputError
from hf_momentum.kernels import (
    Gradients,
    How,
    Reduced,
    State,
    alignment_sums,
    choice,
    rule,
    squared_norms,
    sum_dtype,
    weight_seed,
)

# A part for plain torch is closed once it holds this many elements, which bounds its temporaries.
_PART_ELEMENTS = 2**26

# Lists of so many kinds are remembered.
_KNOWN = 8

# What the sorting follows from. A wrapper may give other gradients in any step, so it is looked up every time, in C.
_FACTS: tuple[Callable[[Any], Any], ...] = (
    type,
    attrgetter("dtype"),
    Tensor.get_device,
    Tensor.is_contiguous,
    Tensor.numel,
)


# ---- the functions, in place on lists of tensors --------------------------------------------------------------------


def project_and_lend_(
    grads: list[Tensor],
    emas: list[Tensor],
    coefficient: Tensor | float,
    keep: Tensor | float,
    lend: Tensor | float,
) -> None:
    """p = b - coefficient e, with the old e; b = p, rounded to its dtype; e = keep e - lend b.

    Args:
        grads: the buffers b, of any floating dtype, on one device.
        emas: the averages e, float32 or float64, of the same shapes.
        coefficient, keep, lend: 0-dim tensors on that device, or floats.

    Example:
        >>> b, e = [torch.tensor([2.0, 3.0])], [torch.tensor([1.0, 0.0])]
        >>> project_and_lend_(b, e, coefficient=2.0, keep=0.5, lend=0.5)
        >>> b, e
        ([tensor([0., 3.])], [tensor([ 0.5000, -1.5000])])
    """
    if not grads:
        return
    dtype = torch.promote_types(grads[0].dtype, emas[0].dtype)
    removed = torch._foreach_mul(_as(emas, dtype), _number(coefficient, dtype))
    torch._foreach_copy_(grads, torch._foreach_sub(_as(grads, dtype), removed))
    lent = torch._foreach_mul(_as(grads, dtype), _number(lend, dtype))
    torch._foreach_mul_(emas, _number(keep, emas[0].dtype))
    torch._foreach_sub_(emas, _as(lent, emas[0].dtype))


def absorb_(grads: list[Tensor], emas: list[Tensor], keep: Tensor | float, rate: Tensor | float) -> None:
    """e = keep e + rate b; what the buffers b hold stays.

    Args:
        grads: the buffers b, of any floating dtype, on one device.
        emas: the averages e, float32 or float64, of the same shapes.
        keep, rate: 0-dim tensors on that device, or floats.

    Example:
        >>> e = [torch.tensor([0.5, -1.5])]
        >>> absorb_([torch.tensor([4.0, 4.0])], e, keep=1.0, rate=0.5)
        >>> e
        [tensor([2.5000, 0.5000])]
    """
    if not grads:
        return
    dtype = torch.promote_types(grads[0].dtype, emas[0].dtype)
    entering = torch._foreach_mul(_as(grads, dtype), _number(rate, dtype))
    torch._foreach_mul_(emas, _number(keep, emas[0].dtype))
    torch._foreach_add_(emas, _as(entering, emas[0].dtype))


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


def _number(value: Tensor | float, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


# ---- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Entries of the lists that one call takes.

    Attributes:
        places: which they are.
        whole: whether they are all entries, in order.
        fused: whether kernels take them.
        device: where they lie.
    """

    places: tuple[int, ...]
    whole: bool
    fused: bool
    device: torch.device

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Its entries of a list."""
        if self.whole:
            return list(tensors)
        return [tensors[self.places[0]]] if len(self.places) == 1 else list(itemgetter(*self.places)(tensors))


class Passes:
    """The passes over lists of gradients and averages of any devices and dtypes, by kernels where they can be had.

    Keep one for a run, and give it the same averages every time: it remembers how it sorted them with gradients like
    these. It keeps no tensor alive.

    In every call `grads` and `emas` are lists of equal length whose entries have equal shapes and devices. Gradients
    are float32, bfloat16, float16 or float64; averages float32, float64, or bfloat16 that is rounded stochastically.
    The latter need `seeds`: float64, one per entry, new ones in every step (`hf_momentum.kernels.seeds`), and on the
    entries' device, since the host waits for a copy. Numbers are floats or 0-dim tensors, and these are not read back
    to the host. Where `skip`, 0-dim, is not 0 nothing is written; the host waits for it only if there are entries that
    kernels do not take.

    Raises:
        InputError: an average has another dtype, or not its gradient's shape or device, or wants a seed.
        ValueError: the lists have different lengths.

    Example:
        >>> passes, b, e = Passes(), [torch.tensor([2.0, 3.0])], [torch.tensor([1.0, 0.0])]
        >>> be, ee, bb = passes.sums(b, e).sum(0)
        >>> passes.project_and_lend(b, e, coefficient=be / ee, keep=0.5, lend=0.5)
        >>> b[0] += 1.0  # the main gradient
        >>> passes.absorb(b, e, keep=1.0, rate=0.5)
        >>> b, e
        ([tensor([1., 4.])], [tensor([1.0000, 0.5000])])
    """

    def __init__(self) -> None:
        self._known: list[tuple[list[list[Any]], list[ReferenceType[Tensor]], list[_Part]]] = []

    def sums(self, grads: Sequence[Tensor], emas: Sequence[Tensor]) -> Tensor:
        """`<e, b>, <e, e>, <b, b>` of each entry, `[entries, 3]` in float64 on the first entry's device."""
        parts = self._sorted(grads, emas)
        if not parts:
            return torch.zeros(0, 3, dtype=torch.float64)
        found: list[Tensor] = []
        for part in parts:
            b, e = part.of(grads), part.of(emas)
            if part.fused:
                seeds = torch.zeros(len(e), dtype=torch.float64, device=part.device)  # nothing is rounded
                found.append(rule(alignment_sums)(Gradients(b, b), _state(e, seeds)))
            else:
                found.append(alignment_sums(e, b))
        if parts[0].whole:
            return found[0]
        table = torch.zeros(len(grads), 3, dtype=sum_dtype(grads[0].device), device=grads[0].device)
        rows = table.unbind()
        for part, sums in zip(parts, found, strict=True):
            torch._foreach_copy_([rows[i] for i in part.places], list(sums.to(table).unbind()))
        return table

    def squares(self, grads: Sequence[Tensor]) -> Tensor:
        """`<b, b>` of each entry, `[entries]` in float64."""
        if grads and choice.takes(grads, grads):
            found: Tensor = rule(squared_norms)(Gradients(grads, grads))
            return found[:, 0]
        return squared_norms(grads)

    def project_and_lend(
        self,
        grads: Sequence[Tensor],
        emas: Sequence[Tensor],
        coefficient: Tensor | float,
        keep: Tensor | float,
        lend: Tensor | float,
        *,
        seeds: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """`project_and_lend_`: b = b - coefficient e, then e = keep e - lend b."""
        self._apply(project_and_lend_, grads, emas, (coefficient, keep, lend), seeds, skip)

    def absorb(
        self,
        grads: Sequence[Tensor],
        emas: Sequence[Tensor],
        keep: Tensor | float,
        rate: Tensor | float,
        *,
        seeds: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """`absorb_`: e = keep e + rate b. Takes the same `seeds` as the projection, and other random bits of them."""
        # The same bits twice would round the second time by what the first has already moved: not without bias.
        self._apply(absorb_, grads, emas, (keep, rate), None if seeds is None else weight_seed(seeds), skip)

    def _apply(
        self,
        function: Callable[..., None],
        grads: Sequence[Tensor],
        emas: Sequence[Tensor],
        numbers: tuple[Tensor | float, ...],
        seeds: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        for i, e in enumerate(emas):
            if e.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise InputError(f"emas[{i}] is {e.dtype}; keep averages in float32, float64 or bfloat16")
        parts = self._sorted(grads, emas)
        if skip is not None and not all(part.fused for part in parts) and bool(skip):
            return
        states = [_state(e, _seeds_of(part, e, seeds)) for part in parts for e in [part.of(emas)]]
        for part, state in zip(parts, states, strict=True):
            b, own = part.of(grads), [x.to(part.device) if isinstance(x, Tensor) else x for x in numbers]
            if part.fused:
                how = How(skip=None if skip is None else skip.to(part.device))
                rule(function)(b, state, *own, how=how)
                continue
            values = state.decoded() if isinstance(state, Reduced) else state
            function(b, values, *own)
            if isinstance(state, Reduced):
                state.encode_(values)

    def _sorted(self, grads: Sequence[Tensor], emas: Sequence[Tensor]) -> list[_Part]:
        """The parts of the lists, sorted anew only where they are not the averages and gradients like those before."""
        facts = [list(map(fact, grads)) for fact in _FACTS]
        for known, averages, parts in self._known:
            if len(emas) == len(averages) and known == facts and all(map(is_, emas, map(call, averages))):
                return parts
        parts = _parts(grads, emas)
        self._known = [(facts, [ref(e) for e in emas], parts), *self._known[: _KNOWN - 1]]
        return parts


def _parts(grads: Sequence[Tensor], emas: Sequence[Tensor]) -> list[_Part]:
    places: dict[tuple[Any, ...], list[int]] = {}
    closed: list[tuple[tuple[Any, ...], list[int]]] = []
    elements: dict[tuple[Any, ...], int] = {}
    for i, (b, e) in enumerate(zip(grads, emas, strict=True)):
        _check(i, b, e)
        kept = e.dtype in (torch.float32, torch.bfloat16) and e.is_contiguous() and type(e) is Tensor
        fused = kept and not choice.obstacle(b, b)
        key = (b.device, b.dtype, e.dtype, fused)
        if not fused and key in places and elements[key] + b.numel() > _PART_ELEMENTS:
            closed.append((key, places.pop(key)))
        elements[key] = elements[key] + b.numel() if key in places else b.numel()
        places.setdefault(key, []).append(i)
    return [
        _Part(tuple(own), len(own) == len(grads), fused=key[-1], device=key[0])
        for key, own in [*closed, *places.items()]
    ]


def _check(i: int, b: Tensor, e: Tensor) -> None:
    if b.shape != e.shape or b.device != e.device:
        raise InputError(
            f"grads[{i}] has shape {tuple(b.shape)} on {b.device} and emas[{i}] {tuple(e.shape)} on {e.device}; "
            "make each average like its gradient"
        )


def _state(e: list[Tensor], seeds: Tensor | None) -> State:
    """Averages as kernels take them."""
    if e[0].dtype != torch.bfloat16:
        return e
    if seeds is None:
        raise InputError("seeds is None, but there are averages in bfloat16; give one float64 seed per entry")
    return Reduced(e, [x.shape for x in e], seeds)


def _seeds_of(part: _Part, e: list[Tensor], seeds: Tensor | None) -> Tensor | None:
    if seeds is None or part.whole or e[0].dtype != torch.bfloat16:
        return seeds
    rows = seeds.unbind()  # an index would be copied to the device and waited for
    return torch.stack([rows[i] for i in part.places]).to(part.device)
