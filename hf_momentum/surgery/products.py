"""Inner products over the whole model: what one gradient and several averages are to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_momentum.kernels import sum_dtype
from hf_momentum.sharding import GradientPiece, Layout, total
from hf_momentum.surgery.combination import gram_matrix
from hf_momentum.surgery.passes import Passes


@dataclass(frozen=True)
class Products:
    """Inner products of a gradient b with averages e_0, ..., e_{k-1}, 0-dim tensors in float64 on the device.

    Attributes:
        e_b: <e_i, b>.
        gram: `[k, k]`, <e_i, e_j>.
        b_b: <b, b>.
        plain_b, plain_e: <b, b> and <e_0, e_0> without weights, whatever the metric.
    """

    e_b: Tensor
    gram: Tensor
    b_b: Tensor
    plain_b: Tensor
    plain_e: Tensor


def products(
    layout: Layout,
    pieces: Sequence[GradientPiece],
    b: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    passes: Passes,
    denominators: Sequence[Tensor] | None = None,
) -> Products:
    """Inner products over the whole model; one all-reduce where tensors are cut.

    Args:
        layout: how the tensors lie.
        pieces: what `b` and the averages are parts of.
        b: a gradient, by piece.
        averages: e_0, e_1, ..., each by piece; at least one.
        passes: makes the passes over memory.
        denominators: by piece; inner products are weighted by their inverse.

    Example:
        >>> from hf_momentum.sharding import Piece
        >>> x = torch.tensor([3.0, 4.0])
        >>> piece = GradientPiece(x, x, Piece(0, 0, None, 2), row=0, numel=2, offset=0)
        >>> found = products(Layout("whole tensors", (1,)), [piece], [x], [[torch.tensor([1.0, 0.0])]], Passes())
        >>> found.e_b.tolist(), found.b_b.item()
        ([3.0], 25.0)
    """
    pairs = [(i, j) for i in range(len(averages)) for j in range(i)]
    columns = [passes.sums(b, e) for e in averages]
    columns += [passes.sums(averages[i], averages[j])[:, :1] for i, j in pairs]
    plain = torch.cat(columns, 1)
    if denominators is None:
        sums = total(layout, pieces, plain)
        return _read(sums, sums, len(averages))
    columns = [_weighted(e, b, denominators) for e in averages]
    columns += [_weighted(averages[i], averages[j], denominators)[:, :1] for i, j in pairs]
    both = total(layout, pieces, torch.cat([plain, *columns], 1))
    return _read(both[plain.shape[1] :], both[: plain.shape[1]], len(averages))


def _read(sums: Tensor, plain: Tensor, count: int) -> Products:
    rest = iter(sums[3 * count :].unbind())
    rows = [[next(rest) for _ in range(i)] + [sums[3 * i + 1]] for i in range(count)]
    return Products(sums[0 : 3 * count : 3], gram_matrix(rows), sums[2], plain[2], plain[1])


def _weighted(xs: Sequence[Tensor], ys: Sequence[Tensor], denominators: Sequence[Tensor]) -> Tensor:
    """<x, y>, <x, x>, <y, y> of each piece, weighted; a tensor at a time, to bound what is formed on the way."""
    rows = []
    for x, y, denominator in zip(xs, ys, denominators, strict=True):
        dtype = sum_dtype(x.device)
        x, y, d = (tensor.reshape(-1).to(dtype) for tensor in (x, y, denominator))
        weighted = x / d
        rows.append(torch.stack([torch.dot(weighted, y), torch.dot(weighted, x), torch.dot(y / d, y)]))
    return torch.stack(rows)
