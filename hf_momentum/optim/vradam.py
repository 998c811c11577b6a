"""Velocity-regularised steps: VRAdam and VRMomentum (arXiv 2505.13196).

The learning rate is divided by one plus the squared norm of the momentum, so that a fast optimizer brakes. The gate,
lr_t / lr, is all there is to the method: with `beta3=0` it is 1, and VRAdam is AdamW.

Reading order: the gate, the updates on lists of tensors, what joins the gate over the scope, the two classes.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_momentum.kernels import squared_norms
from hf_momentum.optim.adam import adam_denominators
from hf_momentum.optim.arguments import StateDtype, check_betas, check_bool, check_choice, check_real
from hf_momentum.optim.base import MomentumOptimizer
from hf_momentum.optim.step import Bucket, Step, mean_of

NormScope = Literal["global", "group", "tensor"]
NormOf = Literal["momentum", "update"]


# ---- the formula --------------------------------------------------------------------------------------------


def gate(squared_norm: Tensor, beta3: float, alpha1: float) -> Tensor:
    """lr_t / lr = 1 / (1 + min(beta3 |m|^2, alpha1)), in [1 / (1 + alpha1), 1]; NaN stays NaN.

    Example:
        >>> gate(torch.tensor([0.0, 1.0, 50.0]), beta3=1.0, alpha1=9.0)
        tensor([1.0000, 0.5000, 0.1000])
    """
    if beta3 == 0:
        return torch.ones_like(squared_norm)  # 0 times a norm that overflowed would be NaN
    return 1 / (1 + (beta3 * squared_norm).clamp(max=alpha1))


# ---- the updates, in place on lists of tensors --------------------------------------------------------------


def average_(moments: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """m = beta m + (1 - beta) g.

    Example:
        >>> m = [torch.ones(2)]
        >>> average_(m, [torch.zeros(2)], 0.75)
        >>> m
        [tensor([0.7500, 0.7500])]
    """
    torch._foreach_mul_(moments, beta)
    torch._foreach_add_(moments, grads, alpha=1 - beta)


def average_squares_(moments: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """v = beta v + (1 - beta) g^2.

    Example:
        >>> v = [torch.ones(2)]
        >>> average_squares_(v, [torch.full((2,), 3.0)], 0.75)
        >>> v
        [tensor([3., 3.])]
    """
    torch._foreach_mul_(moments, beta)
    torch._foreach_addcmul_(moments, grads, grads, value=1 - beta)


def step_directions(
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    correction1: Tensor | list[Tensor],
    root2: Tensor | list[Tensor],
    *,
    eps: float,
) -> list[Tensor]:
    """u = (m / c1) / (sqrt(v) / r2 + eps), as new tensors; `correction1` is 1 - b1^t and `root2` sqrt(1 - b2^t).

    Example:
        >>> step_directions([torch.tensor([0.5])], [torch.tensor([0.25])], *torch.tensor([0.5, 0.5]), eps=0.0)
        [tensor([1.])]
    """
    directions = list(torch._foreach_div(first_moments, adam_denominators(second_moments, root2, eps)))
    torch._foreach_div_(directions, correction1)
    return directions


def vr_update_(
    params: list[Tensor], directions: list[Tensor], rate: Tensor | list[Tensor], shrink: Tensor | list[Tensor] | None
) -> None:
    """w = (1 - lr_t wd) w - lr_t u; `rate` is lr_t and `shrink` is 1 - lr_t wd, one for all or one per tensor.

    Example:
        >>> w = [torch.ones(2)]
        >>> vr_update_(w, [torch.ones(2)], torch.tensor(0.25), torch.tensor(0.5))
        >>> w
        [tensor([0.2500, 0.2500])]
    """
    # lr_t lives on the device, so it multiplies as a tensor: `alpha=` would have to know its value.
    if shrink is not None:
        torch._foreach_mul_(params, shrink)
    torch._foreach_sub_(params, torch._foreach_mul(directions, rate))


def vradam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    correction1: Tensor | list[Tensor],
    root2: Tensor | list[Tensor],
    rate: Tensor | list[Tensor],
    shrink: Tensor | list[Tensor] | None,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Advance both moments, and step by a rate that was known before.

    Example:
        >>> w, m, v = [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> vradam_step_(w, [torch.ones(1)], m, v, *torch.tensor([0.5, 0.5]), torch.tensor(0.25), None,
        ...              betas=(0.5, 0.75), eps=0.0)
        >>> w
        [tensor([0.7500])]
    """
    average_(first_moments, grads, betas[0])
    average_squares_(second_moments, grads, betas[1])
    vr_update_(params, step_directions(first_moments, second_moments, correction1, root2, eps=eps), rate, shrink)


