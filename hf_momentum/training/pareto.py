"""The grid behind `hf-momentum pareto`: one run for each surgery, lambda and seed, each once, then the report.

A finished run is one line of `runs.jsonl`. Whoever gives the same command again repeats only what has no line there.
"""

import gc
import importlib.metadata
import json
import math
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import PrinterCallback

from hf_momentum.errors import InputError, TrainingStopped
from hf_momentum.evaluation import metrics_of
from hf_momentum.evaluation.pareto import MAIN_ONLY, ParetoReport, Run
from hf_momentum.integrations.registry import nearest
from hf_momentum.training import job
from hf_momentum.training.arguments import BloopArguments, DataArguments
from hf_momentum.training.plans import ALONE, check_overrides, digest
from hf_momentum.training.processes import environment_of_one_process, launched_processes
from hf_momentum.training.quiet import quiet
from hf_momentum.training.recipe import Recipe, load_recipe
from hf_momentum.training.words import duration

BASE = "base model"
SURGERIES: tuple[str, ...] = get_args(get_type_hints(BloopArguments)["surgery"])

# What the grid decides in every run; the rest is the recipe's.
_SET = {
    **ALONE,
    "logging_strategy": "no",
    "log_dynamics": "false",
}
_VARIED = {"surgery", "lam", "seed", "data_seed", "output_dir"}
_NOT_TO_GIVE = {
    "surgery": "name surgeries with --surgeries",
    "lam": "give the weights with --lambdas",
    "data_seed": "the runs' seeds are --seed and the ones after it",
    "resume_from_checkpoint": "finished runs are not repeated anyway",
}


