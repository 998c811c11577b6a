"""Auxiliary losses of the weights alone, whose gradients need no backward pass.

l2:        L_aux = |w|^2 / 2             g_aux = w
distance:  L_aux = |w - w_start|^2 / 2   g_aux = w - w_start
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_momentum.sharding import GradientPiece, ReducedGradients, total
from hf_momentum.surgery.kept import Kept


class Regulariser:
    """Forms the gradient when the main one is there; it is held, one gradient more in memory, until they are combined.

    Args:
        kind: "l2" or "distance".
        optimizer: the innermost one; its state carries the start for "distance" (`bloop_start`), another copy of the
            trained weights.

    Example:
        >>> from hf_momentum.sharding import WholeGradients
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.zeros(2)
        >>> gradients = WholeGradients(torch.optim.SGD([w], lr=0.1))
        >>> pieces, loss = Regulariser("l2", torch.optim.SGD([w], lr=0.1)).gradient(gradients, weight=2.0)
        >>> pieces[0].grad, loss
        (tensor([6., 8.]), tensor(12.5000, dtype=torch.float64))
    """

    def __init__(self, kind: str, optimizer: torch.optim.Optimizer) -> None:
        self.kind = kind
        self._start = Kept(optimizer, {"bloop_start": torch.float32}) if kind == "distance" else None

    @torch.no_grad()
    def gradient(self, gradients: ReducedGradients, weight: float) -> tuple[list[GradientPiece], Tensor]:
        """`weight` times the gradient, in tensors of their own, scaled like the others; and the loss."""
        pieces = gradients.pieces(lambda holder: False)
        weights = [piece.piece.of(piece.holder.detach()) for piece in pieces]
        away = [w - start for w, start in zip(weights, self._starts(pieces), strict=True)] if self._start else weights
        squares = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) ** 2 for x in away])[:, None]
        loss = total(gradients.layout, pieces, squares)[0] / 2
        factor = weight * gradients.loss_scale()
        return [replace(p, grad=(factor * x).to(p.grad.dtype)) for p, x in zip(pieces, away, strict=True)], loss

    def _starts(self, pieces: Sequence[GradientPiece]) -> list[Tensor]:
        assert self._start is not None
        for piece in pieces:
            self._start.make("bloop_start", piece.holder, value=piece.holder)
        return self._start.of("bloop_start", pieces)
