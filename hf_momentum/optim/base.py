"""What every optimizer of this package shares: collecting pieces, exact checkpoints, clear refusals.

The one base class holds the bookkeeping around a method: it hands the method a `Step`, whose buckets are lists of
whatever pieces this process holds, and whose `totals` turn sums over pieces into sums over tensors.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_momentum.kernels import SMALLEST, choice
from hf_momentum.optim.arguments import check_common
from hf_momentum.optim.piece_state import PieceState
from hf_momentum.optim.step import Bucket, Clip, GroupVectors, Plan, Step, compute_dtype
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

COMMON = {"fused": None, "max_grad_norm": None, "state_dtype": "float32", "stochastic_rounding": False}
"""What every optimizer takes; how a step is carried out, not what it computes, so a loaded state does not change it."""


@dataclass(eq=False)
class _Known:
    """What an optimizer derives from its parameters, and makes anew when they change.

    Attributes:
        ids: of the parameters, by which it knows that they are the same.
        layout: how they lie.
        active, buckets: which had a gradient in the last step and how that one was sorted; no buckets unless all of it
            is whole tensors that kernels take.
        idle: the parameters without a gradient in it.
        states: the identities of all state dictionaries, by which those in the buckets are known to be current.
        state_dtypes: of the groups, by which the buckets were sorted.
    """

    ids: list[int]
    layout: Layout
    active: Sequence[Sequence[int]] = ()
    buckets: Sequence[Bucket] = ()
    idle: Sequence[Tensor] = ()
    states: Sequence[int] = ()
    state_dtypes: Sequence[str] = ()

    def keep(self, active: Sequence[Sequence[int]], buckets: Sequence[Bucket], groups: list[dict[str, Any]]) -> None:
        """Keep the buckets of a step for the next one, without its gradients."""
        whole = all(bucket.fused and not any(isinstance(x, DTensor) for x in bucket.holders) for bucket in buckets)
        self.active, self.buckets, self.states = active, (), ()
        if whole:
            self.buckets = [replace(bucket, raw_grads=[], tables={}) for bucket in buckets]
        self.state_dtypes = [group["state_dtype"] for group in groups]
        pairs = zip(groups, active, strict=True)
        self.idle = [p for group, at in pairs for i, p in enumerate(group["params"]) if i not in set(at)]


_SAID: "weakref.WeakSet[MomentumOptimizer]" = weakref.WeakSet()
"""The optimizers that have said which path they take."""

# A bucket is closed once it holds this many elements, which bounds the temporaries of an update (256 MiB of
# float32 each) unless one piece alone is larger.
_BUCKET_ELEMENTS = 2**26


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items()}


def _undo_where(skip: Tensor, groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give the numbers that groups keep their values from before the step where `skip` is not 0; nothing waits."""
    for group, old in zip(groups, before, strict=True):
        for name, new in group.items():
            if isinstance(new, Tensor):
                was = old.get(name)
                was = torch.zeros_like(new) if not isinstance(was, Tensor) or was.shape != new.shape else was.to(new)
                group[name] = torch.where(skip.to(new.device) != 0, was, new)


