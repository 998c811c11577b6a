"""Bloop and its baselines are the formulas of the papers, step by step, and have the properties that they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_momentum.errors import InputError
from hf_momentum.sharding import WholeGradients
from hf_momentum.surgery import Bloop, Settings, make_surgery, reference, survives, weights_of
from hf_momentum.surgery.combination import RULES, projection
from hf_momentum.surgery.noise import Noise, fitting_rho

SHAPES = [(7, 5), (11,), (), (3, 2, 4)]
NUMELS = [math.prod(shape) for shape in SHAPES]


def tensors(vector: np.ndarray, dtype: torch.dtype) -> list[torch.Tensor]:
    """A float64 vector over the whole model as its tensors."""
    parts = torch.from_numpy(vector).to(dtype).split(NUMELS)
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


class Model:
    """A few tensors whose losses are linear, so that each backward pass adds a given gradient."""

    def __init__(self, surgery: Settings, dtype: torch.dtype = torch.float64, optimizer=torch.optim.SGD, steps=10_000):
        self.dtype = dtype
        self.params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
        self.optimizer = optimizer(self.params, lr=0.1)
        self.gradients = WholeGradients(self.optimizer)
        self.surgery = make_surgery(self.optimizer, surgery, steps)

    def direction(self, gradients: list[np.ndarray]) -> np.ndarray:
        """d for one batch; objective 0 is the main one."""
        for param in self.params:
            param.grad = None
        for objective in self.surgery.sequence:
            parts = tensors(gradients[objective], self.dtype)
            loss = sum((param * part).sum() for param, part in zip(self.params, parts, strict=True))
            (self.surgery.weight(objective) * loss).backward()
            assert self.surgery.after(objective, self.gradients)
        d = torch.cat([param.grad.reshape(-1) for param in self.params])
        self.optimizer.step()
        return d.double().numpy()

    def average(self, name: str = "bloop_ema") -> np.ndarray:
        parts = [self.optimizer.state[param][name].reshape(-1) for param in self.params]
        return torch.cat(parts).double().numpy()


def stream(kind: str, objectives: int, steps: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Gradients of every objective at every step: unrelated, related, opposed, or of very different sizes."""
    rng, size = np.random.default_rng(seed), sum(NUMELS)
    common = rng.standard_normal(size)
    rows = []
    for _ in range(steps):
        own = [rng.standard_normal(size) for _ in range(objectives)]
        if kind == "related":
            own = [common + 0.5 * g for g in own]
        elif kind == "opposed":
            own = [(-1) ** k * common + 0.1 * g for k, g in enumerate(own)]
        elif kind == "sizes":
            own = [10.0 ** (2 * k - 2) * (common + g) for k, g in enumerate(own)]
        elif kind == "gaps":  # a main gradient, or an auxiliary one, is sometimes zero
            own = [g * (rng.random() > 0.3) for g in own]
        rows.append(own)
    return rows


def away(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))


@pytest.mark.parametrize("kind", ["unrelated", "related", "opposed", "sizes", "gaps"])
@pytest.mark.parametrize("auxiliaries", [1, 2, 3])
@pytest.mark.parametrize("intact", [False, True])
@pytest.mark.parametrize("order", ["paper", "ema_first"])
@pytest.mark.parametrize("init", ["zeros", "first_gradient"])
def test_bloop_is_the_reference(kind, auxiliaries, intact, order, init):
    lam = [0.7, 1.9, 0.3][:auxiliaries]
    arguments = {"rho": 0.1, "order": order, "init": init}
    model = Model(Settings(lam=tuple(lam), intact=intact, **arguments))
    truth = reference.BloopReference(lam, **arguments)
    for gradients in stream(kind, auxiliaries + 1, steps=60):
        wanted = truth.step(gradients[0], gradients[1:])
        assert away(model.direction(gradients), wanted) < 1e-9
    for j, e in enumerate(truth.e):
        assert away(model.average(f"bloop_ema_{j}" if j else "bloop_ema"), e) < 1e-9


