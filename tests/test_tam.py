"""TAM, AdaTAM and AdaTAMW are the recurrences of reference.py, have their exact limits, and keep torch's manners."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_momentum.optim import TAM, AdaTAM, AdaTAMW, reference

SHAPES = [(7, 5), (3,), (), (0,), (2, 3, 4), (1, 11)]
CLASSES = [TAM, AdaTAM, AdaTAMW]


def weights(shapes=SHAPES, dtype=torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params, gradients) -> None:
    for param, grad in zip(params, gradients, strict=True):
        param.grad = None if grad is None else grad.clone().to(param.dtype)


# ---- gradient streams: random, and those that a careless cosine gets wrong -----------------------------------------

Stream = Callable[[int, list[Tensor], list[Tensor]], list[Tensor]]


def random(t: int, w: list[Tensor], m: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in w]


def correlated(t, w, m):
    return [x.sin() + 0.5 * noise for x, noise in zip(w, random(t % 4, w, m), strict=True)]


def parallel(t, w, m):
    return [3.0 * x if t else torch.ones_like(x) for x in m]


def opposed(t, w, m):
    return [-2.0 * x if t % 3 else torch.ones_like(x) for x in m]


def orthogonal(t, w, m):
    noise = random(t, w, m)
    flat_m, flat_n = reference.flat(m), reference.flat(noise)
    along = (flat_m @ flat_n) / (flat_m @ flat_m) if t else 0.0
    return [n - along * x for n, x in zip(noise, m, strict=True)]


def sometimes_zero(t, w, m):
    return [torch.zeros_like(x) if (t + i) % 3 else g for i, (x, g) in enumerate(zip(w, random(t, w, m), strict=True))]


def wild_scales(t, w, m):
    return [g * 10.0 ** ((7 * t) % 41 - 20) for g in random(t, w, m)]


STREAMS = [random, correlated, parallel, opposed, orthogonal, sometimes_zero, wild_scales]


# ---- the same run twice: by the optimizer and by the reference -----------------------------------------------------


def run_both(cls, stream: Stream, steps: int, lr_of=lambda t: 0.01, groups=None, missing=None, **kwargs):
    """Run optimizer and reference on the same gradients; yield both sets of weights after each step."""
    params = weights()
    groups = groups or [list(range(len(params)))]
    optimizer = cls([{"params": [params[i] for i in group]} for group in groups], lr=0.01, **kwargs)
    arguments = {**optimizer.defaults}
    names = {
        "gamma": "gamma",
        "granularity": "granularity",
        "weight_decay": "wd",
        "decoupled_weight_decay": "decoupled",
    }
    if cls is TAM:
        names |= {"momentum": "beta", "eps": "eps"}
        rule = {ours: arguments[theirs] for theirs, ours in names.items()}
    else:
        names |= {"eps": "eps", "torque_eps": "torque_eps", "ema": "ema", "bias_correction": "bias_correction"}
        rule = {ours: arguments[theirs] for theirs, ours in names.items()}
        rule["b1"], rule["b2"] = arguments["betas"]
    w = [p.detach().clone() for p in params]
    m, v = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    zero = torch.zeros((), dtype=torch.float64)
    s = [zero] if arguments["granularity"] == "global" else [zero] * len(w)
    counts = [0] * len(w)
    for t in range(steps):
        g = stream(t, w, m)
        absent = missing(t) if missing else set()
        present = [i for i in range(len(w)) if i not in absent]
        set_gradients(params, [None if i in absent else x for i, x in enumerate(g)])
        for group in optimizer.param_groups:
            group["lr"] = lr_of(t)
        optimizer.step()

        def pick(xs, present=present):
            return [xs[i] for i in present]

        def put(xs, new, present=present):
            for i, x in zip(present, new, strict=True):
                xs[i] = x

        s_in = s if len(s) == 1 else pick(s)
        if not present:
            continue
        if cls is TAM:
            w_new, m_new, s_new = reference.tam(pick(w), pick(g), pick(m), s_in, lr=lr_of(t), **rule)
        else:
            for i in present:
                counts[i] += 1
            assert len({counts[i] for i in present}) == 1 or not rule["bias_correction"]
            args = (pick(w), pick(g), pick(m), pick(v), s_in, counts[present[0]])
            w_new, m_new, v_new, s_new = reference.adatam(*args, lr=lr_of(t), **rule)
            put(v, v_new)
        put(w, w_new)
        put(m, m_new)
        if len(s) == 1:
            s = s_new
        else:
            put(s, s_new)
        yield [p.detach() for p in params], w


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest weight: a weight that crosses zero from 1e20 carries the rounding of 1e20."""
    a, b = reference.flat(ours), reference.flat(theirs)
    return ((a - b).abs().max() / b.abs().max()).item()


