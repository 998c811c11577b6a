"""The metrics are modules of `evaluate` that need no network, and say what the same numbers say elsewhere."""

import os
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch

from hf_momentum import InputError
from hf_momentum.evaluation import modules
from hf_momentum.evaluation.scores import classification_rows, scorer, values

GENERATOR = np.random.default_rng(0)
LOGITS, LABELS = GENERATOR.normal(size=(50, 3)), GENERATOR.integers(0, 3, 50)
PREDICTED = LOGITS.argmax(1)
GROUPS = ["ab"[i % 2] for i in range(50)]


def loaded(name: str, tmp_path, **options):
    return modules.load(name, cache_dir=str(tmp_path), **options)


def in_batches(metric, **columns):
    for start in range(0, 50, 17):
        metric.add_batch(**{name: values[start : start + 17] for name, values in columns.items()})
    return metric


def test_classes_in_batches_give_scikit_learns_figures(tmp_path):
    columns = {"predictions": PREDICTED, "references": LABELS}
    assert in_batches(loaded("accuracy", tmp_path), **columns).compute() == pytest.approx(
        {"accuracy": sklearn.metrics.accuracy_score(LABELS, PREDICTED)}, abs=1e-12
    )
    assert in_batches(loaded("f1", tmp_path), **columns).compute() == pytest.approx(
        {"f1": sklearn.metrics.f1_score(LABELS, PREDICTED, average="macro")}, abs=1e-12
    )
    two = {"predictions": PREDICTED % 2, "references": LABELS % 2}
    assert in_batches(loaded("f1", tmp_path), **two).compute(average="binary") == pytest.approx(
        {"f1": sklearn.metrics.f1_score(LABELS % 2, PREDICTED % 2)}, abs=1e-12
    )
    by_group = {
        name: sklearn.metrics.accuracy_score(LABELS[i::2], PREDICTED[i::2]) for i, name in enumerate(("a", "b"))
    }
    found = in_batches(loaded("worst_group", tmp_path), **columns, groups=GROUPS).compute()
    assert found["worst_group_accuracy"] == pytest.approx(min(by_group.values()), abs=1e-12)
    assert by_group[found["group"]] == min(by_group.values())


def test_logits_in_batches_give_the_calibration_error_of_the_scores(tmp_path):
    found = in_batches(loaded("calibration_error", tmp_path), predictions=LOGITS, references=LABELS).compute()
    rows = classification_rows(torch.tensor(LOGITS), torch.tensor(LABELS)).numpy()
    expected = values(scorer("sequence_classification", 3, metrics=["calibration_error"]), rows)
    assert found == pytest.approx(expected, abs=1e-12) and found["calibration_error"] > 0.01


def test_tokens_and_texts(tmp_path):
    tokens = loaded("token_accuracy", tmp_path)
    tokens.add_batch(predictions=[[1, 2], [3]], references=[[1, 9], [3]])
    tokens.add_batch(predictions=[[4, 4, 4]], references=[[4, -100, -100]])
    assert tokens.compute() == {"token_accuracy": 3 / 4}
    found = loaded("perplexity", tmp_path).compute(predictions=[4.0, 8.0], references=[2, 10])
    assert found == pytest.approx({"perplexity": np.e, "loss": 1.0}), "over tokens, and not the mean over texts"
    texts = {"predictions": ["Yes.", "no "], "references": ["yes", "no"]}
    assert loaded("exact_match", tmp_path).compute(**texts) == {"exact_match": 0.5}
    assert loaded("exact_match", tmp_path).compute(**texts, normalise=True) == {"exact_match": 1.0}


def test_evaluate_loads_each_file_without_network_or_cache_and_two_processes_share_one_metric(tmp_path):
    """What is no mean over examples is computed of all that both collected, by the first of them."""
    code = (
        "import sys, evaluate; from hf_momentum.evaluation import modules\n"
        "print([type(evaluate.load(modules.path(name))).__name__ for name in modules.MODULES])\n"
        "pair = dict(cache_dir=sys.argv[1], num_process=2, process_id=1, experiment_id='pair')\n"
        "metric = evaluate.load(modules.path('f1'), **pair)\n"
        "print('ready', flush=True); metric.add_batch(predictions=[2, 2], references=[2, 0]); print(metric.compute())\n"
    )
    fresh = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    second = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, **fresh},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stdout.readline() == f"{list(modules.MODULES.values())}\n"
    assert second.stdout.readline() == "ready\n"
    first = loaded("f1", tmp_path, num_process=2, process_id=0, experiment_id="pair")
    first.add_batch(predictions=[0, 1], references=[0, 1])
    expected = sklearn.metrics.f1_score([0, 1, 2, 0], [0, 1, 2, 2], average="macro")
    assert first.compute() == pytest.approx({"f1": expected})
    assert second.communicate(timeout=100)[0] == "None\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda load: load("calibration"),
            r"unknown metric 'calibration' \(did you mean 'calibration_e.*accepted",
        ),
        (lambda load: load("f1").compute(predictions=[0], references=[0], average="micro"), "macro or binary, got 'mi"),
        (lambda load: load("f1").compute(predictions=[2], references=[0], average="binary"), "there is a class 2"),
        (lambda load: load("accuracy").compute(predictions=[0], references=[-1]), "classes count from 0, got -1"),
        (
            lambda load: load("token_accuracy").compute(predictions=[[1, 2]], references=[[1]]),
            "2 predicted tokens for 1 references",
        ),
    ],
)
def test_input_that_cannot_be_used_is_one_line(call, message):
    with pytest.raises(InputError, match=message):
        call(lambda name: modules.load(name, keep_in_memory=True))
