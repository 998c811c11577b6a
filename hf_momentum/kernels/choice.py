"""Which kernels take which tensors: the one place that decides by device and dtype."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_momentum.kernels import cpu, cuda
from hf_momentum.kernels.work import Work

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


class Backend(Protocol):
    """The kernels of one kind of device."""

    def available(self) -> tuple[bool, str]:
        """Whether they can run here, and if not, why."""

    def launch(self, kernel: str, work: Work, width: int) -> Tensor:
        """Make one pass; the sums, `[tensors, width]` in float64."""


_BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda}
_PLAIN = frozenset((Tensor, torch.nn.Parameter))

_is_contiguous: Callable[[Any], bool] = Tensor.is_contiguous
_dtype, _is_cpu, _layout = attrgetter("dtype"), attrgetter("is_cpu"), attrgetter("layout")


def launch(kernel: str, work: Work, width: int) -> Tensor:
    """One pass of `kernel` on the device that holds the tensors; the sums, `[tensors, width]` in float64."""
    device = work.pieces()[0].device.type
    return _BACKENDS[device].launch(kernel, work, width)


def obstacle(param: Tensor, grad: Tensor) -> str:
    """Why no kernel takes this pair, or an empty string if one does.

    Example:
        >>> obstacle(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
        'torch.float64 tensors'
        >>> obstacle(torch.zeros(3, 2).t(), torch.zeros(2, 3))
        'tensors that are not contiguous'
    """
    if param.device.type not in _BACKENDS:
        return f"tensors on {param.device.type}"
    if param.dtype not in _DTYPES:
        return f"{param.dtype} tensors"
    if grad.dtype != param.dtype or grad.device != param.device:
        return "gradients of another dtype or device than their weights"
    if not (param.is_contiguous() and grad.is_contiguous()):
        return "tensors that are not contiguous"
    if type(grad) is not Tensor or type(param) not in _PLAIN:
        return "tensor subclasses"
    return _BACKENDS[param.device.type].available()[1]


def takes(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
    """Whether no pair of tensors that had none before has an `obstacle` now; a few passes in C over all of them.

    Example:
        >>> takes([torch.zeros(3)], [torch.zeros(3)]), takes([torch.zeros(3)], [torch.zeros(3).double()])
        (True, False)
    """
    if set(map(type, grads)) != {Tensor} or set(map(_layout, grads)) != {torch.strided}:
        return False
    dtypes = set(map(_dtype, params))
    if len(dtypes) != 1 or set(map(_dtype, grads)) != dtypes or not dtypes <= _DTYPES:
        return False
    kinds = set(map(_is_cpu, params)) | set(map(_is_cpu, grads))
    if len(kinds) != 1 or not all(map(_is_contiguous, params)) or not all(map(_is_contiguous, grads)):
        return False
    device = params[0].device.type
    return device in _BACKENDS and _BACKENDS[device].available()[0]


def name_of(device: torch.device) -> str:
    """What the log calls the kernels for tensors on `device`.

    Example:
        >>> name_of(torch.device("cpu"))
        'CPU kernels'
    """
    return {"cpu": "CPU kernels", "cuda": "Triton kernels"}[device.type]
