"""The update rules as passes over memory.

A function here has the name of the pure function that it stands in for and takes the same arguments, with `Gradients`
in the place of formed gradients, float64 tensors for numbers (0-dim: one for all; 1-D: one per tensor), state as it is
stored, and weights in their own dtype. Each is one line of algebra: which number of the pass is which of the rule.
The passes themselves are in `cpu_kernels.c` and `triton_kernels.py`; `choice.py` says whether they can be had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_momentum.kernels.choice import launch
from hf_momentum.kernels.work import Gradients, Reduced, State, Work


@dataclass(frozen=True)
class Rounding:
    """How the weights of a pass are written, and whether at all.

    Attributes:
        seeds: one per tensor, to round bfloat16 weights stochastically; None rounds to nearest.
        skip: 0-dim on the tensors' device; where it is not 0 nothing is written. None: it is.
    """

    seeds: Tensor | None = None
    skip: Tensor | None = None


PLAIN = Rounding()
"""To nearest, always."""


# ---- sums -----------------------------------------------------------------------------------------------------------


def alignment_sums(grads: Gradients, xs: State) -> Tensor:
    """`<x, g>, <x, x>, <g, g>` of each pair, `[tensors, 3]`; see `hf_momentum.kernels.alignment_sums`."""
    return launch("alignment_sums", Work(grads=grads, first=xs, written=False), 3)


def squared_norms(grads: Gradients) -> Tensor:
    """`<g, g>` of each gradient, `[tensors, 1]`."""
    return launch("squared_norms", Work(grads=grads, written=False), 1)


def squared_changes_(
    grads: Gradients,
    previous: Sequence[Tensor],
    displacements: State,
    second_moments: State | None,
    root2: Tensor | None,
    *,
    eps: float,
    preconditioned: bool,
    rounding: Rounding = PLAIN,
) -> Tensor:
    """`hf_momentum.optim.curvature.squared_changes_` in one pass."""
    work = Work(
        grads=grads,
        first=displacements,
        squares=second_moments,
        previous=previous,
        unbias=1.0 if root2 is None else 1 / root2,
        eps=eps,
        divide_change=preconditioned,
        written=False,
        skip=rounding.skip,
    )
    return launch("squared_changes", work, 3)


# ---- heavy ball -----------------------------------------------------------------------------------------------------


def tam_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    momenta: State,
    scale: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.tam.tam_update_` in one pass."""
    _momentum_step(params, grads, momenta, rounding, keep=momentum, enter=scale, rate=lr, shrink=1 - lr * weight_decay)


def ahb_sgd_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    displacements: State,
    beta: Tensor,
    *,
    lr: float,
    weight_decay: float,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.ahb.ahb_sgd_update_` in one pass."""
    numbers = {"enter": -lr, "rate": -1.0, "shrink": 1 - lr * weight_decay}
    _momentum_step(params, grads, displacements, rounding, keep=beta, **numbers)


def critical_sgd_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    momenta: State,
    mu: Tensor,
    kept: Sequence[Tensor] | None,
    *,
    lr: float,
    weight_decay: float,
    nesterov: bool,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.critical.critical_sgd_update_` in one pass."""
    form = {"nesterov": 0 if not nesterov else 1 if kept is None else 2, "previous": kept}
    numbers = {"enter": 1.0, "rate": lr, "shrink": 1 - lr * weight_decay}
    _momentum_step(params, grads, momenta, rounding, keep=mu, **numbers, **form)


def _momentum_step(
    params: Sequence[Tensor], grads: Gradients, momenta: State, rounding: Rounding, **numbers: Any
) -> None:
    work = Work(grads=grads, weights=params, first=momenta, seeds=rounding.seeds, skip=rounding.skip, **numbers)
    launch("momentum_step", work, 0)


def advance_momentum_(grads: Gradients, momenta: State, *, momentum: float, rounding: Rounding = PLAIN) -> Tensor:
    """`hf_momentum.optim.vradam.advance_momentum_` in one pass, its sum included."""
    work = Work(grads=grads, first=momenta, keep=momentum, enter=1 - momentum, skip=rounding.skip)
    return launch("momentum_advance", work, 1)


def vr_update_(
    params: Sequence[Tensor], directions: State, rate: Tensor, shrink: Tensor | None, *, rounding: Rounding = PLAIN
) -> None:
    """`hf_momentum.optim.vradam.vr_update_` in one pass."""
    work = Work(
        weights=params,
        first=directions,
        rate=rate,
        shrink=1.0 if shrink is None else shrink,
        written=False,
        seeds=rounding.seeds,
        skip=rounding.skip,
    )
    launch("momentum_apply", work, 0)


# ---- Adam's form ----------------------------------------------------------------------------------------------------


def adatam_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: State,
    second_moments: State,
    scale: Tensor,
    correction1: Tensor | None,
    root2: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    ema: bool,
    weight_decay: float,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.tam.adatam_update_` in one pass."""
    beta1, beta2 = betas
    numbers = {
        "keep": beta1,
        "enter": scale.double() * (1 - beta1 if ema else 1),
        "rate": lr if correction1 is None else lr / correction1,
        "shrink": 1 - lr * weight_decay,
        "unbias": 1.0 if root2 is None else 1 / root2,
    }
    _adam_step(params, grads, first_moments, second_moments, rounding, beta2=beta2, eps=eps, **numbers)


