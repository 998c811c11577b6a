"""Gradient surgery, slow and in the papers' notation, for one process and one vector: the truth for the tests.

Nothing here is shared with the code that runs. A gradient is one float64 vector over the whole model.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def complement(g: Vector, basis: Sequence[Vector]) -> Vector:
    """pi(g; span(basis)): `g` without its part in the span of `basis`, which may hold zeros and repetitions.

    Example:
        >>> complement(np.array([3.0, 4.0]), [np.array([2.0, 0.0]), np.zeros(2)])
        array([0., 4.])
    """
    if not any(np.any(b) for b in basis):
        return g.copy()
    columns = np.stack([b / np.linalg.norm(b) for b in basis if np.any(b)], axis=1)
    orthonormal, singular, _ = np.linalg.svd(columns, full_matrices=False)
    orthonormal = orthonormal[:, singular > 1e-12 * singular[0]]
    rest: Vector = g - orthonormal @ (orthonormal.T @ g)
    return rest


class BloopReference:
    """Bloop, section 3 of arXiv 2402.02998; several auxiliaries in order of priority by Gram-Schmidt.

        d   = g_0 + sum_k lam_k pi(g_k; span(e_0, ..., e_{k-1}))
        e_j = (1 - rho) e_j + rho g_j           j = 0, ..., K - 1

    g_0 is the gradient of the main loss, g_1 the most important auxiliary one. `order="paper"` projects on the averages
    from before this batch, `"ema_first"` (the authors' code) updates them first. An average of an auxiliary gradient is
    our extension of the paper, which has one auxiliary loss.

    Example:
        >>> bloop = BloopReference(lam=[1.0], rho=1.0)
        >>> bloop.step(np.array([1.0, 0.0]), [np.array([5.0, 5.0])])     # the average is 0: a plain mixture
        array([6., 5.])
        >>> bloop.step(np.array([1.0, 0.0]), [np.array([5.0, 5.0])])
        array([1., 5.])
    """

    def __init__(self, lam: Sequence[float], rho: float = 0.01, order: str = "paper", init: str = "zeros") -> None:
        self.lam, self.rho, self.order, self.init = list(lam), rho, order, init
        self.e: list[Vector] = []

    def step(self, main: Vector, auxiliaries: Sequence[Vector]) -> Vector:
        """The direction d for one batch."""
        gradients = [main, *auxiliaries]
        first = not self.e
        if first:
            self.e = [np.zeros_like(main) for _ in auxiliaries]
        rho = 1.0 if first and self.init == "first_gradient" else self.rho
        old = self.e
        self.e = [(1 - rho) * e + rho * g for e, g in zip(old, gradients[:-1], strict=True)]
        basis = self.e if self.order == "ema_first" else old
        d = main.copy()
        for k, (lam, g) in enumerate(zip(self.lam, auxiliaries, strict=True), start=1):
            d += lam * complement(g, basis[:k])
        return d


def mixed(lam: Sequence[float], main: Vector, auxiliaries: Sequence[Vector]) -> Vector:
    """d = g_main + sum lam g_aux.

    Example:
        >>> mixed([0.5], np.array([1.0, 0.0]), [np.array([-1.0, 1.0])])
        array([0.5, 0.5])
    """
    return main + sum(lam_k * g for lam_k, g in zip(lam, auxiliaries, strict=True))


def simple(lam: Sequence[float], main: Vector, auxiliaries: Sequence[Vector]) -> Vector:
    """Bloop's projection on the gradients of this batch instead of averages.

    Example:
        >>> simple([0.5], np.array([1.0, 0.0]), [np.array([-1.0, 1.0])])
        array([1. , 0.5])
    """
    gradients = [main, *auxiliaries]
    d = main.copy()
    for k, lam_k in enumerate(lam, start=1):
        d += lam_k * complement(gradients[k], gradients[:k])
    return d


def dynamic_barrier(lam: Sequence[float], main: Vector, auxiliaries: Sequence[Vector]) -> Vector:
    """d = mu g_main + a with a = sum lam g_aux and mu = max(1 - <g_main, a> / |g_main|^2, 0).

    Example:
        >>> dynamic_barrier([0.5], np.array([1.0, 0.0]), [np.array([-1.0, 1.0])])
        array([1. , 0.5])
    """
    a = mixed(lam, np.zeros_like(main), auxiliaries)
    mu = max(1 - float(main @ a) / float(main @ main), 0.0) if np.any(main) else 1.0
    return mu * main + a


def pcgrad(lam: Sequence[float], main: Vector, auxiliaries: Sequence[Vector]) -> Vector:
    """d: the sum of g_main and lam g_aux, each without its part along every other that it conflicts with (2001.06782).

    Example:
        >>> pcgrad([1.0], np.array([1.0, 0.0]), [np.array([-1.0, 1.0])])
        array([0.5, 1.5])
    """
    vectors: list[Vector] = [main, *(lam_k * g for lam_k, g in zip(lam, auxiliaries, strict=True))]
    d = np.zeros_like(main)
    for i, vector in enumerate(vectors):
        changed = vector.copy()
        for j, other in enumerate(vectors):
            if i != j and np.any(other) and changed @ other < 0:
                changed -= (changed @ other) / (other @ other) * other
        d += changed
    return d
