"""One run from a recipe to a report: load, evaluate, train, evaluate, write."""

import importlib.metadata
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator, set_seed
from transformers.trainer_pt_utils import get_model_param_count

from hf_momentum.errors import InputError
from hf_momentum.evaluation import (
    Report,
    SplitResult,
    causal_lm_statistics,
    changes,
    estimates,
    metrics_of,
)
from hf_momentum.evaluation.scores import classification_rows
from hf_momentum.evaluation.suite import Suite
from hf_momentum.evaluation.writing import write_whole
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training import corpus, hub
from hf_momentum.training.arguments import TRL_TASKS, MomentumTrainingArguments
from hf_momentum.training.bloop import BloopTrainer
from hf_momentum.training.card import model_card, provenance
from hf_momentum.training.checkpoints import check_checkpoint, find_checkpoint
from hf_momentum.training.disk import full_disk_stops
from hf_momentum.training.models import Base, load_base, load_model, lora_config, with_adapters
from hf_momentum.training.processes import check_launch, layout
from hf_momentum.training.recipe import Recipe
from hf_momentum.training.replay import ReplayMixture
from hf_momentum.training.scrubbing import arguments_json
from hf_momentum.training.sources import Loader, Split
from hf_momentum.training.suite_rows import load_suite
from hf_momentum.training.suite_trainer import suite_datasets, suite_metrics
from hf_momentum.training.trainer import MomentumTrainer

_STATISTICS = {
    "causal_lm": causal_lm_statistics,
    "sequence_classification": classification_rows,
    "image_classification": classification_rows,
}

# Keys of a parameter group that a report leaves out: bookkeeping, or listed on their own.
_NOT_SHOWN = {"params", "param_names", "initial_lr", "weight_decay", "algorithm", "maximize", "index", "observed"}
_NOT_SHOWN |= {"momentum_schedule"}


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        report: the results; also in `folder/report.json`.
        folder: the output folder.
        is_main: whether this process is the one that wrote it.
    """

    report: Report
    folder: Path
    is_main: bool


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, loaded and ready to train.

    Attributes:
        trainer: `MomentumTrainer` or another with `MomentumMixin`, with model and data.
        train_split: the main training data.
        splits: what it is measured on.
        from_scratch: whether the base model was trained here, on bytes.
        checkpoint: the folder that it continues from, if any.
    """

    trainer: Any
    train_split: Split
    splits: list[Split]
    from_scratch: bool
    checkpoint: str | None


def prepare(recipe: Recipe) -> Prepared:
    """Load data and model of a recipe, and make its trainer.

    Everything that can be wrong with the input is looked at before the output folder is touched.

    Raises:
        InputError: data, model or checkpoint cannot be used as given.

    Example:
        >>> from hf_momentum.training import load_recipe
        >>> recipe = load_recipe("quickstart", ["--max_steps", "2"])  # then: prepare(recipe).trainer.train()
    """
    training = recipe.training
    state = training.distributed_state
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir, speak=state.is_main_process)
    if checkpoint is not None:
        name = str(getattr(training.optim, "value", training.optim))
        check_checkpoint(checkpoint, name, training.world_size, state.distributed_type.value, training.learning_rate)
    data = recipe.data
    suite = None
    if data.evaluation_suite is not None and training.eval_strategy != "no":  # without, its data are for nothing
        suite = load_suite(data.evaluation_suite, data.evaluation_sources, data.max_eval_examples)
    elif not (data.in_distribution or data.shifted or data.must_not_forget or data.auxiliary):
        raise InputError(
            "name at least one split to evaluate on: in_distribution, shifted, must_not_forget or auxiliary, or an "
            "evaluation_suite with an eval_strategy"
        )
    check_launch(state)
    _check_saving(training)
    training.label_names = ["labels"]
    if recipe.model.task == "image_classification":
        training.remove_unused_columns = False  # a picture becomes pixels only when it is read
    set_seed(training.seed)

    base = load_base(recipe.model, data, training)
    seed = training.seed if training.data_seed is None else training.data_seed
    loader = Loader(recipe.model.task, data, base.processor, seed, base.picture_mode)
    train_split, validation, splits = loader.training(), loader.validation(), loader.evaluation()
    auxiliaries = loader.auxiliaries(recipe.bloop.aux_dataset, recipe.bloop.max_aux_examples)
    if validation is None and suite is None and training.eval_strategy != "no":
        raise InputError("eval_strategy needs a validation_dataset or an evaluation_suite")
    set_seed(training.seed)
    model = load_model(base, recipe.model, loader.class_names)
    fields: dict[str, Any] = {
        "train_dataset": train_split.examples,
        "eval_dataset": validation.examples if validation else None,
        "processing_class": base.processor,
    }
    if recipe.model.task in TRL_TASKS:
        trainer = _trl_trainer(recipe, model, auxiliaries, fields)
        _check_left(train_split.source, trainer.train_dataset, training)
        splits = [_tokenized(trainer, split) for split in splits]
        return Prepared(trainer, train_split, splits, base.from_scratch, checkpoint)
    model = with_adapters(model, recipe.model, recipe.peft, checkpointing=_checkpointing(training))
    fields |= _measuring(recipe, base.processor)
    if suite is not None:
        fields |= _evaluated(suite, recipe, base, loader.class_names, validation)
    if recipe.bloop.surgery == "replay" and auxiliaries:
        # Mixed as the weighted sum of losses would be, in expectation and up to its scale.
        share = recipe.bloop.lam[0] / (1 + recipe.bloop.lam[0])
        fields["train_dataset"] = ReplayMixture(train_split.examples, auxiliaries[0].examples, share, seed)
        trainer = MomentumTrainer(model, training, **fields)
    elif auxiliaries or recipe.bloop.aux_loss is not None:
        trainer = BloopTrainer(model, training, **_two_objectives(recipe, auxiliaries), **fields)
    else:
        trainer = MomentumTrainer(model, training, **fields)
    return Prepared(trainer, train_split, splits, base.from_scratch, checkpoint)


