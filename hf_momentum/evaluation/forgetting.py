"""A stream of domains: what a model could do on each of them after every stage, and what it forgot on the way.

A matrix has a row for every stage and a column for every domain. Row 0 is the base model, row i the model after it was
trained on domain i, and column j (from 1) is domain j. The figures are those of Lopez-Paz and Ranzato (2017, arXiv
1706.08840) and Chaudhry et al. (2018, arXiv 1801.10112), turned so that more forgetting is worse and more transfer is
better for losses too. Where they compare with a model without any training, we compare with the base model.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_momentum.errors import InputError
from hf_momentum.evaluation import pictures
from hf_momentum.evaluation.document import (
    Block,
    Bullets,
    Code,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    literal,
)
from hf_momentum.evaluation.intervals import Interval, t_interval
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.scores import LOWER_IS_BETTER
from hf_momentum.evaluation.writing import write_whole

Matrix = Sequence[Sequence[float]]  # [domains + 1][domains]


# ---- figures of one matrix -------------------------------------------------------------------------------------------


def average_score(matrix: Matrix) -> float:
    """The mean over domains after the last stage.

    Example:
        >>> average_score([[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]])
        0.75
    """
    return statistics.fmean(_checked(matrix)[-1])


def forgetting(matrix: Matrix, lower_is_better: bool = False) -> list[float]:
    """For every domain but the last: how much worse it is at the end than it once was, after any earlier stage.

    Never below 0 unless a domain is best after the last stage.

    Raises:
        InputError: the matrix does not have one row more than columns, or fewer than two columns.

    Example:
        >>> [round(lost, 3) for lost in forgetting([[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]])]
        [0.2]
        >>> [round(lost, 3) for lost in forgetting([[2.0, 2.0], [1.0, 1.8], [1.5, 1.2]], lower_is_better=True)]
        [0.5]
    """
    rows = _turned(matrix, lower_is_better)
    return [max(row[j] for row in rows[1:-1]) - rows[-1][j] for j in range(len(rows[0]) - 1)]


def average_forgetting(matrix: Matrix, lower_is_better: bool = False) -> float:
    """The mean of `forgetting`.

    Example:
        >>> round(average_forgetting([[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]]), 3)
        0.2
    """
    return statistics.fmean(forgetting(matrix, lower_is_better))


def backward_transfer(matrix: Matrix, lower_is_better: bool = False) -> float:
    """What the later stages did to a domain, on average: its score at the end less that right after its own stage.

    Example:
        >>> round(backward_transfer([[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]]), 3)
        -0.2
    """
    rows = _turned(matrix, lower_is_better)
    return statistics.fmean(rows[-1][j] - rows[j + 1][j] for j in range(len(rows[0]) - 1))


def forward_transfer(matrix: Matrix, lower_is_better: bool = False) -> float:
    """What the earlier stages did for a domain, on average: its score right before its own stage less the base model's.

    Example:
        >>> round(forward_transfer([[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]]), 3)
        0.1
    """
    rows = _turned(matrix, lower_is_better)
    return statistics.fmean(rows[j][j] - rows[0][j] for j in range(1, len(rows[0])))


def _checked(matrix: Matrix) -> Matrix:
    domains = len(matrix) - 1
    if domains < 2 or any(len(row) != domains for row in matrix):
        shape = f"{len(matrix)} rows of {sorted({len(row) for row in matrix})}"
        raise InputError(f"a forgetting matrix has n + 1 rows of n >= 2 domains, the base model first; got {shape}")
    return matrix


def _turned(matrix: Matrix, lower_is_better: bool) -> Matrix:
    """With larger as better."""
    return [[-value for value in row] for row in _checked(matrix)] if lower_is_better else _checked(matrix)


# ---- over seeds ------------------------------------------------------------------------------------------------------


def figures(matrices: Sequence[Matrix], lower_is_better: bool = False) -> dict[str, Interval]:
    """The four figures over the matrices of several seeds, with 95 % t-intervals.

    Raises:
        InputError: there is no matrix, or one is not of the right shape.

    Example:
        >>> one, two = [[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]], [[0.5, 0.5], [0.9, 0.5], [0.8, 0.8]]
        >>> {name: interval.shown(2) for name, interval in figures([one, two]).items()}["average forgetting"]
        '0.15 [-0.49, 0.79]'
    """
    if not matrices:
        raise InputError("figures of a stream need the matrix of at least one seed")
    return {
        "average score": t_interval([average_score(matrix) for matrix in matrices]),
        "average forgetting": t_interval([average_forgetting(matrix, lower_is_better) for matrix in matrices]),
        "backward transfer": t_interval([backward_transfer(matrix, lower_is_better) for matrix in matrices]),
        "forward transfer": t_interval([forward_transfer(matrix, lower_is_better) for matrix in matrices]),
    }


_MEANING = {
    "average score": "mean over domains after the last stage",
    "average forgetting": "how much worse a domain ends than it once was; more is worse",
    "backward transfer": "end of the stream against the end of the domain's own stage; below 0 is a loss",
    "forward transfer": "right before the domain's own stage against the base model; above 0 is a gain",
}


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamReport:
    """What became of every domain in the course of a stream.

    Attributes:
        title: one line.
        domains: in the order of training.
        metric: what the matrix shows; every other one is in the JSON.
        seeds: one stream for each.
        cells: by seed, row (0 is the base model), domain and metric: the score with its interval over examples.
        facts: what ran, in the order to be listed.
        recipe: the YAML of the recipe.
        command: the command that repeats the streams.

    Raises:
        InputError: a seed's matrix is not of the right shape.
    """

    title: str
    domains: Sequence[str]
    metric: str
    seeds: Sequence[int]
    cells: Mapping[int, Sequence[Mapping[str, Mapping[str, Estimate]]]]
    facts: Mapping[str, Any]
    recipe: str
    command: str

    @property
    def lower_is_better(self) -> bool:
        """Of the metric shown."""
        return self.metric in LOWER_IS_BETTER

    @property
    def stages(self) -> list[str]:
        """The names of the rows."""
        return ["base model", *(f"after {domain}" for domain in self.domains)]

    def matrix(self, seed: int, metric: str | None = None) -> list[list[float]]:
        """One seed's matrix of one metric; of the shown one unless named."""
        name = metric or self.metric
        return [[row[domain][name].value for domain in self.domains] for row in self.cells[seed]]

    def mean_matrix(self) -> list[list[float]]:
        """The mean over seeds of every cell."""
        matrices = [self.matrix(seed) for seed in self.seeds]
        return [[statistics.fmean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]

    def figures(self) -> dict[str, Interval]:
        """The four figures of the shown metric over seeds."""
        return figures([self.matrix(seed) for seed in self.seeds], self.lower_is_better)

    def verdict(self) -> str:
        """Whether earlier domains were forgotten, in one sentence that follows from the intervals."""
        lost = {
            domain: t_interval([forgetting(self.matrix(seed), self.lower_is_better)[j] for seed in self.seeds])
            for j, domain in enumerate(self.domains[:-1])
        }
        worst = max(lost, key=lambda domain: lost[domain].mean)
        average = self.figures()["average forgetting"]
        name = self.metric.replace("_", " ")
        what = f"Average forgetting in {name} is {average}, most on {worst} ({lost[worst].mean:.3f})"
        if average.low is None or average.high is None:
            return f"{what}; of a single seed, so nothing is known about other runs."
        if average.low > 0:
            return f"{what}: earlier domains were forgotten."
        return f"{what}: no significant forgetting over {len(self.seeds)} seeds."

    def to_json(self) -> str:
        """The record for machines: every cell of every seed with all metrics, and the figures."""
        found = {name: asdict(interval) for name, interval in self.figures().items()}
        return (
            json.dumps({**asdict(self), "stages": self.stages, "figures": found}, indent=2, ensure_ascii=False) + "\n"
        )

    def document(self) -> Document:
        """The record for people."""
        name, values = self.metric.replace("_", " "), self.mean_matrix()
        rows = [
            [stage, *(f"{value:.3f}" for value in row)]
            for stage, row in zip(map(literal, self.stages), values, strict=True)
        ]
        over = f"mean of {len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        picture = pictures.forgetting_matrix(
            values,
            self.stages,
            self.domains,
            axis=name,
            outlined=[(place + 1, place) for place in range(len(self.domains))],
        )
        blocks: list[Block] = [
            Verdict(literal(self.verdict())),
            Heading("The matrix"),
            Table(["", *map(literal, self.domains)], rows, caption=f"{name} on each domain, {over}"),
            Picture(
                "forgetting_matrix",
                f"{name.capitalize()} on each domain (columns) after each stage (rows), {over}; a frame marks the "
                "domain that the stage was trained on.",
                f"A matrix of {name}: {len(self.stages)} stages by {len(self.domains)} domains.",
                picture,
            ),
            Heading("What follows from it"),
            Table(
                ["figure", "meaning", "value [95 %]"],
                [[figure, _MEANING[figure], str(interval)] for figure, interval in self.figures().items()],
                left=2,
            ),
            Text(
                "Intervals are 95 % t-intervals over seeds. The figures are those of Lopez-Paz and Ranzato (2017) and "
                "Chaudhry et al. (2018), turned so that more forgetting is worse and more transfer is better for "
                "losses too. Intervals over examples of every single cell are in the JSON."
            ),
            Heading("What ran"),
            Bullets([f"**{fact}**: {literal(str(value))}" for fact, value in self.facts.items()]),
            Heading("Run it again"),
            Code(self.command, "bash"),
            Code(self.recipe.strip(), "yaml"),
        ]
        return Document(literal(self.title), blocks)

    def write(self, folder: Path) -> Path:
        """Write `stream.json`, `report.md`, `report.html` and `plots/`; each file appears whole or not at all.

        Returns:
            The path of `report.html`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "stream.json", self.to_json())
        return self.document().write(folder)
