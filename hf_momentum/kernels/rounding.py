"""State and weights in fewer bits: the reference that the kernels are held to, in plain torch.

Averages over hundreds of steps change by less than one step of a short format, and round-to-nearest would throw such
changes away. So everything here is rounded stochastically: up with the probability that makes the mean right. The
random bits are a hash of a seed and of an element's place, so that a run repeats bit for bit, on any number of threads.

Two formats have eight bits per element and the scale of each block of 128 elements beside them:

    signed    x = M sgn(q) (q / 127)^2                          M: the largest |x| of the block
    positive  bits(x) = bits(least) + (q << shift)              bits: a float32 read as an integer, nearly its logarithm

The first resolves values near zero better than a linear code does; the second keeps one relative precision over the
whole range of a block, so that no second moment becomes 0. Values below 2^-12 of the largest are raised to it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""The number of elements that share a scale."""

SMALLEST = 4096
"""Tensors of fewer elements keep their state in float32."""

OCTAVES = 12
"""A second moment is at least 2^-12 of the largest in its block."""

_MASK = 0xFFFFFFFF
_INFINITY = 0x7F800000
_LEVELS = 127
_WEIGHTS = 0x5BD1E995


# ---- random bits ----------------------------------------------------------------------------------------------------


def mixed(x: Tensor) -> Tensor:
    """A 32-bit hash of 32-bit integers: two multiplications and three shifts (the finaliser of MurmurHash3).

    Args:
        x: int64; the low 32 bits count.

    Example:
        >>> mixed(torch.tensor([0, 1, 2]))
        tensor([         0, 1364076727,  821347078])
    """
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def seeds(steps: Tensor, first_row: int) -> Tensor:
    """One seed for each tensor of a group in a step, as float64, which holds 32-bit integers exactly.

    Args:
        steps: how many steps each tensor has taken.
        first_row: the place of the group's first tensor among all tensors.

    Example:
        >>> seeds(torch.tensor([1.0, 1.0]), 0)
        tensor([1.3488e+09, 2.2434e+09], dtype=torch.float64)
    """
    rows = torch.arange(len(steps), device=steps.device) + first_row
    return mixed(mixed(rows + 1) + 0x9E3779B9 * steps.long()).double()


