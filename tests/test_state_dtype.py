"""State and weights in fewer bits: what is stored, how it is rounded, that nothing is hidden, and what it costs."""

import copy

import pytest
import torch
from torch import Tensor

from hf_momentum.integrations.registry import OPTIMIZERS
from hf_momentum.kernels import Gradients, Packed, Reduced, packed_zeros, random_bits, rules, seeds, to_bfloat16
from hf_momentum.kernels.rounding import BLOCK, OCTAVES
from hf_momentum.optim import TAM, AdaTAMW, VRAdam
from hf_momentum.optim.piece_state import PieceState

CPU = torch.device("cpu")
REDUCED = ["bfloat16", "int8"]


def drawn(count: int, seed: int = 0) -> Tensor:
    """Numbers over five decades, as gradients of a network are."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (5 * torch.rand(count // BLOCK + 1, generator=generator) - 6)
    return torch.randn(count, generator=generator) * scale.repeat_interleave(BLOCK)[:count]


def packed(values: Tensor, positive: bool, bits: Tensor | None = None) -> Packed:
    found = packed_zeros(values.numel(), positive, CPU)
    found.encode_(values, bits)
    return found


# ---- the formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("count", [1, 127, 128, 129, 10007])
def test_packing_what_was_unpacked_changes_nothing(count, positive):
    values = drawn(count).square() if positive else drawn(count)
    first = packed(values, positive, random_bits(7, count, CPU)).decoded()
    assert torch.equal(packed(first, positive).decoded(), first)
    assert not torch.equal(packed(first * 1.01, positive).decoded(), first)


def test_the_error_of_eight_bits_is_that_of_the_formulas():
    values = drawn(10**5)
    largest = (
        values.abs().view(-1, 32).amax(1)
        if False
        else torch.cat([block.abs().amax().expand(len(block)) for block in values.split(BLOCK)])
    )
    step = (2 * (values.abs() / largest).sqrt() / 127 + 1 / 127**2) * largest  # the distance of two codes
    assert ((packed(values, False).decoded() - values).abs() <= 0.51 * step).all()
    squares = values.square()
    found = packed(squares, True).decoded()
    highest = largest.square()
    inside = squares >= highest * 2.0**-OCTAVES
    assert ((found / squares - 1).abs()[inside] < 1 / 16 + 1e-6).all(), "a code is at most 1/8 of an octave wide"
    raised = found[~inside] / highest[~inside]
    assert (~inside).sum() > 1000
    assert raised.min() >= 2.0 ** -(OCTAVES + 1)
    assert raised.max() <= 1.13 * 2.0**-OCTAVES


@pytest.mark.parametrize("kind", ["bfloat16", "signed", "positive"])
def test_rounding_at_random_is_right_on_average(kind):
    """The mean over n roundings is off by its standard error, which the nearest value is not."""
    values = drawn(4 * BLOCK, seed=3) if kind != "positive" else torch.rand(4 * BLOCK) + 0.1
    n, total = 4000, torch.zeros(len(values), dtype=torch.float64)
    squares = torch.zeros(len(values), dtype=torch.float64)

    def rounded(bits):
        if kind != "bfloat16":
            return packed(values, kind == "positive", bits).decoded()
        return to_bfloat16(values, torch.full((len(values),), 1 << 15) if bits is None else bits).float()

    for t in range(n):
        error = (rounded(random_bits(seeds(torch.tensor([float(t)]), 5)[0], len(values), CPU)) - values).double()
        total += error
        squares += error.square()
    bias, deviation = total / n, (squares / n).sqrt()
    moved = deviation > 0
    z = (bias[moved] / (deviation[moved] / n**0.5)).abs()
    assert z.mean() < 1.0, "of a normal variable: 0.8"
    nearest = (rounded(None) - values).double()
    assert (nearest[moved] / (deviation[moved] / n**0.5)).abs().mean() > 10


def test_random_bits_are_spread_and_differ_from_step_to_step():
    one, two = (random_bits(seeds(torch.tensor([t]), 0)[0], 2**16, CPU) for t in (1.0, 2.0))
    for bit in range(32):
        for bits in (one, one ^ two):
            assert ((bits >> bit) & 1).float().mean() == pytest.approx(0.5, abs=0.01)
    many = seeds(torch.arange(1000.0), 0)
    assert len(many.unique()) == 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -float("nan")])
def test_nan_and_inf_stay_visible(bad):
    for positive in (False, True):
        values = torch.ones(300)
        values[130] = bad
        found = packed(values, positive).decoded()
        assert found[128:256].isnan().all(), "a block whose scale is not finite is NaN as a whole"
        assert torch.equal(found[:128], torch.ones(128))
    rounded = to_bfloat16(torch.tensor([bad]), torch.tensor([0xFFFF]))
    assert torch.equal(rounded.float().nan_to_num(nan=5.0), torch.tensor([bad]).nan_to_num(nan=5.0))


def test_a_second_moment_never_becomes_zero_beside_a_large_one():
    values = torch.full((BLOCK,), 1e-30)
    values[0] = 1.0
    assert packed(values, True).decoded().min() >= 2.0 ** -(OCTAVES + 1)


# ---- kernels and reference ------------------------------------------------------------------------------------------


def state(kind: str, positive: bool, sizes: list[int], steps: Tensor) -> Reduced:
    make = packed_zeros if kind == "int8" else lambda n, *_: torch.zeros(n, dtype=torch.bfloat16)
    shapes = [torch.Size([n]) for n in sizes]
    return Reduced([make(n, positive, CPU) for n in sizes], shapes, seeds(steps, 0), positive)


@pytest.mark.parametrize("kind", REDUCED)
def test_the_kernel_rounds_as_the_reference_does(kind):
    """Same random bits; the codes differ only where the float32 arithmetic before them does, in its last bit."""
    sizes = [1, 127, 128, 129, 5000, 40001]
    w, grads = [drawn(n, 1) for n in sizes], [drawn(n, 2) for n in sizes]
    steps = torch.full((len(sizes),), 3.0, dtype=torch.float64)
    m, v = state(kind, False, sizes, steps), state(kind, True, sizes, steps)
    for part in (m, v):
        part.encode_([drawn(n, 3).abs() if part.positive else drawn(n, 3) for n in sizes])
    expected = copy.deepcopy((m, v))
    ones = torch.ones(len(sizes), dtype=torch.float64)
    rules.adam_update_(
        w, Gradients(grads, w), m, v, 0.9 * ones, ones, ones, lr=0.0, beta2=0.99, eps=1.0, weight_decay=0.0
    )
    values = [[0.9 * x + 0.1 * g for x, g in zip(expected[0].decoded(), grads, strict=True)]]
    values.append([0.99 * x + 0.01 * (g * g) for x, g in zip(expected[1].decoded(), grads, strict=True)])
    different = total = 0
    for found, exact, value in zip((m, v), expected, values, strict=True):
        exact.encode_(value)
        for a, b in zip(found.decoded(), exact.decoded(), strict=True):
            near = (a - b).abs() <= 1e-6 * b.abs() + 1e-12 * b.abs().max()
            different, total = different + (~near).sum().item(), total + near.numel()
            assert ((a - b).abs() <= 0.13 * b.abs() + 4e-4 * b.abs().max()).all(), "never more than one code apart"
    assert different <= 1e-3 * total


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_stays_close_to_float32_state_with_and_without_kernels(name, dtype, granularity):
    options = {
        key: granularity
        for key in ("granularity", "norm_scope")
        if key in OPTIMIZERS[name].cls.__init__.__annotations__
    }
    runs = {}
    for state_dtype in ("float32", dtype):
        for fused in (None, False):
            runs[state_dtype, fused] = trained(name, state_dtype, fused, **options)[0]
    start = trained(name, "float32", None, steps=0)[0]
    moved = (runs["float32", None] - start).norm()
    for fused in (None, False):
        error = ((runs[dtype, fused] - runs["float32", None]).norm() / moved).item()
        assert 0 < error < (0.02 if dtype == "bfloat16" else 0.1), error
    assert (runs[dtype, None] - runs[dtype, False]).norm() / moved < 0.02


def trained(name, state_dtype, fused=None, steps=20, sizes=(5000, 70, 20011), dtype=torch.float32, **options):
    """Weights after some steps on gradients that do not depend on them, and the optimizer."""
    generator = torch.Generator().manual_seed(7)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.005}]
    optimizer = OPTIMIZERS[name].cls(groups, lr=0.01, fused=fused, state_dtype=state_dtype, **options)
    signs = [torch.randn(size, generator=generator) for size in sizes]
    for _ in range(steps):
        for param, sign in zip(params, signs, strict=True):
            param.grad = (sign + torch.randn(param.shape, generator=generator)).to(dtype)
        optimizer.step()
    return torch.cat([param.detach().float() for param in params]), optimizer


@pytest.mark.parametrize("dtype", REDUCED)
def test_one_thread_and_two_give_the_same_bits(dtype):
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(trained("adatamw", dtype, steps=3)[0])
    torch.set_num_threads(before)
    assert torch.equal(*found)


# ---- what is stored -------------------------------------------------------------------------------------------------


def stored_bytes(value: Tensor | PieceState) -> tuple[int, int]:
    """Elements and bytes."""
    if isinstance(value, Tensor):
        return value.numel(), value.numel() * value.element_size()
    parts = [part for _, part in value.pieces.values()]
    tensors = [t for part in parts for t in ((part.codes, part.scales) if isinstance(part, Packed) else (part,))]
    elements = sum(len(part.codes) if isinstance(part, Packed) else part.numel() for part in parts)
    return elements, sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 4.0), ("bfloat16", 2.0), ("int8", 1.1)])
def test_bytes_per_element_of_state(dtype, most):
    for name, buffers in (("tam", ["momentum_buffer"]), ("vradam", ["exp_avg", "exp_avg_sq"])):
        optimizer = trained(name, dtype, steps=1)[1]
        large, small, _ = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
        for buffer in buffers:
            elements, size = stored_bytes(large[buffer])
            assert elements == 5000
            assert most - 0.1 < size / elements <= most
            assert stored_bytes(small[buffer]) == (70, 280), "small tensors keep float32"


def test_previous_gradient_has_an_option_of_its_own():
    optimizer = trained("ahb_sgd", "int8", steps=2, previous_grad_dtype="bfloat16")[1]
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert state["previous_grad"].dtype == torch.bfloat16
    assert isinstance(state["displacement"], PieceState)


def test_float64_weights_keep_float64_state():
    optimizer = trained("tam", "int8", steps=1, dtype=torch.float64)[1]
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"].dtype == torch.float64


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def halves(name, first, second, through=lambda state: state, fused=None):
    """Weights after 10 + 10 steps with a checkpoint between them, read by an optimizer with another `state_dtype`."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (5000, 70)]
    optimizer = OPTIMIZERS[name].cls(params, lr=0.01, state_dtype=first, fused=fused)
    signs = [torch.randn(p.shape, generator=generator) for p in params]
    for t in range(20):
        if t == 10:
            saved = through(copy.deepcopy(optimizer.state_dict()))
            optimizer = OPTIMIZERS[name].cls(params, lr=0.01, state_dtype=second, fused=fused)
            optimizer.load_state_dict(saved)
        for param, sign in zip(params, signs, strict=True):
            param.grad = sign + torch.randn(param.shape, generator=generator)
        optimizer.step()
    assert {group["state_dtype"] for group in optimizer.param_groups} == {second}
    return torch.cat([param.detach() for param in params]), optimizer


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "foreach"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_checkpoint_continues_bit_for_bit(dtype, name, fused, tmp_path):
    def through_a_file(state):
        torch.save(state, tmp_path / "optimizer.pt")
        return torch.load(tmp_path / "optimizer.pt", weights_only=True)

    again, _ = halves(name, dtype, dtype, through_a_file, fused)
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (5000, 70)]
    optimizer = OPTIMIZERS[name].cls(params, lr=0.01, state_dtype=dtype, fused=fused)
    signs = [torch.randn(p.shape, generator=generator) for p in params]
    for _ in range(20):
        for param, sign in zip(params, signs, strict=True):
            param.grad = sign + torch.randn(param.shape, generator=generator)
        optimizer.step()
    assert torch.equal(again, torch.cat([param.detach() for param in params]))


