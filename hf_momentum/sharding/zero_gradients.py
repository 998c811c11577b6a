"""The reduced gradient under DeepSpeed ZeRO, between `engine.backward` and `engine.step`.

What DeepSpeed (0.19) does with gradients, found by looking:

- ZeRO-2 reduces every backward pass. One that is not the last of an accumulation ("boundary") leaves its result in
  `all_grad_tensors`, whole tensors of which this process's stretch is reduced, and the next one adds to them. The
  boundary cuts the stretches out, into `averaged_gradients`, and a later boundary would replace them.
- ZeRO-1 does the same, but reduces only at a boundary; until then gradients lie unreduced in `.grad`.
- Where 16-bit gradients are accumulated in float32, both add to one flat buffer in `averaged_gradients` instead.
- With the optimizer on the CPU, passes accumulate in `accumulated_grads_in_cpu`. A boundary copies what it reached to
  the partition's `.grad` and notes its norm; the norms noted are what clipping uses.
- ZeRO-3 keeps a persistent buffer, to which every pass but the first adds. A parameter that a first pass does not
  reach keeps what an earlier step left there. With offload, a boundary copies and notes norms as above.
- `BF16_Optimizer` keeps the whole gradient in float32 on every process and reduces at a boundary, like DDP; it clips by
  the norm of the whole buffer, so every process must have what the others wrote.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_momentum.sharding.gradients import GradientPiece, ReducedGradients, WholeGradients
from hf_momentum.sharding.layout import Piece, UnsupportedLayoutError
from hf_momentum.sharding.zero import ZeroPartitions

Given = Sequence[Sequence[weakref.ref[Tensor]]]


def reduced_gradients(
    engine: Any,
    optimizer: torch.optim.Optimizer,
    given: Given,
    scale: Callable[[], Tensor | float] | None = None,
) -> ReducedGradients:
    """Access to the reduced gradients of a prepared model, whatever wrapper keeps them.

    Args:
        engine: DeepSpeed's engine; None without DeepSpeed.
        optimizer: the innermost one, whose `state` knows the holders.
        given: weak references to the tensors that were given to the optimizer, by group, taken before any wrapper
            replaced them; needed under ZeRO, where rows of tables of sums count the tensors in this order.
        scale: gives the present loss scale where gradients lie in `.grad`; None for none. ZeRO knows its own.

    Raises:
        UnsupportedLayoutError: the gradients are kept in a way that is not known here.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> type(reduced_gradients(None, optimizer, [[weakref.ref(w)]])).__name__
        'WholeGradients'
    """
    # ZeRO-0 in float32 has no wrapper: the engine holds the optimizer itself.
    if engine is None or isinstance(engine.optimizer, torch.optim.Optimizer):
        return WholeGradients(optimizer, scale)
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    # The types themselves: their subclasses (MiCS, ZenFlow) keep gradients in other ways.
    if type(zero) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer):
        raise UnsupportedLayoutError(f"DeepSpeed keeps the gradients in its {type(zero).__name__}", _REMEDY)
    _require_plain(engine)
    if type(zero) is BF16_Optimizer:
        return BF16Gradients(engine, given)
    if type(zero) is DeepSpeedZeroOptimizer:
        return (OffloadedGradients if zero.cpu_offload else PartitionGradients)(engine, given)
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise UnsupportedLayoutError("weights, gradients or optimizer state are swapped to NVMe", _REMEDY)
    return Zero3Gradients(engine, given)


_REMEDY = "Under DeepSpeed, set the ZeRO stage to 1, 2 or 3, on the GPU or with offload to the CPU"


def _require_plain(engine: Any) -> None:
    """Raise for what changes gradients, or where they lie, in ways that were not looked at."""
    unknown = {
        "zenflow": engine.zenflow,
        "DeepCompile": engine.is_deepcompile_enabled(),
        "managed_gradient_accumulation: false": not engine.managed_gradient_accumulation(),
        "torch_autocast in float16": engine.optimizer.torch_autocast_gradscaler is not None,
        "master weights in 16 bits": engine.fp16_master_weights_and_gradients()
        or engine.bf16_master_weights_and_gradients(),
        "Muon, which puts its updates in the place of gradients": "muon"
        in type(engine.basic_optimizer).__name__.lower(),
    }
    for name, found in unknown.items():
        if found:
            raise UnsupportedLayoutError(f"DeepSpeed runs with {name}", f"Turn it off. {_REMEDY}")


@dataclass(frozen=True)
class _Part:
    """One piece of this process.

    Attributes:
        index: of its partition among DeepSpeed's.
        param: the model's own parameter, which DeepSpeed knows by its identity.
        holder: the flat float32 partition.
        piece, row: as in GradientPiece.
    """

    index: int
    param: Any
    holder: Tensor
    piece: Piece
    row: int


class _ZeroGradients:
    """What the kinds share. Each says in `_grads` where DeepSpeed keeps the gradients of this process's pieces.

    Args:
        engine: DeepSpeed's engine.
        given: weak references to the tensors that were given to the optimizer, by group.
        groups: the model's parameters in each of DeepSpeed's partitions, in its order.
        holders: the partitions.
    """

    boundary = False

    def __init__(
        self, engine: Any, given: Given, groups: Iterable[Sequence[Tensor]], holders: Sequence[Tensor]
    ) -> None:
        self._engine, self._zero, self._holders = engine, engine.optimizer, holders
        partitions = ZeroPartitions(given)
        self.layout = partitions.layout
        tensors = partitions.tensors()
        rows = [0, *accumulate(len(group) for group in tensors)]
        parts = []
        for index, (params, holder) in enumerate(zip(groups, holders, strict=True)):
            group, _ = partitions.place_of(params[0])
            for piece in partitions.pieces_of(group, holder):
                param = tensors[piece.group][piece.position]
                parts.append(_Part(index, param, holder, piece, rows[piece.group] + piece.position))
        self._parts = sorted(parts, key=lambda part: part.row)

    def loss_scale(self) -> Tensor | float:
        """What the gradients are multiplied by at present."""
        scale: float = self._zero.loss_scale
        return scale

    def _grads(self, needed: Callable[[Tensor], bool]) -> list[Tensor | None]:
        """The flat gradient of every part, where DeepSpeed keeps it; None where there is none and none is needed."""
        raise NotImplementedError

    def pieces(self, needed: Callable[[Tensor], bool]) -> list[GradientPiece]:
        """Every piece of this process, once any backward pass has run; before that, those that are `needed`."""
        return [
            GradientPiece(grad, part.holder, part.piece, part.row, _numel(part.param), part.piece.offset)
            for part, grad in zip(self._parts, self._grads(needed), strict=True)
            if grad is not None
        ]

    def take(self, needed: Callable[[Tensor], bool]) -> list[GradientPiece]:
        """Copies of the pieces, whose gradients are gone from DeepSpeed's buffers then."""
        taken = [replace(piece, grad=piece.grad.clone()) for piece in self.pieces(needed)]
        self.drop()
        return taken

    def drop(self) -> None:
        """Let DeepSpeed begin from nothing."""
        raise NotImplementedError

    def settle(self) -> None:
        """Let `engine.step` step, even if the last backward pass was no boundary."""
        self._engine.set_gradient_accumulation_boundary(True)


