"""Whether a repaired model is better than it was, on examples that neither diagnosis nor training has seen.

What is counted are flips: predictions fixed (wrong before, right after) and broken (right before, wrong after). If the
repair did nothing, a flip is as likely to fix as to break; the tests here are exact under that.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

from hf_momentum.diagnosis.results import Decision, Flips, Verified
from hf_momentum.errors import InputError
from hf_momentum.evaluation.intervals import holm
from hf_momentum.evaluation.metrics import Estimate, estimate_of, resampled_sums

_EXACT_UP_TO = 1000  # flips of which the binomial sum is formed in whole numbers


# ---- flips -----------------------------------------------------------------------------------------------------------


def flips(before_right: np.ndarray, after_right: np.ndarray) -> Flips:
    """How predictions changed; both arrays are boolean, of the same predictions in the same order.

    Raises:
        ValueError: the shapes differ, or an array is not boolean.

    Example:
        >>> flips(np.array([True, False, False, True]), np.array([True, True, False, False]))
        Flips(fixed=1, broken=1, right=1, wrong=1)
    """
    if before_right.shape != after_right.shape:
        raise ValueError(f"before_right and after_right are of {before_right.shape} and {after_right.shape}")
    if before_right.dtype != np.bool_ or after_right.dtype != np.bool_:
        raise ValueError(f"flips are of boolean arrays, got {before_right.dtype} and {after_right.dtype}")
    before, after = int(np.count_nonzero(before_right)), int(np.count_nonzero(after_right))
    right = int(np.count_nonzero(before_right & after_right))
    return Flips(after - right, before - right, right, before_right.size - before - after + right)


def negative_flip_rate(found: Flips) -> float:
    """The share of all predictions that the change broke.

    Raises:
        ValueError: there are no predictions.

    Example:
        >>> negative_flip_rate(Flips(fixed=5, broken=2, right=90, wrong=3))
        0.02
    """
    return found.broken / _some(found)


def positive_flip_rate(found: Flips) -> float:
    """The share of all predictions that the change fixed.

    Raises:
        ValueError: there are no predictions.

    Example:
        >>> positive_flip_rate(Flips(fixed=5, broken=2, right=90, wrong=3))
        0.05
    """
    return found.fixed / _some(found)


def _some(found: Flips) -> int:
    if found.total == 0:
        raise ValueError("a flip rate needs at least one prediction")
    return found.total


# ---- tests -----------------------------------------------------------------------------------------------------------


def mcnemar(fixed: int, broken: int) -> float:
    """McNemar's exact two-sided p: how often fair coins would give a count at least as uneven; 1 without flips.

    It takes flips to be independent. Those of one document are not: see `row_p_value`.

    Exactly rounded up to 1,000 flips, and to eight digits up to millions.

    Raises:
        ValueError: a count is negative.

    Example:
        >>> mcnemar(0, 5), mcnemar(0, 6), mcnemar(7, 7), mcnemar(0, 0)
        (0.0625, 0.03125, 1.0, 1.0)
        >>> round(mcnemar(62, 40), 4)
        0.0371
    """
    if fixed < 0 or broken < 0:
        raise ValueError(f"fixed and broken are counts, got {fixed} and {broken}")
    count, fewer = fixed + broken, min(fixed, broken)
    if 2 * fewer == count:
        return 1.0
    if count <= _EXACT_UP_TO:
        return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / (1 << count))
    # The terms fall from `fewer` down, each by k / (count - k + 1); about sqrt(count) of them matter.
    terms, term, k = 1.0, 1.0, fewer
    while k > 0 and term > 1e-17 * terms:
        term *= k / (count - k + 1)
        terms += term
        k -= 1
    largest = math.lgamma(count + 1) - math.lgamma(fewer + 1) - math.lgamma(count - fewer + 1) - count * math.log(2)
    return min(1.0, 2 * math.exp(largest) * terms)


def row_p_value(before_counts: np.ndarray, after_counts: np.ndarray) -> float:
    """The exact two-sided sign test over rows, where a row has several predictions, such as the tokens of a document.

    A row counts as better or worse by its net change; rows without one do not count. If each row has one prediction,
    this is McNemar's test.

    McNemar's test over all tokens would be wrong. It takes each flip for evidence of its own, but the tokens of a
    document flip together: a document that the change suits brings ten fixed tokens at once, and ten such documents
    look like a hundred. Under no effect at all it then rejects far more often than its p-value says. Documents are
    drawn independently of each other, and here each has one vote.

    Args:
        before_counts, after_counts: `[rows]`, right predictions of each row; of the same predictions.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> row_p_value(np.array([10, 10, 10, 10, 10, 10]), np.array([19, 11, 12, 11, 14, 11]))
        0.03125
    """
    better, worse = _rows_changed(before_counts, after_counts)
    return mcnemar(better, worse)


def _rows_changed(before_counts: np.ndarray, after_counts: np.ndarray) -> tuple[int, int]:
    """How many rows have more right predictions after, and how many fewer."""
    if before_counts.shape != after_counts.shape:
        raise ValueError(f"before_counts and after_counts are of {before_counts.shape} and {after_counts.shape}")
    return int(np.count_nonzero(after_counts > before_counts)), int(np.count_nonzero(after_counts < before_counts))


# ---- one split -------------------------------------------------------------------------------------------------------


def verified(name: str, role: str, source: str, before: Iterable[np.ndarray], after: Iterable[np.ndarray]) -> Verified:
    """One split before and after, from whether each prediction is right.

    Args:
        name, role, source: as in `Verified`.
        before, after: for each row a boolean array of its predictions; read once, side by side, and of each row only
            counts are kept. An array `[rows]` or `[rows, predictions]` will do. A row without predictions does not
            count.

    Raises:
        ValueError: the two differ in rows, or a row in its predictions; or an array is not boolean.
        InputError: there is no prediction.

    Example:
        >>> before, after = np.array([True] * 80 + [False] * 20), np.array([True] * 90 + [False] * 10)
        >>> found = verified("check", "verification", "reviews@check", before, after)
        >>> found.examples, found.flips.fixed, found.flips.broken, found.p_value
        (100, 10, 0, 0.001953125)
        >>> str(found.after)
        '0.900 [0.840, 0.950]'
    """
    counts = _row_counts(name, before, after)
    if not len(counts):
        raise InputError(f"split {name!r} ({source}) has no predictions; a comparison needs at least one")
    fixed, broken, right, wrong = counts.T
    statistics = np.stack([counts.sum(1), right + broken, right + fixed], axis=1).astype(np.float64)
    better, worse = _rows_changed(right + broken, right + fixed)
    single = bool((statistics[:, 0] == 1).all())
    resampled, total = resampled_sums(statistics, seed=0), statistics.sum(0)
    shares: list[Estimate] = [
        estimate_of(total[column] / total[0], resampled[:, column] / resampled[:, 0]) for column in (1, 2)
    ]
    return Verified(
        name=name,
        role=role,
        source=source,
        examples=len(counts),
        flips=Flips(int(fixed.sum()), int(broken.sum()), int(right.sum()), int(wrong.sum())),
        p_value=mcnemar(better, worse),
        before=shares[0],
        after=shares[1],
        rows_better=None if single else better,
        rows_worse=None if single else worse,
    )


def _row_counts(name: str, before: Iterable[np.ndarray], after: Iterable[np.ndarray]) -> np.ndarray:
    """[rows, 4]: fixed, broken, right and wrong predictions of each row that has any."""
    rows = []
    for place, (first, second) in enumerate(zip_longest(before, after)):
        if first is None or second is None:
            shorter = "before" if first is None else "after"
            raise ValueError(f"split {name!r}: {shorter} has only {place} rows")
        found = flips(np.atleast_1d(first), np.atleast_1d(second))
        if found.total:
            rows.append((found.fixed, found.broken, found.right, found.wrong))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


# ---- the decision ----------------------------------------------------------------------------------------------------


def decide(verification: Verified, others: Sequence[Verified], alpha: float = 0.05) -> Decision:
    """Whether a repair is kept.

    It is, if on the verification split more predictions were fixed than broken and that is significant, and no other
    split has a significant loss. Over the other splits p-values are adjusted by Holm's method, so that many of them do
    not make a loss by chance likely. Where rows have many predictions, the test is over rows, and both must agree: a
    gain is more fixed than broken and more rows better than worse; a loss is more rows worse than better.

    Args:
        verification: the split that decides.
        others: all that were looked at beside it.
        alpha: how often chance alone may pass for an effect; in (0, 1).

    Raises:
        InputError: alpha is not between 0 and 1.

    Example:
        >>> even = Estimate(0.9, 0.8, 1.0)
        >>> check = Verified("check", "verification", "texts@check", 1000, Flips(62, 40, 700, 198), 0.0371, even, even)
        >>> other = Verified("news", "shifted", "news@test", 500, Flips(3, 8, 400, 89), 0.2266, even, even)
        >>> decision = decide(check, [other])
        >>> decision.accepted
        True
        >>> print("\\n".join(decision.reasons))
        check (texts@check): 62 fixed and 40 broken of 1000 predictions, net +22: a gain.
        check: p = 0.0371, below 0.05: significant.
        No significant loss on the other split.
        news (shifted, news@test): 3 fixed and 8 broken of 500 predictions, net -5, p = 0.227: a loss, not significant.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    gained = verification.flips.net > 0 and _direction(verification) > 0
    significant = verification.p_value < alpha
    reasons = [
        f"{verification.name} ({verification.source}): {_figures(verification)}: {'a gain' if gained else 'no gain'}.",
        f"{verification.name}: p = {verification.p_value:.3g}, "
        f"{f'below {alpha:g}: significant' if significant else f'not below {alpha:g}: not significant'}.",
    ]
    adjusted = holm([other.p_value for other in others])
    lost = [_direction(other) < 0 and p < alpha for other, p in zip(others, adjusted, strict=True)]
    reasons.append(_summary(len(others), sum(lost)))
    for other, p, loss in sorted(zip(others, adjusted, lost, strict=True), key=lambda one: not one[2]):
        if loss or other.flips.net < 0 or _direction(other) < 0:
            corrected = f" (over {len(others)} splits p = {p:.3g})" if len(others) > 1 else ""
            where = f"{other.name} ({other.role}, {other.source})"
            reasons.append(f"{where}: {_figures(other)}, p = {other.p_value:.3g}{corrected}: {_loss(other, loss)}.")
    return Decision(gained and significant and not any(lost), reasons)


def _direction(found: Verified) -> int:
    """Above 0 if what the p-value is about gained: rows where they were counted, else predictions."""
    if found.rows_better is None or found.rows_worse is None:
        return found.flips.net
    return found.rows_better - found.rows_worse


def _figures(found: Verified) -> str:
    counted = f"{found.flips.fixed} fixed and {found.flips.broken} broken of {found.flips.total} predictions"
    rows = f", {found.rows_better} of {found.examples} rows better and {found.rows_worse} worse"
    return f"{counted}, net {found.flips.net:+d}{rows if found.rows_better is not None else ''}"


def _loss(found: Verified, significant: bool) -> str:
    if significant:
        return "a significant loss"
    return "a loss, not significant" if _direction(found) <= 0 else "a loss in all, though more rows are better"


def _summary(others: int, lost: int) -> str:
    if not others:
        return "No other split was looked at: what the repair does elsewhere is not known."
    splits = f"the {others} other splits" if others > 1 else "the other split"
    if not lost:
        return f"No significant loss on {splits}."
    return f"A significant loss on {f'{lost} of ' if others > 1 else ''}{splits}."
