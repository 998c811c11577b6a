"""Momentum and second moments in fewer bits, and where they lie when one holder has pieces of many tensors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_momentum.kernels import SMALLEST, Packed, packed_zeros
from hf_momentum.sharding import Piece


@dataclass
class PieceState:
    """State of one holder in eight bits, or of a partition with pieces of small tensors beside those of large ones.

    Attributes:
        like: the holder, whose shape `expanded()` has.
        pieces: by position, each piece and its part: `Packed`, bfloat16, or float32 where the piece is small.

    Example:
        >>> state, piece = PieceState(torch.zeros(4096)), Piece(0, 0, start=None, numel=4096)
        >>> state.add(piece, "int8", positive=False, value=torch.full((4096,), 0.5))
        >>> state.fits(piece, "int8"), state.expanded().unique()
        (True, tensor([0.5000]))
    """

    like: Tensor
    pieces: dict[int, tuple[Piece, Tensor | Packed]] = field(default_factory=dict)

    def add(self, piece: Piece, dtype: str, positive: bool, value: Tensor | None) -> None:
        """Make the part of a piece, of `value` rounded to nearest, or of zeros."""
        local = piece.of(self.like)
        part: Tensor | Packed
        if dtype == "int8" and piece.numel >= SMALLEST:
            part = packed_zeros(local.numel(), positive, local.device)
            if value is not None:
                part.encode_(piece.of(value), None)
        else:
            kind = torch.bfloat16 if dtype == "bfloat16" and piece.numel >= SMALLEST else torch.float32
            part = torch.zeros_like(local, dtype=kind) if value is None else piece.of(value).to(kind, copy=True)
        self.pieces[piece.position] = (piece, part)

    def fits(self, piece: Piece, dtype: str) -> bool:
        """Whether the part of a piece is there and stored as `dtype` says."""
        found = self.pieces.get(piece.position)
        if found is None or found[0] != piece:
            return False
        wanted = {"int8": Packed, "bfloat16": torch.bfloat16}.get(dtype) if piece.numel >= SMALLEST else torch.float32
        return (Packed if isinstance(found[1], Packed) else found[1].dtype) == wanted

    def expanded(self) -> Tensor:
        """All of it as a float32 tensor like the holder; exact, so that packing it again gives the same values."""
        whole = torch.zeros_like(self.like, dtype=torch.float32, requires_grad=False)
        for piece, part in self.pieces.values():
            target = piece.of(whole)
            target.copy_((part.decoded() if isinstance(part, Packed) else part).view(target.shape))
        return whole
