"""Scores are scikit-learn's and the definitions', and their intervals cover what they claim."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_momentum import InputError
from hf_momentum.evaluation import Estimate, causal_lm_statistics
from hf_momentum.evaluation import scores as module
from hf_momentum.evaluation.metrics import resampled_sums
from hf_momentum.evaluation.scores import (
    TASKS,
    by_group,
    classification_rows,
    gap,
    generation_rows,
    metric_names,
    paired,
    reliability,
    scorer,
    scores,
    values,
    worst_group,
)


def drawn(count: int, classes: int, seed: int, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; the labels are drawn from the logits' own probabilities where the sharpness is 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return sharpness * logits, labels


def error_by_definition(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error as it is written down: a loop over bins (low, high]."""
    total = 0.0
    for place in range(bins):
        inside = [i for i, c in enumerate(confidence) if place / bins < c <= (place + 1) / bins]
        if inside:
            total += len(inside) / len(right) * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
    return total


# ---- values ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 4.0]))
def test_classifiers_are_scored_as_scikit_learn_scores_them(count, classes, seed, sharpness):
    logits, labels = drawn(count, classes, seed, sharpness)
    rows = classification_rows(logits, labels).numpy()
    found = values(scorer("sequence_classification", classes), rows)
    predicted, probabilities = logits.argmax(-1).numpy(), logits.softmax(-1).numpy()
    right = (predicted == labels.numpy()).astype(float)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "loss": sklearn.metrics.log_loss(labels, probabilities, labels=range(classes)),
        "f1": sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0),
        "calibration_error": error_by_definition(probabilities.max(-1), right),
    }
    assert found == pytest.approx(expected, abs=1e-9)
    if classes == 2:
        made = scorer("image_classification", 2, metrics=["f1_binary"])
        binary = sklearn.metrics.f1_score(labels, predicted, zero_division=0)
        assert values(made, rows)["f1_binary"] == pytest.approx(binary, abs=1e-9)


def test_confidence_on_an_edge_is_in_the_bin_below():
    """A probability of exactly 1/2 of 2 bins is in the lower one, as (low, high] says."""
    rows = np.array([[0.7, 1, 1, 0.5, 0, 0], [0.7, 1, 0, 1.0, 0, 1], [0.7, 1, 1, 1.0, 0, 0]])
    assert [(each.confidence, each.accuracy, each.count) for each in reliability(rows, bins=2)] == [
        (0.5, 1.0, 1),
        (1.0, 0.5, 2),
    ]
    bins = reliability(rows)
    by_bins = sum(each.count / 3 * abs(each.accuracy - each.confidence) for each in bins)
    assert values(scorer("sequence_classification", 2), rows)["calibration_error"] == pytest.approx(by_bins)


def test_language_models_are_scored_over_tokens_and_not_over_texts():
    logits, labels = torch.randn(5, 9, 7), torch.randint(0, 7, (5, 9))
    labels[0, 2:] = -100
    rows = causal_lm_statistics(logits, labels).numpy()
    losses, right = [], []
    for row, targets in zip(logits.double(), labels.tolist(), strict=True):
        for place, target in enumerate(targets[1:]):
            if target != -100:
                losses.append(-row[place].log_softmax(-1)[target].item())
                right.append(row[place].argmax().item() == target)
    found = values(scorer("causal_lm", bytes_per_token=2.5), rows)
    loss = sum(losses) / len(losses)
    expected = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "token_accuracy": sum(right) / len(right),
        "bits_per_byte": loss / math.log(2) / 2.5,
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(losses) == 1 + 4 * 8


@pytest.mark.parametrize(
    ("prediction", "reference", "strict", "normalised"),
    [
        ("a", "a", 1, 1),
        ("a\n", " a", 1, 1),
        ("A.", "a", 0, 1),
        ("the  cat", "the cat", 0, 1),
        ("a b", "ab", 0, 0),
        ("", "a", 0, 0),
    ],
)
def test_exact_match_overlooks_only_what_it_says(prediction, reference, strict, normalised):
    assert generation_rows([prediction], [reference])[0, 1] == strict
    assert generation_rows([prediction], [reference], normalise=True)[0, 1] == normalised


def test_half_precision_logits_are_scored_in_double():
    logits, labels = torch.randn(20, 5).bfloat16(), torch.randint(0, 5, (20,))
    assert torch.equal(classification_rows(logits, labels), classification_rows(logits.double(), labels))


# ---- intervals -------------------------------------------------------------------------------------------------------

TRUTH_OF = scorer("sequence_classification", 3, metrics=["accuracy", "loss", "f1"])


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    return values(TRUTH_OF, classification_rows(*drawn(400_000, 3, seed=10**6)).numpy())


def coverage(truth: dict[str, float], trials: int) -> dict[str, float]:
    """How often the interval of a sample of 100 holds the truth."""
    covered = dict.fromkeys(truth, 0)
    for trial in range(trials):
        rows = classification_rows(*drawn(100, 3, seed=trial)).numpy()
        for name, estimate in scores(TRUTH_OF, rows, seed=trial).items():
            covered[name] += estimate.low <= truth[name] <= estimate.high
    return {name: count / trials for name, count in covered.items()}


def test_intervals_cover_the_truth_in_93_to_97_of_100_samples(truth):
    found = coverage(truth, trials=400)
    assert all(0.93 <= share <= 0.97 for share in found.values()), found


def without_replacement(columns: np.ndarray, seed: int) -> np.ndarray:
    return np.stack([np.random.default_rng(seed + i).permutation(columns).sum(0) for i in range(40)])