def random_bits(seed: Tensor | float, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` elements, as int64.

    Example:
        >>> random_bits(7, 3, torch.device("cpu"))
        tensor([ 415870660,  588686121, 1937383562])
    """
    seed = seed.long() if isinstance(seed, Tensor) else int(seed)
    return mixed(torch.arange(count, device=device) * 0x9E3779B9 + seed)


def weight_seed(seed: Tensor) -> Tensor:
    """The seed for a tensor's weights, beside that of its state."""
    return (seed.long() ^ _WEIGHTS).double()


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """A float32 tensor rounded to bfloat16, up or down at random by the low 16 bits of `bits`; NaN and inf stay.

    Example:
        >>> x = torch.tensor([1.0 + 2**-9, 1.0 + 2**-9, torch.inf])
        >>> to_bfloat16(x, torch.tensor([0, 0xFFFF, 0xFFFF])).tolist()
        [1.0, 1.0078125, inf]
    """
    flat = x.reshape(-1)
    moved = flat.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    rounded = (moved & ~0xFFFF).view(torch.float32)
    return torch.where(flat.isfinite(), rounded, flat).bfloat16().view(x.shape)


# ---- eight bits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """State of one piece of a tensor in eight bits per element.

    Attributes:
        codes: int8 (signed) or uint8 (positive), one per element, flat.
        scales: `[blocks]` float32, the largest magnitudes (signed); or `[blocks, 2]` int32, the bits of the least
            value and the shift (positive).
    """

    codes: Tensor
    scales: Tensor

    @property
    def positive(self) -> bool:
        """Whether it holds second moments."""
        return self.codes.dtype == torch.uint8

    def decoded(self) -> Tensor:
        """The values, flat, in float32."""
        blocks = _in_blocks(self.codes)
        if not self.positive:
            q = blocks.float()
            return (self.scales[:, None] * (q * q.abs() * (1 / _LEVELS**2))).reshape(-1)[: len(self.codes)]
        bits = self.scales[:, :1] + (blocks.to(torch.int32) << self.scales[:, 1:])
        return bits.view(torch.float32).reshape(-1)[: len(self.codes)]

    def encode_(self, x: Tensor, bits: Tensor | None) -> None:
        """Overwrite with the values of `x`, rounded by the random `bits` of each element, or to the nearest if None.

        Example:
            >>> p = packed_zeros(3, positive=False, device=torch.device("cpu"))
            >>> p.encode_(torch.tensor([1.0, -0.25, 0.0]), None)
            >>> p.codes, p.decoded()
            (tensor([127, -63,   0], dtype=torch.int8), tensor([ 1.0000, -0.2461,  0.0000]))
        """
        blocks = _in_blocks(x.reshape(-1).float())
        noise = None if bits is None else _in_blocks(bits)
        codes = self._positive_codes(blocks, noise) if self.positive else self._signed_codes(blocks, noise)
        self.codes.copy_(codes.reshape(-1)[: len(self.codes)])

    def _signed_codes(self, x: Tensor, bits: Tensor | None) -> Tensor:
        largest = x.abs().amax(1)  # NaN if any is
        largest = torch.where(largest.isfinite(), largest, torch.full_like(largest, torch.nan))
        largest = torch.where(largest < 2.0**-100, 0.0, largest)  # there 127^2 / largest might overflow
        self.scales.copy_(largest)
        y = torch.where(largest[:, None] > 0, x.abs() * (_LEVELS**2 / largest[:, None]), 0.0)
        low = y.sqrt().floor()
        share = 0.5 if bits is None else (bits & 0xFFFF).float() * 2.0**-16
        # Between low^2 and (low + 1)^2: up if the share of the way is more than a random number.
        q = (low + (y - low * low > share * (2 * low + 1))).clamp(max=_LEVELS)
        return torch.where(x < 0, -q, q)

    def _positive_codes(self, x: Tensor, noise: Tensor | None) -> Tensor:
        bits = x.view(torch.int32) & 0x7FFFFFFF  # as integers NaN and inf are larger than every number
        largest = bits.amax(1, keepdim=True)
        broken = largest >= _INFINITY
        largest = torch.where(broken, 0x7FC00000, largest)
        least = torch.maximum(self._least(bits), (largest - (OCTAVES << 23)).clamp(min=0))
        least = torch.where(broken, largest, least)
        shift = torch.zeros_like(least)
        for candidate in range(20):  # the least one for which 254 steps reach the largest
            shift += ((254 << candidate) < largest - least).to(torch.int32)
        self.scales.copy_(torch.cat([least, shift], 1))
        one = torch.ones_like(shift) << shift
        added = (one >> 1) if noise is None else (noise & (one.long() - 1)).to(torch.int32)
        return torch.where(broken, 0, ((bits - least).clamp(min=0) + added) >> shift)

    def _least(self, bits: Tensor) -> Tensor:
        padded = bits.reshape(-1)
        inside = torch.arange(padded.numel(), device=bits.device) < len(self.codes)
        return torch.where(inside, padded, _INFINITY).view(bits.shape).amin(1, keepdim=True)


def packed_zeros(numel: int, positive: bool, device: torch.device) -> Packed:
    """Zeros in eight bits.

    Example:
        >>> packed_zeros(2, positive=True, device=torch.device("cpu")).decoded()
        tensor([0., 0.])
    """
    blocks = -(-numel // BLOCK)
    codes = torch.zeros(numel, dtype=torch.uint8 if positive else torch.int8, device=device)
    if positive:
        return Packed(codes, torch.zeros(blocks, 2, dtype=torch.int32, device=device))
    return Packed(codes, torch.zeros(blocks, dtype=torch.float32, device=device))


def _in_blocks(flat: Tensor) -> Tensor:
    short = -len(flat) % BLOCK
    return torch.cat([flat, flat.new_zeros(short)]).view(-1, BLOCK) if short else flat.view(-1, BLOCK)
