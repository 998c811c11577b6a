"""The share of tokens that a language model predicts right."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_momentum.errors import InputError
from hf_momentum.evaluation.scores import scorer, values


class TokenAccuracy(evaluate.Metric):
    """Predicted and true tokens to `token_accuracy`, in [0, 1]; a reference of -100 does not count.

    Example:
        >>> TokenAccuracy(keep_in_memory=True).compute(predictions=[[5, 6, 7]], references=[[5, 9, -100]])
        {'token_accuracy': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="The share of tokens predicted right, over all tokens of all texts.",
            citation="",
            inputs_description="predictions: the most likely token at each place. references: the token that stands "
            "there, or -100 where none is to be predicted. Both are aligned: nothing is shifted here.",
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        rows = np.array([_row(*each) for each in zip(predictions, references, strict=True)], dtype=np.float64)
        return values(scorer("causal_lm", metrics=["token_accuracy"]), rows)


def _row(predicted: Sequence[int], labels: Sequence[int]) -> tuple[float, int, int]:
    if len(predicted) != len(labels):
        raise InputError(f"{len(predicted)} predicted tokens for {len(labels)} references in one text; align them")
    found, wanted = np.asarray(predicted), np.asarray(labels)
    counted = wanted != -100
    return np.nan, int(counted.sum()), int(((found == wanted) & counted).sum())
