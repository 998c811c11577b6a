"""The model card of a run: metadata for the Hub, and what a reader of the model should know."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_momentum.evaluation import Report
from hf_momentum.evaluation.hub import eval_results
from hf_momentum.integrations import OPTIMIZERS


def model_card(report: Report, base_model: str | None, lora: bool, optimizer: str, pictures: list[str]) -> str:
    """The text of the model's README.md.

    Args:
        report: the run's report.
        base_model: Hub name or path of what was fine-tuned; None for a model trained from scratch.
        lora: whether the folder holds adapters.
        optimizer: the `--optim` name.
        pictures: relative paths of pictures to show.

    Example:
        >>> card = model_card(Report("TAM", "byte", [], [], {}, "a: 1", "hf-momentum train"), None, False, "tam", [])
        >>> card.startswith("---") and "arXiv 2412.18790" in card
        True
    """
    metadata: dict[str, Any] = {
        "library_name": "peft" if lora else "transformers",
        "tags": ["hf-momentum", optimizer],
    }
    if base_model is not None:
        metadata["base_model"] = base_model
    if report.splits:
        metadata |= {"model_name": report.title, "eval_results": _results(report)}
    parts = ["---", ModelCardData(**metadata).to_yaml().strip(), "---", "", f"# {report.title}", ""]
    if optimizer in OPTIMIZERS:
        spec = OPTIMIZERS[optimizer]
        parts += [f"Trained with **{spec.cls.__name__}** ({spec.source}) by hf-momentum. {spec.summary}", ""]
    parts += ["## Results", "", *report.table(), ""]
    parts += [f"![]({picture})\n" for picture in pictures]
    parts += ["## Limits", ""]
    parts += ["One run with one seed; the intervals are over evaluation examples only. Not evaluated for any use.", ""]
    parts += ["## Training", "", *(f"- **{name}**: {value}" for name, value in report.facts.items()), ""]
    parts += ["```yaml", report.recipe.strip(), "```", ""]
    return "\n".join(parts)


def _results(report: Report) -> list[EvalResult]:
    """What the Hub shows as evaluation results: each metric of each split after training."""
    task = "text-classification" if report.unit == "example" else "text-generation"
    return [
        result
        for split in report.splits
        for result in eval_results(
            task,
            split.name,
            split.role,
            split.source,
            split.after,
            {metric: report.label(metric) for metric in split.after},
        )
    ]
