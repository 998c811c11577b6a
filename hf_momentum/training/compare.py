"""The plan behind `hf-momentum compare`: which runs there are, which come next, and what they say.

Three stages follow from finished runs alone, so that a comparison that was killed goes on as if it had not been:
learning rates are tuned on validation data, all optimizers with equally many runs; each optimizer runs at its best one;
then the controls run, whose learning rates follow from the runs before. Tuning has one seed of its own, or each test
seed is tuned by itself, which costs as many times more and puts the luck of tuning into the intervals.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_momentum.errors import InputError
from hf_momentum.evaluation import tuning
from hf_momentum.evaluation.comparison import Control
from hf_momentum.evaluation.results import RunScores
from hf_momentum.evaluation.scores import LOWER_IS_BETTER, metric_names
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.registry import nearest
from hf_momentum.training.plans import ALONE, check_overrides, digest
from hf_momentum.training.processes import launched_processes
from hf_momentum.training.recipe import Recipe, load_recipe
from hf_momentum.training.sources import Source

BASE = "base model"
CONTROLS = ("frozen_gate", "matched_lr")

# Where the first grid of an optimizer lies, as a multiple of AdamW's learning rate; the grid widens from there. Those
# of Adam's kind follow from docs/which_optimizer.md; those of SGD's kind are ours.
_ADAM = {"adamw_torch", "adamw_torch_fused", "ahb_adam", "ahb_adamw", "critical_adamw", "vradam"}
_RELATIVE = {name: 1.0 for name in _ADAM} | {"adatam": 0.2, "adatamw": 0.2}
_RELATIVE |= {"sgd": 1000.0, "tam": 400.0, "ahb_sgd": 1000.0, "critical_sgd": 400.0, "vrmomentum": 1000.0}

# What the comparison decides in every run; the rest is the recipe's.
_SET = {
    **ALONE,
    "eval_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": "0.05",
    "log_dynamics": "true",
}
_VARIED = {"optim", "optim_args", "learning_rate", "seed", "data_seed", "output_dir"}
_NOT_TO_GIVE = {
    "optim": "name optimizers with --optim A,B",
    "optim_args": "give them with --with NAME:ARGS",
    "learning_rate": "it is tuned; say where its grid begins with --lr NAME=VALUE",
    "data_seed": "the runs' seeds are --seed and the ones after it",
    "resume_from_checkpoint": "finished runs are not repeated anyway",
}


# ---- what is to be run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: an optimizer, a control, or `BASE`.
        role: "tuning" or "test".
        learning_rate: the peak of its schedule.
        seed: of data and model.

    Example:
        >>> str(Run("tam", "tuning", 0.02, 0)), str(Run("tam, frozen gate", "test", 0.02, 3))
        ('tam, lr 0.02, tuning', 'tam, frozen gate, lr 0.02, seed 3')
    """

    method: str
    role: str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        if self.method == BASE:
            return BASE
        end = "tuning" if self.role == "tuning" else f"seed {self.seed}"
        return f"{self.method}, lr {self.learning_rate:g}, {end}"


