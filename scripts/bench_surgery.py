"""What gradient surgery costs: time of a whole Bloop step against two plain passes, and peak memory above a plain run.

    python scripts/bench_surgery.py --output docs/performance_surgery.json
    python scripts/bench_surgery.py --memory plain bloop       # each in a process of its own; also under a launcher

A Bloop step is two forward and backward passes, the surgery, and the optimizer's step. It is timed in turns with two
passes whose gradients are simply added, and the optimizer's step, in one process on one model. On a CPU the figures are
ratios; absolute times are for a GPU, which is named.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_momentum import TAM, BloopArguments, BloopTrainer, MomentumTrainer, MomentumTrainingArguments
from hf_momentum.sharding import WholeGradients
from hf_momentum.surgery import Settings, make_surgery

# The quickstart's model and batch, a GPT-2 of 98M parameters, and one in between for the memory.
SETTINGS: dict[str, dict[str, Any]] = {
    "quickstart": {"batch": 16, "length": 256, "rounds": 12},
    "quickstart, LoRA": {"batch": 16, "length": 256, "rounds": 12, "lora": True},
    "100M": {"batch": 8, "length": 128, "rounds": 5},
}


def model_of(name: str) -> Any:
    """A randomly initialised model; its weights do not change what a step costs."""
    torch.manual_seed(0)
    if name == "100M":
        return GPT2LMHeadModel(GPT2Config(vocab_size=16384, n_positions=256, n_embd=768, n_layer=12, n_head=12))
    if name == "memory":
        return GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=64, n_embd=640, n_layer=8, n_head=10))
    config = LlamaConfig(
        vocab_size=257, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6
    )
    model = LlamaForCausalLM(config)
    if not name.endswith("LoRA"):
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def timed(what: Callable[[], None], device: torch.device) -> float:
    """Seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, device: torch.device) -> dict[str, Any]:
    """Medians over the rounds, after two that do not count."""
    setting = SETTINGS[name]
    model = model_of(name).to(device)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = TAM(trained, lr=1e-3, max_grad_norm=1.0)
    gradients = WholeGradients(optimizer)
    surgery = make_surgery(optimizer, Settings(lam=(0.3,)), steps=100)
    tokens = torch.randint(model.config.vocab_size, (2, setting["batch"], setting["length"]), device=device)
    spent: list[float] = []

    def plain() -> None:
        for batch in tokens:
            model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def bloop() -> None:
        spent.append(0.0)
        for objective in surgery.sequence:
            loss = model(input_ids=tokens[objective], labels=tokens[objective]).loss
            (surgery.weight(objective) * loss).backward()
            spent[-1] += timed(lambda objective=objective: surgery.after(objective, gradients), device)
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {"plain": [], "bloop": []}
    for _ in range(2 + setting["rounds"]):
        times["plain"].append(timed(plain, device))
        times["bloop"].append(timed(bloop, device))
    both = {key: values[2:] for key, values in times.items()}
    ratios = [b / p for b, p in zip(both["bloop"], both["plain"], strict=True)]
    shares = [s / b for s, b in zip(spent[2:], both["bloop"], strict=True)]
    found = {
        "parameters": sum(param.numel() for param in trained),
        "tokens": setting["batch"] * setting["length"],
        "step over two plain passes and a step": quartiles(ratios),
        "surgery's part of the step": quartiles(shares),
    }
    if device.type == "cuda":
        found["milliseconds"] = {key: 1e3 * statistics.median(values) for key, values in both.items()}
    return found


def quartiles(values: list[float]) -> list[float]:
    """Median, and first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [round(x, 4) for x in (middle, low, high)]


def memory(kind: str, device: torch.device) -> None:
    """Train a few steps and print this process's peak and what its trained weights take, in MiB."""
    model = model_of("memory")
    rows = [{"input_ids": list(range(32)), "labels": list(range(32))} for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        args = MomentumTrainingArguments(
            output_dir=folder, optim="tam", max_steps=6, per_device_train_batch_size=1, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu" and not _sharded(), logging_steps=100,
        )  # fmt: skip
        trainer: MomentumTrainer
        if kind == "plain":
            trainer = MomentumTrainer(model, args, train_dataset=rows)
        else:
            bloop = BloopArguments(lam=[0.3], surgery=kind)
            trainer = BloopTrainer(model, args, train_dataset=rows, aux_train_dataset=rows, bloop=bloop)
        trainer.train()
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        size = sum(param.numel() for param in model_of("memory").parameters()) * 4 / 2**20
        if trainer.is_world_process_zero():
            facts = {"kind": kind, "peak": peak, "weights": size, "processes": args.world_size}
            print("MEMORY " + json.dumps(facts | {"layout": trainer.accelerator.distributed_type.value}), flush=True)


def _sharded() -> bool:
    import os

    return any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


def main() -> None:
    """Time everything, or measure the memory of the named kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--memory", nargs="*", metavar="KIND", help="plain, bloop, or a baseline, each in a process")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    known = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if known.kind:
        memory(known.kind, device)
        return
    if known.memory:
        for kind in known.memory:
            subprocess.run([sys.executable, __file__, "--kind", kind], check=True)
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    for setting in known.settings:
        found[setting] = measure(setting, device)
        print(setting, json.dumps(found[setting]), flush=True)
    if known.output:
        known.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
