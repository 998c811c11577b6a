"""How noisy the main gradient is, estimated from what Bloop sees anyway.

A batch's gradient is g = gbar + noise; n = tr(Cov g) / |gbar|^2 is its noise ratio. An average of independent
gradients with weights that sum to c and whose squares sum to q has E|e|^2 = c^2 |gbar|^2 (1 + n kappa) with
kappa = q / c^2, while E|g|^2 = |gbar|^2 (1 + n). So from r = E|e / c|^2 / E|g|^2

    n = (1 - r) / (r - kappa)

In the long run c = 1 and kappa = rho / (2 - rho). Of the part that Bloop should remove, n_e / (1 + n_e) survives, where
n_e = n kappa is the noise ratio of the average itself; rho = 0.2 / n keeps that near 9 %.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hf_momentum.kernels import sum_dtype
from hf_momentum.sharding import GradientPiece

SURVIVES = 0.2
"""rho n that is aimed at."""

TOLERATED = 0.25
"""The part that may survive before a run is warned."""

_SMOOTHING = 0.05
_LARGEST = 1e6  # r can come out below kappa by chance: then all that is known is that n is large
_WARM = 5  # measurements before the estimate is used
_WHOLE, _SHARE = 4096, 64  # tensors up to 4096 elements are measured whole, of larger ones a 64th


@dataclass
class Noise:
    """The running estimate; floats on the host or 0-dim tensors on the device.

    Attributes:
        weight, squares: c and q of the average.
        average, batch: smoothed |e / c|^2 and |g|^2.
        kappa: smoothed q / c^2, at the same times.
        count: number of measurements.

    Example:
        >>> noise = Noise()
        >>> for _ in range(900):
        ...     noise = noise.advanced(rho=0.01)
        >>> round(float(noise.kappa_now()), 4), round(0.01 / 1.99, 4)
        (0.005, 0.005)
    """

    weight: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    average: Tensor | float = 0.0
    batch: Tensor | float = 0.0
    kappa: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def on(self, device: torch.device, dtype: torch.dtype) -> "Noise":
        """The same as 0-dim tensors on `device`."""
        values = [torch.as_tensor(value, device=device, dtype=dtype) for value in vars(self).values()]
        return Noise(*values)

    def as_floats(self) -> dict[str, float]:
        """For a checkpoint; waits for the device."""
        return {name: float(value) for name, value in asdict(self).items()}

    def kappa_now(self) -> Tensor | float:
        """q / c^2."""
        return self.squares / self.weight**2

    def advanced(self, rho: Tensor | float) -> "Noise":
        """After the average has taken one more gradient in, with rate `rho`."""
        weight, squares = (1 - rho) * self.weight + rho, (1 - rho) ** 2 * self.squares + rho**2
        return Noise(weight, squares, self.average, self.batch, self.kappa, self.count)

    def measured(self, average: Tensor, batch: Tensor) -> "Noise":
        """After |e|^2 of the average from before this batch, and |g|^2 of the batch; tensors only.

        Times at which the average is little more than one gradient (kappa > 1/2) say nothing of n and are left out.
        """
        weight, kappa = torch.as_tensor(self.weight), torch.as_tensor(self.squares)
        safe = torch.where(weight > 0, weight, torch.ones_like(weight))
        kappa = kappa / safe**2
        use = ((weight > 0) & (kappa < 0.5)).to(average.dtype) * _SMOOTHING
        old = [torch.as_tensor(x) for x in (self.average, self.batch, self.kappa)]
        new = [x + use * (y - x) for x, y in zip(old, (average / safe**2, batch, kappa), strict=True)]
        average, batch, kappa = new
        return Noise(self.weight, self.squares, average, batch, kappa, self.count + use / _SMOOTHING)

    def ratio(self) -> Tensor:
        """n; NaN while too little has been seen."""
        average, batch, kappa = (torch.as_tensor(x) for x in (self.average, self.batch, self.kappa))
        r = average / batch
        n = torch.where(r > kappa, (1 - r) / (r - kappa).clamp(min=1e-300), torch.full_like(r, _LARGEST))
        few = torch.as_tensor(self.count) < _WARM
        return torch.where(few, torch.full_like(n, math.nan), n.clamp(0.0, _LARGEST))


def survives(n: float, rho: float) -> float:
    """The part of the removed component that survives: n_e / (1 + n_e) with n_e = n rho / (2 - rho).

    Example:
        >>> round(survives(n=100, rho=0.01), 2), round(survives(n=100, rho=0.002), 2)
        (0.33, 0.09)
    """
    n_e = n * rho / (2 - rho)
    return n_e / (1 + n_e)


def fitting_rho(n: Tensor, start: float, least: float, most: float) -> Tensor:
    """rho = 0.2 / n within bounds; `start` while n is not known.

    Example:
        >>> fitting_rho(torch.tensor([100.0, 0.0, float("nan")]), start=0.01, least=1e-4, most=0.1)
        tensor([0.0020, 0.1000, 0.0100])
    """
    return torch.where(torch.isnan(n), torch.full_like(n, start), (SURVIVES / n.clamp(min=1e-12)).clamp(least, most))


# ---- a sample of a buffer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A small part of a buffer, copied before something is added to it.

    Attributes:
        time: which part: another one at each time.
        copies: the part of each piece, by row and begin of the piece.
    """

    time: int
    copies: dict[tuple[int, int | None], Tensor]


def sample(pieces: Sequence[GradientPiece], time: int) -> Sample:
    """Copies of a small part of each piece: all of small tensors, a 64th of large ones, another one at each `time`.

    Which part depends on the tensor alone and not on how it is cut, so all layouts measure the same.
    """
    return Sample(time, {(piece.row, piece.piece.start): _window(piece, time)[0].clone() for piece in pieces})


def _window(piece: GradientPiece, time: int) -> tuple[Tensor, int]:
    """The part of a piece that is looked at, perhaps empty, and how many such parts its tensor has."""
    flat = piece.grad.reshape(-1)
    numel, offset = (piece.numel, piece.offset) if piece.offset is not None else (flat.numel(), 0)
    length = numel if numel <= _WHOLE else max(-(-numel // _SHARE), _WHOLE)
    count = max(-(-numel // length), 1) if length else 1
    begin = (time * 37 + piece.row) % count * length
    low = min(max(begin, offset), offset + flat.numel())
    high = max(low, min(begin + length, numel, offset + flat.numel()))
    return flat[low - offset : high - offset], count


def added(pieces: Sequence[GradientPiece], before: Sample) -> Tensor:
    """An unbiased estimate, over this process's pieces, of the squared norm of what was added since `sample`.

    A piece that was not there then was zero.

    Returns:
        `[pieces, 1]`, float64 where the device has it.

    Example:
        >>> from hf_momentum.sharding import Piece
        >>> b = torch.ones(3)
        >>> pieces = [GradientPiece(b, b, Piece(0, 0, None, 3), row=0, numel=3, offset=0)]
        >>> before = sample(pieces, time=0)
        >>> _ = b.add_(2.0)
        >>> added(pieces, before).item()
        12.0
    """
    rows = []
    for piece in pieces:
        now, count = _window(piece, before.time)
        change, old = now.to(sum_dtype(now.device)), before.copies.get((piece.row, piece.piece.start))
        if old is not None:
            change = change - old
        rows.append(count * torch.dot(change, change))
    return torch.stack(rows)[:, None]