@dataclass(frozen=True)
class Plan:
    """A comparison that was checked, as `plan` makes it; plain data, so that other processes can be told.

    Attributes:
        config, overrides: the recipe, as for `load_recipe`.
        methods: names of `--optim`; the first is the baseline.
        arguments: `--optim_args` of each method that has some.
        starts: where each method's first grid lies.
        ratio: between neighbours of a grid.
        trials: points of the first grid.
        most: no method is tuned with more.
        seeds: of the test runs.
        tuning_seeds: one, the recipe's own and none of `seeds`, whose learning rates all test runs have; or `seeds`,
            each of which is then tuned by itself.
        controls: of `CONTROLS`.
        metric: what is compared.
        selection: what chooses the learning rate on validation data.
        folder: where the report and the logs go.
        storage: URL of the record of runs.
        digest: of the recipe without what the comparison varies, and of the selection; files are known by their names.
    """

    config: str | None
    overrides: Sequence[str]
    methods: Sequence[str]
    arguments: Mapping[str, str]
    starts: Mapping[str, float]
    ratio: float
    trials: int
    most: int
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    controls: Sequence[str]
    metric: str
    selection: str
    folder: str
    storage: str
    digest: str

    @property
    def baseline(self) -> str:
        """What the others are compared with."""
        return self.methods[0]

    def tuned_with(self, seed: int) -> int:
        """The seed whose tuning a test seed goes by."""
        return seed if seed in self.tuning_seeds else self.tuning_seeds[0]

    @property
    def study(self) -> str:
        """Name of the comparison in its storage."""
        return f"hf-momentum compare {self.digest}"

    def key(self, run: Run) -> str:
        """The run's name in the storage; other arguments of an optimizer make another run."""
        arguments = self.arguments.get(_method_of(run.method), "")
        return f"{run.method}|{arguments}|{run.role}|{run.learning_rate:.6g}|{run.seed}"

    def recipe(self, run: Run) -> Recipe:
        """The recipe of one run."""
        name, arguments = self._optimizer(run.method)
        words = [f"--optim={name}", f"--learning_rate={run.learning_rate!r}"]
        words += [f"--optim_args={arguments}"]  # also where there are none: the recipe's own are for its own optimizer
        words += [f"--seed={run.seed}", f"--data_seed={run.seed}", f"--output_dir={self.folder}"]
        words += [f"--{field}={value}" for field, value in _SET.items()]
        return load_recipe(self.config, [*self.overrides, *words])

    def _optimizer(self, name: str) -> tuple[str, str]:
        """`--optim` and `--optim_args` of a method or control."""
        if name == BASE:
            return self.baseline, self.arguments.get(self.baseline, "")
        method = _method_of(name)
        own = self.arguments.get(method, "")
        if name == method:
            return method, own
        optimizer, more = _controls_of(method)[name]
        kept = own if optimizer == method else self.arguments.get(optimizer, "")
        return optimizer, ",".join(filter(None, [kept, more]))


def _method_of(name: str) -> str:
    return name.partition(",")[0]


def _controls_of(method: str) -> dict[str, tuple[str, str]]:
    """Names of a method's controls, each with its `--optim` and the arguments that make it one."""
    frozen, matched = f"{method}, frozen gate", f"{method}, matched lr"
    sgd = ("tam", "fixed_damping=1.0")  # TAM with d = 1 is SGD with momentum 0.9
    adam = ("adamw_torch", "")
    if method == "tam":
        return {frozen: ("tam", "fixed_damping=0.5"), matched: sgd}
    if method in ("adatam", "adatamw"):
        return {frozen: (method, "fixed_damping=0.5"), matched: adam}
    if method in ("ahb_sgd", "critical_sgd", "vrmomentum"):
        return {matched: sgd}
    if method in ("ahb_adam", "ahb_adamw", "critical_adamw", "vradam"):
        return {matched: adam}
    return {}


_WHAT = {
    "frozen gate": "the same run with the damping fixed at 1/2 (`fixed_damping=0.5`): what is left without the angle",
    "sgd": "SGD with momentum 0.9 (`tam` with `fixed_damping=1`) at the learning rate whose mean effective rate is the "
    "method's",
    "adam": "`adamw_torch` at the learning rate whose mean effective rate is the method's",
}


def controls(made: Plan) -> list[Control]:
    """The controls that were asked for and that a method has.

    Example:
        >>> [control.name for control in controls(_example(controls=["frozen_gate"]))]
        ['tam, frozen gate']
    """
    found = []
    for method in made.methods:
        for name, (optimizer, _) in _controls_of(method).items():
            kind = name.partition(", ")[2]
            if kind.replace(" ", "_") in made.controls:
                what = (
                    _WHAT["frozen gate"] if kind == "frozen gate" else _WHAT["adam" if "adam" in optimizer else "sgd"]
                )
                found.append(Control(name, method, what))
    return found


