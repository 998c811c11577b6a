"""From rows of numbers, one for each example of a split, to all that a report says of a model on a suite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from hf_momentum.evaluation import robustness
from hf_momentum.evaluation.metrics import Estimate, estimate_of, estimates, resampled_sums
from hf_momentum.evaluation.results import Point, SplitScores
from hf_momentum.evaluation.scores import (
    LOWER_IS_BETTER,
    Metric,
    Scorer,
    by_group,
    gap,
    paired,
    reliability,
    scorer,
    scores,
)
from hf_momentum.evaluation.suite import CLASSIFIERS, SuiteSplit

_SHARES = {"accuracy", "token_accuracy", "exact_match", "f1", "f1_binary", "acc", "acc_norm"}


@dataclass(frozen=True)
class Measured:
    """One model on one split.

    Attributes:
        split: of the suite.
        rows: `[examples, columns]`, as the scorer takes them.
        scorer: what becomes metrics of them, the split's main one first.
        groups: of each example; empty without a group column.
    """

    split: SuiteSplit
    rows: np.ndarray
    scorer: Scorer
    groups: Sequence[str] = ()


@dataclass(frozen=True)
class Against:
    """How far the scores on a split are from others: shifted less in distribution, or this model less its base.

    Attributes:
        split: its name.
        other: the split, or the model, that is taken off.
        paired: whether both scores are of the same examples.
        scores: the difference of each metric that both have.
    """

    split: str
    other: str
    paired: bool
    scores: Mapping[str, Estimate]


@dataclass(frozen=True)
class Mean:
    """The mean of each metric over several severities of one corruption of the same examples.

    Attributes:
        corruption, of: what was done to the rows of which split.
        splits, severities: that were measured.
        scores: the means.
        changes: the means less the clean rows' scores, over the same examples.
    """

    corruption: str
    of: str
    splits: Sequence[str]
    severities: Sequence[int]
    scores: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]


@dataclass(frozen=True)
class Robustness:
    """A model's place beside the line that baselines draw for a shift.

    Attributes:
        split, other: the shifted split, and the one in distribution.
        metric: whose values are compared.
        baselines: their points; each needs both splits and the metric.
        point: this model's.
        line: through the baselines; None where they do not determine one.
        reason: why there is no line.
        effective: the distance from the line, positive where this model is better; its interval is over examples and
            takes the line as known.
    """

    split: str
    other: str
    metric: str
    baselines: Sequence[Point]
    point: Point
    line: robustness.Line | None
    reason: str
    effective: Estimate | None


def scorer_of(split: SuiteSplit, classes: int = 0) -> Scorer:
    """The metrics of a split. Rows of a language model have UTF-8 bytes as a fourth column, for bits per byte.

    Example:
        >>> made = scorer_of(SuiteSplit("code", "in distribution", metrics=("bits_per_byte",)))
        >>> round(float(made.metrics["bits_per_byte"](np.array([2 * np.log(2), 3, 1, 4]))), 6)
        0.5
    """
    made = scorer(split.task, classes=classes, metrics=split.metrics or None)
    if "bits_per_byte" not in made.metrics:
        return made
    # A constant of bytes per token would not do: splits differ in it, and so does every sample of documents.
    return replace(
        made, metrics={**made.metrics, "bits_per_byte": lambda sums: sums[..., 0] / np.log(2) / sums[..., 3]}
    )


def scored(measured: Measured, seed: int = 0) -> SplitScores:
    """All that is said of a split by itself."""
    split, rows = measured.split, measured.rows
    return SplitScores(
        name=split.name,
        role=split.role,
        kind=split.kind,
        source=split.source or f"lm_eval: {split.lm_eval}",
        examples=len(rows),
        scores=scores(measured.scorer, rows, seed),
        groups=by_group(measured.scorer, rows, measured.groups, seed) if measured.groups else {},
        reliability=reliability(rows) if split.task in CLASSIFIERS and split.lm_eval is None else (),
        corruption=split.corruption,
        severity=split.severity,
    )


def gaps(measured: Sequence[Measured], seed: int = 0) -> list[Against]:
    """Every shifted split against the one that it is a shift of; splits that have no such counterpart are left out.

    That is the clean rows of a corrupted split, and otherwise the first split in distribution with the same metrics.
    Corrupted rows are paired with the clean ones, since they are the same examples; others are resampled on their own.
    """
    by_name = {one.split.name: one for one in measured}
    inside = [one for one in measured if one.split.role == "in distribution"]
    found = []
    for one in measured:
        if one.split.role != "shifted":
            continue
        if one.split.of is not None:
            clean = by_name[one.split.of]
            found.append(Against(one.split.name, clean.split.name, True, paired(*_common(clean, one), seed)))
            continue
        other = next((each for each in inside if _comparable(each, one)), None)
        if other is not None:
            found.append(Against(one.split.name, other.split.name, False, gap(*_common(other, one), seed)))
    return found


def changes_from(base: Sequence[Measured], measured: Sequence[Measured], name: str, seed: int = 0) -> list[Against]:
    """The model less its base on every split, over the same examples.

    Where the two count other tokens, a loss per token of one says nothing about the other's; bits per byte remain.
    """
    return [
        Against(after.split.name, name, True, paired(*_common(before, after), seed))
        for before, after in zip(base, measured, strict=True)
    ]


def robustness_of(
    measured: Sequence[Measured],
    gaps: Sequence[Against],
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    label: str,
    seed: int = 0,
) -> list[Robustness]:
    """Effective robustness in the main metric of every shifted split.

    Args:
        measured: this model.
        gaps: which split is compared with which.
        baselines: value by model, split and metric.
        label: of this model.
    """
    by_name = {one.split.name: one for one in measured}
    found = []
    for one in gaps:
        shifted, inside = by_name[one.split], by_name[one.other]
        metric = next(iter(one.scores))
        points = [
            Point(name, splits[one.other][metric], splits[one.split][metric])
            for name, splits in baselines.items()
            if metric in splits.get(one.other, {}) and metric in splits.get(one.split, {})
        ]
        fit = robustness.fit(points, "logit" if metric in _SHARES else "linear")
        effective = None if fit.line is None else _effective(inside, shifted, metric, fit.line, one.paired, seed)
        point = Point(label, _value(inside, metric), _value(shifted, metric))
        found.append(Robustness(one.split, one.other, metric, points, point, fit.line, fit.reason, effective))
    return found


def _effective(
    inside: Measured, shifted: Measured, metric: str, line: robustness.Line, pairs: bool, seed: int
) -> Estimate:
    def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        both = zip(_of(inside, metric, first), _of(shifted, metric, second), strict=True)
        return np.array([line.effective_robustness(Point("", float(x), float(y))) for x, y in both])

    columns = [one.scorer.columns(np.asarray(one.rows, dtype=np.float64)) for one in (inside, shifted)]
    drawn = resampled_sums(columns[0], seed), resampled_sums(columns[1], seed if pairs else seed + 1)
    return estimate_of(distance(columns[0].sum(0), columns[1].sum(0))[0], distance(*drawn))


def _of(measured: Measured, metric: str, sums: np.ndarray) -> np.ndarray:
    return np.atleast_1d(measured.scorer.metrics[metric](sums))


def _value(measured: Measured, metric: str) -> float:
    return float(measured.scorer.metrics[metric](measured.scorer.columns(measured.rows).sum(0)))


def means_over_severities(measured: Sequence[Measured], seed: int = 0) -> list[Mean]:
    """The mean over severities wherever a corruption of a split was measured at more than one; not of calibration."""
    clean = {one.split.name: one for one in measured}
    families: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        if one.split.corruption is not None and one.split.of is not None:
            families.setdefault((one.split.corruption, one.split.of), []).append(one)
    return [
        Mean(
            corruption,
            of,
            [one.split.name for one in family],
            [one.split.severity for one in family],
            *_mean_scores(clean[of], family, seed),
        )
        for (corruption, of), family in families.items()
        if len(family) > 1
    ]


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is a better one.

    Example:
        >>> lower_is_better("word_perplexity"), lower_is_better("accuracy")
        (True, False)
    """
    return metric in LOWER_IS_BETTER or metric.endswith("perplexity")


