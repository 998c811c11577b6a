"""The reduced gradient between backward and step: where it lies, and how two of them become one.

Gradient surgery needs gradients of two losses, each already averaged over all processes, and inner products of them
over the whole model. Nothing is gathered: every process works on the pieces that it will step with, and one all-reduce
of a few numbers makes inner products whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_momentum.sharding.layout import Layout, Piece, lay_out, require_like


@dataclass(frozen=True)
class GradientPiece:
    """The part of one tensor's gradient that this process holds and will step with.

    Attributes:
        grad: the reduced gradient, to be read and overwritten; a view of where the wrapper keeps it.
        holder: the tensor by which `optimizer.state` knows it: the parameter, its DTensor, or a flat partition.
        piece: which part of the holder it is; `piece.of(state)` cuts a state tensor alike.
        row: the tensor's row in tables of sums.
        numel: the number of elements of the whole tensor.
        offset: where the piece begins in the flattened tensor; None if it is not one stretch of it.
    """

    grad: Tensor
    holder: Tensor
    piece: Piece
    row: int
    numel: int
    offset: int | None


class ReducedGradients(Protocol):
    """What every way to keep gradients offers.

    One accumulation goes so: `drop`; backward passes over one loss; `pieces`, which may be overwritten; `keep`, and
    backward passes over another loss, which add to what is there, or `take`, after which they begin from nothing; and
    so on; `settle`; the optimizer's step. Nothing here holds a gradient of its own between the calls.

    Attributes:
        layout: how the tensors lie.
        boundary: whether an auxiliary loss's last backward pass must be declared the end of an accumulation, for its
            gradient to be reduced; for wrappers that ask (DeepSpeed).
    """

    layout: Layout
    boundary: bool

    def loss_scale(self) -> Tensor | float:
        """What the gradients are multiplied by at present, against underflow; 1 where there is no such thing."""

    def pieces(self, needed: Callable[[Tensor], bool]) -> list[GradientPiece]:
        """Every piece that has a gradient; one of zeros is made for a holder that is `needed` and has none.

        Frozen tensors have none. ZeRO keeps a gradient for every other tensor; zeros where no loss reached it.
        """

    def keep(self) -> None:
        """Let the next backward pass add to what is in the buffers now."""

    def take(self, needed: Callable[[Tensor], bool]) -> list[GradientPiece]:
        """Take the gradient away, so that the next backward pass begins from nothing.

        Returns:
            What `pieces(needed)` would have given, out of reach of the wrapper. To put it back, write to or add to the
            later `pieces`: the two lists have the same rows in the same order if `needed` is true of every holder.
        """

    def settle(self) -> None:
        """Tell the wrapper that the gradients are as they shall be at the step; to be called before every step."""

    def drop(self) -> None:
        """Throw the gradients away, so that the next backward pass begins from nothing; no step needs to follow.

        To be called before the first backward pass of every accumulation too: after a step some wrappers still keep the
        gradients of parameters that the next loss may not reach, and would add to them.
        """


def total(layout: Layout, pieces: Sequence[GradientPiece], sums: Tensor) -> Tensor:
    """Sums over the whole model, from this process's sums over its pieces; one all-reduce where tensors are cut.

    Args:
        layout: how the tensors lie.
        pieces: as `ReducedGradients.pieces` gave them.
        sums: `[pieces, k]`.

    Returns:
        `[k]`, the same on every process bit for bit.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> w.grad = torch.ones(3)
        >>> gradients = WholeGradients(torch.optim.SGD([w], lr=1.0))
        >>> pieces = gradients.pieces(lambda holder: False)
        >>> total(gradients.layout, pieces, torch.tensor([[2.0, 3.0]]))
        tensor([2., 3.])
    """
    table = sums.new_zeros(sum(layout.counts), sums.shape[1])
    table.index_add_(0, torch.tensor([piece.row for piece in pieces], device=sums.device), sums)
    return layout.totals(table).sum(0)


class WholeGradients:
    """Gradients that lie in `.grad` of the optimizer's tensors: one process, DDP, FSDP2, HSDP, ZeRO-0.

    Args:
        optimizer: with plain tensors or DTensors in its groups, after any wrapper has replaced them.
        scale: gives the present loss scale; None where there is none.

    Raises:
        UnsupportedLayoutError: a tensor is cut in a way that is not known here.
    """

    boundary = True

    def __init__(self, optimizer: torch.optim.Optimizer, scale: Callable[[], Tensor | float] | None = None) -> None:
        self._optimizer, self._scale = optimizer, scale
        self.layout = lay_out(optimizer.param_groups, known=lambda tensor: True)

    def loss_scale(self) -> Tensor | float:
        """What the gradients are multiplied by at present."""
        return 1.0 if self._scale is None else self._scale()

    def _params(self) -> list[tuple[int, int, Tensor]]:
        groups = enumerate(self._optimizer.param_groups)
        return [(i, j, param) for i, group in groups for j, param in enumerate(group["params"])]

    def pieces(self, needed: Callable[[Tensor], bool]) -> list[GradientPiece]:
        """Every piece that has a gradient; one of zeros is made for a holder that is `needed` and has none."""
        found = []
        for row, (group, position, param) in enumerate(self._params()):
            if param.grad is None:
                if not (param.requires_grad and needed(param)):
                    continue
                param.grad = torch.zeros_like(param)
            require_like(param, param.grad)
            piece = Piece(group, position, start=None, numel=param.numel())
            found.append(GradientPiece(piece.of(param.grad), param, piece, row, param.numel(), _offset(param)))
        return found

    def keep(self) -> None:
        """Nothing to do: autograd adds to `.grad`."""

    def take(self, needed: Callable[[Tensor], bool]) -> list[GradientPiece]:
        """The pieces, whose gradients are gone from the tensors then.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> gradients = WholeGradients(torch.optim.SGD([w], lr=1.0))
            >>> (w * torch.tensor([1.0, 2.0])).sum().backward()
            >>> taken = gradients.take(lambda holder: True)
            >>> taken[0].grad, w.grad
            (tensor([1., 2.]), None)
        """
        taken = self.pieces(needed)
        self.drop()
        return taken

    def settle(self) -> None:
        """Nothing to do: the optimizer reads `.grad`."""

    def drop(self) -> None:
        """Tensors without a gradient are left alone by an optimizer."""
        for _, _, param in self._params():
            param.grad = None


def _offset(param: Tensor) -> int | None:
    """Where the local part of a tensor begins in the flattened whole; None if it is not one stretch of it."""
    if not isinstance(param, DTensor):
        return 0
    if any(type(placement) is Shard and placement.dim != 0 for placement in param.placements):
        return None
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return int(offset[0]) * (param.numel() // max(param.shape[0], 1)) if param.dim() else 0