def _example(**changed: Any) -> Plan:
    """A plan for examples and tests."""
    fields: dict[str, Any] = {
        "config": "quickstart",
        "overrides": [],
        "methods": ["adamw_torch", "tam"],
        "arguments": {},
        "starts": {"adamw_torch": 1e-3, "tam": 0.1},
        "ratio": 10.0,
        "trials": 3,
        "most": 8,
        "seeds": [1, 2],
        "tuning_seeds": [0],
        "controls": [],
        "metric": "loss",
        "selection": "loss",
        "folder": "out",
        "storage": "sqlite:///out/runs.db",
        "digest": "0",
    }
    return Plan(**{**fields, **changed})


# ---- which runs come next --------------------------------------------------------------------------------------------


def tuned(made: Plan, records: Mapping[str, RunScores], seed: int) -> dict[str, dict[float, float]]:
    """Score by learning rate of each method's runs with a tuning seed, lower better; infinite if one was lost."""
    sign = 1.0 if made.selection in LOWER_IS_BETTER else -1.0
    found: dict[str, dict[float, float]] = {method: {} for method in made.methods}
    for run in records.values():
        if run.role == "tuning" and run.method in found and run.seed == seed:
            found[run.method][run.learning_rate] = math.inf if run.validation is None else sign * run.validation
    return found


def needed(made: Plan, records: Mapping[str, RunScores]) -> list[Run]:
    """The runs that can begin now and have no record; empty when all is done.

    Example:
        >>> [str(run) for run in needed(_example(), {})]  # what every run needs, too, and finds what is wrong
        ['base model']
    """
    return [run for run in _stages(made, relevant(made, records)) if made.key(run) not in records]


def relevant(made: Plan, records: Mapping[str, RunScores]) -> dict[str, RunScores]:
    """The records that belong to this plan: a study may hold runs of other methods, seeds and arguments, too."""
    names = {*made.methods, *(control.name for control in controls(made)), BASE}
    seeds = {"tuning": made.tuning_seeds, "test": [made.tuning_seeds[0], *made.seeds]}
    return {
        key: run
        for key, run in records.items()
        if run.method in names
        and run.seed in seeds[run.role]
        and key == made.key(Run(run.method, run.role, run.learning_rate, run.seed))
    }


def _stages(made: Plan, records: Mapping[str, RunScores]) -> list[Run]:
    """All runs that follow from the records: base model, tuning, and once that is done, test runs and controls."""
    base = Run(BASE, "test", 0.0, made.tuning_seeds[0])
    if made.key(base) not in records:
        return [base]  # alone and first: it trains and keeps the small base model, and finds what is wrong
    found = []
    for seed in made.tuning_seeds:
        finished = tuned(made, records, seed)
        wanted = tuning.proposals(finished, made.starts, made.ratio, made.trials, made.most)
        found += [Run(name, "tuning", lr, seed) for name in made.methods for lr in wanted[name]]
    if found:
        return found
    rates = learning_rates(made, records)
    # Seed by seed, so that runs that are compared in time are neighbours in time; controls follow from all of these.
    names = [*made.methods, *(control.name for control in controls(made))]
    tests = [Run(name, "test", rates[name][seed], seed) for seed in made.seeds for name in names if seed in rates[name]]
    return sorted(tests, key=lambda run: run.method not in made.methods)


def learning_rates(made: Plan, records: Mapping[str, RunScores]) -> dict[str, dict[int, float]]:
    """What the test runs of methods and controls have, by seed, as far as it is known."""
    found: dict[str, dict[int, float]] = {name: {} for name in made.methods}
    for seed in made.seeds:
        for method, scores in tuned(made, records, made.tuned_with(seed)).items():
            chosen = tuning.best(scores)
            if chosen is not None:
                found[method][seed] = chosen
    for control in controls(made):
        own = found[control.of]
        found[control.name] = {}
        if control.name.endswith("frozen gate"):
            found[control.name] = dict(own)
            continue
        tests = [records.get(made.key(Run(control.of, "test", lr, seed))) for seed, lr in own.items()]
        gains = [run.gain for run in tests if run is not None and run.gain is not None]
        if gains and all(run is not None for run in tests):
            # Heavy ball's effective rate is lr / (1 - momentum); an average's is lr.
            scale = statistics.fmean(gains) * (0.1 if _controls_of(control.of)[control.name][0] == "tam" else 1.0)
            found[control.name] = {seed: tuning.rung(lr * scale, 1.0, 0) for seed, lr in own.items()}
    return found


