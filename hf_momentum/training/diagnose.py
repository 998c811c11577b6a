"""The command `hf-momentum diagnose`: which layer groups do a model's own errors point to?"""

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState

from hf_momentum.diagnosis.choice import Rule, choose
from hf_momentum.diagnosis.diagnosis_report import DiagnosisReport
from hf_momentum.diagnosis.groups import LayerGroup
from hf_momentum.diagnosis.results import SCORES, Compared, GroupFacts
from hf_momentum.errors import InputError, nearest
from hf_momentum.evaluation.suite import TASKS, SuiteSplit
from hf_momentum.training.evaluated import task_of, untrained
from hf_momentum.training.job import peak_memory
from hf_momentum.training.processes import launched_processes
from hf_momentum.training.samples import Data, Found, Settings, attribute, model_task, scores_of
from hf_momentum.training.words import listed


def diagnose(settings: Settings, command: str = "") -> DiagnosisReport | None:
    """Score the layer groups of a model by its errors.

    Returns:
        The report; None in all but the first process of a launch.

    Raises:
        InputError: model, data, groups or settings cannot be used as given.

    Example:
        >>> data = SuiteSplit("code", "in distribution", source="stdlib:code@validation", max_examples=20)
        >>> settings = Settings("my-model", data)  # then: diagnose(settings).write(Path("outputs/diagnosis"))
    """
    check(settings)
    report, _ = diagnosed(Data.load(settings), settings, command)
    return None if launched_processes() > 1 and not PartialState().is_main_process else report