def each_counted_twice(columns: np.ndarray, seed: int) -> np.ndarray:
    return resampled_sums(np.repeat(columns, 2, axis=0), seed) / 2


def unrelated_columns(columns: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permuted(resampled_sums(columns, seed), axis=0)


@pytest.mark.parametrize("fault", [without_replacement, each_counted_twice, unrelated_columns])
def test_the_simulation_sees_a_wrong_resampling(fault, truth, monkeypatch):
    monkeypatch.setattr(module, "resampled_sums", fault)
    found = coverage(truth, trials=60)
    assert not all(0.93 <= share <= 0.97 for share in found.values()), found


def test_a_calibrated_model_is_not_called_miscalibrated_and_a_sharpened_one_is():
    """The percentiles of resampled calibration errors would miss 0 nearly always."""
    made = scorer("sequence_classification", 2, metrics=["calibration_error"])
    called = {1.0: 0, 3.0: 0}
    for sharpness in called:
        for trial in range(40):
            rows = classification_rows(*drawn(200, 2, trial, sharpness)).numpy()
            estimate = scores(made, rows, trial)["calibration_error"]
            assert 0 <= estimate.low <= estimate.value <= estimate.high
            called[sharpness] += estimate.excludes_zero
    assert called[1.0] <= 4 and called[3.0] >= 38


def test_a_pair_is_sharper_than_a_gap_and_both_find_the_difference():
    logits, labels = drawn(300, 3, seed=1)
    before, after = (classification_rows(k * logits, labels).numpy() for k in (0.5, 0.6))
    made = scorer("sequence_classification", 3, metrics=["loss"])
    change, apart = paired(made, before, after)["loss"], gap(made, before, after)["loss"]
    difference = values(made, after)["loss"] - values(made, before)["loss"]
    assert change.value == apart.value == pytest.approx(difference)
    assert change.excludes_zero and not apart.excludes_zero
    assert apart.high - apart.low > 5 * (change.high - change.low)


def test_a_gap_is_of_independent_samples():
    """Two samples with standard errors of 1/10 and 1/5: the gap's is the root of the sum of their squares."""
    generator = np.random.default_rng(0)
    rows = [np.stack([generator.normal(size=n), np.ones(n), np.ones(n)], axis=1) for n in (100, 25)]
    rows = [(each - each.mean(0)) / [each[:, 0].std(), 1, 1] + [0, 1, 1] for each in rows]
    found = gap(scorer("causal_lm", metrics=["loss"]), *rows)["loss"]
    assert found.value == pytest.approx(0, abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.hypot(0.1, 0.2), rel=0.1)


def test_the_order_of_examples_and_the_seed_are_all_that_chance_depends_on():
    rows = classification_rows(*drawn(50, 3, seed=0)).numpy()
    made = scorer("sequence_classification", 3)
    assert scores(made, rows, seed=1) == scores(made, rows, seed=1) != scores(made, rows, seed=2)


def test_groups_are_scored_alone_and_the_worst_is_by_the_metrics_direction():
    rows = classification_rows(*drawn(60, 3, seed=0)).numpy()
    groups = [["news", "books", "films"][i % 3] for i in range(60)]
    made = scorer("sequence_classification", 3)
    found = by_group(made, rows, groups)
    assert list(found) == ["books", "films", "news"]
    assert found["films"] == scores(made, rows[2::3])
    assert worst_group(found, "loss")[1].value == max(each["loss"].value for each in found.values())
    assert worst_group(found, "accuracy")[1].value == min(each["accuracy"].value for each in found.values())
    assert by_group(made, rows, [i % 2 for i in range(60)]).keys() == {"0", "1"}


# ---- what is refused -------------------------------------------------------------------------------------------------

ROWS = generation_rows(["a"] * 3, ["a"] * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scorer("causal"), r"unknown task 'causal' \(did you mean 'causal_lm'.*accepted: causal_lm, sequence"),
        (
            lambda: scorer("causal_lm", metrics=["perplexty"]),
            r"unknown metric 'perplexty' \(did you mean 'perplexity'\?\); causal_lm has loss, perplexity, token",
        ),
        (lambda: scorer("image_classification", 3, metrics=["f1_binary"]), "image_classification has accuracy, loss"),
        (lambda: scorer("generation", metrics=["accuracy"]), "generation has exact_match"),
        (lambda: scorer("causal_lm", metrics=[]), "metrics is empty; causal_lm has loss"),
        (lambda: scorer("causal_lm", metrics=["loss", "loss"]), "metrics holds a name twice: loss, loss"),
        (lambda: scorer("sequence_classification"), "classes must be at least 2 for sequence_classification, got 0"),
        (lambda: scores(scorer("generation"), ROWS[:0]), "there are no examples to score"),
        (lambda: paired(scorer("generation"), ROWS, ROWS[:2]), "3 examples before and 2 after cannot be paired"),
        (lambda: by_group(scorer("generation"), ROWS, ["a"]), "1 groups for 3 examples"),
        (lambda: worst_group({}, "loss"), "there is no group"),
        (lambda: generation_rows(["a"], []), "1 predictions for 0 references"),
    ],
)
def test_input_that_cannot_be_used_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_that_a_task_names_can_be_asked_for_alone_and_comes_first(task):
    rows = {
        "causal_lm": np.array([[2.0, 2.0, 1.0]] * 4),
        "generation": ROWS,
    }.get(task, classification_rows(*drawn(20, 2, seed=0)).numpy())
    for name in metric_names(task):
        made = scorer(task, classes=2, metrics=[name])
        assert made.main == name
        assert isinstance(scores(made, rows)[name], Estimate)
