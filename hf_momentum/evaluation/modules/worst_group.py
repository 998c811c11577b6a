"""The accuracy of the group of examples that a classifier serves worst."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_momentum.evaluation.scores import by_group, predicted_rows, scorer, worst_group


class WorstGroup(evaluate.Metric):
    """Predicted classes, labels and groups to `worst_group_accuracy`, in [0, 1], and the name of that `group`.

    Example:
        >>> metric = WorstGroup(keep_in_memory=True)
        >>> metric.compute(predictions=[0, 1, 1], references=[0, 1, 0], groups=["books", "books", "news"])
        {'worst_group_accuracy': 0.0, 'group': 'news'}
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The smallest accuracy of a group of examples, and which group that is.",
            citation="",
            inputs_description="predictions: the predicted classes, from 0. references: the labels. "
            "groups: the name of each example's group.",
            features=datasets.Features(
                {"predictions": classes, "references": classes, "groups": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], groups: Sequence[str]
    ) -> dict[str, float | str]:
        made = scorer("sequence_classification", classes=2, metrics=["accuracy"])
        rows = predicted_rows(np.asarray(predictions), np.asarray(references))
        name, estimate = worst_group(by_group(made, rows, groups), "accuracy")
        return {"worst_group_accuracy": estimate.value, "group": name}
