"""A sketch is linear, unbiased, and as precise as it says, whatever the gradient looks like."""

import math

import pytest
import torch

from hf_momentum.diagnosis.sketch import SignSketch
from hf_momentum.errors import InputError

WIDTH, ROWS, SEEDS = 61, 8, 400  # a chunk has 488 numbers


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def few_rows():
    """An embedding's gradient: the same few columns are large in each of some rows."""
    gradient = torch.zeros(200, 48)
    gradient[torch.arange(0, 200, 7)] = normal(48) * torch.where(torch.arange(48) % 12 == 0, 20.0, 1.0)
    return gradient


GRADIENTS = {
    "normal": lambda: normal(5000),
    "constant": lambda: torch.ones(5000),
    "low rank": lambda: torch.outer(normal(70), normal(90, seed=1)),
    "few rows": few_rows,
    "equal chunks": lambda: normal(WIDTH * ROWS).repeat(12),
    "equal chunks, constant rows": lambda: normal(WIDTH).repeat(ROWS * 12),
    "smaller than a row": lambda: normal(40),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_over_seeds_the_squared_norm_is_unbiased_and_as_precise_as_said(name):
    gradient = GRADIENTS[name]()
    truth = gradient.double().square().sum()
    found = torch.stack([SignSketch(WIDTH, ROWS, seed).of(gradient, key=3).square().sum() for seed in range(SEEDS)])
    ratio, said = found / truth, math.sqrt(2 / WIDTH)
    assert abs(ratio.mean() - 1) < 4 * said / math.sqrt(SEEDS)
    assert ratio.std() < 1.15 * said  # the deviation of a deviation over 400 seeds is 4 %; and chunks are not many


@pytest.mark.parametrize("name", ["normal", "low rank", "equal chunks"])
def test_over_keys_of_one_seed_the_squared_norm_is_as_precise(name):
    gradient = GRADIENTS[name]().flatten().repeat(8)
    sketch, truth = SignSketch(WIDTH, ROWS), gradient.double().square().sum()
    ratio = torch.stack([sketch.of(gradient, key).square().sum() for key in range(SEEDS)]) / truth
    assert abs(ratio.mean() - 1) < 0.1
    assert ratio.std() < 1.15 * math.sqrt(2 / WIDTH)


def test_inner_products_are_unbiased_and_as_precise_as_said():
    x, noise = normal(5000).double(), normal(5000, seed=1).double()
    y = 0.5 * x + noise
    truth, size = x @ y, x.norm() * y.norm()
    sketches = [SignSketch(WIDTH, ROWS, seed) for seed in range(SEEDS)]
    found = torch.stack([sketch.of(x, 0) @ sketch.of(y, 0) for sketch in sketches])
    said = size * math.sqrt((1 + (truth / size) ** 2) / WIDTH)
    assert abs(found.mean() - truth) < 4 * said / math.sqrt(SEEDS)
    assert 0.85 * said < found.std() < 1.15 * said


def test_tensors_of_different_keys_are_uncorrelated_also_when_they_are_equal():
    x = normal(3000)
    cosines = torch.stack(
        [
            torch.nn.functional.cosine_similarity(sketch.of(x, 0), sketch.of(x, 1), dim=0)
            for sketch in (SignSketch(WIDTH, ROWS, seed) for seed in range(SEEDS))
        ]
    )
    assert abs(cosines.mean()) < 4 / math.sqrt(WIDTH * SEEDS)
    assert cosines.std() < 1.15 / math.sqrt(WIDTH)
    # The harness is sensitive: one key for both is correlated through and through.
    assert SignSketch(WIDTH, ROWS).of(x, 0) @ SignSketch(WIDTH, ROWS).of(x, 0) > 0.5 * x.square().sum()


def test_the_sketch_of_a_sum_is_the_sum_of_sketches():
    sketch, x, y = SignSketch(), normal(700, 900).double(), normal(700, 900, seed=1).double()
    torch.testing.assert_close(sketch.of(2 * x - y, 5), 2 * sketch.of(x, 5) - sketch.of(y, 5), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("cuts", [[0, 1], [0, 488], [0, 60, 61, 400, 488, 1000], [0, 5, 2000, 2000]])
def test_pieces_at_their_offsets_add_up_to_the_whole(cuts):
    sketch, x = SignSketch(WIDTH, ROWS), normal(3001).double()
    ends = [*cuts[1:], x.numel()]
    pieces = [sketch.of(x[begin:end], 2, offset=begin) for begin, end in zip(cuts, ends, strict=True)]
    torch.testing.assert_close(sum(pieces), sketch.of(x, 2), rtol=1e-12, atol=1e-12)


def test_signs_stand_where_the_formula_says():
    """Against the definition, number by number."""
    sketch, x = SignSketch(WIDTH, ROWS, seed=4), normal(3 * WIDTH * ROWS + 77).double()
    unit = torch.eye(len(x), dtype=torch.float64)[::97]
    for place, one in zip(range(0, len(x), 97), unit, strict=True):
        found = sketch.of(one, 9)
        assert found.abs().sum() == 1 and found.abs().max() == 1  # one place, one sign
        chunk, rest = divmod(place, WIDTH * ROWS)
        plan = sketch._plan(((9, 0, 4, 0),), x.device)
        k = int(found.abs().argmax())
        row, column = divmod(rest, WIDTH)
        assert (plan.factors[chunk, 0] * k + plan.shifts[chunk, 0]) % WIDTH == column
        assert found[k] == plan.signs[chunk, row] * sketch._matrix(x.device)[row, column]


def test_a_tensor_that_is_not_contiguous_is_read_in_the_order_of_its_elements():
    sketch, x = SignSketch(WIDTH, ROWS), normal(50, 70)
    assert torch.equal(sketch.of(x.t(), 0), sketch.of(x.t().contiguous(), 0))
    assert not torch.equal(sketch.of(x.t(), 0), sketch.of(x, 0))


def test_a_table_has_in_each_row_the_sum_of_its_sketches():
    sketch, tensors = SignSketch(WIDTH, ROWS), [normal(n, seed=n) for n in (3, 488, 2000, 0, 70)]
    keys, offsets, rows = [4, 5, 5, 6, 7], [0, 0, 500, 0, 0], [2, 0, 2, 0, 0]
    found = sketch.table(tensors, keys, offsets, rows, count=4)
    alone = [sketch.of(*one) for one in zip(tensors, keys, offsets, strict=True)]
    expected = [alone[1] + alone[3] + alone[4], 0 * alone[0], alone[0] + alone[2], 0 * alone[0]]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    pairs = [(4, tensors[0]), (5, tensors[1])]
    torch.testing.assert_close(sketch.of_all(pairs), alone[0] + alone[1], rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="at least one"):
        sketch.of_all([])


def test_an_empty_tensor_is_zero():
    assert torch.equal(SignSketch().of(torch.zeros(0, 4), 0), torch.zeros(1021, dtype=torch.float64))


def test_precision_is_that_of_the_tensor_but_at_least_float32():
    sketch, x = SignSketch(), normal(600_000)
    exact = sketch.of(x.double(), 0)
    # float32 sums of 256 numbers; were chunks rounded to float32 on the way to float64, 1e-12 would not hold
    torch.testing.assert_close(sketch.of(x, 0), exact, rtol=0, atol=1e-4)
    shifted = sketch.of(x.double() + 1e-10, 0) - exact
    torch.testing.assert_close(shifted, 1e-10 * sketch.of(torch.ones_like(x).double(), 0), rtol=0, atol=1e-12)
    half = x.bfloat16()
    assert torch.equal(sketch.of(half, 0), sketch.of(half.float(), 0))


def test_a_sketch_depends_on_its_seed_alone():
    x = normal(700, 900)
    assert torch.equal(SignSketch(seed=1).of(x, 3), SignSketch(seed=1).of(x, 3))
    assert not torch.equal(SignSketch(seed=1).of(x, 3), SignSketch(seed=2).of(x, 3))


@pytest.mark.parametrize("arguments", [{"width": 1000}, {"width": 1}, {"width": 961}, {"rows": 0}])
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        SignSketch(**arguments)


def test_what_is_drawn_is_kept_for_few_sets_of_tensors():
    """A model whose experts have a gradient now and then has a new set of them at nearly every step."""
    sketch, x = SignSketch(WIDTH, ROWS), normal(100)
    first = sketch.of(x, 0)
    for key in range(1, 100):
        sketch.of(x, key)
    assert len(sketch._plans) <= 32 and torch.equal(sketch.of(x, 0), first)
