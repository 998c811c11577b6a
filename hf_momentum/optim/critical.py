"""Critically damped momentum as optimizers: CriticalSGD and CriticalAdamW (arXiv 2603.28921).

The momentum follows the learning rate, mu = 1 - 2 sqrt(lr), so that a mode of unit curvature is critically damped at
every step of a schedule. `momentum_laws.py` has the laws and `MomentumSchedule`, which puts them on any other
optimizer; the two classes here need no schedule object, and measure a curvature without reading it back to the host.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_momentum.kernels import sum_dtype
from hf_momentum.optim.adam import adam_step
from hf_momentum.optim.arguments import StateDtype, check_bool, check_choice, check_real
from hf_momentum.optim.base import MomentumOptimizer
from hf_momentum.optim.curvature import curvatures, observe
from hf_momentum.optim.momentum_laws import CRITICAL, FORMULAS, HIGH, LOW
from hf_momentum.optim.step import Step, mean_of

SGDLaw = Literal["critical", "critical_exact", "critical_nesterov"]
AdamLaw = Literal["critical", "critical_exact"]


# ---- the momentum of a step -----------------------------------------------------------------------------------------


def critical_momentum(law: str, curvature: Tensor, lr: float, low: float, high: float) -> Tensor:
    """A critical law on the device; `low` where the curvature is not known yet (NaN).

    Example:
        >>> critical_momentum("critical", torch.tensor([1.0, torch.nan]), 0.01, 0.0, 0.99)
        tensor([0.8000, 0.0000])
    """
    mu = FORMULAS[law]((lr * curvature).sqrt()).clamp(low, high)
    return torch.where(curvature.isnan(), torch.full_like(mu, low), mu)


def _momenta(step: Step) -> list[Tensor]:
    """This step's mu for each group; `mu` and `damping_ratio` are kept in the groups for logs."""
    measured = step.groups[0]["curvature"] == "measured"
    if measured:
        observe(step, _displacement)
        found = curvatures(step, "global", name="measured_curvature")
    momenta = []
    for index, group in enumerate(step.groups):
        arguments = (group["lr"], group["low"], group["high"])
        if measured:
            curvature = found[index]
            mu = critical_momentum(group["law"], curvature, *arguments)
        else:
            lr, low, high = arguments
            # Filled on the device: a copy from the host would have to be waited for.
            curvature = torch.full((), group["curvature"], dtype=sum_dtype(step.device), device=step.device)
            mu = torch.full_like(curvature, CRITICAL[group["law"]](lr, group["curvature"], low, high))
        group["mu"] = mu
        group["damping_ratio"] = (1 - mu) / (2 * (group["lr"] * curvature).sqrt())
        momenta.append(mu)
    return momenta


