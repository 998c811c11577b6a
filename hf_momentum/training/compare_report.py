"""What a comparison says before it begins (`--dry-run`) and once it is done."""

import importlib.metadata
import platform
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from hf_momentum.evaluation.comparison import ComparisonReport
from hf_momentum.evaluation.results import RunScores, SplitFacts
from hf_momentum.training import job
from hf_momentum.training.compare import BASE, Plan, Run, controls, learning_rates, relevant
from hf_momentum.training.compare_runs import counts, metrics_on, seconds_left
from hf_momentum.training.ledger import Ledger
from hf_momentum.training.quiet import quiet
from hf_momentum.training.recipe import Recipe, load_recipe
from hf_momentum.training.sources import Split, named_splits
from hf_momentum.training.words import duration

_TIMED_STEPS = 6
_TIMED_EXAMPLES = 64


# ---- before ----------------------------------------------------------------------------------------------------------


def outlook(made: Plan, ledger: Ledger, jobs: int) -> str:
    """What `--dry-run` says: how many runs there will be, how many are done, and how long the rest will take.

    Before any run has finished, the time is found by a few steps of the baseline, and the evaluation of a few examples.
    """
    records = relevant(made, ledger.records())
    least, most = counts(made, records)
    tests = len(made.methods) * len(made.seeds)
    beside = len(controls(made)) * len(made.seeds)
    text = (
        f"{least} runs: {least - tests - beside - 1} to tune {len(made.methods)} optimizers, {tests} tests on "
        f"{len(made.seeds)} seeds, {beside} controls, and the base model measured once; up to {most} if grids have "
        f"to be "
        f"widened to {made.most} learning rates each; {len(records)} done"
    )
    seconds = seconds_left(made, records, jobs)
    if seconds is not None:
        return f"{text}. About {duration(seconds)} to go with --jobs {jobs}, from the runs that are done"
    with quiet():
        one = timed(made)
    return (
        f"{text}. About {duration(one * (least - len(records)) / jobs)} with --jobs {jobs}, from {_TIMED_STEPS} "
        f"steps and "
        f"{_TIMED_EXAMPLES} examples: {duration(one)} for a run with all its splits, without the seconds that the "
        f"process of each run takes to start"
    )


def timed(made: Plan) -> float:
    """Seconds of one test run of the baseline, from a few of its steps."""
    run = Run(made.baseline, "test", made.starts[made.baseline], made.seeds[0])
    recipe = made.recipe(run)
    started = time.perf_counter()
    trainer = (prepared := job.prepare(recipe)).trainer
    loading = time.perf_counter() - started
    trainer.remove_callback(PrinterCallback)
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    splits = [Split("validation", "validation", "", trainer.eval_dataset, 1.0), *prepared.splits]  # type: ignore[arg-type]
    few = splits[0].examples.select(range(min(_TIMED_EXAMPLES, len(splits[0].examples))))
    started = time.perf_counter()
    metrics_on(recipe, trainer, Split("few", "validation", "", few, 1.0))
    each = (time.perf_counter() - started) / len(few)
    return loading + clock.per_step * clock.steps + each * sum(len(split.examples) for split in splits)


class _Clock(TrainerCallback):
    """Times a few steps after the first and stops."""

    def __init__(self) -> None:
        self.steps, self.times = 0, list[float]()

    @property
    def per_step(self) -> float:
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.max_steps
        self.times.append(time.perf_counter())
        control.should_training_stop = len(self.times) > _TIMED_STEPS


# ---- after -----------------------------------------------------------------------------------------------------------


def report(made: Plan, known: Mapping[str, RunScores]) -> ComparisonReport:
    """What the records say."""
    records = relevant(made, known)
    rates = learning_rates(made, records)
    recipe = made.recipe(Run(made.baseline, "test", made.starts[made.baseline], made.seeds[0]))
    base = next((run for run in records.values() if run.method == BASE and run.status == "finished"), None)
    return ComparisonReport(
        title=f"{recipe.name}: {', '.join(made.methods)}",
        unit=recipe.unit,
        metric=made.metric,
        selection=made.selection,
        methods=made.methods,
        baseline=made.baseline,
        controls=controls(made),
        learning_rates=rates,
        seeds=made.seeds,
        splits=split_facts(recipe),
        runs=[run for run in records.values() if run.method != BASE and _belongs(run, rates)],
        base=base.scores if base and base.scores else None,
        facts=_facts(made, recipe, records),
        fairness=_fairness(made, recipe),
        troubles=_troubles(made, records, rates),
        recipe=recipe_of(made).to_yaml(),
        command=command(made),
    )


