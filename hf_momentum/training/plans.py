"""What the commands share that run one recipe many times: `pareto`, `compare` and `stream`."""

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hf_momentum.errors import InputError
from hf_momentum.training.recipe import Recipe

# What no single run of many does: leave weights, speak to others, draw a bar.
ALONE: Mapping[str, str] = {
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "push_to_hub": "false",
    "report_to": "none",
    "disable_tqdm": "true",
}


def check_overrides(overrides: Sequence[str], not_to_give: Mapping[str, str], by: str) -> None:
    """Refuse fields that the command sets in every run itself.

    Args:
        overrides: `--field=value`.
        not_to_give: those fields, and what to do instead.
        by: what sets them, in words.

    Raises:
        InputError: one of them is given, or a token.

    Example:
        >>> check_overrides(["--lam=1"], {"lam": "give the weights with --lambdas"}, "the grid")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: --lam is set by the grid; give the weights with --lambdas
    """
    for word in overrides:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name == "hub_token":
            raise InputError("--hub_token would stand in the report, whose command repeats these words; set HF_TOKEN")
        if word.startswith("--") and name in not_to_give:
            raise InputError(f"--{name} is set by {by}; {not_to_give[name]}")


def digest(recipe: Recipe, without: Collection[str], **more: Any) -> str:
    """A short name of what all runs share, so that records of another recipe are not taken for theirs.

    Args:
        recipe: files are known by their names, not by what they hold.
        without: fields that the runs vary, or that change no result.
        **more: what else shapes the runs.

    Example:
        >>> from hf_momentum.training import load_recipe
        >>> first, other = (load_recipe("quickstart", [f"--seed={seed}"]) for seed in (0, 1))
        >>> digest(first, ["seed"]) == digest(other, ["seed"]), digest(first, []) == digest(other, [])
        (True, False)
    """
    kept = {name: value for name, value in recipe.given.items() if name not in without}
    kept |= {**more, "hf-momentum": importlib.metadata.version("hf-momentum")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
