"""The curvature that successive gradients see: l = |g_k - g_{k-1}| / |w_k - w_{k-1}|, over everything or per tensor.

Each parameter keeps its previous gradient; of its displacement only the squared norm is kept, in the group's vector
`squared_displacement`. Parameters without a gradient in a step take no part in that step's l.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_momentum.kernels import squared_norms
from hf_momentum.optim.base import Bucket, put, take

Preconditioner = Callable[[Bucket], list[Tensor] | None]


def observe_differences(buckets: list[Bucket], preconditioner: Preconditioner, *, half: bool = False) -> None:
    """Store |g - g_prev|^2 of each tensor in `squared_difference`, and keep g for the next step.

    Args:
        buckets: the parameters that have a gradient.
        preconditioner: gives a bucket's denominators, by which the difference is divided, or None.
        half: keep the previous gradient in bfloat16 instead of the bucket's compute dtype.
    """
    for bucket in buckets:
        seen = [state.get("previous_grad") for state in bucket.states]
        grads = bucket.gradients()
        previous = [grad if old is None else old.to(grad.dtype) for grad, old in zip(grads, seen, strict=True)]
        differences = torch._foreach_sub(grads, previous)
        denominators = preconditioner(bucket)
        if denominators is not None:
            torch._foreach_div_(differences, denominators)
        for difference, old in zip(differences, seen, strict=True):
            if old is None:
                difference.zero_()  # seen for the first time: no difference, whatever its denominator
        stored = put(bucket.vector("squared_difference"), bucket.positions, squared_norms(differences))
        bucket.group["squared_difference"] = stored
        for state, grad, old in zip(bucket.states, grads, seen, strict=True):
            if old is None:
                dtype = torch.bfloat16 if half else bucket.dtype
                state["previous_grad"] = grad.to(dtype, copy=True, memory_format=torch.preserve_format)
            else:
                old.copy_(grad)


def store_displacement(bucket: Bucket, squared: Tensor) -> None:
    """Keep the squared norms of this step's displacements, one per tensor of the bucket."""
    vector = bucket.vector("squared_displacement")
    bucket.group["squared_displacement"] = put(vector, bucket.positions, squared)


def curvatures(
    groups: list[dict[str, Any]], buckets: list[Bucket], granularity: str, name: str = "curvature"
) -> list[Tensor]:
    """l for each bucket: 0-dim and the same for all if global, else one entry per tensor. NaN before any displacement.

    Also stored as `name` in the groups, for logs.
    """
    pairs = []
    for bucket in buckets:
        both = (bucket.vector("squared_difference"), bucket.vector("squared_displacement"))
        pairs.append([take(vector, bucket.positions) for vector in both])
    if granularity == "tensor":
        values = [ratio(difference, displacement) for difference, displacement in pairs]
        for bucket, value in zip(buckets, values, strict=True):
            bucket.group[name] = put(bucket.vector(name), bucket.positions, value)
        return values
    device = buckets[0].device
    difference, displacement = (torch.stack([each[i].sum().to(device) for each in pairs]).sum() for i in (0, 1))
    value = ratio(difference, displacement)
    for group in groups:
        group[name] = value
    return [value] * len(buckets)


def ratio(squared_difference: Tensor, squared_displacement: Tensor) -> Tensor:
    """sqrt(a) / sqrt(b), and NaN where b is 0: without a displacement there is no curvature.

    Example:
        >>> ratio(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([2., nan])
    """
    unknown = torch.full_like(squared_difference, torch.nan)
    return torch.where(squared_displacement == 0, unknown, squared_difference.sqrt() / squared_displacement.sqrt())
