"""Metrics as functions of summed columns, so that one resampling of the examples gives every metric its interval.

A model's outputs become one row of numbers for each example. A `Scorer` turns rows into columns that may be added up
over examples, and says how every metric follows from the sums: also those that are no mean over examples, such as F1
and the calibration error. Drawing examples again is then one product of counts and columns, whatever the metric.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_momentum.errors import InputError, nearest
from hf_momentum.evaluation.metrics import Estimate, estimate_of, metrics_of, resampled_sums
from hf_momentum.evaluation.results import ReliabilityBin

TASKS = ("causal_lm", "sequence_classification", "image_classification", "generation")
LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte", "calibration_error", "chosen_loss"}
BINS = 15

Metric = Callable[[np.ndarray], np.ndarray]  # sums [..., columns] -> [...]

# Columns of the rows of a classifier.
_NLL, _ONE, _RIGHT, _CONFIDENCE, _PREDICTED, _LABEL = range(6)

_CALIBRATION = "calibration_error"
_BY_BIN = slice(3, 3 + BINS)  # where a classifier's columns hold confidence less right

_ACCEPTED = {
    "causal_lm": ("loss", "perplexity", "token_accuracy", "bits_per_byte"),
    "sequence_classification": ("accuracy", "loss", "f1", "calibration_error", "f1_binary"),
    "image_classification": ("accuracy", "loss", "f1", "calibration_error", "f1_binary"),
    "generation": ("exact_match",),
    "chat": ("loss", "perplexity", "token_accuracy"),
    "preference": ("accuracy", "margin", "chosen_loss"),
}


# ---- one row for each example ----------------------------------------------------------------------------------------


def classification_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per example: negative log-likelihood (nats), one, right or not, confidence, predicted class, label.

    Args:
        logits: `[batch, classes]`; log-probabilities are such too.
        labels: `[batch]`, from 0.

    Returns:
        `[batch, 6]` in float64. The confidence is the largest probability.

    Example:
        >>> classification_rows(torch.tensor([[0.0, 0.0, -1e9]]), torch.tensor([1]))
        tensor([[0.6931, 1.0000, 0.0000, 0.5000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    logs = logits.double().log_softmax(-1)
    labels = labels.long()
    largest, predicted = logs.max(-1)
    losses = -logs.gather(-1, labels[:, None])[:, 0]
    right = (predicted == labels).double()
    return torch.stack(
        [losses, torch.ones_like(losses), right, largest.exp(), predicted.double(), labels.double()], dim=1
    )


def predicted_rows(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows of a classifier of which only the predicted classes are known; what needs more than them is NaN.

    Raises:
        InputError: a class below 0, or not as many predictions as labels.

    Example:
        >>> predicted_rows(np.array([1, 0]), np.array([1, 1]))
        array([[nan,  1.,  1., nan,  1.,  1.],
               [nan,  1.,  0., nan,  0.,  1.]])
    """
    if predicted.shape != labels.shape:
        raise InputError(f"{len(predicted)} predictions for {len(labels)} labels; give one for each")
    if min(predicted.min(initial=0), labels.min(initial=0)) < 0:
        raise InputError(f"classes count from 0, got {min(predicted.min(), labels.min())}")
    one, unknown = np.ones(len(labels)), np.full(len(labels), np.nan)
    return np.stack([unknown, one, predicted == labels, unknown, predicted, labels], axis=1)


def generation_rows(predictions: Sequence[str], references: Sequence[str], normalise: bool = False) -> np.ndarray:
    """Per example: one, and whether the text is the reference.

    Args:
        predictions, references: texts; white space around them never counts.
        normalise: also overlook case, ASCII punctuation, and how much white space parts the words.

    Returns:
        `[examples, 2]`.

    Raises:
        InputError: there are not as many predictions as references.

    Example:
        >>> generation_rows(["Paris. "], ["paris"]), generation_rows(["Paris. "], ["paris"], normalise=True)
        (array([[1., 0.]]), array([[1., 1.]]))
    """
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references; give one for each")
    plain = _normalised if normalise else str.strip
    right = [
        plain(prediction) == plain(reference) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return np.stack([np.ones(len(right)), np.array(right, dtype=np.float64)], axis=1)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().translate(_NO_PUNCTUATION).split())


