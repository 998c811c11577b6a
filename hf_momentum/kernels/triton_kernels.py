"""The passes of the update rules in Triton: what `cpu_kernels.c` does, for lists of tensors on a GPU.

One launch makes a whole pass. A tensor is cut into chunks, a program takes one chunk, and tables on the device say
which: `owners` (chunk -> tensor), `begins` (chunk -> first element), `table` (role, tensor -> address) and `numbers`
(role, tensor -> float64). A program goes through its chunk tile by tile; only the last tile of a tensor is masked.

Elements are computed in float32, as in C; so are the numbers that come in as float64. Sums are formed in float64 from
the product on, so that the square of a float32 neither overflows nor vanishes: each program writes the sums of its
chunk, and `chunk_sums` adds those of a tensor, in an order that depends on their number alone. No atomics: a repeated
run gives the same bits. Division and square root are the correctly rounded ones wherever the result is stored as it is.

The widest loads (128 bits) come about only if the compiler knows that addresses are multiples of 16, and it believes
that only if told after the offset of the chunk is added. `ALIGNED` says so; it must be true of all the tensors' own
addresses, and holds for their chunks because a chunk is a multiple of 16 elements.

This module imports triton, so only functions of `cuda.py` import it. It keeps to what the compiler and the interpreter
(TRITON_INTERPRET=1) of triton 3.6 and of 3.9 all take: `while` instead of a `range` whose ends are only known at run
time, and no constants but `tl.constexpr` ones.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

KINDS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
"""How Triton calls the storage of elements; int8 and uint8 stand for the formats of rounding.py."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process are interpreted, on CPU tensors."""

NORM, ALIGNMENT, CHANGE, UPDATE, PROJECT = (tl.constexpr(i) for i in range(5))
"""Values of `RULE`: three that form sums of what is there, the update of state and weights, and a projection."""

STEP, ADVANCE, APPLY = (tl.constexpr(i) for i in range(3))
"""Values of `PHASE` of an update: both halves of it, or one of them."""

_KEPT = tl.constexpr(2)  # value of `FORM`: Nesterov's direction is also written to `previous`

_BLOCK = tl.constexpr(128)  # elements that share a scale: rounding.BLOCK
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_OCTAVES = tl.constexpr(12 << 23)  # rounding.OCTAVES, in the bits of a float32
_SMALLEST = tl.constexpr(27 << 23)  # 2^-100


# ---- what a program works on ----------------------------------------------------------------------------------------


class _Addresses(NamedTuple):
    """Where a program's chunk lies in the tensors that the pass goes over; arbitrary for those that it does not."""

    weights: tl.tensor
    grads: tl.tensor
    first: tl.tensor
    squares: tl.tensor
    previous: tl.tensor
    first_scales: tl.tensor
    squares_scales: tl.tensor


class _Numbers(NamedTuple):
    """The numbers of a program's tensor; of those that the pass does not need, 0. See `Work`."""

    sign: tl.tensor
    keep: tl.tensor
    enter: tl.tensor
    rate: tl.tensor
    shrink: tl.tensor
    unbias: tl.tensor
    weight_seed: tl.tensor
    state_seed: tl.tensor
    decay: tl.tensor
    beta2: tl.tensor
    rest2: tl.tensor
    eps: tl.tensor


class _Tile(NamedTuple):
    """What a program holds at a time.

    Attributes:
        i: places of the elements in the chunk.
        place: their places in the tensor.
        inside: which of them the tensor has; None: all.
        k: places of the scales of its blocks in the chunk.
        there: which of them there are.
    """

    i: tl.tensor
    place: tl.tensor
    inside: tl.tensor
    k: tl.tensor
    there: tl.tensor


