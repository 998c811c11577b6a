"""Metrics are the textbook's, intervals cover what they claim, and reports say what the numbers say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_momentum.evaluation import (
    Estimate,
    Report,
    SplitResult,
    causal_lm_statistics,
    changes,
    classification_statistics,
    estimates,
    metrics_of,
)


def test_causal_lm_statistics_equal_a_loop_over_tokens():
    logits, labels = torch.randn(4, 9, 7), torch.randint(0, 7, (4, 9))
    labels[0, 3:] = -100
    expected = []
    for row, targets in zip(logits, labels, strict=True):
        losses, right, count = 0.0, 0, 0
        for position in range(8):
            target = int(targets[position + 1])
            if target != -100:
                probabilities = row[position].double().softmax(-1)
                losses -= math.log(probabilities[target])
                right += int(probabilities.argmax()) == target
                count += 1
        expected.append([losses, count, right])
    assert torch.allclose(causal_lm_statistics(logits, labels), torch.tensor(expected).double(), rtol=1e-5)


def test_half_precision_logits_are_measured_in_float32():
    logits, labels = torch.randn(2, 5, 50).bfloat16(), torch.randint(0, 50, (2, 5))
    assert torch.equal(causal_lm_statistics(logits, labels), causal_lm_statistics(logits.float(), labels))


def test_classification_accuracy_and_loss():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    sums = classification_statistics(logits, labels).sum(0).numpy()
    metrics = metrics_of("sequence_classification", 1.0)
    assert metrics["accuracy"](sums) == pytest.approx(2 / 3)
    assert metrics["loss"](sums) == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """Twice as many tokens of half the loss each is the same text, as well predicted."""
    coarse = metrics_of("causal_lm", bytes_per_token=4.0)["bits_per_byte"](np.array([100.0, 50.0, 0.0]))
    fine = metrics_of("causal_lm", bytes_per_token=2.0)["bits_per_byte"](np.array([100.0, 100.0, 0.0]))
    assert coarse == pytest.approx(fine)


def test_intervals_cover_the_true_value_about_95_times_in_100():
    generator = np.random.default_rng(0)
    metrics = {"accuracy": metrics_of("sequence_classification", 1.0)["accuracy"]}
    covered = 0
    for trial in range(300):
        right = generator.random(200) < 0.7
        statistics = np.stack([np.zeros(200), np.ones(200), right], axis=1)
        estimate = estimates(statistics, metrics, seed=trial)["accuracy"]
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.98


def test_paired_changes_are_sharper_than_unpaired_and_see_no_difference_where_there_is_none():
    generator = np.random.default_rng(0)
    before = np.stack([generator.gamma(2.0, size=300), np.ones(300), np.zeros(300)], axis=1)
    after = before - [0.05, 0, 0] + generator.normal(0, 0.01, (300, 1)) * [1, 0, 0]
    loss = {"loss": metrics_of("causal_lm", 1.0)["loss"]}
    assert changes(before, after, loss)["loss"].excludes_zero
    spread = estimates(before, loss)["loss"]
    assert spread.high - spread.low > 0.1, "either interval alone is wider than the change"
    assert not changes(before, before[::-1].copy(), loss)["loss"].excludes_zero
    with pytest.raises(ValueError, match="not of the same examples"):
        changes(before, before[:10], loss)


def result(name, role, change, metric="loss"):
    figures = {metric: Estimate(2.0, 1.9, 2.1), "accuracy": Estimate(0.5, 0.4, 0.6)}
    return SplitResult(name, role, "source", 10, figures, figures, {metric: change})


FELL, ROSE, UNCLEAR = Estimate(-0.2, -0.3, -0.1), Estimate(0.2, 0.1, 0.3), Estimate(0.1, -0.1, 0.3)


@pytest.mark.parametrize(
    ("role", "metric", "change", "sentence"),
    [
        ("in distribution", "loss", FELL, "loss fell by 0.200 [0.100, 0.300] nats per byte, an improvement."),
        ("must not forget", "loss", ROSE, "loss rose by 0.200 [0.100, 0.300] nats per byte, forgetting."),
        ("shifted", "loss", ROSE, "loss rose by 0.200 [0.100, 0.300] nats per byte, a deterioration."),
        ("shifted", "accuracy", ROSE, "accuracy rose by 0.200 [0.100, 0.300], an improvement."),
        ("shifted", "accuracy", FELL, "accuracy fell by 0.200 [0.100, 0.300], a deterioration."),
        ("shifted", "loss", UNCLEAR, "shows no significant difference: 0.100 [-0.100, 0.300] nats per byte."),
    ],
)
def test_sentences_follow_from_the_interval_and_the_metric(role, metric, change, sentence):
    split = result("split", role, change, metric)
    assert Report("t", "byte", [split], [], {}, "", "").sentences()[0].endswith(sentence)


def test_report_is_written_whole_with_the_pictures_it_has_data_for(tmp_path: Path):
    history = [{"step": s, "loss": 1 / s, "cosine": 0.1, "damping": 0.5} for s in range(1, 5)]
    history.append({"step": 4, "eval_loss": 0.5})
    report = Report(
        "t", "token", [result("a", "shifted", Estimate(0, 0, 0))], history, {"seed": 0}, "optim: tam", "run"
    )
    path = report.write(tmp_path)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["dynamics.png", "loss.png", "splits.png"]
    assert json.loads((tmp_path / "report.json").read_text())["facts"] == {"seed": 0}
    assert path.read_text().splitlines()[0] == "# t"
    assert not list(tmp_path.glob("*.partial"))
    bare = Report("t", "token", [], [], {}, "", "")
    bare.write(tmp_path / "bare")
    assert list((tmp_path / "bare" / "plots").iterdir()) == []
