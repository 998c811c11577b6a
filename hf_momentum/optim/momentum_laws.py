"""Laws that give the momentum coefficient from the learning rate or from how far training has come.

Each law is a pure function of numbers. `MomentumSchedule` applies one to any torch optimizer, before each step and
after the learning-rate scheduler has spoken.

The law `critical` is that of arXiv 2603.28921. It is the small-lr, unit-curvature form of exact critical damping, which
`critical_exact` and `critical_nesterov` are; the bounds are ours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from hf_momentum.optim.arguments import check_choice, check_real

LOW, HIGH = 0.0, 0.99
"""Bounds of a law's momentum (ours): the paper's form is negative above lr = 0.25 and tends to 1 as lr tends to 0."""

FINAL = 0.9
"""The constant momentum of the hybrid schedule's last part (ours)."""


FORMULAS: Mapping[str, Callable[[Any], Any]] = {
    "critical": lambda root: 1 - 2 * root,
    "critical_exact": lambda root: (1 - root) ** 2,
    "critical_nesterov": lambda root: (1 - root) / (1 + root),
}
"""The critical laws as functions of sqrt(lr L), before clipping: of numbers here, of tensors in `critical.py`."""


# ---- the laws -------------------------------------------------------------------------------------------------------


def critical(lr: float, curvature: float = 1.0, low: float = LOW, high: float = HIGH) -> float:
    """mu = 1 - 2 sqrt(lr L), clipped to [low, high]; the paper's law at curvature L = 1.

    Example:
        >>> round(critical(0.1), 4), critical(0.5), critical(0.0)
        (0.3675, 0.0, 0.99)
    """
    return clipped(FORMULAS["critical"](math.sqrt(lr * curvature)), low, high)


def critical_exact(lr: float, curvature: float = 1.0, low: float = LOW, high: float = HIGH) -> float:
    """mu = (1 - sqrt(lr L))^2, clipped: heavy ball on a quadratic of curvature L is then critically damped.

    Example:
        >>> round(critical_exact(0.1), 4)
        0.4675
    """
    return clipped(FORMULAS["critical_exact"](math.sqrt(lr * curvature)), low, high)


def critical_nesterov(lr: float, curvature: float = 1.0, low: float = LOW, high: float = HIGH) -> float:
    """mu = (1 - sqrt(lr L)) / (1 + sqrt(lr L)), clipped: the same for Nesterov's momentum.

    Example:
        >>> round(critical_nesterov(0.1), 4)
        0.5195
    """
    return clipped(FORMULAS["critical_nesterov"](math.sqrt(lr * curvature)), low, high)


def constant(momentum: float = FINAL) -> float:
    """mu = a constant.

    Example:
        >>> constant()
        0.9
    """
    return momentum


def onecycle(progress: float, low: float = 0.85, high: float = 0.95, peak: float = 0.3) -> float:
    """From `high` down to `low` at `peak` of training and back, along cosines, as torch's OneCycleLR cycles momentum.

    Example:
        >>> [round(onecycle(p), 3) for p in (0.0, 0.3, 1.0)]
        [0.95, 0.85, 0.95]
    """
    way = progress / peak if progress < peak else (1 - progress) / (1 - peak)
    return low + (high - low) * (1 + math.cos(math.pi * way)) / 2


def demon(progress: float, initial: float = FINAL) -> float:
    """mu = b0 (1 - p) / ((1 - b0) + b0 (1 - p)) at progress p: decaying momentum (arXiv 1910.04952).

    Example:
        >>> demon(0.0), demon(1.0)
        (0.9, 0.0)
    """
    rest = initial * (1 - progress)
    return rest / ((1 - initial) + rest)


def hybrid_crossing(mu: float, final: float = FINAL) -> float:
    """min(mu, final): the critical law until it crosses the constant. For cosine from lr 0.1 that is at lr 0.0025.

    Example:
        >>> hybrid_crossing(critical(0.1)) == critical(0.1), hybrid_crossing(critical(0.001))
        (True, 0.9)
    """
    return min(mu, final)


