"""Intervals and tests over seeds: Student's t, paired by seed, and Holm's correction for several comparisons."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval; of a single seed the interval is not known.

    Example:
        >>> str(Interval(2.0, 1.5, 2.5)), str(Interval(2.0, None, None))
        ('2.000 [1.500, 2.500]', '2.000 [one seed]')
    """

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return self.shown(3)

    def shown(self, digits: int) -> str:
        """As text with so many digits behind the point."""
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f} [one seed]"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def t_within(t: float, degrees: int) -> float:
    """The probability that Student's t with whole `degrees` of freedom lies between -t and t.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, which hold for whole degrees of freedom.

    Raises:
        ValueError: degrees is below 1.

    Example:
        >>> round(t_within(12.7062, 1), 4), round(t_within(2.7764, 4), 4), t_within(0.0, 3)
        (0.95, 0.95, 0.0)
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {degrees}")
    angle = math.atan2(abs(t), math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(within: float, degrees: int) -> float:
    """The t with probability `within`, in [0, 1), between -t and t; the inverse of `t_within`.

    Example:
        >>> round(t_quantile(0.95, 2), 3), round(t_quantile(0.95, 30), 3)
        (4.303, 2.042)
    """
    low, high = 0.0, 1.0
    while t_within(high, degrees) < within:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < within else (low, middle)
    return (low + high) / 2


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of the mean by Student's t; without an interval for a single value.

    Raises:
        ValueError: there is no value.

    Example:
        >>> str(t_interval([1.0, 2.0, 3.0]))
        '2.000 [-0.484, 4.484]'
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    half = t_quantile(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def t_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of Student's t for a mean difference of 0; 1 for fewer than two differences.

    Differences that are all equal, as counts of a few hundred examples can be by chance, would have p = 0. They say no
    more than their signs do, so theirs is the sign test's 2^(1 - n).

    Example:
        >>> round(t_test([1.0, 2.0, 3.0]), 4), t_test([0.0, 0.0]), t_test([0.7])
        (0.0742, 1.0, 1.0)
        >>> t_test([0.1, 0.1, 0.1])
        0.25
    """
    if len(differences) < 2:
        return 1.0
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread <= 1e-9 * abs(mean):  # equal but for rounding
        return 1.0 if mean == 0 else 2.0 ** (1 - len(differences))
    return 1 - t_within(mean / spread * math.sqrt(len(differences)), len(differences) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: below 0.05 means significant at 5 % over all of them together.

    Example:
        >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
        [0.06, 0.03, 0.06]
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class PairedTest:
    """What differences over seeds say.

    Attributes:
        size: their mean with its 95 % t-interval; None if there are none.
        p_value: of the paired t-test.
        adjusted: after Holm's correction over all that were tested together.
    """

    size: Interval | None
    p_value: float
    adjusted: float


def paired_tests(together: Sequence[Sequence[float]]) -> list[PairedTest]:
    """Several comparisons at once, each by its differences over seeds.

    One of fewer than two differences cannot be made. It must not make the others harder, so it is not counted.

    Example:
        >>> tests = paired_tests([[1.0, 1.1, 0.9], [0.1, -0.1, 0.0], [5.0]])
        >>> [(round(test.p_value, 3), round(test.adjusted, 3)) for test in tests]
        [(0.003, 0.007), (1.0, 1.0), (1.0, 1.0)]
    """
    p_values = [t_test(differences) for differences in together]
    made = [index for index, differences in enumerate(together) if len(differences) > 1]
    adjusted = dict(zip(made, holm([p_values[index] for index in made]), strict=True))
    return [
        PairedTest(t_interval(differences) if differences else None, p_values[index], adjusted.get(index, 1.0))
        for index, differences in enumerate(together)
    ]


def difference(first: float, second: float) -> float:
    """`first - second`, and 0 where it is no more than rounding, which a t-test would take for very regular.

    Example:
        >>> difference(0.1 + 0.2, 0.3), difference(2.0, 1.5)
        (0.0, 0.5)
    """
    return 0.0 if math.isclose(first, second, rel_tol=1e-12) else first - second
