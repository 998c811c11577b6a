"""The model and tokenizer of a recipe: from the Hub, from a folder, or trained from scratch once and cached."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_momentum.errors import InputError
from hf_momentum.training import corpus
from hf_momentum.training.arguments import DataArguments, ModelArguments, MomentumTrainingArguments, PeftArguments
from hf_momentum.training.recipe import OFFLINE_RECIPE
from hf_momentum.training.sources import NETWORK_ERRORS, Loader
from hf_momentum.training.tokenizer import byte_tokenizer
from hf_momentum.training.trainer import MomentumTrainer

_HEAD = 32  # width of an attention head of 'scratch'


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


def scratch_model(model: ModelArguments, data: DataArguments, training: MomentumTrainingArguments) -> Path:
    """The folder of the small Llama over bytes, trained by AdamW on `scratch_dataset` if it is not cached yet.

    The cache is keyed on everything that shapes the weights, the text itself included.
    """
    recipe = {
        "dataset": model.scratch_dataset,
        "hidden_size": model.scratch_hidden_size,
        "layers": model.scratch_layers,
        "steps": model.scratch_steps,
        "batch_size": model.scratch_batch_size,
        "learning_rate": model.scratch_learning_rate,
        "block_size": data.block_size,
        "corpus": corpus.fingerprint() if model.scratch_dataset.startswith("stdlib:") else None,
        "version": 1,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(model.cache_dir).expanduser() / "scratch" / key
    if (folder / "config.json").is_file():
        return folder
    state = training.distributed_state
    if model.scratch_batch_size % training.world_size:
        raise InputError(
            f"scratch_batch_size {model.scratch_batch_size} cannot be shared by {training.world_size} processes"
        )
    if state.is_main_process:
        print(f"Training the small base model on {model.scratch_dataset}, once; it is kept in {folder}", flush=True)
    tokenizer = byte_tokenizer(data.block_size)
    # The whole of scratch_dataset, whatever limits the recipe sets for fine-tuning.
    source = DataArguments(train_dataset=model.scratch_dataset, block_size=data.block_size)
    examples = Loader("causal_lm", source, tokenizer, seed=0).training().examples
    work = folder.with_name(folder.name + ".partial")
    args = MomentumTrainingArguments(
        output_dir=str(work),
        optim="adamw_torch",
        learning_rate=model.scratch_learning_rate,
        weight_decay=0.01,
        adam_beta2=0.99,
        lr_scheduler_type="cosine",
        warmup_steps=max(model.scratch_steps // 20, 1),
        max_steps=model.scratch_steps,
        per_device_train_batch_size=model.scratch_batch_size // training.world_size,
        logging_steps=max(model.scratch_steps // 10, 1),
        save_strategy="no",
        report_to="none",
        seed=0,
        data_seed=0,
        use_cpu=training.use_cpu,
        bf16=training.bf16,
        disable_tqdm=training.disable_tqdm,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.scratch_hidden_size,
            intermediate_size=model.scratch_hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=model.scratch_layers,
            num_attention_heads=model.scratch_hidden_size // _HEAD,
            max_position_embeddings=data.block_size,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = MomentumTrainer(
        network, args, train_dataset=examples, data_collator=default_data_collator, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    if state.is_main_process:
        (work / "scratch.json").write_text(json.dumps(recipe, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    state.wait_for_everyone()
    return folder
