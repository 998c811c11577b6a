"""DeepSpeed ZeRO: one flat partition for many tensors, and `step` called in parts.

What DeepSpeed (0.19) does to an optimizer, found by looking:

- ZeRO-1 and 2 put one flat float32 tensor into each group, this process's partition of all its tensors, and call `step`
  once per group with the other groups hidden. ZeRO-1 with bf16 weights and float32 accumulation (`BF16_Optimizer`) has
  the same partitions and calls once.
- ZeRO-3 cuts every tensor into equal parts, one per process, strings the parts of a sub-group together, and calls
  `step` once per sub-group with all others hidden.
- Gradients are reduced, unscaled and clipped before the first call, and dropped after each. After each call the
  partition is copied to the weights that the model uses.

A rule that needs a sum over the whole model cannot run on the first call. So the calls are collected, the last one
updates everything at once, and the partitions whose copy came too early are copied again.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_momentum.sharding.layout import Holder, Layout, Piece, UnsupportedLayoutError


class ZeroPartitions:
    """Collects the calls of one optimizer step and knows which tensors' pieces lie in which partition.

    Args:
        given: weak references to the tensors that the user gave, by group. They are the model's own parameters, which
            stay alive; DeepSpeed changes only what they point to.

    Raises:
        UnsupportedLayoutError: the tensors do not carry the marks of a ZeRO optimizer that is known here.
    """

    def __init__(self, given: Sequence[Sequence[weakref.ref[Tensor]]]) -> None:
        self._model: list[list[Tensor]] = [[_alive(reference) for reference in group] for group in given]
        self._place = {id(p): (i, j) for i, group in enumerate(self._model) for j, p in enumerate(group)}
        trained = [[p for p in group if p.requires_grad] for group in self._model]
        first = next((p for group in trained for p in group), None)
        self._zero3: Any = getattr(first, "_z3_optimizer", None)
        process_group = getattr(first, "_dp_group", None) if self._zero3 is None else self._zero3.dp_process_group
        if process_group is None:
            raise UnsupportedLayoutError("none of the trained tensors is part of a ZeRO partition")
        _require_plain_data_parallel([p for group in trained for p in group])
        self._rank: int = dist.get_rank(process_group)
        # Sub-groups under ZeRO-3; else one partition for each group that has anything to train.
        self._expected = len(self._zero3.fp16_groups) if self._zero3 else sum(1 for group in trained if group)
        self._waiting: dict[int, Holder] = {}
        self._pieces: dict[int, tuple[Piece, ...]] = {}
        self._groups: dict[int, dict[str, Any]] = {}
        rows = range(len(self._place))
        kind = "ZeRO-3" if self._zero3 else "ZeRO-1/2"
        shared = {process_group: tuple(rows)} if process_group.size() > 1 else {}
        counts = tuple(len(group) for group in self._model)
        self.layout = Layout(kind, counts, shared, self._publish if self._expected > 1 else None)
        self.active = tuple(tuple(j for j, p in enumerate(group) if p.requires_grad) for group in self._model)

    def arrive(self, groups: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Holder]] | None:
        """Take in what this call of `step` shows; the groups and holders of the whole step once all of it has come.

        Raises:
            RuntimeError: a partition comes a second time, so that the step before it was never finished.
        """
        for group in groups:
            self._groups[group["index"]] = group
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                if id(tensor) in self._waiting:
                    self._waiting.clear()
                    raise RuntimeError(
                        "DeepSpeed began a new step before the last one was complete; its update is lost"
                    )
                if id(tensor) not in self._pieces:
                    self._pieces[id(tensor)] = tuple(self.pieces_of(group["index"], tensor))
                self._waiting[id(tensor)] = Holder(tensor, tensor.grad, self._pieces[id(tensor)])
        if len(self._waiting) < self._expected:
            return None
        holders = list(self._waiting.values())
        self._waiting = {}
        return [self._groups[index] for index in sorted(self._groups)], holders

    def partitions(self, groups: Sequence[dict[str, Any]]) -> list[tuple[int, Tensor, list[Piece]]]:
        """Group, partition and pieces of every partition of this process, in the order in which their state is saved.

        Args:
            groups: the optimizer's groups as they are between steps.
        """
        if self._zero3:
            of_sub_group = self._zero3.sub_group_to_group_id
            flats = self._zero3.fp32_partitioned_groups_flat
            return [(groups[of_sub_group[i]]["index"], flat, self._zero3_pieces(flat)) for i, flat in enumerate(flats)]
        held = [(group["index"], flat) for group in groups for flat in group["params"]]
        return [(index, flat, self._flat_pieces(index, flat)) for index, flat in held]

    def tensors(self) -> list[list[Tensor]]:
        """The model's own parameters, by group."""
        return self._model

    def place_of(self, param: Tensor) -> tuple[int, int]:
        """Group and position of one of the model's own parameters among those that the user gave.

        Raises:
            UnsupportedLayoutError: it is none of them.
        """
        if id(param) not in self._place:
            raise UnsupportedLayoutError("DeepSpeed's optimizer holds a parameter that was not given to it by the user")
        return self._place[id(param)]

    def pieces_of(self, group: int, flat: Tensor) -> list[Piece]:
        """The pieces in one flat partition of this process.

        Args:
            group: the place of the partition's tensors among the groups that the user gave.
            flat: the partition; under ZeRO-3 that of a sub-group.
        """
        return self._zero3_pieces(flat) if self._zero3 else self._flat_pieces(group, flat)

    def _flat_pieces(self, group: int, flat: Tensor) -> list[Piece]:
        # The model's parameters are views of one flat buffer, in whatever order DeepSpeed laid them
        # (round_robin_gradients has its own); their storage offsets say where each one is. Its own mapping of
        # fragments was measured wrong under round_robin_gradients in 0.19.8.
        begin = self._rank * flat.numel()
        found, buffers = [], set()
        for position, param in enumerate(self._model[group]):
            if not param.requires_grad:
                continue
            buffers.add(param.data.untyped_storage().data_ptr())
            at = int(param.data.storage_offset())
            low, high = max(at, begin), min(at + param.numel(), begin + flat.numel())
            if low < high:
                found.append(Piece(group, position, start=low - begin, numel=high - low, offset=low - at))
        if len(buffers) != 1:
            raise UnsupportedLayoutError("the weights of one group lie in several buffers, as ZeRO-1 and 2 never do")
        return found

    def _zero3_pieces(self, flat: Tensor) -> list[Piece]:
        sub_group = next(i for i, held in enumerate(self._zero3.fp32_partitioned_groups_flat) if held is flat)
        found = []
        for param in self._zero3.fp16_groups[sub_group]:
            _, start, numel = self._zero3.grad_position[self._zero3.get_param_id(param)]
            offset = self._rank * numel
            real = min(max(param.ds_numel - offset, 0), numel)  # the last part is padded to the size of the others
            if real:
                group, position = self._place[id(param)]
                found.append(Piece(group, position, start=start, numel=real, offset=offset))
        return found

    def _publish(self, holders: Sequence[Holder]) -> None:
        """Copy the partitions to the weights that the model uses, where DeepSpeed did so before the update."""
        for holder in holders[:-1]:  # the last one is copied by DeepSpeed when `step` returns
            for piece in holder.pieces:
                param: Any = self._model[piece.group][piece.position]
                if self._zero3:
                    param.ds_tensor.data.view(-1).narrow(0, 0, piece.numel).copy_(piece.of(holder.tensor))
                else:
                    param.data.view(-1).narrow(0, piece.offset, piece.numel).copy_(piece.of(holder.tensor))


