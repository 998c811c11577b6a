"""Several optimizers, each tuned with an equal budget, compared seed by seed on every split.

What is compared is the end of each schedule on test data. Two methods are compared by one difference for each seed that
both have; its mean gets Student's t, and all differences of one table are corrected together. Examples are not
resampled here: intervals are over seeds, so they hold for these evaluation examples and other training runs.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_momentum.evaluation import tuning
from hf_momentum.evaluation.intervals import Interval, difference, paired_tests, t_interval
from hf_momentum.evaluation.results import Point, RunScores, SplitFacts
from hf_momentum.evaluation.robustness import Fit, fit
from hf_momentum.evaluation.scores import LOWER_IS_BETTER
from hf_momentum.evaluation.writing import listed, write_whole

LEVEL = 0.05  # of all differences of one table together


@dataclass(frozen=True)
class Control:
    """A run that has what a method has but for its idea.

    Attributes:
        name: as in the runs, such as "tam, frozen gate".
        of: the method that it belongs to.
        what: a sentence on what it is.
    """

    name: str
    of: str
    what: str


@dataclass(frozen=True)
class Difference:
    """One method minus another on one split, seed by seed.

    Attributes:
        method, other: the two.
        split: where they were measured.
        seeds: those that both finished.
        size: the mean difference with the 95 % t-interval of this comparison alone; None without a common seed.
        p_value: of the paired t-test.
        adjusted: after Holm's correction for all differences of the table.
        lower_is_better: whether a negative difference is a gain.
    """

    method: str
    other: str
    split: str
    seeds: Sequence[int]
    size: Interval | None
    p_value: float
    adjusted: float
    lower_is_better: bool

    @property
    def words(self) -> str:
        """What may be said: "better", "worse", "no significant difference", or "not comparable" (under two seeds)."""
        if self.size is None or len(self.seeds) < 2:
            return "not comparable"
        if self.adjusted >= LEVEL:
            return "no significant difference"
        return "better" if (self.size.mean < 0) == self.lower_is_better else "worse"


def differences(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    pairs: Sequence[tuple[str, str]],
    lower_is_better: bool,
) -> list[Difference]:
    """Each pair of methods on every split, corrected together.

    Args:
        scores: by method, split and seed.
        pairs: method and other.
        lower_is_better: of the metric.

    Example:
        >>> scores = {"tam": {"code": {0: 1.0, 1: 1.1, 2: 1.2}}, "sgd": {"code": {0: 1.5, 1: 1.61, 2: 1.7}}}
        >>> [(one.words, str(one.size)) for one in differences(scores, [("tam", "sgd")], lower_is_better=True)]
        [('better', '-0.503 [-0.518, -0.489]')]
        >>> differences(scores, [("tam", "tam")], lower_is_better=True)[0].words
        'no significant difference'
    """
    found: list[tuple[str, str, str, list[int], list[float]]] = []
    for method, other in pairs:
        for split in scores[method]:
            first, second = scores[method][split], scores[other].get(split, {})
            seeds = sorted(set(first) & set(second))
            found.append((method, other, split, seeds, [difference(first[seed], second[seed]) for seed in seeds]))
    tests = paired_tests([values for *_, values in found])
    return [
        Difference(method, other, split, seeds, test.size, test.p_value, test.adjusted, lower_is_better)
        for (method, other, split, seeds, _), test in zip(found, tests, strict=True)
    ]


@dataclass(frozen=True)
class ComparisonReport:
    """Which optimizer did better where, by how much, at what cost, and how sure that is.

    Attributes:
        title: one line.
        unit: what one prediction is ("byte", "token", "example").
        metric: what is compared.
        selection: what chose the learning rates, on validation data.
        methods: the optimizers, in the order asked for.
        baseline: the one that the others are compared with.
        controls: runs beside a method.
        learning_rates: peak learning rate of the test runs, by method and control, and by seed.
        seeds: of the test runs.
        splits: what the runs were measured on.
        runs: tuning and test runs.
        base: scores of the model before training by split, where it was measured.
        facts: what ran, in the order to be listed.
        fairness: sentences on what was held equal.
        troubles: what failed, one sentence each.
        recipe: the YAML of what all runs share.
        command: the command that repeats it all.

    Example:
        >>> split = SplitFacts("code", "in distribution", None, "stdlib:code@test")
        >>> runs = [
        ...     RunScores(m, "test", 0.1, s, "finished", x, {"code": {"loss": x + s / 10 + s * s * y}}, 1.0, 1)
        ...     for m, x, y in (("adamw_torch", 2.0, 0.0), ("tam", 1.5, 0.01))
        ...     for s in range(3)
        ... ]
        >>> report = ComparisonReport(
        ...     "t", "byte", "loss", "loss", ["adamw_torch", "tam"], "adamw_torch", [], {}, [0, 1, 2], [split], runs
        ... )
        >>> report.verdict()
        ['tam against adamw_torch: better on code (loss -0.483 [-0.535, -0.432], p = 0.00062).']
    """

    title: str
    unit: str
    metric: str
    selection: str
    methods: Sequence[str]
    baseline: str
    controls: Sequence[Control]
    learning_rates: Mapping[str, Mapping[int, float]]
    seeds: Sequence[int]
    splits: Sequence[SplitFacts]
    runs: Sequence[RunScores]
    base: Mapping[str, Mapping[str, float]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    fairness: Sequence[str] = ()
    troubles: Sequence[str] = ()
    recipe: str = ""
    command: str = ""
    version: int = 1

    # ---- scores ------------------------------------------------------------------------------------------------------

    @property
    def everyone(self) -> list[str]:
        """Methods, and each one's controls after it."""
        return [
            name
            for method in self.methods
            for name in (method, *(control.name for control in self.controls if control.of == method))
        ]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of the metric is better."""
        return self.metric in LOWER_IS_BETTER

    @cached_property
    def tests(self) -> dict[str, list[RunScores]]:
        """Test runs by method and control, by rising seed."""
        return {
            name: sorted(
                (run for run in self.runs if run.method == name and run.role == "test"), key=lambda run: run.seed
            )
            for name in self.everyone
        }

    def scores(self, metric: str) -> dict[str, dict[str, dict[int, float]]]:
        """A metric of the finished test runs by method, split and seed."""
        return {
            name: {
                split.name: {
                    run.seed: run.scores[split.name][metric]
                    for run in runs
                    if run.status == "finished" and metric in run.scores.get(split.name, {})
                }
                for split in self.splits
            }
            for name, runs in self.tests.items()
        }

    @property
    def metrics(self) -> list[str]:
        """All metrics that a finished test run has, the compared one first."""
        found = {
            metric: None
            for runs in self.tests.values()
            for run in runs
            for values in run.scores.values()
            for metric in values
        }
        return sorted(found, key=lambda metric: metric != self.metric)

    @cached_property
    def against_baseline(self) -> list[Difference]:
        """Every other method minus the baseline on every split."""
        pairs = [(method, self.baseline) for method in self.methods if method != self.baseline]
        return differences(self.scores(self.metric), pairs, self.lower_is_better)

    @cached_property
    def against_controls(self) -> list[Difference]:
        """Every method minus each of its controls on every split; a correction of their own."""
        pairs = [(control.of, control.name) for control in self.controls]
        return differences(self.scores(self.metric), pairs, self.lower_is_better)

    # ---- tuning ------------------------------------------------------------------------------------------------------

    def tuning_runs(self, method: str) -> list[RunScores]:
        """The runs that chose a method's learning rate, by rising rate."""
        chosen = [run for run in self.runs if run.method == method and run.role == "tuning"]
        return sorted(chosen, key=lambda run: (run.learning_rate, run.seed))

    @property
    def tuning_seeds(self) -> list[int]:
        """Those of the tuning runs."""
        return sorted({run.seed for run in self.runs if run.role == "tuning"})

    @cached_property
    def curves(self) -> dict[str, dict[float, float]]:
        """Validation score by learning rate, a mean over tuning seeds; runs that diverged are left out."""
        found: dict[str, dict[float, list[float]]] = {method: {} for method in self.methods}
        for method in self.methods:
            for run in self.tuning_runs(method):
                if run.validation is not None:
                    found[method].setdefault(run.learning_rate, []).append(run.validation)
        return {method: {lr: statistics.fmean(at) for lr, at in curve.items()} for method, curve in found.items()}

    @cached_property
    def edges(self) -> list[str]:
        """Methods whose best learning rate is at an end of what was tried, with any tuning seed."""
        sign = 1 if self.selection in LOWER_IS_BETTER else -1
        found = []
        for method in self.methods:
            by_seed: dict[int, dict[float, float]] = {}
            for run in self.tuning_runs(method):
                score = math.inf if run.validation is None else sign * run.validation
                by_seed.setdefault(run.seed, {})[run.learning_rate] = score
            if not all(map(tuning.interior, by_seed.values())):
                found.append(method)
        return found

    # ---- shift -------------------------------------------------------------------------------------------------------

    def _named(self, role: str) -> list[str]:
        return [split.name for split in self.splits if split.role == role]

    def place(self, run: RunScores) -> Point | None:
        """Mean of the metric over in-distribution splits, and over shifted ones; None unless both were measured."""
        means = []
        for role in ("in distribution", "shifted"):
            values = [run.scores.get(split, {}).get(self.metric) for split in self._named(role)]
            known = [value for value in values if value is not None]
            if not known or len(known) < len(values):
                return None
            means.append(statistics.fmean(known))
        return Point(run.method, means[0], means[1])

    @cached_property
    def line(self) -> Fit:
        """What the baseline's own runs, at all its learning rates and seeds, say that a shifted score should be."""
        runs = [run for run in self.runs if run.method == self.baseline and run.status == "finished"]
        places = [place for place in map(self.place, runs) if place is not None]
        return fit(places, "linear" if self.lower_is_better else "logit")

    def shift_figures(self) -> dict[str, dict[str, Interval]]:
        """By method: scores in and out of distribution, gap, worst split, robustness, forgetting; over seeds."""
        found: dict[str, dict[str, Interval]] = {}
        for name, runs in self.tests.items():
            values: dict[str, list[float]] = {}
            for run in runs:
                for figure, value in self._figures_of(run).items():
                    values.setdefault(figure, []).append(value)
            found[name] = {figure: t_interval(list(known)) for figure, known in values.items()}
        return found

    def _figures_of(self, run: RunScores) -> dict[str, float]:
        found: dict[str, float] = {}
        place = self.place(run)
        if place is not None:
            shifted = [run.scores[split][self.metric] for split in self._named("shifted")]
            found["in distribution"], found["shifted"] = place.in_distribution, place.shifted
            found["gap"] = place.shifted - place.in_distribution
            found["worst shifted split"] = max(shifted) if self.lower_is_better else min(shifted)
            if self.line.line is not None:
                found["effective robustness"] = self.line.line.effective_robustness(place)
        forgotten = [
            run.scores[split][self.metric] - self.base[split][self.metric]
            for split in self._named("must not forget")
            if self.base is not None and self.metric in self.base.get(split, {}) and split in run.scores
        ]
        if forgotten:
            found["change on must not forget"] = statistics.fmean(forgotten)
        return found

    # ---- cost --------------------------------------------------------------------------------------------------------

    def costs(self) -> dict[str, tuple[float, Interval | None, float]]:
        """By method: median seconds of training, time relative to the baseline's over seeds, and peak memory in MiB."""
        at = {run.seed: run for run in self.tests.get(self.baseline, []) if run.status == "finished"}
        found = {}
        for name, runs in self.tests.items():
            done = [run for run in runs if run.status == "finished"]
            if done:
                logs = [math.log(run.seconds / at[run.seed].seconds) for run in done if run.seed in at]
                peak = statistics.fmean(run.peak_memory for run in done) / 2**20
                found[name] = (statistics.median(run.seconds for run in done), _ratio(logs), peak)
        return found

    # ---- words -------------------------------------------------------------------------------------------------------

    def verdict(self) -> list[str]:
        """One sentence for each method that is not the baseline, and one for each control."""
        rows = [*self.against_baseline, *self.against_controls]
        said = []
        for method, other in dict.fromkeys((one.method, one.other) for one in rows):
            said.append(
                self._sentence(method, other, [one for one in rows if (one.method, one.other) == (method, other)])
            )
        return said or [f"{self.baseline} was run alone, so there is nothing to compare."]

    def headline(self) -> str:
        """One sentence for the whole table against the baseline."""
        rows = self.against_baseline
        if not rows:
            return self.verdict()[0]
        groups: dict[str, list[str]] = {}
        for method in dict.fromkeys(one.method for one in rows):
            words = {one.words for one in rows if one.method == method}
            if {"better", "worse"} <= words:
                kind = "better on one split and worse on another"
            elif words & {"better", "worse"}:
                kind = f"{(words & {'better', 'worse'}).pop()} on at least one split"
            else:
                kind = "no significant difference on any split" if words != {"not comparable"} else "not comparable"
            groups.setdefault(kind, []).append(method)
        told = "; ".join(f"{kind}: {', '.join(methods)}" for kind, methods in groups.items())
        return f"Against {self.baseline}, in {self.metric.replace('_', ' ')}: {told}."

    def _sentence(self, method: str, other: str, rows: Sequence[Difference]) -> str:
        lost = [
            f"{len(bad)} of {len(self.tests[name])} seeds of {name} did not finish"
            for name in (method, other)
            if (bad := [run for run in self.tests[name] if run.status != "finished"])
        ]
        phrases = []
        for words in ("better", "worse"):
            chosen = [one for one in rows if one.words == words]
            if chosen:
                phrases.append(f"{words} on " + listed([self._with_figures(one) for one in chosen]))
        for words in ("no significant difference", "not comparable"):
            chosen = [one for one in rows if one.words == words]
            if chosen:
                where = "any split" if len(chosen) == len(rows) > 1 else listed([one.split for one in chosen])
                phrases.append(f"{words} on {where}")
        return f"{method} against {other}: {'; '.join([*phrases, *lost])}."

    def _with_figures(self, one: Difference) -> str:
        assert one.size is not None
        sign = "+" if one.size.mean > 0 else ""
        shown = one.size.shown(self.digits)
        return f"{one.split} ({self.metric} {sign}{shown}, p = {one.adjusted:.2g})"

    @property
    def digits(self) -> int:
        """Digits behind the point that show the differences to about three places."""
        sizes = [abs(one.size.mean) for one in (*self.against_baseline, *self.against_controls) if one.size]
        largest = max(sizes, default=0.0)
        return min(7, max(3, 2 - math.floor(math.log10(largest)))) if largest > 0 else 3

    # ---- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The record for machines."""
        record = asdict(self)
        record["differences"] = [
            {**asdict(one), "words": one.words} for one in (*self.against_baseline, *self.against_controls)
        ]
        record["shift"] = {
            name: {figure: asdict(value) for figure, value in figures.items()}
            for name, figures in self.shift_figures().items()
        }
        record["verdict"] = self.verdict()
        return json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "ComparisonReport":
        """The report that `to_json` wrote; what is computed is computed again."""
        record = json.loads(text)
        for name in ("differences", "shift", "verdict"):
            record.pop(name, None)
        record["controls"] = [Control(**entry) for entry in record["controls"]]
        record["splits"] = [SplitFacts(**entry) for entry in record["splits"]]
        record["learning_rates"] = {
            name: {int(seed): lr for seed, lr in by_seed.items()} for name, by_seed in record["learning_rates"].items()
        }
        record["runs"] = [RunScores(**entry) for entry in record["runs"]]
        return ComparisonReport(**record)

    def write(self, folder: Path) -> Path:
        """Write `report.json`, `report.md`, `report.html` and `plots/`; each file appears whole or not at all.

        Returns:
            The path of `report.html`.
        """
        from hf_momentum.evaluation.comparison_document import document

        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", self.to_json())
        return document(self).write(folder)


def _ratio(logs: Sequence[float]) -> Interval | None:
    """A ratio from its logarithms, whose interval is symmetric on their scale."""
    if not logs:
        return None
    found = t_interval(list(logs))
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return Interval(math.exp(found.mean), *ends)


def _finite(value: Any) -> Any:
    """Infinite and undefined numbers as None, which JSON knows."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
