"""Carrying out the runs of a comparison: one process for each, so many side by side, and one display for all.

Every run has a process of its own. So its peak memory is its own, one that dies takes nothing with it, and no run sees
what another left behind. On the CPU the processes are forked from one that has loaded the libraries already.
"""

import contextlib
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback

from hf_momentum.errors import InputError, TrainingStopped
from hf_momentum.evaluation.results import RunScores
from hf_momentum.evaluation.scores import scorer, values
from hf_momentum.training import job
from hf_momentum.training.compare import BASE, Plan, Run, controls, needed, relevant, tuned
from hf_momentum.training.ledger import BEAT, Ledger
from hf_momentum.training.processes import environment_of_one_process
from hf_momentum.training.quiet import quiet
from hf_momentum.training.recipe import Recipe
from hf_momentum.training.sources import Split
from hf_momentum.training.words import duration

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

Runner = Callable[[Plan, Run], RunScores]
_POLL = 0.2  # seconds


# ---- one run ---------------------------------------------------------------------------------------------------------


def run_one(made: Plan, run: Run) -> RunScores:
    """Load, train and measure one run in this process; whatever goes wrong is a record too."""
    started = time.perf_counter()
    try:
        return _measured(made, run)
    except TrainingStopped as error:
        return _lost(run, "diverged", str(error), time.perf_counter() - started)
    except InputError as error:
        return _lost(run, "failed", str(error), time.perf_counter() - started)
    except Exception as error:  # a comparison of many hours goes on
        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return _lost(run, "failed", message, time.perf_counter() - started)


def _lost(run: Run, status: Any, message: str, seconds: float = 0.0) -> RunScores:
    return RunScores(run.method, run.role, run.learning_rate, run.seed, status, None, {}, seconds, 0, message)  # type: ignore[arg-type]


def _measured(made: Plan, run: Run) -> RunScores:
    recipe = made.recipe(run)
    prepared = job.prepare(recipe)
    trainer = prepared.trainer
    trainer.remove_callback(PrinterCallback)  # there is one line for each run, from the comparison
    started = time.perf_counter()
    if run.method != BASE:
        trainer.train()
    seconds, peak = time.perf_counter() - started, job.peak_memory(recipe.training.device)
    validation = Split("validation", "validation", "", trainer.eval_dataset, 1.0)  # type: ignore[arg-type]
    selected = metrics_on(recipe, trainer, validation)[made.selection]
    scores = {split.name: metrics_on(recipe, trainer, split) for split in prepared.splits if _wanted(made, run, split)}
    for name, found in {"validation": {made.selection: selected}, **scores}.items():
        if not all(map(math.isfinite, found.values())):
            raise TrainingStopped(f"a score on {name} is not finite after training")
    return RunScores(
        run.method,
        run.role,  # type: ignore[arg-type]
        run.learning_rate,
        run.seed,
        "finished",
        selected,
        scores,
        seconds,
        peak,
        gain=_gain(trainer.state.log_history),
    )


def _wanted(made: Plan, run: Run, split: Split) -> bool:
    """Tuning is not measured on test data, but for the baseline's: those runs make the line of effective robustness.

    Nothing is chosen by them.
    """
    if run.role == "tuning":
        return run.method == made.baseline and split.role in ("in distribution", "shifted")
    return run.method != BASE or split.role == "must not forget"


def metrics_on(recipe: Recipe, trainer: Any, split: Split) -> dict[str, float]:
    """Every metric of the task on one split, of the model as it is now."""
    classes = trainer.model.config.num_labels if recipe.model.task != "causal_lm" else 0
    return values(scorer(recipe.model.task, classes, split.bytes_per_token), job.measure(trainer, split, "after"))


def _gain(history: list[dict[str, float]]) -> float | None:
    """Effective over nominal learning rate, summed over the logged steps; None where an optimizer does not tell."""
    told = [(entry["effective_lr"], entry["learning_rate"]) for entry in history if "effective_lr" in entry]
    nominal = sum(rate for _, rate in told)
    return float(np.float64(sum(rate for rate, _ in told)) / nominal) if nominal > 0 else None


# ---- its process -----------------------------------------------------------------------------------------------------


def _context() -> "BaseContext":
    """Forks where there is no device, which is quick; new processes where there is one, which a fork would break."""
    if torch.accelerator.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_momentum.training.compare_runs"])
    return context