# ---- metrics of sums -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """How rows of a task become metrics.

    Attributes:
        task: one of `TASKS`, or "chat" or "preference".
        columns: rows `[examples, ...]` as columns `[examples, k]` that may be added up over examples.
        metrics: each metric as a function of sums `[..., k]`; the first is the main one.
    """

    task: str
    columns: Callable[[np.ndarray], np.ndarray]
    metrics: Mapping[str, Metric]

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.metrics))


def metric_names(task: str, classes: int = 2) -> tuple[str, ...]:
    """The metrics that a task accepts, the main one first.

    Raises:
        InputError: no such task.

    Example:
        >>> metric_names("causal_lm"), metric_names("image_classification", classes=10)
        (('loss', 'perplexity', 'token_accuracy', 'bits_per_byte'), ('accuracy', 'loss', 'f1', 'calibration_error'))
    """
    if task not in _ACCEPTED:
        raise InputError(f"unknown task {task!r}{nearest(task, _ACCEPTED)}; accepted: {', '.join(_ACCEPTED)}")
    return tuple(name for name in _ACCEPTED[task] if name != "f1_binary" or classes == 2)


def scorer(task: str, classes: int = 0, bytes_per_token: float = 1.0, metrics: Sequence[str] | None = None) -> Scorer:
    """The metrics of a task.

    Args:
        task: "causal_lm" (rows of `causal_lm_statistics`), "sequence_classification" or "image_classification" (rows
            of `classification_rows`), "generation" (rows of `generation_rows`), "chat" (rows of `causal_lm_statistics`
            over answers) or "preference" (rows of `preference_statistics`).
        classes: of a classifier; at least 2.
        bytes_per_token: UTF-8 bytes of text per token, for `bits_per_byte`.
        metrics: names, the main one first; all of the task without, but `f1_binary`.

    The metrics: `loss` in nats per token or example, `perplexity` its exponential, `bits_per_byte` the loss in bits
    over `bytes_per_token`, `token_accuracy` and `accuracy` shares that are right. `f1` is the mean over the classes
    that occur (as label or as prediction) of 2 TP / (2 TP + FP + FN), and `f1_binary` that of class 1 of 2.
    `calibration_error` is the expected calibration error (Guo et al., 2017): over 15 bins of equal width, the absolute
    difference of accuracy and mean confidence, weighted by the bin's share of the examples.

    Raises:
        InputError: an unknown task or metric, a metric given twice, or fewer than 2 classes for a classifier.

    Example:
        >>> made = scorer("sequence_classification", classes=2, metrics=["accuracy", "f1_binary"])
        >>> rows = np.array([[0.1, 1, 1, 0.9, 1, 1], [0.9, 1, 0, 0.6, 1, 0]])
        >>> {name: round(float(f(made.columns(rows).sum(0))), 3) for name, f in made.metrics.items()}
        {'accuracy': 0.5, 'f1_binary': 0.667}
    """
    accepted = metric_names(task, classes)
    classifies = task.endswith("classification")
    if classifies and classes < 2:
        raise InputError(f"classes must be at least 2 for {task}, got {classes}")
    names = [name for name in accepted if name != "f1_binary"] if metrics is None else list(metrics)
    if not names:
        raise InputError(f"metrics is empty; {task} has {', '.join(accepted)}")
    for name in names:
        if name not in accepted:
            raise InputError(f"unknown metric {name!r}{nearest(name, accepted)}; {task} has {', '.join(accepted)}")
    if len(set(names)) < len(names):
        raise InputError(f"metrics holds a name twice: {', '.join(names)}")
    if classifies:
        return _classifier(task, classes, names)
    if task == "generation":
        return Scorer(task, lambda rows: rows, {"exact_match": lambda sums: sums[..., 1] / sums[..., 0]})
    if task == "preference":
        of_pairs = metrics_of(task, 1.0)
        return Scorer(task, lambda rows: rows, {name: of_pairs[name] for name in names})
    made: dict[str, Metric] = {
        "loss": _loss,
        "perplexity": lambda sums: np.exp(_loss(sums)),
        "token_accuracy": _accuracy,
        "bits_per_byte": lambda sums: _loss(sums) / np.log(2) / bytes_per_token,
    }
    return Scorer(task, lambda rows: rows, {name: made[name] for name in names})


def _loss(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _accuracy(sums: np.ndarray) -> np.ndarray:
    return sums[..., 2] / sums[..., 1]


def _classifier(task: str, classes: int, names: Sequence[str]) -> Scorer:
    """Columns: the first three of a row; by bin, confidence less right; by class, twice right and predicted + label."""
    hits, seen = slice(_BY_BIN.stop, _BY_BIN.stop + classes), slice(_BY_BIN.stop + classes, _BY_BIN.stop + 2 * classes)
    by_class = bool({"f1", "f1_binary"} & set(names))  # not where nobody asks: they are many, with many classes

    def columns(rows: np.ndarray) -> np.ndarray:
        made = np.zeros((len(rows), seen.stop if by_class else _BY_BIN.stop))
        each = np.arange(len(rows))
        made[:, :3] = rows[:, :3]
        made[each, _BY_BIN.start + bin_of(rows[:, _CONFIDENCE])] = rows[:, _CONFIDENCE] - rows[:, _RIGHT]
        if by_class:
            predicted, labels = rows[:, _PREDICTED].astype(int), rows[:, _LABEL].astype(int)
            made[each, hits.start + labels] = 2 * rows[:, _RIGHT]
            made[each, seen.start + labels] += 1
            made[each, seen.start + predicted] += 1
        return made

    def f1_of_classes(sums: np.ndarray) -> np.ndarray:
        return sums[..., hits] / np.maximum(sums[..., seen], 1)

    made: dict[str, Metric] = {
        "accuracy": _accuracy,
        "loss": _loss,
        "f1": lambda sums: f1_of_classes(sums).sum(-1) / (sums[..., seen] > 0).sum(-1),
        "calibration_error": lambda sums: np.abs(sums[..., _BY_BIN]).sum(-1) / sums[..., 1],
        "f1_binary": lambda sums: f1_of_classes(sums)[..., 1],
    }
    return Scorer(task, columns, {name: made[name] for name in names})


def bin_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each confidence: from 0, of equal width over [0, 1], an edge belonging to the bin below it.

    Example:
        >>> bin_of(np.array([0.0, 0.5, 0.51, 1.0]), bins=2)
        array([0, 0, 1, 1])
    """
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)


