"""The share of examples whose class is predicted right."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_momentum.evaluation.scores import predicted_rows, scorer, values


class Accuracy(evaluate.Metric):
    """Predicted classes and labels to `accuracy`, in [0, 1].

    Example:
        >>> Accuracy(keep_in_memory=True).compute(predictions=[0, 2, 2], references=[0, 2, 1])["accuracy"].__round__(3)
        0.667
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The share of examples whose class is predicted right.",
            citation="",
            inputs_description="predictions: the predicted classes, from 0. references: the labels.",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        rows = predicted_rows(np.asarray(predictions), np.asarray(references))
        return values(scorer("sequence_classification", classes=2, metrics=["accuracy"]), rows)
