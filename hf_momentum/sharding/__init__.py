"""Who owns which piece of which parameter, and exact sums over all of them.

A single process, where every tensor is whole, is the simplest case.
"""

from hf_momentum.sharding.gradients import GradientPiece, ReducedGradients, WholeGradients, total
from hf_momentum.sharding.layout import (
    SUPPORTED,
    Holder,
    Layout,
    Piece,
    UnsupportedLayoutError,
    lay_out,
    require_like,
)
from hf_momentum.sharding.zero import ZeroPartitions, clipping_factor, is_marked
from hf_momentum.sharding.zero_gradients import reduced_gradients

__all__ = [
    "SUPPORTED",
    "GradientPiece",
    "Holder",
    "Layout",
    "Piece",
    "ReducedGradients",
    "UnsupportedLayoutError",
    "WholeGradients",
    "ZeroPartitions",
    "clipping_factor",
    "is_marked",
    "lay_out",
    "reduced_gradients",
    "require_like",
    "total",
]