def clipping_factor(wrapper: Any) -> Tensor | float:
    """By what number a ZeRO optimizer divided the gradients of the current step when it clipped them.

    Args:
        wrapper: DeepSpeed's ZeRO optimizer, with `clip_grad` (0: no clipping) and the unclipped `_global_grad_norm`.

    Example:
        >>> from types import SimpleNamespace
        >>> clipping_factor(SimpleNamespace(clip_grad=0.5, _global_grad_norm=2.0 - 1e-6))
        tensor(4., dtype=torch.float64)
        >>> clipping_factor(SimpleNamespace(clip_grad=0.0, _global_grad_norm=2.0))
        1.0
    """
    if wrapper.clip_grad <= 0:
        return 1.0
    norm = torch.as_tensor(wrapper._global_grad_norm, dtype=torch.float64)
    factor: Tensor = ((norm + 1e-6) / wrapper.clip_grad).clamp(min=1.0)
    return factor


def is_marked(given: Sequence[Sequence[weakref.ref[Tensor]]]) -> bool:
    """Whether any of the user's tensors carries a mark of a ZeRO optimizer.

    Example:
        >>> is_marked([[weakref.ref(torch.zeros(1))]])
        False
    """
    alive = (reference() for group in given for reference in group)
    return any(getattr(p, "_z3_optimizer", None) or getattr(p, "_dp_group", None) for p in alive if p is not None)


def _alive(reference: weakref.ref[Tensor]) -> Tensor:
    tensor = reference()
    if tensor is None:
        raise UnsupportedLayoutError("a wrapper replaced the model's own parameters by flat ones and let them go")
    return tensor


def _require_plain_data_parallel(params: Sequence[Any]) -> None:
    for param in params:
        if getattr(param, "allreduce", True) is False:  # DeepSpeed marks the experts of a mixture so
            raise UnsupportedLayoutError("the model has expert groups (mixture of experts under DeepSpeed)")
        if getattr(param, "tensor_model_parallel", False):
            raise UnsupportedLayoutError("the model is cut by tensor parallelism under DeepSpeed")