def _checkpointing(training: MomentumTrainingArguments) -> bool:
    # transformers 5.23 has a new name for it, and moves the value there.
    return bool(vars(training).get("activation_checkpointing") or training.gradient_checkpointing)


def _trl_trainer(
    recipe: Recipe, model: PreTrainedModel, auxiliaries: Sequence[Split], fields: Mapping[str, Any]
) -> Any:
    """TRL's trainer for a chat or for preferences; it tokenizes, and adds the adapters by itself."""
    from hf_momentum.training import bloop_trl, trl_trainers

    chat, adapters = recipe.model.task == "chat", lora_config(recipe.model, recipe.peft) if recipe.peft.lora else None
    given = {**fields, "args": recipe.training, "peft_config": adapters}
    cls: Any = trl_trainers.MomentumSFTTrainer if chat else trl_trainers.MomentumDPOTrainer
    if auxiliaries or recipe.bloop.aux_loss is not None:
        cls = bloop_trl.BloopSFTTrainer if chat else bloop_trl.BloopDPOTrainer
        given |= _two_objectives(recipe, auxiliaries)
    with trl_trainers.refusals(f"task {recipe.model.task}"):
        return cls(model, **given)


def _tokenized(trainer: Any, split: Split) -> Split:
    from hf_momentum.training import trl_trainers

    with trl_trainers.refusals(f"dataset {split.source!r}"):
        made = replace(split, examples=trainer.prepare_split(split.examples, split.name))
    _check_left(split.source, made.examples, trainer.args)
    return made


def _check_left(source: str, examples: Any, training: Any) -> None:
    """TRL drops examples of which `max_length` leaves nothing to learn; here all of them."""
    if len(examples) == 0:
        raise InputError(
            f"dataset {source!r}: of no example is there an answer within max_length {training.max_length}; raise it"
        )


def _two_objectives(recipe: Recipe, auxiliaries: Sequence[Split]) -> dict[str, Any]:
    datasets = {split.name: split.examples for split in auxiliaries}
    return {"bloop": recipe.bloop, "aux_train_dataset": datasets or None}


def _measuring(recipe: Recipe, processor: Any) -> dict[str, Any]:
    """What a Trainer is given to make batches of a task, and to measure one row of sums for each example."""
    statistics = _STATISTICS[recipe.model.task]
    padded = recipe.model.task == "sequence_classification"
    return {
        "data_collator": DataCollatorWithPadding(processor) if padded else default_data_collator,
        "compute_metrics": lambda output: {
            name: float(metric(output.predictions.astype(np.float64).sum(0)))
            for name, metric in metrics_of(recipe.model.task, 1.0).items()
            if name == "accuracy"
        },
        "preprocess_logits_for_metrics": lambda logits, labels: statistics(
            logits[0] if isinstance(logits, tuple) else logits, labels
        ),
    }


