"""Critically damped momentum: the laws, the two optimizers, and the schedule that puts a law on any torch optimizer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_momentum.optim import CriticalAdamW, CriticalSGD, MomentumSchedule, momentum_laws, reference
from hf_momentum.optim.momentum_laws import (
    CRITICAL,
    critical,
    critical_exact,
    critical_nesterov,
    damping_ratio,
    demon,
    hybrid_crossing,
    onecycle,
)
from tests.test_tam import (
    HostReads,
    assert_continues_bit_for_bit,
    correlated,
    largest_difference,
    random,
    run_pair,
    set_gradients,
    sometimes_zero,
    train,
    weights,
    wild_scales,
)

CLASSES = [CriticalSGD, CriticalAdamW]


# ---- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-6, 1e-3, 0.01, 0.1, 0.25, 1.0, 3.0])
def test_the_laws_are_their_formulas_within_their_bounds(lr):
    root = math.sqrt(lr)
    assert critical(lr) == min(max(1 - 2 * root, 0.0), 0.99)
    assert critical_exact(lr) == min((1 - root) ** 2, 0.99)
    assert critical_nesterov(lr) == min(max((1 - root) / (1 + root), 0.0), 0.99)


def test_the_papers_law_is_the_small_lr_limit_of_the_exact_ones():
    for lr in (1e-4, 1e-5, 1e-6):
        for law in (critical_exact, critical_nesterov):
            assert abs(law(lr, high=1.0) - critical(lr, high=1.0)) < 3 * lr


def test_crossing_switches_at_lr_0_0025_for_a_cosine_from_0_1():
    rates = [0.05 * (1 + math.cos(math.pi * t / 1000)) for t in range(1001)]
    values = [hybrid_crossing(critical(lr)) for lr in rates]
    first = next(i for i, mu in enumerate(values) if mu == 0.9)
    assert rates[first] <= 0.0025 < rates[first - 1]
    assert all(mu < 0.9 for mu in values[:first]) and all(mu == 0.9 for mu in values[first:])


def test_onecycle_is_torchs_momentum_cycle():
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=101)
    for step in range(101):
        # torch's phases meet at step 0.3 * total - 1 and end at total - 1; ours are in parts of the whole.
        ours = onecycle(step / 100, peak=29.3 / 100)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(ours, abs=1e-9)
        optimizer.step()
        if step < 100:
            scheduler.step()


def test_demon_goes_from_its_start_to_zero():
    values = [demon(p / 100) for p in range(101)]
    assert values[0] == 0.9 and values[-1] == 0.0
    assert values == sorted(values, reverse=True)


@settings(max_examples=50, deadline=None)
@given(lr=st.floats(0, 1e6), curvature=st.floats(0, 1e6), law=st.sampled_from(sorted(CRITICAL)))
def test_every_critical_law_stays_in_its_bounds(lr, curvature, law):
    assert 0.0 <= CRITICAL[law](lr, curvature) <= 0.99


# ---- critical damping on quadratics ---------------------------------------------------------------------------------


def path(mu, lr, curvature, steps, nesterov=False):
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=mu, nesterov=nesterov)
    points = [1.0]
    for _ in range(steps):
        w.grad = curvature * w.detach()
        optimizer.step()
        points.append(w.item())
    return points


@pytest.mark.parametrize(("lr", "curvature"), [(0.01, 1.0), (0.1, 1.0), (0.01, 25.0), (0.002, 100.0)])
def test_the_exact_laws_do_not_overshoot_and_any_more_momentum_does(lr, curvature):
    for law, nesterov in ((critical_exact, False), (critical_nesterov, True)):
        mu = law(lr, curvature)
        steps = int(60 / math.sqrt(lr * curvature))
        assert min(path(mu, lr, curvature, steps, nesterov)) >= -1e-9
        assert min(path(mu + 0.05, lr, curvature, steps, nesterov)) < -1e-4


@pytest.mark.parametrize("lr", [0.01, 0.05, 0.1])
def test_the_papers_form_is_slower_than_the_exact_one_on_its_own_quadratic(lr):
    """It is below the exact momentum, hence overdamped."""
    assert critical(lr) < critical_exact(lr)
    steps = int(8 / math.sqrt(lr))
    assert abs(path(critical(lr), lr, 1.0, steps)[-1]) > 2 * abs(path(critical_exact(lr), lr, 1.0, steps)[-1])


def test_damping_ratio_names_the_regime():
    assert damping_ratio(critical(0.01), 0.01) == pytest.approx(1.0)
    assert damping_ratio(0.9, 0.1) < 1 < damping_ratio(0.0, 0.01)
    assert damping_ratio(0.9, 0.0) == math.inf


# ---- the optimizers -------------------------------------------------------------------------------------------------


def run_both(cls, stream, steps, law, curvature, lr_of=lambda t: 0.02, missing=None, groups=None):
    params = weights()
    groups = groups or [list(range(len(params)))]
    optimizer = cls(
        [{"params": [params[i] for i in group]} for group in groups], law=law, curvature=curvature, weight_decay=0.1
    )
    w = [p.detach().clone() for p in params]
    m, v = ([torch.zeros_like(x) for x in w] for _ in range(2))
    product, counts = [1.0] * len(w), [0] * len(w)
    for t in range(steps):
        g = stream(t, w, m)
        absent = missing(t) if missing else set()
        here = [i for i in range(len(w)) if i not in absent]
        set_gradients(params, [None if i in absent else x for i, x in enumerate(g)])
        for group in optimizer.param_groups:
            group["lr"] = lr_of(t)
        optimizer.step()

        def pick(xs, here=here):
            return [xs[i] for i in here]

        common = {"lr": lr_of(t), "law": law, "L": curvature, "wd": 0.1}
        if cls is CriticalSGD:
            new, targets = reference.critical_sgd(pick(w), pick(g), pick(m), **common), (w, m)
        else:
            for i in here:
                counts[i] += 1
            state = (pick(w), pick(g), pick(m), pick(v), pick(product), pick(counts))
            new = reference.critical_adamw(*state, b2=0.999, eps=1e-8, **common)
            targets = (w, m, v, product)
        for target, values in zip(targets, new, strict=True):
            for i, value in zip(here, values, strict=True):
                target[i] = value
        yield [p.detach() for p in params], w


@pytest.mark.parametrize("stream", [random, correlated, sometimes_zero, wild_scales], ids=lambda f: f.__name__)
@pytest.mark.parametrize("curvature", [1.0, 7.0])
@pytest.mark.parametrize(
    ("cls", "law"),
    [(CriticalSGD, "critical"), (CriticalSGD, "critical_exact"), (CriticalSGD, "critical_nesterov"),
     (CriticalAdamW, "critical"), (CriticalAdamW, "critical_exact")],
)  # fmt: skip
def test_equals_reference_for_200_steps_in_float64(cls, law, curvature, stream):
    for ours, theirs in run_both(cls, stream, 200, law, curvature):
        assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("groups", [[[0, 3], [4, 1], [2, 5]], [[1, 0], [2, 3, 4, 5]]], ids=["three", "two"])
@pytest.mark.parametrize("cls", CLASSES)
def test_equals_reference_with_groups_missing_gradients_and_a_schedule(cls, groups):
    runs = run_both(
        cls,
        correlated,
        200,
        "critical",
        1.0,
        lr_of=lambda t: 0.02 * (1 + math.cos(math.pi * t / 200)),
        missing=lambda t: {0, 1} if t % 5 == 2 else ({4} if t % 7 == 3 else set()),
        groups=groups,
    )
    for ours, theirs in runs:
        assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("law", sorted(CRITICAL))
def test_critical_sgd_is_torchs_sgd_with_the_laws_momentum(law):
    mu = CRITICAL[law](0.02)
    theirs = torch.optim.SGD(weights(), lr=0.02, momentum=mu, nesterov=law == "critical_nesterov", weight_decay=0.1)
    ours = CriticalSGD(weights(), lr=0.02, law=law, weight_decay=0.1, decoupled_weight_decay=False)
    assert run_pair(ours, theirs) < 1e-12


def test_critical_adamw_at_constant_lr_is_torchs_adamw_with_the_laws_beta():
    theirs = torch.optim.AdamW(weights(), lr=0.02, betas=(critical(0.02), 0.999), weight_decay=0.1)
    assert run_pair(CriticalAdamW(weights(), lr=0.02, weight_decay=0.1), theirs) < 1e-12


@pytest.mark.parametrize("law", ["critical_exact", "critical"])
def test_a_measured_curvature_is_the_quadratics_own(law):
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = CriticalSGD([w], lr=0.01, law=law, curvature="measured")
    for _ in range(5):
        w.grad = 9.0 * w.detach()
        optimizer.step()
    dynamics = optimizer.dynamics()
    assert dynamics["measured_curvature"].item() == pytest.approx(9.0, rel=1e-9)
    assert dynamics["mu"].item() == pytest.approx(CRITICAL[law](0.01, 9.0), rel=1e-9)


@pytest.mark.parametrize("curvature", [1.0, "measured"])
@pytest.mark.parametrize("cls", CLASSES)
def test_step_never_reads_a_value_back_from_the_device(cls, curvature):
    params = weights([(4, 4), (3,)], torch.float32)
    optimizer = cls(params, lr=0.01, curvature=curvature, weight_decay=0.1)
    with HostReads() as reads:
        for t in range(4):
            set_gradients(params, random(t, params, []))
            optimizer.step()
            optimizer.dynamics()
    assert reads.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", [1.0, "measured"])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_round_trip_continues_bit_for_bit(cls, curvature, dtype, tmp_path):
    assert_continues_bit_for_bit(cls, tmp_path / "saved.pt", dtype, curvature=curvature)


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
            if cls is CriticalSGD:
                assert state["momentum_buffer"].dtype == torch.float32
                direction = state["momentum_buffer"].double()
            else:
                v = (state["exp_avg_sq"].double() / (1 - 0.999 ** optimizer.param_groups[0]["steps"][i])).sqrt() + 1e-8
                direction = state["exp_avg"].double() / optimizer.param_groups[0]["correction1"][i] / v
            exact = (1 - 0.05 * 0.1) * old.double() - 0.05 * direction
            half_ulp = torch.finfo(dtype).eps / 2
            assert ((p.double() - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(
    cls=st.sampled_from(CLASSES),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    curvature=st.sampled_from([1.0, "measured"]),
)
def test_no_nan_from_zero_tiny_or_huge_gradients_and_mu_stays_in_bounds(cls, scale, dtype, curvature):
    params = weights(dtype=dtype)
    optimizer = cls(params, lr=1e-3, curvature=curvature)
    for t in range(6):
        set_gradients(params, [scale * g for g in random(t, params, [])])
        optimizer.step()
    assert not any(p.isnan().any() for p in params)
    assert 0 <= optimizer.dynamics()["mu"].item() <= 0.99


@settings(max_examples=15, deadline=None)
@given(
    permutation=st.permutations(list(range(6))),
    cut=st.integers(1, 5),
    cls=st.sampled_from(CLASSES),
    curvature=st.sampled_from([1.0, "measured"]),
)
def test_order_of_parameters_and_number_of_groups_change_nothing(permutation, cut, cls, curvature):
    def run(order):
        params = weights()
        groups = [{"params": [params[i] for i in group]} for group in order]
        optimizer = cls(groups, lr=1e-2, curvature=curvature)
        train(optimizer, params, 6)
        return [p.detach() for p in params]

    assert largest_difference(run([list(range(6))]), run([permutation[:cut], permutation[cut:]])) < 1e-12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\)"),
        ({"law": "hybrid"}, "law must be one of 'critical', 'critical_exact'"),
        ({"curvature": -1.0}, 'curvature must be a number.*or "measured"'),
        ({"curvature": "guessed"}, "curvature must be"),
        ({"low": 0.5, "high": 0.4}, r"high must be a number in \[0.5, 1\), got 0.4"),
        ({"high": 1.0}, "high must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_validated_by_name_value_and_range(cls, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=f"{cls.__name__}: {message}"):
        cls(weights(), **kwargs)


# ---- the schedule on any optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("law", sorted(CRITICAL))
def test_a_schedule_on_torchs_sgd_is_critical_sgd(law):
    """Also under a learning-rate scheduler: the law sees the rate of the step that follows."""
    nesterov = law == "critical_nesterov"
    params, theirs = weights(), weights()
    ours = torch.optim.SGD(params, lr=0.1, momentum=0.5, nesterov=nesterov)
    MomentumSchedule(ours, law)
    other = CriticalSGD(theirs, lr=0.1, law=law)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 30) for o in (ours, other)]
    for t in range(30):
        train(ours, params, 1, start=t)
        train(other, theirs, 1, start=t)
        for scheduler in schedulers:
            scheduler.step()
        assert largest_difference(params, theirs) < 1e-12


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, torch.optim.RAdam, lambda p, lr: __import__("hf_momentum").TAM(p, lr=lr)]
)
def test_a_schedule_sets_betas_or_momentum_of_any_optimizer(make):
    params = weights()
    optimizer = make(params, lr=0.01)
    MomentumSchedule(optimizer, "critical")
    train(optimizer, params, 1)
    group = optimizer.param_groups[0]
    assert (group["betas"][0] if "betas" in group else group["momentum"]) == critical(0.01)


def schedule_on_sgd(law="hybrid", **kwargs):
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.04, momentum=0.9)
    return w, optimizer, MomentumSchedule(optimizer, law, **kwargs)


def momenta(w, optimizer, steps):
    values = []
    for _ in range(steps):
        w.grad = w.detach().clone()
        optimizer.step()
        values.append(optimizer.param_groups[0]["momentum"])
    return values


def test_hybrid_by_fraction_is_critical_before_and_constant_after():
    w, optimizer, _ = schedule_on_sgd(switch="fraction", fraction=0.4, total_steps=10)
    assert momenta(w, optimizer, 10) == [critical(0.04)] * 4 + [0.9] * 6


def test_hybrid_by_metric_latches_and_the_latch_survives_a_state_dict():
    w, optimizer, schedule = schedule_on_sgd(switch="metric", threshold=0.8)
    assert momenta(w, optimizer, 2) == [critical(0.04)] * 2
    schedule.report(0.79)
    assert momenta(w, optimizer, 1) == [critical(0.04)]
    schedule.report(0.8)
    schedule.report(0.1)
    assert momenta(w, optimizer, 2) == [0.9, 0.9]
    again_w, again, _ = schedule_on_sgd(switch="metric", threshold=0.8)
    again.load_state_dict(optimizer.state_dict())
    assert momenta(again_w, again, 1) == [0.9]


@pytest.mark.parametrize(("law", "kwargs"), [("demon", {"total_steps": 10}), ("critical", {"curvature": "measured"})])
def test_a_schedule_continues_from_the_optimizers_state_dict(law, kwargs, tmp_path):
    w, optimizer, _ = schedule_on_sgd(law, **kwargs)
    straight = momenta(w, optimizer, 5)
    torch.save({"optimizer": optimizer.state_dict(), "w": w.detach()}, tmp_path / "saved.pt")
    straight += momenta(w, optimizer, 5)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again_w, again, _ = schedule_on_sgd(law, **kwargs)
    again_w.data.copy_(saved["w"])
    again.load_state_dict(saved["optimizer"])
    assert momenta(again_w, again, 5) == straight[5:]
    assert torch.equal(w, again_w)


def test_a_schedule_measures_the_curvature_of_any_optimizers_loss():
    w, optimizer, schedule = schedule_on_sgd("critical_exact", curvature="measured")
    assert momenta(w, optimizer, 1) == [0.9], "nothing is known yet"
    momenta(w, optimizer, 1)
    assert schedule.state["curvature"] == pytest.approx(1.0, rel=1e-9)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(critical_exact(0.04, 1.0), rel=1e-9)


def test_a_detached_schedule_leaves_the_optimizer_alone():
    w, optimizer, schedule = schedule_on_sgd("critical")
    momenta(w, optimizer, 1)
    schedule.detach()
    optimizer.param_groups[0]["momentum"] = 0.123
    assert momenta(w, optimizer, 1) == [0.123]


def test_the_nesterov_law_on_plain_heavy_ball_is_refused():
    for kwargs in ({"law": "critical_nesterov"}, {"law": "hybrid", "base": "critical_nesterov"}):
        with pytest.raises(ValueError, match="critical_nesterov needs SGD with nesterov=True"):
            MomentumSchedule(torch.optim.SGD(weights(), lr=0.1, momentum=0.9), **kwargs)


def test_an_optimizer_without_momentum_is_refused():
    with pytest.raises(ValueError, match="Adagrad has neither momentum nor betas to schedule"):
        MomentumSchedule(torch.optim.Adagrad(weights(), lr=0.1))


@pytest.mark.parametrize(
    ("law", "kwargs", "message"),
    [
        ("cosine", {}, "law must be one of 'critical'.*'demon', got 'cosine'"),
        ("hybrid", {"switch": "sometimes"}, "switch must be one of"),
        ("hybrid", {"switch": "fraction"}, "law 'hybrid' by fraction needs total_steps"),
        ("hybrid", {"switch": "metric"}, "law 'hybrid' by metric needs a threshold"),
        ("hybrid", {"base": "demon"}, "base must be one of"),
        ("demon", {}, "law 'demon' needs total_steps"),
        ("constant", {"momentum": 1.0}, "momentum must be a number"),
        ("hybrid", {"fraction": 1.5, "total_steps": 3}, "fraction must be a number"),
        ("critical", {"high": 1.0}, "high must be a number"),
    ],
)
def test_schedule_arguments_are_validated(law, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=f"momentum schedule: {message}"):
        MomentumSchedule(torch.optim.SGD(weights(), lr=0.1), law, **kwargs)


def test_every_law_has_a_name():
    assert set(momentum_laws.LAWS) == {*CRITICAL, "hybrid", "constant", "onecycle", "demon"}