def _belongs(run: RunScores, rates: Mapping[str, Mapping[int, float]]) -> bool:
    """Whether a test run has the learning rate that was chosen in the end; a study may hold others."""
    return run.role == "tuning" or rates.get(run.method, {}).get(run.seed) == run.learning_rate


def split_facts(recipe: Recipe) -> list[SplitFacts]:
    """The recipe's splits, as it names them.

    Example:
        >>> [(split.name, split.role) for split in split_facts(load_recipe("quickstart"))]
        [('code', 'in distribution'), ('prose', 'must not forget')]
    """
    return [SplitFacts(name, role, None, source) for role, name, source in named_splits(recipe.data)]


def recipe_of(made: Plan) -> Recipe:
    """The recipe that all runs share."""
    return load_recipe(made.config, made.overrides)


def _troubles(made: Plan, records: Mapping[str, RunScores], rates: Mapping[str, Mapping[int, float]]) -> list[str]:
    found = [
        f"{Run(run.method, run.role, run.learning_rate, run.seed)} {run.status}: {run.message}"
        for run in records.values()
        if run.status == "failed" or (run.status == "diverged" and run.role == "test")
    ]
    found += [
        f"{method} has no usable learning rate: all its tuning runs diverged or failed"
        for method in made.methods
        if not rates[method]
    ]
    return found


def _fairness(made: Plan, recipe: Recipe) -> list[str]:
    length = (
        f"{recipe.training.max_steps} steps"
        if recipe.training.max_steps > 0
        else f"{recipe.training.num_train_epochs:g} epochs"
    )
    return [
        f"All runs have {length}, the same schedule ({recipe.training.lr_scheduler_type.value}), batch, clipping "
        f"({recipe.training.max_grad_norm:g}) and weight decay ({recipe.training.weight_decay:g}; methods whose "
        f"learning "
        "rate is smaller decay less at equal weight decay). Every hyperparameter but the learning rate is at the "
        "recipe's "
        "value or the method's default, for the baseline too.",
        f"Tuning: {_seeds(made.tuning_seeds)}, grids of {made.trials} points in a ratio of {made.ratio:.3g} that begin "
        f"around "
        + ", ".join(f"{lr:g} ({method})" for method, lr in made.starts.items())
        + f", at most {made.most} runs each. Tests: {_seeds(made.seeds)}.",
        *(
            [
                f"{len(made.seeds)} test seeds are few: the test then rests on differences being normal, and only a "
                "large one can be found. The default is 5."
            ]
            if len(made.seeds) < 5
            else []
        ),
        "A seed decides the order of the data, what is random in the model, and which training examples are taken "
        "where the "
        "recipe limits their number. Test examples are the same for all.",
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _facts(made: Plan, recipe: Recipe, records: Mapping[str, RunScores]) -> dict[str, Any]:
    training = recipe.training
    seconds = sum(run.seconds for run in records.values())
    device = training.device
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    arguments = ", ".join(f"{method}: {words}" for method, words in made.arguments.items())
    return {
        "model": f"{recipe.model.model_name_or_path}, {'LoRA' if recipe.peft.lora else 'all weights'}",
        "training data": recipe.data.train_dataset,
        "validation data": recipe.data.validation_dataset,
        "evaluation": "; ".join(f"{split.name}: {split.source}" for split in split_facts(recipe))
        + (f" (at most {recipe.data.max_eval_examples} examples of each)" if recipe.data.max_eval_examples else ""),
        "examples per step": batch,
        "optimizer arguments": arguments or "defaults",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "time": f"{duration(seconds)} of training in {len(records)} runs, summed",
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("hf-momentum", "torch", "transformers", "peft", "optuna")
        )
        + f", Python {platform.python_version()}",
    }


def command(made: Plan) -> str:
    """The command that repeats it."""
    words = ["hf-momentum", "compare"]
    words += [] if made.config is None else ["--config", made.config]
    words += ["--optim", ",".join(made.methods), "--trials", str(made.trials), "--seeds", str(len(made.seeds))]
    words += ["--controls", ",".join(made.controls)] if made.controls else []
    words += ["--tune_each_seed"] if made.tuning_seeds == made.seeds else []
    words += ["--ratio", f"{made.ratio:.6g}", "--most_trials", str(made.most)]
    words += ["--metric", made.metric, "--select", made.selection]
    words += [part for method, lr in made.starts.items() for part in ("--lr", f"{method}={lr:g}")]
    words += [part for method, given in made.arguments.items() for part in ("--with", f"{method}:{given}")]
    return shlex.join([*words, "--output_dir", made.folder, *made.overrides])