def _child(made: Plan, run: Run, threads: int, log: str, answer: Connection) -> None:
    """The whole life of a run's process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if not torch.accelerator.is_available():
        torch.set_num_threads(threads)
    with quiet():
        answer.send(run_one(made, run))
    answer.close()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass
class _Working:
    """A run under way."""

    run: Run
    trial: int
    process: "BaseProcess"
    answer: Connection
    log: Path

    def result(self) -> RunScores | None:
        """What came of it; None while it runs."""
        try:
            if self.answer.poll():
                found: RunScores = self.answer.recv()
                self.process.join()
                return found
        except EOFError:
            self.process.join()
        if self.process.is_alive():
            return None
        code = self.process.exitcode
        return _lost(self.run, "failed", f"its process ended with status {code}; see {self.log}")


def _begin(context: "BaseContext", made: Plan, run: Run, trial: int, slot: int, jobs: int) -> _Working:
    logs = Path(made.folder) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{str(run).replace(', ', '-').replace(' ', '_')}.log"
    ours, theirs = context.Pipe(duplex=False)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    process = context.Process(target=_child, args=(made, run, threads, str(log), theirs), daemon=True)
    with _environment(slot):
        process.start()
    theirs.close()
    return _Working(run, trial, process, ours, log)


@contextlib.contextmanager
def _environment(slot: int) -> Iterator[None]:
    """Each slot has a GPU of its own, as far as there are some; a process takes its environment when it starts."""
    before = dict(os.environ)
    if torch.cuda.is_available():
        os.environ.update(environment_of_one_process(torch.device("cuda", slot % torch.cuda.device_count())))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---- all of them -----------------------------------------------------------------------------------------------------


def work(
    made: Plan,
    ledger: Ledger,
    jobs: int = 1,
    run: Runner | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, RunScores]:
    """Carry out what is left of a comparison, beside any other worker, until nothing is.

    Args:
        made: from `plan`.
        ledger: of the plan's storage and study.
        jobs: runs side by side.
        run: in place of a process of its own, a function in this one; for tests.
        say: is given a line for each run; printed above the display unless given.

    Returns:
        The records of all runs that are known by their names, failed ones included.

    Raises:
        InputError: jobs is below 1, or the base model cannot be measured, which no run would survive.
        TrainingStopped: the base model's loss is not finite.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    context, working = _context(), dict[int, _Working]()
    display = tqdm(total=0, unit="run", disable=None, dynamic_ncols=True, file=sys.stdout)
    say = say or display.write
    beaten = time.monotonic()
    try:
        while True:
            ledger.free_dead()
            told, elsewhere = ledger.look()
            records = relevant(made, told)
            todo = needed(made, records)
            free = [one for one in todo if made.key(one) not in elsewhere]
            _show(display, made, records, jobs)
            if not todo:
                return records
            _check_base(made, records)
            if run is not None:
                if not _inline(made, ledger, free, run, say):
                    time.sleep(_POLL)
                continue
            for slot in (slot for slot in range(jobs) if slot not in working):
                claimed = _claim(made, ledger, free)
                if claimed is None:
                    break
                working[slot] = _begin(context, made, *claimed, slot, jobs)
            wait([one.process.sentinel for one in working.values()], timeout=_POLL * 5)
            for slot, one in list(working.items()):
                result = one.result()
                if result is not None:
                    del working[slot]
                    if ledger.tell(one.trial, result):
                        say(_line(made, one.run, result))
            if time.monotonic() - beaten > BEAT:
                for one in working.values():
                    ledger.beat(one.trial)
                beaten = time.monotonic()
    finally:
        for one in working.values():
            one.process.kill()
            ledger.withdraw(one.trial)
        display.close()


def _check_base(made: Plan, records: Mapping[str, RunScores]) -> None:
    """What fails for the untrained model fails for every run: say it once, at the beginning."""
    base = next((run for run in records.values() if run.method == BASE), None)
    if base is not None and base.status != "finished":
        kind = TrainingStopped if base.status == "diverged" else InputError
        raise kind(f"the base model could not be measured: {base.message}")


def _claim(made: Plan, ledger: Ledger, free: list[Run]) -> tuple[Run, int] | None:
    """Take the first run that nobody else takes."""
    while free:
        one = free.pop(0)
        trial = ledger.claim(made.key(one), {**asdict(one), "name": str(one)})
        if trial is not None:
            return one, trial
    return None


def _inline(made: Plan, ledger: Ledger, free: list[Run], run: Runner, say: Callable[[str], None]) -> bool:
    claimed = _claim(made, ledger, free)
    if claimed is None:
        return False
    one, trial = claimed
    result = run(made, one)
    if ledger.tell(trial, result):
        say(_line(made, one, result))
    return True


def _line(made: Plan, run: Run, record: RunScores) -> str:
    if record.status != "finished":
        return f"{run}: {record.status}: {record.message}"
    first = next(iter(record.scores), None)
    shown = [f"validation {made.selection} {record.validation:.4g}"]
    if run.role == "test" and first is not None:
        shown += [f"{name} {found[made.metric]:.4g}" for name, found in record.scores.items()]
    return f"{run}: {', '.join(shown)} after {duration(record.seconds)}"


def _show(display: Any, made: Plan, records: Mapping[str, RunScores], jobs: int) -> None:
    least, _ = counts(made, records)
    done = len(records)
    display.total, display.n = max(least, done), done
    seconds = seconds_left(made, records, jobs)
    display.set_postfix_str(f"about {duration(seconds)} to go" if seconds else "")


def counts(made: Plan, records: Mapping[str, RunScores]) -> tuple[int, int]:
    """How many runs there are at least, as far as is known, and at most if every grid is widened to its limit.

    Example:
        >>> from hf_momentum.training.compare import _example
        >>> counts(_example(), {})  # 2 x 3 trials, 2 x 2 test runs, the base model; at most 2 x 8 trials
        (11, 21)
    """
    least, most = 1 + (len(made.methods) + len(controls(made))) * len(made.seeds), 0
    most = least + made.most * len(made.methods) * len(made.tuning_seeds)
    for seed in made.tuning_seeds:
        tried = tuned(made, records, seed).values()
        least += max(made.trials, *map(len, tried)) * len(made.methods)
    return least, most


def seconds_left(made: Plan, records: Mapping[str, RunScores], jobs: int) -> float | None:
    """From the time of those that finished; None before the first."""
    times = [run.seconds for run in records.values() if run.status == "finished" and run.method != BASE]
    if not times:
        return None
    least, _ = counts(made, records)
    return max(0, least - len(records)) * statistics.fmean(times) / jobs
