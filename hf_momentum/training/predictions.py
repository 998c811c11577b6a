"""What a model predicts of examples: which predictions are right, and at what loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import IGNORED, Examples, on_device
from hf_momentum.training.samples import LOSSES
from hf_momentum.training.suite_rows import written_rows


@dataclass(frozen=True)
class Predictions:
    """Of one model on one split.

    Attributes:
        right: for each example a boolean array of its predictions.
        loss: the mean over all predictions, in nats.
    """

    right: Sequence[np.ndarray]
    loss: float

    @property
    def accuracy(self) -> float:
        """The share of all predictions that is right.

        Example:
            >>> Predictions([np.array([True]), np.array([True, False])], 0.5).accuracy
            0.6666666666666666
        """
        return float(np.concatenate(self.right).mean())

    def by_row(self, examples: Examples) -> list[np.ndarray]:
        """The same for each row of the split, of which a long text makes several examples."""
        rows: dict[int, list[np.ndarray]] = {}
        for row, right in zip(examples.rows, self.right, strict=True):
            rows.setdefault(row, []).append(right)
        return [np.concatenate(rows[row]) for row in sorted(rows)]


@dataclass(frozen=True)
class Held:
    """A split that models are measured on again and again.

    Attributes:
        split: how it is read.
        rows: its data, corrupted if it is.
        examples: for the model.
    """

    split: SuiteSplit
    rows: datasets.Dataset
    examples: Examples

    def predictions(self, evaluated: Evaluated, batch_size: int) -> Predictions:
        """What a model, in evaluation mode, predicts of it."""
        return predictions(evaluated, self.examples, batch_size, self.split.task, self.rows, self.split)


def predictions(
    evaluated: Evaluated,
    examples: Examples,
    batch_size: int,
    task: str,
    rows: datasets.Dataset | None = None,
    split: SuiteSplit | None = None,
) -> Predictions:
    """Run a model over examples, those of like size together; for generation let it write, too (`rows`, `split`)."""
    order = sorted(range(len(examples)), key=lambda index: -examples.sizes[index])
    right: list[np.ndarray] = [np.zeros(0, dtype=bool)] * len(examples)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logits = evaluated.model(**on_device(evaluated, examples.inputs(batch))).logits
            targets = examples.targets(batch).to(logits.device)
            loss, counted = LOSSES[task](logits, targets, [None] * len(batch))
            total, count = total + float(loss), count + counted
            hits = logits.argmax(-1) == targets
            for place, index in enumerate(batch):
                own = hits[place] if targets.dim() == 1 else hits[place][targets[place] != IGNORED]
                right[index] = np.atleast_1d(own.cpu().numpy())
        if task == "generation" and rows is not None and split is not None:
            written = written_rows(evaluated, rows, split, batch_size)[:, 1] > 0
            right = [np.array([one]) for one in written]
    return Predictions(right, total / max(count, 1))