def test_the_comparison_sees_a_slip_in_the_order():
    model, truth = Model(Settings(lam=(0.7,), rho=0.1)), reference.BloopReference([0.7], rho=0.1, order="ema_first")
    differences = []
    for gradients in stream("related", 2, steps=10):
        differences.append(away(model.direction(gradients), truth.step(gradients[0], gradients[1:])))
    assert max(differences) > 1e-3


@pytest.mark.parametrize("kind", ["unrelated", "related", "opposed", "sizes", "gaps"])
@pytest.mark.parametrize("auxiliaries", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_baseline_is_its_reference(name, kind, auxiliaries):
    lam = [0.7, 1.9, 0.3][:auxiliaries]
    model = Model(Settings(lam=tuple(lam), surgery=name))
    for gradients in stream(kind, auxiliaries + 1, steps=20):
        wanted = getattr(reference, name)(lam, gradients[0], gradients[1:])
        assert away(model.direction(gradients), wanted) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["paper", "ema_first"])
@pytest.mark.parametrize("intact", [False, True])
def test_short_dtypes_stay_near(dtype, order, intact):
    """The gradients that it gets are rounded to the dtype; the average is float32 whatever they are."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype]
    model = Model(Settings(lam=(0.7,), rho=0.1, order=order, intact=intact), dtype)
    truth = reference.BloopReference([0.7], rho=0.1, order=order)
    for gradients in stream("related", 2, steps=60):
        rounded = [torch.from_numpy(g).to(dtype).double().numpy() for g in gradients]
        assert away(model.direction(rounded), truth.step(rounded[0], rounded[1:])) < tolerance
    assert model.optimizer.state[model.params[0]]["bloop_ema"].dtype == torch.float32
    assert away(model.average(), truth.e[0]) < tolerance


def test_an_average_in_bfloat16_is_unbiased():
    """Rounded to nearest it would stand still: one step of rho = 0.001 is less than half of bfloat16's last place."""
    model = Model(Settings(lam=(0.5,), rho=0.001, dtype=torch.bfloat16), torch.float32)
    truth = reference.BloopReference([0.5], rho=0.001)
    for gradients in stream("related", 2, steps=600):
        model.direction(gradients)
        truth.step(gradients[0], gradients[1:])
    e, wanted = model.average(), truth.e[0]
    assert model.optimizer.state[model.params[0]]["bloop_ema"].dtype == torch.bfloat16
    assert (e @ wanted) / (np.linalg.norm(e) * np.linalg.norm(wanted)) > 0.99
    assert abs(np.linalg.norm(e) / np.linalg.norm(wanted) - 1) < 0.02


# ---- facts of the papers -------------------------------------------------------------------------------------------


def full_batch(gradients: list[np.ndarray], **arguments) -> np.ndarray:
    """d where every batch is the whole data: the second step of rho = 1, whose average is the main gradient."""
    model = Model(Settings(lam=(2.0,) * (len(gradients) - 1), rho=1.0, **arguments))
    model.direction(gradients)
    return model.direction(gradients)


def test_the_main_objective_keeps_its_progress():
    """<d, g_main> = |g_main|^2 in the full batch; for the mixture it is not."""
    main, auxiliary = stream("related", 2, steps=1)[0]
    assert full_batch([main, auxiliary]) @ main == pytest.approx(main @ main, rel=1e-12)
    assert full_batch([main, auxiliary], surgery="mixed") @ main != pytest.approx(main @ main, rel=0.1)


def test_an_auxiliary_loss_that_is_the_main_one_negated_changes_nothing():
    main = stream("unrelated", 1, steps=1)[0][0]
    assert away(full_batch([main, -main]), main) < 1e-12


