"""Validation of hyperparameters: every message names the argument, the value, and what is accepted."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

StateDtype = Literal["float32", "bfloat16", "int8"]


def check_real(
    owner: str,
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    hint: str = "",
) -> None:
    """Raise unless `value` is a finite real number in `[low, high]`; `low_open` and `high_open` leave the ends out.

    Raises:
        TypeError: `value` is not a real number (booleans and tensors are not).
        ValueError: `value` lies outside the range or is not finite.

    Example:
        >>> check_real("TAM", "gamma", 1.0, 0, 1, high_open=True, hint="0.9 is usual")
        Traceback (most recent call last):
        ...
        ValueError: TAM: gamma must be a number in [0, 1), got 1.0; 0.9 is usual
    """
    right = ")" if high_open or math.isinf(high) else "]"
    upper = "inf" if math.isinf(high) else f"{high:g}"
    left = "(" if low_open else "["
    accepted = f"{owner}: {name} must be a number in {left}{low:g}, {upper}{right}, got {value!r}"
    message = f"{accepted}; {hint}" if hint else accepted
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    number = float(value)
    inside = (low < number if low_open else low <= number) and (number < high if high_open else number <= high)
    if not math.isfinite(number) or not inside:
        raise ValueError(message)


def check_betas(owner: str, value: Any, names: tuple[str, str] = ("betas[0]", "betas[1]")) -> None:
    """Raise unless `value` is a pair of numbers in `[0, 1)`.

    Example:
        >>> check_betas("AdaTAM", (0.9, 0.999))
        >>> check_betas("AdaTAM", 0.9)
        Traceback (most recent call last):
        ...
        TypeError: AdaTAM: betas must be a pair of numbers in [0, 1), got 0.9
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{owner}: betas must be a pair of numbers in [0, 1), got {value!r}")
    for name, beta in zip(names, value, strict=True):
        check_real(owner, name, beta, 0, 1, high_open=True)


def check_bool(owner: str, name: str, value: Any) -> None:
    """Raise unless `value` is True or False: a string such as "False" would silently count as true.

    Example:
        >>> check_bool("TAM", "maximize", "False")
        Traceback (most recent call last):
        ...
        TypeError: TAM: maximize must be True or False, got 'False'
    """
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`.

    Example:
        >>> check_choice("TAM", "granularity", "layer", ("global", "tensor"))
        Traceback (most recent call last):
        ...
        ValueError: TAM: granularity must be one of 'global', 'tensor', got 'layer'
    """
    if value not in choices:
        accepted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name} must be one of {accepted}, got {value!r}")


def check_common(owner: str, group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the arguments that every optimizer has are valid, and the same in all groups where they must be.

    Args:
        owner: the optimizer's name.
        group: a parameter group with `fused`, `max_grad_norm`, `state_dtype` and `stochastic_rounding`.
        others: the groups before it.

    Example:
        >>> choices = {"fused": None, "max_grad_norm": 0, "state_dtype": "float32", "stochastic_rounding": False}
        >>> check_common("TAM", choices, [])
        Traceback (most recent call last):
        ...
        ValueError: TAM: max_grad_norm must be a number in (0, inf), got 0; None does not clip
    """
    fused, max_norm = group["fused"], group["max_grad_norm"]
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"{owner}: fused must be None (kernels where they can be had), True or False, got {fused!r}")
    if max_norm is not None:
        check_real(owner, "max_grad_norm", max_norm, 0, low_open=True, hint="None does not clip")
    check_choice(owner, "state_dtype", group["state_dtype"], ("float32", "bfloat16", "int8"))
    check_bool(owner, "stochastic_rounding", group["stochastic_rounding"])
    for other in others:
        if other["max_grad_norm"] != max_norm:
            raise ValueError(
                f"{owner}: max_grad_norm bounds the norm of all gradients together, so it must be the same in all "
                f"groups; got {max_norm} beside {other['max_grad_norm']}"
            )