def diagnosed(data: Data, settings: Settings, command: str = "") -> tuple[DiagnosisReport, Found]:
    """The same for a model and data that are loaded; with what the report was made from."""
    started = time.perf_counter()
    # A wrapper may change the class, and leave a part of each tensor.
    model = f"{type(data.evaluated.model).__name__}, {data.evaluated.parameters:,} parameters"
    found = attribute(data.evaluated, data, settings)
    random = None
    if found.compared is not None and settings.random:
        control = untrained(data.evaluated, model_task(settings.data.task), settings.seed)
        random = scores_of(control, data, settings, found)
    facts = {"model": model, **_facts(data.evaluated.device, time.perf_counter() - started)}
    return _report(settings, found, random, command, facts), found


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings from the command line's words.

    Raises:
        InputError: a value that is not accepted.

    Example:
        >>> given = {"model": "mine", "data": "hard.csv", "task": "causal_lm", "top": 2, "group": ["early=*.0.*"]}
        >>> found = settings_of(given)
        >>> found.rule.top, found.data.source, dict(found.patterns)
        (2, 'hard.csv', {'early': '*.0.*'})
    """
    task = given.get("task") or task_of(given["model"], given.get("revision"))
    if task not in TASKS:
        raise InputError(f"task {task!r} is not accepted{nearest(task, TASKS)}; one of {', '.join(TASKS)}")
    rules = {name: given.get(name) for name in ("top", "threshold", "cumulative", "budget")}
    asked = any(value is not None for value in rules.values())
    patterns = _patterns(given.get("group", ()))
    data = split_of("data", given["data"], task, given)
    against = None if given.get("against") is None else split_of("against", given["against"], task, given)
    same = ("split", "score", "lora_weights", "batch_size", "device", "revision", "seed")
    return Settings(
        model=given["model"],
        data=data,
        against=against,
        patterns=patterns,
        rule=Rule(**rules) if asked else Rule(top=3),
        random=not given.get("no_random", False),
        **{name: given[name] for name in same if name in given},
    )


def split_of(name: str, source: str, task: str, given: Mapping[str, Any]) -> SuiteSplit:
    """A dataset as the command line describes it: where its columns stand, and how much of it is used.

    Example:
        >>> split_of("data", "hard.csv", "sequence_classification", {"label_column": "stars"}).label_column
        'stars'
    """
    fields = ("text_column", "label_column", "image_column", "prompt_column", "reference_column")
    numbers = ("block_size", "max_examples", "max_new_tokens")
    for number in numbers:
        if given.get(number) is not None and given[number] < 1:
            raise InputError(f"{number} must be at least 1, got {given[number]}")
    values = {key: given[key] for key in (*fields, *numbers, "seed") if given.get(key) is not None}
    return SuiteSplit(
        name, "in distribution", source=source, task=task, classes=tuple(listed(given.get("classes", ""))), **values
    )


def _patterns(entries: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, pattern = entry.partition("=")
        if not separator or not name or not pattern:
            raise InputError(f"group {entry!r} is not of the form NAME=PATTERN, such as early=*.layer.[01].*")
        if name in found:
            raise InputError(f"group {name!r} is given twice; give each a name of its own")
        found[name] = pattern
    return found


def check(settings: Settings) -> None:
    """Refuse settings that can be seen to be wrong before anything is loaded.

    Raises:
        InputError: a value that is not accepted.

    Example:
        >>> check(Settings("my-model", SuiteSplit("d", "in distribution"), score="contrats"))
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: score 'contrats' is not accepted (did you mean 'contrast'?)...
    """
    accepted = ("contrast", *SCORES)
    if settings.score not in accepted:
        hint = nearest(settings.score, accepted)
        raise InputError(f"score {settings.score!r} is not accepted{hint}; one of {', '.join(accepted)}")
    if settings.lora_weights not in ("base", "delta"):
        raise InputError(f"lora_weights {settings.lora_weights!r} is not accepted; base or delta")
    if settings.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {settings.batch_size}")
    if settings.seed < 0:
        raise InputError(f"seed must be at least 0, got {settings.seed}")
    if settings.device is not None and launched_processes() > 1:
        raise InputError(
            f"device {settings.device!r} is for one process; in a launch each has a device of its own, so leave it out"
        )


# ---- the report ------------------------------------------------------------------------------------------------------


def chosen_of(compared: Compared, groups: Sequence[LayerGroup], score: str, rule: Rule) -> tuple[str, list[str]]:
    """The score that ranks, "raw" where there is no contrast, and the groups that a rule chooses by it.

    Raises:
        InputError: the rule chooses none.
    """
    used = "raw" if score == "contrast" and not compared.contrast else score
    names, numel = [group.name for group in groups], [group.numel for group in groups]
    return used, choose(names, compared.values(used), numel, rule)


def facts_of(groups: Sequence[LayerGroup]) -> list[GroupFacts]:
    """The groups as a report lists them."""
    return [GroupFacts(group.name, group.kind, group.numel) for group in groups]


def _report(
    settings: Settings, found: Found, random: Compared | None, command: str, facts: Mapping[str, str]
) -> DiagnosisReport:
    score, chosen = settings.score, []
    if found.compared is not None:
        score, chosen = chosen_of(found.compared, found.groups, settings.score, settings.rule)
    return DiagnosisReport(
        model=settings.model,
        data=settings.data.source,
        task=settings.data.task,
        unit="token" if settings.data.task == "causal_lm" else "example",
        looked_at=found.looked_at,
        errors=found.errors,
        right=found.right,
        groups=facts_of(found.groups),
        trained=found.compared,
        random=random,
        score=score,
        chosen=chosen,
        rule=settings.rule.words(),
        notes=_notes(settings, found),
        facts=facts,
        command=command,
    )


def _notes(settings: Settings, found: Found) -> list[str]:
    notes = []
    if settings.against is not None:
        notes.append(f"What is right was taken from {settings.against.source}.")
    elif settings.data.task == "causal_lm":
        notes.append("Wrong tokens are those of one half of the windows, right ones those of the other half.")
    if any(group.adapters for group in found.groups):
        what = "the product of the adapters" if settings.lora_weights == "delta" else "the base weights"
        notes.append(
            "The model has LoRA adapters. The gradient is that with respect to the weights they adapt; relative and "
            f"taylor measure it against {what}."
        )
    return notes


def _facts(device: torch.device, seconds: float) -> dict[str, str]:
    processes = launched_processes()
    return {
        "device": (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        + (f", {processes} processes" if processes > 1 else ""),
        "time": f"{seconds:.1f} s",
        "peak memory": f"{peak_memory(device) / 2**20:.0f} MiB"
        + ("" if device.type == "cuda" else " of the process")
        + (", the first one" if processes > 1 else ""),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("hf-momentum", "torch", "transformers")
        )
        + f", Python {platform.python_version()}",
    }
