"""Adaptive heavy-ball momentum from quadratic optimization: AHBSGD, AHBAdam and AHBAdamW (arXiv 2110.09057).

On a quadratic of curvature L the best heavy-ball momentum is (1 - sqrt(lr L))^2. The method takes for L, in every step,
the curvature that two successive gradients see, and has no momentum parameter left.

Reading order: the formula, the update, what the classes share, the three classes.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_momentum.optim.adam import adam_step
from hf_momentum.optim.arguments import StateDtype, check_bool, check_choice, check_real
from hf_momentum.optim.base import MomentumOptimizer
from hf_momentum.optim.curvature import curvatures, observe
from hf_momentum.optim.step import Step, mean_of

Granularity = Literal["global", "tensor"]
Difference = Literal["plain", "preconditioned"]
GradDtype = Literal["float32", "bfloat16"]


# ---- the formula and the update -------------------------------------------------------------------------------------


def heavy_ball_beta(curvature: Tensor, lr: float, delta: float, cap_root: bool) -> Tensor:
    """beta = clip((1 - sqrt(lr l))^2, 0, 1 - delta), and 0 where l is not known (NaN): a plain gradient step.

    With `cap_root` the root is at most 1, so that a curvature above 1 / lr gives no momentum instead of more.

    Example:
        >>> heavy_ball_beta(torch.tensor([4.0, 0.0, 900.0, torch.nan]), 0.01, 1e-3, cap_root=False)
        tensor([0.6400, 0.9990, 0.9990, 0.0000])
        >>> heavy_ball_beta(torch.tensor([900.0]), 0.01, 1e-3, cap_root=True)
        tensor([0.])
    """
    root = (lr * curvature).sqrt()
    if cap_root:
        root = root.clamp(max=1.0)
    beta = (1 - root).square().clamp(0, 1 - delta)
    return torch.where(curvature.isnan(), torch.zeros_like(beta), beta)


def ahb_sgd_update_(
    params: list[Tensor],
    grads: list[Tensor],
    displacements: list[Tensor],
    beta: Tensor | list[Tensor],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of heavy ball on tensors of one dtype and device; `displacements` hold w_k - w_{k-1} without decay.

    Example:
        >>> w, g, dw = [torch.ones(1)], [torch.ones(1)], [torch.tensor([0.2])]
        >>> ahb_sgd_update_(w, g, dw, torch.tensor(0.5), lr=0.1, weight_decay=0.0)
        >>> w[0], dw[0]
        (tensor([1.]), tensor([0.]))
    """
    # dw = beta dw - lr g
    torch._foreach_mul_(displacements, beta)
    torch._foreach_add_(displacements, grads, alpha=-lr)
    # w = (1 - lr wd) w + dw
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, displacements)


@runtime_checkable
class ObservesGradients(Protocol):
    """An optimizer that wants to see the gradients of a step before they are clipped."""

    def observe_gradients(self) -> None:
        """Take the gradient differences of the coming step now."""


# ---- what the classes share -----------------------------------------------------------------------------------------


def _betas(step: Step) -> list[Tensor]:
    """This step's beta for each group, from the observed differences; stored as `beta` in the groups for logs."""
    betas = []
    for vectors, curvature in zip(step.vectors, curvatures(step, step.groups[0]["granularity"]), strict=True):
        group = vectors.group
        beta = heavy_ball_beta(curvature, group["lr"], group["delta"], group["cap_root"])
        if beta.dim() == 0:
            group["beta"] = beta
        else:
            beta = vectors.put("beta", beta)
        betas.append(beta)
    return betas


def _observe(step: Step) -> None:
    """Take the differences of the gradients as they are now, unless `observe_gradients` did so before the clipping."""
    groups = step.groups
    if not groups[0].get("observed", False):
        half = groups[0]["previous_grad_dtype"] == "bfloat16"
        observe(step, _displacement, half=half, unclipped=True)
    for group in groups:
        group["observed"] = False


