"""Tokens per second of whole Trainer steps, by `--optim` name: `make bench-training`.

Each name trains a model and a Trainer of its own on random tokens, all in one process, in blocks of steps whose order
rotates from round to round; the first steps of a block are not counted. A ratio is formed between blocks of one round.

    python scripts/bench_training.py --rounds 5 --output docs/performance_training_cpu.json
    python scripts/bench_training.py --device cuda --dtype bfloat16 --width 768 --layers 12 --length 1024

A name with `+layers` behind it also logs its layer groups, every ten steps: what that costs is

    python scripts/bench_training.py --optimizers adamw_torch_fused+layers
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_optimizers import cpu_name, measure, paired_ratios, quartiles, state_bytes
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, default_data_collator

from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.training import MomentumTrainer, MomentumTrainingArguments

BASELINE = "adamw_torch_fused"
TARGET = 0.99  # of the baseline's tokens per second, on a GPU
TARGETED = ("tam", "adatamw")


class RandomTokens(torch.utils.data.Dataset):
    """Examples of random tokens, the same at every call.

    Example:
        >>> RandomTokens(2, length=4, vocabulary=10)[0]["input_ids"].shape
        torch.Size([4])
    """

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(vocabulary, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class BlockClock(TrainerCallback):
    """Measures the seconds from the end of the last warm-up step to the end of the last step of a block.

    Everything that a step of training is lies between: loading a batch, forward, backward, clipping, the optimizer,
    callbacks. The device has finished its work at both ends.

    Args:
        warmup: the steps that are not counted, at least 1.
        steps: all steps of the block.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self._warmup, self._steps, self._begin, self.seconds = warmup, steps, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock after the two steps."""
        if state.global_step not in (self._warmup, self._steps):
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        if state.global_step == self._warmup:
            self._begin = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self._begin


def trainer_for(
    name: str, model: GPT2LMHeadModel, data: RandomTokens, folder: str, args: argparse.Namespace
) -> tuple[MomentumTrainer, BlockClock]:
    """A Trainer that runs one block at each call of `train`, and the clock in it."""
    optim, _, extra = name.partition("+")
    training = MomentumTrainingArguments(
        output_dir=folder,
        optim=optim,
        learning_rate=1e-5,  # the same for all, and so small that nothing diverges
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.batch,
        max_grad_norm=args.max_grad_norm,  # inside the step for our names, as MomentumTrainer has it
        lr_scheduler_type="constant",
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        logging_strategy="steps" if extra == "layers" else "no",
        logging_steps=10,
        log_layers=extra == "layers",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=args.device == "cuda",
    )
    clock = BlockClock(args.warmup, args.warmup + args.steps)
    trainer = MomentumTrainer(
        copy.deepcopy(model),
        training,
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    return trainer, clock


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all names; the JSON record."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=args.vocabulary,
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=max(args.width // 64, 1),
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    data = RandomTokens((args.warmup + args.steps) * args.batch, args.length, args.vocabulary)
    names = list(dict.fromkeys([BASELINE, *args.optimizers]))
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = {name: trainer_for(name, model, data, f"{folder}/{name}", args) for name in names}

        def block(name: str) -> Callable[[], float]:
            trainer, clock = pairs[name]

            def run() -> float:
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                trainer.train()
                if args.device == "cuda":
                    # Above what all models and states hold; from the second block on this one's state is among them.
                    peaks[name] = torch.cuda.max_memory_allocated() - before
                return 1e3 * clock.seconds

            return run

        # A call also prepares and ends the training; the time is what the clock inside it saw.
        runs = {name: block(name) for name in names}
        times = measure(runs, args.rounds, 1, timer=lambda run: {"ms": run()})
        kept = {name: state_bytes(base_optimizer(trainer.optimizer)) for name, (trainer, _) in pairs.items()}
    tokens = args.steps * args.batch * args.length
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        speeds = [1e3 * tokens / ms for ms in times[name]["ms"]]
        rows[name] = {"tokens_per_second": quartiles(speeds), "state_bytes": kept[name]}
        if name in peaks:
            # Weights and state of this name alone, and the gradients and activations of its block.
            rows[name]["peak_bytes"] = peaks[name] + kept[name] + sum(4 * p.numel() for p in model.parameters())
        if name != BASELINE:
            # Tokens per second over the baseline's are the baseline's time over ours.
            rows[name]["against"] = BASELINE
            rows[name]["ratio"] = paired_ratios(times[BASELINE]["ms"], times[name]["ms"])
            if args.device == "cuda" and name in TARGETED:
                rows[name] |= {"target": TARGET, "at_least": True}
    facts = {
        "processor": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "parameters": model.num_parameters(),
        "width": args.width,
        "layers": args.layers,
        "vocabulary": args.vocabulary,
        "batch": args.batch,
        "length": args.length,
        "max_grad_norm": args.max_grad_norm,
        "steps": args.steps,
        "rounds": args.rounds,
    }
    return {"facts": facts, "rows": rows}


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--optimizers", nargs="+", default=["tam", "adatamw", "vradam", "ahb_sgd"], metavar="NAME")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    found.add_argument("--width", type=int, default=256)
    found.add_argument("--layers", type=int, default=6)
    found.add_argument("--vocabulary", type=int, default=8192)
    found.add_argument("--length", type=int, default=128)
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--max-grad-norm", type=float, default=1.0)
    found.add_argument("--steps", type=int, default=10, help="counted steps of a block")
    found.add_argument("--warmup", type=int, default=2, help="steps of a block that are not counted")
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--output", type=Path, help="JSON file")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    args = parser().parse_args(argv)
    if args.warmup < 1:
        parser().error(f"--warmup must be at least 1, got {args.warmup}: the first step of a block makes state")
    torch.set_num_threads(args.threads)
    results = bench(args)
    facts = results["facts"]
    print(f"\n{facts['parameters'] / 1e6:.1f}M parameters, {args.batch} x {args.length} tokens a step, {args.dtype}")
    for name, line in results["rows"].items():
        text = f"{name:20s} {line['tokens_per_second'][1]:12,.0f} tokens/s"
        if "ratio" in line:
            low, median, high = line["ratio"]
            text += f"   {median:.3f} ({low:.3f}-{high:.3f}) of {BASELINE}"
        if "target" in line:
            text += f"  target >= {line['target']:.2f}"
        print(text)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
