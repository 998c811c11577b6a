"""AHBSGD, AHBAdam and AHBAdamW are the recurrences of reference.py and do on quadratics what the theory says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_momentum.optim import AHBSGD, AHBAdam, AHBAdamW, reference
from tests.test_tam import (
    SHAPES,
    HostReads,
    assert_continues_bit_for_bit,
    correlated,
    largest_difference,
    random,
    set_gradients,
    sometimes_zero,
    train,
    weights,
    wild_scales,
)

CLASSES = [AHBSGD, AHBAdam, AHBAdamW]
ADAM = [AHBAdam, AHBAdamW]


def sometimes_small(t, w, m):
    return [g * (1e-3 if (t + i) % 3 else 1.0) for i, g in enumerate(random(t, w, m))]


def run_both(cls, stream, steps, lr_of=lambda t: 0.01, groups=None, missing=None, shapes=SHAPES, **kwargs):
    """Run optimizer and reference on the same gradients; yield both sets of weights after each step."""
    params = weights(shapes)
    groups = groups or [list(range(len(params)))]
    optimizer = cls([{"params": [params[i] for i in group]} for group in groups], lr=0.01, **kwargs)
    d = optimizer.defaults
    rule = {"delta": d["delta"], "cap_root": d["cap_root"], "granularity": d["granularity"]}
    rule |= {"wd": d["weight_decay"], "decoupled": d["decoupled_weight_decay"]}
    if cls is not AHBSGD:
        rule |= {"b2": d["beta2"], "eps": d["eps"], "difference": d["difference"]}
    w = [p.detach().clone() for p in params]
    dw, m, v = ([torch.zeros_like(x) for x in w] for _ in range(3))
    g_prev, product, counts = [None] * len(w), [torch.ones((), dtype=torch.float64)] * len(w), [0] * len(w)
    for t in range(steps):
        gradients = stream(t, w, dw)
        absent = missing(t) if missing else set()
        here = [i for i in range(len(w)) if i not in absent]
        set_gradients(params, [None if i in absent else g for i, g in enumerate(gradients)])
        for group in optimizer.param_groups:
            group["lr"] = lr_of(t)
        optimizer.step()
        for i in here:
            counts[i] += 1

        def pick(xs, here=here):
            return [xs[i] for i in here]

        g = pick(gradients)
        previous = [gi if old is None else old for gi, old in zip(g, pick(g_prev), strict=True)]
        if cls is AHBSGD:
            new = reference.ahb_sgd(pick(w), g, previous, pick(dw), lr=lr_of(t), **rule)
            targets = (w, dw)
        else:
            state = (pick(w), g, previous, pick(dw), pick(m), pick(v), pick(product), pick(counts))
            new = reference.ahb_adam(*state, lr=lr_of(t), **rule)
            targets = (w, dw, m, v, product)
        for target, values in zip(targets, new, strict=True):
            for i, value in zip(here, values, strict=True):
                target[i] = value
        for i, gi in zip(here, g, strict=True):
            g_prev[i] = gi
        yield [p.detach() for p in params], w


VARIANTS = [
    *[(AHBSGD, {"granularity": g, **k}) for g in ("global", "tensor") for k in (
        {}, {"cap_root": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": False, "delta": 0.1},
    )],
    *[(AHBAdam, {"granularity": g, "difference": d, **k}) for g in ("global", "tensor")
      for d in ("plain", "preconditioned") for k in ({}, {"cap_root": True, "delta": 0.1, "beta2": 0.95})],
    *[(AHBAdamW, {"granularity": g, "weight_decay": 0.1}) for g in ("global", "tensor")],
]  # fmt: skip


@pytest.mark.parametrize("stream", [random, correlated, sometimes_zero, wild_scales], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("cls", "kwargs"), VARIANTS, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
def test_equals_reference_for_200_steps_in_float64(cls, kwargs, stream):
    # Taken alone, a tensor whose gradient vanishes right after beta was 0 sits on the rule's singular point: lr l is 1
    # up to rounding, beta 0 or 1e-33, the displacement 0 or not. Per tensor that would compare rounding errors, so
    # there gradients become small instead of zero, and tensors of one element (which do nothing else) are left out.
    shapes = SHAPES
    if kwargs["granularity"] == "tensor":
        shapes = [shape for shape in SHAPES if shape != ()]
        stream = sometimes_small if stream is sometimes_zero else stream
    for ours, theirs in run_both(cls, stream, 200, shapes=shapes, **kwargs):
        assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("groups", [[[0, 3], [4, 1], [2, 5]], [[1, 0], [2, 3, 4, 5]]], ids=["three", "two"])
def test_equals_reference_with_groups_missing_gradients_and_a_schedule(cls, granularity, groups):
    runs = run_both(
        cls,
        correlated,
        200,
        lr_of=lambda t: 0.02 * (1 + math.cos(math.pi * t / 200)),
        groups=groups,
        missing=lambda t: {0, 1} if t % 5 == 2 or t < 3 else ({4} if t % 7 == 3 else set()),
        granularity=granularity,
        **({} if cls is AHBSGD else {"difference": "preconditioned"}),
    )
    for ours, theirs in runs:
        assert largest_difference(ours, theirs) < 1e-12


def test_the_harness_sees_another_rule_and_a_pieced_curvature():
    def final(**kwargs):
        return [w.clone() for w in list(run_both(AHBSGD, random, 60, **kwargs))[-1][0]]

    assert largest_difference(final(), final(cap_root=True)) > 1e-4
    assert largest_difference(final(), final(granularity="tensor")) > 1e-4


# ---- quadratics -----------------------------------------------------------------------------------------------------


def descend(optimizer, w, hessian, steps):
    for _ in range(steps):
        w.grad = hessian * w.detach()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("s", [0.1, 0.5, 1.1, 2.0, 3.9])
def test_on_a_one_dimensional_quadratic_beta_is_exact(s):
    """beta = (1 - sqrt(lr L))^2, for lr L up to 4."""
    curvature = 7.0
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AHBSGD([w], lr=s / curvature, delta=1e-6)
    for _ in range(4):
        descend(optimizer, w, curvature, 1)
    assert optimizer.dynamics()["beta"].item() == pytest.approx(min((1 - math.sqrt(s)) ** 2, 1 - 1e-6), rel=1e-9)
    assert optimizer.dynamics()["curvature"].item() == pytest.approx(curvature, rel=1e-9)


def test_it_converges_at_lr_l_of_3_9_and_not_at_4_1():
    """Gradient descent ends at 2, heavy ball with 0.9 at 3.8."""

    def final(s):
        w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        return descend(AHBSGD([w], lr=s, delta=1e-9), w, 1.0, 3000).abs().item()

    assert final(3.9) < 1e-6
    assert not final(4.1) < 1e3
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert not descend(torch.optim.SGD([w], lr=3.9, momentum=0.9), w, 1.0, 300).abs().item() < 1e3


@pytest.mark.parametrize("condition", [10.0, 100.0, 1000.0])
def test_at_lr_of_one_over_l_beta_finds_the_slowest_mode(condition):
    """In n dimensions with lr = 1/L, beta tends to (1 - sqrt(nu/L))^2, nu the smallest curvature."""
    hessian = torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64)
    w = torch.nn.Parameter(torch.ones(20, dtype=torch.float64))
    optimizer = AHBSGD([w], lr=1.0, delta=1e-6)
    descend(optimizer, w, hessian, int(12 * math.sqrt(condition)) + 60)
    assert optimizer.dynamics()["beta"].item() == pytest.approx((1 - math.sqrt(1 / condition)) ** 2, rel=0.02)


def test_it_beats_heavy_ball_of_0_9_at_condition_number_1000():
    hessian = torch.logspace(0, -3, 30, dtype=torch.float64)

    def error(make):
        w = torch.nn.Parameter(torch.ones(30, dtype=torch.float64))
        return descend(make(w), w, hessian, 600).norm().item()

    ours = error(lambda w: AHBSGD([w], lr=1.0, delta=1e-6))
    theirs = error(lambda w: torch.optim.SGD([w], lr=1.0, momentum=0.9))
    assert ours < 0.01 * theirs


@pytest.mark.parametrize("lr", [1e-4, 1.0, 100.0])
def test_on_pure_noise_beta_settles_near_0_036_whatever_the_learning_rate(lr):
    """The known weakness: |dg| then measures noise. With the cap beta is 0."""

    def mean_beta(**kwargs):
        w = torch.nn.Parameter(torch.zeros(4096, dtype=torch.float64))
        optimizer = AHBSGD([w], lr=lr, **kwargs)
        generator = torch.Generator().manual_seed(0)
        betas = []
        for _ in range(150):
            w.grad = torch.randn(4096, generator=generator, dtype=torch.float64)
            optimizer.step()
            betas.append(optimizer.dynamics()["beta"].item())
        return sum(betas[50:]) / 100

    assert mean_beta() == pytest.approx(0.036, abs=0.004)
    assert mean_beta(cap_root=True) == 0.0


# ---- exact limits and invariances -----------------------------------------------------------------------------------


def test_delta_one_is_plain_sgd_and_adam_without_momentum():
    ours, theirs = weights(), weights()
    train(AHBSGD(ours, lr=0.01, delta=1.0), ours, 50)
    train(torch.optim.SGD(theirs, lr=0.01), theirs, 50)
    assert largest_difference(ours, theirs) < 1e-13
    ours, theirs = weights(), weights()
    train(AHBAdamW(ours, lr=0.01, delta=1.0, weight_decay=0.1), ours, 50)
    train(torch.optim.AdamW(theirs, lr=0.01, betas=(0.0, 0.999), weight_decay=0.1), theirs, 50)
    assert largest_difference(ours, theirs) < 1e-12


def loss_scaled(cls, factor, **kwargs):
    params = weights()
    optimizer = cls(params, lr=0.01, eps=1e-30, **kwargs)
    for t in range(30):
        set_gradients(params, [factor * g for g in correlated(t, [p.detach() for p in params], [])])
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_with_the_preconditioned_difference_the_loss_may_be_multiplied_by_1000(granularity):
    common = {"granularity": granularity, "weight_decay": 0.1}
    preconditioned = [loss_scaled(AHBAdamW, f, difference="preconditioned", **common) for f in (1.0, 1000.0)]
    assert largest_difference(*preconditioned) < 1e-12
    plain = [loss_scaled(AHBAdamW, f, **common) for f in (1.0, 1000.0)]
    assert largest_difference(*plain) > 1e-3, "the plain difference is not invariant"


def test_bias_correction_is_by_the_product_of_the_betas():
    """A parameter that joins late, with beta near 1, takes a full first step all the same."""
    w, late = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = AHBAdam([w, late], lr=0.01, eps=0.0)
    for t in range(6):
        w.grad = torch.ones(3, dtype=torch.float64)  # a constant gradient: l = 0, beta = 1 - delta
        late.grad = torch.ones(3, dtype=torch.float64) if t == 5 else None
        optimizer.step()
    assert optimizer.dynamics()["beta"].item() == pytest.approx(0.999)
    assert torch.allclose(late, torch.full_like(late, -0.01), rtol=1e-9)


# ---- clipping -------------------------------------------------------------------------------------------------------


def test_differences_are_of_unclipped_gradients_where_the_caller_says_so():
    """After observe_gradients, clipping changes the step but not the curvature that is seen."""

    def run(clip, observe):
        params = weights()
        optimizer = AHBSGD(params, lr=0.01)
        seen = []
        for t in range(8):
            set_gradients(params, correlated(t, [p.detach() for p in weights()], []))
            if observe:
                optimizer.observe_gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
            seen.append(optimizer.param_groups[0]["squared_difference"].sum().item())
        return seen

    unclipped = run(clip=False, observe=False)
    assert run(clip=True, observe=True) == pytest.approx(unclipped, rel=1e-12)
    assert run(clip=False, observe=True) == pytest.approx(unclipped, rel=1e-12)
    assert run(clip=True, observe=False) != pytest.approx(unclipped, rel=0.1)


# ---- manners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"granularity": "tensor", "previous_grad_dtype": "bfloat16"}], ids=["a", "b"])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_round_trip_continues_bit_for_bit(cls, kwargs, dtype, tmp_path):
    kwargs = {**kwargs, **({} if cls is AHBSGD else {"difference": "preconditioned"})}
    assert_continues_bit_for_bit(cls, tmp_path / "saved.pt", dtype, **kwargs)


@pytest.mark.parametrize("cls", CLASSES)
def test_previous_gradient_is_kept_in_the_dtype_that_was_asked_for(cls):
    for dtype in ("float32", "bfloat16"):
        params = weights(dtype=torch.bfloat16)
        optimizer = cls(params, lr=0.01, previous_grad_dtype=dtype)
        train(optimizer, params, 2)
        assert {optimizer.state[p]["previous_grad"].dtype for p in params} == {getattr(torch, dtype)}
        floats = [k for k in optimizer.state[params[0]] if k != "previous_grad"]
        assert all(optimizer.state[params[0]][k].dtype == torch.float32 for k in floats)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
def test_step_never_reads_a_value_back_from_the_device(cls, granularity):
    params = weights([(4, 4), (3,)], torch.float32)
    optimizer = cls(params, lr=0.01, granularity=granularity, weight_decay=0.1)
    with HostReads() as reads:
        for t in range(4):
            set_gradients(params, random(t, params, []))
            if t == 2:
                params[1].grad = None
            optimizer.step()
            optimizer.dynamics()
    assert reads.count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision_weights_are_the_float64_result_of_their_state_rounded_once(cls, dtype):
    params = weights([(64, 8), (5,)], dtype)
    optimizer = cls(params, lr=0.05, weight_decay=0.1)
    for t in range(20):
        set_gradients(params, random(t, params, []))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            state = optimizer.state[p]
            if cls is AHBSGD:
                displacement = state["displacement"].double()
            else:
                v = (state["exp_avg_sq"].double() / (1 - 0.999 ** optimizer.param_groups[0]["steps"][i])).sqrt() + 1e-8
                displacement = -0.05 * state["exp_avg"].double() / optimizer.param_groups[0]["correction1"][i] / v
            exact = (1 - 0.05 * 0.1) * old.double() + displacement
            half_ulp = torch.finfo(dtype).eps / 2
            assert ((p.double() - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(
    cls=st.sampled_from(CLASSES),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    granularity=st.sampled_from(["global", "tensor"]),
    preconditioned=st.booleans(),
)
def test_no_nan_from_zero_tiny_or_huge_gradients_and_beta_stays_in_bounds(
    cls, scale, dtype, granularity, preconditioned
):
    params = weights(dtype=dtype)
    kwargs = {} if cls is AHBSGD else {"difference": "preconditioned" if preconditioned else "plain"}
    optimizer = cls(params, lr=1e-3, granularity=granularity, delta=0.01, **kwargs)
    for t in range(6):
        set_gradients(params, [scale * g for g in random(t, params, [])])
        optimizer.step()
    assert not any(p.isnan().any() for p in params)
    assert 0 <= optimizer.dynamics()["beta"].item() <= 0.99


@settings(max_examples=15, deadline=None)
@given(permutation=st.permutations(list(range(6))), cut=st.integers(1, 5), cls=st.sampled_from(CLASSES))
def test_order_of_parameters_and_number_of_groups_change_nothing(permutation, cut, cls):
    def run(order):
        params = weights()
        optimizer = cls([{"params": [params[i] for i in group]} for group in order], lr=1e-2)
        for t in range(6):
            set_gradients(params, correlated(t, [p.detach() for p in params], []))
            optimizer.step()
        return [p.detach() for p in params]

    assert largest_difference(run([list(range(6))]), run([permutation[:cut], permutation[cut:]])) < 1e-12


@pytest.mark.parametrize("cls", CLASSES)
def test_maximize_climbs_by_exactly_the_negated_gradients(cls):
    params, mirrored = weights(), weights()
    up, down = cls(params, lr=0.01, maximize=True), cls(mirrored, lr=0.01)
    for t in range(10):
        gradients = random(t, params, [])
        set_gradients(params, gradients)
        set_gradients(mirrored, [-g for g in gradients])
        up.step()
        down.step()
    assert all(torch.equal(a, b) for a, b in zip(params, mirrored, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"delta": 0.0}, r"delta must be a number in \(0, 1\], got 0.0"),
        ({"delta": 1.1}, "delta must be"),
        ({"cap_root": "yes"}, "cap_root must be True or False"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"granularity": "layer"}, "granularity must be one of"),
        ({"previous_grad_dtype": "int8"}, "previous_grad_dtype must be one of 'float32', 'bfloat16', got 'int8'"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_validated_by_name_value_and_range(cls, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=f"{cls.__name__}: {message}"):
        cls(weights(), **kwargs)


def test_arguments_of_the_adam_forms_are_validated_too():
    for cls in ADAM:
        with pytest.raises(ValueError, match=r"beta2 must be a number in \[0, 1\), got 1.0"):
            cls(weights(), beta2=1.0)
        with pytest.raises(ValueError, match="difference must be one of 'plain', 'preconditioned'"):
            cls(weights(), difference="other")
    with pytest.raises(ValueError, match="for the coupled form use AHBAdam"):
        AHBAdamW([{"params": weights(), "decoupled_weight_decay": False}])
    params = weights()
    with pytest.raises(ValueError, match="granularity must be the same in all groups"):
        AHBSGD([{"params": params[:1]}, {"params": params[1:], "granularity": "tensor"}])
