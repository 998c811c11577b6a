"""The surgeries that Bloop is compared with: weights of this batch's gradients, from their inner products."""

from typing import Any

import torch
from torch import Tensor

from hf_momentum.sharding import GradientPiece, ReducedGradients, total
from hf_momentum.surgery.combination import RULES, gram_matrix
from hf_momentum.surgery.measured import Averaged
from hf_momentum.surgery.passes import Passes
from hf_momentum.surgery.settings import Settings
from hf_momentum.surgery.taken import aligned


class Combination:
    """d = sum_k weight_k A_k, A_0 the main gradient and A_k = lam_k g_k; the weights are a rule of `combination.py`.

    The same interface as `Bloop`. "mixed" needs no inner product, and every loss adds to one buffer; the others hold
    each auxiliary gradient until the main one is there.

    Args:
        settings: with the name of the surgery.

    Example:
        >>> from hf_momentum.sharding import WholeGradients
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> gradients = WholeGradients(torch.optim.SGD([w], lr=0.1))
        >>> surgery = Combination(Settings(lam=(1.0,), surgery="pcgrad"))
        >>> for objective in surgery.sequence:
        ...     (w[0], w[1] - w[0])[objective].backward()
        ...     _ = surgery.after(objective, gradients)
        >>> w.grad
        tensor([0.5000, 1.5000])
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.auxiliaries = len(settings.lam)
        self.measured = Averaged()
        self._apart = settings.surgery != "mixed" or settings.intact
        self._taken: dict[int, list[GradientPiece]] = {}
        self._passes = Passes()

    @property
    def sequence(self) -> list[int]:
        """The order in which the objectives' backward passes are to be made; 0 is the main one."""
        return list(range(self.auxiliaries, -1, -1))

    def weight(self, objective: int) -> float:
        """What an objective's loss is multiplied by."""
        return 1.0 if objective == 0 else self.settings.lam[objective - 1]

    @torch.no_grad()
    def after(self, objective: int, gradients: ReducedGradients) -> bool:
        """Work an objective's gradient in, which has just been added to the buffers and reduced.

        Returns:
            Whether it is finite; only the last objective's answer covers all of them.
        """
        if objective:
            if self._apart:
                self._taken[objective] = gradients.take(lambda holder: False)
            else:
                gradients.keep()
            return True
        taken, self._taken = self._taken, {}
        held = {id(piece.holder) for those in taken.values() for piece in those}
        pieces = gradients.pieces(lambda holder: id(holder) in held)
        parts = [[piece.grad for piece in pieces]]
        parts += [aligned(pieces, taken[k]) for k in sorted(taken)]
        gram = self._gram(gradients, pieces, parts)
        finite = bool(torch.isfinite(gram).all())
        weights = RULES[self.settings.surgery](gram) if finite else torch.ones_like(gram[0])
        _combine_(parts, weights)
        gradients.settle()
        if finite:
            self._measure(gram)
        return finite

    def give(self, objective: int, pieces: list[GradientPiece]) -> None:
        """Hand in an auxiliary gradient that no backward pass made, times its weight; before `after(0, ...)`."""
        self._taken[objective] = pieces

    def _gram(self, gradients: ReducedGradients, pieces: list[GradientPiece], parts: list[list[Tensor]]) -> Tensor:
        pairs = [(i, j) for i in range(len(parts)) for j in range(i + 1)]
        columns = [self._passes.sums(parts[i], parts[j])[:, :1] for i, j in pairs]
        sums = iter(total(gradients.layout, pieces, torch.cat(columns, 1)).unbind())
        return gram_matrix([[next(sums) for _ in range(i + 1)] for i in range(len(parts))])

    def _measure(self, gram: Tensor) -> None:
        for k in range(1, len(gram)):
            lengths = (gram[0, 0] * gram[k, k]).sqrt()
            cosine = torch.where(lengths > 0, gram[0, k] / lengths, torch.zeros_like(lengths))
            self.measured.add("aux_main_cosine" + ("" if self.auxiliaries == 1 else f"_{k}"), cosine)

    def noise(self) -> dict[str, float]:
        """Nothing: no average is kept."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a step depends on its own batch alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue from."""


def _combine_(parts: list[list[Tensor]], weights: Tensor) -> None:
    """The first list becomes the weighted sum of all, tensor by tensor, formed in at least float32."""
    for tensors in zip(*parts, strict=True):
        first = tensors[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        own = weights.to(first.device, dtype)
        first.copy_(sum(w * tensor.to(dtype) for w, tensor in zip(own, tensors, strict=True)))
