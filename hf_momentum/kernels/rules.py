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
from hf_momentum.kernels.work import Gradients, State, Work


@dataclass(frozen=True)
class How:
    """How a pass is made, whatever its rule.

    Attributes:
        seeds: one per tensor, to round bfloat16 weights stochastically; None rounds to nearest.
        skip: 0-dim on the tensors' device; where it is not 0 nothing is written. None: it is.
        tables: pointers that an earlier pass over the same lists has looked up, by the identity of the list; or None.
    """

    seeds: Tensor | None = None
    skip: Tensor | None = None
    tables: dict[int, Any] | None = None


PLAIN = How()
"""To nearest, always."""


# ---- sums -----------------------------------------------------------------------------------------------------------


def alignment_sums(grads: Gradients, xs: State, *, how: How = PLAIN) -> Tensor:
    """`<x, g>, <x, x>, <g, g>` of each pair, `[tensors, 3]`; see `hf_momentum.kernels.alignment_sums`."""
    return launch("alignment_sums", Work(grads=grads, first=xs, written=False, **vars(how)), 3)


def squared_norms(grads: Gradients, *, how: How = PLAIN) -> Tensor:
    """`<g, g>` of each gradient, `[tensors, 1]`."""
    return launch("squared_norms", Work(grads=grads, written=False, **vars(how)), 1)


def squared_changes_(
    grads: Gradients,
    previous: Sequence[Tensor],
    displacements: State,
    second_moments: State | None,
    root2: Tensor | None,
    *,
    eps: float,
    preconditioned: bool,
    how: How = PLAIN,
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
        **vars(how),
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
    how: How = PLAIN,
) -> None:
    """`hf_momentum.optim.tam.tam_update_` in one pass."""
    _momentum_step(params, grads, momenta, how, keep=momentum, enter=scale, rate=lr, shrink=1 - lr * weight_decay)


def ahb_sgd_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    displacements: State,
    beta: Tensor,
    *,
    lr: float,
    weight_decay: float,
    how: How = PLAIN,
) -> None:
    """`hf_momentum.optim.ahb.ahb_sgd_update_` in one pass."""
    numbers = {"enter": -lr, "rate": -1.0, "shrink": 1 - lr * weight_decay}
    _momentum_step(params, grads, displacements, how, keep=beta, **numbers)


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
    how: How = PLAIN,
) -> None:
    """`hf_momentum.optim.critical.critical_sgd_update_` in one pass."""
    form = {"nesterov": 0 if not nesterov else 1 if kept is None else 2, "previous": kept}
    numbers = {"enter": 1.0, "rate": lr, "shrink": 1 - lr * weight_decay}
    _momentum_step(params, grads, momenta, how, keep=mu, **numbers, **form)


def _momentum_step(params: Sequence[Tensor], grads: Gradients, momenta: State, how: How, **numbers: Any) -> None:
    work = Work(grads=grads, weights=params, first=momenta, **vars(how), **numbers)
    launch("momentum_step", work, 0)


def advance_momentum_(grads: Gradients, momenta: State, *, momentum: float, how: How = PLAIN) -> Tensor:
    """`hf_momentum.optim.vradam.advance_momentum_` in one pass, its sum included."""
    work = Work(grads=grads, first=momenta, keep=momentum, enter=1 - momentum, **vars(how))
    return launch("momentum_advance", work, 1)


def vr_update_(
    params: Sequence[Tensor], directions: State, rate: Tensor, shrink: Tensor | None, *, how: How = PLAIN
) -> None:
    """`hf_momentum.optim.vradam.vr_update_` in one pass."""
    work = Work(
        weights=params,
        first=directions,
        rate=rate,
        shrink=1.0 if shrink is None else shrink,
        written=False,
        **vars(how),
    )
    launch("momentum_apply", work, 0)


# ---- surgery --------------------------------------------------------------------------------------------------------


def project_and_lend_(
    grads: Sequence[Tensor],
    emas: State,
    coefficient: Tensor | float,
    keep: Tensor | float,
    lend: Tensor | float,
    *,
    how: How = PLAIN,
) -> None:
    """`hf_momentum.surgery.passes.project_and_lend_` in one pass; the gradients are what is written."""
    work = Work(weights=grads, first=emas, keep=keep, enter=-lend, rate=coefficient, **vars(how))
    launch("momentum_project", work, 0)


def absorb_(
    grads: Sequence[Tensor], emas: State, keep: Tensor | float, rate: Tensor | float, *, how: How = PLAIN
) -> None:
    """`hf_momentum.surgery.passes.absorb_` in one pass; its sum is left."""
    work = Work(grads=Gradients(grads, grads), first=emas, keep=keep, enter=rate, **vars(how))
    launch("momentum_advance", work, 1)


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
    how: How = PLAIN,
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
    _adam_step(params, grads, first_moments, second_moments, how, beta2=beta2, eps=eps, **numbers)


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
    how: How = PLAIN,
) -> None:
    """`hf_momentum.optim.adam.adam_update_` in one pass."""
    numbers = {
        "keep": beta1,
        "enter": 1 - beta1.double(),
        "rate": lr / correction1.double(),
        "shrink": 1 - lr * weight_decay,
        "unbias": 1 / root2,
    }
    _adam_step(params, grads, first_moments, second_moments, how, beta2=beta2, eps=eps, **numbers)


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
    how: How = PLAIN,
) -> None:
    """`hf_momentum.optim.vradam.vradam_step_` in one pass."""
    numbers = {
        "keep": betas[0],
        "enter": 1 - betas[0],
        "rate": rate.double() / correction1,
        "shrink": 1.0 if shrink is None else shrink,
        "unbias": 1 / root2,
    }
    _adam_step(params, grads, first_moments, second_moments, how, beta2=betas[1], eps=eps, **numbers)


def _adam_step(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: State,
    second_moments: State,
    how: How,
    **numbers: Any,
) -> None:
    work = Work(
        grads=grads,
        weights=params,
        first=first_moments,
        squares=second_moments,
        **vars(how),
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
    how: How = PLAIN,
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
        **vars(how),
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
    how: How = PLAIN,
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
        **vars(how),
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
        project_and_lend_,
        absorb_,
        adatam_update_,
        adam_update_,
        vradam_step_,
        advance_moments_,
        vradam_update_,
    )
}


def rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of this module that stands in for a pure function on lists.

    Example:
        >>> from hf_momentum.optim.tam import tam_update_ as pure
        >>> rule(pure) is tam_update_
        True
    """
    return _RULES[function.__name__]