# ---- the words of the command line -----------------------------------------------------------------------------------


def pairs(option: str, between: str, words: Sequence[str]) -> dict[str, str]:
    """NAME and what belongs to it, of an option that may be given several times.

    Raises:
        InputError: a word has no such form, or a name comes twice.

    Example:
        >>> pairs("with", ":", ["tam:gamma=0.95"])
        {'tam': 'gamma=0.95'}
    """
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition(between)
        if not separator or not name or not value:
            raise InputError(f"--{option} {word!r} is not of the form NAME{between}VALUE")
        if name in found:
            raise InputError(f"--{option} is given twice for {name!r}")
        found[name] = value
    return found


def rates(words: Sequence[str]) -> dict[str, float]:
    """Learning rates by name, of `--lr NAME=VALUE`.

    Raises:
        InputError: a value is no number.

    Example:
        >>> rates(["tam=0.02"])
        {'tam': 0.02}
    """
    given = pairs("lr", "=", words)
    try:
        return {name: float(value) for name, value in given.items()}
    except ValueError as error:
        raise InputError(f"--lr takes numbers, as in tam=0.02; got {', '.join(words)}") from error


# ---- checking --------------------------------------------------------------------------------------------------------


def plan(
    config: str | None,
    overrides: Sequence[str],
    methods: Sequence[str],
    trials: int,
    seeds: int,
    folder: str,
    storage: str | None = None,
    asked: Sequence[str] = (),
    ratio: float = math.sqrt(10),
    most: int | None = None,
    starts: Mapping[str, float] | None = None,
    arguments: Mapping[str, str] | None = None,
    metric: str | None = None,
    selection: str | None = None,
    each_seed: bool = False,
) -> Plan:
    """Check everything that can be checked before the first run; nothing is written.

    Args:
        config: a recipe with a validation_dataset and evaluation splits.
        overrides: `--field=value` on top of it.
        methods: names of `--optim`, the baseline first.
        trials: learning rates of each first grid, at least 3.
        seeds: test runs of each method, at least 2.
        folder: the output folder.
        storage: URL as Optuna takes it; a file in the folder unless given.
        asked: controls, of `CONTROLS`.
        ratio: between neighbours of a grid, above 1.
        most: no method is tuned with more runs; three times `trials` unless given.
        starts: middle of the first grid by method; else it follows from the recipe's own optimizer and rate.
        arguments: `--optim_args` by method.
        metric: what is compared; the task's main one unless given.
        selection: what chooses the learning rate; `metric` unless given.
        each_seed: tune every test seed by itself, so that the luck of tuning is in the intervals.

    Raises:
        InputError: an unknown or repeated optimizer, too few trials or seeds, an unusable ratio, a field that the
            comparison sets itself, or a recipe that does not fit.
    """
    if launched_processes() > 1:
        raise InputError("compare runs each point on one process; start it without a launcher (--jobs runs several)")
    check_overrides(overrides, _NOT_TO_GIVE, "the comparison")
    starts, arguments = dict(starts or {}), dict(arguments or {})
    _check_numbers(trials, seeds, ratio, most)
    _check_methods(methods, starts, arguments)
    for control in asked:
        if control not in CONTROLS:
            raise InputError(
                f"unknown control {control!r}{nearest(control, CONTROLS)}; accepted: {', '.join(CONTROLS)}"
            )
    recipe = load_recipe(config, [*overrides, f"--output_dir={folder}"])
    accepted = metric_names(recipe.model.task)
    for argument, name in (("metric", metric), ("select", selection)):
        if name is not None and name not in accepted:
            raise InputError(
                f"--{argument} {name!r} is not measured{nearest(name, accepted)}; accepted: {', '.join(accepted)}"
            )
    if recipe.data.validation_dataset is None:
        source = Source.parse(recipe.data.train_dataset)
        part = "--train_dataset {0}[:90%] --validation_dataset {0}[90%:]".format(f"{source.place}@{source.split}")
        raise InputError(
            "learning rates are chosen on validation data; name some with validation_dataset, such as a part of the "
            + ("training data that is not trained on" if "[" in source.split else f"training data: {part}")
        )
    if not recipe.data.in_distribution:
        raise InputError("the recipe has no split of in_distribution; add in_distribution: [NAME=SOURCE@SPLIT]")
    first, own = metric or accepted[0], _own_optimizer(recipe)
    if own in methods and recipe.training.optim_args:
        arguments.setdefault(own, recipe.training.optim_args)
    test_seeds = [recipe.training.seed + 1 + index for index in range(seeds)]
    made = Plan(
        config=config,
        overrides=list(overrides),
        methods=list(methods),
        arguments=arguments,
        starts={method: starts.get(method, _start(recipe, method)) for method in methods},
        ratio=ratio,
        trials=trials,
        most=most or 3 * trials,
        seeds=test_seeds,
        tuning_seeds=test_seeds if each_seed else [recipe.training.seed],
        controls=list(asked),
        metric=first,
        selection=selection or first,  # a record's validation score is in it
        folder=folder,
        storage=storage or f"sqlite:///{Path(folder) / 'runs.db'}",
        digest=digest(recipe, {*_VARIED, *_SET}, selection=selection or first),
    )
    for name in [*made.methods, *(control.name for control in controls(made))]:
        made.recipe(Run(name, "test", made.starts[_method_of(name)], made.seeds[0]))
    return made


