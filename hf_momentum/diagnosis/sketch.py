"""A gradient as a thousand numbers, from which inner products of gradients can be estimated.

The flat tensor is cut into chunks of `rows` times `width` numbers. In each chunk the numbers are multiplied by a fixed
matrix of random signs, and the rows, with signs drawn for the key of the tensor and the number of the chunk, are added
up. The `width` sums are put in an order that is drawn likewise, and all chunks are added up:

    s[k] = sum over c of  y_c[(a_c k + b_c) mod width],   y_c[j] = sum over r of  e_c[r] M[r, j] x[c, r, j]

So every number goes to one place with one random sign. Signs of rows make the chunks of a tensor that repeats itself
err independently; orders keep rows of different chunks from meeting in all places at once. One pass over the tensor,
and for a chunk of 261 376 numbers only 258 are kept.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_momentum.errors import InputError

_CHUNKS_AT_ONCE = {"cpu": 1, "cuda": 64}  # one chunk stays in a core's cache; on a GPU 64 fill it, in 64 MB

# Sets of pieces whose draws are kept. One would do, were it not for models whose experts have a gradient now and then.
_PLANS = 32


class SignSketch:
    """A random linear map S of tensors to `width` numbers that keeps inner products: the mean of <Sx, Sy> is <x, y>.

    Over seeds, |Sx|^2 has a relative standard deviation of sqrt(2 / width) at most, 4.4 % for 1021, and <Sx, Sy> one
    of |x| |y| sqrt((1 + cos^2) / width). That does not hold where the large numbers of a tensor lie `width` apart in
    few chunks; so `width` is a prime that no model has as a size. Sketches of one seed, width and rows can be
    added and compared, also when they come from different devices or processes.

    What is fixed is drawn once and kept: the matrix for each device, and the few numbers of each chunk.

    Args:
        width: how many numbers a sketch has; a prime.
        rows: numbers of a chunk that are added up in the tensor's own precision, float32 at least.
        seed: of all that is random.

    Raises:
        InputError: `width` is no prime, or `rows` is less than 1.

    Example:
        >>> sketch, gradient = SignSketch(), torch.ones(400, 500)
        >>> found = sketch.of(gradient, key=0)
        >>> found.shape, bool((found.square().sum() / gradient.square().sum() - 1).abs() < 0.2)
        (torch.Size([1021]), True)
    """

    def __init__(self, width: int = 1021, rows: int = 256, seed: int = 0) -> None:
        if width < 2 or any(width % factor == 0 for factor in range(2, math.isqrt(width) + 1)):
            raise InputError(f"width {width} is not accepted; a prime, such as 251, 1021 or 4093")
        if rows < 1:
            raise InputError(f"rows must be at least 1, got {rows}")
        self.width, self.rows, self.seed = width, rows, seed
        self._matrices: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple[tuple[tuple[int, int, int, int], ...], torch.device], _Plan] = {}

    def of(self, piece: Tensor, key: int, offset: int = 0) -> Tensor:
        """The sketch of a tensor, or of a piece of it that is contiguous in the flattened tensor.

        The sketches of all pieces of a tensor, each at its offset, add up to the sketch of the tensor. Tensors of
        different keys do not interfere when their sketches are added: the sum is the sketch of them laid end to end.

        Args:
            piece: of any shape, also empty, of a floating dtype; copied only if it is not contiguous.
            key: of the tensor; at least 0. One key for two tensors makes their sketches comparable.
            offset: where the piece begins in the flattened tensor.

        Returns:
            `[width]`, float64, on the device of `piece`.

        Example:
            >>> sketch, tensor = SignSketch(width=11, rows=2), torch.arange(100.0)
            >>> pieces = sketch.of(tensor[:30], key=7) + sketch.of(tensor[30:], key=7, offset=30)
            >>> bool(torch.allclose(pieces, sketch.of(tensor, key=7)))
            True
        """
        return self.table([piece], [key], [offset], [0], 1)[0]

    def of_all(self, pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
        """The sketch of several whole tensors, each with its key, laid end to end.

        Raises:
            InputError: there is none.

        Example:
            >>> SignSketch(width=11).of_all([(0, torch.ones(2, 3)), (1, torch.ones(3))]).shape
            torch.Size([11])
        """
        pairs = list(pieces)
        keys, tensors = [key for key, _ in pairs], [tensor for _, tensor in pairs]
        return self.table(tensors, keys, [0] * len(pairs), [0] * len(pairs), 1)[0]

    def table(
        self,
        pieces: Sequence[Tensor],
        keys: Sequence[int],
        offsets: Sequence[int],
        rows: Sequence[int],
        count: int,
    ) -> Tensor:
        """Sketches of sets of pieces at once, such as the gradients of each layer group.

        Args:
            pieces: as for `of`, all on one device.
            keys, offsets: of each piece, as for `of`.
            rows: the row of the table to which the piece's sketch is added.
            count: how many rows there are.

        Returns:
            `[count, width]`, float64; zeros in a row to which nothing was added.

        Raises:
            InputError: there is no piece.

        Example:
            >>> sketch, (x, y) = SignSketch(width=11), torch.randn(2, 50)
            >>> found = sketch.table([x, y], keys=[0, 1], offsets=[0, 0], rows=[1, 1], count=3)
            >>> bool(torch.allclose(found[1], sketch.of(x, 0) + sketch.of(y, 1))), found[0].count_nonzero().item()
            (True, 0)
        """
        if not pieces:
            raise InputError("there is no tensor to sketch; give at least one")
        size, device = self.rows * self.width, pieces[0].device
        flats = [piece.detach().reshape(-1) for piece in pieces]
        ranges = [
            (key, offset // size, -((offset + flat.numel()) // -size) if flat.numel() else offset // size, row)
            for flat, key, offset, row in zip(flats, keys, offsets, rows, strict=True)
        ]
        plan = self._plan(tuple(ranges), device)
        matrix = self._matrix(device)
        cut = torch.split(plan.signs, [behind - first for _, first, behind, _ in ranges])
        sums = [
            part
            for flat, offset, signs in zip(flats, offsets, cut, strict=True)
            for part in _folded(flat, matrix, signs, offset % size)
        ]
        found = torch.zeros((count, self.width), dtype=torch.float64, device=device)
        if sums:
            places = (plan.factors * torch.arange(self.width, device=device) + plan.shifts) % self.width
            found.index_add_(0, plan.rows, torch.cat(sums).gather(1, places).double())
        return found

    def _matrix(self, device: torch.device) -> Tensor:
        if device not in self._matrices:
            bits = torch.randint(0, 2, (self.rows, self.width), generator=torch.Generator().manual_seed(self.seed))
            self._matrices[device] = (2.0 * bits - 1.0).to(device)
        return self._matrices[device]

    def _plan(self, ranges: tuple[tuple[int, int, int, int], ...], device: torch.device) -> "_Plan":
        """What is drawn for the chunks `first` to `behind` of each key, and the rows to which they are added."""
        if (ranges, device) not in self._plans:
            bits = np.concatenate(
                [
                    _random_bits(self.seed, key, np.arange(first, behind), 2 + self.rows)
                    for key, first, behind, _ in ranges
                ]
            )
            rows = [row for _, first, behind, row in ranges for _ in range(first, behind)]
            arrays = (
                (1 + bits[:, :1] % np.uint64(self.width - 1)).astype(np.int64),
                (bits[:, 1:2] % np.uint64(self.width)).astype(np.int64),
                2 * (bits[:, 2:] >> np.uint64(63)).astype(np.float32) - 1,
                np.array(rows, dtype=np.int64),
            )
            while len(self._plans) >= _PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[ranges, device] = _Plan(*(torch.from_numpy(array).to(device) for array in arrays))
        return self._plans[ranges, device]


@dataclass(frozen=True)
class _Plan:
    """What is random of some chunks, and where they go: `[chunks, 1]`, `[chunks, 1]`, `[chunks, rows]`, `[chunks]`."""

    factors: Tensor
    shifts: Tensor
    signs: Tensor
    rows: Tensor


def _folded(flat: Tensor, matrix: Tensor, signs: Tensor, start: int) -> list[Tensor]:
    """The sums of signed rows of each chunk, together `[chunks, width]`; `flat` begins at `start` of the first one."""
    size = matrix.numel()
    head = min(-start % size, flat.numel())
    whole = (flat.numel() - head) // size * size
    first, middle, last = flat[:head], flat[head : head + whole], flat[head + whole :]
    parts = [_folded_part(first, matrix, signs[0], start)] if len(first) else []
    parts += [_folded_whole(middle, matrix, signs[len(parts) : len(parts) + whole // size])] if whole else []
    parts += [_folded_part(last, matrix, signs[-1], 0)] if len(last) else []
    return parts


def _folded_whole(flat: Tensor, matrix: Tensor, signs: Tensor) -> Tensor:
    """The sums of whole chunks. What is multiplied out is as large as a few chunks, never as the tensor."""
    chunks, dtype = flat.view(-1, *matrix.shape), torch.promote_types(flat.dtype, matrix.dtype)
    step = min(_CHUNKS_AT_ONCE.get(flat.device.type, 1), len(chunks))
    products = torch.empty((step, *matrix.shape), dtype=dtype, device=flat.device)
    sums = torch.empty((len(chunks), 1, matrix.shape[1]), dtype=dtype, device=flat.device)
    signs = signs.to(dtype).unsqueeze(1)
    for begin in range(0, len(chunks), step):
        some = chunks[begin : begin + step]
        here = slice(begin, begin + len(some))
        torch.mul(some, matrix, out=products[: len(some)])
        torch.bmm(signs[here], products[: len(some)], out=sums[here])
    return sums.squeeze(1)


def _folded_part(flat: Tensor, matrix: Tensor, signs: Tensor, start: int) -> Tensor:
    """The sums of a part of a chunk, over the rows that it touches."""
    width = matrix.shape[1]
    first, behind = start // width, -((start + flat.numel()) // -width)
    padded = torch.nn.functional.pad(flat, (start - first * width, behind * width - start - flat.numel()))
    signed = padded.view(-1, width) * matrix[first:behind]
    return signs[None, first:behind].to(signed.dtype) @ signed


def _random_bits(seed: int, key: int, chunks: "np.ndarray[Any, Any]", columns: int) -> "np.ndarray[Any, Any]":
    """64 random bits for each chunk and column, `[chunks, columns]`, which depend on nothing but their place.

    The finaliser of SplitMix64, once for each coordinate.
    """
    bits = np.zeros((1, 1), dtype=np.uint64)
    for coordinate in (np.array([[seed]]), np.array([[key]]), chunks[:, None], np.arange(columns)):
        bits = bits + (coordinate.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits
