"""Adam's moments with a first beta that is a tensor on the device; what the Adam forms of the methods share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_momentum.optim.base import Bucket


def adam_directions(
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: Sequence[float],
    beta1: Tensor | list[Tensor],
    correction1: Tensor | list[Tensor],
    *,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Advance both moments in place and return (m / c1) / (sqrt(v / c2) + eps), with c2 = 1 - beta2^t.

    Args:
        grads, first_moments, second_moments: tensors of one dtype and device.
        steps: each tensor's steps from 1.
        beta1: this step's b1, one for all or one per tensor.
        correction1: c1, one minus the product of all b1 so far, one for all or one per tensor.

    Example:
        >>> m, v = [torch.zeros(1)], [torch.zeros(1)]
        >>> adam_directions([torch.ones(1)], m, v, [1.0], torch.tensor(0.9), torch.tensor(0.1), beta2=0.99, eps=0.0)
        [tensor([1.0000])]
    """
    # m = b1 m + (1 - b1) g; as m + (1 - b1)(g - m) it would lose the small m that a b1 near 0 leaves
    rest = [1 - beta for beta in beta1] if isinstance(beta1, list) else 1 - beta1
    torch._foreach_mul_(first_moments, beta1)
    torch._foreach_add_(first_moments, torch._foreach_mul(grads, rest))
    # v = b2 v + (1 - b2) g^2
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, grads, grads, value=1 - beta2)
    directions = torch._foreach_div(first_moments, adam_denominators(second_moments, steps, beta2=beta2, eps=eps))
    torch._foreach_div_(directions, correction1)
    return list(directions)


def adam_denominators(
    second_moments: list[Tensor], steps: Sequence[float], *, beta2: float, eps: float
) -> list[Tensor]:
    """sqrt(v / (1 - beta2^t)) + eps, as new tensors.

    Example:
        >>> adam_denominators([torch.tensor([0.04])], [1.0], beta2=0.99, eps=0.5)
        [tensor([2.5000])]
    """
    denominators = list(torch._foreach_sqrt(second_moments))
    torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, eps)
    return denominators


def last_adam_directions(bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
    """m / D and D = sqrt(v / (1 - beta2^t)) + eps as the last step left them, for a bucket with Adam's state.

    The last displacement is lr / c1 times the first.
    """
    group = bucket.group
    steps = [max(step, 1.0) for step in bucket.steps()]  # before the first step both moments are 0
    denominators = adam_denominators(bucket.buffers("exp_avg_sq"), steps, beta2=group["beta2"], eps=group["eps"])
    return list(torch._foreach_div(bucket.buffers("exp_avg"), denominators)), denominators
