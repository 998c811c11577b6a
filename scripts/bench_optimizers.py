"""Time complete optimizer steps against torch's own: `make bench`.

All rows of a table are measured in one process on the same weights and gradients, in an order that rotates from round
to round, and each is compared with its baseline in the same round: on a shared machine only such ratios mean anything.
Medians and quartiles of the paired ratios go to standard output and, with --output and --plot, into a JSON file and a
picture. docs/performance.md says what each row means.

    python scripts/bench_optimizers.py --shapes gpt2 lora --rounds 21 --output docs/performance_cpu.json
    python scripts/bench_optimizers.py --device cuda --shapes llama-1b lora-1b --output docs/performance_cuda.json
    python scripts/bench_optimizers.py --scaling --tables     # only the scaling study

The tables:
    step    each rule against torch's fused optimizer
    clip    each rule that clips inside its step against clip_grad_norm_ and fused AdamW
    state   state kept in bfloat16 and int8 against float32 state of the same rule
    peers   other packages' optimizers, where they are installed
    surgery the passes of gradient surgery in one step against fused AdamW
"""

import argparse
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from bench_shapes import MODELS, Shapes, shapes_of
from torch import Tensor

from hf_momentum.integrations.registry import OPTIMIZERS
from hf_momentum.kernels import seeds
from hf_momentum.surgery import Passes

TABLES = ("step", "clip", "state", "peers", "surgery")

# What each rule is compared with, and the ratio to it that is the aim, by column: the device, then what is special.
BASELINES = {"critical_sgd": "sgd"}
TARGETS: dict[str, dict[str, float]] = {
    "tam": {"cpu": 1.05, "cpu lora": 0.70, "cpu clip": 0.65, "cuda": 1.10, "cuda clip": 0.75},
    "adatamw": {"cpu": 1.30, "cpu lora": 0.70, "cpu clip": 0.80, "cuda": 1.40, "cuda clip": 0.95},
    "vradam": {"cpu": 1.30, "cpu lora": 0.70, "cpu clip": 0.80, "cuda": 1.40, "cuda clip": 0.95},
    "ahb_sgd": {"cpu": 1.10, "cpu lora": 0.70, "cpu clip": 0.70, "cuda": 1.25, "cuda clip": 0.85},
    "critical_sgd": {"cpu": 1.02, "cpu lora": 1.02, "cuda": 1.02},
    "critical_adamw": {"cpu": 1.02, "cpu lora": 1.02, "cuda": 1.02},
}
# The same for sums and projection of a surgery, without what its average absorbs afterwards.
COMBINE_TARGETS = {"cpu": 0.85, "cpu lora": 0.50, "cuda": 1.00}
INT8_TARGET = 1.05  # against float32 state of the same rule
PEER_TARGET = 10.0  # how many times the public TAM's step should take of ours, on the CPU

CLIP_TO = 1.0
LR = 1e-4

Params = list[torch.nn.Parameter]
Build = Callable[[Params], torch.optim.Optimizer]
Run = Callable[[], Any]
Timer = Callable[[Run], dict[str, float]]


# ---- measuring -------------------------------------------------------------------------------------------------------


def clock_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """A timer of one call by a clock of the host, for work that ends with the call.

    Example:
        >>> ticks = iter([1.0, 1.5])
        >>> clock_timer(lambda: next(ticks))(lambda: None)
        {'ms': 500.0}
    """

    def timer(run: Run) -> dict[str, float]:
        begin = clock()
        run()
        return {"ms": 1e3 * (clock() - begin)}

    return timer


class CudaTimer:
    """Times one call on a GPU three ways: until its work is done, between two events, and until the call returns.

    Before each call a buffer larger than any L2 cache is written, so that no row finds its state there.
    """

    def __init__(self, device: torch.device, flush_bytes: int = 2**28) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> dict[str, float]:
        """Milliseconds: `ms` by the wall clock, `event_ms` between the events, `host_ms` until the call returned."""
        self._flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        run()
        end.record()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        return {"ms": 1e3 * (done - begin), "event_ms": start.elapsed_time(end), "host_ms": 1e3 * (returned - begin)}