class PartitionGradients(_ZeroGradients):
    """ZeRO-1 and 2.

    Args:
        engine: DeepSpeed's engine, with a `DeepSpeedZeroOptimizer` that does not offload.
        given: weak references to the tensors that were given to the optimizer, by group.
    """

    def __init__(self, engine: Any, given: Given) -> None:
        zero = engine.optimizer
        super().__init__(engine, given, zero.bit16_groups, zero.single_partition_of_fp32_groups)
        self.boundary = not zero.partition_gradients

    def _grads(self, needed: Callable[[Tensor], bool]) -> list[Tensor | None]:
        begins = [self._by_begin(index, needed(holder)) for index, holder in enumerate(self._holders)]
        return [begins[part.index].get(_start(part)) for part in self._parts]

    def _by_begin(self, index: int, make: bool) -> dict[int, Tensor]:
        """The flat gradients of one partition's pieces by where they begin in it; empty if there are none."""
        zero = self._zero
        cut, parts = zero.averaged_gradients.get(index), [part for part in self._parts if part.index == index]
        if zero._use_compact_grad_partition_buffer(index):
            if cut is None and not make:
                return {}
            flat = zero._get_compact_grad_partition_buffer(index).flat_partition
            return {_start(part): part.piece.of(flat) for part in parts}
        if cut is not None:
            begins = accumulate((grad.numel() for grad in cut), initial=0)
            return {begin: grad.view(-1) for begin, grad in zip(begins, cut, strict=False)}
        if zero.all_grad_tensors.get(index) is None:
            if not make:
                return {}
            dtype = zero.gradient_accumulation_dtype
            zero.all_grad_tensors[index] = [torch.zeros_like(p, dtype=dtype) for p in zero.params_in_partition[index]]
        pairs = zip(zero.params_in_partition[index], zero.all_grad_tensors[index], strict=True)
        whole = {id(param): grad for param, grad in pairs}
        return {_start(part): _stretch(whole[id(part.param)], part.piece) for part in parts}

    def keep(self) -> None:
        """Put what a boundary has cut out back to where DeepSpeed adds."""
        zero = self._zero
        for index in range(len(self._holders)):
            if zero.averaged_gradients.get(index) is None or zero._use_compact_grad_partition_buffer(index):
                continue
            begins = self._by_begin(index, make=False)
            parts = {id(part.param): part for part in self._parts if part.index == index}
            cut = zero.averaged_gradients[index]
            zero.all_grad_tensors[index] = [
                _uncut(param, parts[id(param)].piece, begins[_start(parts[id(param)])])
                if id(param) in parts
                else torch.zeros_like(param, dtype=cut[0].dtype)  # a tensor of no elements
                for param in zero.params_in_partition[index]
            ]
            zero.averaged_gradients[index] = None

    def settle(self) -> None:
        """Cut this process's stretches out, if the last backward pass was no boundary."""
        super().settle()
        if any(self._zero.averaged_gradients.get(index) is None for index in range(len(self._holders))):
            self._grads(lambda holder: True)
            self._zero.finalize_gradient_accumulation_boundary()

    def drop(self) -> None:
        """Let go of both kinds of buffers, and of gradients that are not reduced yet."""
        self._zero.zero_grad()
        for index in range(len(self._holders)):
            self._zero.averaged_gradients[index] = self._zero.all_grad_tensors[index] = None