# ---- what is to be run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run: a surgery, or `MAIN_ONLY` or `BASE`, with its lambda and seed.

    Example:
        >>> str(Point("bloop", 0.1, 3)), str(Point(MAIN_ONLY, 0.0, 3)), str(Point(BASE, 0.0, 0))
        ('bloop, lambda 0.1, seed 3', 'main only, seed 3', 'base model')
    """

    surgery: str
    lam: float
    seed: int

    def __str__(self) -> str:
        if self.surgery == BASE:
            return BASE
        return (
            f"{self.surgery}, seed {self.seed}"
            if self.surgery == MAIN_ONLY
            else (f"{self.surgery}, lambda {self.lam:g}, seed {self.seed}")
        )


@dataclass(frozen=True)
class Record:
    """What one run left: a line of `runs.jsonl`.

    Attributes:
        surgery, lam, seed: which run it was.
        digest: of everything else that shapes it.
        status: "finished"; "stopped" when its loss was not finite, which is a result; "failed", which is repeated.
        losses: mean loss of every split at the end, in nats per predicted token; empty unless finished.
        seconds: from loading to the last measurement.
        message: why it stopped or failed.
    """

    surgery: str
    lam: float
    seed: int
    digest: str
    status: str
    losses: Mapping[str, float]
    seconds: float
    message: str = ""

    @property
    def point(self) -> Point:
        """The run that it is of."""
        return Point(self.surgery, self.lam, self.seed)


@dataclass(frozen=True)
class Plan:
    """A grid that was checked, as `plan` makes it; plain data, so that other processes can be told.

    Attributes:
        config, overrides: the recipe, as for `load_recipe`.
        surgeries, lambdas, seeds: the grid.
        main, auxiliary: names of the splits whose losses make the fronts.
        folder: where everything is written.
        digest: of the recipe without what the grid varies; files are known by their names, not by what they hold.
    """

    config: str | None
    overrides: Sequence[str]
    surgeries: Sequence[str]
    lambdas: Sequence[float]
    seeds: Sequence[int]
    main: str
    auxiliary: str
    folder: str
    digest: str

    def points(self) -> list[Point]:
        """All runs, seed by seed, so that a killed command leaves whole seeds behind; the base model first."""
        found = [Point(BASE, 0.0, self.seeds[0])]
        for seed in self.seeds:
            found.append(Point(MAIN_ONLY, 0.0, seed))
            found += [Point(surgery, lam, seed) for surgery in self.surgeries for lam in self.lambdas]
        return found

    def recipe(self, point: Point) -> Recipe:
        """The recipe of one run. Main only is the mixture with a weight of 0."""
        alone = point.surgery in (MAIN_ONLY, BASE)
        words = [f"--surgery={'mixed' if alone else point.surgery}", f"--lam={point.lam!r}"]
        words += [f"--seed={point.seed}", f"--data_seed={point.seed}", f"--output_dir={self.folder}"]
        words += [f"--{name}={value}" for name, value in _SET.items()]
        recipe = load_recipe(self.config, [*self.overrides, *words])
        if point.surgery == "replay":
            recipe.training.per_device_train_batch_size = sum(examples_per_device(recipe))
        return recipe


def examples_per_device(recipe: Recipe) -> tuple[int, int]:
    """Main and auxiliary examples that one device sees in one micro-batch of a surgery; replay sees their sum."""
    main = recipe.training.per_device_train_batch_size
    return main, recipe.bloop.aux_batch_size or main


def plan(
    config: str | None,
    overrides: Sequence[str],
    surgeries: Sequence[str],
    lambdas: Sequence[float],
    seeds: int,
    main: str | None,
    auxiliary: str | None,
    folder: str,
) -> Plan:
    """Check everything that can be checked before the first run; nothing is written.

    Args:
        config: a recipe with `aux_dataset`, an `auxiliary` split and `max_steps`.
        overrides: `--field=value` on top of it.
        surgeries: names of `BloopArguments.surgery`; "bloop", where it is among them, is compared with the others.
        lambdas: positive weights.
        seeds: how many, counted from the recipe's `seed`.
        main: the split of the main loss; the first of `in_distribution` without.
        auxiliary: the split of the auxiliary loss; the first of `auxiliary` without.
        folder: the output folder.

    Raises:
        InputError: an unknown or repeated surgery, an unusable list of lambdas, too few seeds, a field that the grid
            sets itself, or a recipe that does not fit.
    """
    if launched_processes() > 1:
        raise InputError("pareto runs each point on one process; start it without a launcher (--jobs runs several)")
    _check_grid(surgeries, lambdas, seeds)
    check_overrides(overrides, _NOT_TO_GIVE, "the grid")
    recipe = load_recipe(config, [*overrides, f"--output_dir={folder}"])
    if not recipe.bloop.aux_dataset:
        raise InputError("the recipe has no auxiliary data; name some with aux_dataset: [NAME=SOURCE@SPLIT]")
    if recipe.training.max_steps < 1:
        raise InputError(
            "the recipe counts epochs, which are of different length for replay and the others; set max_steps"
        )
    made = Plan(
        config=config,
        overrides=list(overrides),
        surgeries=list(surgeries),
        lambdas=sorted(lambdas),
        seeds=[recipe.training.seed + index for index in range(seeds)],
        main=_chosen("main", main, recipe.data.in_distribution, recipe.data),
        auxiliary=_chosen("auxiliary", auxiliary, recipe.data.auxiliary, recipe.data),
        folder=folder,
        digest=digest(recipe, {*_VARIED, *_SET}),
    )
    if made.main == made.auxiliary:
        raise InputError(f"main and auxiliary are the same split, {made.main!r}; a front needs two")
    for surgery in (MAIN_ONLY, *made.surgeries):
        made.recipe(Point(surgery, 0.0 if surgery == MAIN_ONLY else made.lambdas[0], made.seeds[0]))
    return made


def _check_grid(surgeries: Sequence[str], lambdas: Sequence[float], seeds: int) -> None:
    if not surgeries:
        raise InputError(f"surgeries is empty; accepted: {', '.join(SURGERIES)}")
    for surgery in surgeries:
        if surgery not in SURGERIES:
            raise InputError(
                f"unknown surgery {surgery!r}{nearest(surgery, SURGERIES)}; accepted: {', '.join(SURGERIES)}"
            )
    if not lambdas:
        raise InputError("lambdas is empty; give weights such as 0.01,0.1,1")
    for lam in lambdas:
        if lam == 0:
            raise InputError("lambdas holds 0, which is the main-only run; it is always made, so leave it out")
        if not 0 < lam < math.inf:
            raise InputError(f"lambdas must be positive numbers, got {lam:g}")
    for name, values in (("surgeries", surgeries), ("lambdas", lambdas)):
        if len(set(values)) < len(values):
            raise InputError(f"{name} holds a value twice: {', '.join(map(str, values))}")
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}; intervals need at least 2")


def _chosen(argument: str, name: str | None, default: Sequence[str], data: DataArguments) -> str:
    entries = [*data.in_distribution, *data.shifted, *data.must_not_forget, *data.auxiliary]
    names = [entry.partition("=")[0] for entry in entries]
    if name is None:
        if not default:
            field = "auxiliary" if argument == "auxiliary" else "in_distribution"
            raise InputError(
                f"the recipe has no split of {field}; add {field}: [NAME=SOURCE@SPLIT], or give --{argument}"
            )
        return default[0].partition("=")[0]
    if name not in names:
        raise InputError(
            f"--{argument} {name!r} is no split of the recipe{nearest(name, names)}; it has {', '.join(names)}"
        )
    return name


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_point(made: Plan, point: Point) -> Record:
    """Load, train and measure one point in this process; whatever goes wrong is a record too."""
    started = time.perf_counter()
    losses: dict[str, float] = {}
    status, message = "finished", ""
    try:
        with quiet():
            losses = _losses(made, point)
        unusable = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if unusable:
            losses, status, message = {}, "stopped", f"the loss on {unusable[0]} is not finite after training"
    except TrainingStopped as error:
        status, message = "stopped", str(error)
    except InputError as error:
        status, message = "failed", str(error)
    except Exception as error:  # a grid of many hours goes on
        traceback.print_exc()
        status, message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    # What lies in circles of references must not stay beside the next run's weights.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    return Record(point.surgery, point.lam, point.seed, made.digest, status, losses, seconds, message)


def _losses(made: Plan, point: Point) -> dict[str, float]:
    recipe = made.recipe(point)
    prepared = job.prepare(recipe)
    prepared.trainer.remove_callback(PrinterCallback)  # there is one line for each run, from the grid
    if point.surgery != BASE:
        prepared.trainer.train()
    found = {}
    for split in prepared.splits:
        statistics = job.measure(prepared.trainer, split, "before" if point.surgery == BASE else "after")
        found[split.name] = float(metrics_of(recipe.model.task, split.bytes_per_token)["loss"](statistics.sum(0)))
    return found


# ---- the record of runs ----------------------------------------------------------------------------------------------


def append(folder: str, record: Record) -> None:
    """Add one line to `runs.jsonl`, whole: a single write to the end of the file, after any torn line."""
    path = Path(folder) / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    line = ("\n" if torn else "") + json.dumps(asdict(record), ensure_ascii=False) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(made: Plan) -> dict[Point, Record]:
    """The latest record of each point of this plan; lines of other recipes and torn ones are passed over."""
    path = Path(made.folder) / "runs.jsonl"
    found: dict[Point, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            continue  # the process died while it wrote
        if record.digest == made.digest:
            found[record.point] = record
    return {point: found[point] for point in made.points() if point in found}


def done(records: Mapping[Point, Record]) -> dict[Point, Record]:
    """Those that need not be repeated."""
    return {point: record for point, record in records.items() if record.status != "failed"}


def seconds_for(points: Collection[Point], records: Mapping[Point, Record], jobs: int) -> float | None:
    """How long these points will take: each as long as those of its surgery, or else as all; None before the first.

    Example:
        >>> past = Record("bloop", 0.1, 0, "", "finished", {}, 30.0)
        >>> seconds_for([Point("bloop", 1.0, 0), Point("mixed", 1.0, 0)], {past.point: past}, jobs=1)
        60.0
    """
    trained = [record for point, record in records.items() if point.surgery != BASE and record.status == "finished"]
    if not trained:
        return None

    def mean(chosen: Sequence[Record]) -> float:
        return sum(record.seconds for record in chosen) / len(chosen)

    return sum(
        mean([record for record in trained if record.surgery == point.surgery] or trained) for point in points
    ) / min(jobs, max(len(points), 1))


def outlook(made: Plan, jobs: int) -> str:
    """What `--dry-run` says: how many runs there are, how many are done, and how long the rest will take."""
    records, points = read(made), made.points()
    left = [point for point in points if point not in done(records)]
    count = len(made.surgeries) * len(made.lambdas) * len(made.seeds)
    text = (
        f"{len(points)} runs: {count} of {len(made.surgeries)} surgeries x {len(made.lambdas)} lambdas x "
        f"{len(made.seeds)} seeds, {len(made.seeds)} main only, and the base model measured once; "
        f"{len(points) - len(left)} finished, {len(left)} to run"
    )
    seconds = seconds_for(left, records, jobs)
    if seconds is None:
        return (
            f"{text}; how long is known once the first one has been trained (a command that is stopped loses nothing)"
        )
    return f"{text}, about {duration(seconds)}"


# ---- the grid --------------------------------------------------------------------------------------------------------


def run_grid(
    made: Plan,
    jobs: int = 1,
    run: Callable[[Plan, Point], Record] = run_point,
    say: Callable[[str], None] = print,
) -> dict[Point, Record]:
    """Run every point that has no line yet, and tell of each.

    Args:
        made: from `plan`.
        jobs: 1 runs them in this process one after another; more in so many processes side by side.
        run: what one point is, in this process.
        say: is given one line for each run.

    Returns:
        All records of this plan, failed ones included.

    Raises:
        InputError: jobs is below 1, or the base model could not be measured, which no run would survive.
        TrainingStopped: the base model's loss is not finite.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    records = done(read(made))
    points = made.points()
    base, *left = [points[0], *(point for point in points[1:] if point not in records)]
    total = len(left) + (base not in records)

    def tell(record: Record) -> None:
        records[record.point] = record
        remaining = [point for point in left if point not in records]
        numbers = ", ".join(
            f"{name} {record.losses[name]:.3f}" for name in (made.main, made.auxiliary) if record.losses
        )
        result = f"{numbers} after {duration(record.seconds)}" if numbers else f"{record.status}: {record.message}"
        seconds = seconds_for(remaining, records, jobs)
        rest = f"; {len(remaining)} to go" + (f", about {duration(seconds)}" if seconds else "") if remaining else ""
        say(f"[{total - len(remaining)}/{total}] {record.point}: {result}{rest}")

    if base not in records:  # alone and first: it trains and keeps the small base model, and finds what is wrong
        record = run(made, base)
        if record.status != "finished":
            kind = TrainingStopped if record.status == "stopped" else InputError
            raise kind(f"the base model could not be measured: {record.message}")
        append(made.folder, record)
        tell(record)
    if jobs == 1:
        for point in left:
            record = run(made, point)
            append(made.folder, record)
            tell(record)
    else:
        for record in _side_by_side(made, left, jobs):
            tell(record)
    return {point: records[point] for point in points}


