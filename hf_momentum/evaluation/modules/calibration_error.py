"""The expected calibration error: how far a classifier's confidence is from how often it is right."""

from collections.abc import Sequence

import datasets
import evaluate
import torch

from hf_momentum.evaluation.scores import classification_rows, scorer, values


class CalibrationError(evaluate.Metric):
    """Logits and labels to `calibration_error`, in [0, 1]: 15 bins of equal width (Guo et al., arXiv 1706.04599).

    Log-probabilities are logits too.

    Example:
        >>> metric = CalibrationError(keep_in_memory=True)
        >>> round(metric.compute(predictions=[[0.0, 9.0], [0.0, 9.0]], references=[1, 0])["calibration_error"], 3)
        0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Over 15 bins of confidence, the absolute difference of accuracy and mean confidence.",
            citation="Guo et al. (2017): On Calibration of Modern Neural Networks. arXiv 1706.04599",
            inputs_description="predictions: logits of all classes for each example. references: the labels, from 0.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        logits = torch.tensor(predictions, dtype=torch.float64)
        rows = classification_rows(logits, torch.tensor(references)).numpy()
        return values(scorer("sequence_classification", logits.shape[1], metrics=["calibration_error"]), rows)
