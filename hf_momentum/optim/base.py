"""What every optimizer of this package shares: collecting pieces, exact checkpoints, clear refusals.

A method's own file holds its mathematics and does not know how the tensors lie. The one base class here holds the
bookkeeping around it: it hands a method a `Step`, whose buckets are lists of whatever pieces this process holds, and
whose `totals` turn sums over pieces into sums over tensors.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_momentum.kernels import Gradients, alignment_sums, cpu, sum_dtype
from hf_momentum.optim.arguments import check_fused
from hf_momentum.sharding import (
    Holder,
    Layout,
    Piece,
    ZeroPartitions,
    clipping_factor,
    is_marked,
    lay_out,
    require_like,
)

_LOGGER = logging.getLogger("hf_momentum")

_HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class _Known:
    """What an optimizer derives from its parameters, and makes anew when they change.

    Attributes:
        ids: of the parameters, by which it knows that they are the same.
        layout: how they lie.
        active, buckets: which had a gradient in the last step and how that one was sorted; empty unless all of it
            is whole tensors that kernels take.
    """

    ids: list[int]
    layout: Layout
    active: Sequence[Sequence[int]] = ()
    buckets: "Sequence[Bucket]" = ()

    def keep(self, active: Sequence[Sequence[int]], buckets: "Sequence[Bucket]") -> None:
        """Keep the buckets of a step for the next one, without its gradients and its state."""
        whole = all(bucket.fused and not any(isinstance(x, DTensor) for x in bucket.holders) for bucket in buckets)
        self.active = active if whole else ()
        self.buckets = [replace(bucket, raw_grads=[], states=[]) for bucket in buckets] if whole else ()


_SAID: "weakref.WeakSet[MomentumOptimizer]" = weakref.WeakSet()
"""The optimizers that have said which path they take."""

# A bucket is closed once it holds this many elements, which bounds the temporaries of an update (256 MiB of
# float32 each) unless one piece alone is larger.
_BUCKET_ELEMENTS = 2**26


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
        self.group[name] = vector = merged(self.get(name, initial), self.active, values)
        return vector

    def advance_correction(self, beta: Tensor) -> Tensor:
        """1 - prod(beta) over each tensor's steps so far, this one's `beta` included.

        The bias of an average whose beta varies: with beta constant it is Adam's 1 - beta^t. The group keeps the
        complement itself, c = 1 - b (1 - c), so that it starts at 0 like every other vector.

        Args:
            beta: one for all tensors or one for each.
        """
        return self.put("correction1", 1 - beta.to(self.device) * (1 - self.get("correction1")))


class StepCounters:
    """The `step` of state dictionaries, each read from its tensor at most once and advanced at most once.

    A partition of many tensors has one state, hence one counter, for all of them.

    Example:
        >>> counters, state = StepCounters(), {}
        >>> counters.advance(state), counters.advance(state), counters.read(state), state
        (1.0, 1.0, 1.0, {'step': tensor(1.)})
    """

    def __init__(self) -> None:
        self._values: dict[int, float] = {}
        self._advanced: set[int] = set()

    def read(self, state: dict[str, Any]) -> float:
        """The count; 0 before the first step."""
        if id(state) not in self._values:
            self._values[id(state)] = float(state["step"].item()) if "step" in state else 0.0
        return self._values[id(state)]

    def advance(self, state: dict[str, Any]) -> float:
        """The count with the current step."""
        if id(state) not in self._advanced:
            self._advanced.add(id(state))
            self._values[id(state)] = self.read(state) + 1
            if "step" in state:
                state["step"].add_(1)
            else:
                state["step"] = torch.ones(())
        return self._values[id(state)]


@dataclass(frozen=True)
class Bucket:
    """Pieces of tensors of one group that have a gradient and share a device and a dtype, ready for `_foreach` calls.

    Attributes:
        group: the parameter group, with its hyperparameters.
        vectors: what the group keeps for each tensor.
        index: the group's place among the step's groups.
        pieces: which part of which tensor each entry is.
        params: the pieces themselves; whole tensors where nothing is sharded.
        raw_grads: their gradients as they are; `gradients()` gives what a rule works on.
        holders: the tensors that hold the pieces, whose shape the state has.
        states: the state dictionaries of the holders.
        counters: the `step` of each state, read and advanced once per step; shared by all buckets.
        fused: whether kernels may take it; `apply` and the sums choose by it, and nothing else does.
    """

    group: dict[str, Any]
    vectors: GroupVectors
    index: int
    pieces: list[Piece]
    params: list[Tensor]
    raw_grads: list[Tensor]
    holders: list[Tensor]
    states: list[dict[str, Any]]
    counters: StepCounters
    fused: bool = False

    @property
    def device(self) -> torch.device:
        """The device that holds every piece of the bucket."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the bucket is computed and its state is kept."""
        return compute_dtype(self.params[0])

    def elements(self) -> int:
        """The number of elements of all its pieces."""
        return sum(param.numel() for param in self.params)

    def apply(self, update: Callable[..., None], *arguments: Any, gradients: bool = True, **numbers: Any) -> None:
        """Update the weights by a pure function on lists, or by the kernel of the same name where the bucket is fused.

        Args:
            update: takes weights, gradients, `arguments` and `numbers`, and works in place.
            arguments: lists of state tensors; vectors, 0-dim or one entry per tensor of the group; anything else as
                it is.
            gradients: False for an update that takes none.
            numbers: hyperparameters.

        Raises:
            RuntimeError: the group insists on kernels, and a state tensor is of another dtype or layout than they take.
        """
        kernel = self._kernel(update, arguments)
        if kernel is not None:
            chosen = [self._chosen(x) if isinstance(x, Tensor) else x for x in arguments]
            kernel(self.params, *[self._unformed()] * gradients, *chosen, **numbers)
            return
        weights = self.weights()
        chosen = [self.scalars(x) if isinstance(x, Tensor) else x for x in arguments]
        update(weights, *[self.decayed_gradients()] * gradients, *chosen, **numbers)
        self.store(weights)

    def advance(self, function: Callable[..., Tensor], *arguments: Any, decayed: bool = True, **numbers: Any) -> Tensor:
        """Advance state tensors by the gradients, and return sums: by a pure function or its kernel, as `apply`.

        Args:
            function: takes gradients, `arguments` and `numbers`; returns `[pieces, ...]`.
            arguments: lists of state tensors, and anything else as it is.
            decayed: whether coupled weight decay enters the gradients.
            numbers: hyperparameters.
        """
        kernel = self._kernel(function, arguments)
        if kernel is not None:
            unformed = self._unformed()
            found: Tensor = kernel(unformed if decayed else replace(unformed, decay=0.0), *arguments, **numbers)
            return found
        return function(self.decayed_gradients() if decayed else self.gradients(), *arguments, **numbers)

    def alignment_sums(self, xs: list[Tensor]) -> Tensor:
        """`<x, g>, <x, x>, <g, g>` of each piece and its gradient with coupled decay, `[pieces, 3]`."""
        kernel = self._kernel(alignment_sums, [xs])
        if kernel is None:
            return alignment_sums(xs, self.decayed_gradients())
        sums: Tensor = kernel(self._unformed(), xs)
        return sums

    def _kernel(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any] | None:
        """The kernel that stands in for a function on lists, if this bucket and this state can have it."""
        if not self.fused:
            return None
        lists = [x for x in arguments if isinstance(x, list) and x and isinstance(x[0], Tensor)]
        kernel = cpu.kernel(function.__name__, lists)
        if kernel is not None:
            return kernel
        if self.group["fused"]:
            raise RuntimeError(
                f"fused=True, but there is no kernel {function.__name__} for the state of group {self.index}; kernels "
                "take contiguous float32 on the CPU. Let fused be None, or load a state that this package saved"
            )
        return None

    def _unformed(self) -> Gradients:
        """What `decayed_gradients()` forms, for kernels that form it on the way."""
        coupled = self.group["weight_decay"] - self.decoupled_decay()
        return Gradients(self.raw_grads, self.params, -1.0 if self.group["maximize"] else 1.0, coupled)

    def _chosen(self, values: Tensor) -> Tensor:
        """`values`, 0-dim or one per tensor of the group, with one entry per piece in float64."""
        values = values.double()
        return values if values.dim() == 0 else values[[piece.position for piece in self.pieces]]

    def scalars(self, values: Tensor) -> Tensor | list[Tensor]:
        """`values`, 0-dim or one per tensor of the group, as `_foreach` functions take them for this bucket."""
        values = values.to(device=self.device, dtype=self.dtype)
        if values.dim() == 0:
            return values
        rows = values.unbind()
        return [rows[piece.position] for piece in self.pieces]

    def buffers(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The pieces of the state tensor `name`, created as zeros at its first use, in the compute dtype by default."""
        for holder, state in zip(self.holders, self.states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(holder, dtype=dtype or self.dtype, memory_format=torch.preserve_format)
        return [piece.of(state[name]) for piece, state in zip(self.pieces, self.states, strict=True)]

    def count_steps(self) -> list[float]:
        """Advance each `step` by one, once per step of the optimizer, and return them.

        The counters are 0-dim tensors in host memory, as in torch's own Adam: reading them waits for no device.
        """
        return [self.counters.advance(state) for state in self.states]

    def steps(self) -> list[float]:
        """The steps counted so far; 0 before the first."""
        return [self.counters.read(state) for state in self.states]

    def gradients(self) -> list[Tensor]:
        """The gradients of the loss in the compute dtype, negated if `maximize`.

        Formed anew at each call, so that float32 copies of half-precision gradients exist for one bucket at a time.
        """
        grads = [grad.to(self.dtype) for grad in self.raw_grads]
        return list(torch._foreach_neg(grads)) if self.group["maximize"] else grads

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
        """Write updated `weights` back, rounding once to the parameters' dtype."""
        if weights is not self.params:
            torch._foreach_copy_(self.params, weights)


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


def _copy_cut(target: Tensor, piece: Piece, whole: Tensor) -> None:
    target.copy_(whole.reshape(-1).narrow(0, piece.offset, piece.numel))


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
    """

    groups: list[dict[str, Any]]
    vectors: list[GroupVectors]
    buckets: list[Bucket]
    numbers: list[int]
    layout: Layout
    clipping: Callable[[], Tensor | float]

    @property
    def device(self) -> torch.device:
        """Where sums over the model are formed."""
        return self.vectors[0].device

    def sum_over(self, name: str) -> Tensor:
        """The sum of the groups' vectors `name` over all tensors that have a gradient in this step; 0-dim."""
        entries: list[Tensor] = []
        for vectors in self.vectors:
            rows = vectors.get(name).unbind()
            entries += [rows[i] for i in vectors.active]
        return torch.stack(entries).sum()

    def totals(self, rows: Sequence[Tensor], width: int) -> list[Tensor]:
        """Sums over tensors from sums over pieces; the one communication of a step.

        Every process of a run calls it the same number of times, also one that holds nothing.

        Args:
            rows: for each bucket a `[pieces, width]` tensor.
            width: the number of sums.

        Returns:
            For each group a `[tensors, width]` table, the same on every process; zeros for tensors without a gradient.
        """
        first = [sum(self.layout.counts[:number]) for number in range(len(self.layout.counts))]
        empty = torch.zeros(sum(self.layout.counts), width, dtype=sum_dtype(self.device), device=self.device)
        if self.device.type == "cpu":  # where an index is no transfer
            for bucket, sums in zip(self.buckets, rows, strict=True):
                at = torch.tensor([first[piece.group] + piece.position for piece in bucket.pieces])
                empty.index_copy_(0, at, sums.to(self.device))
            return self._by_group(self.layout.totals(empty))
        lines = list(empty)
        for bucket, sums in zip(self.buckets, rows, strict=True):
            for piece, line in zip(bucket.pieces, sums.to(self.device).unbind(), strict=True):
                lines[first[piece.group] + piece.position] = line
        return self._by_group(self.layout.totals(torch.stack(lines)))

    def _by_group(self, table: Tensor) -> list[Tensor]:
        parts = table.split(list(self.layout.counts))
        return [parts[number] for number in self.numbers]


class MomentumOptimizer(torch.optim.Optimizer):
    """Base of the package's optimizers; not an update rule by itself.

    A subclass provides `_check(group)`, which validates the hyperparameters of one group, and
    `_update(step)`, which performs one step. In return it gets closures under grad, several groups,
    parameters without gradients, half-precision parameters with float32 state, sharded parameters, and checkpoints
    that continue bit for bit. Every number that evolves lives in `state` or in `param_groups`, so that a
    state dict is complete; nothing is created before the first step, because wrappers replace parameters.
    """

    PER_TENSOR: ClassVar[tuple[str, ...]] = ()
    """Names of the group entries that may hold one value per parameter, for logs."""

    wrapper: Any = None
    """DeepSpeed's optimizer around this one, which clips before it calls `step`; None elsewhere."""

    _layout: "_Known | None" = None
    _zero: ZeroPartitions | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # Weak, because FSDP2 must be able to free the tensors that it replaces.
        self._given: list[list[weakref.ref[Tensor]]] = []
        super().__init__(params, {"algorithm": type(self).__name__, "fused": None, **defaults})

    def _check(self, group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, step: Step) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in mid-training; its hyperparameters are validated like the constructor's.

        Raises:
            TypeError, ValueError: a hyperparameter of the group is of the wrong type or out of range.
        """
        given = {**self.defaults, **param_group}
        check_fused(type(self).__name__, given["fused"])
        self._check(given)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["index"] = len(self.param_groups) - 1  # DeepSpeed shows groups one at a time
        for param in group["params"]:
            if not param.is_floating_point():
                raise TypeError(
                    f"{type(self).__name__}: parameters must be real floating-point tensors, got one of dtype "
                    f"{param.dtype}; pass complex weights as their real view (torch.view_as_real)"
                )
        self._given.append([weakref.ref(param) for param in group["params"]])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one update.

        Under DeepSpeed ZeRO-1 to 3 it is called several times for one update; the last call performs it.

        Args:
            closure: re-evaluates the model under grad and returns the loss; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            UnsupportedLayoutError: a parameter is stored in a layout without exact reductions.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        collected = self._collect()
        if collected is not None:
            step, holders = collected
            self._update(step)
            if step.layout.publish is not None:
                step.layout.publish(holders)
        return loss

    def layout(self) -> Layout:
        """How the tensors lie now, before or after the first step.

        Raises:
            UnsupportedLayoutError: in a way that is not supported.

        Example:
            >>> from hf_momentum import TAM
            >>> TAM([torch.nn.Parameter(torch.zeros(2))]).layout().kind
            'whole tensors'
        """
        if self._zero is not None:
            return self._zero.layout
        # Rebuilt when a wrapper has replaced the parameters, or a group was added.
        ids = [id(param) for group in self.param_groups for param in group["params"]]
        if self._layout is None or self._layout.ids != ids:
            if is_marked(self._given):
                self._zero = ZeroPartitions(self._given)
                return self._zero.layout
            given = [reference() for group in self._given for reference in group]
            known = {id(param) for param in given}
            self._layout = _Known(ids, lay_out(self.param_groups, lambda param: id(param) in known))
        return self._layout.layout

    def tensors(self) -> list[list[Tensor]]:
        """The parameters of each group as the model holds them, also where a wrapper keeps others in the groups."""
        return [group["params"] for group in self.param_groups] if self._zero is None else self._zero.tensors()

    def piece_table(self, names: Mapping[int, str]) -> dict[str, Any] | None:
        """What a checkpoint of flat partitions needs beside them, so that whole tensors can be cut out again.

        Args:
            names: the name of each of the model's parameters, by `id`.

        Returns:
            `tensors`, with name, shape, group and position; and `holders`: for each partition of this process its
            group, the key of its state in the state dict, and its pieces. None where nothing is partitioned.
        """
        self.layout()
        if self._zero is None:
            return None
        tensors: list[dict[str, Any]] = []
        index: dict[tuple[int, int], int] = {}
        for group, params in enumerate(self._zero.tensors()):
            for position, param in enumerate(params):
                index[group, position] = len(tensors)
                shape = list(getattr(param, "ds_shape", param.shape))  # under ZeRO-3 the parameter itself is empty
                entry = {"name": names[id(param)], "shape": shape, "group": group, "position": position}
                tensors.append(entry)
        holders = []
        for key, (group, _, pieces) in enumerate(self._zero.partitions(self.param_groups)):
            cut = [
                {"tensor": index[p.group, p.position], "start": p.start, "from": p.offset, "numel": p.numel}
                for p in pieces
            ]
            holders.append({"group": group, "state_index": key, "pieces": cut})
        return {"algorithm": type(self).__name__, "tensors": tensors, "holders": holders}

    def _collect(self, observing: bool = False) -> tuple[Step, list[Holder]] | None:
        """What there is to update: None if nothing has a gradient, or a wrapper is going to call again with the rest.

        Args:
            observing: only look; under ZeRO, whose gradients are not whole before the last call, there is nothing then.
        """
        layout, partitions = self.layout(), self._zero
        if partitions is not None:
            arrived = None if observing else partitions.arrive(self.param_groups)
            if arrived is None:
                return None
            groups, holders = arrived
            numbers = [group["index"] for group in groups]
            active = [partitions.active[number] for number in numbers]
        else:
            groups, numbers, holders, active = self.param_groups, list(range(len(self.param_groups))), [], []
            for group in groups:
                active.append(tuple(i for i, param in enumerate(group["params"]) if param.grad is not None))
            again = self._same_buckets(groups, active)
            if again is not None:
                vectors = self._vectors(layout, groups, numbers, active, again[0].device)
                buckets = [replace(bucket, vectors=vectors[bucket.index]) for bucket in again]
                return Step(groups, vectors, buckets, numbers, layout, self._clipping), holders
            for number, positions in enumerate(active):
                for i in positions:
                    param = groups[number]["params"][i]
                    holders.append(Holder(param, param.grad, (Piece(number, i, start=None, numel=param.numel()),)))
        if not holders:
            return None
        vectors = self._vectors(layout, groups, numbers, active, holders[0].tensor.device)
        buckets = self._buckets(groups, numbers, vectors, holders)
        if self._layout is not None:
            self._layout.keep(active, buckets)
        return Step(groups, vectors, buckets, numbers, layout, self._clipping), holders

    @staticmethod
    def _vectors(
        layout: Layout,
        groups: list[dict[str, Any]],
        numbers: list[int],
        active: Sequence[Sequence[int]],
        device: torch.device,
    ) -> list[GroupVectors]:
        return [
            GroupVectors(group, layout.counts[number], positions, device)
            for group, number, positions in zip(groups, numbers, active, strict=True)
        ]

    def _same_buckets(self, groups: list[dict[str, Any]], active: Sequence[Sequence[int]]) -> list[Bucket] | None:
        """The last step's buckets with the gradients of this one, if they still fit; sorting 400 tensors takes long."""
        if self._layout is None or self._layout.active != active:
            return None
        found, counters = [], StepCounters()
        for bucket in self._layout.buckets:
            group, grads = groups[bucket.index], [param.grad for param in bucket.holders if param.grad is not None]
            if group["fused"] is False or not cpu.takes(bucket.params, grads):
                return None
            states = [self.state[param] for param in bucket.holders]
            found.append(replace(bucket, group=group, raw_grads=grads, states=states, counters=counters))
        return found or None

    def _buckets(
        self,
        groups: list[dict[str, Any]],
        numbers: list[int],
        vectors: list[GroupVectors],
        holders: list[Holder],
    ) -> list[Bucket]:
        buckets: list[Bucket] = []
        open_buckets: dict[tuple[int, torch.device, torch.dtype, bool], Bucket] = {}
        counters = StepCounters()
        unfused: Counter[str] = Counter()
        elements: dict[tuple[int, torch.device, torch.dtype, bool], int] = {}
        for holder in holders:
            require_like(holder.tensor, holder.grad)
            for piece in holder.pieces:
                if holder.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter {piece.position} of group "
                        f"{piece.group}, shape {tuple(holder.tensor.shape)}); build the embedding with sparse=False"
                    )
                param, grad = piece.of(holder.tensor), piece.of(holder.grad)
                index = numbers.index(piece.group)
                obstacle = self._obstacle(groups[index], piece, param, grad)
                if obstacle:
                    unfused[obstacle] += 1
                key = (piece.group, param.device, param.dtype, not obstacle)
                bucket = open_buckets.get(key)
                if bucket is None or elements[key] + param.numel() > _BUCKET_ELEMENTS:
                    vector = vectors[index]
                    bucket = Bucket(groups[index], vector, index, [], [], [], [], [], counters, fused=not obstacle)
                    open_buckets[key], elements[key] = bucket, 0
                    buckets.append(bucket)
                elements[key] += param.numel()
                bucket.pieces.append(piece)
                bucket.params.append(param)
                bucket.raw_grads.append(grad)
                bucket.holders.append(holder.tensor)
                bucket.states.append(self.state[holder.tensor])
        self._say_which_path(sum(len(bucket.pieces) for bucket in buckets), unfused)
        return buckets

    def _obstacle(self, group: dict[str, Any], piece: Piece, param: Tensor, grad: Tensor) -> str:
        """Why the kernels do not take a piece; empty where they do."""
        if group["fused"] is False:
            return "fused=False"
        obstacle = cpu.obstacle(param, grad) or cpu.available()[1]
        if obstacle and group["fused"]:
            raise RuntimeError(
                f"{type(self).__name__}: fused=True, but there are no kernels for parameter {piece.position} of group "
                f"{piece.group}: {obstacle}; let fused be None to have them wherever they can be had"
            )
        return obstacle

    def _say_which_path(self, count: int, unfused: Counter[str]) -> None:
        """One line in the log at the first step."""
        if self in _SAID:
            return
        _SAID.add(self)
        fused = count - unfused.total()
        parts = [f"CPU kernels for {fused} of {count} tensors or pieces"] if fused else []
        parts += [f"foreach for {number} ({reason})" for reason, number in unfused.items()]
        _LOGGER.info("%s: %s", type(self).__name__, "; ".join(parts))

    def _clipping(self) -> Tensor | float:
        if self._zero is None:
            return 1.0
        if self.wrapper is None:
            raise RuntimeError(
                f"{type(self).__name__} cannot tell by how much DeepSpeed clipped its gradients; import hf_momentum "
                "before deepspeed.initialize is called"
            )
        return clipping_factor(self.wrapper)

    def dynamics(self) -> dict[str, Tensor]:
        """The method's inner quantities after the last step, as 0-dim tensors still on the device; empty before it."""
        return {}

    def tensor_dynamics(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Those of the inner quantities that are kept per parameter: pairs of parameter and 0-dim tensor, by name."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        tensors = self.tensors()
        for number, group in enumerate(self.param_groups):
            params = tensors[number if self._zero is None else group["index"]]
            for name in self.PER_TENSOR:
                vector = group.get(name)
                if isinstance(vector, Tensor) and vector.dim() == 1:
                    found.setdefault(name, []).extend(zip(params, vector.unbind(), strict=True))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same algorithm so that training continues bit for bit.

        Raises:
            ValueError: the state dict was saved by another optimizer, or its groups do not fit.
        """
        self._require_own(state_dict)
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter, which would round float32 state of bf16 weights.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and self.state[param][name].dtype != value.dtype:
                    self.state[param][name] = value.to(param.device)

    def _require_own(self, state_dict: dict[str, Any]) -> None:
        found = {group.get("algorithm", "an optimizer of another package") for group in state_dict["param_groups"]}
        if found != {type(self).__name__}:
            raise ValueError(
                f"this state was saved by {', '.join(sorted(found))} and cannot continue under {type(self).__name__}; "
                "resume with the optimizer that saved it, or start without the optimizer state"
            )

    @torch.no_grad()
    def load_whole_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of whole tensors, as one process saves it, into the pieces that this process holds.

        Raises:
            ValueError: the state dict was saved by another optimizer, or its groups do not fit.
        """
        self._require_own(state_dict)
        self.layout()
        saved = {group.get("index", number): group for number, group in enumerate(state_dict["param_groups"])}
        for number, group in enumerate(self.param_groups):
            index = number if self._zero is None else group["index"]
            wanted = len(self.tensors()[index])
            if index not in saved or len(saved[index]["params"]) != wanted:
                raise ValueError(f"the saved state has no group {index} with {wanted} tensors; is it of this model?")
        for holder, piece in self._held():
            state = state_dict["state"].get(saved[piece.group]["params"][piece.position], {})
            for name, value in state.items():
                self._store(holder, piece, name, value)
        for number, group in enumerate(self.param_groups):
            entries = saved[number if self._zero is None else group["index"]]
            group.update({key: value for key, value in entries.items() if key not in ("params", "param_names")})

    @torch.no_grad()
    def load_master_weights(self, weights: Sequence[Sequence[Tensor]]) -> None:
        """Set the float32 copies that ZeRO keeps of the weights; elsewhere the parameters are all there is.

        Args:
            weights: the whole tensors, by group and position.
        """
        self.layout()
        if self._zero is not None:
            for holder, piece in self._held():
                _copy_cut(piece.of(holder.data), piece, weights[piece.group][piece.position])

    def _held(self) -> list[tuple[Tensor, Piece]]:
        """Every piece of this process with its holder, between steps."""
        self.layout()
        if self._zero is not None:
            held = self._zero.partitions(self.param_groups)
            return [(flat, piece) for _, flat, pieces in held for piece in pieces]
        groups = enumerate(self.param_groups)
        return [(p, Piece(i, j, None, p.numel())) for i, group in groups for j, p in enumerate(group["params"])]

    def _store(self, holder: Tensor, piece: Piece, name: str, value: Any) -> None:
        state = self.state[holder]
        if not isinstance(value, Tensor) or (value.dim() == 0 and name == "step"):
            state[name] = value.clone() if isinstance(value, Tensor) else value
        elif isinstance(holder, DTensor):
            whole = value.to(holder.device)
            state[name] = distribute_tensor(whole, holder.device_mesh, holder.placements, src_data_rank=None)
        elif piece.start is None:
            state[name] = value.to(holder.device, copy=True)
        else:
            if name not in state:
                state[name] = torch.zeros_like(holder, dtype=value.dtype)
            _copy_cut(piece.of(state[name]), piece, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            group.setdefault("index", index)
            group.setdefault("fused", None)  # checkpoints from before there were kernels
        if "_given" not in self.__dict__:  # a copy made by copy.deepcopy or pickle holds its own parameters
            self._given = [[weakref.ref(param) for param in group["params"]] for group in self.param_groups]
