"""Rows of docs/claims.md as plain data, and the verdict as a pure function of their numbers.

A row is one claim in one setting. Its figures are differences, seed by seed, between the method and something else,
with the sign turned so that above 0 is what the claim says. That something is one of

    baseline    what the paper compares with, tuned with the same budget
    control     a run that has all of the method but its idea: a frozen gate, a matched effective learning rate
    untuned     the baseline at the method's own learning rate, which was never tuned for it
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_momentum.evaluation.intervals import Interval, difference, holm, t_interval, t_test

Role = Literal["baseline", "control", "untuned"]

HOLDS = "holds"
ONLY_UNTUNED = "holds only against the untuned baseline"
DOES_NOT_HOLD = "does not hold"
NO_DIFFERENCE = "no significant difference"
NOT_TESTED = "not tested at the paper's scale"


@dataclass(frozen=True)
class Comparison:
    """The method against one opponent: `differences` has one number per seed, above 0 where the claim is right."""

    opponent: str
    role: Role
    differences: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One claim in one setting.

    Attributes:
        claim: what is claimed, in words.
        setting: on what it was measured, in words.
        figure: what is compared, in words.
        unit: of the differences; "times" for natural logarithms of ratios, which are shown as ratios.
        comparisons: none where it could not be tested.
    """

    claim: str
    setting: str
    figure: str
    unit: str
    comparisons: tuple[Comparison, ...] = ()

    @property
    def seeds(self) -> int:
        """How many seeds the differences come from."""
        return max((len(comparison.differences) for comparison in self.comparisons), default=0)


@dataclass(frozen=True)
class Judged:
    """A comparison with its interval over seeds, and p after Holm's correction over all comparisons of the program."""

    opponent: str
    role: Role
    interval: Interval
    p_value: float

    @property
    def better(self) -> bool:
        """Significantly what the claim says."""
        return self.p_value < 0.05 and self.interval.mean > 0

    @property
    def worse(self) -> bool:
        """Significantly the opposite."""
        return self.p_value < 0.05 and self.interval.mean < 0


def comparison(
    opponent: str, role: Role, method: Sequence[float], other: Sequence[float], lower_is_better: bool = False
) -> Comparison:
    """Paired by seed: method minus other, or the reverse where lower is better.

    Example:
        >>> comparison("AdamW", "baseline", [0.5, 0.5], [0.75, 0.5], lower_is_better=True).differences
        (0.25, 0.0)
    """
    sign = -1 if lower_is_better else 1
    pairs = zip(method, other, strict=True)
    return Comparison(opponent, role, tuple(sign * difference(a, b) + 0.0 for a, b in pairs))


def versus(
    method: Sequence[float], others: Mapping[str, tuple[Role, Sequence[float]]], lower_is_better: bool = False
) -> tuple[Comparison, ...]:
    """The method against several: `others` has role and values, seed by seed, by name.

    Example:
        >>> [one.role for one in versus([1.0], {"SGD": ("baseline", [2.0]), "frozen": ("control", [2.0])})]
        ['baseline', 'control']
    """
    return tuple(comparison(name, role, method, values, lower_is_better) for name, (role, values) in others.items())


def means(unit: str, values: Mapping[str, Sequence[float]], digits: int = 2) -> str:
    """Means over seeds as one line.

    Example:
        >>> means("percent", {"TAM": [97.0, 98.0], "SGD": [97.0]})
        'TAM 97.50, SGD 97.00 percent'
    """
    shown_means = (f"{name} {sum(found) / len(found):.{digits}f}" for name, found in values.items())
    return f"{', '.join(shown_means)} {unit}".rstrip()


def judged(rows: Sequence[Row]) -> list[list[Judged]]:
    """The comparisons of all rows of one program, with Holm's correction over all of them together.

    Example:
        >>> row = Row("faster", "digits", "steps", "times", (Comparison("SGD", "baseline", (1.0, 1.1, 0.9, 1.0)),))
        >>> judged([row])[0][0].better
        True
    """
    adjusted = iter(holm([t_test(c.differences) for row in rows for c in row.comparisons]))
    return [[_judged(c, adjusted) for c in row.comparisons] for row in rows]