def _mean_scores(
    clean: Measured, family: Sequence[Measured], seed: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """One bootstrap for all severities: their columns side by side, so that an example is drawn with all it has."""
    columns = [one.scorer.columns(np.asarray(one.rows, dtype=np.float64)) for one in (clean, *family)]
    ends = np.cumsum([0, *(each.shape[1] for each in columns)])
    places = [slice(start, stop) for start, stop in pairwise(ends)]
    metrics: dict[str, Metric] = {}
    changes: dict[str, Metric] = {}
    for name, metric in family[0].scorer.metrics.items():
        # The percentiles of resampled calibration errors are no interval (see `scores`); each severity has its own.
        if name != "calibration_error" and all(name in one.scorer.metrics for one in (clean, *family)):
            metrics[name] = partial(_mean_of, metric, places[1:])
            changes[name] = partial(_change_of, metric, places)
    together = np.concatenate(columns, axis=1)
    return estimates(together, metrics, seed), estimates(together, changes, seed)


def _mean_of(metric: Metric, places: Sequence[slice], sums: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean([metric(sums[..., place]) for place in places], axis=0))


def _change_of(metric: Metric, places: Sequence[slice], sums: np.ndarray) -> np.ndarray:
    return _mean_of(metric, places[1:], sums) - metric(sums[..., places[0]])


def _comparable(one: Measured, other: Measured) -> bool:
    return (
        one.split.task == other.split.task
        and (one.split.lm_eval is None) == (other.split.lm_eval is None)
        and bool(set(one.scorer.metrics) & set(other.scorer.metrics))
    )


def _common(before: Measured, after: Measured) -> tuple[Scorer, np.ndarray, np.ndarray]:
    """A scorer of the metrics that both have, in the order of the second one, and the rows of both."""
    names = [name for name in after.scorer.metrics if name in before.scorer.metrics]
    language = after.split.task == "causal_lm" and after.split.lm_eval is None
    same_rows = len(before.rows) == len(after.rows)
    if (
        language
        and same_rows
        and not np.array_equal(before.rows[:, 1], after.rows[:, 1])
        and before.split == after.split
    ):
        bits = scorer_of(replace(after.split, metrics=("bits_per_byte",)))
        return bits, before.rows, after.rows
    metrics = {name: after.scorer.metrics[name] for name in names}
    return replace(after.scorer, metrics=metrics), before.rows, after.rows