def measure(
    runs: Mapping[str, Run], rounds: int, warmup: int, timer: Timer | None = None
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each call in each round, by name and clock; the order rotates, warm-up rounds are left out.

    Example:
        >>> called = []
        >>> runs = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
        >>> times = measure(runs, rounds=2, warmup=1)
        >>> "".join(called), len(times["a"]["ms"])
        ('abbaab', 2)
    """
    timer = timer or clock_timer()
    names, times = list(runs), {name: {} for name in runs}
    for number in range(warmup + rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            taken = timer(runs[name])
            if number >= warmup:
                for clock, value in taken.items():
                    times[name].setdefault(clock, []).append(value)
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile, to five digits.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        [2.0, 3.0, 4.0]
        >>> quartiles([2.0])
        [2.0, 2.0, 2.0]
    """
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [float(f"{x:.5g}") for x in found]


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Quartiles of the ratios round by round, which is not the ratio of the medians.

    Example:
        >>> paired_ratios([1.0, 2.0, 30.0], [1.0, 4.0, 30.0])
        [0.75, 1.0, 1.0]
    """
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


# ---- memory ----------------------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a structure of mappings, sequences and dataclasses; a wrapper tensor is what it is made of.

    Example:
        >>> [x.numel() for x in tensors_in({"a": torch.zeros(4), "b": [torch.zeros(2, dtype=torch.int8), 3]})]
        [4, 2]
    """
    if hasattr(value, "__tensor_flatten__"):
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(entry)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that an optimizer keeps, its groups' own tensors included, each once; weights are not its own."""
    groups = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]
    weights = {id(param) for group in optimizer.param_groups for param in group["params"]}
    # A state of several pieces may point to the tensor that it is of.
    found = {id(x): x for x in tensors_in([list(optimizer.state.values()), groups]) if id(x) not in weights}
    return list(found.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of everything that an optimizer keeps.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(10))
        >>> w.grad = torch.ones(10)
        >>> optimizer = torch.optim.SGD([w], momentum=0.9)
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        40
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(optimizer))


