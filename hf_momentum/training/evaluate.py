"""The command `hf-momentum evaluate`: one model, one suite, one report."""

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch

from hf_momentum.errors import InputError
from hf_momentum.evaluation.evaluation_report import EvaluationReport
from hf_momentum.evaluation.measured import (
    Measured,
    changes_from,
    gaps,
    means_over_severities,
    robustness_of,
    scored,
    scorer_of,
)
from hf_momentum.evaluation.suite import CLASSIFIERS, Suite, SuiteSplit
from hf_momentum.training import corpus
from hf_momentum.training.evaluated import Evaluated, load_evaluated
from hf_momentum.training.examples import outputs_of, taken_by_number
from hf_momentum.training.harness import harness, measure_task
from hf_momentum.training.job import peak_memory
from hf_momentum.training.suite_rows import ROWS, load_rows, load_suite

__all__ = ["Settings", "evaluate", "load_suite", "measure"]

# generation and causal_lm are tasks of one and the same model.
_MODEL_OF = {"generation": "causal_lm"}


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how.

    Attributes:
        model: a Hub name, a folder, an adapter or a checkpoint.
        base: the model before fine-tuning, for what was forgotten; None for none.
        baselines: `report.json` of other models on the same suite, for effective robustness.
        batch_size: examples at a time.
        device: such as "cuda:1"; the accelerator, or else the CPU, unless given.
        dtype: of the weights; "auto" as they were saved.
        revision: of a Hub model.
        seed: of the bootstrap.
    """

    model: str
    base: str | None = None
    baselines: Sequence[str] = ()
    batch_size: int = 16
    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    seed: int = 0


def evaluate(suite: Suite, settings: Settings, command: str = "") -> EvaluationReport:
    """Score a model on every split of a suite.

    All data is read, and labels are looked for, before the model runs.

    Raises:
        InputError: model, data, baselines or settings cannot be used as given.

    Example:
        >>> suite = load_suite("stdlib", max_examples=5)  # then: evaluate(suite, Settings("my-model")).write(folder)
    """
    if settings.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {settings.batch_size}")
    baselines = _read_baselines(settings.baselines)
    if any(split.lm_eval is not None for split in suite.splits):
        harness()
    rows = {split.name: load_rows(split) for split in suite.splits if split.lm_eval is None}
    started = time.perf_counter()
    measured, models, notes = measure(suite, rows, settings.model, settings)
    seconds = time.perf_counter() - started
    before = [] if settings.base is None else measure(suite, rows, settings.base, settings)[0]

    differences = gaps(measured, settings.seed)
    return EvaluationReport(
        model=settings.model,
        suite=suite.name,
        splits=[scored(one, settings.seed) for one in measured],
        tasks={split.name: split.task for split in suite.splits},
        gaps=differences,
        means=means_over_severities(measured, settings.seed),
        base=settings.base,
        changes=changes_from(before, measured, str(settings.base), settings.seed) if before else [],
        robustness=robustness_of(measured, differences, baselines, settings.model, settings.seed) if baselines else [],
        notes=notes,
        facts=_facts(suite, models, seconds, sum(len(one.rows) for one in measured)),
        suite_yaml=suite.to_yaml(),
        command=command,
    )


def measure(
    suite: Suite, rows: Mapping[str, datasets.Dataset], place: str, settings: Settings
) -> tuple[list[Measured], list[str], list[str]]:
    """One model on all splits, one line on each form in which it was loaded, and notes for the report's reader."""
    kinds = dict.fromkeys(_MODEL_OF.get(split.task, split.task) for split in suite.splits)
    found: dict[str, Measured] = {}
    models, notes = [], []
    for kind in kinds:
        evaluated = load_evaluated(place, kind, settings.device, settings.dtype, settings.revision)
        models.append(_described(evaluated))
        for split in suite.splits:
            if _MODEL_OF.get(split.task, split.task) == kind:
                found[split.name] = _measure_split(evaluated, split, rows.get(split.name), settings.batch_size)
                notes += _notes(evaluated, split, rows)
    return [found[split.name] for split in suite.splits], models, notes


def _notes(evaluated: Evaluated, split: SuiteSplit, rows: Mapping[str, datasets.Dataset]) -> list[str]:
    if split.task not in CLASSIFIERS or split.name not in rows:
        return []
    outputs = list(split.classes) or outputs_of(evaluated.model)
    if not taken_by_number(rows[split.name], split, outputs):
        return []
    taken = ", ".join(f"{number} for {name}" for number, name in enumerate(outputs[:10]))
    return [f"Split {split.name}: its classes are numbers that the model has no names for; taken were {taken}."]


def _measure_split(evaluated: Evaluated, split: SuiteSplit, rows: datasets.Dataset | None, batch_size: int) -> Measured:
    try:
        with torch.inference_mode():
            if rows is None:
                return measure_task(evaluated, split, batch_size)
            numbers = ROWS[split.task](evaluated, rows, split, batch_size)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"split {split.name!r} does not fit into the memory of {evaluated.device} with batch_size {batch_size}; "
            "lower it, or block_size in the suite"
        ) from error
    classes = evaluated.model.config.num_labels if split.task.endswith("classification") else 0
    groups = [] if split.group_column is None else [str(group) for group in rows[split.group_column]]
    return Measured(split, numbers, scorer_of(split, classes), groups)


def _read_baselines(paths: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"baseline {path} does not exist; name a report.json of `hf-momentum evaluate`")
        report = EvaluationReport.from_json(Path(path).read_text(encoding="utf-8"), path)
        # Two runs of one model are two baselines.
        name = report.model if report.model not in found else f"{report.model} ({path})"
        found[name] = report.values()
    return found


def _described(evaluated: Evaluated) -> str:
    device = evaluated.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{type(evaluated.model).__name__}, {evaluated.parameters:,} parameters, "
        f"{str(next(evaluated.model.parameters()).dtype).removeprefix('torch.')}, on {name}"
    )


def _facts(suite: Suite, models: Sequence[str], seconds: float, examples: int) -> dict[str, str]:
    """What ran and what it cost. Rates are named of a GPU only: those of a CPU say more about its other work."""
    gpu = torch.cuda.is_available() and "cpu" not in models[0].rpartition(" on ")[2]
    device = torch.device("cuda" if gpu else "cpu")
    facts = {
        "model": "; ".join(models),
        "suite": f"{suite.name}, {len(suite.splits)} splits" + (f": {suite.description}" if suite.description else ""),
        "time": f"{seconds:.1f} s for {examples:,} examples"
        + (f", {examples / seconds:.1f} per second" if gpu else ""),
        "peak memory": f"{peak_memory(device) / 2**20:.0f} MiB" + ("" if gpu else " of the process"),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("hf-momentum", "torch", "transformers", "datasets")
        )
        + f", Python {platform.python_version()}",
    }
    if any(split.source.startswith("stdlib:") for split in suite.splits):
        facts["corpus"] = f"standard library of Python {platform.python_version()}, fingerprint {corpus.fingerprint()}"
    return facts
