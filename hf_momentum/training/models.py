"""The model of a recipe, and its tokenizer or image processor: from the Hub, from a folder, or trained from scratch."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from hf_momentum.errors import InputError
from hf_momentum.training.arguments import DataArguments, ModelArguments, MomentumTrainingArguments, PeftArguments
from hf_momentum.training.recipe import OFFLINE_RECIPE
from hf_momentum.training.scratch import scratch_model
from hf_momentum.training.sources import NETWORK_ERRORS

_CLASSES: Mapping[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "chat": AutoModelForCausalLM,
    "preference": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}


@dataclass(frozen=True)
class Base:
    """A tokenizer or image processor, and where its model is to be loaded from.

    Attributes:
        path: for `from_pretrained`.
        processor: the tokenizer; for pictures the image processor.
        from_scratch: whether the model was trained here.
        picture_mode: what pictures are converted to: "RGB", or "L" for a model with one channel.
    """

    path: str
    processor: Any
    from_scratch: bool
    picture_mode: str = "RGB"


def load_base(model: ModelArguments, data: DataArguments, training: MomentumTrainingArguments) -> Base:
    """The base model's place, and its tokenizer or image processor; 'scratch' is trained here at its first use.

    Raises:
        InputError: the model is neither a folder nor reachable on the Hub.
    """
    if model.model_name_or_path == "scratch":
        if model.task != "causal_lm":
            raise InputError(
                "model_name_or_path 'scratch' is a language model; name a pretrained model to classify with"
            )
        path = scratch_model(model, data, training)
        return Base(str(path), AutoTokenizer.from_pretrained(path), from_scratch=True)
    if model.task == "image_classification":
        processor = _reaching(model, AutoImageProcessor.from_pretrained, revision=model.model_revision)
        config = _reaching(model, AutoConfig.from_pretrained, revision=model.model_revision)
        mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        return Base(_place(model.model_name_or_path), processor, from_scratch=False, picture_mode=mode)
    tokenizer = _reaching(model, AutoTokenizer.from_pretrained, revision=model.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(_place(model.model_name_or_path), tokenizer, from_scratch=False)


def _place(name: str) -> str:
    """A folder's whole path: adapters name it, and "models/base", seen from elsewhere, could be one on the Hub."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def load_model(base: Base, model: ModelArguments, classes: Sequence[str]) -> PreTrainedModel:
    """The model to train, as it was saved, without adapters.

    Args:
        base: where it is.
        model: which class of model, and how it is held.
        classes: what a classifier's outputs are called, in their order.

    Raises:
        InputError: the model cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": model.model_dtype}
    if model.task.endswith("classification"):
        names = dict(enumerate(classes))
        options |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        # A head for other classes, as of ImageNet or SST-2, makes way for ours.
        options["ignore_mismatched_sizes"] = True
    if not base.from_scratch:
        options["revision"] = model.model_revision
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.load_in_4bit:
        options["quantization_config"] = _four_bits()
    loaded = _reaching(model, _CLASSES[model.task].from_pretrained, base.path, **options)
    if model.task != "image_classification":
        loaded.config.pad_token_id = base.processor.pad_token_id
    return loaded


def lora_config(model: ModelArguments, peft: PeftArguments) -> LoraConfig:
    """The adapters that a recipe asks for.

    Example:
        >>> lora_config(ModelArguments(), PeftArguments(lora=True)).target_modules
        'all-linear'
    """
    types = {"sequence_classification": TaskType.SEQ_CLS, "image_classification": None}
    # PEFT trains and saves the new head of a text classifier by itself; it knows no classifiers of pictures.
    own_head = ["classifier"] if model.task == "image_classification" else []
    return LoraConfig(
        task_type=types.get(model.task, TaskType.CAUSAL_LM),
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        # PEFT appends to the lists that it is given.
        target_modules="all-linear" if peft.lora_target_modules == ["all-linear"] else [*peft.lora_target_modules],
        modules_to_save=[*peft.lora_modules_to_save] or own_head or None,
    )


def with_adapters(
    loaded: PreTrainedModel, model: ModelArguments, peft: PeftArguments, checkpointing: bool = False
) -> PreTrainedModel | PeftModel:
    """The model with adapters, if the recipe asks for them.

    Raises:
        InputError: an adapter's target does not exist.
    """
    if not peft.lora:
        return loaded
    if model.load_in_4bit:
        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=checkpointing)
    try:
        return get_peft_model(loaded, lora_config(model, peft))
    except ValueError as error:
        targets = peft.lora_target_modules
        raise InputError(f"lora_target_modules {targets}: {' '.join(str(error).split())}") from error


def _four_bits() -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit needs bitsandbytes; run pip install 'hf-momentum[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _reaching(model: ModelArguments, load: Any, place: str | None = None, **options: Any) -> Any:
    try:
        return load(place or model.model_name_or_path, **options)
    except ImportError as error:  # how transformers says that a package is not there
        raise InputError(f"model {model.model_name_or_path!r} needs more: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, *NETWORK_ERRORS) as error:
        raise InputError(
            f"model {model.model_name_or_path!r} is neither a folder here nor reachable on the Hub "
            f"({' '.join(str(error).split())[:160]}). Without a network, {OFFLINE_RECIPE} trains its own small model"
        ) from error