def squared_norm_of_average(sums: Tensor, beta: float, factor: Tensor | float) -> Tensor:
    """|beta m + (1 - beta) f g|^2 from `<m, g>, <m, m>, <g, g>`, so that m need not be formed to know its norm.

    Args:
        sums: `[..., 3]` float64.
        beta: of the average.
        factor: f, what clipping multiplies g by.

    Example:
        >>> squared_norm_of_average(torch.tensor([2.0, 1.0, 4.0]), 0.5, 1.0)
        tensor(2.2500)
    """
    mg, mm, gg = sums.unbind(-1)
    rest = (1 - beta) * factor
    return beta**2 * mm + 2 * beta * rest * mg + rest**2 * gg


def advance_moments_(
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    correction1: Tensor | list[Tensor],
    root2: Tensor | list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Advance both moments; `[pieces, 2]`: |m|^2, and |u|^2 of the step that they lead to.

    Example:
        >>> m, v = [torch.zeros(1)], [torch.zeros(1)]
        >>> advance_moments_([torch.tensor([4.0])], m, v, *torch.tensor([0.5, 0.5]), betas=(0.5, 0.75), eps=0.0)
        tensor([[4., 1.]], dtype=torch.float64)
    """
    average_(first_moments, grads, betas[0])
    average_squares_(second_moments, grads, betas[1])
    directions = step_directions(first_moments, second_moments, correction1, root2, eps=eps)
    return torch.stack([squared_norms(first_moments), squared_norms(directions)], 1)


def advance_momentum_(grads: list[Tensor], momenta: list[Tensor], *, momentum: float) -> Tensor:
    """Advance the momentum; `[pieces, 1]`: |m|^2.

    Example:
        >>> advance_momentum_([torch.tensor([4.0])], [torch.zeros(1)], momentum=0.5)
        tensor([[4.]], dtype=torch.float64)
    """
    average_(momenta, grads, momentum)
    return squared_norms(momenta)[:, None]


def vradam_update_(
    params: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    correction1: Tensor | list[Tensor],
    root2: Tensor | list[Tensor],
    rate: Tensor | list[Tensor],
    shrink: Tensor | list[Tensor] | None,
    *,
    eps: float,
) -> None:
    """`vr_update_` along the directions of `step_directions`.

    Example:
        >>> w = [torch.ones(1)]
        >>> vradam_update_(w, [torch.tensor([2.0])], [torch.tensor([4.0])], *torch.tensor([0.5, 0.5]),
        ...                torch.tensor(0.25), None, eps=0.0)
        >>> w
        [tensor([0.7500])]
    """
    vr_update_(params, step_directions(first_moments, second_moments, correction1, root2, eps=eps), rate, shrink)


# ---- what the classes share: one gate over everything, one per group, or one per tensor ----------------------


def pooled(tables: list[Tensor], scope: NormScope) -> list[Tensor]:
    """Squared norms over the scope of each group, from those of its tensors: 0-dim, or one per tensor."""
    if scope == "tensor":
        return tables
    if scope == "group":
        return [table.sum() for table in tables]
    return [torch.cat(tables).sum()] * len(tables)


def advance_gates(step: Step, momenta: list[Tensor], gated: list[Tensor]) -> list[Tensor]:
    """lr_t / lr for each group, 0-dim or one per tensor; kept with |m| as `lr_ratio` and `momentum_norm`.

    Args:
        step: the step.
        momenta: for each group the squared norms of its tensors' first moments.
        gated: the squared norms that the gate takes: these, or those of the updates.
    """
    scope = step.groups[0]["norm_scope"]
    norms = [square.sqrt() for square in pooled(momenta, scope)]
    squares = pooled(gated, scope)
    ratios = [gate(x, group["beta3"], group["alpha1"]) for group, x in zip(step.groups, squares, strict=True)]
    for vectors, ratio, norm in zip(step.vectors, ratios, norms, strict=True):
        if scope == "tensor":  # a parameter that never had a gradient has m = 0, so its gate is 1
            vectors.put("lr_ratio", ratio, initial=1.0)
            vectors.put("momentum_norm", norm)
        elif scope == "global" or vectors.active:  # the one gate is also that of groups without a gradient
            vectors.group["lr_ratio"], vectors.group["momentum_norm"] = ratio, norm
    return ratios


def _corrections(bucket: Bucket) -> tuple[Tensor, Tensor]:
    beta1, beta2 = bucket.group["betas"]
    return bucket.vectors.correction(beta1), bucket.vectors.root_of_correction(beta2)


def gated_rate(group: Mapping[str, Any], ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """lr_t and 1 - lr_t wd, the second None without weight decay.

    Example:
        >>> gated_rate({"lr": 0.5, "weight_decay": 0.0}, torch.tensor(0.5))
        (tensor(0.2500), None)
    """
    rate = group["lr"] * ratio
    return rate, 1 - rate * group["weight_decay"] if group["weight_decay"] else None


def gate_dynamics(groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`lr_ratio`, `momentum_norm` and `effective_lr` (lr_t) after the last step; means where there are several."""
    stepped = [group for group in groups if "lr_ratio" in group]
    if not stepped:
        return {}
    return {
        "lr_ratio": mean_of([group["lr_ratio"] for group in stepped]),
        "momentum_norm": mean_of([group["momentum_norm"] for group in stepped]),
        "effective_lr": mean_of([group["lr"] * group["lr_ratio"] for group in stepped]),
    }


def check_gate(optimizer: MomentumOptimizer, group: Mapping[str, Any], shared: tuple[str, ...]) -> None:
    """Validate what both classes have; the arguments named in `shared` enter the one gate of the global scope."""
    owner = type(optimizer).__name__
    check_real(owner, "lr", group["lr"], 0)
    check_real(owner, "beta3", group["beta3"], 0, hint="about 1 / |m|^2; 0 switches the gate off")
    check_real(owner, "alpha1", group["alpha1"], 0)
    check_real(owner, "weight_decay", group["weight_decay"], 0)
    check_choice(owner, "norm_scope", group["norm_scope"], ("global", "group", "tensor"))
    check_bool(owner, "maximize", group["maximize"])
    for other in optimizer.param_groups:
        if other["norm_scope"] != group["norm_scope"]:
            raise ValueError(f"{owner}: norm_scope must be the same in all groups, got {group['norm_scope']!r}")
        for name in shared if group["norm_scope"] == "global" else ():
            if other[name] != group[name]:
                raise ValueError(
                    f"{owner}: with norm_scope='global' one gate serves the whole model, so {name} must be the same "
                    f"in all groups; got {group[name]!r} beside {other[name]!r}"
                )


# ---- the optimizers -----------------------------------------------------------------------------------------


class VRAdam(MomentumOptimizer):
    r"""Velocity-regularised Adam: AdamW whose learning rate shrinks as the momentum grows.

    The recurrence, for step t from 1, with m = 0 and v = 0 at the start:

        m    = b1 m + (1 - b1) g
        v    = b2 v + (1 - b2) g^2
        lr_t = lr / (1 + min(beta3 |m|^2, alpha1))     the m just updated, before bias correction
        u    = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        w    = (1 - lr_t wd) w - lr_t u

    |m| is one norm over everything that has a gradient in this step (`norm_scope="global"`), over each group or over
    each tensor. Its sum is formed in float64; lr_t stays on the device and within [lr / (1 + alpha1), lr].

    Learning rate: `lr` is an ordinary key of the group, so any scheduler works. With a stationary gate,
    `lr = lr_AdamW / lr_ratio`.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        betas: b1 and b2, each in [0, 1). Default (0.9, 0.999).
        eps: added to sqrt(v), >= 0. Default 1e-8.
        beta3: the strength of the gate, >= 0. Default 1. About 1 / |m|^2 makes it act; 0 is AdamW. The same in all
            groups if global.
        alpha1: the largest braking, >= 0. Default 10, as in the authors' current code (19 in their earlier code). The
            same in all groups if global.
        weight_decay: wd, >= 0, decoupled. Default 0.01, as in `torch.optim.AdamW` (our choice).
        norm_scope: `"global"` (default): one gate, however the parameters are split into groups; `"group"` or
            `"tensor"`: one for each. The same in all groups.
        norm_of: whose norm the gate takes: `"momentum"` (default, the paper's m) or `"update"` (ours: u, which does
            not change when the loss is scaled). |u|^2 grows with the number of parameters, so `beta3` must then be
            about one over that number. The same in all groups if global.
        maximize: ascend instead of descend. Default False.
        fused: None (default) uses kernels that make one pass over memory where they can be had, which the log says at
            the first step; True insists on them; False never uses them.
        max_grad_norm: clip the norm of all gradients together to this inside the step, which costs less than clipping
            before it; > 0, the same in all groups. None (default) does not clip. `grad_norm` has the norm.
        state_dtype: how momenta and second moments of 4096 elements and more are stored: `"float32"` (default),
            `"bfloat16"` or `"int8"` (eight bits and a scale per 128 elements), rounded stochastically. Computed in
            float32.
        stochastic_rounding: round bfloat16 weights up or down at random so that small updates count on average.
            Default False, to nearest.

    State: `exp_avg` and `exp_avg_sq` per parameter (float32 for half-precision weights); in the groups `steps` per
    parameter, and `lr_ratio` (lr_t / lr) and `momentum_norm` (|m|, whatever `norm_of`) of the last step: 0-dim, or one
    entry per parameter for `norm_scope="tensor"`.

    Cost: two buffers of the size of the weights, as Adam; one more read of the first moment per step. With
    `norm_of="update"`, u is formed twice.

    Caveats: the gate is not scale-invariant. Scaling the loss or clipping gradients changes it: clipped at norm 1 and
    with `beta3=1` it stays above 1/2. Parameters without a gradient take no part in the step, nor in the norm.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: VRAdam, arXiv 2505.13196.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = VRAdam([w], lr=0.1, beta3=4.0)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (0.5 * (w * w).sum()).backward()
        ...     optimizer.step()
        >>> w.detach()
        tensor([ 0.8131, -1.8110])
        >>> {name: round(value.item(), 3) for name, value in optimizer.dynamics().items()}
        {'lr_ratio': 0.429, 'momentum_norm': 0.576, 'effective_lr': 0.043}
    """

    PER_TENSOR = ("lr_ratio", "momentum_norm")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        beta3: float = 1.0,
        alpha1: float = 10.0,
        weight_decay: float = 1e-2,
        norm_scope: NormScope = "global",
        norm_of: NormOf = "momentum",
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "beta3": beta3,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "norm_scope": norm_scope,
            "norm_of": norm_of,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_betas("VRAdam", group["betas"])
        check_real("VRAdam", "eps", group["eps"], 0)
        check_choice("VRAdam", "norm_of", group["norm_of"], ("momentum", "update"))
        check_gate(self, group, shared=("beta3", "alpha1", "norm_of"))

    def _update(self, step: Step) -> None:
        step.count()
        if any(group["norm_of"] == "update" for group in step.groups):
            self._update_by_norm_of_update(step)
            return
        # |m| follows from sums that are formed before m is, which moves fewer bytes than to read m again.
        unclipped = step.clip.factor
        moments = [bucket.buffers("exp_avg") for bucket in step.buckets]
        rows = [bucket.alignment_sums(m) for m, bucket in zip(moments, step.buckets, strict=True)]
        tables = step.totals(rows, width=3)
        step.clip_by(tables, 2)
        factor = step.clip.factor / unclipped  # what the sums have not seen
        squares = [
            squared_norm_of_average(table, group["betas"][0], factor)
            for table, group in zip(tables, step.groups, strict=True)
        ]
        ratios = advance_gates(step, squares, squares)
        for bucket, m in zip(step.buckets, moments, strict=True):
            rate, shrink = gated_rate(bucket.group, ratios[bucket.index])
            v, betas, eps = bucket.buffers("exp_avg_sq", positive=True), bucket.group["betas"], bucket.group["eps"]
            bucket.apply(vradam_step_, m, v, *_corrections(bucket), rate, shrink, betas=betas, eps=eps)

    @staticmethod
    def _update_by_norm_of_update(step: Step) -> None:
        step.clip_gradients()
        rows = []
        for bucket in step.buckets:
            state = bucket.buffers("exp_avg"), bucket.buffers("exp_avg_sq", positive=True)
            betas, eps = bucket.group["betas"], bucket.group["eps"]
            rows.append(bucket.advance(advance_moments_, *state, *_corrections(bucket), betas=betas, eps=eps))
        tables = step.totals(rows, width=2)
        taken = [int(group["norm_of"] == "update") for group in step.groups]
        gated = [table[:, column] for table, column in zip(tables, taken, strict=True)]
        ratios = advance_gates(step, [table[:, 0] for table in tables], gated)
        for bucket in step.buckets:
            # u is formed anew for one bucket at a time: that of the whole model would be a third buffer.
            state = bucket.buffers("exp_avg"), bucket.buffers("exp_avg_sq", positive=True)
            rate, shrink = gated_rate(bucket.group, ratios[bucket.index])
            arguments = (*state, *_corrections(bucket), rate, shrink)
            bucket.apply(vradam_update_, *arguments, gradients=False, eps=bucket.group["eps"])

    def dynamics(self) -> dict[str, Tensor]:
        """`lr_ratio` (lr_t / lr), `momentum_norm` (|m|) and `effective_lr` (lr_t) after the last step."""
        return gate_dynamics(self.param_groups)


class VRMomentum(MomentumOptimizer):
    r"""Velocity-regularised momentum: VRAdam's gate without its preconditioner, the form of the paper's theory.

        m    = b m + (1 - b) g
        lr_t = lr / (1 + min(beta3 |m|^2, alpha1))     the m just updated
        w    = (1 - lr_t wd) w - lr_t m

    Learning rate: m is an average, so `lr = lr_SGD / (1 - b)` of `torch.optim.SGD` with momentum b, ten times it for
    b = 0.9, and that over `lr_ratio`.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        momentum: b, in [0, 1). Default 0.9.
        beta3: the strength of the gate, >= 0. Default 1; 0 switches it off. The same in all groups if global.
        alpha1: the largest braking, >= 0. Default 10. The same in all groups if global.
        weight_decay: wd, >= 0, decoupled. Default 0.
        norm_scope: `"global"` (default), `"group"` or `"tensor"`. The same in all groups.
        maximize: ascend instead of descend. Default False.
        fused: None (default) uses kernels that make one pass over memory where they can be had, which the log says at
            the first step; True insists on them; False never uses them.
        max_grad_norm: clip the norm of all gradients together to this inside the step, which costs less than clipping
            before it; > 0, the same in all groups. None (default) does not clip. `grad_norm` has the norm.
        state_dtype: how momenta and second moments of 4096 elements and more are stored: `"float32"` (default),
            `"bfloat16"` or `"int8"` (eight bits and a scale per 128 elements), rounded stochastically. Computed in
            float32.
        stochastic_rounding: round bfloat16 weights up or down at random so that small updates count on average.
            Default False, to nearest.

    State: `momentum_buffer` per parameter (float32 for half-precision weights); `lr_ratio` and `momentum_norm` in the
    groups, as `VRAdam`.

    Cost: one buffer of the size of the weights; one more read of it per step.

    Caveats and errors: as `VRAdam`.

    Source: VRAdam, arXiv 2505.13196.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = VRMomentum([w], lr=1.0, momentum=0.8)
        >>> (0.5 * (w * w).sum()).backward()
        >>> optimizer.step()
        >>> w.detach(), optimizer.dynamics()["lr_ratio"]
        (tensor([ 2.7000, -3.6000]), tensor(0.5000, dtype=torch.float64))
    """

    PER_TENSOR = ("lr_ratio", "momentum_norm")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        beta3: float = 1.0,
        alpha1: float = 10.0,
        weight_decay: float = 0.0,
        norm_scope: NormScope = "global",
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta3": beta3,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "norm_scope": norm_scope,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_real("VRMomentum", "momentum", group["momentum"], 0, 1, high_open=True)
        check_gate(self, group, shared=("beta3", "alpha1"))

    def _update(self, step: Step) -> None:
        step.clip_gradients()
        step.count()
        rows = []
        for bucket in step.buckets:
            m = bucket.buffers("momentum_buffer")
            rows.append(bucket.advance(advance_momentum_, m, momentum=bucket.group["momentum"]))
        squares = [table[:, 0] for table in step.totals(rows, width=1)]
        ratios = advance_gates(step, squares, squares)
        for bucket in step.buckets:
            rate, shrink = gated_rate(bucket.group, ratios[bucket.index])
            bucket.apply(vr_update_, bucket.buffers("momentum_buffer"), rate, shrink, gradients=False)

    def dynamics(self) -> dict[str, Tensor]:
        """`lr_ratio` (lr_t / lr), `momentum_norm` (|m|) and `effective_lr` (lr_t) after the last step."""
        return gate_dynamics(self.param_groups)
