"""Multi-tensor functions on lists of pieces."""

from hf_momentum.kernels.gradients import Gradients
from hf_momentum.kernels.sums import alignment_sums, squared_norms, sum_dtype

__all__ = ["Gradients", "alignment_sums", "squared_norms", "sum_dtype"]
