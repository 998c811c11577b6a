"""What a method is given for one step: vectors of its tensors, buckets of pieces, sums over the model.

A method's own file holds its mathematics and does not know how the tensors lie, which kernels run and in how many bits
its state is stored; all of that is here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from operator import attrgetter, contains, itemgetter
from typing import Any

import torch
from torch import Tensor

from hf_momentum.kernels import (
    Gradients,
    How,
    Packed,
    Reduced,
    State,
    alignment_sums,
    random_bits,
    rule,
    seeds,
    squared_norms,
    sum_dtype,
    to_bfloat16,
    weight_seed,
)
from hf_momentum.optim.piece_state import PieceState
from hf_momentum.sharding import Layout, Piece

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GroupVectors:
    """The numbers that one parameter group keeps for each of its tensors; the same on every process.

    Attributes:
        group: the parameter group, which holds the vectors, so that every checkpoint does.
        count: the number of its tensors, whatever pieces of them this process holds.
        active: the positions of those that have a gradient in this step.
        device: where the vectors lie.
    """

    group: dict[str, Any]
    count: int
    active: Sequence[int]
    device: torch.device

    def get(self, name: str, initial: float = 0.0) -> Tensor:
        """The vector `name`, one float64 entry per tensor, filled with `initial` at its first use."""
        vector: Tensor | None = self.group.get(name)
        if vector is None:
            vector = torch.full((self.count,), initial, dtype=sum_dtype(self.device), device=self.device)
        self.group[name] = vector = vector.to(self.device)  # a loaded state may lie elsewhere
        return vector

    def put(self, name: str, values: Tensor, initial: float = 0.0) -> Tensor:
        """Store the entries of `values` for the tensors that have a gradient; the others keep theirs."""
        return keep(self.group, name, merged(self.get(name, initial), self.active, values))

    def count_step(self) -> Tensor:
        """How many steps each tensor has taken, this one included; kept as `steps`."""
        return self.put("steps", self.get("steps") + 1)

    def correction(self, beta: float) -> Tensor:
        """1 - beta^t of each tensor; 1 for tensors that have taken no step."""
        steps = self.get("steps")
        return torch.where(steps == 0, torch.ones_like(steps), 1 - beta**steps)

    def root_of_correction(self, beta: float) -> Tensor:
        """sqrt(1 - beta^t) of each tensor, by which sqrt(v) is divided."""
        return self.correction(beta).sqrt()

    def seeds(self) -> Tensor:
        """Seeds for the random bits of this step, one per tensor."""
        return seeds(self.get("steps"), self.group["index"] << 20)

    def advance_correction(self, beta: Tensor) -> Tensor:
        """1 - prod(beta) over each tensor's steps so far, this one's `beta` included.

        The bias of an average whose beta varies: with beta constant it is Adam's 1 - beta^t. The group keeps the
        complement itself, c = 1 - b (1 - c), so that it starts at 0 like every other vector.

        Args:
            beta: one for all tensors or one for each.
        """
        return self.put("correction1", 1 - beta.to(self.device) * (1 - self.get("correction1")))


@dataclass
class Clip:
    """What the gradients of one step are multiplied by before a rule sees them.

    Attributes:
        max_norm: the largest norm of all gradients together; None where the optimizer does not clip.
        factor: 1, or a 0-dim tensor.
        norm: the norm of the gradients before clipping, 0-dim, once it is known.
        skip: 0-dim; where it is not 0 the step must change nothing (a gradient overflowed under a GradScaler).
    """

    max_norm: float | None = None
    factor: Tensor | float = 1.0
    norm: Tensor | None = None
    skip: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether the norm is still to be found."""
        return self.max_norm is not None and self.norm is None

    def by(self, squared_norm: Tensor) -> None:
        """Clip by the squared norm of the gradients as they are now, as `torch.nn.utils.clip_grad_norm_` does.

        Example:
            >>> clip = Clip(max_norm=1.0)
            >>> clip.by(torch.tensor(16.0, dtype=torch.float64))
            >>> clip.norm, clip.factor
            (tensor(4., dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
        """
        self.norm = squared_norm.sqrt()
        if self.max_norm is not None:
            self.factor = self.factor * (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)


