"""The share of generated texts that are the reference."""

from collections.abc import Sequence

import datasets
import evaluate

from hf_momentum.evaluation.scores import generation_rows, scorer, values


class ExactMatch(evaluate.Metric):
    """Texts and references to `exact_match`, in [0, 1]; white space around them never counts.

    `compute(normalise=True)` also overlooks case, ASCII punctuation, and how much white space parts the words.

    Example:
        >>> ExactMatch(keep_in_memory=True).compute(predictions=["Yes.", "no"], references=["yes", "no "])
        {'exact_match': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The share of texts that equal their reference.",
            citation="",
            inputs_description="predictions, references: texts. normalise: overlook case, punctuation and spacing.",
            features=datasets.Features({"predictions": texts, "references": texts}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], normalise: bool = False
    ) -> dict[str, float]:
        return values(scorer("generation"), generation_rows(predictions, references, normalise))