# ---- scores of rows --------------------------------------------------------------------------------------------------


def values(scorer: Scorer, rows: np.ndarray) -> dict[str, float]:
    """Each metric without an interval.

    Raises:
        InputError: there is no row.

    Example:
        >>> values(scorer("generation"), generation_rows(["a", "b"], ["a", "c"]))
        {'exact_match': 0.5}
    """
    sums = _columns(scorer, rows).sum(0)
    return {name: float(metric(sums)) for name, metric in scorer.metrics.items()}


def scores(scorer: Scorer, rows: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """Each metric with its 95 % bootstrap interval over the examples.

    The calibration error is a sum of absolute values and so too high by chance, the more the fewer the examples. Its
    interval takes that into account (0 is in it where a calibrated model would often show as much); in simulations it
    held the true value in 87 to 98 % of the cases, and that of a gap to a well calibrated split in 70 to 84 %.

    Raises:
        InputError: there is no row.

    Example:
        >>> rows = generation_rows(["a"] * 40, ["a", "b"] * 20)
        >>> str(scores(scorer("generation"), rows)["exact_match"])
        '0.500 [0.350, 0.650]'
    """
    total, resampled = _sums(scorer, rows, seed)
    found = {name: estimate_of(metric(total), metric(resampled)) for name, metric in scorer.metrics.items()}
    if _CALIBRATION in found:
        found[_CALIBRATION] = _calibration(scorer.metrics[_CALIBRATION], total, resampled)
    return found


def paired(scorer: Scorer, before: np.ndarray, after: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """After minus before for each metric, over the same examples in the same order.

    Raises:
        InputError: there is no row, or not as many before as after.

    Example:
        >>> before, after = generation_rows(["a"] * 40, ["a", "b"] * 20), generation_rows(["a"] * 40, ["a"] * 40)
        >>> str(paired(scorer("generation"), before, after)["exact_match"])
        '0.500 [0.350, 0.650]'
    """
    if len(before) != len(after):
        raise InputError(f"{len(before)} examples before and {len(after)} after cannot be paired; use the same ones")
    return _changes(scorer, _sums(scorer, before, seed), _sums(scorer, after, seed))


def gap(scorer: Scorer, reference: np.ndarray, rows: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """Each metric of `rows` less that of `reference`, which holds other examples: both are drawn again on their own.

    Raises:
        InputError: one of them has no row.

    Example:
        >>> inside, shifted = generation_rows(["a"] * 40, ["a"] * 40), generation_rows(["a"] * 40, ["a", "b"] * 20)
        >>> str(gap(scorer("generation"), inside, shifted)["exact_match"])
        '-0.500 [-0.650, -0.350]'
    """
    return _changes(scorer, _sums(scorer, reference, seed), _sums(scorer, rows, seed + 1))


def by_group(scorer: Scorer, rows: np.ndarray, groups: Sequence[Any], seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """The scores of each group of examples, by its name in the order of the names.

    Args:
        groups: what group each row is of; anything that has a name as text.

    Raises:
        InputError: there is no row, or not one group for each row.

    Example:
        >>> rows = generation_rows(["a"] * 4, ["a", "a", "b", "b"])
        >>> [(name, each["exact_match"].value) for name, each in
        ...  by_group(scorer("generation"), rows, ["x", "x", "y", "y"]).items()]
        [('x', 1.0), ('y', 0.0)]
    """
    if len(groups) != len(rows):
        raise InputError(f"{len(groups)} groups for {len(rows)} examples; give one for each")
    names = np.array([str(group) for group in groups])
    return {str(name): scores(scorer, rows[names == name], seed) for name in np.unique(names)}


def worst_group(groups: Mapping[str, Mapping[str, Estimate]], metric: str) -> tuple[str, Estimate]:
    """The group with the worst value of a metric: the largest of `LOWER_IS_BETTER`, else the smallest.

    Its interval is that of this group alone. That it was chosen as the worst is not in it: among many small groups the
    worst is worse than it would be in another sample.

    Raises:
        InputError: there is no group.

    Example:
        >>> worst_group({"x": {"loss": Estimate(1, 0, 2)}, "y": {"loss": Estimate(3, 2, 4)}}, "loss")[0]
        'y'
    """
    if not groups:
        raise InputError("there is no group to find the worst of")
    choose = max if metric in LOWER_IS_BETTER else min
    name = choose(groups, key=lambda group: groups[group][metric].value)
    return name, groups[name][metric]


def reliability(rows: np.ndarray, bins: int = BINS) -> list[ReliabilityBin]:
    """Rows of a classifier by confidence: what it says against how often it is right; bins without examples left out.

    Example:
        >>> reliability(np.array([[0.1, 1, 1, 0.9, 1, 1], [0.9, 1, 0, 0.7, 1, 0]]), bins=2)
        [ReliabilityBin(confidence=0.8, accuracy=0.5, count=2)]
    """
    places = bin_of(rows[:, _CONFIDENCE], bins)
    return [
        ReliabilityBin(float(inside[:, _CONFIDENCE].mean()), float(inside[:, _RIGHT].mean()), len(inside))
        for inside in (rows[places == place] for place in np.unique(places))
    ]


# ---- intervals -------------------------------------------------------------------------------------------------------


def _columns(scorer: Scorer, rows: np.ndarray) -> np.ndarray:
    if len(rows) == 0:
        raise InputError("there are no examples to score")
    return scorer.columns(np.asarray(rows, dtype=np.float64))


def _sums(scorer: Scorer, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums over all examples, `[columns]`, and over examples drawn again, `[resamples, columns]`."""
    columns = _columns(scorer, rows)
    return columns.sum(0), resampled_sums(columns, seed)


def _changes(
    scorer: Scorer, before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> dict[str, Estimate]:
    found = {}
    for name, metric in scorer.metrics.items():
        value, resampled = metric(after[0]) - metric(before[0]), metric(after[1]) - metric(before[1])
        found[name] = (_reflected if name == _CALIBRATION else estimate_of)(value, resampled)
    return found


def _reflected(value: np.ndarray, resampled: np.ndarray) -> Estimate:
    """What resampling adds to the value is taken from it.

    The calibration error is a sum of absolute values, so chance can only raise it. A resample has the chance of the
    sample and its own besides and is higher again, and the middle of the resampled values would miss the true one.
    """
    percentiles = estimate_of(value, resampled)
    return Estimate(
        percentiles.value, 2 * percentiles.value - percentiles.high, 2 * percentiles.value - percentiles.low
    )


def _calibration(metric: Metric, total: np.ndarray, resampled: np.ndarray) -> Estimate:
    """Reflected, around the value, and down to 0 where a perfectly calibrated model would often show as much."""
    found = _reflected(metric(total), metric(resampled))
    chance = resampled.copy()
    chance[:, _BY_BIN] -= total[_BY_BIN]  # the same scatter around no error at all
    by_chance = found.value <= np.quantile(metric(chance), 0.975)
    return Estimate(found.value, 0.0 if by_chance else max(found.low, 0.0), max(found.high, found.value))
