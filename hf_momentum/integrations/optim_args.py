"""`--optim_args "gamma=0.95,granularity=tensor,betas=0.9:0.99"`, typed by the optimizer's own annotations."""

import types
from typing import Any, Literal, Union, get_args, get_origin

from hf_momentum.errors import InputError
from hf_momentum.integrations.registry import OptimizerSpec

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_ELSEWHERE = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}


def parse_optim_args(spec: OptimizerSpec, text: str | None) -> dict[str, Any]:
    """Parse comma-separated `key=value` pairs; a pair of numbers is written `0.9:0.99`.

    transformers' own parser drops unknown keys and leaves the types to each optimizer, where `bool("False")` is
    True. This one knows the optimizer's arguments and stops at anything else.

    Args:
        spec: the optimizer whose arguments are meant.
        text: as typed after `--optim_args`; None or empty for none.

    Returns:
        The keyword arguments, in their annotated types. Ranges are checked too.

    Raises:
        InputError: malformed text, an unknown or repeated key, a value of the wrong type or out of range.

    Example:
        >>> from hf_momentum.integrations.registry import OPTIMIZERS
        >>> parse_optim_args(OPTIMIZERS["adatam"], "gamma=0.95, betas=0.9:0.99, ema=true")
        {'gamma': 0.95, 'betas': (0.9, 0.99), 'ema': True}
    """
    kwargs: dict[str, Any] = {}
    for item in (text or "").split(","):
        if not item.strip():
            if text and text.strip():
                raise InputError(f"--optim_args {text!r}: empty item; write key=value,key=value")
            continue
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator or not key or not value:
            raise InputError(f"--optim_args {text!r}: {item.strip()!r} is not key=value. Accepted: {spec.accepted()}")
        if key in _ELSEWHERE:
            raise InputError(f"--optim_args {text!r}: {key} is set by {_ELSEWHERE[key]}")
        if key in kwargs:
            raise InputError(f"--optim_args {text!r}: {key} is given twice")
        if key not in spec.arguments:
            spec.check({key: value})  # raises, with the nearest names and the accepted list
        argument = spec.arguments[key]
        try:
            kwargs[key] = _convert(argument.type, value)
        except ValueError as error:
            raise InputError(
                f"--optim_args {text!r}: {key}={value} is not {_described(argument.type)}. Accepted: {spec.accepted()}"
            ) from error
    spec.check(kwargs)
    return kwargs


def _convert(kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type; ValueError if it is none."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return _convert(kind, text)
    if origin is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if origin is tuple:
        parts, kinds = text.split(":"), get_args(kind)
        return tuple(_convert(k, part) for k, part in zip(kinds, parts, strict=True))
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    return kind(text)


def _described(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return f"{' or '.join(_described(option) for option in get_args(kind))}"
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin is tuple:
        return "numbers parted by colons, as in 0.9:0.99"
    return {float: "a number", int: "a whole number", bool: "true or false", type(None): "none"}.get(kind, str(kind))