@pytest.mark.parametrize("first", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("second", ["float32", "bfloat16", "int8"])
def test_a_checkpoint_of_one_dtype_loads_into_another(first, second):
    reference, _ = halves("vradam", "float32", "float32")
    weights, optimizer = halves("vradam", first, second)
    assert ((weights - reference).norm() / reference.norm()).item() < 2e-3
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
    assert isinstance(state, PieceState) == (second == "int8")
    if second != "int8":
        assert state.dtype == getattr(torch, second)


def test_a_checkpoint_holds_plain_tensors_only():
    _, optimizer = trained("vradam", "int8", steps=2)
    values = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    assert values
    assert all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values)


def test_a_copied_optimizer_steps_on_its_own_state():
    params = [torch.nn.Parameter(torch.ones(5000))]
    optimizer = TAM(params, state_dtype="int8")
    params[0].grad = torch.ones(5000)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (own,) = twin.param_groups[0]["params"]
    before = params[0].detach().clone()
    own.grad = torch.ones(5000)
    twin.step()
    assert torch.equal(params[0], before)
    params[0].grad = torch.ones(5000)
    optimizer.step()
    assert torch.equal(params[0], own)


# ---- weights in bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "foreach"])
@pytest.mark.parametrize("cls", [TAM, AdaTAMW, VRAdam])
def test_updates_below_the_resolution_of_bfloat16_count_on_average(cls, fused):
    """300 updates of less than half a unit in the last place: to nearest none arrives, at random all of them do."""
    moved, gain = {}, {TAM: 10, AdaTAMW: 400, VRAdam: 1}[cls]
    for random in (False, True):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = cls([param], lr=0.0, weight_decay=0.0, fused=fused, stochastic_rounding=random)
        param.grad = torch.ones_like(param)
        optimizer.step()
        ours = torch.nn.Parameter(torch.ones(4096))
        exact = cls([ours], lr=0.0, weight_decay=0.0, fused=fused)
        ours.grad = torch.ones_like(ours)
        exact.step()
        for group in (*optimizer.param_groups, *exact.param_groups):
            group["lr"] = 2**-8 / 25 / gain
        for _ in range(300):
            optimizer.step()
            exact.step()
        moved[random] = (1 - param.float().mean()).item(), (1 - ours.mean()).item()
    assert moved[False][0] == 0
    assert moved[True][0] == pytest.approx(moved[True][1], rel=0.03)


def test_kernel_and_reference_round_weights_by_the_same_bits():
    found = []
    for fused in (None, False):
        weights, _ = trained("tam", "float32", fused, steps=3, dtype=torch.bfloat16, stochastic_rounding=True)
        found.append(weights)
    assert (found[0] != found[1]).float().mean() < 1e-3
    nearest, _ = trained("tam", "float32", steps=3, dtype=torch.bfloat16)
    assert (found[0] != nearest).float().mean() > 0.2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"state_dtype": "int4"}, "TAM: state_dtype must be one of 'float32', 'bfloat16', 'int8', got 'int4'"),
        ({"stochastic_rounding": "yes"}, "TAM: stochastic_rounding must be True or False, got 'yes'"),
    ],
)
def test_arguments_are_validated(argument, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TAM([torch.nn.Parameter(torch.ones(1))], **argument)
