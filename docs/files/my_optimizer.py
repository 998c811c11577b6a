"""Signum: SGD by the sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434). A file to copy.

m = beta m + (1 - beta) g
w = (1 - lr wd) w - lr sign(m)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_momentum import OptimizerSpec, register
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.optim.arguments import check_bool, check_real
from hf_momentum.optim.step import Step

# ---- the mathematics: a pure function on lists of tensors, which knows nothing of groups, processes or devices -------


def signum_update_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    beta: float,
    weight_decay: float,
) -> None:
    """One step in place.

    Example:
        >>> w, m = [torch.tensor([1.0, 1.0])], [torch.zeros(2)]
        >>> signum_update_(w, [torch.tensor([3.0, -0.1])], m, lr=0.1, beta=0.9, weight_decay=0.0)
        >>> w[0], m[0]
        (tensor([0.9000, 1.1000]), tensor([ 0.3000, -0.0100]))
    """
    torch._foreach_lerp_(momenta, grads, 1 - beta)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, torch._foreach_sign(momenta), alpha=-lr)


# ---- the optimizer: it collects and calls ----------------------------------------------------------------------------


class Signum(MomentumOptimizer):
    """Signum.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-4: every weight moves by lr in every step, as in Adam.
        momentum: beta, in [0, 1). Default 0.9.
        weight_decay: wd, >= 0, decoupled. Default 0.
        maximize: ascend instead of descend. Default False.

    State: `momentum_buffer` per parameter.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Signum([w], lr=0.1)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "fused": False,  # there is no kernel for this rule; the function above is run
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        """Called for every group, so that a wrong value stops before training does."""
        check_real("Signum", "lr", group["lr"], 0)
        check_real("Signum", "momentum", group["momentum"], 0, 1, high_open=True, hint="0.9 is usual")
        check_real("Signum", "weight_decay", group["weight_decay"], 0)
        check_bool("Signum", "maximize", group["maximize"])

    def _update(self, step: Step) -> None:
        """One step on whatever pieces of the model this process holds."""
        step.clip_gradients()  # for max_grad_norm, which MomentumTrainer sets
        step.count()
        for bucket in step.buckets:
            bucket.apply(
                signum_update_,
                bucket.buffers("momentum_buffer"),
                lr=bucket.group["lr"],
                beta=bucket.group["momentum"],
                weight_decay=bucket.decoupled_decay(),
            )


# ---- the name --------------------------------------------------------------------------------------------------------

register(
    OptimizerSpec(
        name="signum",
        cls=Signum,
        summary="SGD by the sign of the momentum.",
        source="arXiv 1802.04434",
        adam_arguments=False,
    )
)