def _side_by_side(made: Plan, points: Sequence[Point], jobs: int) -> Iterator[Record]:
    """Records as their processes end; each process adds its own line, and a log beside it."""
    device = made.recipe(Point(MAIN_ONLY, 0.0, made.seeds[0])).training.device
    waiting, running = list(points), {}
    logs = Path(made.folder) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            for slot in range(jobs):
                if waiting and slot not in running:
                    point = waiting.pop(0)
                    running[slot] = (point, _start(made, point, logs, device, slot, jobs))
            time.sleep(0.1)
            for slot, (point, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield _collect(made, point, process.returncode)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(
    made: Plan, point: Point, logs: Path, device: torch.device, slot: int, jobs: int
) -> "subprocess.Popen[bytes]":
    if device.type == "cuda":
        device = torch.device("cuda", slot % torch.cuda.device_count())
    environment = environment_of_one_process(device)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    told = json.dumps({"plan": asdict(made), "point": asdict(point)})
    name = f"{point.surgery.replace(' ', '_')}-{point.lam:g}-{point.seed}.log"
    with open(logs / name, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hf_momentum.training.pareto", told],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _collect(made: Plan, point: Point, status: int) -> Record:
    if status == 0:
        return read(made)[point]
    message = f"its process ended with status {status}; see the log of this run in {made.folder}/logs"
    record = Record(point.surgery, point.lam, point.seed, made.digest, "failed", {}, 0.0, message)
    append(made.folder, record)
    return record


def main() -> None:
    """Run the one point that the one argument (JSON, from `run_grid` of another process) describes."""
    told = json.loads(sys.argv[1])
    made = Plan(**told["plan"])
    append(made.folder, run_point(made, Point(**told["point"])))


# ---- the report ------------------------------------------------------------------------------------------------------


def report(made: Plan, records: Mapping[Point, Record]) -> ParetoReport:
    """What the records say."""
    recipe = made.recipe(Point(MAIN_ONLY, 0.0, made.seeds[0]))
    losses = {
        point: (record.losses[made.main], record.losses[made.auxiliary]) if record.losses else None
        for point, record in records.items()
    }
    ends = {"stopped": "it has no point on its front", "failed": "its seed is not compared until it has been run again"}
    return ParetoReport(
        title=f"{recipe.name}: main loss on {made.main} against auxiliary loss on {made.auxiliary}",
        main=made.main,
        auxiliary=made.auxiliary,
        unit=recipe.unit,
        methods=made.surgeries,
        lambdas=made.lambdas,
        seeds=made.seeds,
        runs=[
            Run(point.surgery, point.lam, point.seed, losses[point])
            for point, record in records.items()
            if point.surgery != BASE and record.status != "failed"
        ],
        base=losses.get(Point(BASE, 0.0, made.seeds[0])),
        facts=_facts(recipe, records),
        fairness=_fairness(recipe),
        troubles=[
            f"{point} {record.status}: {record.message}; {ends[record.status]}"
            for point, record in records.items()
            if record.status in ends
        ],
        recipe=load_recipe(made.config, made.overrides).to_yaml(),
        command=_command(made),
    )


def _fairness(recipe: Recipe) -> list[str]:
    main, auxiliary = (count * _batches(recipe) for count in examples_per_device(recipe))
    return [
        f"All runs have {recipe.training.max_steps} steps. In each step a surgery sees {main} main and {auxiliary} "
        f"auxiliary examples; replay sees {main + auxiliary} of one mixture, of which lambda / (1 + lambda) are "
        f"auxiliary; main only sees {main} main examples, and nothing in place of the auxiliary ones. In expectation "
        "the gradient of mixed is 1 + lambda times that of replay; the learning rate is the same.",
        "A seed decides the order of the data, what is random in the model, and which training examples are taken "
        "where the recipe limits their number. It is the same for all methods, and differences between methods are "
        "taken seed by seed. All runs, and the base model once, are measured on the same examples.",
        "All methods share every other field of the recipe, the learning rate too: nothing was tuned for one of them.",
    ]


def _batches(recipe: Recipe) -> int:
    return recipe.training.gradient_accumulation_steps * max(1, recipe.training.n_gpu)


def _facts(recipe: Recipe, records: Mapping[Point, Record]) -> dict[str, Any]:
    training, bloop = recipe.training, recipe.bloop
    optimizer = str(getattr(training.optim, "value", training.optim))
    seconds = sum(record.seconds for record in records.values())
    return {
        "model": f"{recipe.model.model_name_or_path}, {'LoRA' if recipe.peft.lora else 'all weights'}",
        "main data": recipe.data.train_dataset,
        "auxiliary data": ", ".join(bloop.aux_dataset),
        "optimizer": f"`{optimizer}`, learning rate {training.learning_rate:g}, {training.max_steps} steps"
        + (f", {training.optim_args}" if training.optim_args else ""),
        "surgery": f"rho {bloop.rho}, ema_order {bloop.ema_order}, ema_init {bloop.ema_init}, surgery_metric "
        f"{bloop.surgery_metric} (each where the method has it)",
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else training.device.type,
        "time": f"{duration(seconds)} for {len(records)} runs, summed",
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("hf-momentum", "torch", "transformers", "peft")
        ),
    }


def _command(made: Plan) -> str:
    config = [] if made.config is None else ["--config", made.config]
    lambdas = ",".join(f"{lam:g}" for lam in made.lambdas)
    grid = ["--surgeries", ",".join(made.surgeries), "--lambdas", lambdas, "--seeds", str(len(made.seeds))]
    splits = ["--main", made.main, "--auxiliary", made.auxiliary, "--output_dir", made.folder]
    return shlex.join(["hf-momentum", "pareto", *config, *grid, *splits, *made.overrides])


if __name__ == "__main__":
    main()
