"""VRAdam and VRMomentum are the recurrences of reference.py, have their exact limits, and keep torch's manners."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_momentum.kernels import squared_norms
from hf_momentum.optim import TAM, reference
from hf_momentum.optim.vradam import VRAdam, VRMomentum
from tests.test_tam import (
    SHAPES,
    HostReads,
    correlated,
    largest_difference,
    random,
    run_pair,
    set_gradients,
    short_run,
    sometimes_zero,
    train,
    weights,
    wild_scales,
)

CLASSES = [VRAdam, VRMomentum]
CASES = [(VRAdam, {"norm_of": "momentum"}), (VRAdam, {"norm_of": "update"}), (VRMomentum, {})]
SCOPES = ["global", "group", "tensor"]
STREAMS = [random, correlated, sometimes_zero, wild_scales]
SPLITS = {1: [[0, 1, 2, 3, 4, 5]], 2: [[0, 3, 4], [1, 2, 5]], 3: [[5, 3], [1, 4], [0, 2]]}


def momentum_name(cls) -> str:
    return "exp_avg" if cls is VRAdam else "momentum_buffer"


# ---- the same run twice: by the optimizer and by the reference ------------------------------------------------------


def run_both(cls, stream, steps=200, groups=1, lr_of=lambda t: 0.01, missing=lambda t: set(), **kwargs):
    """Run optimizer and reference on the same gradients; yield both sets of weights, and both gates, at each step."""
    params, split = weights(), SPLITS[groups]
    optimizer = cls([{"params": [params[i] for i in members]} for members in split], lr=0.01, **kwargs)
    arguments = optimizer.defaults
    rule = {"beta3": arguments["beta3"], "alpha1": arguments["alpha1"]}
    rule |= {"wd": arguments["weight_decay"], "scope": arguments["norm_scope"]}
    if cls is VRAdam:
        rule |= {"eps": arguments["eps"], "norm_of": arguments["norm_of"]}
        rule["b1"], rule["b2"] = arguments["betas"]
    else:
        rule["b"] = arguments["momentum"]
    home = {i: (number, members.index(i)) for number, members in enumerate(split) for i in members}
    n = len(params)
    w, m, v = [p.detach().clone() for p in params], [0.0 * p.detach() for p in params], [0.0 * p for p in params]
    counts = [0] * n
    for t in range(steps):
        gradients = stream(t, w, m)
        present = [i for i in range(n) if i not in missing(t)]
        set_gradients(params, [x if i in present else None for i, x in enumerate(gradients)])
        for group in optimizer.param_groups:
            group["lr"] = lr_of(t)
        optimizer.step()
        if not present:
            continue
        for i in present:
            counts[i] += 1
        inputs = [[xs[i] for i in present] for xs in (w, gradients, m, v)]
        membership = [home[i][0] for i in present]
        if cls is VRAdam:
            now = [counts[i] for i in present]
            *new, gates = reference.vradam(*inputs, now, lr=lr_of(t), group=membership, **rule)
        else:
            *new, gates = reference.vrmomentum(*inputs[:3], lr=lr_of(t), group=membership, **rule)
        for xs, ys in zip((w, m, v), new, strict=False):
            for i, y in zip(present, ys, strict=True):
                xs[i] = y.detach()
        ratios = [optimizer.param_groups[home[i][0]]["lr_ratio"] for i in present]
        ours = [r if r.dim() == 0 else r[home[i][1]] for i, r in zip(present, ratios, strict=True)]
        yield [p.detach() for p in params], w, ours, gates


def assert_equal_runs(runs) -> None:
    gates = []
    for ours, theirs, our_gates, their_gates in runs:
        assert largest_difference(ours, theirs) < 1e-12
        assert torch.allclose(torch.stack(our_gates), torch.stack(their_gates), rtol=1e-12, atol=0)
        gates += our_gates
    assert torch.stack(gates).min() < 0.9, "a gate that never acts would be compared with nothing"


VARIANTS = [
    *itertools.product([VRAdam], [
        *[{"norm_scope": scope, "norm_of": of, "beta3": 0.3} for scope in SCOPES for of in ("momentum", "update")],
        {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "alpha1": 3.0},
        {"weight_decay": 0.0, "beta3": 0.5, "alpha1": 100.0},
    ]),
    *itertools.product([VRMomentum], [
        *[{"norm_scope": scope, "beta3": 0.3} for scope in SCOPES],
        {"momentum": 0.5, "weight_decay": 0.1, "alpha1": 3.0},
    ]),
]  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("cls", "kwargs"), VARIANTS, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
def test_equals_reference_for_200_steps_in_float64(cls, kwargs, stream):
    assert_equal_runs(run_both(cls, stream, **kwargs))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("cls", "kwargs"), CASES)
def test_equals_reference_with_groups_missing_gradients_and_a_schedule(cls, kwargs, scope, groups):
    """Parameters miss steps on their own, so that every one has its own t; and now and then nobody has a gradient."""
    runs = run_both(
        cls,
        correlated,
        groups=groups,
        lr_of=lambda t: 0.02 * (1 + math.cos(math.pi * t / 200)),
        missing=lambda t: set(range(6)) if t % 17 == 16 else {0, 1} if t % 5 == 2 else {4, 5} if t % 7 == 3 else set(),
        norm_scope=scope,
        **kwargs,
    )
    assert_equal_runs(runs)


def test_the_harness_sees_a_wrong_gate():
    """The comparison above must fail when optimizer and reference are given different rules."""

    def finals(**kwargs):
        return [w.clone() for w in list(run_both(VRAdam, correlated, 50, groups=2, **kwargs))[-1][0]]

    honest = finals()
    for other in [{"beta3": 1.001}, {"betas": (0.9001, 0.999)}, {"norm_scope": "group"}, {"norm_of": "update"}]:
        assert largest_difference(honest, finals(**other)) > 1e-6, other


# ---- exact limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_of", ["momentum", "update"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("off", [{"beta3": 0.0}, {"alpha1": 0.0}])
def test_without_its_gate_it_is_adamw(off, scope, norm_of):
    kwargs = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = VRAdam(weights(), norm_scope=scope, norm_of=norm_of, **off, **kwargs)
    assert run_pair(ours, torch.optim.AdamW(weights(), **kwargs)) < 1e-12
    defaults = run_pair(VRAdam(weights(), **off), torch.optim.AdamW(weights()))
    assert defaults < 1e-12, "the other defaults are AdamW's"


def test_with_its_gate_it_is_not_adamw():
    assert run_pair(VRAdam(weights(), lr=0.01), torch.optim.AdamW(weights(), lr=0.01)) > 1e-3


def test_fully_braked_it_is_adamw_at_the_least_learning_rate():
    ours = VRAdam(weights(), lr=0.055, beta3=1e12)
    assert run_pair(ours, torch.optim.AdamW(weights(), lr=0.005)) < 1e-12


def test_momentum_without_its_gate_is_sgd():
    ours = VRMomentum(weights(), lr=0.1, beta3=0.0)
    assert run_pair(ours, torch.optim.SGD(weights(), lr=0.01, momentum=0.9)) < 1e-12


def test_a_constant_gradient_gives_the_closed_form_of_the_gate():
    """m_t = (1 - b^t) g, before bias correction, so the gate opens wide at first and closes as m grows."""
    gradient = torch.arange(1.0, 4.0, dtype=torch.float64)  # |g|^2 = 14
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = VRAdam([w], beta3=0.5)
    for t in range(1, 60):
        w.grad = gradient.clone()
        optimizer.step()
        expected = 1 / (1 + 0.5 * 14 * (1 - 0.9**t) ** 2)
        assert optimizer.dynamics()["lr_ratio"].item() == pytest.approx(expected, rel=1e-12)
        assert optimizer.dynamics()["momentum_norm"].item() == pytest.approx(math.sqrt(14) * (1 - 0.9**t), rel=1e-12)


def test_clipped_gradients_leave_the_gate_above_one_half_and_for_noise_at_095():
    """|g| = 1 bounds |m|^2 by 1; independent gradients give (1 - b1) / (1 + b1) = 0.0526, so AdamW in all but name."""
    w = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = VRAdam([w])
    ratios = []
    for _ in range(80):
        w.grad = torch.randn_like(w)
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        optimizer.step()
        ratios.append(optimizer.dynamics()["lr_ratio"].item())
    assert min(ratios) > 0.5
    assert ratios[-1] == pytest.approx(0.95, abs=0.005)


# ---- groups ---------------------------------------------------------------------------------------------------------


def final_weights(cls, split, **kwargs):
    params = weights()
    decay = {"weight_decay": 0.1}
    optimizer = cls([{"params": [params[i] for i in members], **decay} for members in split], lr=0.01, **kwargs)
    for t in range(50):
        set_gradients(params, random(t, params, []))
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("norm_of", ["momentum", "update"])
def test_a_decay_split_changes_nothing_globally_and_everything_per_group(norm_of):
    """A Trainer always makes two groups, with and without decay; the method must not depend on it."""

    def gap(**kwargs):
        return largest_difference(
            final_weights(VRAdam, SPLITS[1], **kwargs), final_weights(VRAdam, SPLITS[2], **kwargs)
        )

    assert gap(norm_of=norm_of) < 1e-13
    assert gap(norm_of=norm_of, norm_scope="tensor") < 1e-13
    assert gap(norm_of=norm_of, norm_scope="group") > 1e-3


def test_a_decay_split_of_momentum_likewise():
    one = final_weights(VRMomentum, SPLITS[1])
    assert largest_difference(one, final_weights(VRMomentum, SPLITS[2])) < 1e-13
    assert largest_difference(one, final_weights(VRMomentum, SPLITS[2], norm_scope="group")) > 1e-4


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_each_group_keeps_its_own_learning_rate_and_decay(cls, scope):
    params = weights()
    optimizer = cls([{"params": params[:3], "lr": 0.0}, {"params": params[3:], "lr": 0.1}], norm_scope=scope)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert moved == [False, False, False, False, True, True], "the fourth is empty"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_group_added_in_mid_training_joins_the_norm(cls, scope):
    params = weights()
    optimizer = cls(params[:3], lr=0.01, norm_scope=scope)
    train(optimizer, params[:3], 5)
    optimizer.add_param_group({"params": params[3:], "weight_decay": 0.1})
    train(optimizer, params, 1)
    first, second = optimizer.param_groups
    m = [optimizer.state[p][momentum_name(cls)] for p in params]
    if scope == "global":
        assert torch.equal(first["momentum_norm"], second["momentum_norm"])
        assert first["momentum_norm"].item() == pytest.approx(reference.flat(m).norm().item(), rel=1e-12)
    elif scope == "group":
        assert second["momentum_norm"].item() == pytest.approx(reference.flat(m[3:]).norm().item(), rel=1e-12)
    else:
        assert [len(group["momentum_norm"]) for group in optimizer.param_groups] == [3, 3]
        assert second["momentum_norm"][1].item() == pytest.approx(m[4].norm().item(), rel=1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_without_a_gradient_keeps_its_gate_and_one_that_never_had_any_is_not_braked(cls):
    params = weights([(4,), (3,), (2,)])
    optimizer = cls(params, norm_scope="tensor")
    set_gradients(params, [10 * torch.ones(4), torch.ones(3), None])
    optimizer.step()
    before = optimizer.param_groups[0]["lr_ratio"].clone()
    set_gradients(params, [None, torch.ones(3), None])
    optimizer.step()
    after = optimizer.param_groups[0]["lr_ratio"]
    assert after[0] == before[0]
    assert after[1] < before[1]
    assert after[2] == before[2] == 1
    assert optimizer.dynamics()["lr_ratio"].item() == pytest.approx(after.mean().item())


# ---- properties -----------------------------------------------------------------------------------------------------


def test_the_gate_of_the_update_does_not_change_when_the_loss_is_scaled_and_that_of_the_momentum_does():
    def run(scale, **kwargs):
        return short_run(VRAdam, dtype=torch.float64, scale=scale, eps=0.0, beta3=0.1, **kwargs)

    for scope in SCOPES:
        plain, one = run(1.0, norm_of="update", norm_scope=scope)
        scaled, thousand = run(1e3, norm_of="update", norm_scope=scope)
        assert largest_difference(one, thousand) < 1e-12
        ratio = plain.dynamics()["lr_ratio"].item()
        assert ratio < 0.95
        assert scaled.dynamics()["lr_ratio"].item() == pytest.approx(ratio, rel=1e-12)
    assert largest_difference(run(1.0)[1], run(1e3)[1]) > 1e-5


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    scale=st.sampled_from([0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scope=st.sampled_from(SCOPES),
    alpha1=st.sampled_from([0.0, 1.0, 10.0, 1e6]),
    beta3=st.sampled_from([0.0, 1e-12, 1.0, 1e12]),
)
def test_no_nan_from_zero_tiny_or_huge_gradients_and_the_gate_stays_in_bounds(case, scale, dtype, scope, alpha1, beta3):
    cls, kwargs = case
    gate = {"norm_scope": scope, "alpha1": alpha1, "beta3": beta3}
    optimizer, finals = short_run(cls, dtype=dtype, scale=scale, **gate, **kwargs)
    assert not any(w.isnan().any() for w in finals)
    for group in optimizer.param_groups:
        lr_t = group["lr"] * group["lr_ratio"]
        assert (lr_t <= group["lr"]).all()
        assert (lr_t >= group["lr"] / (1 + alpha1) * (1 - 1e-15)).all()
    if beta3 == 0 or scale == 0:
        assert optimizer.dynamics()["lr_ratio"].item() == 1


@pytest.mark.parametrize(("beta3", "expected"), [(0.0, 1.0), (1.0, 1 / 11)])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_squared_norm_that_overflows_float64_brakes_fully_or_not_at_all(cls, beta3, expected):
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = cls([w], lr=1e-3, beta3=beta3)
    w.grad = torch.full_like(w, 1e200)
    optimizer.step()
    assert optimizer.dynamics()["lr_ratio"].item() == pytest.approx(expected, rel=1e-15)
    assert w.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(
    permutation=st.permutations(list(range(len(SHAPES)))),
    cut=st.integers(1, 5),
    cls=st.sampled_from(CLASSES),
    scope=st.sampled_from(["global", "tensor"]),
)
def test_order_of_parameters_and_number_of_groups_change_nothing(permutation, cut, cls, scope):
    _, one_group = short_run(cls, dtype=torch.float64, norm_scope=scope)
    order = [permutation[:cut], permutation[cut:]]
    _, two_groups = short_run(cls, dtype=torch.float64, order=order, norm_scope=scope)
    assert largest_difference(one_group, two_groups) < 1e-13


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", CLASSES)
def test_nan_and_inf_gradients_are_not_hidden(cls, bad):
    params = weights(dtype=torch.float32)
    optimizer = cls(params, lr=0.1)
    for gradients in (random(0, params, []), [torch.full(p.shape, bad) for p in params]):
        set_gradients(params, gradients)
        optimizer.step()
    assert not optimizer.dynamics()["momentum_norm"].isfinite()
    assert not all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("cls", CLASSES)
def test_maximize_climbs_by_exactly_the_negated_gradients(cls):
    params, mirrored = weights(), weights()
    up, down = cls(params, lr=0.01, maximize=True), cls(mirrored, lr=0.01)
    for t in range(20):
        gradients = random(t, params, [])
        set_gradients(params, gradients)
        set_gradients(mirrored, [-g for g in gradients])
        up.step()
        down.step()
    assert all(torch.equal(a, b) for a, b in zip(params, mirrored, strict=True))
    assert torch.equal(params[0].grad, gradients[0]), "the caller's gradients are left as they were"


# ---- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision_weights_have_float32_state_and_are_rounded_once(cls, dtype, scope):
    """Every step's new weights are the float64 result of the same state and gate, rounded to the weights' dtype."""
    params = weights([(64, 8), (5,)], dtype)
    optimizer = cls(params, lr=0.05, weight_decay=0.1, norm_scope=scope, beta3=0.1)
    group, name = optimizer.param_groups[0], momentum_name(cls)
    for t in range(1, 31):
        set_gradients(params, random(t, params, []))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        m = [optimizer.state[p][name] for p in params]
        assert all(x.dtype == torch.float32 for x in m)
        norms = squared_norms(m).sqrt() if scope == "tensor" else reference.flat(m).double().norm()
        # VRAdam knows |m| before m is rounded to float32, VRMomentum after.
        assert torch.allclose(group["momentum_norm"], norms, rtol=1e-7 if cls is VRAdam else 1e-12)
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            update = m[i].double()
            if cls is VRAdam:
                v = optimizer.state[p]["exp_avg_sq"]
                assert v.dtype == torch.float32
                update = (update / (1 - 0.9**t)) / ((v.double() / (1 - 0.999**t)).sqrt() + 1e-8)
            lr_t = 0.05 * (group["lr_ratio"][i] if scope == "tensor" else group["lr_ratio"])
            exact = (1 - lr_t * 0.1) * old.double() - lr_t * update
            half_ulp = torch.finfo(dtype).eps / 2
            assert ((p.double() - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-7).all()


def test_squared_norms_are_formed_in_float64_whatever_the_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(1000, generator=generator), torch.tensor(2.0), torch.zeros(0), torch.ones(3, 5)]
    exact = torch.stack([(x.double() ** 2).sum() for x in xs])
    assert torch.allclose(squared_norms(xs), exact, rtol=1e-14, atol=0)
    monkeypatch.setattr("hf_momentum.kernels.sums._PIECE", 7)
    assert torch.allclose(squared_norms(xs), exact, rtol=1e-14, atol=0)
    assert squared_norms([torch.full((4,), 1e30)]).item() == pytest.approx(4e60, rel=1e-6)


# ---- torch's manners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_round_trip_continues_bit_for_bit(cls, scope, dtype, tmp_path):
    params = weights(dtype=dtype)
    straight = cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], lr=0.01, norm_scope=scope)
    train(straight, params, 7)
    torch.save({"optimizer": straight.state_dict(), "weights": [p.detach() for p in params]}, tmp_path / "saved.pt")
    train(straight, params, 7, start=7)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed_params = [torch.nn.Parameter(w) for w in saved["weights"]]
    resumed = cls([{"params": resumed_params[:2]}, {"params": resumed_params[2:]}], lr=1.0, beta3=5.0, norm_scope=scope)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, resumed_params, 7, start=7)

    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    for a, b in zip(params, resumed_params, strict=True):
        assert straight.state[a].keys() == resumed.state[b].keys()
        for name, value in straight.state[a].items():
            assert value.dtype == resumed.state[b][name].dtype
            assert torch.equal(value, resumed.state[b][name])
    for one, other in zip(straight.param_groups, resumed.param_groups, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("lr_ratio", "momentum_norm"))


@pytest.mark.parametrize("cls", CLASSES)
def test_state_of_another_optimizer_is_refused(cls):
    for other in {VRAdam, VRMomentum, TAM} - {cls}:
        with pytest.raises(ValueError, match=f"saved by {other.__name__} and cannot continue under {cls.__name__}"):
            cls(weights()).load_state_dict(other(weights()).state_dict())
    with pytest.raises(ValueError, match="another package"):
        cls(weights()).load_state_dict(torch.optim.AdamW(weights()).state_dict())


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_is_created_before_the_first_step_and_nothing_evolves_outside_the_state_dict(cls):
    params = weights()
    optimizer = cls(params)
    optimizer.step()  # without any gradient
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.dynamics() == {}
    assert "lr_ratio" not in optimizer.param_groups[0]
    attributes = {k: copy.copy(v) for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    train(optimizer, params, 3)
    after = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    changed = {k for k in after if after[k] != attributes.get(k)}
    assert changed <= {"_opt_called", "_step_count", "_layout"}


@pytest.mark.parametrize("cls", CLASSES)
def test_follows_a_learning_rate_scheduler(cls):
    params = weights()
    optimizer = cls(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t >= 3 else 1.0)
    for t in range(6):
        before = [p.detach().clone() for p in params]
        train(optimizer, params, 1, start=t)
        assert any(not torch.equal(a, b) for a, b in zip(before, params, strict=True)) == (t < 3)
        scheduler.step()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_large_models_are_updated_in_several_buckets_with_the_same_result(cls, scope, monkeypatch):
    _, whole = short_run(cls, dtype=torch.float64, norm_scope=scope)
    monkeypatch.setattr("hf_momentum.optim.base._BUCKET_ELEMENTS", 30)
    monkeypatch.setattr("hf_momentum.kernels.sums._PIECE", 4)
    optimizer, pieced = short_run(cls, dtype=torch.float64, norm_scope=scope)
    assert len(optimizer._collect()[0].buckets) > 2
    assert largest_difference(whole, pieced) < 1e-13


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_weights_of_two_dtypes_share_one_gate(cls, scope):
    params = [*weights([(4, 3), (2,)], torch.float32), *weights([(3,)], torch.bfloat16)]
    optimizer = cls(params, lr=0.01, norm_scope=scope)
    train(optimizer, params, 3)
    m = [optimizer.state[p][momentum_name(cls)].double() for p in params]
    norms = torch.stack([x.norm() for x in m]) if scope == "tensor" else reference.flat(m).norm()
    exactly = 1e-7 if cls is VRAdam else 1e-12  # VRAdam knows |m| before m is rounded to float32
    assert torch.allclose(optimizer.param_groups[0]["momentum_norm"], norms, rtol=exactly)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("cls", "kwargs"), CASES)
def test_step_never_reads_a_value_back_from_the_device(cls, kwargs, scope):
    params = weights([(4, 4), (3,)], torch.float32)
    optimizer = cls(params, lr=0.01, norm_scope=scope, weight_decay=0.1, **kwargs)
    with HostReads() as reads:
        for t in range(3):
            set_gradients(params, random(t, params, []))
            if t == 2:
                params[1].grad = None
            optimizer.step()
            optimizer.dynamics()
    assert reads.count == 0
    for group in optimizer.param_groups:
        assert group["lr_ratio"].dtype == torch.float64
    assert all(value.dim() == 0 for value in optimizer.dynamics().values())


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_gradients_are_refused_by_a_clear_error(cls):
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = cls(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*parameter 0 of group 0.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"lr": "0.1"}, TypeError, r"lr must be a number in \[0, inf\), got '0.1'"),
        ({"lr": float("nan")}, ValueError, "lr must be a number"),
        ({"beta3": -1.0}, ValueError, r"beta3 must be a number in \[0, inf\), got -1.0"),
        ({"beta3": True}, TypeError, "beta3 must be a number"),
        ({"beta3": float("inf")}, ValueError, "beta3 must be a number"),
        ({"alpha1": -0.5}, ValueError, r"alpha1 must be a number in \[0, inf\), got -0.5"),
        ({"alpha1": None}, TypeError, "alpha1 must be a number"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be a number in \[0, inf\), got -0.1"),
        ({"norm_scope": "layer"}, ValueError, "norm_scope must be one of 'global', 'group', 'tensor', got 'layer'"),
        ({"maximize": "False"}, TypeError, "maximize must be True or False, got 'False'"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_validated_by_name_value_and_range(cls, kwargs, error, message):
    with pytest.raises(error, match=f"{cls.__name__}: {message}"):
        cls(weights(), **kwargs)
    with pytest.raises(error, match=message):
        cls([{"params": weights(), **kwargs}])


@pytest.mark.parametrize(
    ("cls", "kwargs", "error", "message"),
    [
        (VRAdam, {"betas": 0.9}, TypeError, r"betas must be a pair of numbers in \[0, 1\), got 0.9"),
        (VRAdam, {"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        (VRAdam, {"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be a number in \[0, 1\), got -0.1"),
        (VRAdam, {"eps": -1e-9}, ValueError, r"eps must be a number in \[0, inf\), got -1e-09"),
        (VRAdam, {"norm_of": "gradient"}, ValueError, "norm_of must be one of 'momentum', 'update', got 'gradient'"),
        (VRMomentum, {"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\), got 1.0"),
        (VRMomentum, {"momentum": "0.9"}, TypeError, "momentum must be a number"),
    ],
)
def test_arguments_of_one_class_only_are_validated_too(cls, kwargs, error, message):
    with pytest.raises(error, match=f"{cls.__name__}: {message}"):
        cls(weights(), **kwargs)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (VRAdam, "beta3", 2.0),
        (VRAdam, "alpha1", 19.0),
        (VRAdam, "norm_of", "update"),
        (VRMomentum, "beta3", 2.0),
        (VRMomentum, "alpha1", 19.0),
    ],
)
def test_one_gate_for_the_model_needs_one_of_each_of_its_arguments(cls, name, value):
    params = weights()

    def groups():  # torch writes the defaults into the dictionaries that it is given
        return [{"params": params[:2]}, {"params": params[2:], name: value}]

    with pytest.raises(ValueError, match=f"{cls.__name__}: with norm_scope='global'.*{name} must be the same"):
        cls(groups())
    for scope in ("group", "tensor"):
        optimizer = cls(groups(), norm_scope=scope)
        train(optimizer, params, 2)
        assert optimizer.param_groups[1][name] == value
    with pytest.raises(ValueError, match="norm_scope must be the same in all groups, got 'tensor'"):
        cls([{"params": params[:2]}, {"params": params[2:], "norm_scope": "tensor"}])
