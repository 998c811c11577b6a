"""What one pass of a kernel over lists of tensors is given, whatever the device that makes the pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_momentum.kernels.rounding import Packed, random_bits, to_bfloat16


@dataclass(frozen=True)
class Gradients:
    """`sign factor g + decay w` for each pair of raw gradient and weight; kernels form it element by element.

    Attributes:
        raw: the gradients as autograd left them.
        weights: the weights, of the same shapes and dtype.
        sign: 1, or -1 to ascend.
        decay: the weight decay that enters the gradient (the coupled form); 0 where there is none.
        factor: what clipping multiplies the gradients by; a 0-dim tensor, or a number.

    Example:
        >>> g, w = [torch.tensor([1.0, 2.0])], [torch.tensor([10.0, 10.0])]
        >>> Gradients(g, w, sign=-1.0, decay=0.5).formed()
        [tensor([4., 3.])]
    """

    raw: Sequence[Tensor]
    weights: Sequence[Tensor]
    sign: float = 1.0
    decay: float = 0.0
    factor: Tensor | float = 1.0

    def formed(self) -> list[Tensor]:
        """The gradients as tensors of their own."""
        scale = self.sign * self.factor
        return [(scale * g + self.decay * w).to(g) for g, w in zip(self.raw, self.weights, strict=True)]


@dataclass(frozen=True)
class Reduced:
    """A list of state tensors that lie in memory with fewer bits than they are computed with.

    Attributes:
        parts: bfloat16 tensors, or eight-bit `Packed` ones; all of one kind.
        shapes: of the pieces that they are the state of.
        seeds: one per part, float64, for the random bits of the next rounding.
        positive: whether they are second moments; these take other random bits than first moments do.
    """

    parts: Sequence[Tensor | Packed]
    shapes: Sequence[torch.Size]
    seeds: Tensor
    positive: bool = False

    def decoded(self) -> list[Tensor]:
        """The values as float32 tensors of the pieces' shapes.

        Example:
            >>> Reduced([torch.ones(2, dtype=torch.bfloat16)], [torch.Size([2])], torch.zeros(1)).decoded()
            [tensor([1., 1.])]
        """
        values = [part.decoded() if isinstance(part, Packed) else part.float() for part in self.parts]
        return [value.view(shape) for value, shape in zip(values, self.shapes, strict=True)]

    def encode_(self, values: Sequence[Tensor]) -> None:
        """Round new values into the parts; of an element's 32 random bits a first moment takes the low ones."""
        for part, value, seed in zip(self.parts, values, self.seeds.unbind(), strict=True):
            bits = random_bits(seed, value.numel(), value.device)
            if isinstance(part, Packed):
                part.encode_(value, bits >> 12 if self.positive else bits)
            else:
                part.copy_(to_bfloat16(value, bits >> 16 if self.positive else bits))


State: TypeAlias = Sequence[Tensor] | Reduced
"""State tensors as a method hands them on: float32 (or the weights' float64), or reduced."""

Numbers: TypeAlias = Tensor | float
"""A number for all tensors (a float or a 0-dim tensor) or one for each (1-dim, float64)."""


@dataclass(frozen=True)
class Work:
    """One pass over lists of tensors; what a kernel does not need is left out.

    Attributes:
        grads: the gradients.
        weights: the weights, to be written.
        first, squares: momentum (or first moment, or displacement) and second moment.
        previous: the previous gradient, or with `nesterov=2` where the direction is written.
        keep: what the first moment is multiplied by.
        enter: what the gradient is multiplied by on entering it.
        rate: the weights lose `rate` times the direction.
        shrink: what the weights are multiplied by.
        unbias: what sqrt(v) is multiplied by.
        seeds: float64, one per tensor, to round bfloat16 weights stochastically; None rounds to nearest.
        beta2, eps: of the second moment.
        nesterov: 0: the direction is the momentum; 1: `enter g + keep m`; 2: and it is written to `previous`.
        divide_change: whether the difference of gradients is divided by Adam's denominators too.
        written: whether the pass writes `first` and `squares`.
        skip: 0-dim; where it is not 0 the pass writes nothing. None: it writes.
        tables: pointers that an earlier pass over the same lists has looked up, by the identity of the list; the lists
            stay alive as long as it does.
    """

    grads: Gradients | None = None
    weights: Sequence[Tensor] | None = None
    first: State = ()
    squares: State | None = None
    previous: Sequence[Tensor] | None = None
    keep: Numbers = 0.0
    enter: Numbers = 0.0
    rate: Numbers = 0.0
    shrink: Numbers = 1.0
    unbias: Numbers = 1.0
    seeds: Tensor | None = None
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: int = 0
    divide_change: bool = False
    written: bool = True
    skip: Tensor | None = None
    tables: dict[int, Any] | None = None

    def pieces(self) -> Sequence[Tensor]:
        """Tensors of the dtype and the shapes that the pass goes over."""
        if self.weights is not None:
            return self.weights
        return self.grads.raw if self.grads is not None else ()
