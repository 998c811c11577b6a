"""The model card of a run: metadata for the Hub, and what a reader of the model should know."""

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_momentum.evaluation import Report
from hf_momentum.evaluation.hub import eval_results
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.papers import BETA_SCHEDULING, BLOOP, PAPERS, Paper

# As the Hub calls them; all others generate text.
_TASKS = {"sequence_classification": "text-classification", "image_classification": "image-classification"}
_LIMITS = "One run with one seed; the intervals are over evaluation examples only. Not evaluated for any use."
_NO_FIGURES = "A checkpoint from the midst of a run, or a model without a report: not evaluated for any use."


def model_card(report: Report, base_model: str | None, lora: bool, optimizer: str, pictures: list[str]) -> str:
    """The text of the model's README.md.

    Args:
        report: the run's report; its recipe says which data and objectives there were.
        base_model: Hub name or path of what was fine-tuned; None for a model trained from scratch.
        lora: whether the folder holds adapters.
        optimizer: the `--optim` name.
        pictures: relative paths of pictures to show.

    Example:
        >>> card = model_card(Report("TAM", "byte", [], [], {}, "a: 1", "hf-momentum train"), None, False, "tam", [])
        >>> card.startswith("---") and "arXiv 2412.18790" in card and "@misc{malviya2024torque" in card
        True
    """
    recipe = yaml.safe_load(report.recipe) or {}
    metadata = _metadata(recipe, base_model, lora, optimizer)
    if report.splits:
        metadata |= {"model_name": report.title, "eval_results": _results(report, str(recipe.get("task", "causal_lm")))}
    parts = [*_head(metadata, report.title), *_method(optimizer, recipe)]
    parts += ["## Results", "", *report.table(), ""]
    parts += [f"![]({picture})\n" for picture in pictures]
    parts += ["## Limits", "", _LIMITS, ""]
    parts += ["## Training", "", *(f"- **{name}**: {value}" for name, value in report.facts.items()), ""]
    parts += ["```yaml", report.recipe.strip(), "```", "", *_citation(optimizer, recipe)]
    return "\n".join(parts)


def checkpoint_card(step: int | None, recipe: Mapping[str, Any], lora: bool) -> str:
    """The card of a checkpoint, or of a model whose run left no card: what is known, and no figures.

    Args:
        step: optimizer steps taken; None where that is not known.
        recipe: its entries; empty where there is none.
        lora: whether it holds adapters.

    Example:
        >>> "Checkpoint after 40 optimizer steps" in checkpoint_card(40, {"optim": "tam"}, False)
        True
    """
    optimizer = str(recipe["optim"]) if "optim" in recipe else None
    title = "Model" if step is None else f"Checkpoint after {step} optimizer steps"
    base = str(recipe.get("model_name_or_path", "scratch"))
    parts = [*_head(_metadata(recipe, None if base == "scratch" else base, lora, optimizer), title)]
    parts += [*_method(optimizer, recipe), "## Limits", "", _NO_FIGURES, ""]
    if recipe:
        told = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=float("inf"))
        parts += ["## Training", "", "```yaml", told.strip(), "```", ""]
    return "\n".join([*parts, *_citation(optimizer, recipe)])


def papers(optimizer: str | None, recipe: Mapping[str, Any]) -> list[Paper]:
    """What a run has to cite: the optimizer's paper, and those of a surgery and of a momentum schedule.

    Example:
        >>> [paper.arxiv for paper in papers("tam", {"aux_dataset": "a=b", "surgery": "bloop"})]
        ['2412.18790', '2402.02998']
    """
    # The source of an optimizer that a user has registered is none of ours, and is named in the card as it stands.
    source = OPTIMIZERS[optimizer].source if optimizer is not None and optimizer in OPTIMIZERS else ""
    found = [paper for paper in PAPERS.values() if source == f"arXiv {paper.arxiv}"]
    auxiliary = recipe.get("aux_dataset") or recipe.get("aux_loss")
    if auxiliary and recipe.get("surgery", "bloop") == "bloop":
        found.append(BLOOP)
    if str(recipe.get("momentum_schedule", "")).split("_")[0] in ("critical", "hybrid"):
        found.append(BETA_SCHEDULING)
    return list(dict.fromkeys(found))


