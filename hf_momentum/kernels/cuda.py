"""The kernels on lists of CUDA tensors: `triton_kernels.py`, launched over tables of pointers."""

from torch import Tensor

from hf_momentum.kernels.work import Work


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and if not, why."""
    return False, "no kernels for CUDA yet"


def launch(kernel: str, work: Work, width: int) -> Tensor:
    """Make one pass; the sums over each tensor, `[tensors, width]` in float64."""
    raise NotImplementedError
