"""The CPU kernels compute what the functions on lists compute, whatever the sizes, threads and storage."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_momentum.integrations.registry import OPTIMIZERS
from hf_momentum.kernels import Gradients, How, Reduced, cpu, rule, rules
from hf_momentum.optim import TAM, AdaTAM, VRAdam
from hf_momentum.optim.adam import adam_update_
from hf_momentum.optim.ahb import ahb_sgd_update_
from hf_momentum.optim.critical import critical_sgd_update_
from hf_momentum.optim.curvature import squared_changes_
from hf_momentum.optim.tam import adatam_update_, tam_update_
from hf_momentum.optim.vradam import advance_moments_, advance_momentum_, vr_update_, vradam_step_, vradam_update_

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=f"no CPU kernels here: {cpu.available()[1]}")

SIZES = [0, 1, 3, 15, 17, 35, 1000, 16384, 16385, 70001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 4.1e-3, torch.float16: 5e-4}
N = len(SIZES)
STEPS = torch.tensor([3.0 + i % 2 for i in range(N)], dtype=torch.float64)
CORRECTION1, ROOT2 = 1 - 0.9**STEPS, (1 - 0.999**STEPS).sqrt()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fragments(seed: int, dtype: torch.dtype = torch.float32, positive: bool = False) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor, and pieces of it that begin at odd places with gaps between."""
    flat = torch.randn(sum(SIZES) + 3 * N + 1, generator=torch.Generator().manual_seed(seed))
    flat = (flat.square() if positive else flat).to(dtype)
    found, at = [], 1
    for size in SIZES:
        found.append(flat.narrow(0, at, size))
        at += size + 3
    return flat, found


def gaps(flat: Tensor) -> Tensor:
    inside, at = torch.zeros(len(flat), dtype=torch.bool), 1
    for size in SIZES:
        inside[at : at + size] = True
        at += size + 3
    return flat[~inside].clone()


def per_tensor(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, N, dtype=torch.float64)


