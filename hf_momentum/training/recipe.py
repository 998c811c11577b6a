"""A recipe: flat YAML over the argument dataclasses, with overrides from the command line.

Every scalar of the file is handed to transformers' own HfArgumentParser as if it had been typed after `--key`, so a
file and a command line mean the same: `5e-5` is a number and `no` is the word, which plain YAML reads otherwise.
"""

import dataclasses
import json
import re
from argparse import Action, ArgumentError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import yaml
from transformers import HfArgumentParser
from transformers.trainer_optimizer import is_optimizer_factory

from hf_momentum.errors import InputError
from hf_momentum.evaluation.suite import refuse_repeated_keys
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.registry import nearest
from hf_momentum.integrations.transformers_hook import keyword_arguments
from hf_momentum.optim.momentum_laws import momentum_key
from hf_momentum.surgery import Settings, weights_of
from hf_momentum.training.arguments import (
    TRL_TASKS,
    BloopArguments,
    DataArguments,
    ModelArguments,
    MomentumTrainingArguments,
    PeftArguments,
)
from hf_momentum.training.bloop import parse_rho
from hf_momentum.training.trainer import MomentumTrainer

OFFLINE_RECIPE = "recipes/quickstart.yaml"

# What others call it, where the nearest spelling would lead astray.
_OUR_WORDS = {
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "max_length": "block_size",
    "max_seq_length": "block_size",
    "dataset": "train_dataset",
    "eval_dataset": "validation_dataset",
    "test_dataset": "in_distribution",
    "betas": "optim_args",
    "gamma": "optim_args",
}