def train(recipe: Recipe) -> Outcome:
    """Run a recipe.

    Raises:
        InputError: data, model or checkpoint cannot be used as given.
        TrainingStopped: the loss became NaN or infinite.

    Example:
        >>> from hf_momentum.training import load_recipe
        >>> recipe = load_recipe("quickstart", ["--max_steps", "2"])  # then: train(recipe)
    """
    training = recipe.training
    pushes = hub.before_training(training)
    prepared = prepare(recipe)
    trainer, splits = prepared.trainer, prepared.splits
    folder = Path(training.output_dir)
    started = time.perf_counter()
    before: list[np.ndarray] = []

    def measure_before() -> None:
        before.extend(measure(trainer, split, "before") for split in splits)

    if trainer.sharded:
        trainer.before_training = measure_before
    else:
        measure_before()
    with full_disk_stops(folder):
        if trainer.is_world_process_zero():  # now, so that the checkpoints of an interrupted run have them, too
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "recipe.yaml", recipe.to_yaml())
            write_whole(folder / "training_args.json", arguments_json(trainer.args))
        trainer.train(resume_from_checkpoint=prepared.checkpoint)
    after = [measure(trainer, split, "after") for split in splits]
    seconds = time.perf_counter() - started

    trainer.args.push_to_hub = False  # else transformers pushes here, before there is a report
    with full_disk_stops(folder):
        trainer.save_model()
    trainer.args.push_to_hub = pushes is not None
    results = [_result(recipe, *each) for each in zip(splits, before, after, strict=True)]
    base_model = None if prepared.from_scratch else recipe.model.model_name_or_path
    facts = _facts(recipe, trainer, prepared.train_split, seconds)
    report = Report(
        title=_title(recipe),
        unit=recipe.unit,
        splits=results,
        history=trainer.state.log_history,
        facts=facts | provenance(base_model, getattr(trainer.model.config, "_commit_hash", None)),
        recipe=recipe.to_yaml(),
        command=_command(recipe),
    )
    if trainer.is_world_process_zero():
        with full_disk_stops(folder):
            report.write(folder)
            pictures = [str(path.relative_to(folder)) for path in sorted((folder / "plots").glob("*.png"))]
            trainer.card = model_card(report, base_model, recipe.peft.lora, _optimizer(recipe), pictures)
            trainer.create_model_card()
        if pushes is not None:
            print(hub.push(pushes).url, flush=True)
    return Outcome(report, folder, trainer.is_world_process_zero())


def _evaluated(
    suite: Suite, recipe: Recipe, base: Base, outputs: Sequence[str], validation: Split | None
) -> dict[str, Any]:
    """What the trainer is given to evaluate a suite's splits, beside the validation data if there are any."""
    if suite.splits[0].task != recipe.model.task:
        raise InputError(
            f"evaluation_suite {suite.name} is for {suite.splits[0].task}, and the recipe's task is {recipe.model.task}"
        )
    splits = suite_datasets(suite, base.processor, outputs, recipe.data.block_size, base.picture_mode)
    metrics, counted = suite_metrics(suite, len(outputs))
    return {
        "eval_dataset": splits if validation is None else {"validation": validation.examples, **splits},
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": counted,
    }


def _check_saving(training: MomentumTrainingArguments) -> None:
    """Refuse a ZeRO-3 launch whose weights could not be written at the end."""
    if training.deepspeed_plugin is None:
        return
    zero = training.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise InputError(
            "zero3_save_16bit_model is off, so the run would end without a model.safetensors; put "
            "zero3_save_16bit_model: true under deepspeed_config of the launcher's file (in a DeepSpeed JSON file: "
            "stage3_gather_16bit_weights_on_model_save under zero_optimization)"
        )


def measure(trainer: Any, split: Split, when: str) -> np.ndarray:
    """[examples, columns] statistics of the task, gathered over all processes, in the order of the examples."""
    output = trainer.predict(split.examples, metric_key_prefix=f"{when}_{split.name}")
    return np.asarray(output.predictions, dtype=np.float64)


