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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_momentum.errors import InputError

_CHUNKS_AT_ONCE = {"cpu": 1, "cuda": 64}  # one chunk stays in a core's cache; on a GPU 64 fill it, in 64 MB
_FEW_ROWS = 64  # of a piece that is put together with others: less time goes into its numbers than into the calls
_ROWS_AT_ONCE = 1024

# For pieces that are put together: signs of all their rows, the piece of each row, the order of each piece's sums, and
# the zeros before and after each piece.
_Plan = tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]


class SignSketch:
    """A random linear map S of tensors to `width` numbers that keeps inner products: the mean of <Sx, Sy> is <x, y>.

    Over seeds, |Sx|^2 has a relative standard deviation of sqrt(2 / width) at most, 4.4 % for 1021, and <Sx, Sy> one
    of |x| |y| sqrt((1 + cos^2) / width). That does not hold where the large numbers of a tensor lie `width` apart in
    few chunks; so `width` is a prime that no model has as a size. Sketches of one seed, width and rows can be
    added and compared, also when they come from different devices or processes.

    What is fixed is drawn once and kept: the matrix for each device, the few numbers of each chunk, and the
    signs of small pieces that are put together.

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
        self._draws: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        self._plans: dict[tuple[tuple[tuple[int, int, int], ...], torch.device], _Plan] = {}

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
        flat = piece.detach().reshape(-1)
        if flat.numel() == 0:
            return torch.zeros(self.width, dtype=torch.float64, device=flat.device)
        size = self.rows * self.width
        first, behind = offset // size, -((offset + flat.numel()) // -size)
        factors, shifts, signs = self._drawn(key, first, behind, flat.device)
        sums = _folded(flat, self._matrix(flat.device), signs, offset % size)
        places = (factors * torch.arange(self.width, device=flat.device) + shifts) % self.width
        return sums.gather(1, places).sum(0, dtype=torch.float64)

    def of_all(self, pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
        """The sketch of several whole tensors, each with its key, laid end to end.

        Raises:
            InputError: there is none.

        Example:
            >>> SignSketch(width=11).of_all([(0, torch.ones(2, 3)), (1, torch.ones(3))]).shape
            torch.Size([11])
        """
        sketches = [self.of(piece, key) for key, piece in pieces]
        if not sketches:
            raise InputError("of_all needs at least one tensor to sketch")
        return torch.stack(sketches).sum(0)

    def by_group(self, pieces: Iterable[tuple[Tensor, int, int, int]], groups: int) -> Tensor:
        """The sketches of many pieces, added up by group: what `of` gives, in fewer operations where they are small.

        Args:
            pieces: piece, key, offset as for `of`, and the number of the group; taken one by one, so that a generator
                need not have all of them at once. All on one device.
            groups: how many there are.

        Returns:
            `[groups, width]`, float64, on the CPU.

        Example:
            >>> sketch, gradient = SignSketch(width=11), torch.ones(2, 3)
            >>> found = sketch.by_group([(gradient, 0, 0, 1), (gradient, 1, 0, 1)], groups=2)
            >>> found.shape, bool(found[0].any())
            (torch.Size([2, 11]), False)
        """
        total = torch.zeros(groups, self.width, dtype=torch.float64)
        small: list[tuple[Tensor, int, int, int]] = []
        lines = 0
        for piece, key, offset, group in pieces:
            start, numel = offset % (self.rows * self.width), piece.numel()
            needed = -(-(start % self.width + numel) // self.width)
            if needed > _FEW_ROWS or start + numel > self.rows * self.width:
                total[group] += self.of(piece, key, offset).to("cpu", torch.float64)
            elif numel:
                small.append((piece.detach().reshape(-1), key, offset, group))
                lines += needed
            if lines >= _ROWS_AT_ONCE:
                self._add_small(small, total)
                small, lines = [], 0
        if small:
            self._add_small(small, total)
        return total

    def _add_small(self, small: Sequence[tuple[Tensor, int, int, int]], total: Tensor) -> None:
        """Pieces of a few rows each, padded to whole rows, as one matrix."""
        device = small[0][0].device
        plan = tuple((key, offset, flat.numel()) for flat, key, offset, _ in small)
        if (plan, device) not in self._plans:
            self._plans[plan, device] = self._plan(plan, device)
        signs, piece_of, places, pads = self._plans[plan, device]
        padded = torch.cat(
            [part for (flat, *_), (before, after) in zip(small, pads, strict=True) for part in (before, flat, after)]
        )
        products = padded.view(signs.shape) * signs
        sums = products.new_zeros(places.shape).index_add_(0, piece_of, products)
        found = sums.gather(1, places).to("cpu", torch.float64)
        total.index_add_(0, torch.tensor([group for *_, group in small]), found)

    def _plan(self, pieces: Sequence[tuple[int, int, int]], device: torch.device) -> _Plan:
        size = self.rows * self.width
        signs, places, pads, counts = [], [], [], []
        for key, offset, numel in pieces:
            start = offset % size
            first, behind = start // self.width, -((start + numel) // -self.width)
            chunk = offset // size
            factors, shifts, drawn = self._drawn(key, chunk, chunk + 1, device)
            signs.append(self._matrix(device)[first:behind] * drawn[0, first:behind, None])
            places.append((factors * torch.arange(self.width, device=device) + shifts) % self.width)
            zeros = torch.zeros(self.width, device=device)
            pads.append((zeros[: start - first * self.width], zeros[: behind * self.width - start - numel]))
            counts.append(behind - first)
        piece_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        return torch.cat(signs), piece_of, torch.cat(places), pads

    def _matrix(self, device: torch.device) -> Tensor:
        if device not in self._matrices:
            bits = torch.randint(0, 2, (self.rows, self.width), generator=torch.Generator().manual_seed(self.seed))
            self._matrices[device] = (2.0 * bits - 1.0).to(device)
        return self._matrices[device]

    def _drawn(self, key: int, first: int, behind: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Factor and shift, `[chunks, 1]` each, and the signs of the rows, `[chunks, rows]`, of some chunks."""
        place = (key, first, behind, device)
        if place not in self._draws:
            bits = _random_bits(self.seed, key, np.arange(first, behind), 2 + self.rows)
            factors = (1 + bits[:, :1] % np.uint64(self.width - 1)).astype(np.int64)
            shifts = (bits[:, 1:2] % np.uint64(self.width)).astype(np.int64)
            signs = 2 * (bits[:, 2:] >> np.uint64(63)).astype(np.float32) - 1
            on_device = [torch.from_numpy(array).to(device) for array in (factors, shifts, signs)]
            self._draws[place] = (on_device[0], on_device[1], on_device[2])
        return self._draws[place]


def _folded(flat: Tensor, matrix: Tensor, signs: Tensor, start: int) -> Tensor:
    """The sums of signed rows of each chunk, `[chunks, width]`; `flat` begins at `start` of the first one."""
    size = matrix.numel()
    head = min(-start % size, flat.numel())
    whole = (flat.numel() - head) // size * size
    first, middle, last = flat[:head], flat[head : head + whole], flat[head + whole :]
    parts = [_folded_part(first, matrix, signs[0], start)] if len(first) else []
    parts += [_folded_whole(middle, matrix, signs[len(parts) : len(parts) + whole // size])] if whole else []
    parts += [_folded_part(last, matrix, signs[-1], 0)] if len(last) else []
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    here = matrix[first:behind] * signs[first:behind, None]
    padded = torch.zeros(here.numel(), dtype=torch.promote_types(flat.dtype, here.dtype), device=flat.device)
    padded[start - first * width :][: flat.numel()] = flat
    return (padded.view_as(here) * here).sum(0, keepdim=True)


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
