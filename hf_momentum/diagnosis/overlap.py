"""How alike two rankings of the same groups are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation; None where one of the two is the same for all groups."""

    rho: float | None
    p_value: float


def spearman(a: Sequence[float], b: Sequence[float]) -> RankCorrelation:
    """Rank correlation with average ranks for ties, and its two-sided permutation p.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]).rho > 0.999
        True
    """
    first, second = _centred(a), _centred(b)
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    if norm == 0:
        return RankCorrelation(None, 1.0)
    random, found = np.random.default_rng(0), abs(first @ second)
    beyond = sum(abs(random.permutation(first) @ second) >= found - 1e-9 for _ in range(2000))
    return RankCorrelation(float(np.clip(first @ second / norm, -1, 1)), float((beyond + 1) / 2001))


def _centred(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    ranks = (array[:, None] > array).sum(1) + ((array[:, None] == array).sum(1) - 1) / 2
    return ranks - ranks.mean()