VARIANTS = [
    *itertools.product([TAM], [{"granularity": g, **d} for g in ("global", "tensor") for d in (
        {}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": False},
        {"momentum": 0.5, "gamma": 0.99, "eps": 1e-3},
    )]),
    *itertools.product([AdaTAM], [{"granularity": g, **d} for g in ("global", "tensor") for d in (
        {}, {"weight_decay": 0.1, "decoupled_weight_decay": False}, {"ema": True}, {"bias_correction": True},
        {"ema": True, "bias_correction": True, "betas": (0.8, 0.95), "torque_eps": 1e-3},
    )]),
    *itertools.product([AdaTAMW], [{"granularity": g, "weight_decay": 0.1} for g in ("global", "tensor")]),
]  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("cls", "kwargs"), VARIANTS, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
def test_equals_reference_for_200_steps_in_float64(cls, kwargs, stream):
    for ours, theirs in run_both(cls, stream, 200, **kwargs):
        assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
def test_equals_reference_with_groups_missing_gradients_and_a_schedule(cls, granularity):
    runs = run_both(
        cls,
        correlated,
        200,
        lr_of=lambda t: 0.02 * (1 + math.cos(math.pi * t / 200)),
        groups=[[0, 3], [4, 1], [2, 5]],
        missing=lambda t: {0, 1} if t % 5 == 2 else ({4} if t % 7 == 3 else set()),
        granularity=granularity,
    )
    for ours, theirs in runs:
        assert largest_difference(ours, theirs) < 1e-12


def test_the_harness_sees_a_wrong_beta_and_a_pieced_cosine():
    """The comparison above must fail when the reference is given another rule."""
    honest = [w.clone() for w in list(run_both(TAM, correlated, 50))[-1][0]]
    wrong_beta = [w.clone() for w in list(run_both(TAM, correlated, 50, momentum=0.9001))[-1][0]]
    pieced = [w.clone() for w in list(run_both(TAM, correlated, 50, granularity="tensor"))[-1][0]]
    assert largest_difference(honest, wrong_beta) > 1e-6
    assert largest_difference(honest, pieced) > 1e-4


# ---- exact limits ---------------------------------------------------------------------------------------------------


def run_pair(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, steps=100) -> float:
    first = [p for group in ours.param_groups for p in group["params"]]
    second = [p for group in theirs.param_groups for p in group["params"]]
    for t in range(steps):
        set_gradients(first, correlated(t, [p.detach() for p in first], []))
        set_gradients(second, correlated(t, [p.detach() for p in second], []))
        ours.step()
        theirs.step()
    return largest_difference([p.detach() for p in first], [p.detach() for p in second])


def test_tam_with_damping_one_is_sgd_with_momentum():
    ours = TAM(weights(), lr=0.01, fixed_damping=1.0, eps=0.0, weight_decay=0.1, decoupled_weight_decay=False)
    theirs = torch.optim.SGD(weights(), lr=0.01, momentum=0.9, weight_decay=0.1)
    assert run_pair(ours, theirs) < 1e-12


def test_tam_with_frozen_gate_is_sgd_at_half_lr():
    frozen = TAM(weights(), lr=0.02, fixed_damping=0.5, eps=0.0)
    assert run_pair(frozen, torch.optim.SGD(weights(), lr=0.01, momentum=0.9)) < 1e-12
    gamma_near_one = TAM(weights(), lr=0.02, gamma=1 - 1e-14, eps=0.0)
    assert run_pair(gamma_near_one, torch.optim.SGD(weights(), lr=0.01, momentum=0.9)) < 1e-11


