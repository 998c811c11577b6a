"""Effective robustness: how much better a model is under shift than its score in distribution predicts.

Over many models, accuracy under a shift follows accuracy in distribution on a straight line, once both are put on a
logit scale (Taori et al. 2020, arXiv 2007.00644; Miller et al. 2021, arXiv 2107.04649). So a model that is better in
distribution is better under shift too, and deserves no praise for that. The line is fitted through baselines; a model's
effective robustness is its distance from the line, in the metric's own unit and positive where the model is better than
the line. Losses are fitted as they are.

The line is taken as known: intervals over seeds do not contain how uncertain a line through few baselines is.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hf_momentum.evaluation.intervals import Interval, t_interval
from hf_momentum.evaluation.results import Point

Scale = Literal["logit", "linear"]


@dataclass(frozen=True)
class Line:
    """`scale(shifted) = intercept + slope * scale(in distribution)`.

    Attributes:
        slope, intercept: on the scale.
        scale: "logit" for accuracies, where larger is better; "linear" for losses, where smaller is.
        points: how many baselines it was fitted through.

    Example:
        >>> Line(1.0, 0.0, "logit", 2).at(0.8), Line(2.0, -1.0, "linear", 2).at(3.0)
        (0.8, 5.0)
    """

    slope: float
    intercept: float
    scale: Scale
    points: int

    def at(self, in_distribution: float) -> float:
        """The score under shift that a score in distribution predicts."""
        if self.scale == "linear":
            return self.intercept + self.slope * in_distribution
        # Without a slope an infinite logit predicts no more than any other.
        steep = self.slope * _logit(in_distribution) if self.slope else 0.0
        return _share(self.intercept + steep)

    def effective_robustness(self, point: Point) -> float:
        """How much better than the line a model is under shift, in the metric's unit; negative if it is worse.

        Example:
            >>> line = Line(1.0, 0.0, "logit", 2)
            >>> round(line.effective_robustness(Point("tam", 0.8, 0.85)), 3)
            0.05
            >>> Line(1.0, 0.0, "linear", 2).effective_robustness(Point("tam", 2.0, 2.5))  # a loss above the line
            -0.5
        """
        above = point.shifted - self.at(point.in_distribution)
        return above if self.scale == "logit" else -above


@dataclass(frozen=True)
class Fit:
    """A line, or the reason why there is none.

    Attributes:
        line: None if the baselines do not determine one.
        reason: a sentence; empty where there is a line.
        left_out: baselines that have no place on the scale: an accuracy of 0 or 1, or a score that is not finite.
    """

    line: Line | None
    reason: str
    left_out: Sequence[Point] = ()


def fit(baselines: Sequence[Point], scale: Scale = "logit") -> Fit:
    """The line of least squares through baselines, on the scale.

    Args:
        baselines: one point per model; several seeds of one method are several models.
        scale: "logit" for accuracies between 0 and 1, "linear" for losses.

    Raises:
        ValueError: an accuracy lies outside of 0 to 1.

    Example:
        >>> fit([Point("a", 0.6, 0.6), Point("b", 0.8, 0.8), Point("c", 0.9, 0.9)]).line.at(0.7)
        0.7
        >>> fit([Point("a", 0.6, 0.5)]).reason
        'a line needs baselines with at least 2 different scores in distribution, got 1'
    """
    if scale == "logit":
        for point in baselines:
            for value in (point.in_distribution, point.shifted):
                if value < 0 or value > 1:
                    raise ValueError(f"accuracy of baseline {point.label!r} must lie between 0 and 1, got {value}")
    placed = [(_scaled(point.in_distribution, scale), _scaled(point.shifted, scale)) for point in baselines]
    finite = [math.isfinite(x) and math.isfinite(y) for x, y in placed]
    used = [place for place, fits in zip(placed, finite, strict=True) if fits]
    left_out = [point for point, fits in zip(baselines, finite, strict=True) if not fits]
    different = _different([x for x, _ in used])
    if different < 2:
        without = (
            f" ({len(left_out)} left out: accuracies of 0 or 1, or scores that are not finite)" if left_out else ""
        )
        needs = "a line needs baselines with at least 2 different scores in distribution"
        return Fit(None, f"{needs}, got {different}{without}", left_out)
    slope, intercept = statistics.linear_regression([x for x, _ in used], [y for _, y in used])
    return Fit(Line(slope, intercept, scale, len(used)), "", left_out)


def over_seeds(line: Line, points: Sequence[Point]) -> Interval:
    """Effective robustness of one method: mean and 95 % t-interval over its seeds.

    Raises:
        ValueError: there is no point.

    Example:
        >>> line = Line(1.0, 0.0, "logit", 2)
        >>> str(over_seeds(line, [Point("tam", 0.8, 0.83), Point("tam", 0.8, 0.85), Point("tam", 0.8, 0.87)]))
        '0.050 [0.000, 0.100]'
    """
    return t_interval([line.effective_robustness(point) for point in points])


def _scaled(value: float, scale: Scale) -> float:
    return _logit(value) if scale == "logit" else value


def _logit(share: float) -> float:
    if share in (0, 1):
        return math.inf if share else -math.inf
    return math.log(share) - math.log1p(-share)


def _share(logit: float) -> float:
    """The inverse of `_logit`; whichever form does not overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _different(values: Sequence[float]) -> int:
    """How many values there are, rounding aside."""
    ordered = sorted(values)
    steps = pairwise(ordered)
    return min(1, len(ordered)) + sum(not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in steps)