class OffloadedGradients(_ZeroGradients):
    """ZeRO-1 and 2 with the optimizer on the CPU.

    Args:
        engine: DeepSpeed's engine, with a `DeepSpeedZeroOptimizer` that offloads to the CPU.
        given: weak references to the tensors that were given to the optimizer, by group.
    """

    def __init__(self, engine: Any, given: Given) -> None:
        zero = engine.optimizer
        super().__init__(engine, given, zero.bit16_groups, zero.single_partition_of_fp32_groups)
        self.boundary = not zero.partition_gradients

    def _grads(self, needed: Callable[[Tensor], bool]) -> list[Tensor | None]:
        self._zero._wait_for_offload_copies()
        return [self._grad(part) for part in self._parts]

    def _grad(self, part: _Part) -> Tensor:
        zero = self._zero
        if zero._use_compact_grad_partition_buffer(part.index):
            flat: Tensor = zero._get_compact_grad_partition_buffer(part.index).flat_partition
            return part.piece.of(flat)
        if zero.get_param_id(part.param) in zero.norm_for_param_grads:  # a boundary has reached it
            return part.piece.of(_grad_of(part.holder))
        return self._accumulator(part)

    def _accumulator(self, part: _Part) -> Tensor:
        """Where passes that are no boundary accumulate; made as DeepSpeed does, which makes it at the first of them."""
        zero, known = self._zero, self._zero.accumulated_grads_in_cpu
        param_id = zero.get_param_id(part.param)
        if param_id not in known:
            from deepspeed.accelerator import get_accelerator

            buffer = torch.zeros(part.param.numel(), dtype=part.param.dtype, device=zero.device)
            known[param_id] = get_accelerator().pin_memory(buffer) if zero.cpu_offload_pin_memory else buffer
        return _stretch(known[param_id], part.piece)

    def keep(self) -> None:
        """Put what a boundary has copied to the partition back to where DeepSpeed accumulates."""
        zero = self._zero
        zero._wait_for_offload_copies()
        for part in self._parts:
            param_id = zero.get_param_id(part.param)
            if param_id in zero.norm_for_param_grads and not zero._use_compact_grad_partition_buffer(part.index):
                self._accumulator(part).copy_(part.piece.of(_grad_of(part.holder)))
                del zero.norm_for_param_grads[param_id]
        zero.micro_step_id = max(zero.micro_step_id, 0)  # the next pass is not the first, and adds

    def settle(self) -> None:
        """Bring every piece to the partition's gradient, and the norms that DeepSpeed clips by up to date."""
        super().settle()
        for part, grad in zip(self._parts, self._grads(lambda holder: True), strict=True):
            norm = _copied_norm(part, grad)
            self._zero.norm_for_param_grads[self._zero.get_param_id(part.param)] = norm
            self._zero.local_overflow |= not bool(norm.isfinite())

    def drop(self) -> None:
        """Empty the accumulators and forget the norms."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        zero = self._zero
        zero.zero_grad()
        zero.reset_cpu_buffers()
        for buffer in zero.accumulated_grads_in_cpu.values():
            buffer.zero_()
        for index in range(len(self._holders)):
            zero.averaged_gradients[index] = None
        zero.micro_step_id = INITIAL_MICRO_STEP_ID


class Zero3Gradients(_ZeroGradients):
    """ZeRO-3, on the GPU or with the optimizer, or the weights too, on the CPU.

    Args:
        engine: DeepSpeed's engine, with a `DeepSpeedZeroOptimizer_Stage3`.
        given: weak references to the tensors that were given to the optimizer, by group.
    """

    def __init__(self, engine: Any, given: Given) -> None:
        zero = engine.optimizer
        super().__init__(engine, given, zero.fp16_groups, zero.fp32_partitioned_groups_flat)
        # DeepSpeed strings all sub-groups' gradients together in one buffer, padding included.
        params = list(chain.from_iterable(zero.fp16_groups))
        begins = accumulate((param.partition_numel() for param in params), initial=0)
        self._begins = {id(param): begin for param, begin in zip(params, begins, strict=False)}

    def _grads(self, needed: Callable[[Tensor], bool]) -> list[Tensor | None]:
        flat: Tensor = self._zero.grad_partitions_flat_buffer
        return [flat.narrow(0, self._begins[id(part.param)], part.piece.numel) for part in self._parts]

    def keep(self) -> None:
        """Let DeepSpeed know that the next pass is not the first, and adds."""
        self._zero.micro_step_id = max(self._zero.micro_step_id, 1)

    def settle(self) -> None:
        """With offload, bring every piece to the partition's gradient, and the norms for clipping up to date."""
        super().settle()
        if not self._zero.offload_optimizer:
            return
        for part, grad in zip(self._parts, self._grads(lambda holder: True), strict=True):
            self._zero.norm_for_param_grads[self._zero.get_param_id(part.param)] = _copied_norm(part, grad)

    def drop(self) -> None:
        """Empty the buffer, in which parameters that the next pass does not reach would keep what is there now."""
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()
        if self._zero.offload_optimizer:
            self._zero.reset_cpu_buffers()


