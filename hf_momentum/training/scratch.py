"""The base model 'scratch': a small Llama over bytes, trained once and cached."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_momentum.errors import InputError, TrainingStopped
from hf_momentum.training import corpus
from hf_momentum.training.arguments import DataArguments, ModelArguments, MomentumTrainingArguments
from hf_momentum.training.processes import environment_of_one_process, launched_for
from hf_momentum.training.sources import Loader
from hf_momentum.training.tokenizer import byte_tokenizer
from hf_momentum.training.trainer import MomentumTrainer

_HEAD = 32  # width of an attention head

# What the machine decides of the training; the rest is fixed or in ModelArguments.
_TRAINING_FIELDS = ("use_cpu", "bf16", "disable_tqdm")


def scratch_model(model: ModelArguments, data: DataArguments, training: MomentumTrainingArguments) -> Path:
    """The folder of the small Llama over bytes, trained by AdamW on `scratch_dataset` if it is not cached yet.

    The cache is keyed on everything that shapes the weights, the text itself included. Under DDP all processes train
    it together. Where the launch shards models, a process of its own trains it while the others wait, so that it is
    the model that a launch of one process makes, to the bit.

    Raises:
        InputError: the batch cannot be shared by the processes.
        TrainingStopped: the process that trained it failed; it has said why.

    Example:
        >>> model = ModelArguments(scratch_steps=300)  # then: scratch_model(model, DataArguments(), training)
    """
    recipe = _recipe(model, data)
    folder = _folder(model, recipe)
    state, made = training.distributed_state, folder / "config.json"
    if not made.is_file() and state.is_main_process:
        print(f"Training the small base model on {model.scratch_dataset}, once; it is kept in {folder}", flush=True)
    if launched_for() is None:
        if not made.is_file():
            _train(model, data, training, folder)
        return folder
    # The first process of the run, then the first of every machine that does not see the first one's folder. All wait,
    # whatever they saw: a late process may find the model made already.
    for trains in (state.is_main_process, state.is_local_main_process):
        if trains and not made.is_file():
            _train_in_a_process_of_its_own(model, data, training)
        state.wait_for_everyone()
    return folder


def _recipe(model: ModelArguments, data: DataArguments) -> dict[str, object]:
    return {
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


def _folder(model: ModelArguments, recipe: dict[str, object]) -> Path:
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return Path(model.cache_dir).expanduser() / "scratch" / key


def _train(model: ModelArguments, data: DataArguments, training: MomentumTrainingArguments, folder: Path) -> None:
    state = training.distributed_state
    if model.scratch_batch_size % training.world_size:
        raise InputError(
            f"scratch_batch_size {model.scratch_batch_size} cannot be shared by {training.world_size} processes"
        )
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
        **{name: getattr(training, name) for name in _TRAINING_FIELDS},
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
        (work / "scratch.json").write_text(json.dumps(_recipe(model, data), indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    state.wait_for_everyone()


def _train_in_a_process_of_its_own(
    model: ModelArguments, data: DataArguments, training: MomentumTrainingArguments
) -> None:
    told = {
        "model": dataclasses.asdict(model),
        "data": {"block_size": data.block_size},
        "training": {name: getattr(training, name) for name in _TRAINING_FIELDS},
    }
    result = subprocess.run(
        [sys.executable, "-m", "hf_momentum.training.scratch", json.dumps(told)],
        env=environment_of_one_process(training.device),
    )
    if result.returncode != 0:
        raise TrainingStopped(
            f"the process that trained the small base model ended with status {result.returncode}; its messages "
            "stand above"
        )


def main() -> None:
    """Train the model that the one argument (JSON, from `scratch_model` of a launched process) describes."""
    told = json.loads(sys.argv[1])
    model, data = ModelArguments(**told["model"]), DataArguments(**told["data"])
    folder = _folder(model, _recipe(model, data))
    try:
        _train(model, data, MomentumTrainingArguments(output_dir=str(folder), **told["training"]), folder)
    except (InputError, TrainingStopped) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