def _check_numbers(trials: int, seeds: int, ratio: float, most: int | None) -> None:
    if trials < 3:
        raise InputError(f"trials must be at least 3, got {trials}; with fewer no learning rate has one on both sides")
    if seeds < 2:
        raise InputError(f"seeds must be at least 2, got {seeds}; there is no interval over fewer, and 5 are better")
    if not 1 < ratio < math.inf:
        raise InputError(f"ratio must be above 1, got {ratio:g}; 3.16 makes two learning rates a decade")
    if most is not None and most < trials:
        raise InputError(f"most_trials must be at least trials ({trials}), got {most}")


def _check_methods(methods: Sequence[str], starts: Mapping[str, float], arguments: Mapping[str, str]) -> None:
    from transformers.training_args import OptimizerNames

    known = [*OPTIMIZERS, *(member.value for member in OptimizerNames)]
    if not methods:
        raise InputError(f"optim is empty; name optimizers, the baseline first; our own: {', '.join(OPTIMIZERS)}")
    for method in methods:
        if method not in known:
            raise InputError(f"unknown optimizer {method!r}{nearest(method, known)}; our own: {', '.join(OPTIMIZERS)}")
    if len(set(methods)) < len(methods):
        raise InputError(f"optim holds a name twice: {', '.join(methods)}")
    for option, table in (("lr", starts), ("with", arguments)):
        for method in table:
            if method not in methods:
                raise InputError(
                    f"--{option} names {method!r}, which is not compared; compared are {', '.join(methods)}"
                )
    for method, lr in starts.items():
        if not 0 < lr < math.inf:
            raise InputError(f"--lr {method}={lr:g}: a learning rate must be positive")


def _own_optimizer(recipe: Recipe) -> str:
    return str(getattr(recipe.training.optim, "value", recipe.training.optim))


def _start(recipe: Recipe, method: str) -> float:
    """From the recipe's own learning rate, by the optimizer that it is meant for."""
    own = _own_optimizer(recipe)
    return tuning.rung(recipe.training.learning_rate * _RELATIVE.get(method, 1.0) / _RELATIVE.get(own, 1.0), 1.0, 0)
