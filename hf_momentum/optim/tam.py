"""Torque-aware momentum: TAM, AdaTAM and AdaTAMW (arXiv 2412.18790).

A new gradient that points away from the momentum is damped before it enters: the damping factor `d` is a
smoothed function of the angle between the two. With `d` fixed these are heavy ball and Adam, so the angle is
all there is to the method, and `fixed_damping` is the control that switches it off.

Reading order: the four formulas, the two updates on lists of tensors, the three classes that call them.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_momentum.kernels import State
from hf_momentum.optim.arguments import StateDtype, check_betas, check_bool, check_choice, check_real
from hf_momentum.optim.base import MomentumOptimizer
from hf_momentum.optim.step import GroupVectors, Step, keep, mean_of

Granularity = Literal["global", "tensor"]


# ---- the formulas -------------------------------------------------------------------------------------------


def cosine(sums: Tensor) -> Tensor:
    """S = <m, g> / (|m| |g|), and 0 where either norm is 0; NaN stays NaN.

    Args:
        sums: `[..., 3]`, the sums `<m, g>, <m, m>, <g, g>`.

    Example:
        >>> cosine(torch.tensor([[6.0, 4.0, 9.0], [-6.0, 4.0, 9.0], [0.0, 0.0, 9.0]]))
        tensor([ 1., -1.,  0.])
    """
    mg, mm, gg = sums.unbind(-1)
    norms = mm.sqrt() * gg.sqrt()
    return torch.where(norms == 0, torch.zeros_like(mg), mg / norms).clamp(-1, 1)


def smoothed(s: Tensor, cos: Tensor, gamma: float) -> Tensor:
    """s = gamma s + (1 - gamma) S, without bias correction.

    Example:
        >>> smoothed(torch.tensor(0.0), torch.tensor(1.0), gamma=0.75)
        tensor(0.2500)
    """
    return gamma * s + (1 - gamma) * cos


def damping(s: Tensor) -> Tensor:
    """d = (1 + s) / 2: 1 for a gradient along the momentum, 1/2 across it, 0 against it.

    Example:
        >>> damping(torch.tensor([1.0, 0.0, -1.0]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return (1 + s) / 2


def locks_in(beta: float, gamma: float) -> bool:
    """Whether a reversed gradient would be followed only as fast as eps allows: gamma < beta / (2 - beta).

    Example:
        >>> locks_in(0.9, 0.9), locks_in(0.9, 0.8)
        (False, True)
    """
    return gamma < beta / (2 - beta)


# ---- the updates, in place on lists of tensors --------------------------------------------------------------


def tam_update_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    scale: Tensor | list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One TAM step on tensors of one dtype and device; `scale` is eps + d, one for all or one per tensor.

    Example:
        >>> w, g, m = [torch.ones(2)], [torch.ones(2)], [torch.zeros(2)]
        >>> tam_update_(w, g, m, torch.tensor(0.5), lr=0.1, momentum=0.9, weight_decay=0.0)
        >>> w[0], m[0]
        (tensor([0.9500, 0.9500]), tensor([0.5000, 0.5000]))
    """
    # m = beta m + (eps + d) g
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, torch._foreach_mul(grads, scale))
    # w = (1 - lr wd) w - lr m
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, momenta, alpha=-lr)


def adatam_update_(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    scale: Tensor | list[Tensor],
    correction1: Tensor | list[Tensor] | None,
    root2: Tensor | list[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    ema: bool,
    weight_decay: float,
) -> None:
    """One AdaTAM step on tensors of one dtype and device.

    `scale` is torque_eps + d, one for all or one per tensor; for bias correction `correction1` is 1 - b1^t and `root2`
    sqrt(1 - b2^t), both None without it.

    Example:
        >>> w, g, m, v = [torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> adatam_update_(w, g, m, v, torch.tensor(0.5), None, None, lr=0.1, betas=(0.9, 0.99), eps=0.0, ema=False,
        ...                weight_decay=0.0)
        >>> w[0], m[0], v[0]
        (tensor([0.5000]), tensor([0.5000]), tensor([0.0100]))
    """
    beta1, beta2 = betas
    # m = b1 m + (torque_eps + d) g, or with `ema` b1 m + (1 - b1)(torque_eps + d) g
    torch._foreach_mul_(first_moments, beta1)
    torch._foreach_add_(first_moments, torch._foreach_mul(grads, scale), alpha=1 - beta1 if ema else 1)
    # v = b2 v + (1 - b2) g^2, of the undamped gradient
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, grads, grads, value=1 - beta2)
    # w = (1 - lr wd) w - lr m / (sqrt(v) + eps)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    denominators = torch._foreach_sqrt(second_moments)
    if root2 is not None:
        torch._foreach_div_(denominators, root2)
    torch._foreach_add_(denominators, eps)
    if correction1 is not None:
        torch._foreach_mul_(denominators, correction1)
    torch._foreach_addcdiv_(params, first_moments, denominators, value=-lr)


# ---- what the classes share: S, s and d of one step ---------------------------------------------------------


def damped_scales(step: Step, momenta: list[State], eps: str) -> list[Tensor]:
    """Advance `cosine` (S) and `smoothed_cosine` (s) in the groups; return eps + d for each bucket's group.

    With `granularity="global"` one S over everything is shared by all groups; with `"tensor"` each group holds a
    vector with one entry per tensor. `eps` names the hyperparameter to add. Gradients are clipped on the way, if at
    all: a cosine does not change with their length, unless coupled weight decay is part of them.
    """
    if any(group["weight_decay"] and not group.get("decoupled_weight_decay", True) for group in step.groups):
        step.clip_gradients()
    sums = [bucket.alignment_sums(m) for m, bucket in zip(momenta, step.buckets, strict=True)]
    tables = step.totals(sums, width=3)
    step.clip_by(tables, 2)
    for vectors, table in zip(step.vectors, tables, strict=True):
        vectors.put("tensor_cosine", cosine(table))  # for logs: which tensors agree with their momentum
    if step.groups[0]["granularity"] == "global":
        smoothings = _advance_global(step.groups, torch.cat(tables).sum(0))
    else:
        smoothings = [_advance_tensors(vectors) for vectors in step.vectors]
    scales = []
    for bucket in step.buckets:
        s, fixed = smoothings[bucket.index], bucket.group["fixed_damping"]
        d = damping(s) if fixed is None else torch.full_like(s, fixed)
        scales.append(bucket.group[eps] + d)
    return scales


def _advance_global(groups: list[dict[str, Any]], sums: Tensor) -> list[Tensor]:
    cos = cosine(sums)
    # A group added in mid-training joins the model's s; a loaded state may lie on another device.
    stored = [group["smoothed_cosine"].to(cos.device) for group in groups if "smoothed_cosine" in group]
    s = smoothed(stored[0] if stored else torch.zeros_like(cos), cos, groups[0]["gamma"])
    for group in groups:
        group["cosine"] = cos
        keep(group, "smoothed_cosine", s)
    return [s] * len(groups)


def _advance_tensors(vectors: GroupVectors) -> Tensor:
    group = vectors.group
    group["cosine"] = group["tensor_cosine"]
    s = smoothed(vectors.get("smoothed_cosine"), group["cosine"], group["gamma"])
    return vectors.put("smoothed_cosine", s)


def torque_dynamics(groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`cosine` (S), `damping` (d) and `effective_lr` after the last step; means for `granularity="tensor"`.

    The effective learning rate is that of plain gradient descent with the same stationary step, lr d / (1 - beta);
    for AdaTAM that of Adam, where `ema` has the 1 - beta already.
    """
    stepped = [group for group in groups if "cosine" in group]
    if not stepped:
        return {}
    d = [_damping_of(group) for group in stepped]
    gains = [
        1.0 if group.get("ema") else 1 / (1 - group.get("momentum", group.get("betas", (0,))[0])) for group in stepped
    ]
    rates = [di * (group["lr"] * gain) for di, group, gain in zip(d, stepped, gains, strict=True)]
    cosines = [group["cosine"] for group in stepped]
    return {"cosine": mean_of(cosines), "damping": mean_of(d), "effective_lr": mean_of(rates)}


def _damping_of(group: dict[str, Any]) -> Tensor:
    fixed = group["fixed_damping"]
    return damping(group["smoothed_cosine"]) if fixed is None else torch.full_like(group["cosine"], fixed)


def _check_torque(optimizer: MomentumOptimizer, group: Mapping[str, Any], beta: float) -> None:
    owner = type(optimizer).__name__
    check_real(owner, "lr", group["lr"], 0)
    check_real(owner, "gamma", group["gamma"], 0, 1, high_open=True, hint="public code uses 0.9")
    check_real(owner, "eps", group["eps"], 0)
    check_real(owner, "weight_decay", group["weight_decay"], 0)
    check_choice(owner, "granularity", group["granularity"], ("global", "tensor"))
    check_bool(owner, "maximize", group["maximize"])
    if group["fixed_damping"] is not None:
        check_real(owner, "fixed_damping", group["fixed_damping"], 0, 1, hint="None lets the angle decide")
    elif locks_in(beta, group["gamma"]):
        warnings.warn(
            f"{owner}: gamma={group['gamma']} is below beta / (2 - beta) = {beta / (2 - beta):.3f}: after the gradient "
            "reverses, the momentum can stay locked to its old direction. Raise gamma or lower the momentum.",
            stacklevel=5,
        )
    for other in optimizer.param_groups:
        if other["granularity"] != group["granularity"]:
            raise ValueError(f"{owner}: granularity must be the same in all groups, got {group['granularity']!r}")
        if group["granularity"] == "global" and other["gamma"] != group["gamma"]:
            raise ValueError(
                f"{owner}: with granularity='global' one s serves the whole model, so gamma must be the same in all "
                f"groups; got {group['gamma']} beside {other['gamma']}"
            )


# ---- the optimizers -----------------------------------------------------------------------------------------


class TAM(MomentumOptimizer):
    r"""Torque-aware momentum: heavy ball whose new gradients are damped by their angle to the momentum.

    The recurrence, for step t from 1, with m = 0 and s = 0 at the start:

        S = <m, g> / (|m| |g|)            m from before this step; S = 0 where either norm is 0, so S_1 = 0
        s = gamma s + (1 - gamma) S       no bias correction
        d = (1 + s) / 2                   in [0, 1]
        m = beta m + (eps + d) g          no (1 - beta)
        w = (1 - lr wd) w - lr m

    Inner products run over everything that has a gradient in this step (`granularity="global"`, one s for the
    model) or over each tensor (`"tensor"`). They are formed in float64 and stay on the device.

    Learning rate: with a stationary d, `lr = lr_SGDM / d`. A gradient uncorrelated with the momentum has d = 1/2,
    so about twice SGD-with-momentum's learning rate.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3, as in `torch.optim.SGD`.
        momentum: the paper's beta, in [0, 1). Default 0.9.
        gamma: smoothing of the cosine, in [0, 1). Default 0.9; the same in all groups if global.
        eps: the gradient's least share, >= 0. Default 1e-8.
        weight_decay: wd, >= 0. Default 0 (the paper's value is unknown).
        decoupled_weight_decay: True (default) shrinks the weights by lr wd; False adds wd w to the gradient
            before the cosine is taken. Which of the two the paper used is unknown.
        granularity: `"global"` (default; the paper writes whole vectors) or `"tensor"`.
        fixed_damping: a constant in [0, 1] in place of d; None (default) is the method. 0.5 is the control for any
            comparison: if TAM does not beat it, its angle did nothing. 1 is SGD with momentum.
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

    State: `momentum_buffer` per parameter (float32 for half-precision weights); `cosine` (S) and `smoothed_cosine`
    (s) in the groups: 0-dim if global, else one entry per parameter.

    Cost: one buffer of the size of the weights; two reads of momentum and gradient per step, one update.

    Caveats: parameters without a gradient take no part in the step, nor in the cosine. A pair
    `gamma < beta / (2 - beta)` can lock the momentum to an old direction and warns.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Torque-Aware Momentum, arXiv 2412.18790. gamma = 0.9 and eps = 1e-8 are those of public code; the
    paper says only that gamma is fixed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = TAM([w], lr=0.1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (0.5 * (w * w).sum()).backward()
        ...     optimizer.step()
        >>> w.detach()
        tensor([ 0.7145, -1.4290])
        >>> {name: round(value.item(), 3) for name, value in optimizer.dynamics().items()}
        {'cosine': 1.0, 'damping': 0.595, 'effective_lr': 0.595}
    """

    PER_TENSOR = ("tensor_cosine", "smoothed_cosine")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        gamma: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        granularity: Granularity = "global",
        fixed_damping: float | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "granularity": granularity,
            "fixed_damping": fixed_damping,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_real("TAM", "momentum", group["momentum"], 0, 1, high_open=True)
        check_bool("TAM", "decoupled_weight_decay", group["decoupled_weight_decay"])
        _check_torque(self, group, group["momentum"])

    def _update(self, step: Step) -> None:
        step.count()
        momenta = [bucket.buffers("momentum_buffer") for bucket in step.buckets]
        scales = damped_scales(step, momenta, "eps")
        for bucket, m, scale in zip(step.buckets, momenta, scales, strict=True):
            group, wd = bucket.group, bucket.decoupled_decay()
            bucket.apply(tam_update_, m, scale, lr=group["lr"], momentum=group["momentum"], weight_decay=wd)

    def dynamics(self) -> dict[str, Tensor]:
        """`cosine` (S), `damping` (d) and `effective_lr` after the last step."""
        return torque_dynamics(self.param_groups)


class AdaTAM(MomentumOptimizer):
    r"""AdaTAM: torque-aware momentum with Adam's second moment.

    S, s and d are TAM's, of the raw gradient and the raw first moment from before this step. Then

        m = b1 m + (torque_eps + d) g     not an average: no (1 - b1)
        v = b2 v + (1 - b2) g^2           the undamped gradient
        w = (1 - lr wd) w - lr m / (sqrt(v) + eps)      no bias correction of m or v

    Learning rate: the steps are far larger than Adam's at equal lr. For a constant gradient |step| / lr is 15.8 at
    the first step, 52.9 at most (t = 22), 10 in the limit. A stationary match is `lr = lr_Adam (1 - b1) / d`, about
    0.2 times Adam's. In the drop-in mode, `ema=True, bias_correction=True` (ours, not the paper's), Adam's learning
    rate carries over up to the factor 1 / d, about 2.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        betas: b1 and b2, each in [0, 1). Default (0.9, 0.999).
        eps: added to sqrt(v), >= 0. Default 1e-8.
        gamma: smoothing of the cosine, in [0, 1). Default 0.9; the same in all groups if global.
        torque_eps: the gradient's least share, >= 0. Default 1e-8.
        weight_decay: wd, >= 0. Default 0.
        decoupled_weight_decay: True (default) shrinks the weights by lr wd; False adds wd w to the gradient
            before the cosine is taken.
        ema: multiply the new gradient by 1 - b1. Default False, the paper's form.
        bias_correction: divide m by 1 - b1^t and v by 1 - b2^t. Default False, the paper's form.
        granularity: `"global"` (default) or `"tensor"`.
        fixed_damping: a constant in [0, 1] in place of d (the control); None (default) is the method. With 1,
            `ema` and `bias_correction` it is Adam.
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

    State: `exp_avg` and `exp_avg_sq` per parameter (float32 for half-precision weights); `steps` per parameter,
    `cosine` (S) and `smoothed_cosine` (s) in the groups.

    Cost: two buffers of the size of the weights, as Adam; one more read of first moment and gradient per step.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Torque-Aware Momentum, arXiv 2412.18790.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = AdaTAM([w], lr=1e-2)
        >>> (0.5 * (w * w).sum()).backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([ 0.8419, -1.8419])
    """

    PER_TENSOR = ("tensor_cosine", "smoothed_cosine")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma: float = 0.9,
        torque_eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        ema: bool = False,
        bias_correction: bool = False,
        granularity: Granularity = "global",
        fixed_damping: float | None = None,
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
            "gamma": gamma,
            "torque_eps": torque_eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "ema": ema,
            "bias_correction": bias_correction,
            "granularity": granularity,
            "fixed_damping": fixed_damping,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_bool("AdaTAM", "decoupled_weight_decay", group["decoupled_weight_decay"])
        check_adatam(self, group)

    def _update(self, step: Step) -> None:
        adatam_step(step)

    def dynamics(self) -> dict[str, Tensor]:
        """`cosine` (S), `damping` (d) and `effective_lr` after the last step."""
        return torque_dynamics(self.param_groups)


class AdaTAMW(MomentumOptimizer):
    r"""AdaTAMW: AdaTAM with decoupled weight decay, on by default as in AdamW.

        w = (1 - lr wd) w                 first; the decay enters neither g, S, m nor v
        then AdaTAM

    The decay goes with lr, and AdaTAM's lr is about a fifth of AdamW's, so at equal `weight_decay` the weights
    decay about five times less: compare at equal `lr * weight_decay`.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3; see `AdaTAM` on how it relates to Adam's.
        betas: b1 and b2, each in [0, 1). Default (0.9, 0.999).
        eps: added to sqrt(v), >= 0. Default 1e-8.
        gamma: smoothing of the cosine, in [0, 1). Default 0.9; the same in all groups if global.
        torque_eps: the gradient's least share, >= 0. Default 1e-8.
        weight_decay: wd, >= 0. Default 1e-2, as in `torch.optim.AdamW`.
        ema: multiply the new gradient by 1 - b1. Default False, the paper's form.
        bias_correction: divide m by 1 - b1^t and v by 1 - b2^t. Default False, the paper's form.
        granularity: `"global"` (default) or `"tensor"`.
        fixed_damping: a constant in [0, 1] in place of d (the control); None (default) is the method. With 1,
            `ema` and `bias_correction` it is AdamW.
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

    State, cost and errors: as `AdaTAM`.

    Source: Torque-Aware Momentum, arXiv 2412.18790.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = AdaTAMW([w], lr=1e-2, weight_decay=0.1)
        >>> (0.5 * (w * w).sum()).backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([ 0.8409, -1.8399])
    """

    PER_TENSOR = ("tensor_cosine", "smoothed_cosine")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma: float = 0.9,
        torque_eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ema: bool = False,
        bias_correction: bool = False,
        granularity: Granularity = "global",
        fixed_damping: float | None = None,
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
            "gamma": gamma,
            "torque_eps": torque_eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "ema": ema,
            "bias_correction": bias_correction,
            "granularity": granularity,
            "fixed_damping": fixed_damping,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        if group["decoupled_weight_decay"] is not True:
            raise ValueError("AdaTAMW: its weight decay is decoupled; for the coupled form use AdaTAM")
        check_adatam(self, group)

    def _update(self, step: Step) -> None:
        adatam_step(step)

    def dynamics(self) -> dict[str, Tensor]:
        """`cosine` (S), `damping` (d) and `effective_lr` after the last step."""
        return torque_dynamics(self.param_groups)


def check_adatam(optimizer: MomentumOptimizer, group: Mapping[str, Any]) -> None:
    """Validate the hyperparameters that AdaTAM and AdaTAMW share."""
    owner = type(optimizer).__name__
    check_betas(owner, group["betas"])
    check_real(owner, "torque_eps", group["torque_eps"], 0)
    check_bool(owner, "ema", group["ema"])
    check_bool(owner, "bias_correction", group["bias_correction"])
    _check_torque(optimizer, group, group["betas"][0])


def adatam_step(step: Step) -> None:
    """One step of AdaTAM or AdaTAMW."""
    step.count()
    moments = [bucket.buffers("exp_avg") for bucket in step.buckets]
    scales = damped_scales(step, moments, "torque_eps")
    for bucket, m, scale in zip(step.buckets, moments, scales, strict=True):
        group, vectors = bucket.group, bucket.vectors
        beta1, beta2 = group["betas"]
        bucket.apply(
            adatam_update_,
            m,
            bucket.buffers("exp_avg_sq", positive=True),
            scale,
            vectors.correction(beta1) if group["bias_correction"] else None,
            vectors.root_of_correction(beta2) if group["bias_correction"] else None,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            ema=group["ema"],
            weight_decay=bucket.decoupled_decay(),
        )