@triton.jit
def _address(table, role: tl.constexpr, tensors, t, begin, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    p = tl.load(table + role * tensors + t).to(tl.pointer_type(tl.float32 if KIND is None else KIND)) + begin
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _number(numbers, role: tl.constexpr, tensors, t):
    return tl.load(numbers + role * tensors + t).to(tl.float32)


@triton.jit
def _seed(numbers, role: tl.constexpr, tensors, t):
    return tl.load(numbers + role * tensors + t).to(tl.int64).to(tl.uint32)


# ---- elements -------------------------------------------------------------------------------------------------------


@triton.jit
def _read(p, tile):
    """Elements in float32; 0 where there are none."""
    if tile.inside is None:
        return tl.load(p + tile.i).to(tl.float32)
    else:
        return tl.load(p + tile.i, mask=tile.inside, other=0).to(tl.float32)


@triton.jit
def _write(p, tile, x):
    """Elements in the storage that p points to, rounded to nearest."""
    tl.store(p + tile.i, x.to(p.dtype.element_ty), mask=tile.inside)


@triton.jit
def _only(tile, x, otherwise):
    """x where there are elements: what is computed for none may be NaN."""
    if tile.inside is None:
        return x
    else:
        return tl.where(tile.inside, x, otherwise)


@triton.jit
def _product(tile, x, y):
    """Products of elements in float64, for a sum."""
    return _only(tile, x.to(tl.float64) * y.to(tl.float64), 0.0)


@triton.jit
def _random_bits(seed, place):
    """32 random bits for the element at each place: see rounding.py."""
    x = place.to(tl.uint32) * 0x9E3779B9 + seed
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _rounded_at_random(x, bits):
    """The bfloat16 below or above each x, in float32, chosen by the low 16 random bits; NaN and inf stay."""
    own = x.to(tl.uint32, bitcast=True)
    moved = (own + (bits & 0xFFFF)) & 0xFFFF0000
    return tl.where((own & _INFINITY) != _INFINITY, moved.to(tl.float32, bitcast=True), x)


# ---- state in eight bits --------------------------------------------------------------------------------------------


@triton.jit
def _by_block(x):
    return tl.reshape(x, [x.shape[0] // _BLOCK, _BLOCK])


@triton.jit
def _by_element(x):
    return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], _BLOCK]), [x.shape[0] * _BLOCK])


@triton.jit
def _decode_signed(codes, scales, tile):
    q = _read(codes, tile)
    return _by_element(tl.load(scales + tile.k, mask=tile.there, other=0.0)) * (q * tl.abs(q) * (1.0 / 16129.0))


@triton.jit
def _encode_signed(codes, scales, tile, x, bits):
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as integers NaN and inf are larger than every number
    most = tl.max(_by_block(_only(tile, magnitude, 0)), axis=1)
    most = tl.where(most < _SMALLEST, 0, most)  # where 16129 / largest might overflow
    largest = tl.where(most >= _INFINITY, _NAN, most).to(tl.float32, bitcast=True)
    tl.store(scales + tile.k, largest, mask=tile.there)
    # Between low^2 and (low + 1)^2: up if the share of the way is more than a random number.
    y = tl.abs(x) * _by_element(tl.div_rn(16129.0, largest))
    low = tl.floor(tl.sqrt(y))
    random = (bits & 0xFFFF).to(tl.float32) * (1.0 / 65536.0)
    q = tl.minimum(low + (y - low * low > random * (2.0 * low + 1.0)).to(tl.float32), 127.0)
    q = tl.where(_by_element(largest) > 0.0, q, 0.0)
    tl.store(codes + tile.i, tl.where(x < 0.0, -q, q).to(tl.int8), mask=tile.inside)


@triton.jit
def _decode_positive(codes, scales, tile):
    least = tl.load(scales + 2 * tile.k, mask=tile.there, other=0)
    shift = tl.load(scales + 2 * tile.k + 1, mask=tile.there, other=0)
    q = _read(codes, tile).to(tl.int32)
    return (_by_element(least) + (q << _by_element(shift))).to(tl.float32, bitcast=True)


@triton.jit
def _encode_positive(codes, scales, tile, x, bits):
    own = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(_by_block(_only(tile, own, 0)), axis=1)
    broken = largest >= _INFINITY
    least = tl.min(_by_block(_only(tile, own, 0x7FFFFFFF)), axis=1)
    least = tl.where(broken, _NAN, tl.maximum(tl.maximum(least, largest - _OCTAVES), 0))
    reach = tl.where(broken, 0, largest - least)
    shift = tl.zeros_like(least)
    for candidate in tl.static_range(20):  # the least one for which 254 steps reach the largest
        shift += ((254 << candidate) < reach).to(tl.int32)
    tl.store(scales + 2 * tile.k, least, mask=tile.there)
    tl.store(scales + 2 * tile.k + 1, shift, mask=tile.there)
    least = _by_element(least)
    shift = _by_element(shift)
    added = (bits >> 12).to(tl.int32) & ((1 << shift) - 1)
    q = (tl.maximum(own - least, 0) + added) >> shift
    tl.store(codes + tile.i, tl.where(least == _NAN, 0, q).to(tl.uint8), mask=tile.inside)


# ---- state, however it is stored ------------------------------------------------------------------------------------


@triton.jit
def _read_first(at, tile, STATE: tl.constexpr):
    """Momentum, first moment or displacement."""
    if STATE == tl.int8:
        return _decode_signed(at.first, at.first_scales, tile)
    else:
        return _read(at.first, tile)


@triton.jit
def _read_squares(at, tile, SQUARES: tl.constexpr):
    if SQUARES == tl.uint8:
        return _decode_positive(at.squares, at.squares_scales, tile)
    else:
        return _read(at.squares, tile)