def test_adatamw_with_damping_one_ema_and_bias_correction_is_adamw():
    kwargs = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = AdaTAMW(weights(), ema=True, bias_correction=True, fixed_damping=1.0, torque_eps=0.0, **kwargs)
    assert run_pair(ours, torch.optim.AdamW(weights(), **kwargs)) < 1e-12


def test_adatam_coupled_with_damping_one_is_adam():
    kwargs = {"lr": 0.01, "weight_decay": 0.1}
    ours = AdaTAM(
        weights(),
        ema=True,
        bias_correction=True,
        fixed_damping=1.0,
        torque_eps=0.0,
        decoupled_weight_decay=False,
        **kwargs,
    )
    assert run_pair(ours, torch.optim.Adam(weights(), **kwargs)) < 1e-12


def test_adatamw_is_adatam_with_decoupled_decay():
    assert run_pair(AdaTAMW(weights(), weight_decay=0.1), AdaTAM(weights(), weight_decay=0.1)) == 0.0


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_constant_gradient_gives_the_closed_form_of_d(gamma):
    """d_t = (2 - gamma^(t-1)) / 2."""
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = TAM([w], lr=0.1, momentum=0.5, gamma=gamma)
    for t in range(1, 60):
        w.grad = torch.arange(1.0, 6.0, dtype=torch.float64)
        optimizer.step()
        assert optimizer.dynamics()["damping"].item() == pytest.approx((2 - gamma ** (t - 1)) / 2, abs=1e-12)


def test_momentum_parallel_to_a_matrix_gradient_gives_d_one():
    """Summing the products element by element, as copied public code does not, is what makes this 1 and not 0.5007."""
    w = torch.nn.Parameter(torch.zeros(768, 768))
    optimizer = TAM([w], lr=0.1, gamma=0.0, momentum=0.0)
    gradient = torch.randn(768, 768)
    for _ in range(2):
        w.grad = gradient.clone()
        optimizer.step()
    assert optimizer.dynamics()["cosine"].item() == pytest.approx(1.0, abs=1e-12)
    assert optimizer.dynamics()["damping"].item() == pytest.approx(1.0, abs=1e-12)


