"""Multi-tensor functions on lists of pieces."""

from hf_momentum.kernels.sums import alignment_sums, squared_norms, sum_dtype

__all__ = ["alignment_sums", "squared_norms", "sum_dtype"]
