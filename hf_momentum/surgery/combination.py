"""Surgeries that need only this batch's gradients: each is a choice of weights from a small matrix of inner products.

With A_0 the main gradient and A_k = lam_k g_k the auxiliary ones, every rule here gives d = sum_k weight_k A_k, and the
weights follow from the Gram matrix G_ij = <A_i, A_j>, formed in float64 over the whole model. All stay on the device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DEPENDENT = 1e-12  # what is left of a vector after projections, if no longer than this part of it, is rounding


def projection(gram: Tensor, products: Tensor) -> Tensor:
    """Coefficients c for which sum_i c_i e_i is the part of x in the span of the e_i.

    By Gram-Schmidt in the coordinates of the e_i. A basis vector that is zero, or that the earlier ones span but for
    rounding, gets nothing.

    Args:
        gram: `[k, k]`, <e_i, e_j>.
        products: `[k]`, <e_i, x>.

    Returns:
        `[k]`.

    Example:
        >>> projection(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([6.0, 0.0]))
        tensor([1.5000, 0.0000])
    """
    size = len(products)
    found = torch.zeros_like(products)
    basis: list[tuple[Tensor, Tensor]] = []
    for i in range(size):
        u = torch.zeros_like(products)
        u[i] = 1.0
        for earlier, squared in basis:
            u = u - _ratio(earlier @ gram[:, i], squared) * earlier
        squared = u @ gram @ u
        squared = torch.where(squared > _DEPENDENT**2 * gram[i, i], squared, torch.zeros_like(squared))
        basis.append((u, squared))
        found = found + _ratio(u @ products, squared) * u
    return found


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive; the quotient of what is not taken must not be NaN either."""
    positive = b > 0
    return torch.where(positive, a / torch.where(positive, b, torch.ones_like(b)), torch.zeros_like(a))


def mixed_weights(gram: Tensor) -> Tensor:
    """d = g_main + sum lam g_aux.

    Example:
        >>> mixed_weights(torch.eye(3))
        tensor([1., 1., 1.])
    """
    return torch.ones_like(gram[0])


def simple_weights(gram: Tensor) -> Tensor:
    """d = g_main + sum_k pi(A_k; span(A_0, ..., A_{k-1})): Bloop without its average.

    Example:
        >>> simple_weights(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
        tensor([2., 1.])
    """
    weights = torch.ones_like(gram[0])
    for k in range(1, len(gram)):
        weights[:k] -= projection(gram[:k, :k], gram[:k, k])
    return weights


def dynamic_barrier_weights(gram: Tensor) -> Tensor:
    """d = mu g_main + a with a = sum_k A_k, mu = max(1 - <g_main, a> / |g_main|^2, 0).

    The dynamic barrier of arXiv 2103.02083 with its barrier at |g_main|^2, as the Bloop paper compares with it.

    Example:
        >>> dynamic_barrier_weights(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
        tensor([2., 1.])
    """
    weights = torch.ones_like(gram[0])
    weights[0] = (1 - _ratio(gram[0, 1:].sum(), gram[0, 0])).clamp(min=0)
    return weights


def pcgrad_weights(gram: Tensor) -> Tensor:
    """Each A_i loses its part along every A_j that it conflicts with, in the order of the objectives; d is the sum.

    PCGrad (arXiv 2001.06782) visits the others in random order; with one auxiliary there is only one order.

    Example:
        >>> pcgrad_weights(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
        tensor([2.0000, 1.5000])
    """
    total = torch.zeros_like(gram[0])
    for i in range(len(gram)):
        v = torch.zeros_like(gram[0])
        v[i] = 1.0
        for j in range(len(gram)):
            if i != j:
                v[j] -= _ratio(v @ gram[:, j], gram[j, j]).clamp(max=0)
        total = total + v
    return total


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mixed": mixed_weights,
    "simple": simple_weights,
    "dynamic_barrier": dynamic_barrier_weights,
    "pcgrad": pcgrad_weights,
}


def gram_matrix(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """A symmetric matrix from its lower triangle: row i holds the products with 0, ..., i.

    Example:
        >>> gram_matrix([[torch.tensor(1.0)], [torch.tensor(2.0), torch.tensor(5.0)]])
        tensor([[1., 2.],
                [2., 5.]])
    """
    size = len(rows)
    return torch.stack([torch.stack([rows[max(i, j)][min(i, j)] for j in range(size)]) for i in range(size)])