class BF16Gradients(_ZeroGradients):
    """ZeRO-1 with bf16 weights and float32 accumulation.

    The pieces are those of this process's partition, as under ZeRO-1. `keep` and `settle` each gather the partitions of
    all processes, which costs as much as half of DeepSpeed's all-reduce.

    Args:
        engine: DeepSpeed's engine, with a `BF16_Optimizer`.
        given: weak references to the tensors that were given to the optimizer, by group.
    """

    boundary = True

    def __init__(self, engine: Any, given: Given) -> None:
        zero = engine.optimizer
        super().__init__(engine, given, zero.bf16_groups, zero.fp32_groups_flat_partition)

    def loss_scale(self) -> float:
        """bf16 needs no scale."""
        return 1.0

    def _grads(self, needed: Callable[[Tensor], bool]) -> list[Tensor | None]:
        partitions = self._zero.fp32_groups_gradient_flat_partition
        return [part.piece.of(partitions[part.index]) for part in self._parts]

    def _gather(self) -> None:
        zero = self._zero
        partitions = zero.fp32_groups_gradient_flat_partition
        for whole, own, group in zip(
            zero.fp32_groups_gradients_flat, partitions, zero.real_dp_process_group, strict=True
        ):
            dist.all_gather_into_tensor(whole, own.clone(), group=group)

    def keep(self) -> None:
        """Give every process what the others wrote; it counts once in the average that the next boundary takes."""
        self._gather()

    def settle(self) -> None:
        """Give every process what the others wrote, for the norm; all tensors count in it."""
        super().settle()
        self._gather()
        for index, group in enumerate(self._zero.bf16_groups):
            self._zero.fp32_groups_has_gradients[index] = [True] * len(group)

    def drop(self) -> None:
        """Empty both buffers."""
        self._zero.zero_grad()


def _numel(param: Any) -> int:
    """The elements of the whole tensor; under ZeRO-3 the parameter itself is empty between uses."""
    return int(getattr(param, "ds_numel", param.numel()))


def _start(part: _Part) -> int:
    assert part.piece.start is not None, "a flat partition's pieces begin somewhere in it"
    return part.piece.start


def _stretch(whole: Tensor, piece: Piece) -> Tensor:
    """One process's stretch of a whole tensor, flat; a view."""
    return whole.view(-1).narrow(0, piece.offset, piece.numel)


def _uncut(param: Tensor, piece: Piece, grad: Tensor) -> Tensor:
    """A tensor shaped like `param` that holds `grad` at its place; no copy where that is all of it."""
    if piece.numel == param.numel():
        return grad.view(param.shape)
    whole = torch.zeros_like(param, dtype=grad.dtype)
    _stretch(whole, piece).copy_(grad)
    return whole


def _grad_of(holder: Tensor) -> Tensor:
    assert holder.grad is not None, "DeepSpeed keeps the gradient of an offloaded partition"
    return holder.grad


def _copied_norm(part: _Part, grad: Tensor | None) -> Tensor:
    """The norm of a piece's gradient, on the CPU, after it was copied to its partition's gradient."""
    target = part.piece.of(_grad_of(part.holder))
    assert grad is not None
    if target.data_ptr() != grad.data_ptr():
        target.copy_(grad)
    norm: Tensor = torch.linalg.vector_norm(target, dtype=torch.float64)
    return norm.cpu()
