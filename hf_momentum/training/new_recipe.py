"""A recipe for somebody's own model and data, with the reason of each value beside it."""

import contextlib
import importlib.util
import json
import math
import re
import shlex
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoConfig, AutoTokenizer

from hf_momentum.errors import InputError
from hf_momentum.evaluation.writing import write_whole
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training.arguments import TRL_TASKS
from hf_momentum.training.fitting import LORA_R, Fit, fit, sizes_of
from hf_momentum.training.hardware import Hardware, operations_per_second
from hf_momentum.training.look import Choose, Look, check_labels, check_texts, lengths, look_at, open_data, percentile
from hf_momentum.training.memory import Size, minutes
from hf_momentum.training.parting import Parts, parts_of, write_parts
from hf_momentum.training.recipe import Recipe, load_recipe, split_name
from hf_momentum.training.sources import Source
from hf_momentum.training.words import duration

# A model that is small enough to begin with.
SUGGESTED = {
    "sequence_classification": "sentence-transformers/all-MiniLM-L6-v2",
    "image_classification": "microsoft/resnet-18",
    "causal_lm": "HuggingFaceTB/SmolLM2-135M",
    "chat": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "preference": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
TASKS = tuple(SUGGESTED)

_LOADERS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_BATCH = {"sequence_classification": 32, "image_classification": 64, "causal_lm": 16, "chat": 16, "preference": 16}

# Longest input by default; a model that takes less has its own limit.
_LONGEST = {"sequence_classification": 512, "causal_lm": 1024, "chat": 1024, "preference": 1024}

# AdamW's learning rate to start from: all weights, adapters. Preferences are learnt with far smaller ones.
_ADAM = {"preference": (1e-6, 1e-5)}
_ADAM_ELSE = (5e-5, 2e-4)

# Of docs/which_optimizer.md: times AdamW's; SGD-like ones times SGD's with momentum, which is taken as 0.01, or 0.5 for
# adapters, whose second factor starts at zero.
_TIMES_ADAM = {"adatam": 0.2, "adatamw": 0.2}
_TIMES_SGD = {"tam": 2.0, "ahb_sgd": 1.0, "vrmomentum": 10.0, "sgd": 1.0}
_SGD = (0.01, 0.5)

# What is put into test rows, to see what faults cost.
_FAULTS = {
    "sequence_classification": ("typos",),
    "causal_lm": ("typos",),
    "image_classification": ("gaussian_noise", "blur"),
}

_EPOCHS = 3
# A classifier's new head starts from nothing: few rows are read more often, until it has had so many steps.
_STEPS_OF_A_HEAD, _MOST_EPOCHS = 150, 20
_PATIENCE_MINUTES = 30


@dataclass(frozen=True)
class Wish:
    """What the user said, and None where it is to be found out.

    Attributes:
        data: SOURCE without a split.
        model: a Hub name or a folder.
        task: of recipes.
        text_column: name of a column.
        label_column: name of a column.
        image_column: name of a column.
        optim: as in `--optim`.
        lora: True for adapters, False for all weights.
        shifted: NAME=SOURCE@SPLIT of other distributions.
        test: SOURCE@SPLIT, in place of a part of the data.
        out: the recipe's file.
    """

    data: str
    model: str | None = None
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    optim: str = "adamw_torch"
    lora: bool | None = None
    shifted: Sequence[str] = ()
    test: str | None = None
    out: Path = Path("my_recipe.yaml")


@dataclass(frozen=True)
class Proposal:
    """A recipe that can be written.

    Attributes:
        out: where.
        text: the YAML.
        parts: which rows train, validate and test.
        look: what the data are for.
        model: the model's name.
        fit: the settings for memory.
        hardware: where it would run.
        rows: of the training split.
        minutes: of the training on one device; None where it is not known.
        suite: the YAML of a suite to evaluate on; empty for a task that suites do not have.
        notes: what the user should know.
    """

    out: Path
    text: str
    parts: Parts
    look: Look
    model: str
    fit: Fit
    hardware: Hardware
    rows: int
    minutes: float | None
    suite: str = ""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def suite_file(self) -> Path:
        """Beside the recipe."""
        return self.out.with_name(f"{self.out.stem}_suite.yaml")

    def written(self) -> list[Path]:
        """All files that `write` makes."""
        return [self.out, *([self.suite_file] if self.suite else []), *self.parts.files]

    def write(self, force: bool = False) -> Recipe:
        """Write the recipe, and the files of its splits; the recipe is loaded first, as `train` would.

        Raises:
            InputError: a file is there already and `force` is not given, or the recipe would not load.
        """
        for path in self.written():
            if path.exists() and not force:
                raise InputError(f"{path} exists; give another name with --out, or --force to write over it")
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / self.out.name
            trial.write_text(self.text, encoding="utf-8")
            with warnings.catch_warnings():
                # transformers renames gradient_checkpointing in 6; the oldest version that is supported has this name.
                warnings.simplefilter("ignore", FutureWarning)
                recipe = load_recipe(str(trial))
        write_parts(self.parts.files)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.out, self.text)
        if self.suite:
            write_whole(self.suite_file, self.suite)
        return recipe

    def next_command(self) -> str:
        """What to type next."""
        several = f" --accelerate_config ddp --num_processes {self.hardware.count}" if self.hardware.count > 1 else ""
        return f"hf-momentum train --config {shlex.quote(str(self.out))}{several}"

    def then_command(self) -> str:
        """And what after that: empty for a task without a suite."""
        if not self.suite:
            return ""
        made = _output_dir(self.out)
        places = ["--model", made, "--suite", str(self.suite_file), "--output_dir", f"{made}_evaluation"]
        return shlex.join(["hf-momentum", "evaluate", *places])

    def lines(self) -> list[str]:
        """What was found and chosen, for people."""
        memory = f", {self.fit.memory}" if self.fit.memory else ""
        how = "LoRA adapters" if self.fit.lora else "all weights"
        time = "" if self.minutes is None else f"; about {duration(self.minutes * 60)} of training (computed)"
        return [
            f"Data: {self.look.task}, because {self.look.why}; {self.rows:,} rows to train on",
            f"Splits: {self.parts.train} to train, {self.parts.validation} to watch, {self.parts.test} to test",
            f"Model: {self.model}, {how}{memory}{time}",
            f"Machine: {self.hardware}",
            *(f"Note: {note}" for note in self.notes),
            f"Recipe: {self.out}" + (f", and a suite to evaluate on: {self.suite_file}" if self.suite else ""),
            f"Next: {self.next_command()}",
            *([f"Then: {self.then_command()}"] if self.suite else []),
        ]