def test_adatam_step_sizes_for_a_constant_gradient():
    """|step| / lr is 0.5 / sqrt(1 - b2) = 15.81 first, at most 52.9 at t = 22, and 10 in the limit."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdaTAM([w], lr=1.0, eps=0.0)
    sizes = []
    for _ in range(8_000):
        before = w.item()
        w.grad = torch.ones_like(w)
        optimizer.step()
        sizes.append(before - w.item())
    assert sizes[0] == pytest.approx(0.5 / math.sqrt(1 - 0.999), rel=1e-6)
    assert sizes.index(max(sizes)) + 1 == 22
    assert max(sizes) == pytest.approx(52.9, abs=0.05)
    assert sizes[-1] == pytest.approx(10.0, rel=1e-3)


# ---- properties -----------------------------------------------------------------------------------------------------


def short_run(cls, dtype=torch.float32, scale=1.0, shapes=SHAPES, order=None, **kwargs):
    params = weights(shapes, dtype)
    gradients = [random(t, params, []) for t in range(6)]
    order = order or [list(range(len(params)))]
    optimizer = cls([{"params": [params[i] for i in group]} for group in order], lr=1e-3, **kwargs)
    for gradient in gradients:
        set_gradients(params, [g * scale for g in gradient])
        optimizer.step()
    return optimizer, [p.detach() for p in params]


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-8, 8), granularity=st.sampled_from(["global", "tensor"]), cls=st.sampled_from(CLASSES))
def test_cosine_and_damping_do_not_change_when_gradients_are_scaled(exponent, granularity, cls):
    kwargs = {"dtype": torch.float64, "granularity": granularity, "eps": 0.0}
    kwargs |= {} if cls is TAM else {"torque_eps": 0.0}
    plain, _ = short_run(cls, **kwargs)
    scaled, _ = short_run(cls, scale=10.0**exponent, **kwargs)
    for name, value in plain.dynamics().items():
        assert scaled.dynamics()[name].item() == pytest.approx(value.item(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    cls=st.sampled_from(CLASSES),
    scale=st.sampled_from([0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    granularity=st.sampled_from(["global", "tensor"]),
)
def test_no_nan_from_zero_tiny_or_huge_gradients_and_d_stays_in_bounds(cls, scale, dtype, granularity):
    optimizer, finals = short_run(cls, dtype=dtype, scale=scale, granularity=granularity)
    assert not any(w.isnan().any() for w in finals)
    assert 0 <= optimizer.dynamics()["damping"].item() <= 1
    assert -1 <= optimizer.dynamics()["cosine"].item() <= 1


@settings(max_examples=20, deadline=None)
@given(permutation=st.permutations(list(range(len(SHAPES)))), cut=st.integers(1, 5), cls=st.sampled_from(CLASSES))
def test_order_of_parameters_and_number_of_groups_change_nothing(permutation, cut, cls):
    _, one_group = short_run(cls, dtype=torch.float64)
    _, two_groups = short_run(cls, dtype=torch.float64, order=[permutation[:cut], permutation[cut:]])
    assert largest_difference(one_group, two_groups) < 1e-13


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", CLASSES)
def test_nan_and_inf_gradients_are_not_hidden(cls, bad):
    params = weights(dtype=torch.float32)
    optimizer = cls(params, lr=0.1)
    for gradients in (random(0, params, []), [torch.full(p.shape, bad) for p in params]):
        set_gradients(params, gradients)
        optimizer.step()
    assert optimizer.dynamics()["cosine"].isnan()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision_weights_have_float32_state_and_are_rounded_once(cls, dtype):
    """Every step's new weights are the float64 result of the same state, rounded to the weights' dtype."""
    params = weights([(64, 8), (5,)], dtype)
    optimizer = cls(params, lr=0.05, weight_decay=0.1)
    name = "momentum_buffer" if cls is TAM else "exp_avg"
    for t in range(30):
        gradients = random(t, params, [])
        set_gradients(params, gradients)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            state = optimizer.state[p]
            assert state[name].dtype == torch.float32
            update = state[name].double()
            if cls is not TAM:
                update = update / (state["exp_avg_sq"].double().sqrt() + 1e-8)
            exact = (1 - 0.05 * 0.1) * old.double() - 0.05 * update
            half_ulp = torch.finfo(dtype).eps / 2
            assert ((p.double() - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-7).all()


# ---- torch's manners ------------------------------------------------------------------------------------------------


def train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        set_gradients(params, correlated(t, [p.detach().double() for p in params], []))
        optimizer.step()


def assert_continues_bit_for_bit(cls, path, dtype, **kwargs) -> None:
    """Seven steps, a saved and loaded state dict, and seven more equal fourteen steps to the last bit."""
    params = weights(dtype=dtype)
    straight = cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], lr=0.01, **kwargs)
    train(straight, params, 7)
    torch.save({"optimizer": straight.state_dict(), "weights": [p.detach() for p in params]}, path)
    train(straight, params, 7, start=7)
    saved = torch.load(path, weights_only=True)
    again = [torch.nn.Parameter(w) for w in saved["weights"]]
    resumed = cls([{"params": again[:2]}, {"params": again[2:]}], lr=1.0, **kwargs)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, again, 7, start=7)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_round_trip_continues_bit_for_bit(cls, granularity, dtype, tmp_path):
    kwargs = {"lr": 0.01, "granularity": granularity} | ({} if cls is TAM else {"bias_correction": True})
    params = weights(dtype=dtype)
    straight = cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], **kwargs)
    train(straight, params, 7)
    torch.save({"optimizer": straight.state_dict(), "weights": [p.detach() for p in params]}, tmp_path / "saved.pt")
    train(straight, params, 7, start=7)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed_params = [torch.nn.Parameter(w) for w in saved["weights"]]
    resumed = cls([{"params": resumed_params[:2]}, {"params": resumed_params[2:]}], lr=1.0, granularity=granularity)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, resumed_params, 7, start=7)

    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    assert all(
        torch.equal(straight.state[a][k], resumed.state[b][k])
        for a, b in zip(params, resumed_params, strict=True)
        for k in straight.state[a]
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_state_of_another_optimizer_is_refused(cls):
    params = weights()
    others = [other for other in CLASSES if other is not cls]
    for other in others:
        saved = other(weights()).state_dict()
        with pytest.raises(ValueError, match=f"saved by {other.__name__} and cannot continue under {cls.__name__}"):
            cls(params).load_state_dict(saved)
    with pytest.raises(ValueError, match="another package"):
        cls(params).load_state_dict(torch.optim.AdamW(weights()).state_dict())


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_is_created_before_the_first_step_and_nothing_evolves_outside_the_state_dict(cls):
    params = weights()
    optimizer = cls(params)
    assert optimizer.state_dict()["state"] == {}
    assert "smoothed_cosine" not in optimizer.param_groups[0]
    attributes = {k: copy.copy(v) for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    train(optimizer, params, 3)
    after = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    changed = {k for k in after if after[k] != attributes.get(k)}
    # torch's schedulers count calls. `_layout` is derived from the parameters and made anew when they change.
    assert changed <= {"_opt_called", "_step_count", "_layout"}, "nothing of ours may evolve there"


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
def test_group_added_in_mid_training_joins_the_running_cosine(cls, granularity):
    params = weights()
    optimizer = cls(params[:3], lr=0.01, granularity=granularity)
    train(optimizer, params[:3], 5)
    before = optimizer.dynamics()["damping"].item()
    optimizer.add_param_group({"params": params[3:], "weight_decay": 0.1})
    train(optimizer, params, 1)
    s = [group["smoothed_cosine"] for group in optimizer.param_groups]
    if granularity == "global":
        assert torch.equal(*s)
        assert abs(optimizer.dynamics()["damping"].item() - before) < 0.06  # one step moves d by at most (1-gamma)/2
    else:
        assert [len(x) for x in s] == [3, 3]
    assert all(optimizer.state[p] for p in params)


@pytest.mark.parametrize("cls", CLASSES)
def test_closure_is_called_under_grad_and_its_loss_returned(cls):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (w < 1).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_follows_a_learning_rate_scheduler(cls):
    params = weights()
    optimizer = cls(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t >= 3 else 1.0)
    for t in range(6):
        before = [p.detach().clone() for p in params]
        train(optimizer, params, 1, start=t)
        moved = any(not torch.equal(a, b) for a, b in zip(before, params, strict=True))
        assert moved == (t < 3)
        scheduler.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_step_without_any_gradient_does_nothing(cls):
    params = weights()
    optimizer = cls(params)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.dynamics() == {}


@pytest.mark.parametrize("cls", CLASSES)
def test_deepcopy_trains_on_its_own_parameters(cls):
    params = weights()
    optimizer = cls(params, lr=0.01)
    train(optimizer, params, 2)
    twin = copy.deepcopy(optimizer)
    train(twin, twin.param_groups[0]["params"], 2, start=2)
    train(optimizer, params, 2, start=2)
    assert all(torch.equal(a, b) for a, b in zip(params, twin.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_large_models_are_updated_in_several_buckets_with_the_same_result(cls, monkeypatch):
    _, whole = short_run(cls, dtype=torch.float64)
    monkeypatch.setattr("hf_momentum.optim.base._BUCKET_ELEMENTS", 30)
    monkeypatch.setattr("hf_momentum.kernels.sums._PIECE", 4)
    optimizer, pieced = short_run(cls, dtype=torch.float64)
    assert len(optimizer._collect()[0].buckets) > 2
    assert largest_difference(whole, pieced) < 1e-13


class HostReads(TorchDispatchMode):
    """Counts the operations by which a tensor's value reaches the host (and a GPU would have to wait)."""

    def __init__(self, allowed: Iterator[int] = ()):
        super().__init__()
        self.allowed, self.count = set(allowed), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        blocking = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if blocking and id(args[0]) not in self.allowed:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