def _dynamics(groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    stepped = [group for group in groups if "mu" in group]
    if not stepped:
        return {}
    names = ["mu", "damping_ratio"] + (["measured_curvature"] if "measured_curvature" in stepped[0] else [])
    # In AdamW m is an average, whose gain is 1; the heavy ball's is 1 / (1 - mu).
    gains = [torch.ones_like(g["mu"]) if "beta2" in g else 1 / (1 - g["mu"]) for g in stepped]
    rates = [gain * group["lr"] for gain, group in zip(gains, stepped, strict=True)]
    return {name: mean_of([group[name] for group in stepped]) for name in names} | {"effective_lr": mean_of(rates)}


def _check_critical(optimizer: MomentumOptimizer, group: Mapping[str, Any], laws: tuple[str, ...]) -> None:
    owner = type(optimizer).__name__
    check_real(owner, "lr", group["lr"], 0)
    check_choice(owner, "law", group["law"], laws)
    if group["curvature"] != "measured":
        check_real(owner, "curvature", group["curvature"], 0, hint='or "measured"')
    check_real(owner, "low", group["low"], 0, 1, high_open=True)
    check_real(owner, "high", group["high"], group["low"], 1, high_open=True)
    check_real(owner, "weight_decay", group["weight_decay"], 0)
    check_bool(owner, "decoupled_weight_decay", group["decoupled_weight_decay"])
    check_bool(owner, "maximize", group["maximize"])
    for other in optimizer.param_groups:
        if (other["curvature"] == "measured") != (group["curvature"] == "measured"):
            raise ValueError(f"{owner}: curvature must be measured in all groups or in none")


def critical_sgd_update_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    mu: Tensor | list[Tensor],
    kept: list[Tensor] | None,
    *,
    lr: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """One step of heavy ball, or with `nesterov` of Nesterov's form, on tensors of one dtype and device.

    `mu` is one for all or one per tensor; `kept`, if given, receives Nesterov's directions.

    Example:
        >>> w, m = [torch.ones(1)], [torch.ones(1)]
        >>> critical_sgd_update_(w, [torch.ones(1)], m, torch.tensor(0.5), None, lr=0.1, weight_decay=0.0,
        ...                      nesterov=False)
        >>> w[0], m[0]
        (tensor([0.8500]), tensor([1.5000]))
    """
    # m = mu m + g
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, grads)
    directions = momenta
    if nesterov:
        directions = list(torch._foreach_add(grads, torch._foreach_mul(momenta, mu)))
        if kept is not None:
            torch._foreach_copy_(kept, directions)
    # w = (1 - lr wd) w - lr u
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)


# ---- the optimizers -------------------------------------------------------------------------------------------------