def _displacement(group: Mapping[str, Any]) -> str:
    return "exp_avg" if "beta2" in group else "displacement"


def _observe_now(optimizer: MomentumOptimizer) -> None:
    with torch.no_grad():
        collected = optimizer._collect(observing=True)
        for group in optimizer.param_groups:
            group["observed"] = False
        if collected is not None:
            _observe(collected[0])
            for group in optimizer.param_groups:
                group["observed"] = True


def _dynamics(groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    stepped = [group for group in groups if "beta" in group]
    if not stepped:
        return {}
    # In the Adam forms m is an average, whose gain is 1; the heavy ball's is 1 / (1 - beta).
    gains = [torch.ones_like(g["beta"]) if "beta2" in g else 1 / (1 - g["beta"]) for g in stepped]
    return {
        "curvature": mean_of([group["curvature"] for group in stepped]),
        "beta": mean_of([group["beta"] for group in stepped]),
        "effective_lr": mean_of([gain * group["lr"] for gain, group in zip(gains, stepped, strict=True)]),
    }


def _check_ahb(optimizer: MomentumOptimizer, group: Mapping[str, Any]) -> None:
    owner = type(optimizer).__name__
    check_real(owner, "lr", group["lr"], 0)
    check_real(owner, "delta", group["delta"], 0, 1, low_open=True)
    check_bool(owner, "cap_root", group["cap_root"])
    check_real(owner, "weight_decay", group["weight_decay"], 0)
    check_bool(owner, "decoupled_weight_decay", group["decoupled_weight_decay"])
    check_choice(owner, "granularity", group["granularity"], ("global", "tensor"))
    check_choice(owner, "previous_grad_dtype", group["previous_grad_dtype"], ("float32", "bfloat16"))
    check_bool(owner, "maximize", group["maximize"])
    for other in optimizer.param_groups:
        for name in ("granularity", "previous_grad_dtype", "difference"):
            if other.get(name) != group.get(name):
                raise ValueError(f"{owner}: {name} must be the same in all groups, got {group.get(name)!r}")


# ---- the optimizers -------------------------------------------------------------------------------------------------


class AHBSGD(MomentumOptimizer):
    r"""Heavy ball whose momentum follows from the curvature that successive gradients see.

    The recurrence, with w_0 given and a plain gradient step first:

        l    = |g_k - g_{k-1}| / |w_k - w_{k-1}|          norms over everything, or per tensor
        beta = clip((1 - sqrt(lr l))^2, 0, 1 - delta)
        w_{k+1} = w_k - lr g_k + beta (w_k - w_{k-1})

    Decoupled weight decay multiplies w by 1 - lr wd and is not part of the displacement. Under gradient
    accumulation g is the accumulated gradient.

    Clipping: l is meant for gradients as they were computed. A caller that clips calls `observe_gradients()` after the
    backward pass and before clipping; `MomentumTrainer` does. Without that call, differences are taken of the
    gradients that `step` finds.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        delta: beta is at most 1 - delta; in (0, 1], and 1 is plain SGD. Default 1e-3 (ours: a co-author's code has
            1e-4, others 1e-2 and 1e-3; the paper's value is unknown).
        cap_root: hold sqrt(lr l) at most 1. Default False, the paper's rule: its rising branch is what lets it converge
            for lr l between 1 and 4. With minibatch noise, an over-estimate of l then gives large momentum; True stops
            that.
        weight_decay: wd, >= 0. Default 0.
        decoupled_weight_decay: True (default), or False to add wd w to the gradient.
        granularity: one curvature for the model (`"global"`, default, the paper's) or one per parameter (`"tensor"`).
        previous_grad_dtype: `"float32"` (default; float64 weights keep float64) or `"bfloat16"`, which halves that
            buffer.
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

    State: `displacement` and `previous_grad` per parameter; in the groups `curvature`, `beta`, and one number per
    parameter for the squared norms of the last difference and displacement.

    Cost: two buffers of the size of the weights, where SGD with momentum has one.

    Caveats: with minibatch noise |g_k - g_{k-1}| measures the noise. Pure noise settles near beta = 0.036 whatever lr
    is, so "robust to large lr" comes with an effective learning rate about a tenth of SGD's at momentum 0.9.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: arXiv 2110.09057. The first step is ours.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AHBSGD([w], lr=0.25)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (0.5 * (w * w).sum()).backward()
        ...     optimizer.step()
        >>> {name: round(value.item(), 4) for name, value in optimizer.dynamics().items()}
        {'curvature': 1.0, 'beta': 0.25, 'effective_lr': 0.3333}
    """

    PER_TENSOR = ("curvature", "beta")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        delta: float = 1e-3,
        cap_root: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        granularity: Granularity = "global",
        previous_grad_dtype: GradDtype = "float32",
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "delta": delta,
            "cap_root": cap_root,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "granularity": granularity,
            "previous_grad_dtype": previous_grad_dtype,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        _check_ahb(self, group)

    def observe_gradients(self) -> None:
        """Take the gradient differences of the coming step now; to be called before gradients are clipped."""
        _observe_now(self)

    def _update(self, step: Step) -> None:
        _observe(step)
        step.clip_gradients()
        betas = _betas(step)
        step.count()
        for bucket in step.buckets:
            bucket.apply(
                ahb_sgd_update_,
                bucket.buffers("displacement"),
                betas[bucket.index],
                lr=bucket.group["lr"],
                weight_decay=bucket.decoupled_decay(),
            )
        for vectors in step.vectors:
            vectors.put("displacement_scale", torch.ones_like(vectors.get("displacement_scale")))

    def dynamics(self) -> dict[str, Tensor]:
        """`curvature` (l), `beta` and `effective_lr` of the last step; means for `granularity="tensor"`."""
        return _dynamics(self.param_groups)


class AHBAdam(MomentumOptimizer):
    r"""Adam whose first beta is AHB's, in every step.

        l    = |g_k - g_{k-1}| / |w_k - w_{k-1}|
        beta = clip((1 - sqrt(lr l))^2, 0, 1 - delta), and 0 before there is a displacement
        m = beta m + (1 - beta) g
        v = b2 v + (1 - b2) g^2
        w = (1 - lr wd) w - lr (m / (1 - prod beta)) / (sqrt(v / (1 - b2^t)) + eps)

    The paper's exact Adam form is unknown; this one, with beta in the place of Adam's beta1, is that of public code.
    The bias correction is by the product of the betas, which vary. The displacement is without the decoupled decay.

    With `difference="preconditioned"` (ours), l is |(g_k - g_{k-1}) / D| / |w_k - w_{k-1}| with
    D = sqrt(v / (1 - b2^t)) + eps of the last step, the same by which that step's displacement was divided. A loss
    multiplied by a constant then changes nothing (up to eps); the plain difference is not invariant, because g scales
    with the loss and Adam's displacement does not.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        beta2: b2, in [0, 1). Default 0.999.
        eps: added to sqrt(v), >= 0. Default 1e-8.
        delta: beta is at most 1 - delta, as for `AHBSGD`. Default 1e-3.
        cap_root: as for `AHBSGD`. Default False.
        granularity: `"global"` (default) or `"tensor"`, as for `AHBSGD`.
        previous_grad_dtype: `"float32"` (default) or `"bfloat16"`, as for `AHBSGD`.
        difference: `"plain"` (default, the paper's l) or `"preconditioned"`.
        weight_decay: wd, >= 0. Default 0.
        decoupled_weight_decay: True (default), or False to add wd w to the gradient.
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

    State: `exp_avg`, `exp_avg_sq` and `previous_grad` per parameter; in the groups `curvature`, `beta` and a
    few numbers per parameter.

    Clipping, cost, caveats and errors: as `AHBSGD`, with one buffer more than Adam.

    Source: arXiv 2110.09057 for beta; the Adam form is public code's, the preconditioned difference ours.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AHBAdam([w], lr=0.1, difference="preconditioned")
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (0.5 * (w * w).sum()).backward()
        ...     optimizer.step()
        >>> bool(w < 0.8)
        True
    """

    PER_TENSOR = ("curvature", "beta")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        delta: float = 1e-3,
        cap_root: bool = False,
        difference: Difference = "plain",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        granularity: Granularity = "global",
        previous_grad_dtype: GradDtype = "float32",
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "eps": eps,
            "delta": delta,
            "cap_root": cap_root,
            "difference": difference,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "granularity": granularity,
            "previous_grad_dtype": previous_grad_dtype,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        _check_ahb_adam(self, group)

    def observe_gradients(self) -> None:
        """Take the gradient differences of the coming step now; to be called before gradients are clipped."""
        _observe_now(self)

    def _update(self, step: Step) -> None:
        _ahb_adam_step(step)

    def dynamics(self) -> dict[str, Tensor]:
        """`curvature` (l), `beta` and `effective_lr` of the last step; means for `granularity="tensor"`."""
        return _dynamics(self.param_groups)


class AHBAdamW(MomentumOptimizer):
    r"""AHBAdam with decoupled weight decay, on by default as in AdamW.

        w = (1 - lr wd) w                 first; the decay enters neither g, l, m nor v
        then AHBAdam

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        beta2: b2, in [0, 1). Default 0.999.
        eps: added to sqrt(v), >= 0. Default 1e-8.
        delta: beta is at most 1 - delta, as for `AHBSGD`. Default 1e-3.
        cap_root: as for `AHBSGD`. Default False.
        granularity: `"global"` (default) or `"tensor"`, as for `AHBSGD`.
        previous_grad_dtype: `"float32"` (default) or `"bfloat16"`, as for `AHBSGD`.
        difference: `"plain"` (default, the paper's l) or `"preconditioned"`; see `AHBAdam`.
        weight_decay: wd, >= 0. Default 1e-2, as in `torch.optim.AdamW`.
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

    State, clipping, cost, caveats and errors: as `AHBAdam`.

    Source: arXiv 2110.09057 for beta; the rest is public code's and ours.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AHBAdamW([w], lr=0.1)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([0.8990])
    """

    PER_TENSOR = ("curvature", "beta")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        delta: float = 1e-3,
        cap_root: bool = False,
        difference: Difference = "plain",
        weight_decay: float = 1e-2,
        granularity: Granularity = "global",
        previous_grad_dtype: GradDtype = "float32",
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "eps": eps,
            "delta": delta,
            "cap_root": cap_root,
            "difference": difference,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "granularity": granularity,
            "previous_grad_dtype": previous_grad_dtype,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        if group["decoupled_weight_decay"] is not True:
            raise ValueError("AHBAdamW: its weight decay is decoupled; for the coupled form use AHBAdam")
        _check_ahb_adam(self, group)

    def observe_gradients(self) -> None:
        """Take the gradient differences of the coming step now; to be called before gradients are clipped."""
        _observe_now(self)

    def _update(self, step: Step) -> None:
        _ahb_adam_step(step)

    def dynamics(self) -> dict[str, Tensor]:
        """`curvature` (l), `beta` and `effective_lr` of the last step; means for `granularity="tensor"`."""
        return _dynamics(self.param_groups)


def _check_ahb_adam(optimizer: MomentumOptimizer, group: Mapping[str, Any]) -> None:
    owner = type(optimizer).__name__
    check_real(owner, "beta2", group["beta2"], 0, 1, high_open=True)
    check_real(owner, "eps", group["eps"], 0)
    check_choice(owner, "difference", group["difference"], ("plain", "preconditioned"))
    _check_ahb(optimizer, group)


def _ahb_adam_step(step: Step) -> None:
    _observe(step)
    step.clip_gradients()
    adam_step(step, _betas(step))
