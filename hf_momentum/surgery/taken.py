"""Gradients that were taken out of the buffers, next to those that are there now."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_momentum.sharding import GradientPiece


def aligned(pieces: Sequence[GradientPiece], taken: Sequence[GradientPiece]) -> list[Tensor]:
    """The taken gradient of each piece; zeros where there was none.

    Example:
        >>> from hf_momentum.sharding import Piece
        >>> x, y = torch.ones(2), torch.ones(3)
        >>> a, b = (GradientPiece(t, t, Piece(0, i, None, len(t)), i, len(t), 0) for i, t in enumerate((x, y)))
        >>> aligned([a, b], [b])
        [tensor([0., 0.]), tensor([1., 1., 1.])]
    """
    by_place = {(piece.row, piece.piece.start): piece.grad for piece in taken}
    found = [by_place.get((piece.row, piece.piece.start)) for piece in pieces]
    return [torch.zeros_like(p.grad) if grad is None else grad for p, grad in zip(pieces, found, strict=True)]
