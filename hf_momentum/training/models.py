"""The model and tokenizer of a recipe: from the Hub, from a folder, or trained from scratch."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_momentum.errors import InputError
from hf_momentum.training.arguments import DataArguments, ModelArguments, MomentumTrainingArguments, PeftArguments
from hf_momentum.training.recipe import OFFLINE_RECIPE
from hf_momentum.training.scratch import scratch_model
from hf_momentum.training.sources import NETWORK_ERRORS


@dataclass(frozen=True)
class Base:
    """A tokenizer, and where its model is to be loaded from."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    from_scratch: bool


def load_base(model: ModelArguments, data: DataArguments, training: MomentumTrainingArguments) -> Base:
    """The base model's tokenizer and place; 'scratch' is trained here at its first use.

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
    tokenizer = _reaching(model, AutoTokenizer.from_pretrained, revision=model.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(model.model_name_or_path, tokenizer, from_scratch=False)


def load_model(
    base: Base, model: ModelArguments, peft: PeftArguments, classes: list[Any]
) -> PreTrainedModel | PeftModel:
    """The model to train, with adapters if the recipe asks for them.

    Raises:
        InputError: the model cannot be loaded, or an adapter's target does not exist.
    """
    options: dict[str, Any] = {"dtype": model.model_dtype}
    loader: Any = AutoModelForCausalLM
    if model.task == "sequence_classification":
        loader = AutoModelForSequenceClassification
        names = {index: str(label) for index, label in enumerate(classes)}
        options |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    if not base.from_scratch:
        options["revision"] = model.model_revision
    loaded = _reaching(model, loader.from_pretrained, base.path, **options)
    loaded.config.pad_token_id = base.tokenizer.pad_token_id
    if not peft.lora:
        return loaded
    targets = peft.lora_target_modules
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if model.task == "causal_lm" else TaskType.SEQ_CLS,
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=peft.lora_modules_to_save or None,
    )
    try:
        return get_peft_model(loaded, config)
    except ValueError as error:
        raise InputError(f"lora_target_modules {targets}: {' '.join(str(error).split())}") from error


def _reaching(model: ModelArguments, load: Any, place: str | None = None, **options: Any) -> Any:
    try:
        return load(place or model.model_name_or_path, **options)
    except (OSError, ValueError, *NETWORK_ERRORS) as error:
        raise InputError(
            f"model {model.model_name_or_path!r} is neither a folder here nor reachable on the Hub "
            f"({' '.join(str(error).split())[:160]}). Without a network, {OFFLINE_RECIPE} trains its own small model"
        ) from error