@dataclass(frozen=True)
class Recipe:
    """Everything one run needs, validated.

    Attributes:
        name: the file's name without its ending, or "custom".
        given: the fields that the file and the command line set, as text; what a rerun needs.
    """

    name: str
    given: dict[str, Any]
    model: ModelArguments
    data: DataArguments
    peft: PeftArguments
    bloop: BloopArguments
    training: MomentumTrainingArguments

    @property
    def unit(self) -> str:
        """What one prediction is: "example", "byte" or "token"."""
        if self.model.task == "chat":
            return "token"
        if self.model.task != "causal_lm":
            return "example"
        return "byte" if self.model.model_name_or_path == "scratch" else "token"

    def to_yaml(self) -> str:
        """The recipe as flat YAML, overrides included."""
        # Whole lines: a path with spaces that was folded would not be known again.
        return yaml.dump(self.given, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class _PlainDumper(yaml.SafeDumper):
    """Writes every word as it was typed: nothing needs quotes where no scalar has a type."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class RecipeParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line with the nearest accepted word."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError where argparse would print its whole usage and exit."""
        raise InputError(message)

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = nearest(str(value), choices)
            listed = (
                f"; our own: {', '.join(OPTIMIZERS)}" if action.dest == "optim" else f"; accepted: {', '.join(choices)}"
            )
            raise ArgumentError(action, f"{value!r} is not accepted{hint}{listed}")


def dataclasses_of(task: str = "causal_lm") -> tuple[Any, ...]:
    """The dataclasses whose fields a recipe of that task has.

    Raises:
        InputError: it is TRL's, and TRL is not installed.

    Example:
        >>> [cls.__name__ for cls in dataclasses_of()][-1]
        'MomentumTrainingArguments'
    """
    training: Any = MomentumTrainingArguments
    if task in TRL_TASKS:
        try:
            from hf_momentum.training import trl_trainers
        except ImportError as error:
            raise InputError(
                f"task {task} is trained by TRL, which cannot be imported ({_one_line(error)}); run "
                "pip install 'hf-momentum[trl]'"
            ) from error
        training = trl_trainers.MomentumSFTConfig if task == "chat" else trl_trainers.MomentumDPOConfig
    return (ModelArguments, DataArguments, PeftArguments, BloopArguments, training)


def parser(task: str = "causal_lm") -> RecipeParser:
    """The parser of all recipe fields; its `format_help` documents each.

    Example:
        >>> parser().parse_args_into_dataclasses(["--output_dir", "out", "--lora_r", "4", "--use_cpu"])[2].lora_r
        4
    """
    return RecipeParser(dataclasses_of(task), prog="hf-momentum train", allow_abbrev=False)


def training_arguments(words: Sequence[str]) -> MomentumTrainingArguments:
    """The Trainer's arguments alone, as typed.

    Raises:
        InputError: an unknown argument, a value that does not fit, an optimizer argument out of range.

    Example:
        >>> training_arguments(["--output_dir=out", "--optim=tam", "--optim_args=gamma=0.8", "--use_cpu"]).optim_args
        'gamma=0.8'
    """
    made = RecipeParser([MomentumTrainingArguments], allow_abbrev=False)
    try:
        arguments, unknown = made.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(_one_line(error)) from error
    if unknown:
        names = [field.name for field in dataclasses.fields(MomentumTrainingArguments) if field.init]
        flag = unknown[0].removeprefix("--").partition("=")[0].replace("-", "_")
        raise InputError(f"unknown argument {unknown[0].partition('=')[0]!r}{_meant(flag, names)}")
    _check_training(arguments)
    return arguments


def load_recipe(config: str | None = None, overrides: Sequence[str] = (), others: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--key value` overrides.

    Args:
        config: a path, or the name of a recipe inside the package such as "quickstart"; None for overrides alone.
        overrides: as typed on the command line.
        others: names of the command's other options, one of which may have been meant.

    Raises:
        InputError: no such file, not YAML, an unknown or repeated key, a value that does not fit its field, an
            optimizer argument out of range.

    Example:
        >>> load_recipe("quickstart").data.must_not_forget
        ['prose=stdlib:prose@test']
    """
    name, words, entries = ("custom", {}, {}) if config is None else _read(config)
    task = str(_overridden(overrides).get("task", entries.get("task", "causal_lm")))
    fields = {field.name: field for cls in dataclasses_of(task) for field in dataclasses.fields(cls) if field.init}
    typed: list[str] = []
    for key, value in entries.items():
        if key not in fields:
            raise InputError(f"{config}: unknown key {key!r}{_meant(key, fields)}")
        typed += _as_typed(config, fields[key], value)
    typed += list(overrides)
    try:
        *arguments, unknown = parser(task).parse_args_into_dataclasses(
            typed, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        where = f"{config}: " if config else ""
        raise InputError(f"{where}{_one_line(error)}") from error
    if unknown:
        flag = unknown[0].removeprefix("--").partition("=")[0].replace("-", "_")
        raise InputError(f"unknown argument {unknown[0].partition('=')[0]!r}{_meant(flag, [*others, *fields])}")
    given = {**words, **_overridden(overrides)}
    given.pop("resume_from_checkpoint", None)  # how this run came about, not what it is
    given.pop("hub_token", None)  # a recipe is written to files that others read
    recipe = Recipe(name, given, *arguments)
    _check(recipe)
    return recipe


def _meant(name: str, fields: Iterable[str]) -> str:
    """As `nearest`, for a field of a recipe."""
    return f" (did you mean {_OUR_WORDS[name]!r}?)" if name in _OUR_WORDS else nearest(name, fields)


def _read(config: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name of the recipe, its entries as written, and its entries as they are to be typed."""
    path = find_recipe(config)
    try:
        text = path.read_text(encoding="utf-8")
        words = yaml.load(text, Loader=_Words)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{config} is not YAML: {_one_line(error)}") from error
    if not isinstance(words, dict) or not all(isinstance(key, str) for key in words):
        raise InputError(f"{config} is not a recipe: expected lines of `key: value`, got {type(values).__name__}")
    # Nested values (such as lr_scheduler_kwargs) keep YAML's types; scalars stay as they are written.
    entries = {
        key: values[key] if isinstance(word, dict) or values[key] is None else word for key, word in words.items()
    }
    return path.stem, words, entries


class _Words(yaml.BaseLoader):
    """Leaves every scalar as written, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        refuse_repeated_keys(node)
        return super().construct_mapping(node, deep)


def split_name(entry: str) -> tuple[str, str]:
    """NAME and SOURCE@SPLIT of an entry that names a split.

    Raises:
        InputError: a part is missing.

    Example:
        >>> split_name("prose=stdlib:prose@test")
        ('prose', 'stdlib:prose@test')
    """
    name, separator, source = entry.partition("=")
    if not separator or not name or not source:
        raise InputError(f"{entry!r} does not name a split; write NAME=SOURCE@SPLIT")
    return name, source


def find_recipe(config: str) -> Path:
    """The file that `--config` means: a path, or a recipe shipped with the package, by name.

    Raises:
        InputError: neither exists; the message lists the shipped names.

    Example:
        >>> find_recipe("quickstart").name
        'quickstart.yaml'
    """
    return find_shipped(config, "recipes", "recipe")


def find_shipped(name: str, folder: str, what: str) -> Path:
    """A YAML file by its path, or by its name inside a folder that travels with the package.

    Raises:
        InputError: neither exists; the message says `what` was looked for and lists the shipped names.

    Example:
        >>> find_shipped("zero3", "accelerate_configs", "accelerate_config").name
        'zero3.yaml'
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_folder(folder)
    by_name = {str(path.relative_to(shipped).with_suffix("")): path for path in sorted(shipped.rglob("*.yaml"))}
    wanted = name.removeprefix(f"{folder}/").removesuffix(".yaml")
    if wanted in by_name:
        return by_name[wanted]
    raise InputError(f"no {what} {name!r}{nearest(wanted, by_name)}; shipped: {', '.join(by_name)}")


def shipped_folder(name: str) -> Path:
    """A folder that travels inside the wheel, or stands at the top of a source checkout.

    Example:
        >>> shipped_folder("recipes").is_dir()
        True
    """
    inside = Path(str(resources.files("hf_momentum"))) / name
    return inside if inside.is_dir() else inside.parent.parent / name


def _as_typed(config: str | None, field: dataclasses.Field[Any], value: Any) -> list[str]:
    if value is None:
        if field.default is not None:
            raise InputError(f"{config}: {field.name} may not be empty; leave the line out for its default")
        return []
    if isinstance(value, dict):
        return [f"--{field.name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{field.name}", *map(str, value)]
    return [f"--{field.name}={value}"]


def _overridden(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides as entries of a recipe, for the record."""
    entries: dict[str, Any] = {}
    key = None
    for word in overrides:
        if word.startswith("--"):
            key, separator, value = word.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            entries[key] = value if separator else "true"
        elif key is not None:
            before = entries[key]
            entries[key] = word if before == "true" else [*before, word] if isinstance(before, list) else [before, word]
    return entries


def _check(recipe: Recipe) -> None:
    _check_training(recipe.training)
    _check_surgery(recipe)
    at_least_one = {
        "aux_batch_size": recipe.bloop.aux_batch_size,
        "max_aux_examples": recipe.bloop.max_aux_examples,
        "block_size": recipe.data.block_size,
        "max_train_examples": recipe.data.max_train_examples,
        "max_eval_examples": recipe.data.max_eval_examples,
        "lora_r": recipe.peft.lora_r,
        "lora_alpha": recipe.peft.lora_alpha,
        "scratch_layers": recipe.model.scratch_layers,
        "scratch_steps": recipe.model.scratch_steps,
        "scratch_batch_size": recipe.model.scratch_batch_size,
    }
    for field, value in at_least_one.items():
        if value is not None and value < 1:
            raise InputError(f"{field} must be at least 1, got {value}")
    if recipe.model.scratch_hidden_size < 32 or recipe.model.scratch_hidden_size % 32:
        raise InputError(f"scratch_hidden_size must be a multiple of 32, got {recipe.model.scratch_hidden_size}")
    if not 0 <= recipe.peft.lora_dropout < 1:
        raise InputError(f"lora_dropout must be in [0, 1), got {recipe.peft.lora_dropout}")
    if recipe.model.load_in_4bit and not recipe.peft.lora:
        raise InputError("load_in_4bit holds the model in weights that cannot be trained; set lora: true, too")
    if recipe.model.task in TRL_TASKS:
        _check_trl(recipe)


def _check_trl(recipe: Recipe) -> None:
    """Refuse what TRL's trainers would not be given."""
    task, bloop = recipe.model.task, recipe.bloop
    if recipe.model.model_name_or_path == "scratch":
        raise InputError(f"model_name_or_path 'scratch' knows no {task}; name a pretrained model")
    if vars(recipe.training).get("trust_remote_code"):  # TRL has it since its version 1
        raise InputError("trust_remote_code is not accepted: no code of a model's repository is run here")
    if vars(recipe.training).get("model_init_kwargs"):
        raise InputError("model_init_kwargs is not accepted; use model_dtype, model_revision and attn_implementation")
    if bloop.aux_dataset and bloop.surgery == "replay":
        raise InputError(f"surgery replay is not for task {task}; take mixed, or put the examples into one file")
    if recipe.data.evaluation_suite is not None:
        raise InputError(
            f"evaluation_suite is not for task {task}: name splits (in_distribution, shifted, must_not_forget), and "
            "run hf-momentum evaluate on the trained model"
        )


def _check_training(training: MomentumTrainingArguments) -> None:
    if training.optim in OPTIMIZERS:
        keyword_arguments(OPTIMIZERS[training.optim], training)
    if training.momentum_schedule is not None:
        _check_momentum(training)
    if training.learning_rate < 0:
        raise InputError(f"learning_rate must be at least 0, got {training.learning_rate}")


def _check_surgery(recipe: Recipe) -> None:
    """Refuse what a surgery cannot be told before anything is loaded."""
    bloop = recipe.bloop
    surgery = "mixed" if bloop.surgery == "replay" else bloop.surgery
    Settings(lam=tuple(bloop.lam), surgery=surgery, rho=parse_rho(bloop.rho))
    names = [split_name(entry)[0] for entry in bloop.aux_dataset]
    names += [] if bloop.aux_loss is None else [bloop.aux_loss]
    if names:
        weights_of(bloop.lam, names)
    if len(set(names)) < len(names):
        raise InputError(f"two auxiliaries have the same name: {', '.join(names)}")
    if bloop.surgery == "replay" and (len(bloop.aux_dataset) != 1 or bloop.aux_loss is not None):
        raise InputError("surgery replay mixes the examples of one aux_dataset among the main ones; give exactly one")


def _check_momentum(training: MomentumTrainingArguments) -> None:
    """Refuse a momentum schedule on an optimizer without momentum before anything is loaded."""
    cls, kwargs = MomentumTrainer.get_optimizer_cls_and_kwargs(training)
    if not is_optimizer_factory(cls):
        optimizer = cls([torch.zeros(1, requires_grad=True)], **kwargs)
        if momentum_key(optimizer.param_groups[0]) is None:
            raise InputError(
                f"momentum_schedule {training.momentum_schedule}: {cls.__name__} has neither momentum nor betas to "
                "schedule"
            )


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