def adam_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: State,
    second_moments: State,
    beta1: Tensor,
    correction1: Tensor,
    root2: Tensor,
    *,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.adam.adam_update_` in one pass."""
    numbers = {
        "keep": beta1,
        "enter": 1 - beta1.double(),
        "rate": lr / correction1.double(),
        "shrink": 1 - lr * weight_decay,
        "unbias": 1 / root2,
    }
    _adam_step(params, grads, first_moments, second_moments, rounding, beta2=beta2, eps=eps, **numbers)


def vradam_step_(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: State,
    second_moments: State,
    correction1: Tensor,
    root2: Tensor,
    rate: Tensor,
    shrink: Tensor | None,
    *,
    betas: tuple[float, float],
    eps: float,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.vradam.vradam_step_` in one pass."""
    numbers = {
        "keep": betas[0],
        "enter": 1 - betas[0],
        "rate": rate.double() / correction1,
        "shrink": 1.0 if shrink is None else shrink,
        "unbias": 1 / root2,
    }
    _adam_step(params, grads, first_moments, second_moments, rounding, beta2=betas[1], eps=eps, **numbers)


def _adam_step(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: State,
    second_moments: State,
    rounding: Rounding,
    **numbers: Any,
) -> None:
    work = Work(
        grads=grads,
        weights=params,
        first=first_moments,
        squares=second_moments,
        seeds=rounding.seeds,
        skip=rounding.skip,
        **numbers,
    )
    launch("adam_step", work, 0)


def advance_moments_(
    grads: Gradients,
    first_moments: State,
    second_moments: State,
    correction1: Tensor,
    root2: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    rounding: Rounding = PLAIN,
) -> Tensor:
    """`hf_momentum.optim.vradam.advance_moments_` in one pass, its sums included."""
    beta1, beta2 = betas
    work = Work(
        grads=grads,
        first=first_moments,
        squares=second_moments,
        keep=beta1,
        enter=1 - beta1,
        rate=1 / correction1,
        unbias=1 / root2,
        beta2=beta2,
        eps=eps,
        skip=rounding.skip,
    )
    return launch("adam_advance", work, 2)


def vradam_update_(
    params: Sequence[Tensor],
    first_moments: State,
    second_moments: State,
    correction1: Tensor,
    root2: Tensor,
    rate: Tensor,
    shrink: Tensor | None,
    *,
    eps: float,
    rounding: Rounding = PLAIN,
) -> None:
    """`hf_momentum.optim.vradam.vradam_update_` in one pass."""
    work = Work(
        weights=params,
        first=first_moments,
        squares=second_moments,
        rate=rate.double() / correction1,
        shrink=1.0 if shrink is None else shrink,
        unbias=1 / root2,
        eps=eps,
        written=False,
        seeds=rounding.seeds,
        skip=rounding.skip,
    )
    launch("adam_apply", work, 0)


_RULES: dict[str, Callable[..., Any]] = {
    rule.__name__: rule
    for rule in (
        alignment_sums,
        squared_norms,
        squared_changes_,
        tam_update_,
        ahb_sgd_update_,
        critical_sgd_update_,
        advance_momentum_,
        vr_update_,
        adatam_update_,
        adam_update_,
        vradam_step_,
        advance_moments_,
        vradam_update_,
    )
}


def rule(name: str, states: Sequence[State]) -> Callable[..., Any] | None:
    """The function of this module that stands in for the pure function `name`, if it takes these lists of state.

    State is reduced or contiguous float32; a previous gradient may be bfloat16.

    Example:
        >>> import torch
        >>> rule("tam_update_", [[torch.zeros(3)]]) is tam_update_
        True
        >>> rule("tam_update_", [[torch.zeros(3, dtype=torch.float16)]]), rule("no_such_rule_", [])
        (None, None)
    """
    found = _RULES.get(name)
    for number, tensors in enumerate(states):
        if isinstance(tensors, Reduced):
            continue
        dtypes = {x.dtype for x in tensors}
        previous = name == "squared_changes_" and number == 0
        if len(dtypes) > 1 or str(*dtypes) not in ("torch.float32", "torch.bfloat16" if previous else ""):
            return None
        if not all(x.is_contiguous() for x in tensors):
            return None
    return found