@triton.jit
def _write_first(at, tile, x, bits, STATE: tl.constexpr):
    """Of an element's random bits a first moment takes the low ones."""
    if STATE == tl.int8:
        _encode_signed(at.first, at.first_scales, tile, x, bits)
    else:
        _write(at.first, tile, _rounded_at_random(x, bits) if STATE == tl.bfloat16 else x)


@triton.jit
def _write_squares(at, tile, x, bits, SQUARES: tl.constexpr):
    if SQUARES == tl.uint8:
        _encode_positive(at.squares, at.squares_scales, tile, x, bits)
    else:
        _write(at.squares, tile, _rounded_at_random(x, bits >> 16) if SQUARES == tl.bfloat16 else x)


# ---- the rules, on one tile -----------------------------------------------------------------------------------------
# `FORM` is `divide_change` of a CHANGE and `nesterov` of an UPDATE.


@triton.jit
def _summed(
    at, n, tile, sums, RULE: tl.constexpr, FORM: tl.constexpr, STATE: tl.constexpr, SQUARES: tl.constexpr,
    COUPLED: tl.constexpr,
):  # fmt: skip
    """<g, g>; or <m, g>, <m, m>, <g, g>; or |g - g_prev|^2, |m|^2, |g|^2, and g kept as g_prev.

    In the last, m is divided by sqrt(v) unbias + eps if there are second moments, and with FORM the difference too.
    """
    g = n.sign * _read(at.grads, tile)
    if COUPLED:
        g += n.decay * _read(at.weights, tile)
    gg = _product(tile, g, g)
    if RULE == NORM:
        return sums[0] + gg, sums[1], sums[2]
    m = _read_first(at, tile, STATE)
    if RULE == ALIGNMENT:
        return sums[0] + _product(tile, m, g), sums[1] + _product(tile, m, m), sums[2] + gg
    change = g - _read(at.previous, tile)
    _write(at.previous, tile, g)
    if SQUARES is not None:
        denominator = tl.sqrt_rn(_read_squares(at, tile, SQUARES)) * n.unbias + n.eps
        m = tl.div_rn(m, denominator)
        if FORM:
            change = tl.div_rn(change, denominator)
    return sums[0] + _product(tile, change, change), sums[1] + _product(tile, m, m), sums[2] + gg


@triton.jit
def _updated(
    at, n, tile, sums, PHASE: tl.constexpr, FORM: tl.constexpr, STATE: tl.constexpr, SQUARES: tl.constexpr,
    COUPLED: tl.constexpr, SEEDED: tl.constexpr,
):  # fmt: skip
    """m = keep m + enter g; w = shrink w - rate m, or in Nesterov's form - rate (enter g + keep m).

    Adam's form with second moments: v = beta2 v + rest2 g^2 too; w = shrink w - rate m / (sqrt(v) unbias + eps).
    Sums of an ADVANCE: |m|^2, and with second moments that of what w would lose.
    """
    m = _read_first(at, tile, STATE)
    if SQUARES is not None:
        v = _read_squares(at, tile, SQUARES)
    if COUPLED or PHASE != ADVANCE:
        w = _read(at.weights, tile)
    if PHASE != APPLY:
        g = n.sign * _read(at.grads, tile)
        if COUPLED:
            g += n.decay * w
        if SQUARES is not None:
            v = n.beta2 * v + n.rest2 * (g * g)
        g = n.enter * g
        m = n.keep * m + g

    if SQUARES is not None:
        lost = tl.div_rn(n.rate * m, tl.sqrt_rn(v) * n.unbias + n.eps)
    elif FORM:
        direction = g + n.keep * m
        lost = n.rate * direction
        if FORM == _KEPT:
            _write(at.previous, tile, direction)
    else:
        lost = n.rate * m

    if PHASE != ADVANCE:
        w = n.shrink * w - lost
        _write(at.weights, tile, _rounded_at_random(w, _random_bits(n.weight_seed, tile.place)) if SEEDED else w)
    if PHASE != APPLY:
        bits = _random_bits(n.state_seed, tile.place)
        _write_first(at, tile, m, bits, STATE)
        if SQUARES is not None:
            _write_squares(at, tile, v, bits, SQUARES)
    if PHASE == ADVANCE:
        mm = sums[0] + _product(tile, m, m)
        return mm, sums[1] + _product(tile, lost, lost) if SQUARES is not None else sums[1], sums[2]
    return sums