def _result(recipe: Recipe, split: Split, before: np.ndarray, after: np.ndarray) -> SplitResult:
    metrics = metrics_of(recipe.model.task, split.bytes_per_token)
    return SplitResult(
        name=split.name,
        role=split.role,
        source=split.source,
        examples=len(split.examples),
        before=estimates(before, metrics),
        after=estimates(after, metrics),
        change=changes(before, after, metrics),
    )


def _optimizer(recipe: Recipe) -> str:
    return str(getattr(recipe.training.optim, "value", recipe.training.optim))


def _title(recipe: Recipe) -> str:
    name = _optimizer(recipe)
    shown = OPTIMIZERS[name].cls.__name__ if name in OPTIMIZERS else name
    how = "LoRA" if recipe.peft.lora else "full"
    model = recipe.model.model_name_or_path
    # A path is a long story about one machine: its end says what it is.
    what = f"a small Llama trained on {recipe.model.scratch_dataset}" if model == "scratch" else _ending(model, 2)
    return f"{shown}, {how} fine-tuning on {_ending(recipe.data.train_dataset, 1)} of {what}"


def _ending(place: str, parts: int) -> str:
    path = Path(place)
    return str(Path(*path.parts[-parts:])) if path.is_absolute() else place


def _command(recipe: Recipe) -> str:
    return f"hf-momentum train --config {recipe.training.output_dir}/recipe.yaml"


def _facts(recipe: Recipe, trainer: Any, train_split: Split, seconds: float) -> dict[str, Any]:
    args, model = recipe.training, trainer.model
    trained, total = get_model_param_count(model, trainable_only=True), get_model_param_count(model)
    group = {
        key: value
        for key, value in trainer.optimizer.param_groups[0].items()
        if key not in _NOT_SHOWN and not isinstance(value, torch.Tensor)
    }
    group["lr"] = args.learning_rate
    per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    device = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{args.device.type}, {torch.get_num_threads()} threads"
    )
    facts = {
        "optimizer": f"`{_optimizer(recipe)}`: " + ", ".join(f"{key}={value}" for key, value in group.items()),
        "weight decay": args.weight_decay,
        "auxiliary objective": _surgery(recipe),
        "momentum schedule": " ".join(filter(None, [args.momentum_schedule, args.momentum_schedule_args])) or "none",
        "learning-rate schedule": f"{args.lr_scheduler_type.value}, {trainer.state.global_step} steps",
        "examples per step": per_step,
        "training examples": len(train_split.examples),
        "trained parameters": f"{trained:,} of {total:,}",
        "seed": args.seed,
        "processes": args.world_size,
        "layout": layout(trainer.accelerator),
        "device": device,
        "time": f"{seconds:.0f} s for training and evaluation",
        "peak memory": f"{peak_memory(args.device) / 2**20:.0f} MiB"
        + (" in the first process" if args.world_size > 1 else ""),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("hf-momentum", "torch", "transformers", "accelerate", "peft", *_also_ran(recipe))
        )
        + f", Python {platform.python_version()}",
    }
    if recipe.data.train_dataset.startswith("stdlib:"):
        facts["corpus"] = f"standard library of Python {platform.python_version()}, fingerprint {corpus.fingerprint()}"
    return facts


def _also_ran(recipe: Recipe) -> list[str]:
    """Packages that train only some runs."""
    trl = ["trl"] if recipe.model.task in TRL_TASKS else []
    return [*trl, *(["deepspeed"] if recipe.training.deepspeed_plugin is not None else [])]


def _surgery(recipe: Recipe) -> str:
    bloop = recipe.bloop
    what = [*bloop.aux_dataset, *([] if bloop.aux_loss is None else [bloop.aux_loss])]
    if not what:
        return "none"
    lam = ", ".join(f"{value:g}" for value in bloop.lam)
    rho = f", rho {bloop.rho}" if bloop.surgery == "bloop" else ""
    return f"{', '.join(what)}; {bloop.surgery}, lambda {lam}{rho}"


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held so far, in bytes: of the device if it is a GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def summary(outcome: Outcome) -> Sequence[str]:
    """The last lines that a person reads: what was learnt, and where the report lies."""
    return [
        *(sentence.replace("**", "") for sentence in outcome.report.sentences()),
        f"Report: {outcome.folder / 'report.md'} (and report.json, plots/, README.md as model card)",
    ]
