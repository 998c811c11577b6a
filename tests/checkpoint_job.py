"""A program for `accelerate launch`: trains a tiny Llama with saves on the way, and can kill one of its processes.

Beside every checkpoint it writes what the run truly held, gathered, as `truth-STEP.safetensors`; at the end
`facts.json`. The kill is a SIGKILL, so nothing gets a chance to clean up.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, default_data_collator, set_seed

from hf_momentum.errors import InputError
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.training import MomentumTrainer, MomentumTrainingArguments
from hf_momentum.training.tokenizer import byte_tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--save_total_limit", type=int)
    parser.add_argument("--resume")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--kill", help="step:N or save:N: process --kill_rank dies in step N, or while saving it")
    parser.add_argument("--kill_rank", type=int, default=1)
    return parser.parse_args()


def network(lora: bool, tied: bool) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer(32)),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    model.name_or_path = "a-base-model"
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def examples() -> list[dict]:
    """Sixteen related rows, so that the gradients of successive batches correlate."""
    tokenizer = byte_tokenizer(32)
    rows = [f"the old river runs {word} to the sea and on" for word in ("down", "up", "far", "near")] * 4
    ids = [tokenizer(row, truncation=True, max_length=32)["input_ids"][:32] for row in rows]
    return [{"input_ids": row, "labels": row} for row in ids]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Truth(TrainerCallback):
    """Writes the gathered weights after each save."""

    def __init__(self, trainer: MomentumTrainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_save(self, args, state, control, **kwargs) -> None:
        write_weights(self.trainer, self.folder / f"truth-{state.global_step}.safetensors")


def write_weights(trainer: MomentumTrainer, path: Path) -> None:
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        plain = {name: torch.as_tensor(value).detach().cpu().contiguous().clone() for name, value in weights.items()}
        save_file(plain, path)


def arm(trainer: MomentumTrainer, how: str) -> None:
    """Make this process die in the middle of an optimizer step, or between the files of a save."""
    where, step = how.split(":")
    if where == "step":

        class InMidStep(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs) -> None:
                if state.global_step + 1 == int(step):
                    base_optimizer(trainer.optimizer).step = lambda *args, **kwargs: die()

        trainer.add_callback(InMidStep())
        return
    save = trainer._save_rng_state

    def between_two_files(folder: str) -> None:
        if trainer.state.global_step == int(step):
            die()  # the weights and the optimizer are written, the random states and the trainer's state are not
        save(folder)

    trainer._save_rng_state = between_two_files


def main() -> None:
    options = parse()
    args = MomentumTrainingArguments(
        output_dir=str(options.output / "run"),
        optim=options.optim,
        learning_rate=0.05 if options.optim == "tam" else 1e-3,
        weight_decay=0.1,
        max_steps=options.steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    set_seed(0)
    trainer = MomentumTrainer(
        network(options.lora, options.tied),
        args,
        train_dataset=examples(),
        data_collator=default_data_collator,
        processing_class=byte_tokenizer(32),
    )
    trainer.add_callback(Truth(trainer, options.output))
    if options.kill and args.process_index == options.kill_rank:
        arm(trainer, options.kill)
    resume = {"true": True, None: None}.get(options.resume, options.resume)
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
        write_weights(trainer, options.output / "final.safetensors")
    except InputError as problem:
        error = str(problem)
    if trainer.is_world_process_zero():
        facts = {
            "processes": args.world_size,
            "distributed_type": args.distributed_state.distributed_type.value,
            "error": error,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        (options.output / "facts.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