# Each rule with its arguments behind weights and gradients; "m" and "v" stand for state, "old" for a previous gradient,
# "c1" and "r2" for the corrections of the two averages.
RULES = {
    "tam": (tam_update_, ["m", "scalar"], {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "ahb_sgd": (ahb_sgd_update_, ["m", "scalar"], {"lr": 0.1, "weight_decay": 0.1}),
    "critical": (
        critical_sgd_update_,
        ["m", "scalar", None],
        {"lr": 0.1, "weight_decay": 0.1, "nesterov": False},
    ),
    "nesterov": (critical_sgd_update_, ["m", "scalar", None], {"lr": 0.1, "weight_decay": 0.0, "nesterov": True}),
    "nesterov, kept": (critical_sgd_update_, ["m", "scalar", "old"], {"lr": 0.1, "weight_decay": 0, "nesterov": True}),
    "adatam": (
        adatam_update_,
        ["m", "v", "scalar", None, None],
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "ema": False, "weight_decay": 0.1},
    ),
    "adatam as Adam": (
        adatam_update_,
        ["m", "v", "scalar", "c1", "r2"],
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "ema": True, "weight_decay": 0.0},
    ),
    "adam": (
        adam_update_,
        ["m", "v", "scalar", "scalar", "r2"],
        {"lr": 0.1, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
    ),
    "vradam": (vradam_step_, ["m", "v", "c1", "r2", "scalar", "scalar"], {"betas": (0.9, 0.999), "eps": 1e-8}),
    "vradam, second half": (vradam_update_, ["m", "v", "c1", "r2", "scalar", "scalar"], {"eps": 1e-8}),
    "vrmomentum": (vr_update_, ["m", "scalar", None], {}),
}
WITHOUT_GRADIENTS = {"vradam, second half", "vrmomentum"}


def run_kernel(name: str, dtype: torch.dtype, scalar: Tensor, sign: float, decay: float):
    """Weights and state after the kernel, the same by the pure function in float64, and the flat tensors."""
    function, arguments, numbers = RULES[name]
    (flat_w, w), (_, g) = fragments(1, dtype), fragments(2, dtype)
    state = {"m": fragments(3), "v": fragments(4, positive=True), "old": fragments(5)}
    exact_w = [x.double() for x in w]
    exact_g = [sign * a.double() + decay * b for a, b in zip(g, exact_w, strict=True)]
    exact_state = {key: [x.double() for x in pieces] for key, (_, pieces) in state.items()}
    before = {key: gaps(flat) for key, (flat, _) in [*state.items(), ("w", (flat_w, w))]}

    def chosen(pieces, listed):
        numbers = {"scalar": scalar, "c1": CORRECTION1, "r2": ROOT2}
        if listed:
            numbers = {key: x if x.dim() == 0 else list(x.unbind()) for key, x in numbers.items()}
        return [{**numbers, **pieces}[x] if isinstance(x, str) else x for x in arguments]

    gradients = name not in WITHOUT_GRADIENTS
    function(exact_w, *[exact_g] * gradients, *chosen(exact_state, True), **numbers)
    kernel = rule(function)
    versions = [x._version for x in w]
    pieces = {key: found for key, (_, found) in state.items()}
    kernel(w, *[Gradients(g, w, sign, decay)] * gradients, *chosen(pieces, False), **numbers)
    assert all(x._version > old for x, old in zip(w, versions, strict=True))
    for key, (flat, _) in [*state.items(), ("w", (flat_w, w))]:
        assert torch.equal(gaps(flat), before[key]), "the gaps between fragments are not the kernels'"
    return w, pieces, exact_w, exact_state


def close(found: list[Tensor], exact: list[Tensor], tolerance: float) -> bool:
    """Tensor by tensor; relative to the result and to terms of order one, which may have cancelled."""
    return all(
        (a.double() - b).norm() <= tolerance * (b.norm() + len(b) ** 0.5) for a, b in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_updates_are_the_pure_functions_in_float64(name, dtype, scope):
    scalar = torch.tensor(0.61, dtype=torch.float64) if scope == "global" else per_tensor(0.3, 0.9)
    for sign, decay in ((1.0, 0.0), (-1.0, 0.01)):
        w, state, exact_w, exact_state = run_kernel(name, dtype, scalar, sign, decay)
        assert close(w, exact_w, ROUNDING[dtype])
        for key in state:
            assert close(state[key], exact_state[key], 3e-7), key


def test_one_minus_beta2_is_formed_in_double():
    """In float32, 1 - 0.999999 is 3 % off."""
    g, m, v = [torch.ones(100)], [torch.zeros(100)], [torch.zeros(100)]
    rules.advance_moments_(Gradients(g, g), m, v, *torch.ones(2, 1), betas=(0.9, 0.999999), eps=0.0)
    assert v[0][0].item() == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_float64(dtype):
    (_, w), (_, g), (_, m) = fragments(1, dtype), fragments(2, dtype), fragments(3)
    for sign, decay in ((1.0, 0.0), (-1.0, 0.5)):
        exact = [sign * a.double() + decay * b.double() for a, b in zip(g, w, strict=True)]
        sums = rules.alignment_sums(Gradients(g, w, sign, decay), m)
        for row, x, y in zip(sums, [x.double() for x in m], exact, strict=True):
            scale = (x.norm() * y.norm()).item()
            assert row[0].item() == pytest.approx((x @ y).item(), abs=1e-7 * scale)
            assert row[1].item() == pytest.approx((x @ x).item(), rel=1e-12)
            assert row[2].item() == pytest.approx((y @ y).item(), rel=1e-6 if decay else 1e-12)


def test_squares_neither_overflow_nor_vanish():
    huge, tiny = [torch.full((100,), 1e30)], [torch.full((100,), 1e-30)]
    assert rules.alignment_sums(Gradients(huge, huge), tiny)[0].tolist() == pytest.approx([100, 1e-58, 1e62], rel=1e-6)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_changes_are_those_of_the_pure_function(dtype, kept):
    for adam, preconditioned in ((False, False), (True, False), (True, True)):
        (_, g), (_, m), (_, v) = fragments(2, dtype), fragments(3), fragments(4, positive=True)
        flat, old = fragments(5, kept)
        before = gaps(flat)
        numbers = {"eps": 1e-8, "preconditioned": preconditioned}
        exact_old, exact_m = [x.double() for x in old], [x.double() for x in m]
        moments, roots = ([x.double() for x in v], list(ROOT2)) if adam else (None, None)
        exact = squared_changes_([1.5 * x.double() for x in g], exact_old, exact_m, moments, roots, **numbers)
        unformed = Gradients(g, g, factor=torch.tensor(1.5, dtype=torch.float64))
        found = rules.squared_changes_(unformed, old, m, v if adam else None, ROOT2 if adam else None, **numbers)
        assert torch.allclose(found, exact, rtol=2e-6, atol=1e-30)
        assert close(old, exact_old, ROUNDING[kept])
        assert torch.equal(gaps(flat), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_vradam_are_the_pure_functions(dtype):
    (_, g), (_, m), (_, v) = fragments(2, dtype), fragments(3), fragments(4, positive=True)
    exact = [[x.double() for x in xs] for xs in (g, m, v)]
    numbers = {"betas": (0.9, 0.999), "eps": 1e-8}
    rows = advance_moments_(*exact, list(CORRECTION1), list(ROOT2), **numbers)
    assert torch.allclose(rules.advance_moments_(Gradients(g, g), m, v, CORRECTION1, ROOT2, **numbers), rows, rtol=2e-6)
    assert close(m, exact[1], 3e-7)
    assert close(v, exact[2], 3e-7)
    (_, g), (_, m) = fragments(2, dtype), fragments(3)
    exact = [[x.double() for x in xs] for xs in (g, m)]
    rows = advance_momentum_(*exact, momentum=0.9)
    assert torch.allclose(rules.advance_momentum_(Gradients(g, g), m, momentum=0.9), rows, rtol=2e-6)


# ---- surgery --------------------------------------------------------------------------------------------------------


def numbers_of(scope: str, *values: float) -> list[Tensor]:
    """0-dim, or one per tensor around the value."""
    whole = [torch.tensor(value, dtype=torch.float64) for value in values]
    return whole if scope == "global" else [value * per_tensor(0.8, 1.3) for value in whole]


def state_of(pieces: list[Tensor], kept: torch.dtype, seeds: Tensor) -> list[Tensor] | Reduced:
    return pieces if kept == torch.float32 else Reduced(pieces, [x.shape for x in pieces], seeds)


STATE_SEEDS = torch.arange(N, dtype=torch.float64) * 2**27 + 11


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_are_those_of_float64_and_lend_what_is_stored(dtype, scope):
    (flat_b, b), (flat_e, e) = fragments(1, dtype), fragments(2)
    before, versions = (gaps(flat_b), gaps(flat_e)), [x._version for x in b]
    old_b, old_e = [x.double() for x in b], [x.double() for x in e]
    coefficient, keep, lend = numbers_of(scope, -0.7, 0.75, 0.2)
    rules.project_and_lend_(b, e, coefficient, keep, lend)
    each = zip(*(x.expand(N) for x in (coefficient, keep, lend)), strict=True)
    for x, y, was_b, was_e, (c, k, r) in zip(b, e, old_b, old_e, each, strict=True):
        assert close([x], [was_b - c * was_e], ROUNDING[dtype])
        assert close([y], [k * was_e - r * x.double()], 3e-7)
    assert torch.equal(gaps(flat_b), before[0])
    assert torch.equal(gaps(flat_e), before[1])
    assert all(x._version > old for x, old in zip(b, versions, strict=True))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_absorbed_is_that_of_float64(dtype, scope):
    (flat_b, b), (flat_e, e) = fragments(1, dtype), fragments(2)
    before, old_b, old_e = gaps(flat_e), flat_b.clone(), [x.double() for x in e]
    keep, rate = numbers_of(scope, 0.75, 0.2)
    rules.absorb_(b, e, keep, rate)
    exact = [k * y + r * x.double() for x, y, k, r in zip(b, old_e, keep.expand(N), rate.expand(N), strict=True)]
    assert close(e, exact, 3e-7)
    assert torch.equal(gaps(flat_e), before)
    assert torch.equal(flat_b, old_b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_in_bfloat16_are_rounded_as_rounding_py_does(dtype):
    def after(run) -> list[Tensor]:
        (_, b), (_, e) = fragments(1, dtype), fragments(2, torch.bfloat16)
        run(b, Reduced(e, [x.shape for x in e], STATE_SEEDS))
        return [*b, *e]

    def in_torch(b, e) -> None:
        values = e.decoded()
        for x, y in zip(b, values, strict=True):
            x.copy_(torch.addcmul(x.double(), y.double(), torch.tensor(-0.6).double()))
            y.copy_(0.9 * y.double() - 0.3 * x.double())
        e.encode_(values)

    found, expected = after(lambda b, e: rules.project_and_lend_(b, e, 0.6, 0.9, 0.3)), after(in_torch)
    differ = sum((x != y).sum().item() for x, y in zip(found, expected, strict=True))
    assert differ <= 1e-3 * sum(SIZES), "only where float32's last bit decides"
    nearest = after(
        lambda b, e: [
            y.copy_(y.float() * 0.9 - 0.3 * (x.float() - 0.6 * y.float())) for x, y in zip(b, e.parts, strict=True)
        ]
    )
    assert sum((x != y).sum().item() for x, y in zip(found[N:], nearest[N:], strict=True)) > 0.2 * sum(SIZES)


def test_one_thread_and_two_project_alike(threads):
    results = []
    for number in (1, 2):
        threads(number)
        for kept in (torch.float32, torch.bfloat16):
            (flat_b, b), (flat_e, e) = fragments(1), fragments(2, kept)
            state = state_of(e, kept, STATE_SEEDS)
            rules.project_and_lend_(b, state, *numbers_of("tensor", 0.7, 0.9, 0.1))
            rules.absorb_(b, state, *numbers_of("tensor", 0.9, 0.1))
            results.append(torch.cat([flat_b, flat_e.float()]))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_where_they_are_in_projections(bad, dtype, kept):
    for broken in (0, 1):
        lists = torch.ones(200, dtype=dtype), torch.ones(200, dtype=kept)
        lists[broken][157] = bad
        state = state_of([lists[1]], kept, STATE_SEEDS[:1])
        rules.project_and_lend_([lists[0]], state, 0.5, 0.9, 0.1)
        assert all((~x.isfinite()).nonzero().tolist() == [[157]] for x in lists)
        lists[1].fill_(1.0)
        rules.absorb_([lists[0]], state, 1.0, 0.1)
        assert (~lists[1].isfinite()).nonzero().tolist() == [[157]]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_a_skipped_projection_writes_nothing(kept):
    for skip, same in ((torch.tensor(1.0), True), (torch.tensor(0.0), False)):
        (flat_b, b), (flat_e, e) = fragments(1), fragments(2, kept)
        before, state = torch.cat([flat_b, flat_e.float()]), state_of(e, kept, STATE_SEEDS)
        rules.project_and_lend_(b, state, 0.5, 0.9, 0.1, how=How(skip=skip))
        rules.absorb_(b, state, 0.9, 0.1, how=How(skip=skip))
        assert torch.equal(torch.cat([flat_b, flat_e.float()]), before) == same


# ---- storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    w, m = [every.clone()], [torch.zeros(2**16)]
    rules.tam_update_(w, Gradients([every], w), m, torch.tensor(1.0), lr=0.0, momentum=0.0, weight_decay=0.0)
    assert torch.equal(m[0].nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))
    # Every value, the halfway points between neighbours, and a little to each side of them.
    exact = every.float()
    bits = exact[exact.isfinite()].view(torch.int32)
    half = 2 ** (15 if dtype == torch.bfloat16 else 12)
    values = torch.cat([bits + shift for shift in (0, 1, -1, half, half - 1, half + 1)]).view(torch.float32)
    values = torch.cat([values, torch.randn(10**5) * 10.0 ** torch.randint(-9, 6, (10**5,))])
    target = torch.zeros(len(values), dtype=dtype)
    rules.vr_update_([target], [values], torch.tensor(-1.0), None)
    assert torch.equal(target.nan_to_num(nan=7.0), values.to(dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_not_hidden(bad, dtype):
    g, w = [torch.ones(100, dtype=dtype)], [torch.ones(100, dtype=dtype)]
    g[0][57] = bad
    m, v = [torch.zeros(100)], [torch.zeros(100)]
    assert not rules.alignment_sums(Gradients(g, w), m)[0, 2].isfinite()
    rules.tam_update_(w, Gradients(g, w), m, torch.tensor(0.5), lr=0.1, momentum=0.9, weight_decay=0.0)
    assert (~w[0].isfinite()).nonzero().tolist() == [[57]] == (~m[0].isfinite()).nonzero().tolist()
    m = [torch.zeros(100)]
    sums = rules.advance_moments_(Gradients(g, g), m, v, *torch.ones(2, 1), betas=(0.9, 0.99), eps=1e-8)
    assert not sums[0, 0].isfinite()
    assert (~v[0].isfinite()).nonzero().tolist() == [[57]]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_one_thread_and_two_give_the_same_bits(name, threads):
    found = []
    for number in (1, 2):
        threads(number)
        found.append(run_optimizer(name, fused=True, sizes=[70001, 3, 40000, 0, 16384, 33000], steps=3))
    assert torch.equal(*found)


def test_sums_do_not_depend_on_where_the_tensors_lie():
    flat, m = torch.randn(70020), torch.randn(70020)
    pieces = []
    for shift in range(17):
        g, x = flat.clone(), m.clone()
        g[shift : shift + 70001], x[shift : shift + 70001] = flat[:70001], m[:70001]
        grads = [g.narrow(0, shift, 70001)]
        pieces.append(rules.alignment_sums(Gradients(grads, grads), [x.narrow(0, shift, 70001)]))
    assert all(torch.equal(piece, pieces[0]) for piece in pieces)


# ---- whole optimizers -----------------------------------------------------------------------------------------------


def run_optimizer(name, fused, sizes=(35, 1, 0, 1000, 20011), steps=20, dtype=torch.float32, **kwargs) -> Tensor:
    """All weights after some steps on gradients that do not depend on the weights, with one missing now and then."""
    generator = torch.Generator().manual_seed(7)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.005}]
    optimizer = OPTIMIZERS[name].cls(groups, lr=0.01, fused=fused, **kwargs)
    for t in range(steps):
        for i, param in enumerate(params):
            noise = torch.randn(param.shape, generator=generator)
            base = torch.linspace(-1, 1, param.numel())
            param.grad = None if (t, i) in ((5, 1), (9, 3)) else (base + 0.3 * noise).to(dtype)
        optimizer.step()
    return torch.cat([param.detach().float() for param in params])


OPTIONS = {
    "tam": [{}, {"granularity": "tensor", "weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "adatam": [{}, {"ema": True, "bias_correction": True}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "adatamw": [{}, {"granularity": "tensor", "maximize": True}],
    "ahb_sgd": [{}, {"granularity": "tensor", "weight_decay": 0.1}, {"previous_grad_dtype": "bfloat16"}],
    "ahb_adam": [{}, {"difference": "preconditioned"}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "ahb_adamw": [{}, {"granularity": "tensor"}],
    "critical_sgd": [
        {"weight_decay": 0.1},
        {"law": "critical_nesterov", "maximize": True},
        {"curvature": "measured"},
        {"law": "critical_nesterov", "curvature": "measured"},
    ],
    "critical_adamw": [{}, {"curvature": "measured"}],
    "vradam": [{"beta3": 0.01}, {"norm_scope": "tensor"}, {"norm_of": "update", "beta3": 1e-4, "norm_scope": "group"}],
    "vrmomentum": [{"beta3": 0.01}, {"norm_scope": "tensor", "weight_decay": 0.1, "maximize": True}],
}


def test_every_optimizer_is_in_the_table():
    assert set(OPTIONS) == set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "kwargs"), [(n, k) for n in OPTIONS for k in OPTIONS[n]], ids=str)
def test_twenty_steps_with_kernels_are_twenty_steps_without(name, kwargs):
    fused, foreach = (run_optimizer(name, fused, **kwargs) for fused in (True, False))
    assert ((fused - foreach).norm() / foreach.norm()).item() < 1e-6
    assert not torch.equal(foreach, run_optimizer(name, False, steps=19, **kwargs)), "the run must move the weights"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_half_precision_weights_agree_up_to_their_rounding(name, dtype):
    fused, foreach = (run_optimizer(name, fused, dtype=dtype, steps=5) for fused in (True, False))
    assert ((fused - foreach).norm() / foreach.norm()).item() < 0.1 * ROUNDING[dtype]


# ---- the choice -----------------------------------------------------------------------------------------------------


def step_with(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_the_first_step_says_in_one_line_which_path_runs(caplog):
    caplog.set_level(logging.INFO, "hf_momentum")
    mixed = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = TAM(mixed)
    step_with(optimizer)
    step_with(optimizer)
    step_with(TAM(mixed[:1], fused=False))
    assert [record.getMessage() for record in caplog.records] == [
        "TAM: CPU kernels for 1 of 2 tensors or pieces; foreach for 1 (torch.float64 tensors)",
        "TAM: foreach for 1 (fused=False)",
    ]


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(3, dtype=torch.float64), "torch.float64 tensors"),
        (torch.zeros(3, 2).t(), "tensors that are not contiguous"),
    ],
)
def test_fused_true_names_what_it_cannot_take(tensor, why):
    with pytest.raises(RuntimeError, match=f"AdaTAM: fused=True, but .* parameter 0 of group 0: {why}; let fused be"):
        step_with(AdaTAM([torch.nn.Parameter(tensor)], fused=True))


def test_fused_is_validated():
    with pytest.raises(TypeError, match=r"VRAdam: fused must be None .*, True or False, got 'yes'"):
        VRAdam([torch.nn.Parameter(torch.zeros(1))], fused="yes")


def test_a_checkpoint_from_before_the_kernels_loads():
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = TAM(params)
    step_with(optimizer)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["fused"]
    loaded = TAM(params)
    loaded.load_state_dict(state)
    step_with(loaded)
    assert loaded.param_groups[0]["fused"] is None


def test_state_in_another_storage_is_not_misread():
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = TAM(params)
    step_with(optimizer)
    twin = TAM(params)
    twin.load_state_dict(optimizer.state_dict())
    optimizer.state[params[0]]["momentum_buffer"] = optimizer.state[params[0]]["momentum_buffer"].double()
    step_with(optimizer)
    step_with(twin)
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(*[o.state[params[0]]["momentum_buffer"] for o in (optimizer, twin)])


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, as on a machine that never compiled the kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu._library.cache_clear()
    yield tmp_path / "cache" / "hf-momentum" / "kernels"
    cpu._library.cache_clear()


def compiler_at(folder: Path, script: str) -> Path:
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return folder


def weight_after_a_step() -> float:
    param = torch.nn.Parameter(torch.ones(3))
    step_with(TAM([param], lr=1.0))
    return param[0].item()


def test_a_second_process_does_not_compile(cache):
    assert cpu.available() == (True, "")
    assert weight_after_a_step() == 0.5
    (library,) = cache.iterdir()
    made = library.stat()
    code = "from hf_momentum.kernels import cpu; print(cpu.available()[0])"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert second.stdout == "True\n"
    assert [library] == list(cache.iterdir())
    assert (library.stat().st_mtime_ns, library.stat().st_ino) == (made.st_mtime_ns, made.st_ino)


def test_several_may_compile_at_once(cache):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cpu._compiled(), range(2))
    assert first == second
    assert list(cache.iterdir()) == [first]
    assert cpu.available() == (True, "")


def test_without_a_compiler_the_foreach_path_runs_and_the_reason_is_told(cache, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_momentum")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert weight_after_a_step() == 0.5
    reason = "no C compiler found (looked for cc, gcc and clang on PATH); install one"
    assert caplog.messages == [f"TAM: foreach for 1 ({reason})"]
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: no C compiler found"):
        step_with(TAM([torch.nn.Parameter(torch.ones(3))], fused=True))


def test_a_broken_compiler_is_named_and_leaves_nothing_behind(cache, monkeypatch, tmp_path):
    script = 'case "$1" in --version) echo broken 1.0;; *) echo "internal error" >&2; exit 3;; esac'
    folder = compiler_at(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(folder))
    assert cpu.available() == (False, f"{folder}/cc failed: internal error")
    assert weight_after_a_step() == 0.5
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in the way")
    assert cpu.available()[1].startswith(f"cannot write the cache {cache}")


def test_a_cache_that_others_can_write_to_is_closed_to_them(cache):
    planted = cache / cpu._compiled().name
    planted.write_text("what somebody else put there")
    cache.chmod(0o777)
    assert cpu.available() == (True, "")  # compiled anew
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_library_in_a_folder_of_another_user_is_not_loaded(cache, monkeypatch):
    cpu._compiled()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert (
        cpu.available()[1] == f"the cache {cache} belongs to another user; set XDG_CACHE_HOME to a folder of your own"
    )


def test_another_compiler_or_processor_has_its_own_library(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(compiler_at(tmp_path / "bin", ":")))
    first = cpu._compiled()
    monkeypatch.setattr(cpu, "_processor", lambda: "another one")
    assert cpu._compiled() != first
