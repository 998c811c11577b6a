"""What a run did to every split: one record, written as JSON and as Markdown with pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_momentum.evaluation import plots
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.scores import LOWER_IS_BETTER
from hf_momentum.evaluation.writing import write_whole


@dataclass(frozen=True)
class SplitResult:
    """One split before and after.

    Attributes:
        name, role, source: which text it is, and what it stands for.
        examples: how many were evaluated.
        before, after: each metric with its interval over examples.
        change: after minus before, paired over the same examples.
    """

    name: str
    role: str
    source: str
    examples: int
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    change: dict[str, Estimate]


@dataclass(frozen=True)
class Report:
    """Everything a reader needs to judge one run.

    Attributes:
        title: one line.
        unit: what one prediction is ("byte", "token", "example").
        splits: the results.
        history: the Trainer's log, one dictionary per entry.
        facts: what ran, in the order to be listed (optimizer, seed, versions, cost, ...).
        recipe: the YAML that repeats the run.
        command: the command that repeats the run.
    """

    title: str
    unit: str
    splits: Sequence[SplitResult]
    history: Sequence[dict[str, float]]
    facts: dict[str, Any]
    recipe: str
    command: str
    version: int = field(default=1)

    def to_json(self) -> str:
        """The record for machines."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self, pictures: Sequence[tuple[str, str]] = ()) -> str:
        """The record for people; `pictures` are pairs of caption and relative path."""
        parts = [f"# {self.title}", "", *self.table(), ""]
        parts += [f"![{caption}]({path})\n" for caption, path in pictures]
        parts += ["## What it says", "", *(f"- {sentence}" for sentence in self.sentences()), ""]
        parts += [
            "Intervals are 95 % bootstrap intervals over the examples of each split. They come from one run with one "
            "seed and say nothing about other seeds; a comparison of methods needs several.",
            "",
        ]
        parts += ["## What ran", "", *(f"- **{name}**: {value}" for name, value in self.facts.items()), ""]
        parts += ["## Run it again", "", "```bash", self.command, "```", "", "```yaml", self.recipe.strip(), "```", ""]
        return "\n".join(parts)

    def sentences(self) -> list[str]:
        """One sentence for each split, in words that follow from the interval of its change.

        Example:
            >>> loss = {"loss": Estimate(-0.5, -0.6, -0.4)}
            >>> split = SplitResult("code", "in distribution", "s", 9, {}, {}, loss)
            >>> Report("t", "byte", [split], [], {}, "", "").sentences()
            ['**code** (in distribution): loss fell by 0.500 [0.400, 0.600] nats per byte, an improvement.']
        """
        return [self._sentence(split) for split in self.splits]

    def _sentence(self, split: SplitResult) -> str:
        metric = next(iter(split.change))
        change = split.change[metric]
        unit = f" nats per {self.unit}" if metric == "loss" else ""
        prefix = f"**{split.name}** ({split.role}): {metric.replace('_', ' ')}"
        if not change.excludes_zero:
            return f"{prefix} shows no significant difference: {change}{unit}."
        fell = change.value < 0
        size = Estimate(-change.value, -change.high, -change.low) if fell else change
        better = fell == (metric in LOWER_IS_BETTER)
        verdict = "an improvement" if better else "forgetting" if split.role == "must not forget" else "a deterioration"
        return f"{prefix} {'fell' if fell else 'rose'} by {size}{unit}, {verdict}."

    def table(self) -> list[str]:
        """The lines of the Markdown table: one row for each split."""
        if not self.splits:
            return ["No evaluation split was named in the recipe."]
        metrics = [metric for metric in self.splits[0].before if metric != "bits_per_byte"]  # that is in the JSON
        header = ["split", "role", "examples"]
        for metric in metrics:
            header += [f"{self.label(metric)} before", "after"]
        header += [f"change in {metrics[0]} [95 %]"]
        rows = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
        for split in self.splits:
            row = [split.name, split.role, str(split.examples)]
            for metric in metrics:
                row += [f"{split.before[metric].value:.3f}", f"{split.after[metric].value:.3f}"]
            rows.append([*row, str(split.change[metrics[0]])])
        return ["| " + " | ".join(row) + " |" for row in rows]

    def label(self, metric: str) -> str:
        """How tables and axes call a metric."""
        if metric == "accuracy" and self.unit != "example":
            return f"next-{self.unit} accuracy"
        return metric.replace("_", " ")

    def write(self, folder: Path) -> Path:
        """Write `report.json`, `report.md` and `plots/*.png`; each file appears whole or not at all.

        Returns:
            The path of `report.md`.
        """
        pictures = plots.draw_all(self, folder / "plots")
        relative = [(caption, str(path.relative_to(folder))) for caption, path in pictures]
        write_whole(folder / "report.json", self.to_json())
        write_whole(folder / "report.md", self.to_markdown(relative))
        return folder / "report.md"
