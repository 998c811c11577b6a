"""The JSON schema of recipes, for editors: made from the parser that reads them."""

from argparse import Action
from typing import Any, get_args, get_type_hints

import transformers

from hf_momentum.errors import InputError
from hf_momentum.training.arguments import TRL_TASKS
from hf_momentum.training.recipe import dataclasses_of, parser

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_NUMBERS = {int: "integer", float: "number"}


def recipe_schema() -> dict[str, Any]:
    """What a recipe may say: each field with its type, choices, default and help, and no field beside.

    Fields of TRL's are allowed for the tasks that TRL trains; without TRL they are left out.

    Example:
        >>> schema = recipe_schema()
        >>> schema["properties"]["lora_r"]["type"], schema["additionalProperties"]
        ('integer', False)
    """
    fields = _fields("causal_lm")
    common = set(fields)
    only: dict[str, list[str]] = {}
    for task in TRL_TASKS:
        try:
            added = {name: value for name, value in _fields(task).items() if name not in common}
        except InputError:
            continue
        for name, value in added.items():
            if name in fields and fields[name] != value:  # of one name, but not of one meaning: loss_type is
                value = {"description": f"For each task of {', '.join(TRL_TASKS)}.", "anyOf": [fields[name], value]}
            fields[name] = value
            only.setdefault(name, []).append(task)
    rules = []
    for tasks in sorted(set(map(tuple, only.values()))):
        names = sorted(name for name, allowed in only.items() if tuple(allowed) == tasks)
        asked = {"properties": {"task": {"enum": list(tasks)}}, "required": ["task"]}
        rules.append({"if": asked, "else": {"properties": dict.fromkeys(names, False)}})
    return {
        "$schema": DIALECT,
        "$comment": f"written by `hf-momentum schema` with transformers {transformers.__version__}",
        "title": "A recipe of hf-momentum",
        "type": "object",
        "properties": fields,
        "additionalProperties": False,
        "allOf": rules,
    }


def _fields(task: str) -> dict[str, Any]:
    made = parser(task)
    hints: dict[str, Any] = {}
    for cls in dataclasses_of(task):
        hints |= get_type_hints(cls)
    return {action.dest: _field(action, hints.get(action.dest)) for action in made._actions if _names_a_field(action)}


def _names_a_field(action: Action) -> bool:
    """Not the help, nor the `--no_...` twin of a switch that is on."""
    return action.dest != "help" and action.nargs != 0


def _field(action: Action, hint: Any) -> dict[str, Any]:
    made = _several(action) if action.nargs == "+" else _value(action)
    kinds = set(get_args(hint))
    if dict in kinds or any(getattr(kind, "__origin__", None) is dict for kind in kinds) or action.type is dict:
        made = {"anyOf": [made, {"type": "object"}]}
    if action.default is None:
        made = {"anyOf": [*made.get("anyOf", [made]), {"type": "null"}]}
    described: dict[str, Any] = {"description": " ".join((action.help or "").replace("%%", "%").split())}
    if action.default is not None and _is_plain(action.default):
        described["default"] = action.default
    return {**described, **made}


def _several(action: Action) -> dict[str, Any]:
    """A list of values, or one of them alone."""
    value = _value(action)
    return {"anyOf": [value, {"type": "array", "items": value}]}


def _value(action: Action) -> dict[str, Any]:
    if action.choices is not None:
        return {"enum": [str(choice) for choice in action.choices]}
    if action.type in _NUMBERS:
        return {"type": _NUMBERS[action.type]}
    if (action.nargs == "?" and isinstance(action.default, bool)) or _is_switch(action):
        return {"type": "boolean"}
    return {"type": ["string", "number", "boolean"]}  # a scalar is taken as it is written: 0.01 is a word, too


def _is_switch(action: Action) -> bool:
    return getattr(action.type, "__name__", "") == "string_to_bool"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return type(value) in (str, int, float, bool)
