"""The command `hf-momentum repair`: retrain the layer groups that errors point to, and prove it on untouched data.

Three splits that have nothing in common: one to diagnose and train on, one to stop by and to choose the mixture of old
and new weights, and one that decides. The original model is never written to.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_momentum.diagnosis.diagnosis_report import FEW, DiagnosisReport
from hf_momentum.diagnosis.groups import LayerGroup, chosen_groups, layer_groups
from hf_momentum.diagnosis.leaks import cut, refuse_leaks
from hf_momentum.diagnosis.repair_report import RepairReport
from hf_momentum.diagnosis.results import Decision
from hf_momentum.diagnosis.verification import decide, verified
from hf_momentum.errors import InputError
from hf_momentum.evaluation.suite import CLASSIFIERS, Suite, SuiteSplit
from hf_momentum.evaluation.writing import write_whole
from hf_momentum.training.arguments import MomentumTrainingArguments
from hf_momentum.training.checkpoints import last_complete
from hf_momentum.training.diagnose import check as check_diagnosis
from hf_momentum.training.diagnose import diagnosed, facts_of, settings_of, split_of
from hf_momentum.training.evaluated import Evaluated, find_device, load_evaluated
from hf_momentum.training.examples import examples_of
from hf_momentum.training.job import peak_memory
from hf_momentum.training.predictions import Held, Predictions
from hf_momentum.training.processes import launched_processes
from hf_momentum.training.quiet import quiet
from hf_momentum.training.recipe import training_arguments
from hf_momentum.training.retrain import (
    Lessons,
    Trained,
    lessons,
    retrain,
    weights_to_train,
    with_lora,
)
from hf_momentum.training.samples import Data, Settings, model_task
from hf_momentum.training.suite_rows import load_rows, load_suite
from hf_momentum.training.words import listed, numbers

ROLLED_BACK = 3  # exit status
UNCHANGED = "No mixture of old and new weights gained anything on validation."

# What a repair writes over or removes.
_WRITTEN = ("model", "training", "diagnosis", "report.json", "runs.jsonl")

# What is trained with unless it is given: critically damped momentum, SGD's for pictures and Adam's for texts.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "image_classification": {"optim": "critical_sgd", "learning_rate": "0.01"},
    "": {"optim": "critical_adamw", "learning_rate": "5e-5"},
}
_COMMON = {
    "max_steps": "100",
    "eval_steps": "10",
    "per_device_train_batch_size": "16",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "5",
    "logging_steps": "10",
    "save_strategy": "steps",
    "save_steps": "10",
    "save_total_limit": "1",
    "report_to": "none",
}
# What a repair decides, and why it cannot be given.
_NOT_TO_GIVE = {
    "output_dir": "give the repair's --output_dir",
    "eval_strategy": "validation is measured every eval_steps",
    "load_best_model_at_end": "the best weights of validation are always taken",
    "resume_from_checkpoint": "the same command, given again, goes on by itself",
    "num_train_epochs": "give max_steps, which baselines can have, too",
    "push_to_hub": "push the repaired model when it was accepted",
    "hub_token": "it would stand in the report; set HF_TOKEN",
    "deepspeed": "a repair runs in one process",
    "fsdp": "a repair runs in one process",
}


@dataclass(frozen=True)
class Plan:
    """A repair, planned.

    Attributes:
        settings: of the diagnosis; its data are what is trained on.
        validation, test: the other two splits; None where `cut` makes all three from the data.
        cut: shares of the data for training, validation and test.
        others: splits on which nothing may be lost.
        layers: names or patterns of the groups to train, in place of a diagnosis.
        lora_r: rank of fresh adapters on just these groups; None to train the weights.
        replay: right predictions to train on for each error.
        distill: weight of the pull towards the old model on what it had right.
        patience: measurements of validation without a gain after which training ends; 0 for never.
        shares: of the new weights that are tried.
        alpha: of the decision.
        overrides: of TrainingArguments, as typed.
        folder: for all that is written.
        keep_checkpoints: of an accepted or rolled-back repair.
    """

    settings: Settings
    folder: str
    validation: SuiteSplit | None = None
    test: SuiteSplit | None = None
    cut: Sequence[float] = (0.5, 0.2, 0.3)
    others: Sequence[SuiteSplit] = ()
    layers: Sequence[str] = ()
    lora_r: int | None = None
    replay: float = 1.0
    distill: float = 0.0
    patience: int = 3
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    alpha: float = 0.05
    overrides: Sequence[str] = ()
    keep_checkpoints: bool = False

    def training(self, output_dir: str, **given: str) -> MomentumTrainingArguments:
        """The arguments of one training run.

        Raises:
            InputError: an override that a repair does not take, or that is wrong.
        """
        for word in self.overrides:
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            if word.startswith("--") and name in _NOT_TO_GIVE:
                raise InputError(f"--{name} is not for a repair; {_NOT_TO_GIVE[name]}")
        defaults = {**_COMMON, **_DEFAULTS.get(self.settings.data.task, _DEFAULTS[""]), "seed": str(self.settings.seed)}
        typed = [f"--{name}={value}" for name, value in defaults.items()]
        here = {"use_cpu": "true"} if self.settings.device == "cpu" else {}
        last = [f"--{name}={value}" for name, value in {"output_dir": output_dir, **here, **given}.items()]
        arguments = training_arguments([*typed, *self.overrides, *last])
        arguments.remove_unused_columns = False
        arguments.label_names = ["targets"]
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # else the Trainer copies the model to every GPU of the machine
        return arguments

    def digest(self) -> str:
        """A short name of all that shapes the training, so that another repair's checkpoints are not taken for its."""
        kept = {name: str(value) for name, value in vars(self).items() if name not in ("folder", "keep_checkpoints")}
        kept["version"] = importlib.metadata.version("hf-momentum")
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """The data of a repair, for one model.

    Attributes:
        data: to diagnose and train on.
        validation: to stop by.
        test: that decides.
        others: on which nothing may be lost.
    """

    data: Held
    validation: Held
    test: Held
    others: Sequence[Held] = field(default_factory=list)