def hybrid_switched(mu: float, switched: bool, final: float = FINAL) -> float:
    """`mu` before the switch and `final` after it; a fraction of training or a metric says when.

    Example:
        >>> hybrid_switched(0.4, False), hybrid_switched(0.4, True)
        (0.4, 0.9)
    """
    return final if switched else mu


def damping_ratio(mu: float, lr: float, curvature: float = 1.0) -> float:
    """(1 - mu) / (2 sqrt(lr L)): above 1 overdamped (creeps), below 1 underdamped (overshoots); inf at lr 0.

    Example:
        >>> round(damping_ratio(critical(0.01), 0.01), 6), round(damping_ratio(0.9, 0.1), 3)
        (1.0, 0.158)
    """
    root = math.sqrt(lr * curvature)
    return (1 - mu) / (2 * root) if root > 0 else math.inf


def clipped(value: float, low: float, high: float) -> float:
    """`value` held within [low, high].

    Example:
        >>> clipped(1.5, 0.0, 0.99)
        0.99
    """
    return min(max(value, low), high)


CRITICAL: Mapping[str, Callable[..., float]] = {
    "critical": critical,
    "critical_exact": critical_exact,
    "critical_nesterov": critical_nesterov,
}
"""The laws of the learning rate, by name."""

LAWS = ("critical", "critical_exact", "critical_nesterov", "hybrid", "constant", "onecycle", "demon")
"""All names that `MomentumSchedule` takes."""


# ---- a law applied to an optimizer ----------------------------------------------------------------------------------