@pytest.mark.parametrize("order", ["paper", "ema_first"])
def test_the_toy_of_the_paper(order):
    """L_main = a^2/2, L_aux = ((a - 1)^2 + b^2)/2: d = (a, lam b); the mixture ends at lam / (1 + lam), not at 0."""

    def end(surgery: str, lam: float) -> tuple[float, float]:
        w = torch.nn.Parameter(torch.tensor([3.0, 2.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.1)
        gradients = WholeGradients(optimizer)
        bloop = make_surgery(optimizer, Settings(lam=(lam,), rho=0.5, order=order, surgery=surgery), steps=400)
        for _ in range(400):
            w.grad = None
            for objective in bloop.sequence:
                loss = w[0] ** 2 / 2 if objective == 0 else ((w[0] - 1) ** 2 + w[1] ** 2) / 2
                (bloop.weight(objective) * loss).backward()
                bloop.after(objective, gradients)
            optimizer.step()
        return w[0].item(), w[1].item()

    lam = 0.5
    a, b = end("bloop", lam)
    assert abs(a) < 1e-8 and abs(b) < 1e-8
    a, b = end("mixed", lam)
    assert a == pytest.approx(lam / (1 + lam), rel=1e-6) and abs(b) < 1e-8


@pytest.mark.parametrize("intact", [False, True])
def test_several_auxiliaries_satisfy_the_gram_schmidt_identities(intact):
    """The part of each auxiliary gradient in d is orthogonal to the averages of all that come before it."""
    rows = stream("related", 4, steps=30)
    lam = (0.5, 1.0, 2.0)
    model = Model(Settings(lam=lam, rho=0.2, intact=intact))
    for gradients in rows[:-1]:
        model.direction(gradients)
    averages = [model.average(name) for name in model.surgery.names]
    main, *auxiliaries = rows[-1]
    rest = model.direction(rows[-1]) - main
    unit = [e / np.linalg.norm(e) for e in averages]
    assert abs(rest @ unit[0]) < 1e-9 * np.linalg.norm(rest)  # pi(g_1) + pi(g_2) + pi(g_3), all orthogonal to e_0
    lower = [2, 3]
    first = rest - sum(lam[k - 1] * reference.complement(auxiliaries[k - 1], averages[:k]) for k in lower)
    assert away(first, lam[0] * reference.complement(auxiliaries[0], averages[:1])) < 1e-9


def test_averages_that_repeat_each_other_do_no_harm():
    common = stream("unrelated", 1, steps=1)[0][0]
    model = Model(Settings(lam=(1.0, 1.0), rho=0.5))
    for _ in range(5):
        d = model.direction([common, common, common])
    assert away(d, common) < 1e-9


# ---- properties ----------------------------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)
vectors = st.lists(numbers, min_size=sum(NUMELS), max_size=sum(NUMELS)).map(np.array)


@given(vectors, vectors, vectors, st.floats(1e-30, 1e30))
@settings(max_examples=60, deadline=None)
def test_the_size_of_the_average_does_not_matter(first, main, auxiliary, size):
    def second(scale: float) -> np.ndarray:
        model = Model(Settings(lam=(1.0,), rho=1.0, guard=0.0))
        model.direction([first * scale, 0 * auxiliary])  # else the sum of the two would round a small first away
        return model.direction([main, auxiliary])

    wanted, found = second(1.0), second(size)
    assert np.abs(found - wanted).max() <= 1e-9 * max(np.abs(auxiliary).max() + np.abs(main).max(), 1e-300)


@given(vectors, st.sampled_from(["main", "auxiliary", "both"]), st.sampled_from(["paper", "ema_first"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_zeros_give_no_nan(vector, absent, order, intact):
    """At a zero average the projection is the identity."""
    main = np.zeros_like(vector) if absent != "auxiliary" else vector
    auxiliary = np.zeros_like(vector) if absent != "main" else vector
    model = Model(Settings(lam=(0.3,), order=order, intact=intact))
    for _ in range(2):
        d = model.direction([main, auxiliary])
        assert np.isfinite(d).all()
        if absent == "main":
            assert away(d, 0.3 * auxiliary) < 1e-12 or not vector.any()


@given(vectors, vectors)
@settings(max_examples=60, deadline=None)
def test_coefficients_of_a_projection_leave_an_orthogonal_rest(x, e):
    gram, products = torch.tensor([[e @ e]]), torch.tensor([e @ x])
    rest = x - float(projection(gram, products)[0]) * e
    assert abs(rest @ e) <= 1e-9 * max(np.linalg.norm(x) * np.linalg.norm(e), 1e-300)


# ---- a gradient that is not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_written_where_gradients_are_kept_apart(objective, value):
    model = Model(Settings(lam=(0.5,), rho=0.1, intact=True), torch.float32)
    rows = stream("related", 2, steps=4)
    for gradients in rows[:3]:
        model.direction(gradients)
    before = [model.optimizer.state[param]["bloop_ema"].clone() for param in model.params]
    state = model.surgery.state_dict()
    rows[3][objective][2] = value
    with pytest.raises(AssertionError):
        model.direction(rows[3])
    assert all(torch.equal(model.optimizer.state[p]["bloop_ema"], e) for p, e in zip(model.params, before, strict=True))
    assert model.surgery.state_dict() == state
    assert any(not torch.isfinite(param.grad).all() for param in model.params), "a loss scaler must see it"


@pytest.mark.parametrize("order", ["paper", "ema_first"])
def test_a_loss_scale_leaves_the_average_unscaled(order):
    """d is scaled, as whoever unscales it expects; the average and the noise ratio are not."""
    rows, scales = stream("related", 2, steps=40), [2.0**8, 2.0**12]
    arguments = {"lam": (0.5,), "rho": 0.1, "order": order, "intact": True}
    plain, scaled = Model(Settings(**arguments)), Model(Settings(**arguments))
    for number, gradients in enumerate(rows):
        scale = scales[number % 2]
        scaled.gradients = WholeGradients(scaled.optimizer, lambda scale=scale: scale)
        wanted = plain.direction(gradients)
        assert away(scaled.direction([scale * g for g in gradients]), scale * wanted) < 1e-9
    assert away(scaled.average(), plain.average()) < 1e-9
    assert scaled.surgery.noise() == pytest.approx(plain.surgery.noise(), rel=1e-9)


def test_a_bad_auxiliary_gradient_is_seen_before_the_average_is_lent_anything():
    model = Model(Settings(lam=(0.5,), rho=0.1), torch.float32)
    rows = stream("related", 2, steps=4)
    for gradients in rows[:3]:
        model.direction(gradients)
    before = [model.optimizer.state[param]["bloop_ema"].clone() for param in model.params]
    rows[3][1][2] = math.inf
    with pytest.raises(AssertionError):
        model.direction(rows[3])
    assert all(torch.equal(model.optimizer.state[p]["bloop_ema"], e) for p, e in zip(model.params, before, strict=True))


# ---- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16])
def test_a_run_continues_bit_for_bit(optimizer, dtype, average):
    arguments = {"lam": (0.5,), "rho": "auto", "dtype": average}
    rows = stream("related", 2, steps=24)
    torch.manual_seed(0)
    whole = Model(Settings(**arguments), dtype, optimizer)
    weights = [param.detach().clone() for param in whole.params]
    for gradients in rows:
        wanted = whole.direction(gradients)

    torch.manual_seed(0)
    first, second = Model(Settings(**arguments), dtype, optimizer), Model(Settings(**arguments), dtype, optimizer)
    assert all(torch.equal(param, start) for param, start in zip(first.params, weights, strict=True))
    for gradients in rows[:11]:
        first.direction(gradients)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.surgery.load_state_dict(first.surgery.state_dict())
    for gradients in rows[11:]:
        found = second.direction(gradients)
    assert np.array_equal(found, wanted)
    assert second.optimizer.state[second.params[0]]["bloop_ema"].dtype == average
    assert second.surgery.state_dict() == whole.surgery.state_dict()


def test_adams_first_step_finds_its_state_empty():
    """An average that were put there before would keep Adam from making its moments."""
    model = Model(Settings(lam=(0.5,)), torch.float32, torch.optim.Adam)
    gradients = stream("related", 2, steps=1)[0]
    model.direction(gradients)
    assert sorted(model.optimizer.state[model.params[0]]) == ["bloop_ema", "exp_avg", "exp_avg_sq", "step"]


def test_parameters_that_no_objective_reaches_keep_no_gradient():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], weight_decay=0.5)
    gradients, bloop = WholeGradients(optimizer), Bloop(optimizer, Settings(lam=(1.0,)), steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        for objective in bloop.sequence:
            (used.sum() * (objective + 1)).backward()
            bloop.after(objective, gradients)
        optimizer.step()
    assert unused.grad is None and torch.equal(unused, torch.ones(2)) and not optimizer.state[unused]


def test_an_auxiliary_loss_of_some_parameters_is_projected_over_the_whole_model():
    """Where only the main loss reaches, the projection still subtracts c e."""
    shared, own = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([shared, own], lr=0.1)
    gradients, bloop = WholeGradients(optimizer), Bloop(optimizer, Settings(lam=(1.0,), rho=1.0), steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        for objective in bloop.sequence:
            ((shared + own).sum() if objective == 0 else 4 * shared.sum()).backward()
            bloop.after(objective, gradients)
    assert shared.grad.item() == pytest.approx(1 + 4 - 2) and own.grad.item() == pytest.approx(1 - 2)


# ---- Adam's metric -------------------------------------------------------------------------------------------------


def test_in_adams_metric_the_preconditioned_step_is_orthogonal_to_the_average():
    rows = stream("related", 2, steps=20)
    scores = {}
    for metric in ("euclidean", "adam"):
        model = Model(Settings(lam=(1.0,), rho=0.1, metric=metric), optimizer=torch.optim.Adam)
        for gradients in rows[:-1]:
            model.direction(gradients)
        e = model.average()
        v = torch.cat([model.optimizer.state[param]["exp_avg_sq"].reshape(-1) for param in model.params]).numpy()
        main, _ = rows[-1]
        step = (model.direction(rows[-1]) - main) / (np.sqrt(v) + 1e-8)
        scores[metric] = abs(step @ e) / (np.linalg.norm(step) * np.linalg.norm(e))
    assert scores["adam"] < 1e-9 < 1e-3 < scores["euclidean"]


def test_adams_metric_wants_a_second_moment():
    model = Model(Settings(lam=(1.0,), metric="adam"), torch.float32)
    rows = stream("related", 2, steps=2)
    model.direction(rows[0])
    with pytest.raises(InputError, match="SGD keeps no second moment"):
        model.direction(rows[1])


# ---- noise ---------------------------------------------------------------------------------------------------------


def noisy(n: float, steps: int, seed: int = 0, objectives: int = 2) -> list[list[np.ndarray]]:
    """Main gradients of noise ratio n around a fixed mean."""
    rng, size = np.random.default_rng(seed), sum(NUMELS)
    mean = rng.standard_normal(size)
    scale = math.sqrt(n * (mean @ mean) / size)
    return [
        [mean + scale * rng.standard_normal(size), *(rng.standard_normal(size) for _ in range(objectives - 1))]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("n", [1.0, 10.0, 60.0])
@pytest.mark.parametrize("arguments", [{}, {"order": "ema_first"}, {"intact": True}, {"init": "first_gradient"}])
def test_the_noise_ratio_is_found(n, arguments):
    model = Model(Settings(lam=(0.5,), **arguments), torch.float32)
    assert math.isnan(model.surgery.noise()["noise_ratio"])
    for gradients in noisy(n, steps=800):
        model.direction(gradients)
    assert model.surgery.noise()["noise_ratio"] == pytest.approx(n, rel=0.35)


def test_what_survives_is_what_the_law_says():
    """The part of the auxiliary gradient along the mean main gradient that is left in d, simulated."""
    rng, size, n, rho = np.random.default_rng(1), 400, 100.0, 0.01
    mean = rng.standard_normal(size) / math.sqrt(size)
    truth, left = reference.BloopReference([1.0], rho=rho), []
    for step in range(3000):
        main = mean + math.sqrt(n / size) * rng.standard_normal(size)
        d = truth.step(main, [mean])
        if step > 500:
            left.append((d - main) @ mean)
    assert np.mean(left) == pytest.approx(survives(n, rho), abs=0.03)


def test_rho_auto_follows_the_noise():
    for n, low, high in ((0.5, 0.09, 0.1), (20.0, 0.006, 0.017)):
        model = Model(Settings(lam=(0.5,), rho="auto"), torch.float32, steps=100_000)
        for gradients in noisy(n, steps=600):
            model.direction(gradients)
        assert low <= model.surgery.noise()["rho"] <= high


def test_rho_auto_does_not_average_over_more_than_a_tenth_of_the_run():
    assert float(fitting_rho(torch.tensor(1e6), start=0.01, least=0.005, most=0.1)) == pytest.approx(0.005)


def test_noise_before_it_is_known_is_nan():
    noise = Noise().on(torch.device("cpu"), torch.float64)
    assert math.isnan(float(noise.ratio()))


# ---- the over-parameterised quadratic ------------------------------------------------------------------------------


def test_bloop_dominates_on_the_over_parameterised_quadratic():
    """The main loss has many minima, and its gradients are noisy. Bloop ends at the one nearest to the anchor.

    The others trade: where their auxiliary loss is as low, their main loss is a thousand times higher.
    """
    rng = np.random.default_rng(0)
    size, rank, steps = 20, 8, 300
    a = torch.from_numpy(rng.standard_normal((rank, size)) / math.sqrt(size))
    target, anchor = torch.from_numpy(rng.standard_normal(rank)), torch.from_numpy(rng.standard_normal(size))

    def losses(w: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return ((a @ w - target)[rows] ** 2).mean() * rank / 2, ((w - anchor) ** 2).sum() / 2

    def end(surgery: str, lam: float) -> tuple[float, float]:
        batches = np.random.default_rng(1)
        w = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=1.0)
        gradients = WholeGradients(optimizer)
        operation = make_surgery(optimizer, Settings(lam=(lam,), rho=0.01, surgery=surgery), steps)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.3 / (1 + lam) * (1 - step / steps)
            w.grad = None
            rows = batches.choice(rank, 2, replace=False).tolist()
            for objective in operation.sequence:
                (operation.weight(objective) * losses(w, rows)[objective]).backward()
                operation.after(objective, gradients)
            optimizer.step()
        main, auxiliary = losses(w.detach(), list(range(rank)))
        return float(main), float(auxiliary)

    nearest = anchor - torch.linalg.pinv(a) @ (a @ anchor - target)
    least = float(losses(nearest, list(range(rank)))[1])
    main, auxiliary = end("bloop", 0.3)
    assert main < 1e-6 and auxiliary < 1.001 * least
    for other in ("mixed", "dynamic_barrier", "pcgrad"):
        points = [end(other, lam) for lam in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
        assert any(theirs > main and further > auxiliary for theirs, further in points)
        assert all(theirs > 1000 * main for theirs, further in points if further <= 1.01 * auxiliary), (other, points)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": (-0.1,)}, "lam is -0.1"),
        ({"lam": (math.nan,)}, "lam is nan"),
        ({"rho": 0.0}, r"rho is 0.0; it must be in \(0, 1\]"),
        ({"rho": 1.5}, r"rho is 1.5"),
        ({"rho": "often"}, "rho is often"),
        ({"order": "last"}, "order is 'last'; accepted: paper, ema_first"),
        ({"init": "ones"}, "init is 'ones'"),
        ({"metric": "l1"}, "metric is 'l1'"),
        ({"surgery": "cagrad"}, "surgery is 'cagrad'; accepted: bloop, mixed"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_what_is_not_accepted_is_said(arguments, message):
    with pytest.raises(InputError, match=message):
        Settings(**{"lam": (0.1,), **arguments})


def test_an_auxiliary_without_weight_is_refused():
    with pytest.raises(InputError, match="lam holds 0"):
        Bloop(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), Settings(lam=(0.5, 0.0)), steps=1)


def test_weights_must_fit_the_auxiliaries():
    with pytest.raises(InputError, match="lam has 2 values for 3 auxiliaries"):
        weights_of([0.1, 0.2], ["a", "b", "c"])
