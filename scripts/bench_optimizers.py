"""Time complete optimizer steps against torch's own, on the CPU: `make bench`.

Every optimizer steps in one process on the same gradients, in an order that rotates from round to round, and is
compared with torch's optimizer in the same round: on a shared machine only such ratios mean anything. Medians and
quartiles of the paired ratios go to standard output and, with `--output`, to a JSON file.

    python scripts/bench_optimizers.py --shapes gpt2 --rounds 21 --output bench.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_momentum.integrations.registry import OPTIMIZERS

# What each optimizer is measured against, and the ratio that it should not exceed, for large and for small tensors.
TARGETS = {
    "tam": ("adamw", 1.05, 0.70),
    "adatamw": ("adamw", 1.30, 0.70),
    "vradam": ("adamw", 1.30, 0.70),
    "ahb_sgd": ("adamw", 1.10, 0.70),
    "critical_sgd": ("sgd", 1.02, 1.02),
    "critical_adamw": ("adamw", 1.02, 1.02),
}


def gpt2_shapes(width: int = 512, layers: int = 21) -> list[tuple[int, ...]]:
    """The tensors of a GPT-2 of about 92M parameters and 256 tensors.

    Example:
        >>> sum(torch.Size(shape).numel() for shape in gpt2_shapes()) // 10**6
        92
    """
    layer = [
        *[(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *layer * layers, (width,), (width,)]


def lora_shapes(width: int = 768, rank: int = 16, pairs: int = 200) -> list[tuple[int, ...]]:
    """400 adapters of 12k elements each.

    Example:
        >>> len(lora_shapes()), torch.Size(lora_shapes()[0]).numel()
        (400, 12288)
    """
    return [(rank, width), (width, rank)] * pairs


def build(name: str, params: list[torch.nn.Parameter], fused: bool | None) -> torch.optim.Optimizer:
    """An optimizer by its name: one of the registry, `adamw` or `sgd`."""
    if name == "adamw":
        return torch.optim.AdamW(params, lr=1e-4, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params, lr=1e-4, momentum=0.9, fused=True)
    return OPTIMIZERS[name].cls(params, lr=1e-4, fused=fused)


def measure(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; the order rotates, and the warm-up rounds are left out.

    Example:
        >>> sorted(measure({"a": lambda: None, "b": lambda: None}, rounds=2, warmup=1))
        ['a', 'b']
    """
    names, times = list(runs), {name: [] for name in runs}
    for number in range(warmup + rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            begin = clock()
            runs[name]()
            if number >= warmup:
                times[name].append(1e3 * (clock() - begin))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        [2.0, 3.0, 4.0]
    """
    return [round(x, 4) for x in statistics.quantiles(values, n=4, method="inclusive")]


def bench(shapes: list[tuple[int, ...]], names: Sequence[str], args: argparse.Namespace) -> dict[str, dict]:
    """One table: for each name milliseconds and the ratio to its baseline; `clip+adamw` is what Trainer's users run."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    grads = [torch.randn(shape, generator=generator).to(dtype).mul_(1e-3) for shape in shapes]
    runs: dict[str, Callable[[], object]] = {}

    def prepare(name: str) -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad  # shared: no optimizer here writes to gradients, and memory is what is measured
        return build(name, params, args.fused)

    baselines = ["adamw", "sgd"] if dtype == torch.float32 else ["adamw"]  # fused SGD is wrong in half precision
    for name in [*baselines, *names]:
        runs[name] = prepare(name).step
    adamw = prepare("adamw")

    def clip_and_step() -> None:
        parameters: list[Tensor] = adamw.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        adamw.step()

    runs["clip+adamw"] = clip_and_step
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = measure(runs, args.rounds, args.warmup, clock)
    table = {}
    for name, values in times.items():
        against = TARGETS.get(name, ("adamw",))[0]
        against = against if against in runs else "adamw"
        ratios = [ours / theirs for ours, theirs in zip(values, times[against], strict=True)]
        table[name] = {"ms": quartiles(values), "against": against, "ratio": quartiles(ratios)}
    return table


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=("gpt2", "lora", "both"), default="both")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(TARGETS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the time of this process alone; on a busy machine, with --threads 1",
    )
    parser.add_argument("--foreach", dest="fused", action="store_const", const=False, default=None)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": args.threads,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "clock": "process" if args.cpu_time else "wall",
    }
    for shapes, column in (("gpt2", 1), ("lora", 2)):
        if args.shapes not in (shapes, "both"):
            continue
        table = bench(gpt2_shapes() if shapes == "gpt2" else lora_shapes(), args.optimizers, args)
        results[shapes] = table
        print(f"\n{shapes}: ms and ratio to torch's fused optimizer, median (quartiles)")
        for name, row in table.items():
            (low, median, high), (_, ms, _) = row["ratio"], row["ms"]
            goal = f"  target {TARGETS[name][column]:.2f}" if name in TARGETS else ""
            print(f"{name:16s} {ms:9.2f} ms   {median:5.3f} ({low:.3f}-{high:.3f}) of {row['against']}{goal}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