def room(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else what torch keeps for later counts as taken
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def require_normal(tensors: Iterable[Tensor], what: str) -> None:
    """Raise unless every number is zero or a normal number: others take other times than training's.

    Raises:
        RuntimeError: there is a NaN, an infinity or a denormal number.

    Example:
        >>> require_normal([torch.tensor([0.0, 1e-40])], "a state")
        Traceback (most recent call last):
        ...
        RuntimeError: a state holds a NaN, an infinity or a denormal number; its times mean nothing
    """
    for tensor in tensors:
        if not tensor.is_floating_point():
            continue
        for chunk in tensor.detach().reshape(-1).split(2**24):  # bounds the temporaries
            sizes = chunk.abs()
            tiny = torch.finfo(chunk.dtype).tiny
            if not bool((((sizes == 0) | (sizes >= tiny)) & sizes.isfinite()).all()):
                raise RuntimeError(f"{what} holds a NaN, an infinity or a denormal number; its times mean nothing")


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: unique in its table.
        build: makes the optimizer.
        against: the row that it is compared with in the same round; None for a baseline.
        target: the ratio that is the aim.
        at_least: whether the ratio should be at least the target instead of at most.
        clips: whether `clip_grad_norm_` runs before the step.
    """

    name: str
    build: Build
    against: str | None = None
    target: float | None = None
    at_least: bool = False
    clips: bool = False


class NoStep(torch.optim.Optimizer):
    """An optimizer that does nothing, to time what comes before a step."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        """Leave everything as it is."""


class Surgery(torch.optim.Optimizer):
    """What Bloop with one auxiliary loss does to gradients and averages in one step, as if it were an optimizer.

    The backward pass of the main loss, which comes before `absorb`, is not there: the gradients stay what the
    projection has left of them, and the averages approach 0 by one per cent in each step.

    Args:
        params: with gradients, which are overwritten.
        dtype: of the averages.
        absorbs: whether the averages absorb the gradients; else they are only projected on and lent to.
    """

    RHO = 0.01

    def __init__(self, params: Params, dtype: torch.dtype = torch.float32, absorbs: bool = True) -> None:
        super().__init__(params, {})
        self._absorbs, self._passes, self._steps = absorbs, Passes(), 0
        generator = torch.Generator(params[0].device).manual_seed(1)
        for param in params:
            noise = torch.randn(param.shape, generator=generator, device=param.device)
            self.state[param]["average"] = noise.mul_(param.grad.float().square().mean().sqrt()).to(dtype)
        self._averages = [self.state[param]["average"] for param in params]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Sums, projection, absorption."""
        grads, own = [param.grad for param in self.param_groups[0]["params"]], None
        if self._averages[0].dtype == torch.bfloat16:
            self._steps += 1
            own = seeds(torch.full((len(grads),), float(self._steps), device=grads[0].device), 0)
        eb, ee, _ = self._passes.sums(grads, self._averages).sum(0)
        self._passes.project_and_lend(grads, self._averages, eb / ee, 1 - self.RHO, self.RHO, seeds=own)
        if self._absorbs:
            self._passes.absorb(grads, self._averages, 1.0, self.RHO, seeds=own)


def fused_adamw(params: Params) -> torch.optim.Optimizer:
    """The baseline of most rows."""
    return torch.optim.AdamW(params, lr=LR, fused=True)


def fused_sgd(params: Params) -> torch.optim.Optimizer:
    """The baseline of rules without a second moment."""
    return torch.optim.SGD(params, lr=LR, momentum=0.9, fused=True)


def ours(name: str, **kwargs: Any) -> Build:
    """How to build an optimizer of the registry; arguments that are None are left out.

    Example:
        >>> type(ours("tam", fused=None)([torch.nn.Parameter(torch.zeros(1))])).__name__
        'TAM'
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    return lambda params: OPTIMIZERS[name].cls(params, lr=LR, **given)


def column(table: str, device: str, shape: str) -> str:
    """Under which heading of `TARGETS` a table's aims stand; LoRA's are for whole steps on the CPU alone.

    Example:
        >>> column("step", "cpu", "gpt2"), column("clip", "cuda", "llama-1b"), column("step", "cpu", "lora")
        ('cpu', 'cuda clip', 'cpu lora')
    """
    words = [device, *["lora"] * shape.startswith("lora"), *["clip"] * (table == "clip")]
    return " ".join(words)


def step_rows(names: Sequence[str], where: str, dtype: torch.dtype, options: Mapping[str, Any]) -> list[Row]:
    """Each rule against torch's fused optimizer."""
    rows = [Row("adamw", fused_adamw)]
    if dtype == torch.float32:  # torch's fused SGD is wrong in half precision on the CPU
        rows.append(Row("sgd", fused_sgd, "adamw"))
    there = {row.name for row in rows}
    for name in names:
        baseline = BASELINES.get(name, "adamw")
        target = TARGETS.get(name, {}).get(where) if baseline in there else None
        rows.append(Row(name, ours(name, **options), baseline if baseline in there else "adamw", target))
    return rows


def clip_rows(names: Sequence[str], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Each rule with clipping inside its step against `clip_grad_norm_` and AdamW, and what the latter are alone."""
    rows = [
        Row("clip+adamw", fused_adamw, clips=True),
        Row("adamw", fused_adamw, "clip+adamw"),
        Row("clip", NoStep, "clip+adamw", clips=True),
    ]
    for name in names:
        target = TARGETS.get(name, {}).get(where)
        rows.append(Row(name, ours(name, max_grad_norm=CLIP_TO, **options), "clip+adamw", target))
    return rows


def state_rows(names: Sequence[str], options: Mapping[str, Any]) -> list[Row]:
    """Each rule with state in two smaller dtypes against its own float32 state."""
    rows = []
    for name in names:
        given = {key: value for key, value in options.items() if key != "state_dtype"}
        rows.append(Row(name, ours(name, **given)))
        for dtype, target in (("bfloat16", None), ("int8", INT8_TARGET)):
            rows.append(Row(f"{name} {dtype}", ours(name, state_dtype=dtype, **given), name, target))
    return rows


def peer_rows(device: str, options: Mapping[str, Any]) -> list[Row]:
    """Other packages' optimizers, and ours that they are compared with; says in one line which are missing."""
    rows = [Row("adamw", fused_adamw), Row("tam", ours("tam", **options), "adamw")]
    rows.append(Row("adatam", ours("adatam", **options), "adamw"))
    # Package, module, class, what it is compared with, and whether it runs on the CPU.
    peers = [
        ("pytorch_optimizer", "pytorch_optimizer", "TAM", "tam", True),
        ("pytorch_optimizer", "pytorch_optimizer", "AdaTAM", "adatam", True),
        ("torchao", "torchao.optim", "AdamW8bit", "adamw", False),
        ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", "adamw", False),
    ]
    for package, module, cls, against, on_cpu in peers:
        if device == "cpu" and not on_cpu:
            print(f"not measured: {package} {cls} needs CUDA")
            continue
        try:
            peer = getattr(import_module(module), cls)
        except ImportError as error:
            print(f"not measured: {package} {cls} ({error}); pip install {package}")
            continue
        aim = {"target": PEER_TARGET, "at_least": True} if package == "pytorch_optimizer" and device == "cpu" else {}
        rows.append(Row(f"{package} {cls}", functools.partial(peer, lr=LR), against, **aim))
    return rows


def surgery_rows(where: str, dtype: str) -> list[Row]:
    """A step's surgery, and its sums and projection alone, against fused AdamW's step."""
    of_dtype = functools.partial(Surgery, dtype=getattr(torch, dtype))
    return [
        Row("adamw", fused_adamw),
        Row("bloop surgery", of_dtype, "adamw"),
        Row("bloop combine", functools.partial(of_dtype, absorbs=False), "adamw", COMBINE_TARGETS.get(where)),
    ]


# ---- one table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Weights and gradients that all rows of a table share, and how they are measured.

    Only optimizers write to the weights and only a surgery to the gradients. What the numbers are does not change a
    step's time as long as they are normal ones, which is checked. `clip_grad_norm_` rescales the shared gradients;
    their norm starts at twice `CLIP_TO`, stays at `CLIP_TO` from its first call on, and every row that clips does its
    whole work.
    """

    params: Params
    rounds: int
    warmup: int
    timer: Timer
    device: torch.device

    @staticmethod
    def of(shapes: Shapes, dtype: torch.dtype, device: torch.device, rounds: int, warmup: int, timer: Timer) -> "Bench":
        """Weights as of a fresh model, and gradients of norm 2."""
        generator = torch.Generator(device).manual_seed(0)
        count = elements(shapes)

        def normal(shape: tuple[int, ...], scale: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        params = [torch.nn.Parameter(normal(shape, 0.02)) for shape in shapes]
        for param in params:
            param.grad = normal(tuple(param.shape), 2 * CLIP_TO / count**0.5)
        return Bench(params, rounds, warmup, timer, device)

    @property
    def count(self) -> int:
        """The number of parameters."""
        return sum(param.numel() for param in self.params)

    def run_of(self, row: Row, optimizer: torch.optim.Optimizer) -> Run:
        """The call that is timed."""
        if not row.clips:
            return optimizer.step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, CLIP_TO)
            optimizer.step()

        return clip_and_step

    def table(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Measure all rows, in as many passes as memory asks for; each row with its baseline in the same pass."""
        found: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(self._passes(rows)):
            for name, line in self._measured(group).items():
                found.setdefault(name, {**line, "pass": number})
        return {row.name: found[row.name] for row in rows if row.name in found}

    def _passes(self, rows: Sequence[Row]) -> list[list[Row]]:
        needs, kept = {}, []
        for row in rows:
            try:
                needs[row.name] = int(probe(row, self.params[0].dtype, self.device) * self.count)
            except Exception as error:  # of another package: whatever it is, the other rows go on
                if row.name.split()[0] in (*OPTIMIZERS, "bloop") or row.against is None:
                    raise
                print(f"not measured: {row.name} fails: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            kept.append(row)
        free = room(self.device)
        if free is None:
            return [kept]
        groups, left_out = passes(kept, needs, int(0.85 * free))
        for name in left_out:
            print(f"not measured: {name} needs {needs[name] / 2**30:.1f} GiB of state, {free / 2**30:.1f} GiB are free")
        return groups

    def _measured(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        optimizers = {row.name: row.build(self.params) for row in rows}
        runs = {row.name: self.run_of(row, optimizers[row.name]) for row in rows}
        times = measure(runs, self.rounds, self.warmup, self.timer)
        table: dict[str, dict[str, Any]] = {}
        for row in rows:
            optimizer = optimizers[row.name]
            line: dict[str, Any] = {clock: quartiles(values) for clock, values in times[row.name].items()}
            if row.against in times:
                baseline = times[row.against]
                line["against"] = row.against
                line["ratio"] = paired_ratios(times[row.name]["ms"], baseline["ms"])
                if "event_ms" in baseline:
                    line["event_ratio"] = paired_ratios(times[row.name]["event_ms"], baseline["event_ms"])
                if row.target is not None:
                    line |= {"target": row.target, "at_least": row.at_least}
            line["state_bytes_per_parameter"] = float(f"{state_bytes(optimizer) / self.count:.5g}")
            if self.device.type == "cuda":
                line["temporary_bytes_per_parameter"] = float(f"{self._temporaries(runs[row.name]) / self.count:.5g}")
            require_normal(
                [x for x in state_tensors(optimizer) if x.dim() > 1 or x.numel() > 1], f"the state of {row.name}"
            )
            full = table.get(row.against or "", {}).get("state_bytes_per_parameter")
            if full and row.against == row.name.split()[0] and row.name != row.against:
                # Against float32 state of the same rule, which has four bytes for each element.
                line["bytes_per_state_element"] = float(f"{4 * line['state_bytes_per_parameter'] / full:.4g}")
            table[row.name] = line
        require_normal(self.params, "a weight")
        del optimizers, runs
        gc.collect()
        return table

    def _temporaries(self, run: Run) -> int:
        """Bytes that a step takes on the GPU beside what it keeps."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def elements(shapes: Shapes) -> int:
    """The number of elements of all tensors.

    Example:
        >>> elements([(2, 3), (4,)])
        10
    """
    return sum(torch.Size(shape).numel() for shape in shapes)


def probe(row: Row, dtype: torch.dtype, device: torch.device, size: int = 2**16) -> float:
    """Bytes of state per parameter, from one step on a small tensor."""
    weight = torch.nn.Parameter(torch.full((size,), 0.5, dtype=dtype, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = row.build([weight])
    optimizer.step()
    return state_bytes(optimizer) / size


def passes(rows: Sequence[Row], needs: Mapping[str, int], free: int) -> tuple[list[list[Row]], list[str]]:
    """Rows in groups that fit into memory together, each with what its rows are compared with.

    Args:
        rows: baselines before what is compared with them.
        needs: bytes of each row by name.
        free: bytes that one group may take.

    Returns:
        The groups; and the names of rows that do not fit even alone. A row that fits only without its baseline is
        alone in its group.

    Example:
        >>> rows = [Row("adamw", fused_adamw), Row("a", fused_adamw, "adamw"), Row("b", fused_adamw, "adamw")]
        >>> groups, left_out = passes(rows, {"adamw": 2, "a": 2, "b": 3}, free=5)
        >>> [[row.name for row in group] for group in groups], left_out
        ([['adamw', 'a'], ['adamw', 'b']], [])
    """
    by_name = {row.name: row for row in rows}

    def chain(row: Row) -> list[str]:
        names = [row.name]
        while (above := by_name[names[-1]].against) in by_name:
            names.append(above)
        return names[::-1]

    def cost(names: Iterable[str]) -> int:
        return sum(needs[name] for name in names)

    groups: list[list[str]] = []
    alone: list[list[str]] = []
    left_out = []
    for row in rows:
        wanted = chain(row)
        if needs[row.name] > free:
            left_out.append(row.name)
        elif cost(wanted) > free:
            alone.append([row.name])
        elif groups and cost(dict.fromkeys(groups[-1] + wanted)) <= free:
            groups[-1] = list(dict.fromkeys(groups[-1] + wanted))
        else:
            groups.append(wanted)
    # A group that another one holds whole, such as a baseline that was put down first, is measured there.
    whole = [g for n, g in enumerate(groups) if not any(set(g) < set(o) for o in groups[:n] + groups[n + 1 :])]
    return [[by_name[name] for name in group] for group in whole + alone], left_out


# ---- the scaling study -----------------------------------------------------------------------------------------------


def scaling(args: argparse.Namespace, device: torch.device, timer: Timer) -> dict[str, list[dict[str, Any]]]:
    """Cost per parameter over the number of parameters in 100 tensors, and per tensor over that of small tensors."""
    dtype, results = getattr(torch, args.dtype), {"parameters": [], "tensors": []}
    rows = step_rows(args.optimizers, "", dtype, our_options(args))
    for count in args.scaling_parameters:
        shapes = [(count // 100,)] * 100
        if not fits(shapes, dtype, device, f"{count:,} parameters"):
            continue
        bench = Bench.of(shapes, dtype, device, args.rounds, args.warmup, timer)
        table = bench.table(rows)
        for line in table.values():
            line["ns_per_parameter"] = [float(f"{1e6 * ms / count:.5g}") for ms in line["ms"]]
        results["parameters"].append({"parameters": count, "tensors": 100, "rows": table})
        print_table(f"{count:,} parameters in 100 tensors", table, "ns_per_parameter", "ns per parameter")
        del bench
        gc.collect()
    for count in args.scaling_tensors:
        bench = Bench.of([(64,)] * count, dtype, device, args.rounds, args.warmup, timer)
        table = bench.table(rows)
        for line in table.values():
            line["us_per_tensor"] = [float(f"{1e3 * ms / count:.5g}") for ms in line.get("host_ms", line["ms"])]
        results["tensors"].append({"parameters": 64 * count, "tensors": count, "rows": table})
        print_table(f"{count:,} tensors of 64 elements", table, "us_per_tensor", "us per tensor on the host")
    return results


def fits(shapes: Shapes, dtype: torch.dtype, device: torch.device, what: str) -> bool:
    """Whether weights and gradients leave room for an optimizer's state; says so if not."""
    free, count = room(device), elements(shapes)
    # Weights, gradients and one buffer of float32 state: with less than that there is nothing to measure.
    wanted = count * (2 * dtype.itemsize + 4)
    if free is None or wanted <= 0.9 * free:
        return True
    print(f"not measured: {what} need more than {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return False


# ---- printing, writing, drawing --------------------------------------------------------------------------------------


def machine_facts(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    from hf_momentum.kernels import cpu

    facts: dict[str, Any] = {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "hf-momentum": version("hf-momentum"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "state_dtype": args.state_dtype,
        "cpu_kernels": cpu.available()[0],
        "foreach": args.fused is False,
        "rounds": args.rounds,
        "warmup": args.warmup,
        "clock": "process" if args.cpu_time else "wall",
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_table(title: str, table: Mapping[str, Mapping[str, Any]], key: str = "ms", unit: str = "ms") -> None:
    """One line for each row: its cost, its ratio, and the aim."""
    print(f"\n{title}: {unit}, ratio to its baseline as median (quartiles), bytes of state per parameter")
    for name, line in table.items():
        text = f"{name:28s} {line[key][1]:10.3f}"
        if "ratio" in line:
            low, median, high = line["ratio"]
            text += f"   {median:7.3f} ({low:.3f}-{high:.3f}) of {line['against']:12s}"
            if "event_ratio" in line:
                text += f" by events {line['event_ratio'][1]:.3f}"
        else:
            text += " " * 42
        text += f" {line['state_bytes_per_parameter']:6.2f} B"
        if "target" in line:
            text += f"  target {'>=' if line['at_least'] else '<='} {line['target']:.2f}"
        print(text, flush=True)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One panel for each table, and one for each curve of the scaling study."""
    from matplotlib.figure import Figure

    tables = [t for t in results["tables"] if any("ratio" in line for line in t["rows"].values())]
    curves = [(axis, points) for axis, points in results.get("scaling", {}).items() if points]
    heights = [1 + 0.24 * len(t["rows"]) for t in tables] + [3.2] * len(curves)
    if not heights:
        return
    figure = Figure(figsize=(7.5, sum(heights) + 0.4), layout="constrained")
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)
    for axes, table in zip(panels, tables, strict=False):
        draw_ratios(axes, table)
    for axes, (axis, points) in zip(panels[len(tables) :], curves, strict=True):
        draw_scaling(axes, axis, points)
    figure.savefig(path, dpi=120)


def draw_ratios(axes: Any, table: Mapping[str, Any]) -> None:
    """The ratios of a table with their quartiles, and marks where the aims are."""
    from hf_momentum.evaluation.plots import DARK, WARM

    lines = {name: line for name, line in table["rows"].items() if "ratio" in line}
    for place, line in enumerate(lines.values()):
        low, median, high = line["ratio"]
        error = [[median - low], [high - median]]
        axes.errorbar(median, place, xerr=error, fmt="o", color=DARK, markersize=4, capsize=2)
    aims = [(line["target"], place) for place, line in enumerate(lines.values()) if "target" in line]
    if aims:
        axes.plot(*zip(*aims, strict=True), linestyle="", marker="|", markersize=12, markeredgewidth=2, color=WARM)
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(lines)), [f"{name}  /  {line['against']}" for name, line in lines.items()])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    if max(line["ratio"][1] for line in lines.values()) > 5:
        axes.set_xscale("log")
    axes.set_xlabel("time of a step over its baseline's: median and quartiles; orange bar: the aim", fontsize=8)
    axes.set_title(f"{table['table']}: {MODELS[table['shape']][0]}", fontsize=9, loc="left")


def draw_scaling(axes: Any, axis: str, points: Sequence[Mapping[str, Any]]) -> None:
    """A cost for each row over sizes."""
    label, key, unit = {
        "parameters": ("parameters, in 100 tensors", "ns_per_parameter", "ns per parameter"),
        "tensors": ("tensors of 64 elements", "us_per_tensor", "us per tensor, on the host"),
    }[axis]
    markers = cycle("osD^vPX*")
    for name in dict.fromkeys(name for point in points for name in point["rows"]):
        line = [(point[axis], point["rows"][name][key][1]) for point in points if name in point["rows"]]
        axes.loglog(*zip(*line, strict=True), label=name, marker=next(markers), markersize=4, linewidth=1)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, ncols=2)


# ---- the program -----------------------------------------------------------------------------------------------------


def our_options(args: argparse.Namespace) -> dict[str, Any]:
    """Constructor arguments of ours that hold for every table."""
    return {
        "fused": args.fused,
        "state_dtype": None if args.state_dtype == "float32" else args.state_dtype,
        "stochastic_rounding": args.stochastic_rounding or None,
    }


def rows_of(table: str, shape: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one table."""
    options = our_options(args)
    # The aims are for float32 throughout, and for the kernels.
    aimed = args.dtype == args.state_dtype == "float32" and args.fused is None
    where = column(table, args.device, shape) if aimed else ""
    if table == "step":
        return step_rows(args.optimizers, where, getattr(torch, args.dtype), options)
    if table == "clip":
        return clip_rows(args.optimizers, where, options)
    if table == "state":
        return state_rows(args.optimizers, options)
    if table == "surgery":
        return surgery_rows(where, args.state_dtype)
    return peer_rows(args.device, options)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES), help="none: the scaling alone")
    found.add_argument("--shapes", nargs="+", choices=list(MODELS), help="default: gpt2 lora; on CUDA llama-1b lora")
    found.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(TARGETS))
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and gradients")
    found.add_argument("--state-dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="of our state")
    found.add_argument("--stochastic-rounding", action="store_true", help="of half-precision weights, in ours")
    found.add_argument("--rounds", type=int, default=21)
    found.add_argument("--peer-rounds", type=int, default=7, help="rounds of the table of peers, which are slow")
    found.add_argument("--warmup", type=int, default=3)
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument(
        "--cpu-time", action="store_true", help="count this process's time alone; on a busy machine, with --threads 1"
    )
    found.add_argument(
        "--foreach", dest="fused", action="store_const", const=False, default=None, help="ours without kernels"
    )
    found.add_argument("--scaling", action="store_true", help="also cost over the number of parameters and of tensors")
    sizes = [10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9]
    found.add_argument("--scaling-parameters", nargs="*", type=int, default=sizes, metavar="N")
    found.add_argument("--scaling-tensors", nargs="*", type=int, default=[10, 100, 1000, 10000], metavar="N")
    found.add_argument("--output", type=Path, help="JSON file")
    found.add_argument("--add", action="store_true", help="keep what else --output holds, measured on the same terms")
    found.add_argument("--plot", type=Path, help="PNG file")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    args = parser().parse_args(argv)
    if args.cpu_time and args.device == "cuda":
        parser().error("--cpu-time counts the host's time, and a GPU's work is not in it; leave it out with cuda")
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    timer = (
        CudaTimer(device)
        if args.device == "cuda"
        else clock_timer(time.process_time if args.cpu_time else time.perf_counter)
    )
    shapes_asked = args.shapes or (["llama-1b", "lora"] if args.device == "cuda" else ["gpt2", "lora"])
    results: dict[str, Any] = {"facts": machine_facts(args, device), "tables": []}
    if args.add:
        results = kept(args, results)
    for shape in shapes_asked:
        shapes = shapes_of(shape)
        if not args.tables or not fits(shapes, dtype, device, f"the tensors of {shape}"):
            continue
        bench = Bench.of(shapes, dtype, device, args.rounds, args.warmup, timer)
        for name in args.tables:
            if name == "surgery" and (args.state_dtype == "int8" or args.fused is False):
                print("not measured: surgery has no averages in int8, and no switch for its kernels")
                continue
            rounds = args.peer_rounds if name == "peers" else args.rounds
            measured = Bench(bench.params, rounds, args.warmup, timer, device)
            table = measured.table(rows_of(name, shape, args))
            results["tables"] = [t for t in results["tables"] if (t["table"], t["shape"]) != (name, shape)]
            results["tables"].append(
                {"table": name, "shape": shape, "parameters": bench.count, "tensors": len(shapes), "rows": table}
            )
            print_table(f"{name}, {MODELS[shape][0]}", table)
            write(results, args)  # after each table, so that an interrupted run keeps what it has
        del bench, measured
        gc.collect()
    if args.scaling:
        results["scaling"] = scaling(args, device, timer)
    write(results, args)
    if args.plot:
        draw(results, args.plot)
    return 0


def kept(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """What --output holds, for more to be added; one file tells of one machine and one way to measure."""
    if args.output is None or not args.output.is_file():
        return results
    found: dict[str, Any] = json.loads(args.output.read_text())
    differ = [key for key, value in results["facts"].items() if found["facts"].get(key) != value]
    if differ:
        parser().error(f"--add: {args.output} was measured with another {', '.join(differ)}; write to another file")
    return found


def write(results: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the JSON file, if one was asked for."""
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