def on_hub(name: str | None) -> str | None:
    """A model's or dataset's name if it is the Hub's; None for a folder or file of this machine.

    Example:
        >>> on_hub("me/model"), on_hub("gpt2"), on_hub("/here/model"), on_hub("~/model"), on_hub("data.jsonl")
        ('me/model', 'gpt2', None, None, None)
    """
    if name is None or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None or Path(name).exists():
        return None
    return None if Path(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt") else name


def provenance(base_model: str | None, revision: str | None) -> dict[str, str]:
    """Facts for a report: the commit of this package's code, and that of the base model, as far as they are known.

    Args:
        base_model: the name that the recipe gives; None for a model trained from scratch.
        revision: the Hub's commit that was loaded.

    Example:
        >>> sorted(provenance("gpt2", "607a30d"))
        ['base model', 'code']
    """
    facts = {"code": code_version()}
    if base_model is not None and on_hub(base_model) is not None:
        facts["base model"] = base_model + (f" at commit {revision}" if revision else "")
    return facts


def code_version() -> str:
    """The commit that this package's code is of, or its released version.

    Example:
        >>> code_version().startswith(("commit ", "release "))
        True
    """
    origin = importlib.metadata.distribution("hf-momentum").read_text("direct_url.json")
    installed = json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None
    if installed is not None:
        return f"commit {installed}"
    top = Path(__file__).parents[2]
    if (top / ".git").exists():
        commit, changes = _git(top, "rev-parse", "HEAD"), _git(top, "status", "--porcelain", "-uno")
        if commit:
            return f"commit {commit}{' with local changes' if changes else ''}"
    return f"release {importlib.metadata.version('hf-momentum')}"


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _metadata(recipe: Mapping[str, Any], base_model: str | None, lora: bool, optimizer: str | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "peft" if lora else "transformers",
        "tags": ["hf-momentum", *([] if optimizer is None else [optimizer])],
    }
    if on_hub(base_model) is not None:
        metadata["base_model"] = base_model
    trained = str(recipe.get("train_dataset", "")).partition("@")[0].partition(":")[0]
    if "/" in trained and on_hub(trained) is not None:
        metadata["datasets"] = [trained]
    return metadata


def _head(metadata: Mapping[str, Any], title: str) -> list[str]:
    return ["---", ModelCardData(**metadata).to_yaml().strip(), "---", "", f"# {title}", ""]


def _method(optimizer: str | None, recipe: Mapping[str, Any]) -> list[str]:
    if optimizer is None:
        return []
    if optimizer not in OPTIMIZERS:
        return [f"Trained with `{optimizer}` by hf-momentum.", ""]
    spec, lines = OPTIMIZERS[optimizer], []
    own = papers(optimizer, {})
    lines.append(f"Trained with **{spec.cls.__name__}** ({spec.source}) by hf-momentum. {spec.summary}")
    lines += [f"The method is that of [{paper.title}]({paper.url})." for paper in own]
    lines += [f"Besides: [{paper.title}]({paper.url})." for paper in papers(optimizer, recipe) if paper not in own]
    return ["\n".join(lines), ""]


def _citation(optimizer: str | None, recipe: Mapping[str, Any]) -> Sequence[str]:
    found = papers(optimizer, recipe)
    return ["## Citation", "", "```bibtex", *(paper.bibtex() for paper in found), "```", ""] if found else []


def _results(report: Report, task: str) -> list[EvalResult]:
    """What the Hub shows as evaluation results: each metric of each split after training."""
    return [
        result
        for split in report.splits
        for result in eval_results(
            _TASKS.get(task, "text-generation"),
            split.name,
            split.role,
            split.source,
            split.after,
            {metric: report.label(metric) for metric in split.after},
        )
    ]