@triton.jit
def _projected(at, n, tile, STATE: tl.constexpr):
    """w = w - rate m with the old m; m = keep m + enter w, with w as it is stored."""
    m = _read_first(at, tile, STATE)
    w = (_read(at.weights, tile) - n.rate * m).to(at.weights.dtype.element_ty)
    _write(at.weights, tile, w)
    _write_first(at, tile, n.keep * m + n.enter * w.to(tl.float32), _random_bits(n.state_seed, tile.place), STATE)


@triton.jit
def _worked(
    at, n, sums, begin, j, count, RULE: tl.constexpr, PHASE: tl.constexpr, FORM: tl.constexpr, STATE: tl.constexpr,
    SQUARES: tl.constexpr, COUPLED: tl.constexpr, SEEDED: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The tile from element j of the chunk on after its rule; the sums with its own added."""
    i = j + tl.arange(0, TILE)
    k = j // _BLOCK + tl.arange(0, TILE // _BLOCK)
    tile = _Tile(i, begin + i, None if FULL else i < count, k, k * _BLOCK < count)
    if RULE == UPDATE:
        return _updated(at, n, tile, sums, PHASE, FORM, STATE, SQUARES, COUPLED, SEEDED)
    elif RULE == PROJECT:
        _projected(at, n, tile, STATE)
        return sums
    else:
        return _summed(at, n, tile, sums, RULE, FORM, STATE, SQUARES, COUPLED)


# ---- programs -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tensors", "base"])
def one_pass(
    owners, begins, numels, starts, table, numbers, partial, skip,
    tensors, base, decay, beta2, rest2, eps,
    RULE: tl.constexpr, PHASE: tl.constexpr, FORM: tl.constexpr,
    KIND: tl.constexpr, STATE: tl.constexpr, SQUARES: tl.constexpr, PREVIOUS: tl.constexpr,
    COUPLED: tl.constexpr, SEEDED: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A pass over chunk `base + program`; its sums go to row `starts[tensor] + chunk of the tensor` of `partial`.

    The kinds of storage are those of weights and gradients, of the first moments, of the second ones and of `previous`,
    None where there are none.
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row = base + tl.program_id(0)
    t = tl.load(owners + row)
    begin = tl.load(begins + row)
    count = tl.minimum(tl.load(numels + t) - begin, CHUNK).to(tl.int32)
    at = _Addresses(
        _address(table, 0, tensors, t, begin, KIND, ALIGNED),
        _address(table, 1, tensors, t, begin, KIND, ALIGNED),
        _address(table, 2, tensors, t, begin, STATE, ALIGNED),
        _address(table, 3, tensors, t, begin, SQUARES, ALIGNED),
        _address(table, 4, tensors, t, begin, PREVIOUS, ALIGNED),
        _address(table, 5, tensors, t, begin // _BLOCK, tl.float32, False),
        _address(table, 6, tensors, t, begin // _BLOCK * 2, tl.int32, False),
    )
    n = _Numbers(
        _number(numbers, 0, tensors, t),
        _number(numbers, 1, tensors, t),
        _number(numbers, 2, tensors, t),
        _number(numbers, 3, tensors, t),
        _number(numbers, 4, tensors, t),
        _number(numbers, 5, tensors, t),
        _seed(numbers, 6, tensors, t),
        _seed(numbers, 7, tensors, t),
        decay,
        beta2,
        rest2,
        eps,
    )
    sums = (tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64))
    full = count // TILE * TILE
    j = 0
    while j < full:
        sums = _worked(at, n, sums, begin, j, count, RULE, PHASE, FORM, STATE, SQUARES, COUPLED, SEEDED, TILE, True)
        j += TILE
    if j < count:
        sums = _worked(at, n, sums, begin, j, count, RULE, PHASE, FORM, STATE, SQUARES, COUPLED, SEEDED, TILE, False)
    mine = partial + (tl.load(starts + t) + begin // CHUNK) * WIDTH
    if WIDTH > 0:
        tl.store(mine, tl.sum(sums[0], 0))
    if WIDTH > 1:
        tl.store(mine + 1, tl.sum(sums[1], 0))
    if WIDTH > 2:
        tl.store(mine + 2, tl.sum(sums[2], 0))


@triton.jit
def chunk_sums(partial, starts, sums, skip, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """One sum of one tensor out of those of its chunks, always added in one order; 0 where the pass was skipped."""
    t = tl.program_id(0)
    k = tl.program_id(1)
    row = tl.load(starts + t)
    stop = tl.load(starts + t + 1)
    if skip is not None:
        stop = tl.where(tl.load(skip) != 0, row, stop)
    total = tl.zeros([ROWS], tl.float64)
    while row < stop:
        rows = row + tl.arange(0, ROWS)
        total += tl.load(partial + rows * WIDTH + k, mask=rows < stop, other=0.0)
        row += ROWS
    tl.store(sums + t * WIDTH + k, tl.sum(total, 0))