class MomentumSchedule:
    """Sets the momentum of any torch optimizer before each of its steps.

    The coefficient is `momentum` of SGD-likes and `betas[0]` of Adam-likes, in each group from that group's current
    `lr`; so it follows every learning-rate scheduler. For Adam the law is a heuristic: at lr 5e-5 it gives 0.986.

    Args:
        optimizer: any `torch.optim.Optimizer` with `momentum` or `betas` in its groups.
        law: one of `critical` (the paper's), `critical_exact`, `critical_nesterov`, `hybrid`, `constant`, `onecycle`,
            `demon`.
        total_steps: optimizer steps of the whole training; needed by `onecycle`, `demon` and `hybrid` by fraction.
        curvature: L of the critical laws: a number (default 1, the paper's) or "measured", which takes
            |g_k - g_{k-1}| / |w_k - w_{k-1}|. Measuring keeps two more copies of the weights and reads one number
            back to the host in each step; `CriticalSGD` and `CriticalAdamW` measure without either. At the
            first step the optimizer keeps the momentum it has.
        base: the critical law that `hybrid` begins with.
        switch: when `hybrid` becomes constant (the paper's rule is unknown): "crossing" (the law crosses `final`; no
            parameter), "fraction" (of `total_steps`) or "metric" (`report` was given a value of at least `threshold`;
            the switch is latched).
        final: the constant of `hybrid`'s last part.
        fraction: for switch="fraction".
        threshold: for switch="metric".
        momentum: for `constant`; and the start of `demon`.
        low: lower bound of the critical laws; the low point of `onecycle` unless left at its default.
        high: upper bound of the critical laws; the high point of `onecycle` unless left at its default.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the optimizer has no momentum.

    Source: arXiv 2603.28921 for `critical` and the idea of the hybrid; bounds, switch rules and curvature are ours.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> schedule = MomentumSchedule(optimizer, "critical")
        >>> w.grad = torch.ones(1)
        >>> optimizer.step()
        >>> round(optimizer.param_groups[0]["momentum"], 4)
        0.3675
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        law: str = "critical",
        *,
        total_steps: int | None = None,
        curvature: float | Literal["measured"] = 1.0,
        base: str = "critical",
        switch: str = "crossing",
        final: float = FINAL,
        fraction: float = 0.5,
        threshold: float | None = None,
        momentum: float = FINAL,
        low: float = LOW,
        high: float = HIGH,
    ) -> None:
        check_schedule(
            law,
            total_steps=total_steps,
            curvature=curvature,
            base=base,
            switch=switch,
            final=final,
            fraction=fraction,
            threshold=threshold,
            momentum=momentum,
            low=low,
            high=high,
        )
        for group in optimizer.param_groups:
            if momentum_key(group) is None:
                raise ValueError(
                    f"momentum schedule: {type(optimizer).__name__} has neither momentum nor betas to schedule"
                )
            if (base if law == "hybrid" else law) == "critical_nesterov" and group.get("nesterov") is False:
                raise ValueError(
                    f"momentum schedule: critical_nesterov needs {type(optimizer).__name__} with nesterov=True"
                )
        self.optimizer, self.law, self.total_steps = optimizer, law, total_steps
        self.curvature, self.base, self.switch = curvature, base, switch
        self.final, self.fraction, self.threshold = final, fraction, threshold
        self.momentum, self.low, self.high = momentum, low, high
        self._counts = True
        self._pending: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    @property
    def state(self) -> dict[str, Any]:
        """What evolves: `steps` taken, whether the hybrid has `switched`, and the `curvature` measured last.

        It lives in the optimizer's groups, the same in each (DeepSpeed shows them one at a time), so that the
        optimizer's own state dict carries it and a resumed run goes on where it was: a latched switch stays latched.
        """
        return self._states()[0]

    def _states(self) -> list[dict[str, Any]]:
        start = {"steps": 0, "switched": False, "curvature": None}
        return [group.setdefault("momentum_schedule", dict(start)) for group in self.optimizer.param_groups]

    def set_steps(self, steps: int) -> None:
        """Say how many steps have been taken, and stop counting calls of `step`.

        For callers that know, and under DeepSpeed ZeRO-3, which calls `step` several times for one update.
        """
        self._counts = False
        for state in self._states():
            state["steps"] = steps

    def before_step(self) -> None:
        """Set every group's momentum for the step that follows; called by the optimizer."""
        states = self._states()
        progress = min(self.state["steps"] / self.total_steps, 1.0) if self.total_steps else 0.0
        changed: dict[str, Any] = {"steps": self.state["steps"] + 1} if self._counts else {}
        if self.law == "hybrid" and self.switch == "fraction" and progress >= self.fraction:
            changed["switched"] = True
        if self.curvature == "measured":
            changed["curvature"] = self._measure()
        for state in states:
            state.update(changed)
        for group in self.optimizer.param_groups:
            mu = self.value(float(group["lr"]), progress)
            if mu is not None:
                set_momentum(group, mu)

    def after_step(self) -> None:
        """Keep gradients and weights from before the step in the optimizer's state; called by the optimizer.

        Only now, because some optimizers take an empty state to mean that they have not begun.
        """
        for param, (grad, weight) in self._pending.items():
            self.optimizer.state[param]["previous_grad"] = grad
            self.optimizer.state[param]["previous_weight"] = weight
        self._pending = {}

    def value(self, lr: float, progress: float) -> float | None:
        """The momentum at this learning rate and progress in [0, 1]; None while the curvature is still unknown."""
        if self.law == "constant":
            return constant(self.momentum)
        if self.law == "demon":
            return demon(progress, self.momentum)
        if self.law == "onecycle":
            bounds = {} if (self.low, self.high) == (LOW, HIGH) else {"low": self.low, "high": self.high}
            return onecycle(progress, **bounds)
        curvature = self.state["curvature"] if self.curvature == "measured" else float(self.curvature)
        if curvature is None:
            return None
        mu = CRITICAL[self.base if self.law == "hybrid" else self.law](lr, curvature, self.low, self.high)
        if self.law != "hybrid":
            return mu
        if self.switch == "crossing":
            return hybrid_crossing(mu, self.final)
        return hybrid_switched(mu, self.state["switched"], self.final)

    def report(self, metric: float) -> None:
        """Tell switch="metric" a held-out value; once it reaches `threshold`, the switch stays."""
        if self.law == "hybrid" and self.switch == "metric" and self.threshold is not None:
            for state in self._states():
                state["switched"] = state["switched"] or metric >= self.threshold

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _measure(self) -> float | None:
        """|g - g_prev| / |w - w_prev| over everything, or None before there is a displacement."""
        differences, displacements = [], []
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if isinstance(param, DTensor):
                    raise ValueError(
                        "momentum schedule: curvature='measured' does not sum over shards; CriticalSGD and "
                        "CriticalAdamW measure it exactly under every layout"
                    )
                state = self.optimizer.state.get(param, {})
                if "previous_grad" in state:
                    differences.append((param.grad - state["previous_grad"]).double().square().sum())
                    displacements.append((param - state["previous_weight"]).double().square().sum())
                self._pending[param] = (param.grad.clone(), param.detach().clone())
        if not differences:
            return None
        sums = torch.stack([torch.stack(differences).sum(), torch.stack(displacements).sum()]).tolist()
        return math.sqrt(sums[0] / sums[1]) if sums[1] > 0 else None


