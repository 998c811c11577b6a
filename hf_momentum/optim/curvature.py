"""The curvature that successive gradients see: l = |g_k - g_{k-1}| / |w_k - w_{k-1}|, over everything or per tensor.

Each piece keeps its previous gradient. The norm of the last displacement is formed anew from the state that produced
it, together with the norm of the difference, so that one sum over processes serves both. Parameters without a gradient
in a step take no part in that step's l.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_momentum.kernels import squared_norms
from hf_momentum.optim.adam import adam_denominators
from hf_momentum.optim.step import Bucket, Step


def observe(
    step: Step, displacement: Callable[[Mapping[str, Any]], str], *, half: bool = False, unclipped: bool = False
) -> None:
    """Take in this step's gradients: `squared_difference` and `squared_displacement` of each tensor, in the groups.

    A group's vector `displacement_scale` holds the factors that the buffers leave out; 0 means that there has been no
    displacement yet. Tensors that are seen for the first time have no difference.

    Args:
        step: the step, with gradients that nobody has clipped yet if possible.
        displacement: for a group the name of the buffer that holds the last displacement up to a factor per tensor;
            with `"exp_avg"` it is that divided by Adam's denominators, by which `difference="preconditioned"` divides
            the differences too.
        half: keep the previous gradient in bfloat16 instead of the bucket's compute dtype.
        unclipped: undo a wrapper's clipping, where one clips before the optimizer is called.
    """
    factor = step.clipping() if unclipped else 1.0
    rows = [_squared_changes(bucket, displacement(bucket.group), half, factor) for bucket in step.buckets]
    tables = step.totals(rows, width=3)
    if not isinstance(factor, Tensor):  # else a wrapper has clipped, and these are norms from before
        step.clip_by(tables, 2)
    for vectors, table in zip(step.vectors, tables, strict=True):
        new = vectors.get("steps") == 0
        vectors.put("squared_difference", torch.where(new, torch.zeros_like(table[:, 0]), table[:, 0]))
        scale = vectors.get("displacement_scale")
        squared = torch.where(scale == 0, torch.zeros_like(scale), table[:, 1] * scale.square())
        vectors.put("squared_displacement", squared)


def _squared_changes(bucket: Bucket, displacement: str, half: bool, factor: Tensor | float) -> Tensor:
    group, adam = bucket.group, displacement == "exp_avg"
    kept = bucket.dtype if displacement == "direction" else None
    previous = torch.bfloat16 if half else bucket.dtype
    return bucket.advance(
        squared_changes_,
        bucket.buffers("previous_grad", previous),
        bucket.buffers(displacement, kept),
        bucket.buffers("exp_avg_sq", positive=True) if adam else None,
        bucket.vectors.root_of_correction(group["beta2"]) if adam else None,
        decayed=False,
        factor=factor,
        written=False,
        eps=group["eps"] if adam else 0.0,
        preconditioned=group.get("difference") == "preconditioned",
    )


def squared_changes_(
    grads: list[Tensor],
    previous: list[Tensor],
    displacements: list[Tensor],
    second_moments: list[Tensor] | None,
    root2: Tensor | list[Tensor] | None,
    *,
    eps: float,
    preconditioned: bool,
) -> Tensor:
    """|g - g_prev|^2, the last displacement's squared norm and |g|^2 of each piece, `[pieces, 3]`; g is kept.

    Args:
        grads, previous: this step's gradients and the last step's, which are overwritten.
        displacements: the last displacements up to a factor per tensor.
        second_moments, root2: Adam's v and sqrt(1 - beta2^t), by whose denominators the displacements are still to be
            divided; or None.
        eps: Adam's.
        preconditioned: divide the differences by the same denominators.

    Example:
        >>> old = [torch.tensor([1.0])]
        >>> squared_changes_([torch.tensor([3.0])], old, [torch.tensor([0.5])], None, None, eps=0.0,
        ...                  preconditioned=False), old
        (tensor([[4.0000, 0.2500, 9.0000]], dtype=torch.float64), [tensor([3.])])
    """
    differences = torch._foreach_sub(grads, [old.to(grad.dtype) for old, grad in zip(previous, grads, strict=True)])
    if second_moments is not None and root2 is not None:
        denominators = adam_denominators(second_moments, root2, eps)
        displacements = list(torch._foreach_div(displacements, denominators))
        if preconditioned:
            torch._foreach_div_(differences, denominators)
    for old, grad in zip(previous, grads, strict=True):
        old.copy_(grad)
    return torch.stack([squared_norms(differences), squared_norms(displacements), squared_norms(grads)], 1)


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
