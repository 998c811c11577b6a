"""Scores are those of the definitions, intervals hold what another sample gives, and the model is left as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_momentum.diagnosis.attribution import Gradients, attribution, collect, compare
from hf_momentum.diagnosis.groups import layer_groups
from hf_momentum.diagnosis.untouched import untouched
from hf_momentum.sharding import WholeGradients

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(203, 6, generator=GENERATOR)
LABELS = torch.randint(3, (203,), generator=GENERATOR)


def network(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)


def gradients_of(model: nn.Module, rows: torch.Tensor, batch: int = 4, seed: int = 0) -> Gradients:
    groups = layer_groups(model)
    named = dict(model.named_parameters())
    tensors = [(named[name], number) for number, group in enumerate(groups) for name in group.weights]
    optimizer = torch.optim.SGD([tensor for tensor, _ in tensors], lr=0.0)
    dtype = next(model.parameters()).dtype

    def loss_of(batch):
        logits = model(INPUTS[batch].to(dtype))
        return functional.cross_entropy(logits, LABELS[batch], reduction="sum"), len(batch)

    with untouched(model, [tensor for tensor, _ in tensors]):
        return collect(
            rows.split(batch),
            loss_of,
            WholeGradients(optimizer),
            [group for _, group in tensors],
            len(groups),
            seed=seed,
        )


def sizes(model: nn.Module) -> list[int]:
    return [group.numel for group in layer_groups(model)]


def by_hand(model: nn.Module, rows: torch.Tensor) -> dict[str, list[float]]:
    """The scores from their definitions, in float64."""
    model = network(torch.float64)
    functional.cross_entropy(model(INPUTS[rows].double()), LABELS[rows]).backward()
    found = {"raw": [], "rms": [], "relative": [], "taylor": []}
    for layer in (model[0], model[2], model[4]):
        gradient = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
        weight = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
        found["raw"].append(gradient.norm().item())
        found["rms"].append(gradient.norm().item() / len(gradient) ** 0.5)
        found["relative"].append((gradient.norm() / weight.norm()).item())
        found["taylor"].append((weight * gradient).abs().sum().item())
    return found


@pytest.mark.parametrize("batch", [1, 4, 7, 203])
def test_the_scores_are_those_of_their_definitions_whatever_the_batches(batch):
    model = network()
    found = attribution(gradients_of(model, torch.arange(203), batch), sizes(model))
    for name, expected in by_hand(model, torch.arange(203)).items():
        assert [one.value for one in found.scores[name]] == pytest.approx(expected, rel=1e-5), name
    assert found.predictions == 203
    losses = functional.cross_entropy(network()(INPUTS), LABELS)
    assert found.loss == pytest.approx(losses.item(), rel=1e-5)


def test_the_contrast_is_the_ratio_of_the_raw_scores_of_two_samples():
    model = network()
    wrong, right = torch.arange(80), torch.arange(80, 203)
    found = compare(gradients_of(model, wrong), gradients_of(model, right), sizes(model))
    expected = np.array(by_hand(model, wrong)["raw"]) / np.array(by_hand(model, right)["raw"])
    assert [one.value for one in found.contrast] == pytest.approx(expected.tolist(), rel=1e-5)
    assert sum(found.first) == pytest.approx(1.0)
    assert found.values("contrast") == [one.value for one in found.contrast]


def test_the_sketches_keep_the_inner_products_of_the_stretches():
    """Against the gradients of the stretches themselves, which `collect` never has side by side."""
    model = network()
    found = gradients_of(model, torch.arange(203), batch=10)
    assert len(found.counts) == 21
    layers = (model[0], model[2], model[4])
    whole = [[], [], []]
    for rows in torch.arange(203).split(10):
        model.zero_grad()
        functional.cross_entropy(model(INPUTS[rows]), LABELS[rows], reduction="sum").backward()
        for layer, kept in zip(layers, whole, strict=True):
            kept.append(torch.cat([layer.weight.grad.flatten(), layer.bias.grad]))
    for kept, sketched in zip(whole, found.gram, strict=True):
        vectors = torch.stack(kept).double()
        gram = (vectors @ vectors.T).numpy()
        size = np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
        assert np.abs((sketched - gram) / size).max() < 5 / 1021**0.5
        assert np.abs((sketched - gram) / size).max() > 1e-9 or len(vectors[0]) < 1021


def test_memory_does_not_grow_with_the_sample_and_stretches_are_joined():
    model = network()
    found = gradients_of(model, torch.arange(203), batch=1)
    assert 32 <= len(found.counts) <= 64
    assert found.predictions == 203
    few = gradients_of(model, torch.arange(50), batch=1)
    assert len(few.counts) == 50
    # Joined or not, the whole is the same.
    assert found.gram.sum((1, 2)) == pytest.approx(gradients_of(model, torch.arange(203), batch=203).gram.sum((1, 2)))


def simulated(random_state: np.random.Generator, predictions: int, dimensions: int, signal: float) -> Gradients:
    """A sample of gradients signal + noise of unit length each, in one group whose Gram matrix is exact."""
    mean = np.zeros(dimensions)
    mean[0] = signal
    each = mean + random_state.normal(size=(predictions, dimensions)) / dimensions**0.5
    total = each.sum(0)
    weight = np.ones(dimensions)
    return Gradients(
        loss=1.0,
        counts=np.ones(predictions),
        squares=np.array([total @ total]),
        weights=np.array([weight @ weight]),
        products=np.array([np.abs(weight * total).sum()]),
        gram=(each @ each.T)[None],
        slopes=(each @ (np.sign(weight * total) * weight))[None],
    )


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.5])
def test_intervals_hold_the_mean_score_of_samples_of_that_size(signal):
    """Also where the gradient is all noise: there resampled norms all lie above the score."""
    state = np.random.default_rng(3)
    scores = [attribution(simulated(state, 40, 50, signal), [50]).scores for _ in range(300)]
    for name in ("raw", "taylor"):
        typical = np.exp(np.mean([np.log(one[name][0].value) for one in scores]))
        held = np.mean([one[name][0].low <= typical <= one[name][0].high for one in scores])
        assert held > 0.9, (name, held)
    wide = np.mean([one["raw"][0].high / one["raw"][0].low for one in scores])
    assert wide < 3, "an interval that holds everything would pass, too"


def test_the_noise_share_tells_a_gradient_of_chance_from_a_real_one():
    state = np.random.default_rng(4)
    by_chance = np.mean([attribution(simulated(state, 60, 200, 0.0), [200]).noise[0] for _ in range(30)])
    real = np.mean([attribution(simulated(state, 60, 200, 2.0), [200]).noise[0] for _ in range(30)])
    expected = 1 / (1 + 60 * 4)  # the variance of the mean, 1/60, beside the square of the signal
    assert by_chance > 0.9
    assert real == pytest.approx(expected, rel=0.1)


def test_the_first_group_is_not_certain_where_two_are_alike():
    state = np.random.default_rng(5)
    one, two = simulated(state, 40, 50, 0.5), simulated(state, 40, 50, 0.5)
    both = Gradients(
        1.0,
        one.counts,
        *(
            np.concatenate([getattr(one, f), getattr(two, f)])
            for f in ("squares", "weights", "products", "gram", "slopes")
        ),
    )
    alike = compare(both, None, [50, 50]).first
    assert 0.01 < alike[0] < 0.99
    far = simulated(state, 40, 50, 5.0)
    both = Gradients(
        1.0,
        one.counts,
        *(
            np.concatenate([getattr(one, f), getattr(far, f)])
            for f in ("squares", "weights", "products", "gram", "slopes")
        ),
    )
    assert compare(both, None, [50, 50]).first == [0.0, 1.0]


def test_a_group_that_no_loss_reaches_has_no_score():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss_of(rows):
        return functional.cross_entropy(model["used"](INPUTS[rows]), LABELS[rows], reduction="sum"), len(rows)

    with untouched(model, list(model.parameters())):
        found = collect(torch.arange(20).split(5), loss_of, WholeGradients(optimizer), [0, 0, 1, 1], 2)
    scores = compare(found, found, [21, 21])
    assert scores.errors.scores["raw"][1].value == 0
    assert scores.contrast[1].value == 0


def test_a_sample_without_predictions_is_refused():
    model = network()
    with pytest.raises(ValueError, match="at least one prediction"):
        gradients_of(model, torch.arange(0))


class Restless(nn.Module):
    """Changes a buffer in every forward pass, and has all that can be forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.out(self.drop(self.norm(x + 0 * torch.rand(1))))


def test_the_model_is_left_exactly_as_it_was():
    model = Restless()
    model.out.bias.requires_grad_(False)
    functional.cross_entropy(model(INPUTS), LABELS).backward()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), untouched(model, list(model.parameters())):
        functional.cross_entropy(model(INPUTS), LABELS).backward()
        random.random(), np.random.rand(), torch.rand(1)
        assert not model.norm.training
        assert model.calls == 2
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
