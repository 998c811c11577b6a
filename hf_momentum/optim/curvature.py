"""The curvature that successive gradients see: l = |g_k - g_{k-1}| / |w_k - w_{k-1}|, over everything or per tensor.

Each piece keeps its previous gradient. The norm of the last displacement is formed anew from the state that produced
it, together with the norm of the difference, so that one sum over processes serves both. Parameters without a gradient
in a step take no part in that step's l.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_momentum.kernels import squared_norms
from hf_momentum.optim.base import Bucket, Step

Displacements = Callable[[Bucket], tuple[list[Tensor], list[Tensor] | None]]
"""For a bucket: the last displacements up to a factor per tensor, and what divides a difference (None: nothing)."""


def observe(step: Step, displacements: Displacements, *, half: bool = False, unclipped: bool = False) -> None:
    """Take in this step's gradients: `squared_difference` and `squared_displacement` of each tensor, in the groups.

    A group's vector `displacement_scale` holds the factors that `displacements` leaves out; 0 means that there has been
    no displacement yet. Tensors that are seen for the first time have no difference.

    Args:
        step: the step, with gradients that nobody has clipped yet if possible.
        displacements: see `Displacements`.
        half: keep the previous gradient in bfloat16 instead of the bucket's compute dtype.
        unclipped: undo a wrapper's clipping, where one clips before the optimizer is called.
    """
    factor = step.clipping() if unclipped else 1.0
    rows = []
    for bucket in step.buckets:
        directions, denominators = displacements(bucket)
        rows.append(
            torch.stack([_squared_differences(bucket, denominators, half, factor), squared_norms(directions)], 1)
        )
    for vectors, table in zip(step.vectors, step.totals(rows, width=2), strict=True):
        vectors.put("squared_difference", table[:, 0])
        scale = vectors.get("displacement_scale")
        squared = torch.where(scale == 0, torch.zeros_like(scale), table[:, 1] * scale.square())
        vectors.put("squared_displacement", squared)


def _squared_differences(
    bucket: Bucket, denominators: list[Tensor] | None, half: bool, factor: Tensor | float
) -> Tensor:
    """|g - g_prev|^2 of each piece, and g kept for the next step."""
    grads = bucket.gradients()
    if isinstance(factor, Tensor):
        grads = list(torch._foreach_mul(grads, factor.to(grads[0])))
    new = ["previous_grad" not in state for state in bucket.states]
    previous = bucket.buffers("previous_grad", torch.bfloat16 if half else None)
    differences = torch._foreach_sub(grads, [old.to(grad.dtype) for old, grad in zip(previous, grads, strict=True)])
    if denominators is not None:
        torch._foreach_div_(differences, denominators)
    for difference, first in zip(differences, new, strict=True):
        if first:
            difference.zero_()  # seen for the first time: no difference, whatever its denominator
    for old, grad in zip(previous, grads, strict=True):
        old.copy_(grad)
    return squared_norms(differences)


def curvatures(step: Step, granularity: str, name: str = "curvature") -> list[Tensor]:
    """l for each group: 0-dim and the same for all if global, else one entry per tensor. NaN before any displacement.

    Also stored as `name` in the groups, for logs.
    """
    if granularity == "tensor":
        return [v.put(name, ratio(v.get("squared_difference"), v.get("squared_displacement"))) for v in step.vectors]
    value = ratio(step.sum_over("squared_difference"), step.sum_over("squared_displacement"))
    for group in step.groups:
        group[name] = value
    return [value] * len(step.groups)


def ratio(squared_difference: Tensor, squared_displacement: Tensor) -> Tensor:
    """sqrt(a) / sqrt(b), and NaN where b is 0: without a displacement there is no curvature.

    Example:
        >>> ratio(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([2., nan])
    """
    unknown = torch.full_like(squared_difference, torch.nan)
    return torch.where(squared_displacement == 0, unknown, squared_difference.sqrt() / squared_displacement.sqrt())