def propose(wish: Wish, hardware: Hardware, choose: Choose) -> Proposal:
    """Look at the data, the model and the machine, and compose a recipe. Nothing is written.

    Args:
        wish: what the user said.
        hardware: where it will run.
        choose: asked where the data leave more than one answer; `look.refuse` to ask nobody.

    Raises:
        InputError: the data or a name cannot be used.
    """
    data = open_data(wish.data)
    look = look_at(data["train"], choose, wish.task, wish.text_column, wish.label_column, wish.image_column)
    if look.task not in TASKS:
        raise InputError(f"--task {look.task!r} is not known; accepted: {', '.join(TASKS)}")
    if look.label:
        check_labels(data["train"], look.label, "train")
    if look.text:
        check_texts(data["train"], look.text, "train")
    if wish.test is not None:
        data = {**data, "test": _like_training("--test", wish.test, data["train"], look)}
    parts = parts_of(wish.data, data, look, wish.out.with_name(f"{wish.out.stem}_data"))
    if wish.test is not None:
        parts = Parts(parts.train, parts.validation, wish.test, parts.files, parts.notes)
    taken = ["test", *_FAULTS.get(look.task, ())]  # in the recipe and in the suite
    for name, source in map(split_name, wish.shifted):
        if name in taken:
            raise InputError(f"--shifted {name}={source}: a split is called {name} already; choose another name")
        taken.append(name)
        _like_training(f"--shifted {name}", source, data["train"], look)
    model = wish.model or SUGGESTED[look.task]
    notes = [*parts.notes]
    if wish.model is None:
        notes.append(f"no --model was given; {model} is a small one to begin with")
    config, tokenizer, trouble = _read_model(model, look.task)
    if trouble:
        notes.append(trouble)
    if _has_messages(data["train"], look) and tokenizer and not tokenizer.chat_template:
        notes.append(f"{model} has no chat template; set chat_template_path to a model that has one")
    rows = _training_rows(parts, data)
    words = lengths(look.sequences(data["train"], tokenizer), tokenizer)
    length, why = _block(look.task, words, config, tokenizer is not None, len(data["train"]))
    tokens = round(sum(words) / len(words) * rows) if words else rows * _patches(config)
    examples = max(1, tokens // length) if look.task == "causal_lm" else rows
    sizes, checkpoints = ({}, True) if config is None else sizes_of(config, loader_of(look.task))
    batch = _batch(look.task, examples)
    pair = 2 if look.task == "preference" else 1  # both sides of it are in memory at once
    lora = wish.lora
    if lora is None and not sizes and (config is not None or look.task == "image_classification"):
        lora = False  # most likely a convolutional network, which has no layers that adapters are put on
    chosen = fit(
        sizes,
        hardware,
        optim=wish.optim,
        batch=batch,
        length=pair * (length or _patches(config)),
        lora=lora,
        checkpoints=checkpoints,
        four_bits=importlib.util.find_spec("bitsandbytes") is not None and wish.lora is not False,
    )
    if chosen.note:
        notes.append(chosen.note)
    if model == "scratch":  # small enough for any machine
        chosen = Fit(bool(wish.lora), batch, 1)
    pace = _minutes_per_epoch(sizes.get(chosen.lora), hardware, pair * tokens, chosen)
    text, total = _compose(wish, look, parts, model, chosen, hardware, examples, (length, why), pace)
    return Proposal(wish.out, text, parts, look, model, chosen, hardware, rows, total, _suite(wish, look, parts), notes)


# ---- looking --------------------------------------------------------------------------------------------------------


def _check_columns(rows: datasets.Dataset, look: Look, place: str | None) -> None:
    for column in filter(None, (look.text, look.label, look.image)):
        if column not in rows.features:
            raise InputError(
                f"{place} has no column {column!r}; it has {', '.join(rows.features)}. Every split must have the "
                "columns of the training data: rename it there"
            )


def _like_training(flag: str, source: str, train: datasets.Dataset, look: Look) -> datasets.Dataset:
    """Other rows than the training data, with its columns and labels."""
    rows = Source.parse(source).load()
    _check_columns(rows, look, source)
    if look.text:
        check_texts(rows, look.text, source)
    if look.label:
        unknown = set(check_labels(rows, look.label, source)) - set(train[look.label])
        if unknown:
            some = ", ".join(repr(value) for value in sorted(unknown, key=str)[:3])
            raise InputError(f"{flag}: its labels {some} are not in the training data; rename them there")
    return rows


def _has_messages(rows: datasets.Dataset, look: Look) -> bool:
    """Whether it is for a chat template to write them."""
    return look.task in TRL_TASKS and any(
        isinstance(rows[0][name], list)
        for name in ("messages", "conversations", "chosen", "completion")
        if name in rows[0]
    )


def _read_model(model: str, task: str) -> tuple[Any, Any, str]:
    """Config and tokenizer, None where they cannot be had, and then why, in words."""
    if model == "scratch":
        if task != "causal_lm":
            raise InputError("--model scratch is a language model; name a pretrained model for this task")
        return None, None, ""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        if Path(model).is_dir():
            raise InputError(f"--model {model}: {' '.join(str(error).split())[:200]}") from error
        return (
            None,
            None,
            (
                f"the config of {model} could not be read ({type(error).__name__}): no such model, or no network. "
                "Settings are for a model of unknown size; give the command again with a network, or name a folder"
            ),
        )
    with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
        return config, AutoTokenizer.from_pretrained(model), ""
    return config, None, ""


def loader_of(task: str) -> Any:
    """transformers' Auto class of a task.

    Example:
        >>> loader_of("chat").__name__
        'AutoModelForCausalLM'
    """
    return getattr(transformers, _LOADERS.get(task, "AutoModelForCausalLM"))


def _training_rows(parts: Parts, data: Mapping[str, datasets.Dataset]) -> int:
    """Rows that `parts.train` will give, from its percentage or its file."""
    for path, rows in parts.files.items():
        if parts.train.startswith(str(path)):
            return len(rows)
    percent = re.search(r"\[:(\d+)%\]$", parts.train)
    return round(len(data["train"]) * (int(percent.group(1)) if percent else 100) / 100)


def _batch(task: str, rows: int) -> int:
    """Examples of a step: smaller where there would be too few steps to learn in."""
    batch = _BATCH[task]
    while batch > 4 and rows * _EPOCHS / batch < 60:
        batch //= 2
    return batch


def _epochs(task: str, rows: int, batch: int) -> int:
    """How often the training rows are read."""
    if not task.endswith("classification"):
        return _EPOCHS
    return max(_EPOCHS, min(_MOST_EPOCHS, math.ceil(_STEPS_OF_A_HEAD * batch / max(rows, 1))))


def _block(task: str, words: Sequence[int], config: Any, exact: bool, rows: int) -> tuple[int, str]:
    """Tokens of an example at most, and why; 0 for pictures."""
    if task == "image_classification":
        return 0, ""
    limit = _LONGEST[task]
    positions = None if config is None else config.to_dict().get("max_position_embeddings")
    if positions:
        limit = min(limit, positions)
    counted = "tokens" if exact else "tokens (guessed from words)"
    if task == "causal_lm":
        # A tenth of the text is a test split, which should hold some blocks.
        total = sum(words) * max(1, rows // max(len(words), 1))
        block = max(32, min(limit, 2 ** int(math.log2(max(total / 10 / 8, 1)))))
        return block, f"texts are joined and cut into blocks; about {total:,} {counted} in all"
    most = percentile(words, 0.95)
    roomy = most if exact else most * 1.5
    block = min(limit, max(32, math.ceil(roomy / 32) * 32))
    return block, f"95 of 100 examples have at most {most} {counted}; longer ones are cut"


def _patches(config: Any) -> int:
    """Tokens of a picture for a vision transformer; 200 where it is not known."""
    told = {} if config is None else config.to_dict()
    image, patch = told.get("image_size"), told.get("patch_size")
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) else 200


def _minutes_per_epoch(size: Size | None, hardware: Hardware, tokens: int, chosen: Fit) -> float | None:
    """On the CPU from its measured speed; on a GPU no honest figure is at hand without running."""
    if size is None or hardware.kind != "cpu" or tokens < 1:
        return None
    return minutes(size, tokens=tokens, peak=operations_per_second(), utilisation=0.5, again=chosen.checkpointing)


# ---- writing --------------------------------------------------------------------------------------------------------


def learning_rate(optim: str, task: str, lora: bool) -> tuple[float, str]:
    """A learning rate to start from, and where it comes from.

    Example:
        >>> learning_rate("adatamw", "causal_lm", lora=True)
        (4e-05, "0.2 x AdamW's 0.0002 for adapters")
        >>> learning_rate("tam", "sequence_classification", lora=False)[0]
        0.02
    """
    what = "adapters" if lora else "all weights"
    adam, sgd = _ADAM.get(task, _ADAM_ELSE)[lora], _SGD[lora]
    if optim == "critical_sgd":
        # (20 x SGD's)^2 has the same effective rate; above 1/4 its momentum 1 - 2 sqrt(lr) would be negative.
        rate = min((20 * sgd) ** 2, 0.25)
        return rate, f"(20 x SGD's {sgd:g} for {what}) squared, and at most 0.25, where its momentum is 0"
    if optim in _TIMES_SGD:
        return float(
            f"{_TIMES_SGD[optim] * sgd:.3g}"
        ), f"{_TIMES_SGD[optim]:g} x SGD's with momentum, {sgd:g} for {what}"
    times = _TIMES_ADAM.get(optim, 1.0)
    known = optim in OPTIMIZERS or "adam" in optim
    note = "" if known else f"; {optim} may want another"
    if times == 1:
        return adam, f"AdamW's for {what}{note}"
    return float(f"{times * adam:.3g}"), f"{times:g} x AdamW's {adam:g} for {what}"


@dataclass
class _Lines:
    """Lines of YAML, each value with its reason."""

    lines: list[str] = field(default_factory=list)

    def say(self, *comments: str) -> None:
        self.lines += ["", *(f"# {comment}" for comment in comments)]

    def put(self, key: str, value: Any, why: str = "") -> None:
        self.lines.append(f"{key}: {_yaml(value)}" + (f"  # {why}" if why else ""))


def _yaml(value: Any) -> str:
    """A value as YAML; a word that YAML could misread is put in quotes.

    Example:
        >>> _yaml("no"), _yaml(True), _yaml("a b.csv@train[:80%]"), _yaml(["x=a"]), _yaml(5e-5)
        ('"no"', 'true', '"a b.csv@train[:80%]"', '["x=a"]', '5e-05')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _READ_OTHERWISE:
        return value
    return json.dumps(value, ensure_ascii=False)


_READ_OTHERWISE = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


def _compose(
    wish: Wish,
    look: Look,
    parts: Parts,
    model: str,
    chosen: Fit,
    hardware: Hardware,
    examples: int,
    block: tuple[int, str],
    pace: float | None,
) -> tuple[str, float | None]:
    """The recipe's text, and the minutes that its training takes."""
    task = look.task
    made = _Lines(
        [f"# Written by `hf-momentum init` for {hardware}. Every value is a place to start from, none is tuned."]
    )
    made.lines += ["# Paths are relative to the folder in which the command runs."]
    made.say("What the model learns, and from what.")
    made.put("task", task, f"because {look.why}")
    made.put("model_name_or_path", model)
    if chosen.dtype != "float32":
        made.put("model_dtype", chosen.dtype, "half the memory of float32 weights")
    if chosen.four_bit:
        made.put("load_in_4bit", True, "frozen weights in 4 bits: nothing larger fits into memory")
    made.say("Splits. Test rows are never trained on.")
    made.put("train_dataset", parts.train, f"{examples:,} {'blocks' if task == 'causal_lm' else 'rows'}")
    made.put("validation_dataset", parts.validation, "looked at during training")
    made.put("in_distribution", [f"test={parts.test}"], "measured before and after")
    if wish.shifted:
        made.put("shifted", list(wish.shifted), "other distributions; the same columns and labels")
    for key, column in (("text_column", look.text), ("label_column", look.label), ("image_column", look.image)):
        if column:
            made.put(key, column)
    length, why = block
    if length:
        made.put("max_length" if task in ("chat", "preference") else "block_size", length, why)
    together = chosen.micro_batch * chosen.accumulation * hardware.count
    steps, epochs = math.ceil(examples / together), _epochs(task, examples, together)
    made.say("Method.")
    rate, reason = learning_rate(wish.optim, task, chosen.lora)
    made.put("optim", wish.optim, "" if wish.optim in OPTIMIZERS else "`hf-momentum optimizers` lists ours")
    if chosen.state_dtype:
        made.put("optim_args", f"state_dtype={chosen.state_dtype}", "less memory for the optimizer's state")
    made.put("learning_rate", rate, f"{reason}; `hf-momentum compare` tunes it")
    made.put("weight_decay", 0.0 if chosen.lora else 0.01)
    if task == "preference" and not chosen.lora:
        made.put("precompute_ref_log_probs", True, "once, so that no second model is held in memory")
    if chosen.lora:
        made.put("lora", True, "adapters instead of all weights")
        made.put("lora_r", LORA_R)
        made.put("lora_alpha", 2 * LORA_R)
    made.say(f"Length and memory, for {hardware}.")
    total = None if pace is None else pace * epochs
    if total is not None and total > _PATIENCE_MINUTES:
        most = max(20, int(steps * _PATIENCE_MINUTES / (total / epochs)))
        most = min(most, steps * epochs)
        made.put(
            "max_steps",
            most,
            f"about {_PATIENCE_MINUTES} minutes here; {epochs} times over all rows is {steps * epochs:,}",
        )
        made.put("eval_strategy", "steps")
        made.put("eval_steps", max(1, most // 4))
        made.put("save_strategy", "steps")
        made.put("save_steps", max(1, most // 4), "an interrupted run continues from there")
        total = total * most / (steps * epochs)
    else:
        made.put("num_train_epochs", epochs, "times over the training rows")
        made.put("eval_strategy", "epoch")
        made.put("save_strategy", "epoch", "an interrupted run continues from there")
    made.put("save_total_limit", 1)
    made.put("per_device_train_batch_size", chosen.micro_batch, _memory_words(chosen))
    made.put("per_device_eval_batch_size", max(chosen.micro_batch, 1))
    made.put("gradient_accumulation_steps", chosen.accumulation, f"{together} examples a step in all")
    trl = task in TRL_TASKS  # whose defaults are for GPUs, so they are set either way
    if chosen.checkpointing:
        made.put("gradient_checkpointing", True, "blocks are computed again in the backward pass, to save memory")
    elif trl:
        made.put("gradient_checkpointing", False, "there is memory enough without")
    if trl and not hardware.bf16:
        made.put("bf16", False, "this device has no fast bfloat16")
    if hardware.bf16:
        made.put("bf16", True, "mixed precision, which this device has")
    elif hardware.fp16:
        made.put("fp16", True, "mixed precision; this device has no bfloat16")
    made.put("lr_scheduler_type", "cosine")
    made.put("warmup_steps", 0.06, "of all steps")
    made.put("max_grad_norm", 1.0)
    made.put("logging_steps", max(1, steps // 20))
    if hardware.kind == "cpu":
        made.put("max_eval_examples", 1000, "of each split, for time's sake on a CPU")
    made.put("report_to", "none")
    made.put("seed", 0)
    made.put("output_dir", _output_dir(wish.out))
    return "\n".join(made.lines) + "\n", total


def _output_dir(out: Path) -> str:
    return f"outputs/{out.stem}"


def _suite(wish: Wish, look: Look, parts: Parts) -> str:
    """The test rows, the user's other data, and the test rows with faults put in, for `hf-momentum evaluate`."""
    if look.task not in _FAULTS:
        return ""
    made = _Lines([f"# Written by `hf-momentum init` beside {wish.out.name}: what the trained model is measured on."])
    made.put("task", look.task)
    for key, column in (("text_column", look.text), ("label_column", look.label), ("image_column", look.image)):
        if column:
            made.put(key, column)
    made.lines += ["splits:", f"  test: {{role: in_distribution, source: {_yaml(parts.test)}}}"]
    for name, source in map(split_name, wish.shifted):
        made.lines.append(f"  {_yaml(name)}: {{role: shifted, kind: domain, source: {_yaml(source)}}}")
    for fault in _FAULTS[look.task]:
        made.lines.append(f"  {fault}: {{role: shifted, of: test, corruption: {fault}, severities: [1, 3, 5]}}")
    return "\n".join(made.lines) + "\n"


def _memory_words(chosen: Fit) -> str:
    return str(chosen.memory) if chosen.memory else "small, since the model's size is not known"
