"""The gradients of a list of tensors as an update rule sees them, without the temporaries that forming them costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """`sign g + decay w` for each pair of raw gradient and weight; kernels form it element by element.

    Attributes:
        raw: the gradients as autograd left them.
        weights: the weights, of the same shapes and dtype.
        sign: 1, or -1 to ascend; may carry a factor on top.
        decay: the weight decay that enters the gradient (the coupled form); 0 where there is none.

    Example:
        >>> import torch
        >>> g, w = [torch.tensor([1.0, 2.0])], [torch.tensor([10.0, 10.0])]
        >>> Gradients(g, w, sign=-1.0, decay=0.5).formed()
        [tensor([4., 3.])]
    """

    raw: Sequence[Tensor]
    weights: Sequence[Tensor]
    sign: float = 1.0
    decay: float = 0.0

    def formed(self) -> list[Tensor]:
        """The gradients as tensors of their own."""
        return [self.sign * g + self.decay * w for g, w in zip(self.raw, self.weights, strict=True)]