@dataclass(eq=False)
class Plan:
    """What follows from the pieces of a bucket alone, worked out once for all steps that have the same bucket.

    Attributes:
        pieces: which part of which tensor each entry is.
        count: the number of the group's tensors.
    """

    count: int
    pieces: list[Piece] = field(default_factory=list)

    @cached_property
    def positions(self) -> list[int]:
        """Each piece's tensor, by its place in the group."""
        return [piece.position for piece in self.pieces]

    @cached_property
    def index(self) -> Tensor:
        """The positions as a tensor in host memory."""
        return torch.tensor(self.positions, dtype=torch.int64)

    @cached_property
    def in_order(self) -> bool:
        """Whether the pieces are those of all the group's tensors in their order."""
        return self.positions == list(range(self.count))

    @cached_property
    def whole(self) -> bool:
        """Whether each piece is all that its holder has."""
        return all(piece.start is None for piece in self.pieces)


@dataclass(frozen=True)
class Bucket:
    """Pieces of tensors of one group that have a gradient and share a device and a dtype, ready for `_foreach` calls.

    Attributes:
        group: the parameter group, with its hyperparameters.
        vectors: what the group keeps for each tensor.
        index: the group's place among the step's groups.
        clip: what this step's gradients are multiplied by; shared by all buckets.
        plan: which part of which tensor each entry is.
        params: the pieces themselves; whole tensors where nothing is sharded.
        raw_grads: their gradients as they are; `gradients()` gives what a rule works on.
        holders: the tensors that hold the pieces, whose shape the state has.
        siblings: all pieces of each holder.
        states: the state dictionaries of the holders.
        fused: whether kernels may take it; `apply` and the sums choose by it, and nothing else does.
        reduced: whether its momenta and second moments are stored as the group's `state_dtype` says.
        tables: pointers that a kernel has looked up in this step, for the next one.
    """

    group: dict[str, Any]
    vectors: GroupVectors
    index: int
    clip: Clip
    plan: Plan
    params: list[Tensor] = field(default_factory=list)
    raw_grads: list[Tensor] = field(default_factory=list)
    holders: list[Tensor] = field(default_factory=list)
    siblings: list[tuple[Piece, ...]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    fused: bool = False
    reduced: bool = False
    tables: dict[int, Any] = field(default_factory=dict)

    @property
    def pieces(self) -> list[Piece]:
        """Which part of which tensor each entry is."""
        return self.plan.pieces

    @property
    def device(self) -> torch.device:
        """The device that holds every piece of the bucket."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the bucket is computed and its state is kept unless it is reduced."""
        return compute_dtype(self.params[0])

    # ---- a rule's function on lists, or its kernel -------------------------------------------------------------------

    def apply(self, update: Callable[..., None], *arguments: Any, gradients: bool = True, **numbers: Any) -> None:
        """Update the weights by a pure function on lists, or by the kernel of the same name where the bucket is fused.

        Args:
            update: takes weights, gradients, `arguments` and `numbers`, and works in place.
            arguments: state as `buffers` gave it; vectors, 0-dim or one entry per tensor of the group; anything else
                as it is.
            gradients: False for an update that takes none, and leaves the state as it is.
            numbers: hyperparameters.
        """
        if self.fused:
            grads = [self._unformed()] if gradients else []
            rule(update)(self.params, *grads, *self._chosen(arguments), **numbers, how=self._how())
            return
        weights = self.weights()
        values = self._decoded(arguments)
        update(weights, *[self.decayed_gradients()] * gradients, *values, **numbers)
        if gradients:
            self._encode(arguments, values)
        self.store(weights)

    def advance(
        self,
        function: Callable[..., Tensor],
        *arguments: Any,
        decayed: bool = True,
        factor: Tensor | float = 1.0,
        written: bool = True,
        **numbers: Any,
    ) -> Tensor:
        """Advance state tensors by the gradients, and return sums: by a pure function or its kernel, as `apply`.

        Args:
            function: takes gradients, `arguments` and `numbers`; returns `[pieces, ...]`.
            arguments: as for `apply`.
            decayed: whether coupled weight decay enters the gradients.
            factor: what the gradients are multiplied by on top.
            written: False if it leaves state in fewer bits as it is.
            numbers: hyperparameters.
        """
        if self.fused:
            grads = self._unformed(decayed, factor)
            found: Tensor = rule(function)(grads, *self._chosen(arguments), **numbers, how=self._how())
            return found
        values = self._decoded(arguments)
        found = function(self.decayed_gradients() if decayed else self.gradients(factor), *values, **numbers)
        if written:
            self._encode(arguments, values)
        return found

    def alignment_sums(self, xs: State) -> Tensor:
        """`<x, g>, <x, x>, <g, g>` of each piece and its gradient with coupled decay, `[pieces, 3]`."""
        if not self.fused:
            return alignment_sums(self._decoded([xs])[0], self.decayed_gradients())
        sums: Tensor = rule(alignment_sums)(self._unformed(), xs, how=self._how())
        return sums

    def squared_norms(self) -> Tensor:
        """`<g, g>` of each piece's gradient, without weight decay, `[pieces, 1]`."""
        if not self.fused:
            return squared_norms(self.gradients())[:, None]
        sums: Tensor = rule(squared_norms)(self._unformed(False), how=self._how())
        return sums

    def _unformed(self, decayed: bool = True, factor: Tensor | float = 1.0) -> Gradients:
        """What `decayed_gradients()` forms, for kernels that form it on the way."""
        coupled = self.group["weight_decay"] - self.decoupled_decay() if decayed else 0.0
        sign = -1.0 if self.group["maximize"] else 1.0
        return Gradients(self.raw_grads, self.params, sign, coupled, self.clip.factor * factor)

    def _chosen(self, arguments: Sequence[Any]) -> list[Any]:
        """`arguments` with vectors, 0-dim or one entry per tensor of the group, as one entry per piece in float64."""
        return [self._each(x.double()) if isinstance(x, Tensor) else x for x in arguments]

    def _each(self, values: Tensor) -> Tensor:
        if values.dim() == 0 or self.plan.in_order:
            return values
        if values.device.type == "cpu":
            return values[self.plan.index]
        rows = values.unbind()  # an index would be copied to the device and waited for
        return torch.stack([rows[position] for position in self.plan.positions])

    def scalars(self, values: Tensor) -> Tensor | list[Tensor]:
        """`values`, 0-dim or one per tensor of the group, as `_foreach` functions take them for this bucket."""
        values = values.to(device=self.device, dtype=self.dtype)
        if values.dim() == 0:
            return values
        rows = values.unbind()
        return [rows[piece.position] for piece in self.pieces]

    # ---- state ---------------------------------------------------------------------------------------------------

    def buffers(self, name: str, dtype: torch.dtype | None = None, positive: bool = False) -> State:
        """The pieces of the state tensor `name`, created as zeros at its first use.

        Args:
            name: its key in the state dictionaries.
            dtype: how it is stored; None as the group's `state_dtype` says, for momenta and second moments.
            positive: whether it is a second moment.
        """
        reduced = self.reduced and dtype is None
        stored = dtype or (torch.bfloat16 if reduced and self.group["state_dtype"] == "bfloat16" else self.dtype)
        packed = reduced and self.group["state_dtype"] == "int8"
        parts = None if packed else self._ready(name, stored)
        if parts is None:
            parts = self._made(name, dtype, stored, positive)
        if not reduced:
            return parts
        return Reduced(parts, [p.shape for p in self.params], self._each(self.vectors.seeds()), positive)

    def _ready(self, name: str, stored: torch.dtype) -> list[Any] | None:
        """The tensors `name` where all are there as they should be; a few passes in C over all of them."""
        if not self.plan.whole or not all(map(contains, self.states, repeat(name))):
            return None
        found = list(map(itemgetter(name), self.states))
        ready = set(map(type, found)) == {Tensor} and set(map(attrgetter("dtype"), found)) == {stored}
        return found if ready and all(map(Tensor.is_contiguous, found)) else None

    def _made(self, name: str, dtype: torch.dtype | None, stored: torch.dtype, positive: bool) -> list[Any]:
        parts: list[Any] = []
        for piece, holder, state, siblings in zip(self.pieces, self.holders, self.states, self.siblings, strict=True):
            if dtype is None and self._by_pieces(piece):
                parts.append(self._piece_state(name, positive, piece, holder, siblings, state))
                continue
            value = state.get(name)
            if value is None:
                value = state[name] = torch.zeros_like(
                    holder, dtype=stored, memory_format=torch.preserve_format, requires_grad=False
                )
            elif isinstance(value, PieceState) or value.dtype is not stored:  # loaded, or the group was changed
                value = value.expanded() if isinstance(value, PieceState) else value
                value = state[name] = value.to(stored)
            if self.fused and not piece.of(value).is_contiguous():
                value = state[name] = value.contiguous()
            parts.append(piece.of(value))
        return parts

    def _by_pieces(self, piece: Piece) -> bool:
        """Whether the state of a piece has a place of its own, because its holder's storage cannot be its own."""
        dtype = self.group["state_dtype"]
        return dtype != "float32" and (piece.start is not None or (dtype == "int8" and self.reduced))

    def _piece_state(
        self,
        name: str,
        positive: bool,
        piece: Piece,
        holder: Tensor,
        siblings: Sequence[Piece],
        state: dict[str, Any],
    ) -> Tensor | Packed:
        dtype, value = self.group["state_dtype"], state.get(name)
        if not (isinstance(value, PieceState) and value.fits(piece, dtype)):
            loaded = value.expanded() if isinstance(value, PieceState) else value
            value = state[name] = PieceState(holder)
            for part in siblings:
                value.add(part, dtype, positive, loaded)
        return value.pieces[piece.position][1]

    def _decoded(self, arguments: Sequence[Any]) -> list[Any]:
        """`arguments` as a function on lists takes them."""
        values = [x.decoded() if isinstance(x, Reduced) else x for x in arguments]
        return [self.scalars(x) if isinstance(x, Tensor) else x for x in values]

    @staticmethod
    def _encode(arguments: Sequence[Any], values: Sequence[Any]) -> None:
        for argument, value in zip(arguments, values, strict=True):
            if isinstance(argument, Reduced):
                argument.encode_(value)

    # ---- gradients and weights ---------------------------------------------------------------------------------------

    def gradients(self, factor: Tensor | float = 1.0) -> list[Tensor]:
        """The clipped gradients of the loss in the compute dtype, negated if `maximize`, times `factor`.

        Formed anew at each call, so that float32 copies of half-precision gradients exist for one bucket at a time.
        """
        grads = [grad.to(self.dtype) for grad in self.raw_grads]
        scale = self.clip.factor * factor * (-1.0 if self.group["maximize"] else 1.0)
        if isinstance(scale, Tensor):
            return list(torch._foreach_mul(grads, scale.to(device=self.device, dtype=self.dtype)))
        return list(torch._foreach_mul(grads, scale)) if scale != 1 else grads

    def decayed_gradients(self) -> list[Tensor]:
        """`gradients()` plus wd w where the weight decay is coupled; `p.grad` is left alone."""
        wd = self.group["weight_decay"]
        if not wd or self.group.get("decoupled_weight_decay", True):
            return self.gradients()
        return list(torch._foreach_add(self.gradients(), self.weights(), alpha=wd))

    def decoupled_decay(self) -> float:
        """The weight decay that shrinks the weights; 0 where it enters the gradient instead."""
        decay: float = self.group["weight_decay"] if self.group.get("decoupled_weight_decay", True) else 0.0
        return decay

    def weights(self) -> list[Tensor]:
        """The parameters in the compute dtype: themselves, or float32 copies to be written back by `store`."""
        if self.params[0].dtype == self.dtype:
            return self.params
        return [param.to(self.dtype) for param in self.params]

    def store(self, weights: list[Tensor]) -> None:
        """Write updated `weights` back, rounding once to the parameters' dtype: to nearest, or at random."""
        if weights is self.params:
            return
        chosen = self._weight_seeds()
        if chosen is None:
            torch._foreach_copy_(self.params, weights)
            return
        for param, weight, seed in zip(self.params, weights, chosen.unbind(), strict=True):
            param.copy_(to_bfloat16(weight, random_bits(seed, weight.numel(), weight.device)))

    def _weight_seeds(self) -> Tensor | None:
        """For weights that are rounded at random."""
        if not (self.group["stochastic_rounding"] and self.params[0].dtype == torch.bfloat16):
            return None
        return weight_seed(self._each(self.vectors.seeds()))

    def _how(self) -> How:
        return How(self._weight_seeds(), self.clip.skip, self.tables)


def compute_dtype(param: Tensor) -> torch.dtype:
    """float32 for half-precision parameters, else the parameter's own dtype.

    Example:
        >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float32 if param.dtype in _HALF else param.dtype


def merged(old: Tensor, positions: Sequence[int], new: Tensor) -> Tensor:
    """A vector with the entries of `new` at `positions` and those of `old` elsewhere, without a transfer from the host.

    Indexing with a Python list would copy it to the device and wait; views and one stack do not.

    Example:
        >>> merged(torch.tensor([1.0, 2.0, 3.0]), [0, 2], torch.tensor([7.0, 8.0, 9.0]))
        tensor([7., 2., 9.])
    """
    if len(positions) == len(old):
        return new
    rows, replaced = list(old.unbind()), new.unbind()
    for position in positions:
        rows[position] = replaced[position]
    return torch.stack(rows)


def keep(group: dict[str, Any], name: str, value: Tensor) -> Tensor:
    """Store a number that evolves in a group; in place, so that a captured CUDA graph finds there what it left there.

    Example:
        >>> group = {}
        >>> first = keep(group, "s", torch.tensor(1.0))
        >>> keep(group, "s", torch.tensor(2.0)) is first, group
        (True, {'s': tensor(2.)})
    """
    old = group.get(name)
    same = isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device)
    if same and isinstance(old, Tensor):
        return old.copy_(value)
    group[name] = value
    return value


def mean_of(values: list[Tensor]) -> Tensor:
    """The mean over all entries of 0-dim and 1-D tensors, unknown (NaN) ones left out, on the first one's device.

    Example:
        >>> mean_of([torch.tensor(1.0), torch.tensor([3.0, torch.nan])])
        tensor(2.)
    """
    device = values[0].device
    return torch.cat([value.reshape(-1).to(device) for value in values]).nanmean()


@dataclass(frozen=True)
class Step:
    """One step, as a method sees it.

    Attributes:
        groups: the parameter groups.
        vectors: what each of them keeps for its tensors.
        buckets: the pieces that this process updates; may be empty where it holds only padding.
        numbers: each group's place among the groups that the user gave.
        layout: how the tensors lie.
        clipping: by what number a wrapper has divided the gradients to clip them; 1 where the caller clips.
        clip: what the gradients are multiplied by in this step.
    """

    groups: list[dict[str, Any]]
    vectors: list[GroupVectors]
    buckets: list[Bucket]
    numbers: list[int]
    layout: Layout
    clipping: Callable[[], Tensor | float]
    clip: Clip

    @property
    def device(self) -> torch.device:
        """Where sums over the model are formed."""
        return self.vectors[0].device

    def count(self) -> None:
        """Count this step for every tensor with a gradient; before any state that it writes is asked for."""
        for vectors in self.vectors:
            vectors.count_step()

    def clip_gradients(self) -> None:
        """Clip by a pass of its own over the gradients, if they are to be clipped and nothing else has found the norm.

        For rules that need clipped gradients before they form any sum, or form none.
        """
        if self.clip.pending:
            self.clip_by(self.totals([bucket.squared_norms() for bucket in self.buckets], width=1), 0)

    def clip_by(self, tables: Sequence[Tensor], column: int) -> None:
        """Clip by squared norms of all tensors' gradients that a pass has found on its way, if they are to be clipped.

        Args:
            tables: as `totals` gives them, of gradients without weight decay.
            column: which column has the squared norms.
        """
        if self.clip.pending:
            self.clip.by(torch.cat([table[:, column] for table in tables]).sum())

    def sum_over(self, name: str) -> Tensor:
        """The sum of the groups' vectors `name` over all tensors that have a gradient in this step; 0-dim."""
        sums = []
        for vectors in self.vectors:
            vector = vectors.get(name)
            if len(vectors.active) < len(vector):
                rows = vector.unbind()
                vector = torch.stack([rows[i] for i in vectors.active]) if vectors.active else vector[:0]
            sums.append(vector)
        return torch.cat(sums).sum()

    def totals(self, rows: Sequence[Tensor], width: int) -> list[Tensor]:
        """Sums over tensors from sums over pieces; the only communication of a step.

        Every process of a run calls it the same number of times, also one that holds nothing.

        Args:
            rows: for each bucket a `[pieces, width]` tensor.
            width: the number of sums.

        Returns:
            For each group a `[tensors, width]` table, the same on every process; zeros for tensors without a gradient.
        """
        if len(self.layout.counts) == len(self.buckets) == 1 and self.buckets[0].plan.in_order:
            return self._by_group(self.layout.totals(rows[0].to(self.device)))
        first = [sum(self.layout.counts[:number]) for number in range(len(self.layout.counts))]
        empty = torch.zeros(sum(self.layout.counts), width, dtype=sum_dtype(self.device), device=self.device)
        if self.device.type == "cpu":  # where an index is no transfer
            for bucket, sums in zip(self.buckets, rows, strict=True):
                empty.index_copy_(0, bucket.plan.index + first[self.numbers[bucket.index]], sums.to(self.device))
            return self._by_group(self.layout.totals(empty))
        lines = list(empty)
        for bucket, sums in zip(self.buckets, rows, strict=True):
            for piece, line in zip(bucket.pieces, sums.to(self.device).unbind(), strict=True):
                lines[first[piece.group] + piece.position] = line
        return self._by_group(self.layout.totals(torch.stack(lines)))

    def _by_group(self, table: Tensor) -> list[Tensor]:
        parts = table.split(list(self.layout.counts))
        return [parts[number] for number in self.numbers]
