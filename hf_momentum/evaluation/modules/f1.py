"""F1 of a classifier: the mean over classes, or that of class 1."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_momentum.errors import InputError
from hf_momentum.evaluation.scores import predicted_rows, scorer, values

_METRICS = {"macro": "f1", "binary": "f1_binary"}


class F1(evaluate.Metric):
    """Predicted classes and labels to `f1`, in [0, 1].

    `compute(average=...)`: "macro" (the default), the mean over the classes that occur, or "binary", that of class 1
    of two.

    Example:
        >>> F1(keep_in_memory=True).compute(predictions=[1, 1], references=[1, 0], average="binary")["f1"].__round__(3)
        0.667
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="2 TP / (2 TP + FP + FN): the mean over the classes that occur, or that of class 1.",
            citation="",
            inputs_description="predictions: the predicted classes, from 0. references: the labels. "
            "average: 'macro' or 'binary'.",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], average: str = "macro"
    ) -> dict[str, float]:
        if average not in _METRICS:
            raise InputError(f"average must be macro or binary, got {average!r}")
        rows = predicted_rows(np.asarray(predictions), np.asarray(references))
        classes = max(2, 1 + int(rows[:, -2:].max()))
        if average == "binary" and classes > 2:
            raise InputError(
                f"average binary is for the classes 0 and 1, and there is a class {classes - 1}; use macro"
            )
        made = scorer("sequence_classification", classes=classes, metrics=[_METRICS[average]])
        return {"f1": values(made, rows)[_METRICS[average]]}