class CriticalSGD(MomentumOptimizer):
    r"""SGD whose momentum follows the learning rate.

    The recurrence, in every step with the group's current lr:

        mu = 1 - 2 sqrt(lr L)                                 law="critical", the paper's with L = 1
        mu = (1 - sqrt(lr L))^2                               law="critical_exact"
        mu = (1 - sqrt(lr L)) / (1 + sqrt(lr L))              law="critical_nesterov"
        mu = clip(mu, low, high)
        m = mu m + g
        w = (1 - lr wd) w - lr m                              with critical_nesterov: - lr (g + mu m)

    With curvature="measured", L is |g_k - g_{k-1}| / |w_k - w_{k-1}| over everything; before there is a displacement
    mu is `low`.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-2.
        law: which law; default "critical".
        curvature: L, a number >= 0 (default 1, the paper's) or "measured".
        low: lower bound of mu, in [0, high]. Default 0 (ours; the paper's is unknown).
        high: upper bound of mu, in [low, 1). Default 0.99 (ours; the paper's is unknown).
        weight_decay: wd, >= 0. Default 0.
        decoupled_weight_decay: True (default), or False to add wd w to the gradient as torch's SGD does.
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

    State: `momentum_buffer` per parameter, with a measured curvature also `previous_grad` (and with critical_nesterov
    `direction`); in the groups `mu`, `damping_ratio` = (1 - mu) / (2 sqrt(lr L)) and what the measurement needs.

    Cost: that of SGD with momentum; measured curvature adds one buffer (two with critical_nesterov) and two sums.

    Caveats: the effective learning rate lr / (1 - mu) is sqrt(lr) / 2 under the paper's law: at lr 0.1 that is 0.158,
    where momentum 0.9 has 1.0. Compare at equal effective learning rate.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: arXiv 2603.28921 for law="critical"; the exact laws are textbook; bounds and measurement are ours.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = CriticalSGD([w], lr=0.01)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> {name: round(value.item(), 3) for name, value in optimizer.dynamics().items()}
        {'mu': 0.8, 'damping_ratio': 1.0, 'effective_lr': 0.05}
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        law: SGDLaw = "critical",
        curvature: float | Literal["measured"] = 1.0,
        low: float = LOW,
        high: float = HIGH,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "law": law,
            "curvature": curvature,
            "low": low,
            "high": high,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        _check_critical(self, group, tuple(CRITICAL))

    def _update(self, step: Step) -> None:
        step.clip_gradients()
        momenta = _momenta(step)
        step.count()
        for bucket in step.buckets:
            group = bucket.group
            nesterov = group["law"] == "critical_nesterov"
            # g is gone by the next step, so m does not say where Nesterov's form led.
            keep = nesterov and group["curvature"] == "measured"
            bucket.apply(
                critical_sgd_update_,
                bucket.buffers("momentum_buffer"),
                momenta[bucket.index],
                bucket.buffers("direction", bucket.dtype) if keep else None,
                lr=group["lr"],
                weight_decay=bucket.decoupled_decay(),
                nesterov=nesterov,
            )
        for vectors in step.vectors if step.groups[0]["curvature"] == "measured" else ():
            scale = vectors.get("displacement_scale")
            vectors.put("displacement_scale", torch.full_like(scale, vectors.group["lr"]))

    def dynamics(self) -> dict[str, Tensor]:
        """`mu`, `damping_ratio` and `effective_lr` of the last step, and `measured_curvature` where it is measured."""
        return _dynamics(self.param_groups)


class CriticalAdamW(MomentumOptimizer):
    r"""AdamW whose first beta follows the learning rate.

        b1 = clip(1 - 2 sqrt(lr L), low, high)                law="critical"; "critical_exact": (1 - sqrt(lr L))^2
        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        w = (1 - lr wd) w - lr (m / (1 - prod b1)) / (sqrt(v / (1 - b2^t)) + eps)

    For Adam the law is a heuristic, because its lr is not that of a gradient step: at lr 5e-5 it gives b1 = 0.986. The
    bias correction is by the product of all b1 so far; at constant lr this is `torch.optim.AdamW`.

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate, >= 0. Default 1e-3.
        beta2: b2, in [0, 1). Default 0.999.
        eps: added to sqrt(v), >= 0. Default 1e-8.
        law: "critical" (default) or "critical_exact".
        curvature: L, a number >= 0 (default 1) or "measured".
        low: lower bound of b1, in [0, high]. Default 0 (ours).
        high: upper bound of b1, in [low, 1). Default 0.99 (ours).
        weight_decay: wd, >= 0, decoupled. Default 1e-2, as in `torch.optim.AdamW`.
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

    State: `exp_avg` and `exp_avg_sq` per parameter, with a measured curvature also `previous_grad`; in the
    groups `mu` (b1), `damping_ratio` and one number per parameter for the bias correction.

    Cost: that of AdamW; measured curvature adds one buffer and two sums.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: the law is that of arXiv 2603.28921, which is about SGD; its use in AdamW here is ours.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = CriticalAdamW([w], lr=1e-2)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.detach(), round(optimizer.dynamics()["mu"].item(), 3)
        (tensor([0.9899]), 0.8)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        law: AdamLaw = "critical",
        curvature: float | Literal["measured"] = 1.0,
        low: float = LOW,
        high: float = HIGH,
        weight_decay: float = 1e-2,
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
            "law": law,
            "curvature": curvature,
            "low": low,
            "high": high,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "maximize": maximize,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_real("CriticalAdamW", "beta2", group["beta2"], 0, 1, high_open=True)
        check_real("CriticalAdamW", "eps", group["eps"], 0)
        if group["decoupled_weight_decay"] is not True:
            raise ValueError("CriticalAdamW: its weight decay is decoupled; there is no coupled form")
        _check_critical(self, group, ("critical", "critical_exact"))

    def _update(self, step: Step) -> None:
        step.clip_gradients()
        momenta = _momenta(step)
        adam_step(step, momenta)

    def dynamics(self) -> dict[str, Tensor]:
        """`mu` (b1), `damping_ratio`, `effective_lr` of the last step, and `measured_curvature` where measured."""
        return _dynamics(self.param_groups)


def _displacement(group: Mapping[str, Any]) -> str:
    if "beta2" in group:
        return "exp_avg"
    return "direction" if group["law"] == "critical_nesterov" else "momentum_buffer"
