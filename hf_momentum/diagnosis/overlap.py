"""How far two rankings of layer groups, or two choices of them, agree, and how often chance alone would do as well."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, permutations

import numpy as np

from hf_momentum.errors import InputError

_EXACT_UP_TO = 9  # 9! = 362,880 permutations
_DRAWN = 10_000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two lists.

    Attributes:
        value: from -1 to 1.
        p_value: two-sided: the share of permutations with a correlation at least as far from 0.
        exact: whether all permutations were counted; else 10,000 drawn ones and the list itself.
    """

    value: float
    p_value: float
    exact: bool


def spearman(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Correlation | None:
    """The rank correlation of two scores of the same groups; None if all are equal in either.

    Equal values share the mean of their ranks. The p-value is exact up to 9 groups, ties included. Beyond, it is
    (k + 1) / (n + 1), where k of n = 10,000 drawn permutations correlate at least as strongly: never 0, and valid.

    Args:
        first, second: one value for each group.
        seed: of the drawn permutations.

    Raises:
        InputError: the lengths differ, or a value is not a number.

    Example:
        >>> spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0])
        Correlation(value=0.8, p_value=0.3333333333333333, exact=True)
        >>> spearman([1.0, 2.0], [5.0, 5.0]) is None
        True
    """
    if len(first) != len(second):
        raise InputError(f"a rank correlation needs two values for each group, got {len(first)} and {len(second)}")
    if any(math.isnan(value) for value in chain(first, second)):
        raise InputError("a rank correlation needs numbers, got nan")
    # Twice the rank is a whole number even with ties, so everything below is exact.
    count, a, b = len(first), _doubled_ranks(first), _doubled_ranks(second)
    spread = _moment(a, a) * _moment(b, b)
    if spread == 0:
        return None
    observed = _moment(a, b)
    exact = count <= _EXACT_UP_TO
    if exact:
        every = np.fromiter(chain.from_iterable(permutations(b.tolist())), dtype=np.int64).reshape(-1, count)
    else:
        every = np.random.default_rng(seed).permuted(np.tile(b, (_DRAWN, 1)), axis=1)
    as_far = int((np.abs(count * (every @ a) - a.sum() * b.sum()) >= abs(observed)).sum())
    p_value = as_far / len(every) if exact else (as_far + 1) / (len(every) + 1)
    return Correlation(observed / math.sqrt(spread), p_value, exact)


def _doubled_ranks(values: Sequence[float]) -> np.ndarray:
    """Twice the rank from 1, where equal values share the mean of theirs."""
    given = np.asarray(values, dtype=np.float64)
    smaller = np.count_nonzero(given[None, :] < given[:, None], axis=1)
    equal = np.count_nonzero(given[None, :] == given[:, None], axis=1)
    doubled: np.ndarray = 2 * smaller + equal + 1
    return doubled


def _moment(a: np.ndarray, b: np.ndarray) -> int:
    """The covariance of whole numbers times the square of their count."""
    return len(a) * int(a @ b) - int(a.sum()) * int(b.sum())


@dataclass(frozen=True)
class Overlap:
    """What two choices of groups have in common.

    Attributes:
        common: how many groups are in both.
        expected: how many would be, on average, if one of them were drawn at random.
        p_value: the probability that at least as many would be.
    """

    common: int
    expected: float
    p_value: float


def overlap(first: Collection[str], second: Collection[str], total: int) -> Overlap:
    """What two choices from the same `total` groups have in common; the probability is exact (hypergeometric).

    Raises:
        InputError: `total` is less than the number of groups that the two name.

    Example: the same 3 of 7 groups, which chance alone gives once in 35
        >>> overlap(["a", "b", "c"], ["c", "a", "b"], total=7)
        Overlap(common=3, expected=1.2857142857142858, p_value=0.02857142857142857)
    """
    a, b = set(first), set(second)
    if total < max(1, len(a | b)):
        raise InputError(f"total must be at least the {max(1, len(a | b))} groups that were chosen from, got {total}")
    common = len(a & b)
    ways = sum(
        math.comb(len(a), k) * math.comb(total - len(a), len(b) - k) for k in range(common, min(len(a), len(b)) + 1)
    )
    return Overlap(common, len(a) * len(b) / total, ways / math.comb(total, len(b)))
