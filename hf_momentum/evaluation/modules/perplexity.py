"""Perplexity from the negative log-likelihoods of texts."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_momentum.evaluation.scores import scorer, values


class Perplexity(evaluate.Metric):
    """Summed negative log-likelihoods (nats) and token counts to `perplexity` and `loss`, in nats per token.

    Every token counts the same, in a short text and in a long one.

    Example:
        >>> found = Perplexity(keep_in_memory=True).compute(predictions=[3.0, 1.0], references=[3, 1])
        >>> {name: round(value, 3) for name, value in found.items()}
        {'perplexity': 2.718, 'loss': 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The exponential of the mean negative log-likelihood per predicted token.",
            citation="",
            inputs_description="predictions: each text's negative log-likelihood in nats, summed over its predicted "
            "tokens. references: how many those are.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        rows = np.stack([predictions, references, np.full(len(predictions), np.nan)], axis=1)
        return values(scorer("causal_lm", metrics=["perplexity", "loss"]), rows)
