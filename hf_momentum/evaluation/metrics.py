"""Per-example statistics of a model's outputs, and the metrics they sum to, with bootstrap intervals over examples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Statistics = np.ndarray  # [examples, columns] of one split

_RESAMPLES = 1000


def causal_lm_statistics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per example: summed negative log-likelihood (nats), number of predicted tokens, number predicted right.

    Args:
        logits: `[batch, length, vocabulary]`.
        labels: `[batch, length]`; -100 is not predicted. Position i predicts label i + 1.

    Returns:
        `[batch, 3]` in float64 on the CPU's precision of float32 log-probabilities.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])
        >>> causal_lm_statistics(logits, torch.tensor([[0, 1]]))
        tensor([[0.6931, 1.0000, 0.0000]], dtype=torch.float64)
    """
    return token_statistics(logits[:, :-1], labels[:, 1:])


def token_statistics(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same where position i predicts target i, as when a window's last token is not fed to the model.

    Example:
        >>> token_statistics(torch.tensor([[[0.0, 0.0], [9.0, 0.0]]]), torch.tensor([[1, -100]]))
        tensor([[0.6931, 1.0000, 0.0000]], dtype=torch.float64)
    """
    logits = logits.float()
    counted = targets != -100
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    right = (logits.argmax(-1) == targets) & counted
    return torch.stack([losses.double().sum(1), counted.double().sum(1), right.double().sum(1)], dim=1)


def classification_statistics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per example: negative log-likelihood (nats), one, and whether the most likely class is right.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`.

    Example:
        >>> classification_statistics(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([[0.6931, 1.0000, 1.0000]], dtype=torch.float64)
    """
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    right = logits.argmax(-1) == labels
    return torch.stack([losses.double(), torch.ones_like(losses).double(), right.double()], dim=1)


def preference_statistics(answers: torch.Tensor) -> torch.Tensor:
    """Per pair: nats and tokens of the chosen answer, nats and tokens of the rejected one, one, and chosen likelier.

    Args:
        answers: `[2 pairs, 3]`, rows of `causal_lm_statistics`: first of all chosen answers, then of all rejected ones.

    Returns:
        `[pairs, 6]`. The last column is 1 where the chosen answer has the larger log-probability as a whole.

    Example:
        >>> preference_statistics(torch.tensor([[2.0, 4.0, 1.0], [3.0, 2.0, 1.0]]))
        tensor([[2., 4., 3., 2., 1., 1.]])
    """
    chosen, rejected = answers.chunk(2)
    likelier = (chosen[:, :1] < rejected[:, :1]).to(answers.dtype)
    return torch.cat([chosen[:, :2], rejected[:, :2], torch.ones_like(likelier), likelier], dim=1)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Example:
        >>> str(Estimate(2.0, 1.9, 2.1))
        '2.000 [1.900, 2.100]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def metrics_of(task: str, bytes_per_token: float) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name of each metric, the main one first, and how it follows from summed statistics.

    Args:
        task: of a recipe.
        bytes_per_token: UTF-8 bytes of text per token, for `bits_per_byte` of "causal_lm".

    For "preference", accuracy is the share of pairs whose chosen answer is the likelier one, margin the mean over pairs
    of how much likelier (nats over the whole answer), and chosen_loss the nats per token of chosen answers.

    Example:
        >>> sums = np.array([2.0, 2.0, 1.0])
        >>> {name: round(float(f(sums)), 3) for name, f in metrics_of("causal_lm", 1.0).items()}
        {'loss': 1.0, 'perplexity': 2.718, 'accuracy': 0.5, 'bits_per_byte': 1.443}
    """

    def loss(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    def accuracy(sums: np.ndarray) -> np.ndarray:
        return sums[..., 2] / sums[..., 1]

    if task.endswith("classification"):
        return {"accuracy": accuracy, "loss": loss}
    if task == "preference":
        return {
            "accuracy": lambda sums: sums[..., 5] / sums[..., 4],
            "margin": lambda sums: (sums[..., 2] - sums[..., 0]) / sums[..., 4],
            "chosen_loss": loss,
        }
    made = {"loss": loss, "perplexity": lambda sums: np.exp(loss(sums)), "accuracy": accuracy}
    if task == "causal_lm":  # of a chat, templates and answers have no bytes of their own
        made["bits_per_byte"] = lambda sums: loss(sums) / np.log(2) / bytes_per_token
    return made


def estimates(
    statistics: Statistics, metrics: Mapping[str, Callable[[np.ndarray], np.ndarray]], seed: int = 0
) -> dict[str, Estimate]:
    """Each metric of a split, with a bootstrap interval over its examples.

    Example:
        >>> statistics = np.array([[1.0, 1.0, 1.0], [3.0, 1.0, 0.0]] * 50)
        >>> estimates(statistics, metrics_of("sequence_classification", 1.0))["loss"].value
        2.0
    """
    resampled = resampled_sums(statistics, seed)
    total = statistics.sum(0)
    return {name: estimate_of(metric(total), metric(resampled)) for name, metric in metrics.items()}


def changes(
    before: Statistics, after: Statistics, metrics: Mapping[str, Callable[[np.ndarray], np.ndarray]], seed: int = 0
) -> dict[str, Estimate]:
    """After minus before for each metric; paired: both are resampled with the same examples.

    Raises:
        ValueError: the two do not hold the same number of examples.

    Example:
        >>> before = np.array([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]] * 50)
        >>> str(changes(before, before - [0.5, 0.0, 0.0], metrics_of("sequence_classification", 1.0))["loss"])
        '-0.500 [-0.500, -0.500]'
    """
    if before.shape != after.shape:
        raise ValueError(f"statistics of {before.shape} and {after.shape} are not of the same examples")
    first, second = resampled_sums(before, seed), resampled_sums(after, seed)
    return {
        name: estimate_of(metric(after.sum(0)) - metric(before.sum(0)), metric(second) - metric(first))
        for name, metric in metrics.items()
    }


def resampled_sums(statistics: Statistics, seed: int) -> np.ndarray:
    """[resamples, columns]: sums over examples drawn with replacement, as counts of how often each was drawn."""
    count = len(statistics)
    generator, equal = np.random.default_rng(seed), np.full(count, 1 / count)
    # One at a time: all counts at once would take 8 GB for a million examples.
    return np.stack([generator.multinomial(count, equal) @ statistics for _ in range(_RESAMPLES)])


def estimate_of(value: np.ndarray, resampled: np.ndarray) -> Estimate:
    """A value with the middle 95 % of its resampled values."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