def momentum_key(group: Mapping[str, Any]) -> str | None:
    """The key that holds a group's momentum coefficient, or None.

    Example:
        >>> momentum_key({"betas": (0.9, 0.999)}), momentum_key({"lr": 0.1})
        ('betas', None)
    """
    return next((key for key in ("momentum", "betas") if key in group), None)


def set_momentum(group: dict[str, Any], mu: float) -> None:
    """Write mu where the group keeps it.

    Example:
        >>> group = {"betas": (0.9, 0.999)}
        >>> set_momentum(group, 0.5)
        >>> group
        {'betas': (0.5, 0.999)}
    """
    if momentum_key(group) == "betas":
        group["betas"] = (mu, *group["betas"][1:])
    else:
        group["momentum"] = mu


def check_schedule(
    law: str,
    *,
    total_steps: int | None = None,
    curvature: float | str = 1.0,
    base: str = "critical",
    switch: str = "crossing",
    final: float = FINAL,
    fraction: float = 0.5,
    threshold: float | None = None,
    momentum: float = FINAL,
    low: float = LOW,
    high: float = HIGH,
) -> None:
    """Raise unless the arguments make a schedule.

    Raises:
        TypeError, ValueError: one is of the wrong type or out of range, or one that is needed is missing.

    Example:
        >>> check_schedule("hybrid", switch="fraction")
        Traceback (most recent call last):
        ...
        ValueError: momentum schedule: law 'hybrid' by fraction needs total_steps
    """
    owner = "momentum schedule"
    check_choice(owner, "law", law, LAWS)
    check_choice(owner, "base", base, tuple(CRITICAL))
    check_choice(owner, "switch", switch, ("crossing", "fraction", "metric"))
    if curvature != "measured":
        check_real(owner, "curvature", curvature, 0, hint='or "measured"')
    check_real(owner, "final", final, 0, 1, high_open=True)
    check_real(owner, "fraction", fraction, 0, 1)
    check_real(owner, "momentum", momentum, 0, 1, high_open=True)
    check_real(owner, "low", low, 0, 1, high_open=True)
    check_real(owner, "high", high, low, 1, high_open=True)
    by_fraction = law == "hybrid" and switch == "fraction"
    if (law in ("onecycle", "demon") or by_fraction) and not total_steps:
        raise ValueError(f"{owner}: law {law!r}{' by fraction' if by_fraction else ''} needs total_steps")
    if law == "hybrid" and switch == "metric":
        if threshold is None:
            raise ValueError(f"{owner}: law 'hybrid' by metric needs a threshold")
        check_real(owner, "threshold", threshold)