def test_step_never_reads_a_value_back_to_the_host(cls, granularity):
    params = weights([(4, 4), (3,)], torch.float32)
    optimizer = cls(params, lr=0.01, granularity=granularity, weight_decay=0.1)
    with HostReads() as reads:
        for t in range(3):
            set_gradients(params, random(t, params, []))
            if t == 2:
                params[1].grad = None
            optimizer.step()
            optimizer.dynamics()
    assert reads.count == 0
    with HostReads() as reads:
        params[0].sum().item()
    assert reads.count == 1, "the counter must see a host read"


def test_bias_correction_counts_on_the_device():
    params = weights([(4, 4)], torch.float32)
    optimizer = AdaTAM(params, bias_correction=True)
    set_gradients(params, random(0, params, []))
    with HostReads() as reads:
        optimizer.step()
        optimizer.step()
    assert reads.count == 0
    assert optimizer.param_groups[0]["steps"].tolist() == [2.0]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_gradients_are_refused_by_a_clear_error(cls):
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = cls(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*parameter 0 of group 0.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_that_was_not_given_is_refused(cls):
    """DeepSpeed ZeRO swaps flat partitions into param_groups; a cosine over those would be silently wrong."""
    optimizer = cls(weights())
    flat = torch.nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"not given to it: a wrapper.*Supported: one process.*DDP"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"lr": "0.1"}, TypeError, r"lr must be a number in \[0, inf\), got '0.1'"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"gamma": 1.0}, ValueError, r"gamma must be a number in \[0, 1\), got 1.0"),
        ({"gamma": -0.1}, ValueError, "gamma must be"),
        ({"gamma": True}, TypeError, "gamma must be"),
        ({"eps": -1e-9}, ValueError, "eps must be"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"granularity": "layer"}, ValueError, "granularity must be one of 'global', 'tensor', got 'layer'"),
        ({"maximize": "False"}, TypeError, "maximize must be True or False, got 'False'"),
        ({"fixed_damping": 1.5}, ValueError, r"fixed_damping must be a number in \[0, 1\], got 1.5"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_validated_by_name_value_and_range(cls, kwargs, error, message):
    with pytest.raises(error, match=f"{cls.__name__}: {message}"):
        cls(weights(), **kwargs)
    with pytest.raises(error, match=message):
        cls([{"params": weights(), **kwargs}])


def test_arguments_of_one_class_only_are_validated_too():
    for betas in [(0.9,), 0.9, (1.0, 0.9), (0.9, -0.1), "0.9:0.99"]:
        with pytest.raises((TypeError, ValueError), match="betas"):
            AdaTAM(weights(), betas=betas)
    with pytest.raises(ValueError, match=r"momentum must be a number in \[0, 1\), got 1.0"):
        TAM(weights(), momentum=1.0)
    with pytest.raises(TypeError, match="ema must be True or False"):
        AdaTAMW(weights(), ema=1)
    with pytest.raises(ValueError, match="decoupled; for the coupled form use AdaTAM"):
        AdaTAMW([{"params": weights(), "decoupled_weight_decay": False}])


def test_one_s_for_the_model_needs_one_gamma_and_one_granularity():
    params = weights()
    with pytest.raises(ValueError, match="gamma must be the same in all groups"):
        TAM([{"params": params[:2]}, {"params": params[2:], "gamma": 0.95}])
    with pytest.raises(ValueError, match="granularity must be the same in all groups"):
        TAM([{"params": params[:2]}, {"params": params[2:], "granularity": "tensor"}])
    TAM([{"params": params[:2]}, {"params": params[2:], "gamma": 0.95}], granularity="tensor")


def test_a_pair_that_locks_in_warns():
    with pytest.warns(UserWarning, match=r"gamma=0.5 is below beta / \(2 - beta\) = 0.818"):
        TAM(weights(), gamma=0.5)


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="view_as_real"):
        TAM([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
