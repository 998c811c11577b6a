"""Was the diagnosis worth anything? Retraining what it chose, beside other choices at equal steps, over seeds.

The decisive figure is the rank correlation, over single layer groups, of the score that a group had with the net gain
that retraining it alone achieved; and whether the same figure of a score that knows nothing of the errors is as good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_momentum.diagnosis.overlap import Correlation, spearman
from hf_momentum.diagnosis.report_parts import Kind, another_version, closing, count, from_record, percent, to_record
from hf_momentum.diagnosis.results import BaselineRun, Flips
from hf_momentum.errors import InputError
from hf_momentum.evaluation import pictures
from hf_momentum.evaluation.document import (
    Block,
    Bullets,
    Details,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    literal,
)
from hf_momentum.evaluation.intervals import Interval, difference, paired_tests, t_interval
from hf_momentum.evaluation.writing import listed, write_whole

KIND = Kind("hf-momentum baselines", "hf-momentum repair --baselines")

CHOSEN, SINGLE = "chosen", "group:"
BASELINES = ("full", "head", "random", "relative_lr")
PARAMETERS = "number of parameters"
ALPHA = 0.05
_NAMED = 5  # groups that a cell may name one by one

_METHODS = {
    CHOSEN: "the groups that the diagnosis chose",
    "full": "all weights",
    "head": "the last layer only",
    "random": "as many groups at random",
    "relative_lr": "all weights with learning rates by relative gradient norm",
}
NO_DIFFERENCE = "no significant difference"

Scores = Mapping[int, Mapping[str, Mapping[str, float]]]  # by seed, score and group


@dataclass(frozen=True)
class Difference:
    """One figure less another, paired by seed.

    Attributes:
        other: what is taken away; "" for 0.
        seeds: that both have.
        size: mean difference with its 95 % t-interval; None without a common seed.
        p_value, adjusted: of the paired t-test, and after Holm's correction over all that were tested together.
    """

    other: str
    seeds: Sequence[int]
    size: Interval | None
    p_value: float
    adjusted: float

    @property
    def words(self) -> str:
        """What it says: "larger", "smaller", no significant difference, or that it cannot be said.

        Example:
            >>> Difference("full", [0, 1], Interval(2.0, 1.0, 3.0), 0.01, 0.02).words
            'larger'
            >>> Difference("full", [0], Interval(2.0, None, None), 1.0, 1.0).words
            'too few seeds'
        """
        if self.size is None or len(self.seeds) < 2:
            return "too few seeds"
        if self.adjusted >= ALPHA:
            return NO_DIFFERENCE
        return "larger" if self.size.mean > 0 else "smaller"


def differences(first: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    """A figure by seed less each other one at the same seeds; those tested together share Holm's correction.

    Example:
        >>> found = differences({0: 5.0, 1: 6.0, 2: 7.0}, {"full": {0: 1.0, 1: 2.1, 2: 2.9}, "head": {0: 5.0}})
        >>> [(one.other, one.seeds, one.words) for one in found]
        [('full', [0, 1, 2], 'larger'), ('head', [0], 'too few seeds')]
    """
    common = {name: [seed for seed in first if seed in other] for name, other in others.items()}
    tests = paired_tests([[difference(first[s], other[s]) for s in common[name]] for name, other in others.items()])
    return [
        Difference(name, common[name], test.size, test.p_value, test.adjusted)
        for name, test in zip(others, tests, strict=True)
    ]


@dataclass(frozen=True)
class BaselinesReport:
    """What the diagnosis chose, beside other choices.

    Attributes:
        title: one line.
        unit: what one prediction is: "example" or "token".
        runs: every way to retrain at every seed, on the verification split. Several runs of one way at one seed, such
            as several random choices, count as their mean.
        scores: of the errors, by seed, name of the score and group, from before any retraining.
        controls: the same of what knows nothing of the errors, such as right examples or a random model.
        chosen_rule: how groups were chosen, in words.
        facts: what ran and what it cost, in the order to be listed.
        command: repeats it.
        score: the one of `scores` that chose.
        notes: what a reader has to know, one sentence each.

    Raises:
        InputError: a control has the name of a score.

    Example:
        >>> def run(method, group, size, fixed):
        ...     return BaselineRun(method, 0, [group], size, 1e-3, 1.0, 9, Flips(fixed, 0, 5, 5), 0.1, {})
        >>> runs = [run(f"group:b{n}", f"b{n}", 9 - n, fixed) for n, fixed in enumerate([1, 4, 9])]
        >>> report = BaselinesReport(
        ...     "t", "example", runs, {0: {"contrast": {"b0": 1.0, "b1": 1.5, "b2": 2.0}}}, {}, "top 1"
        ... )
        >>> round(report.correlations["contrast"][0], 3), round(report.correlations["number of parameters"][0], 3)
        (1.0, -1.0)
        >>> BaselinesReport.from_json(report.to_json()).to_json() == report.to_json()
        True
    """

    title: str
    unit: str
    runs: Sequence[BaselineRun]
    scores: Scores
    controls: Scores
    chosen_rule: str
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    score: str = "contrast"
    notes: Sequence[str] = ()
    version: int = 1

    def __post_init__(self) -> None:
        controls = {name for one in self.controls.values() for name in one}
        twice = sorted(controls & {PARAMETERS, *self._score_names})
        if twice:
            raise InputError(f"controls has {twice[0]!r}, which another ranking is called; name it otherwise")

    # ---- for machines ----

    def to_json(self) -> str:
        """The record for machines: every run and score, and under "found" what the report makes of them."""
        found = {
            "verdict": self.verdict(),
            "net": {method: self.net(method) for method in self.methods},
            "correlations": self.correlations,
            "worth": [{**asdict(one), "words": one.words} for one in self.worth],
            "against": [{**asdict(one), "words": one.words} for one in self.against],
            "oracle": self.oracle,
        }
        return to_record(KIND, self, found)

    @staticmethod
    def from_json(text: str, name: str = "the file") -> BaselinesReport:
        """A report that `to_json` wrote.

        Args:
            text: the JSON.
            name: of the file, for errors.

        Raises:
            InputError: it is none.
        """
        content = from_record(KIND, text, name)
        try:
            return BaselinesReport(
                **{
                    **content,
                    "runs": [BaselineRun(**{**one, "flips": Flips(**one["flips"])}) for one in content["runs"]],
                    "scores": _by_seed(content["scores"]),
                    "controls": _by_seed(content["controls"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise another_version(KIND, name, error) from error

    # ---- what follows ----

    @property
    def methods(self) -> list[str]:
        """All that ran: the chosen groups, baselines, then single groups, each in the order of the runs."""
        found = dict.fromkeys(run.method for run in self.runs)
        order = (CHOSEN, *BASELINES)
        known = [method for method in order if method in found]
        return [*known, *(method for method in found if method not in order)]

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return sorted({run.seed for run in self.runs})

    def net(self, method: str) -> dict[int, float]:
        """Net gain by seed on the verification split."""
        return self._means(method, lambda run: run.flips.net)

    @cached_property
    def correlations(self) -> dict[str, dict[int, float]]:
        """By score and by control: Spearman's rho with net gain over single groups at each seed, where it is known."""
        return {
            name: {seed: one.value for seed, one in seeds.items() if one is not None}
            for name, seeds in self._correlated.items()
        }

    @cached_property
    def worth(self) -> list[Difference]:
        """The correlation of the score that chose: against 0, and less that of each control, tested together."""
        found = self.correlations.get(self.score, {})
        controls = {name: by_seed for name, by_seed in self.correlations.items() if name not in self._score_names}
        return differences(found, {"": dict.fromkeys(found, 0.0), **controls})

    @cached_property
    def against(self) -> list[Difference]:
        """Net gain of the chosen groups less that of each baseline, tested together; single groups are no baselines."""
        others = [method for method in self.methods if method != CHOSEN and not method.startswith(SINGLE)]
        return differences(self.net(CHOSEN), {method: self.net(method) for method in others})

    @cached_property
    def oracle(self) -> dict[int, float]:
        """By seed, the largest net gain of a single group: known only after all were tried on the same split."""
        nets = [self.net(method) for method in self.methods if method.startswith(SINGLE)]
        return {
            seed: max(net[seed] for net in nets if seed in net) for seed in sorted({s for net in nets for s in net})
        }

    # ---- for people ----

    def verdict(self) -> str:
        """Whether the diagnosis was worth anything, in one sentence that follows from the intervals."""
        found = self.correlations.get(self.score, {})
        if not found:
            return (
                "Whether the diagnosis was worth anything is not known: at no seed are there three single groups whose "
                f"{self.score} and net gain are known and differ."
            )
        interval, *others = self.worth
        assert interval.size is not None
        rho = f"the rank correlation of {self.score} with the net gain of single groups is"
        if len(found) < 2:
            (seed,) = found
            one = self._correlated[self.score][seed]
            assert one is not None
            return (
                f"Of one seed only, {rho} {one.value:.2f} (p = {one.p_value:.2g} over groups): nothing is known about "
                "other runs, so whether the diagnosis was worth anything is not known."
            )
        rho += f" {interval.size.shown(2)} over {len(found)} seeds"
        if interval.words == "smaller":
            return f"The diagnosis misled: {rho}, below 0 (p = {interval.adjusted:.2g})."
        if interval.words != "larger":
            return f"The diagnosis was not shown to be worth anything: {rho}, {NO_DIFFERENCE} from 0."
        rho += f" (p = {interval.adjusted:.2g})"
        better = [_name(one.other) for one in others if one.words == "smaller"]
        like = [_name(one.other) for one in others if one.words == NO_DIFFERENCE]
        if better:
            return f"The diagnosis foretold where retraining helps, but {listed(better)} foretold it better: {rho}."
        if like:
            return (
                "The diagnosis foretold where retraining helps, but was not shown to do it better than "
                f"{listed(like)}, which {'knows' if len(like) == 1 else 'know'} nothing of the errors: {rho}."
            )
        if any(one.words == "larger" for one in others):
            return f"The diagnosis was worth something: {rho}, larger than that of every control it was compared with."
        return f"The diagnosis foretold where retraining helps: {rho}. No control is there to compare it with."

    def sentences(self) -> list[str]:
        """What else follows, one sentence each: the chosen groups against each baseline, and against the oracle.

        Example:
            >>> BaselinesReport("t", "example", [], {}, {}, "top 1").sentences()
            ['No run of the chosen groups is there, so nothing is said about their gain.']
        """
        chosen = self.net(CHOSEN)
        if not chosen:
            return ["No run of the chosen groups is there, so nothing is said about their gain."]
        gain = t_interval(list(chosen.values()))
        said = [f"Retraining the chosen groups ({self.chosen_rule}) gained {gain.shown(1)} {self.unit}s net."]
        phrases = {
            "larger": "It gained more than retraining",
            "smaller": "It gained less than retraining",
            NO_DIFFERENCE: "No significant difference in net gain from retraining",
            "too few seeds": "Too few seeds to compare it with retraining",
        }
        for words, phrase in phrases.items():
            names = [_name(one.other) for one in self.against if one.words == words]
            if names:
                said.append(f"{phrase} {listed(names)}.")
        if self.oracle:
            said.append(self._reached())
        if len(self.seeds) == 1:
            said.append("There is one seed, so there are no intervals, and nothing is known about other runs.")
        return said

    def document(self) -> Document:
        """The report for people."""
        blocks: list[Block] = [Verdict(literal(self.verdict())), Bullets([literal(one) for one in self.sentences()])]
        blocks += [Heading("Did the score foretell the gain?"), *self._foretold()]
        if any(self.net(method) for method in self.methods):
            blocks += [Heading("Every way to retrain"), *self._ways()]
        blocks += closing(self.facts, self.notes, self.command)
        return Document(literal(self.title), blocks)

    def write(self, folder: Path) -> Path:
        """Write `report.json`, `report.md`, `report.html` and `plots/*.png`; each appears whole or not at all.

        Returns:
            The path of `report.html`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        page = self.document().write(folder)
        write_whole(folder / "report.json", self.to_json())
        return page

    # ---- figures ----

    def _means(self, method: str, figure: Callable[[BaselineRun], float | None]) -> dict[int, float]:
        """A figure of a run by seed, the mean of several runs at one seed; runs without it are left out."""
        by_seed: dict[int, list[float]] = {}
        for run in self.runs:
            value = figure(run) if run.method == method else None
            if value is not None:
                by_seed.setdefault(run.seed, []).append(value)
        return {seed: statistics.fmean(values) for seed, values in sorted(by_seed.items())}

    @property
    def _score_names(self) -> list[str]:
        return list(dict.fromkeys(name for scores in self.scores.values() for name in scores))

    @cached_property
    def _gains(self) -> dict[int, dict[str, float]]:
        """Net gain of each single group by seed."""
        found: dict[int, dict[str, float]] = {seed: {} for seed in self.seeds}
        for method in self.methods:
            if method.startswith(SINGLE):
                for seed, net in self.net(method).items():
                    found[seed][method.removeprefix(SINGLE)] = net
        return found

    @cached_property
    def _correlated(self) -> dict[str, dict[int, Correlation | None]]:
        """Every score and control, then the number of parameters: its rank correlation with the gains at each seed."""
        single = [run for run in self.runs if run.method.startswith(SINGLE)]
        sizes = {run.method.removeprefix(SINGLE): float(run.parameters) for run in single}
        found: dict[str, dict[int, Correlation | None]] = {}
        for by_seed in (self.scores, self.controls, {seed: {PARAMETERS: sizes} for seed in self._gains}):
            for seed, gains in self._gains.items():
                for name, values in by_seed.get(seed, {}).items():
                    common = [group for group in gains if math.isfinite(values.get(group, math.nan))]
                    if len(common) > 2:
                        one = spearman([values[group] for group in common], [gains[group] for group in common])
                        found.setdefault(name, {})[seed] = one
        return found

    def _reached(self) -> str:
        chosen = self.net(CHOSEN)
        both = [seed for seed in chosen if seed in self.oracle]
        if not both:
            return "The chosen groups and single groups have no seed in common."
        gained = statistics.fmean(chosen[seed] for seed in both)
        best = statistics.fmean(self.oracle[seed] for seed in both)
        if best > 0:
            reached = f"the chosen ones reached {percent(gained / best)} of that ({gained:.1f})"
        else:
            reached = f"the chosen ones {gained:.1f}, and no single group was worth retraining"
        return (
            f"The best single group gained {best:.1f}; {reached}. Which group is best was seen on the split that it is "
            "measured on, so this oracle is optimistic."
        )

    # ---- parts of the document ----

    def _foretold(self) -> list[Block]:
        if not self.correlations:
            return [Text("No seed has three single groups with scores and gains: there is nothing to correlate.")]
        against = {one.other: one for one in self.worth}
        rows = []
        for name, by_seed in self.correlations.items():
            one = against.get("" if name == self.score else name)
            mean = t_interval(list(by_seed.values())).shown(2) if by_seed else "not known"
            compared = [""] * 3
            if one is not None and one.size is not None:
                less = "against 0" if name == self.score else one.size.shown(2)
                tested = f"{one.adjusted:.3g}" if len(one.seeds) > 1 else ""
                compared = [less, tested, one.words]
            kind = "chose" if name == self.score else "score" if name in self._score_names else "control"
            rows.append([literal(_name(name)), kind, str(len(by_seed)), mean, *compared])
        header = ["score", "is a", "seeds", "Spearman's rho [95 %]", f"{self.score} less it [95 %]", "p after Holm"]
        caption = "Rank correlation with the net gain of retraining single groups, at each seed over groups."
        blocks: list[Block] = []
        points = self._points()
        if points:
            blocks.append(
                Picture(
                    "score_against_gain",
                    "Each point is one layer group at one seed. If the diagnosis is right, points rise to the right.",
                    f"Net gain of single groups against their {self.score}, for {count(len(points), 'seed')}.",
                    pictures.score_against_gain(points, self.score, f"net gain ({self.unit}s)"),
                )
            )
        said = (
            "Intervals are 95 % t-intervals over seeds, which do not know that rho ends at 1; p-values are of t-tests, "
            f"paired by seed, after Holm's correction over all of this table. Other scores of the errors are shown but "
            f"not tested. {_CAREFUL}"
        )
        return [*blocks, Table([*header, f"{self.score}'s is"], rows, left=2, caption=caption), Text(said)]

    def _points(self) -> dict[str, list[tuple[float, float, bool]]]:
        chosen = {run.seed: set(run.groups) for run in self.runs if run.method == CHOSEN}
        found = {}
        for seed, gains in self._gains.items():
            values = self.scores.get(seed, {}).get(self.score, {})
            points = [
                (values[group], gain, group in chosen.get(seed, ())) for group, gain in gains.items() if group in values
            ]
            if points:
                found[f"seed {seed}"] = points
        return found

    def _ways(self) -> list[Block]:
        named = [method for method in self.methods if not method.startswith(SINGLE)]
        single = [method for method in self.methods if method.startswith(SINGLE)]
        blocks: list[Block] = []
        if named:
            blocks += [self._picture(named), self._table(named)]
        if any(one.size for one in self.against):
            rows = [
                [
                    f"chosen minus {literal(_name(one.other))}",
                    str(len(one.seeds)),
                    "" if one.size is None else one.size.shown(1),
                    *([f"{one.p_value:.3g}", f"{one.adjusted:.3g}"] if len(one.seeds) > 1 else ["", ""]),
                    one.words,
                ]
                for one in self.against
            ]
            header = ["difference in net gain", "seeds", "size [95 %]", "p", "p after Holm", "chosen is"]
            blocks += [Table(header, rows)]
        blocks.append(
            Text(
                "All had the same number of steps, and each the best on validation of the learning rates tried. Net "
                f"gain is fixed less broken {self.unit}s on the verification split. Intervals are 95 % t-intervals "
                f"over seeds, differences are paired by seed. {_CAREFUL}"
            )
        )
        if single:
            blocks.append(
                Details(
                    "Every single group",
                    [self._table(single), Text("No test is made of these: there are too many for the seeds.")],
                )
            )
        return [*blocks, Details("Every run", [self._every_run()])]

    def _every_run(self) -> Table:
        rows = [
            [
                literal(_name(run.method)),
                literal(listed(list(run.groups)) if len(run.groups) < _NAMED else f"{len(run.groups)} groups"),
                str(run.seed),
                f"{run.learning_rate:g}",
                f"{run.share:g}",
                f"{run.steps:,}",
                f"{run.flips.fixed:,}",
                f"{run.flips.broken:,}",
                f"{run.flips.net:+,}",
                f"{run.p_value:.3g}",
            ]
            for run in self.runs
        ]
        header = ["trained", "groups", "seed", "learning rate", "share of new weights", "steps", "fixed", "broken"]
        return Table([*header, "net", "p"], rows, left=2)

    def _picture(self, methods: Sequence[str]) -> Picture:
        nets = {method: t_interval(list(self.net(method).values())) for method in methods}
        tests = paired_tests([list(self.net(method).values()) for method in methods])
        rows = [
            pictures.Difference(_name(method), nets[method], "net gain", test.adjusted < ALPHA)
            for method, test in zip(methods, tests, strict=True)
        ]
        rows += [
            pictures.Difference(
                _name(one.other), one.size, "chosen minus", one.words not in (NO_DIFFERENCE, "too few seeds")
            )
            for one in self.against
            if one.size is not None
        ]
        return Picture(
            "net_gain",
            "Net gain of every way to retrain, and how much more the chosen groups gained. Filled: different from 0 "
            "after Holm's correction.",
            f"Net gain of {listed([_name(method) for method in methods])}.",
            pictures.differences(rows, f"{self.unit}s: right of 0 is better", 1),
        )

    def _table(self, methods: Sequence[str]) -> Table:
        shifted = list(dict.fromkeys(name for run in self.runs for name in run.shifted))
        rows = []
        for method in methods:
            runs = [run for run in self.runs if run.method == method]
            rows.append(
                [
                    literal(_name(method)),
                    str(len(self.net(method))),
                    t_interval(list(self.net(method).values())).shown(1),
                    f"{statistics.fmean(run.flips.fixed for run in runs):.1f}",
                    f"{statistics.fmean(run.flips.broken for run in runs):.1f}",
                    f"{statistics.median(run.parameters for run in runs):,.0f}",
                    f"{statistics.median(run.learning_rate for run in runs):g}",
                    *(self._shifted(method, split) for split in shifted),
                ]
            )
        header = ["trained", "seeds", "net gain [95 %]", "fixed", "broken", "parameters", "learning rate"]
        return Table(
            [*header, *(f"net on {literal(split)} [95 %]" for split in shifted)],
            rows,
            caption="Means over seeds; of parameters and learning rates medians.",
        )

    def _shifted(self, method: str, split: str) -> str:
        found = self._means(method, lambda run: run.shifted.get(split))
        return t_interval(list(found.values())).shown(1) if found else ""


_CAREFUL = f'"{NO_DIFFERENCE.capitalize()}" is no proof that there is none: there may be too few seeds.'

_NAMES = {
    "right-raw": "raw norm of right predictions",
    "random-contrast": "contrast of a random model",
    "random-raw": "raw norm of a random model",
    **_METHODS,
}


def _name(key: str) -> str:
    """Words for a method, a score or a control."""
    return _NAMES.get(key, key.removeprefix(SINGLE))


def _by_seed(content: Mapping[str, Any]) -> dict[int, Any]:
    """JSON has no whole numbers as keys."""
    return {int(seed): values for seed, values in content.items()}
