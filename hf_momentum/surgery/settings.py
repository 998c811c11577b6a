"""What a surgery can be told, checked in one place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_momentum.errors import InputError
from hf_momentum.surgery.combination import RULES

SURGERIES = ("bloop", *RULES)
"""Every surgery on gradients; `replay`, which mixes examples instead, is none."""


@dataclass(frozen=True)
class Settings:
    """Arguments of Bloop and of the surgeries it is compared with.

    Attributes:
        lam: weight of each auxiliary gradient, the most important first; positive.
        surgery: "bloop", "mixed", "simple", "dynamic_barrier" or "pcgrad". What follows is for bloop, but `intact`.
        rho: rate of the average of main gradients, in (0, 1], or "auto".
        order: "paper": project on the average from before this batch; "ema_first": update it first.
        init: "zeros", which makes the first step a plain mixture, or "first_gradient".
        dtype: of the average, float32 or bfloat16 (rounded stochastically).
        metric: "euclidean", or "adam": inner products weighted by 1 / (sqrt(v) + eps), v the second moment of the last
            step, so that Adam's step for the auxiliary part, and not only its gradient, is orthogonal to the average.
        guard: an average shorter than this part of the gradient counts as zero. However short it is, its direction is
            right: with 1e-12 instead, a main loss that converges to its minimum is thrown off it again and again.
        intact: keep each gradient apart until all are there, so that a step can be given up with nothing changed; one
            gradient more in memory.
        start_rho: what rho="auto" begins with.

    Raises:
        InputError: a value that is not accepted.

    Example:
        >>> Settings(lam=(0.1,), rho=2.0)
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: rho is 2.0; it must be in (0, 1], or auto. 0.01 averages over 200 batches
    """

    lam: tuple[float, ...]
    surgery: str = "bloop"
    rho: float | str = 0.01
    order: str = "paper"
    init: str = "zeros"
    dtype: torch.dtype = torch.float32
    metric: str = "euclidean"
    guard: float = 1e-30
    intact: bool = False
    start_rho: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what is not accepted."""
        _one_of("surgery", self.surgery, SURGERIES)
        _one_of("order", self.order, ("paper", "ema_first"))
        _one_of("init", self.init, ("zeros", "first_gradient"))
        _one_of("metric", self.metric, ("euclidean", "adam"))
        _one_of("dtype", self.dtype, (torch.float32, torch.bfloat16))
        for value in self.lam:
            if not (math.isfinite(value) and value >= 0):
                raise InputError(
                    f"lam is {value}; the weight of an auxiliary gradient must be finite and at least 0. To move away "
                    "from an objective, negate its loss"
                )
        if self.rho != "auto" and not (isinstance(self.rho, int | float) and 0 < self.rho <= 1):
            raise InputError(f"rho is {self.rho}; it must be in (0, 1], or auto. 0.01 averages over 200 batches")
        if not 0 <= self.guard < 1:
            raise InputError(f"guard is {self.guard}; it must be in [0, 1)")


def _one_of(name: str, value: Any, accepted: Sequence[Any]) -> None:
    if value not in accepted:
        raise InputError(f"{name} is {value!r}; accepted: {', '.join(map(str, accepted))}")


def weights_of(lam: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    """One weight for each auxiliary, from one for all or one for each.

    Raises:
        InputError: their numbers do not fit.

    Example:
        >>> weights_of([0.1], ["code", "format"])
        (0.1, 0.1)
    """
    if len(lam) not in (1, len(names)):
        raise InputError(
            f"lam has {len(lam)} values for {len(names)} auxiliaries ({', '.join(names)}); give 1 or as many"
        )
    return tuple(lam) * len(names) if len(lam) == 1 else tuple(lam)