def _judged(one: Comparison, adjusted: Iterator[float]) -> Judged:
    return Judged(one.opponent, one.role, t_interval(one.differences), next(adjusted))


def verdict(comparisons: Sequence[Judged]) -> str:
    """What the numbers allow to say.

    - holds: significantly better than every baseline and every control, of which there is at least one, and not worse
      than the untuned baseline.
    - holds only against the untuned baseline: better than that one, but not than all baselines; or, where there is none
      of those, than all controls.
    - does not hold: none of these, and significantly worse than one of them.
    - no significant difference: none of these; `unbeaten` says to what.
    - not tested at the paper's scale: there are no numbers.

    Example:
        >>> better, worse = Interval(1.0, 0.5, 1.5), Interval(-1.0, -1.5, -0.5)
        >>> verdict([Judged("AdamW", "baseline", better, 0.01), Judged("frozen", "control", worse, 0.01)])
        'does not hold'
        >>> verdict([Judged("AdamW", "baseline", better, 0.01), Judged("frozen", "control", better, 0.2)])
        'no significant difference'
    """
    if not comparisons:
        return NOT_TESTED
    by_role = {role: [one for one in comparisons if one.role == role] for role in ("baseline", "control", "untuned")}
    beaten = {role: bool(found) and all(one.better for one in found) for role, found in by_role.items()}
    worse = any(one.worse for one in comparisons)
    fair = by_role["baseline"] + by_role["control"]
    if fair and all(one.better for one in fair) and not worse:
        return HOLDS
    if beaten["untuned"] and not beaten["baseline"]:
        return ONLY_UNTUNED
    return DOES_NOT_HOLD if worse else NO_DIFFERENCE


def unbeaten(comparisons: Sequence[Judged]) -> list[str]:
    """The baselines and controls that the method is not significantly better than.

    Example:
        >>> unbeaten([Judged("AdamW", "baseline", Interval(1.0, 0.5, 1.5), 0.2)])
        ['AdamW']
    """
    return [one.opponent for one in comparisons if one.role != "untuned" and not one.better]


def shown(one: Judged, unit: str) -> str:
    """A comparison's figure as text.

    Example:
        >>> shown(Judged("SGD", "baseline", Interval(math.log(2), 0.0, math.log(4)), 0.04), "times")
        '2.00 times [1.00, 4.00], p = 0.04'
        >>> shown(Judged("SGD", "baseline", Interval(-0.51, None, None), 1.0), "points")
        '-0.51 points [one seed]'
    """
    mean, low, high = one.interval.mean, one.interval.low, one.interval.high
    if unit == "times":
        mean, low, high = math.exp(mean), low and math.exp(low), high and math.exp(high)
        low, high = (1.0 if bound == 0 else bound for bound in (low, high))
    digits = 4 if unit.startswith("nats") else 2
    sign = "" if unit == "times" else "+"
    if low is None or high is None:
        return f"{mean:{sign}.{digits}f} {unit} [one seed]"
    p = "p < 0.001" if one.p_value < 0.001 else f"p = {one.p_value:.2g}"
    return f"{mean:{sign}.{digits}f} {unit} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}], {p}"


def as_data(row: Row) -> dict[str, Any]:
    """A row for JSON; `from_data` reads it back."""
    return asdict(row)


def from_data(data: dict[str, Any]) -> Row:
    """The row that `as_data` wrote.

    Example:
        >>> row = Row("faster", "digits", "steps", "times", (Comparison("SGD", "baseline", (1.0, 1.1)),))
        >>> from_data(as_data(row)) == row
        True
    """
    comparisons = tuple(
        Comparison(one["opponent"], one["role"], tuple(one["differences"])) for one in data["comparisons"]
    )
    return Row(data["claim"], data["setting"], data["figure"], data["unit"], comparisons)