def _copy_cut(target: Tensor, piece: Piece, whole: Tensor) -> None:
    target.copy_(whole.reshape(-1).narrow(0, piece.offset, piece.numel))


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

    grad_norm: Tensor | None = None
    """The norm of the last step's gradients before clipping, 0-dim, on their device; None without `max_grad_norm`."""

    wrapper: Any = None
    """DeepSpeed's optimizer around this one, which clips before it calls `step`; None elsewhere."""

    _layout: "_Known | None" = None
    _zero: ZeroPartitions | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # Weak, because FSDP2 must be able to free the tensors that it replaces.
        self._given: list[list[weakref.ref[Tensor]]] = []
        super().__init__(params, {"algorithm": type(self).__name__, **COMMON, **defaults})

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
        check_common(type(self).__name__, given, self.param_groups)
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

    # torch.compile breaks its graph here and runs the step as it is: the kernels are fast already, and what lies around
    # them (which tensors have a gradient, pointers) is not for tracing. torch's own `zero_grad` is marked like this.
    @_disable_dynamo
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
        if collected is None:
            return loss
        step, holders = collected
        skip = step.clip.skip
        if skip is not None and not all(bucket.fused for bucket in step.buckets) and bool(skip):
            return loss
        before = [_copied(group) for group in step.groups] if skip is not None else []
        self._update(step)
        self.grad_norm = step.clip.norm
        if skip is not None:
            _undo_where(skip, step.groups, before)
        if step.layout.publish is not None:
            step.layout.publish(holders)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler may leave it to the kernels to unscale and to skip, so that nothing waits."""
        params = [param for group in self.param_groups for param in group["params"]]
        return all(param.is_cuda and not isinstance(param, DTensor) for param in params) and not any(
            group["fused"] is False or choice.obstacle(param, param.detach())
            for group in self.param_groups
            for param in group["params"][:1]
        )

    def _clip(self) -> Clip:
        """What this step's gradients are multiplied by; torch's GradScaler sets `grad_scale` and `found_inf`."""
        scale, found = vars(self).get("grad_scale"), vars(self).get("found_inf")
        max_norm = self.param_groups[0]["max_grad_norm"]
        return Clip(max_norm, 1.0 if scale is None else 1 / scale.double(), None, found)

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
        layout, partitions, clip = self.layout(), self._zero, self._clip()
        if partitions is not None:
            arrived = None if observing else partitions.arrive(self.param_groups)
            if arrived is None:
                return None
            groups, holders = arrived
            numbers = [group["index"] for group in groups]
            active = [partitions.active[number] for number in numbers]
        else:
            groups, numbers, holders, active = self.param_groups, list(range(len(self.param_groups))), [], []
            again = self._same_buckets(groups)
            if again is not None and self._layout is not None:
                vectors = self._vectors(layout, groups, numbers, self._layout.active, again[0].device)
                buckets = [replace(bucket, vectors=vectors[bucket.index], clip=clip, tables={}) for bucket in again]
                return Step(groups, vectors, buckets, numbers, layout, self._clipping, clip), holders
            for group in groups:
                active.append(tuple(i for i, param in enumerate(group["params"]) if param.grad is not None))
            for number, positions in enumerate(active):
                for i in positions:
                    param = groups[number]["params"][i]
                    holders.append(Holder(param, param.grad, (Piece(number, i, start=None, numel=param.numel()),)))
        if not holders:
            return None
        vectors = self._vectors(layout, groups, numbers, active, holders[0].tensor.device)
        buckets = self._buckets(groups, numbers, vectors, holders, clip)
        if self._layout is not None:
            self._layout.keep(active, buckets, groups)
        return Step(groups, vectors, buckets, numbers, layout, self._clipping, clip), holders

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

    def _same_buckets(self, groups: list[dict[str, Any]]) -> list[Bucket] | None:
        """The last step's buckets with the gradients of this one, if they still fit; sorting 400 tensors takes long."""
        known = self._layout
        if known is None or known.state_dtypes != [group["state_dtype"] for group in groups]:
            return None
        if not all(param.grad is None for param in known.idle):
            return None
        same = known.states == list(map(id, self.state.values()))
        found = []
        for bucket in known.buckets:
            group, grads = groups[bucket.index], list(map(attrgetter("grad"), bucket.holders))
            if group["fused"] is False or not choice.takes(bucket.params, grads):
                return None
            states = bucket.states if same else [self.state[param] for param in bucket.holders]
            found.append(replace(bucket, group=group, raw_grads=grads, states=states))
        if not same:
            known.states = list(map(id, self.state.values()))
            known.buckets = [replace(old, states=new.states) for old, new in zip(known.buckets, found, strict=True)]
        return found or None

    def _buckets(
        self,
        groups: list[dict[str, Any]],
        numbers: list[int],
        vectors: list[GroupVectors],
        holders: list[Holder],
        clip: Clip,
    ) -> list[Bucket]:
        buckets: list[Bucket] = []
        open_buckets: dict[tuple[Any, ...], Bucket] = {}
        unfused: Counter[str] = Counter()
        elements: dict[tuple[Any, ...], int] = {}
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
                group = groups[index]
                obstacle = self._obstacle(group, piece, param, grad)
                if obstacle:
                    unfused[obstacle] += 1
                small = piece.numel < SMALLEST or compute_dtype(param) != torch.float32
                reduced = group["state_dtype"] != "float32" and not small
                key = (piece.group, param.device, param.dtype, not obstacle, reduced)
                bucket = open_buckets.get(key)
                if bucket is None or elements[key] + param.numel() > _BUCKET_ELEMENTS:
                    plan = Plan(vectors[index].count)
                    bucket = Bucket(group, vectors[index], index, clip, plan, fused=not obstacle, reduced=reduced)
                    open_buckets[key], elements[key] = bucket, 0
                    buckets.append(bucket)
                elements[key] += param.numel()
                bucket.plan.pieces.append(piece)
                bucket.params.append(param)
                bucket.raw_grads.append(grad)
                bucket.holders.append(holder.tensor)
                bucket.siblings.append(holder.pieces)
                bucket.states.append(self.state[holder.tensor])
        self._say_which_path(buckets, unfused)
        return buckets

    def _obstacle(self, group: dict[str, Any], piece: Piece, param: Tensor, grad: Tensor) -> str:
        """Why the kernels do not take a piece; empty where they do."""
        if group["fused"] is False:
            return "fused=False"
        obstacle = choice.obstacle(param, grad)
        if obstacle and group["fused"]:
            raise RuntimeError(
                f"{type(self).__name__}: fused=True, but there are no kernels for parameter {piece.position} of group "
                f"{piece.group}: {obstacle}; let fused be None to have them wherever they can be had"
            )
        return obstacle

    def _say_which_path(self, buckets: Sequence[Bucket], unfused: Counter[str]) -> None:
        """One line in the log at the first step."""
        if self in _SAID:
            return
        _SAID.add(self)
        count, fused = sum(len(bucket.pieces) for bucket in buckets), Counter[str]()
        for bucket in buckets:
            if bucket.fused:
                fused[choice.name_of(bucket.device)] += len(bucket.pieces)
        parts = [f"{name} for {number} of {count} tensors or pieces" for name, number in fused.items()]
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

    def state_dict(self) -> dict[str, Any]:
        """The state, complete, and in float32 or bfloat16 whatever `state_dtype` is.

        State in eight bits is written out as float32 tensors like the parameters, so that a checkpoint of one
        `state_dtype` loads into any other, and into any layout. Packed again it gives the same values bit for bit.
        """
        found = super().state_dict()
        for key, state in found["state"].items():
            found["state"][key] = {
                name: value.expanded() if isinstance(value, PieceState) else value for name, value in state.items()
            }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same algorithm so that training continues bit for bit.

        How a step is carried out (`fused`, `state_dtype`, `stochastic_rounding`, `max_grad_norm`) stays as it is.

        Raises:
            ValueError: the state dict was saved by another optimizer, or its groups do not fit.
        """
        self._require_own(state_dict)
        kept = [{name: group[name] for name in COMMON} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, common in zip(self.param_groups, kept, strict=True):
            group.update(common)
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
            own = {"params", "param_names", *COMMON}
            group.update({key: value for key, value in entries.items() if key not in own})

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
        if not isinstance(value, Tensor):
            state[name] = value
        elif isinstance(holder, DTensor):
            whole = value.to(holder.device)
            state[name] = distribute_tensor(whole, holder.device_mesh, holder.placements, src_data_rank=None)
        elif piece.start is None:
            state[name] = value.to(holder.device, copy=True)
        else:
            if isinstance(state.get(name, None), PieceState | None):
                state[name] = torch.zeros_like(holder, dtype=value.dtype)
            _copy_cut(piece.of(state[name]), piece, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            group.setdefault("index", index)
            for name, value in COMMON.items():
                group.setdefault(name, value)  # checkpoints from before there were such choices
        if "_given" not in self.__dict__:  # a copy made by copy.deepcopy or pickle holds its own parameters
            self._given = [[weakref.ref(param) for param in group["params"]] for group in self.param_groups]