def plan_of(given: Mapping[str, Any], overrides: Sequence[str]) -> Plan:
    """A repair from the command line's words.

    Raises:
        InputError: a value that is not accepted.

    Example:
        >>> given = {"model": "mine", "data": "a.csv", "task": "causal_lm", "output_dir": "out", "cut": "0.6,0.2,0.2"}
        >>> plan_of(given, ["--max_steps=5"]).cut
        [0.6, 0.2, 0.2]
    """
    settings = settings_of(given)
    task = settings.data.task
    others: list[SuiteSplit] = []
    if given.get("suite"):
        others = others_of(load_suite(given["suite"], given.get("source", ()), given.get("max_examples")), task)
    named = {
        name: split_of(name, given[name], task, given) for name in ("validation", "test") if given.get(name) is not None
    }
    same = ("lora_r", "replay", "distill", "patience", "alpha", "keep_checkpoints")
    lists = {name: numbers(name, given[name]) for name in ("cut", "shares") if name in given}
    plan = Plan(
        settings=settings,
        folder=given["output_dir"],
        others=others,
        layers=listed(given.get("layers", "")),
        overrides=list(overrides),
        **named,
        **lists,
        **{name: given[name] for name in same if name in given},
    )
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Raises:
        InputError: a value that is not accepted.

    Example:
        >>> check(Plan(Settings("mine", SuiteSplit("data", "in distribution")), "out", replay=-1.0))
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: replay must be at least 0, got -1.0
    """
    if launched_processes() > 1:
        raise InputError("a repair runs in one process; start it without a launcher")
    check_diagnosis(plan.settings)
    if (plan.validation is None) != (plan.test is None):
        lacking = "validation" if plan.validation is None else "test"
        raise InputError(f"give --{lacking}, too, or neither: then --cut makes three parts of the data")
    if len(plan.cut) != 3 or any(share <= 0 for share in plan.cut) or abs(sum(plan.cut) - 1) > 1e-9:
        shown = ",".join(map(str, plan.cut))
        raise InputError(
            f"cut must be three shares above 0 with the sum 1, for training, validation, test; got {shown}"
        )
    for name, value in (("replay", plan.replay), ("distill", plan.distill), ("patience", plan.patience)):
        if value < 0:
            raise InputError(f"{name} must be at least 0, got {value}")
    if not plan.shares or any(not 0 < share <= 1 for share in plan.shares):
        raise InputError(
            f"shares must be numbers above 0 and up to 1, got {', '.join(map(str, plan.shares)) or 'none'}"
        )
    if not 0 < plan.alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {plan.alpha}")
    if plan.lora_r is not None and plan.lora_r < 1:
        raise InputError(f"lora_r must be at least 1, got {plan.lora_r}")
    if find_device(plan.settings.device).index:
        raise InputError(
            f"device {plan.settings.device!r} is not the first, on which a Trainer trains; leave it out, and set "
            f"CUDA_VISIBLE_DEVICES={find_device(plan.settings.device).index}"
        )
    training = plan.training(plan.folder)
    steps = 1 if training.eval_steps is None else training.eval_steps
    if steps < 1 or steps != int(steps):
        raise InputError(f"eval_steps must be a whole number of at least 1, got {steps:g}")


# ---- data ------------------------------------------------------------------------------------------------------------


def load_splits(plan: Plan, evaluated: Evaluated) -> Splits:
    """Read all splits, cut one into three if there is only one, and see that they have nothing in common.

    Raises:
        InputError: data that cannot be used, or examples of one split in another.
    """
    data = plan.settings.data
    rows = load_rows(data)
    if plan.validation is None or plan.test is None:
        labels = rows[data.label_column] if data.task in CLASSIFIERS else None
        parts = [rows.select(part) for part in cut(contents(rows, data), labels, plan.cut, plan.settings.seed)]
        named = [replace(data, name=name) for name in ("data", "validation", "test")]
    else:
        named = [data, plan.validation, plan.test]
        parts = [rows, load_rows(plan.validation), load_rows(plan.test)]
        refuse_leaks({split.name: contents(part, split) for split, part in zip(named, parts, strict=True)})
    held = [Held(split, part, examples_of(evaluated, part, split)) for split, part in zip(named, parts, strict=True)]
    others = []
    for split in plan.others:
        other = load_rows(split)
        others.append(Held(split, other, examples_of(evaluated, other, split)))
    return Splits(held[0], held[1], held[2], others)


def contents(rows: datasets.Dataset, split: SuiteSplit) -> list[Any]:
    """What two splits must not share: texts, pictures, or prompts with their references."""
    if split.task == "image_classification":
        return list(rows[split.image_column])
    if split.task == "generation":
        pairs = zip(rows[split.prompt_column], rows[split.reference_column], strict=True)
        return [f"{prompt}\n{reference}" for prompt, reference in pairs]
    return [str(text) for text in rows[split.text_column]]


def others_of(suite: Suite, task: str) -> list[SuiteSplit]:
    """The splits of a suite that a repair can be held against.

    Raises:
        InputError: one is of another task, or is a task of lm-evaluation-harness.
    """
    for split in suite.splits:
        if split.lm_eval is not None or split.task != task:
            what = f"the lm_eval task {split.lm_eval}" if split.lm_eval else f"of task {split.task}"
            raise InputError(f"suite {suite.name}: split {split.name!r} is {what}; the model is repaired for {task}")
    return list(suite.splits)


# ---- the repair ------------------------------------------------------------------------------------------------------


def repair(plan: Plan, command: str = "") -> RepairReport:
    """Diagnose, retrain, verify, and keep the new model or not.

    Written to the folder: report.html, report.md, report.json and plots; diagnosis/ with its own report; and model/
    with the repaired model, if it is accepted. An interrupted repair goes on when it is called again as it was.

    Raises:
        InputError: model, data, groups or settings cannot be used as given; the folder holds another repair.

    Example:
        >>> repair  # then: repair(Plan(Settings("my-model", data), "outputs/repair")).decision.accepted
        <function repair ...
    """
    check(plan)
    folder = Path(plan.folder)
    claim(folder, plan)
    task, batch = plan.settings.data.task, plan.settings.batch_size
    evaluated = load_evaluated(
        plan.settings.model,
        model_task(task),
        plan.settings.device,
        "float32",
        plan.settings.revision,
        for_gradients=True,
    )
    splits = load_splits(plan, evaluated)
    started = time.perf_counter()
    before = splits.data.predictions(evaluated, batch)
    errors = sum(int((~one).sum()) for one in before.right)
    groups = layer_groups(evaluated.model, plan.settings.split, plan.settings.patterns)
    if errors == 0:
        return _nothing(plan, groups, folder, command)
    chosen = _chosen(plan, evaluated, splits, before, groups, folder, command)
    all_parameters = sum(group.numel for group in groups)
    measured = [splits.validation, splits.test, *splits.others]
    old = [held.predictions(evaluated, batch) for held in measured]
    if plan.lora_r is not None:
        evaluated = with_lora(evaluated, chosen, plan.lora_r, plan.settings.seed)
        chosen_now = chosen_groups(
            layer_groups(evaluated.model, plan.settings.split, plan.settings.patterns), [one.name for one in chosen]
        )
    else:
        chosen_now = chosen
    trained = Trained.of(evaluated.model, weights_to_train(chosen_now, evaluated.model))
    taught = lessons(splits.data, before, plan.replay, plan.settings.seed)
    training = plan.training(str(folder / "training"))
    with quiet():
        found = retrain(
            evaluated,
            trained,
            taught,
            splits.validation,
            old[0],
            training,
            plan.distill,
            plan.patience,
            plan.shares,
            keep=folder / "training",
            resume=_checkpoint(folder / "training"),
        )
    new = [held.predictions(evaluated, batch) for held in measured]
    roles = ["validation", "verification", *(held.split.role for held in splits.others)]
    checked = [
        verified(held.split.name, role, held.split.source, first.by_row(held.examples), second.by_row(held.examples))
        for held, role, first, second in zip(measured, roles, old, new, strict=True)
    ]
    decision = decide(checked[1], checked[2:], plan.alpha)
    if found.share == 0:
        decision = Decision(False, [UNCHANGED, *decision.reasons])
    shutil.rmtree(folder / "model", ignore_errors=True)
    if decision.accepted:
        with quiet():
            _save(evaluated, folder)
    report = RepairReport(
        model=plan.settings.model,
        task=task,
        unit="token" if task == "causal_lm" else "example",
        chosen=[group.name for group in chosen],
        groups=facts_of(groups),
        how="weights" if not any(".lora_" in name for name in trained.names) else "LoRA",
        trained_parameters=trained.numel,
        all_parameters=all_parameters,
        optimizer=_optimizer(training),
        steps=found.steps,
        stopped=found.stopped,
        errors=errors,
        replay=_replayed(taught, before),
        mixtures=found.mixtures,
        share=found.share,
        verification=checked[1],
        others=checked[2:],
        decision=decision,
        validation=checked[0],
        history=found.history,
        notes=_notes(plan, errors),
        facts=_facts(evaluated, time.perf_counter() - started, splits),
        command=command,
    )
    report.write(folder)
    if not plan.keep_checkpoints:
        shutil.rmtree(folder / "training", ignore_errors=True)
    return report


def claim(folder: Path, plan: Plan) -> None:
    """Note in the folder which repair it holds.

    Raises:
        InputError: it holds another one, or something else that would be written over.
    """
    if folder.exists() and folder.resolve() == Path(plan.settings.model).expanduser().resolve():
        raise InputError(f"output_dir {folder} is the model, which a repair does not change; name another --output_dir")
    note, written = folder / "repair.json", [name for name in _WRITTEN if (folder / name).exists()]
    same = note.is_file() and json.loads(note.read_text(encoding="utf-8")).get("digest") == plan.digest()
    if written and not same:
        what = "a repair with other settings" if note.is_file() else f"{written[0]}, which is of no repair"
        raise InputError(f"{folder} holds {what}; name another --output_dir, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps({"digest": plan.digest()}))


def _checkpoint(folder: Path) -> str | None:
    """Where an interrupted training of this repair goes on."""
    found = last_complete(folder, speak=False) if folder.is_dir() else None
    return None if found is None else str(found)


def _chosen(
    plan: Plan,
    evaluated: Evaluated,
    splits: Splits,
    before: Predictions,
    groups: Sequence[LayerGroup],
    folder: Path,
    command: str,
) -> list[LayerGroup]:
    """The groups to train: by name, or by a diagnosis of the training split, which is kept."""
    if plan.layers:
        return chosen_groups(groups, plan.layers)
    record = folder / "diagnosis" / "report.json"
    if record.is_file():
        names = DiagnosisReport.from_json(record.read_text(encoding="utf-8"), str(record)).chosen
        return [group for group in groups if group.name in names]
    written = None
    if plan.settings.data.task == "generation":
        written = np.array([bool(one.all()) for one in before.right]), None
    report, found = diagnosed(Data(evaluated, splits.data.examples, None, written), plan.settings, command)
    report.write(folder / "diagnosis")
    if found.compared is None:  # the diagnosis looks at half of a language model's windows for errors
        raise InputError("the diagnosis found no error in its half of the windows; name the groups with --layers")
    return [group for group in groups if group.name in report.chosen]


def _save(evaluated: Evaluated, folder: Path) -> None:
    """The repaired model, complete or not at all."""
    partial, place = folder / "model.partial", folder / "model"
    shutil.rmtree(partial, ignore_errors=True)
    evaluated.model.save_pretrained(partial)
    evaluated.processor.save_pretrained(partial)
    partial.rename(place)


def _replayed(taught: Lessons, before: Predictions) -> int:
    """How many right predictions were among the lessons."""
    if taught.task == "causal_lm":
        return sum(int((mask & taught.right[index]).sum()) for index, mask in taught.masks.items())
    return sum(int(taught.right[index]) for index in taught.indices)


def _optimizer(training: MomentumTrainingArguments) -> str:
    name = str(getattr(training.optim, "value", training.optim))
    arguments = f", {training.optim_args}" if training.optim_args else ""
    schedule = f", momentum schedule {training.momentum_schedule}" if training.momentum_schedule else ""
    return f"{name}, learning rate {training.learning_rate:g}{arguments}{schedule}"


def _notes(plan: Plan, errors: int) -> list[str]:
    notes = []
    if errors < FEW:
        notes.append(f"There were only {errors} errors to learn from.")
    if plan.validation is None:
        shares = ", ".join(f"{100 * share:g} %" for share in plan.cut)
        notes.append(f"The data were cut into training, validation and test ({shares}), like examples together.")
    if plan.distill:
        notes.append(f"The old model pulls at what it had right, with weight {plan.distill:g}.")
    return notes


def _nothing(plan: Plan, groups: Sequence[LayerGroup], folder: Path, command: str) -> RepairReport:
    report = RepairReport(
        model=plan.settings.model,
        task=plan.settings.data.task,
        unit="token" if plan.settings.data.task == "causal_lm" else "example",
        chosen=[],
        groups=facts_of(groups),
        how="weights",
        trained_parameters=0,
        all_parameters=sum(group.numel for group in groups),
        optimizer="none",
        steps=0,
        stopped="there is no error to learn from",
        errors=0,
        replay=0,
        mixtures=[],
        share=0.0,
        verification=None,
        others=[],
        decision=Decision(False, ["The model has every prediction of the data right."]),
        validation=None,
        command=command,
    )
    report.write(folder)
    return report


def _facts(evaluated: Evaluated, seconds: float, splits: Splits) -> dict[str, str]:
    device = evaluated.device
    sizes = {"training": splits.data, "validation": splits.validation, "test": splits.test}
    return {
        "model": f"{type(evaluated.model).__name__}, {evaluated.parameters:,} parameters",
        "rows": ", ".join(f"{len(held.rows):,} for {name}" for name, held in sizes.items()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "time": f"{seconds:.1f} s",
        "peak memory": f"{peak_memory(device) / 2**20:.0f} MiB" + ("" if device.type == "cuda" else " of the process"),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("hf-momentum", "torch", "transformers", "peft", "accelerate")
        )
        + f", Python {platform.python_version()}",
    }
