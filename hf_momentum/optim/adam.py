"""Adam's moments with a first beta that is a tensor on the device; what the Adam forms of the methods share."""

import torch
from torch import Tensor

from hf_momentum.optim.step import Step


def adam_directions(
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    beta1: Tensor | list[Tensor],
    correction1: Tensor | list[Tensor],
    root2: Tensor | list[Tensor],
    *,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Advance both moments in place and return (m / c1) / (sqrt(v) / r2 + eps).

    Args:
        grads, first_moments, second_moments: tensors of one dtype and device.
        beta1: this step's b1, one for all or one per tensor, like the other two.
        correction1: c1, one minus the product of all b1 so far.
        root2: r2 = sqrt(1 - beta2^t).

    Example:
        >>> m, v = [torch.zeros(1)], [torch.zeros(1)]
        >>> adam_directions([torch.ones(1)], m, v, torch.tensor(0.9), *torch.tensor([0.1, 0.1]), beta2=0.99, eps=0.0)
        [tensor([1.0000])]
    """
    # m = b1 m + (1 - b1) g; as m + (1 - b1)(g - m) it would lose the small m that a b1 near 0 leaves
    rest = [1 - beta for beta in beta1] if isinstance(beta1, list) else 1 - beta1
    torch._foreach_mul_(first_moments, beta1)
    torch._foreach_add_(first_moments, torch._foreach_mul(grads, rest))
    # v = b2 v + (1 - b2) g^2
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, grads, grads, value=1 - beta2)
    directions = torch._foreach_div(first_moments, adam_denominators(second_moments, root2, eps))
    torch._foreach_div_(directions, correction1)
    return list(directions)


def adam_denominators(second_moments: list[Tensor], root2: Tensor | list[Tensor], eps: float) -> list[Tensor]:
    """sqrt(v) / r2 + eps, as new tensors; `root2` is sqrt(1 - beta2^t), one for all or one per tensor.

    Example:
        >>> adam_denominators([torch.tensor([0.04])], torch.tensor(0.1), eps=0.5)
        [tensor([2.5000])]
    """
    denominators = list(torch._foreach_sqrt(second_moments))
    torch._foreach_div_(denominators, root2)
    torch._foreach_add_(denominators, eps)
    return denominators


def adam_update_(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    beta1: Tensor | list[Tensor],
    correction1: Tensor | list[Tensor],
    root2: Tensor | list[Tensor],
    *,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """w = (1 - lr wd) w - lr u, with the directions u of `adam_directions`; in place.

    Example:
        >>> w, m, v = [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> adam_update_(w, [torch.ones(1)], m, v, torch.tensor(0.9), *torch.tensor([0.1, 0.1]), lr=0.5, beta2=0.99,
        ...              eps=0.0, weight_decay=0.0)
        >>> w
        [tensor([0.5000])]
    """
    directions = adam_directions(grads, first_moments, second_moments, beta1, correction1, root2, beta2=beta2, eps=eps)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)


def adam_step(step: Step, betas: list[Tensor]) -> None:
    """Update every bucket with this step's b1 of each group, and keep what the next step's displacement is scaled by.

    Args:
        step: the step; its groups have lr, beta2, eps and weight_decay.
        betas: b1 of each group, 0-dim or one per tensor.
    """
    step.count()
    corrections = [vectors.advance_correction(beta) for vectors, beta in zip(step.vectors, betas, strict=True)]
    for bucket in step.buckets:
        group = bucket.group
        bucket.apply(
            adam_update_,
            bucket.buffers("exp_avg"),
            bucket.buffers("exp_avg_sq", positive=True),
            betas[bucket.index],
            corrections[bucket.index],
            bucket.vectors.root_of_correction(group["beta2"]),
            lr=group["lr"],
            beta2=group["beta2"],
            eps=group["eps"],
            weight_decay=bucket.decoupled_decay(),
        )
    for vectors, correction in zip(step.vectors, corrections, strict=True):
        if "squared_displacement" not in vectors.group:
            continue  # nobody measures
        vectors.put("displacement_scale", vectors.group["lr"] / correction)
