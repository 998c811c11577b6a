"""`--optim_args "gamma=0.95,granularity=tensor,betas=0.9:0.99"`, typed by the optimizer's own annotations."""

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from hf_momentum.errors import InputError
from hf_momentum.integrations.registry import Argument, OptimizerSpec, nearest

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
    kwargs = parse_pairs("--optim_args", text, spec.arguments, elsewhere=_ELSEWHERE)
    spec.check(kwargs)
    return kwargs


def parse_pairs(
    flag: str, text: str | None, arguments: Mapping[str, Argument], elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Parse `key=value,key=value` into the types of `arguments`.

    Args:
        flag: what the text was typed after, for messages.
        text: the pairs; None or empty for none.
        arguments: the keys that are accepted.
        elsewhere: keys that another flag sets, with that flag.

    Raises:
        InputError: malformed text, an unknown or repeated key, a value of the wrong type.

    Example:
        >>> parse_pairs("--x", "n=3", {"n": Argument("n", int, 0)})
        {'n': 3}
    """
    accepted = "; ".join(str(argument) for argument in arguments.values())
    kwargs: dict[str, Any] = {}
    for item in text.split(",") if text and text.strip() else []:
        key, separator, value = (part.strip() for part in item.partition("="))
        if not item.strip():
            raise InputError(f"{flag} {text!r}: empty item; write key=value,key=value")
        if not separator or not key or not value:
            raise InputError(f"{flag} {text!r}: {item.strip()!r} is not key=value. Accepted: {accepted}")
        if elsewhere and key in elsewhere:
            raise InputError(f"{flag} {text!r}: {key} is set by {elsewhere[key]}")
        if key in kwargs:
            raise InputError(f"{flag} {text!r}: {key} is given twice")
        if key not in arguments:
            raise InputError(f"{flag}: no argument {key!r}{nearest(key, arguments)}. Accepted: {accepted}")
        try:
            kwargs[key] = _convert(arguments[key].type, value)
        except ValueError as error:
            described = _described(arguments[key].type)
            raise InputError(f"{flag} {text!r}: {key}={value} is not {described}. Accepted: {accepted}") from error
    return kwargs


def _convert(kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type; ValueError if it is none."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _first_that_fits(get_args(kind), text)
    if origin is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if origin is tuple:
        parts, kinds = text.split(":"), get_args(kind)
        return tuple(_convert(k, part) for k, part in zip(kinds, parts, strict=True))
    if kind is type(None):
        if text.lower() not in ("none", "null"):
            raise ValueError(text)
        return None
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    return kind(text)


def _first_that_fits(kinds: tuple[Any, ...], text: str) -> Any:
    for kind in kinds:
        try:
            return _convert(kind, text)
        except ValueError:
            continue
    raise ValueError(text)


def _described(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return f"{' or '.join(_described(option) for option in get_args(kind))}"
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin is tuple:
        return "numbers parted by colons, as in 0.9:0.99"
    return {float: "a number", int: "a whole number", bool: "true or false", type(None): "none"}.get(kind, str(kind))
