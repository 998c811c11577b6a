"""Multi-tensor functions on lists of pieces."""

from hf_momentum.kernels import choice
from hf_momentum.kernels.rounding import SMALLEST, Packed, packed_zeros, random_bits, seeds, to_bfloat16, weight_seed
from hf_momentum.kernels.rules import How, rule
from hf_momentum.kernels.sums import alignment_sums, squared_norms, sum_dtype
from hf_momentum.kernels.work import Gradients, Reduced, State

__all__ = [
    "SMALLEST",
    "Gradients",
    "How",
    "Packed",
    "Reduced",
    "State",
    "alignment_sums",
    "choice",
    "packed_zeros",
    "random_bits",
    "rule",
    "seeds",
    "squared_norms",
    "sum_dtype",
    "to_bfloat16",
    "weight_seed",
]
