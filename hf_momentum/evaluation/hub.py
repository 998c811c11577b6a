"""Results as the Hub shows them beside a model: entries of `model-index`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_momentum.evaluation.metrics import Estimate

_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def eval_results(
    task: str, name: str, role: str, source: str, scores: Mapping[str, Estimate], labels: Mapping[str, str]
) -> "list[EvalResult]":
    """One entry for each metric of a split, with its interval in words.

    Args:
        task: as the Hub calls it, such as "text-generation".
        name, role: of the split.
        source: SOURCE@SPLIT; of a file or folder of one machine its name alone is told.
        scores: by metric.
        labels: what people call each metric.

    Example:
        >>> scores, labels = {"accuracy": Estimate(0.5, 0.4, 0.6)}, {"accuracy": "acc"}
        >>> found = eval_results("text-classification", "a", "shifted", "/here/a.jsonl@test", scores, labels)
        >>> found[0].dataset_type, found[0].dataset_split, found[0].metric_name
        ('a.jsonl', 'test', 'acc, 95 % over examples [0.4000, 0.6000]')
        >>> found = eval_results("text-classification", "a", "shifted", "me/data-1.5:fr@test", scores, labels)
        >>> found[0].dataset_type, found[0].dataset_config, found[0].dataset_split
        ('me/data-1.5', 'fr', 'test')
    """
    from huggingface_hub import EvalResult

    place, _, split = source.rpartition("@") if "@" in source else (source, "", "")
    local = Path(place).is_absolute() or Path(place).suffix in _FILES or Path(place).expanduser().exists()
    dataset, _, config = (place, "", "") if local or place.startswith("stdlib:") else place.partition(":")
    return [
        EvalResult(
            task_type=task,
            dataset_type=(Path(place).name if local else dataset) or name,
            dataset_name=f"{name} ({role})",
            dataset_config=config or name,  # the Hub joins results of what has no other name
            dataset_split=split or None,
            metric_type=metric,
            metric_name=f"{labels[metric]}, 95 % over examples [{one.low:.4f}, {one.high:.4f}]",
            metric_value=round(one.value, 6),
        )
        for metric, one in scores.items()
    ]
