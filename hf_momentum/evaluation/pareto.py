"""Main loss against auxiliary loss: fronts of several methods over a grid of lambda, and which front lies lower.

Of a method at one seed, all pairs of losses that no other pair beats in both make its front. How good a front is
becomes one number, its hypervolume: the area of what it dominates up to a reference point. The reference point is the
same for all methods and seeds, and seeds are paired: two methods are compared by the mean of one difference per seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_momentum.evaluation.intervals import Interval, difference, paired_tests, t_interval
from hf_momentum.evaluation.writing import listed, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN_ONLY = "main only"
_LEVEL = 0.05  # of all comparisons of a report together

# How each method is drawn: markers and lines differ too, for readers who see no colours. Colours of Okabe and Ito.
_STYLES = {
    "bloop": ("#0072B2", "o", "-"),
    "mixed": ("#E69F00", "s", "--"),
    "pcgrad": ("#009E73", "^", "-."),
    "replay": ("#CC79A7", "D", ":"),
    "dynamic_barrier": ("#D55E00", "v", (0, (6, 1, 1, 1, 1, 1))),
    "simple": ("#56B4E9", "P", (0, (8, 3))),
}


# ---- points and areas ------------------------------------------------------------------------------------------------


def non_dominated(points: np.ndarray) -> np.ndarray:
    """The points `[n, 2]` that no other one beats, both coordinates to be small.

    A point is beaten by one that is nowhere larger and somewhere smaller. Of equal points one is kept.

    Returns:
        `[k, 2]`, by rising first coordinate, hence by falling second one.

    Example:
        >>> non_dominated(np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [2.0, 4.0], [3.0, 3.0]])).tolist()
        [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    """
    kept: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return np.array(kept).reshape(-1, 2)


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """The area that lies above and to the right of some of the `[n, 2]` points, and below and left of `reference`.

    Points that do not lie below the reference in both coordinates add nothing.

    Example:
        >>> hypervolume(np.array([[1.0, 3.0], [2.0, 1.0]]), (4.0, 4.0))  # 3 x 1 and below it 2 x 2
        7.0
        >>> hypervolume(np.array([[5.0, 0.0]]), (4.0, 4.0))
        0.0
    """
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    area, height = 0.0, float(reference[1])
    for x, y in non_dominated(inside):
        area += (float(reference[0]) - float(x)) * (height - float(y))
        height = float(y)
    return area


# ---- comparing methods -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The hypervolume of one method minus that of another, seed by seed.

    Attributes:
        method, other: the two.
        seeds: those that both have.
        difference: its mean with the 95 % t-interval of this comparison alone; None without a common seed.
        p_value: of the paired t-test.
        adjusted: after Holm's correction for all comparisons of the report.
    """

    method: str
    other: str
    seeds: Sequence[int]
    difference: Interval | None
    p_value: float
    adjusted: float

    @property
    def words(self) -> str:
        """What may be said: "larger", "smaller", "no significant difference" or "not comparable" (under two seeds)."""
        if self.difference is None or len(self.seeds) < 2:
            return "not comparable"
        if self.adjusted >= _LEVEL:
            return "no significant difference"
        return "larger" if self.difference.mean > 0 else "smaller"


def compare(volumes: Mapping[str, Mapping[int, float]], method: str) -> list[Comparison]:
    """`method` against every other one, paired over the seeds that both have.

    Args:
        volumes: hypervolume by method and seed.
        method: the one that all others are compared with.

    Example:
        >>> volumes = {"bloop": {0: 1.0, 1: 1.1, 2: 1.2}, "mixed": {0: 0.5, 1: 0.59, 2: 0.71}}
        >>> [(one.other, one.words) for one in compare(volumes, "bloop")]
        [('mixed', 'larger')]
        >>> compare({"bloop": volumes["mixed"], "mixed": volumes["mixed"]}, "bloop")[0].words
        'no significant difference'
    """
    found: list[tuple[str, list[int], list[float]]] = []
    for other in volumes:
        if other != method:
            seeds = sorted(set(volumes[method]) & set(volumes[other]))
            found.append((other, seeds, [difference(volumes[method][seed], volumes[other][seed]) for seed in seeds]))
    tests = paired_tests([differences for _, _, differences in found])
    return [
        Comparison(method, other, seeds, test.size, test.p_value, test.adjusted)
        for (other, seeds, _), test in zip(found, tests, strict=True)
    ]


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        method: a surgery, or `MAIN_ONLY`.
        lam: weight of the auxiliary objective; 0 for `MAIN_ONLY`.
        seed: of the order of the data; the same one is paired across methods.
        losses: main and auxiliary loss at the end; None if the run had to stop (its loss became NaN or infinite).
    """

    method: str
    lam: float
    seed: int
    losses: tuple[float, float] | None


@dataclass(frozen=True)
class FrontPoint:
    """A method at one lambda: means over its finished seeds."""

    method: str
    lam: float
    seeds: int
    main: Interval
    auxiliary: Interval


@dataclass(frozen=True)
class ParetoReport:
    """Fronts of main against auxiliary loss, their comparison, and a sentence that says how it came out.

    Every method's front has the main-only run of the same seed as its end, because a weight of 0 is open to all. A run
    that had to stop has no point. A seed counts for a method once all its runs have finished or had to stop.

    Attributes:
        title: one line.
        main, auxiliary: names of the two splits.
        unit: what one prediction is ("byte", "token", "example").
        methods: the surgeries, in the order asked for.
        lambdas: their weights.
        seeds: the seeds asked for.
        runs: those that finished.
        base: main and auxiliary loss of the model before training, if it was measured.
        facts: what ran, in the order to be listed.
        fairness: sentences on what was held equal.
        troubles: what failed, one sentence each.
        recipe: the YAML of what all runs share.
        command: the command that repeats it all.

    Example:
        >>> runs = [Run(MAIN_ONLY, 0.0, seed, (1.0, 3.0 + seed / 100)) for seed in range(3)]
        >>> runs += [Run("bloop", 0.1, seed, (1.1, 1.0 + seed**2 / 100)) for seed in range(3)]
        >>> runs += [Run("mixed", 0.1, seed, (1.5, 2.0 + seed / 50)) for seed in range(3)]
        >>> report = ParetoReport("t", "code", "prose", "byte", ["bloop", "mixed"], [0.1], [0, 1, 2], runs, None)
        >>> report.verdict().partition(":")[0]
        'bloop won against mixed'
    """

    title: str
    main: str
    auxiliary: str
    unit: str
    methods: Sequence[str]
    lambdas: Sequence[float]
    seeds: Sequence[int]
    runs: Sequence[Run]
    base: tuple[float, float] | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    fairness: Sequence[str] = ()
    troubles: Sequence[str] = ()
    recipe: str = ""
    command: str = ""
    version: int = 1

    @property
    def focus(self) -> str:
        """The method that the others are compared with: bloop, or else the first."""
        return "bloop" if "bloop" in self.methods else self.methods[0]

    @cached_property
    def reference(self) -> tuple[float, float] | None:
        """The worst main and the worst auxiliary loss over all finished runs; None if there are none."""
        losses = [run.losses for run in self.runs if run.losses is not None]
        return (max(main for main, _ in losses), max(auxiliary for _, auxiliary in losses)) if losses else None

    @cached_property
    def points(self) -> list[FrontPoint]:
        """Means over seeds: main only, then each method by rising lambda."""
        found = []
        for method, lam in [
            (MAIN_ONLY, 0.0),
            *((method, lam) for method in self.methods for lam in sorted(self.lambdas)),
        ]:
            losses = [run.losses for run in self.runs if (run.method, run.lam) == (method, lam) and run.losses]
            if losses:
                main, auxiliary = (t_interval(values) for values in zip(*losses, strict=True))
                found.append(FrontPoint(method, lam, len(losses), main, auxiliary))
        return found

    @cached_property
    def volumes(self) -> dict[str, dict[int, float]]:
        """Hypervolume by method and seed, where all runs of the two are done."""
        if self.reference is None:
            return {method: {} for method in self.methods}
        by = {(run.method, run.lam, run.seed): run for run in self.runs}
        found: dict[str, dict[int, float]] = {}
        for method in self.methods:
            found[method] = {}
            for seed in self.seeds:
                keys = [(MAIN_ONLY, 0.0, seed), *((method, lam, seed) for lam in self.lambdas)]
                if all(key in by for key in keys):
                    losses = [by[key].losses for key in keys]
                    points = np.array([pair for pair in losses if pair is not None]).reshape(-1, 2)
                    found[method][seed] = hypervolume(points, self.reference)
        return found

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The method in focus against every other."""
        return compare(self.volumes, self.focus)

    def verdict(self) -> str:
        """One sentence: who won, by how much, over which seeds, in which units, from which reference point."""
        if self.reference is None:
            return "No run finished, so there is nothing to compare."
        if len(self.methods) == 1:
            return f"{self.focus} was run alone, so there is nothing to compare."
        groups: dict[str, list[Comparison]] = {}
        for one in self.comparisons:
            groups.setdefault(one.words, []).append(one)
        phrases = {
            "larger": f"{self.focus} won against",
            "smaller": f"{self.focus} lost to",
            "no significant difference": f"no significant difference between {self.focus} and",
            "not comparable": f"too few common seeds to compare {self.focus} with",
        }
        said = "; ".join(
            f"{phrase} {listed([one.other for one in groups[words]])}"
            for words, phrase in phrases.items()
            if words in groups
        )
        alone = len(self.comparisons) == 1
        together = len({tuple(one.seeds) for one in self.comparisons}) == 1
        figures = ", ".join(
            (one.difference.shown(self._digits) if alone else f"{one.difference.shown(self._digits)} to {one.other}")
            + f" (p = {one.adjusted:.2g}"
            + (")" if together else f"; {_seeds(one.seeds)})")
            for one in self.comparisons
            if one.difference is not None
        )
        paired = f" over {_seeds(self.comparisons[0].seeds)}" if together else ""
        measured = f"difference in hypervolume {figures} in {self.area}{paired}" if figures else "no seed is complete"
        said = said if said.startswith(self.focus) else said[0].upper() + said[1:]
        return f"{said}: {measured}; {self._origin}."

    @property
    def area(self) -> str:
        """The unit of a hypervolume."""
        return f"(nats per {self.unit})²"

    @property
    def _digits(self) -> int:
        """Digits behind the point that show the hypervolumes to about three places."""
        largest = max((value for seeds in self.volumes.values() for value in seeds.values()), default=0.0)
        return min(8, max(3, 3 - math.floor(math.log10(largest)))) if largest > 0 else 3

    @property
    def _origin(self) -> str:
        assert self.reference is not None
        count = sum(run.losses is not None for run in self.runs)
        return (
            f"intervals are 95 % t-intervals over seeds, p-values after Holm's correction; the reference point is main "
            f"{self.reference[0]:.3f} and auxiliary {self.reference[1]:.3f} nats per {self.unit}, the worst losses of "
            f"all {count} finished runs, fixed for all methods and seeds"
        )

    def to_json(self) -> str:
        """The record for machines."""
        record = asdict(self)
        record["points"] = [asdict(point) for point in self.points]
        record["reference"] = self.reference
        record["hypervolumes"] = self.volumes
        record["comparisons"] = [{**asdict(one), "words": one.words} for one in self.comparisons]
        record["verdict"] = self.verdict()
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self, picture: str | None = None) -> str:
        """The record for people; `picture` is a relative path."""
        parts = [f"# {self.title}", "", f"**{self.verdict()}**", ""]
        parts += (
            [f"![Main against auxiliary loss, means over seeds with 95 % intervals]({picture})", ""] if picture else []
        )
        parts += ["## Losses", "", *self._losses(), "", "## Hypervolumes", "", *self._volumes(), ""]
        if self.comparisons:
            parts += [f"## {self.focus} against the others", "", *self._differences(), ""]
        if self.troubles:
            parts += ["## What failed", "", *(f"- {trouble}" for trouble in self.troubles), ""]
        parts += ["## How it was compared", "", *(f"- {sentence}" for sentence in self._method()), ""]
        parts += ["## What ran", "", *(f"- **{name}**: {value}" for name, value in self.facts.items()), ""]
        parts += ["## Run it again", "", "```bash", self.command, "```", "", "```yaml", self.recipe.strip(), "```", ""]
        return "\n".join(parts)

    def _losses(self) -> list[str]:
        unit = f"[95 %], nats per {self.unit}"
        rows = [
            [
                "method",
                "lambda",
                "seeds",
                f"main loss ({self.main}) {unit}",
                f"auxiliary loss ({self.auxiliary}) {unit}",
            ]
        ]
        if self.base is not None:
            rows.append(["base model", "", "", *(f"{loss:.3f}" for loss in self.base)])
        for point in self.points:
            rows.append([point.method, f"{point.lam:g}", str(point.seeds), str(point.main), str(point.auxiliary)])
        return _table(rows, left=1)

    def _volumes(self) -> list[str]:
        rows = [["method", "seeds", f"hypervolume [95 %], {self.area}"]]
        for method, seeds in self.volumes.items():
            shown = t_interval(list(seeds.values())).shown(self._digits) if seeds else "no seed is complete"
            rows.append([method, str(len(seeds)), shown])
        return _table(rows, left=1)

    def _differences(self) -> list[str]:
        rows = [
            [
                "against",
                "seeds",
                f"difference in hypervolume [95 %], {self.area}",
                "p",
                "p after Holm",
                f"{self.focus} is",
            ]
        ]
        for one in self.comparisons:
            shown = one.difference.shown(self._digits) if one.difference else ""
            rows.append([one.other, str(len(one.seeds)), shown, f"{one.p_value:.3g}", f"{one.adjusted:.3g}", one.words])
        return _table(rows, left=1)

    def _method(self) -> list[str]:
        return [
            "Hypervolume is the area that a front dominates up to the reference point; larger is better. The reference "
            "point is the worst main and the worst auxiliary loss of all finished runs, the same for all methods and "
            "seeds. A point at the reference adds nothing, and one very bad run stretches the area for all.",
            f"Every front has the main-only run of its seed as an end. {_seeds(self.seeds)}; losses "
            "are those at the end of training, none was chosen along the way.",
            "Methods are compared by the differences between their hypervolumes at the same seed: 95 % t-intervals of "
            "each comparison alone, paired t-tests, Holm's correction over the comparisons. \"No significant "
            'difference" is not a proof that there is none: it may be that there were too few seeds.',
            *self.fairness,
        ]

    def write(self, folder: Path) -> Path:
        """Write `report.json`, `report.md` and `fronts.png`; each file appears whole or not at all.

        Returns:
            The path of `report.md`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        figure = fronts_figure(self)
        if figure is not None:
            partial = folder / "fronts.png.partial"
            figure.savefig(partial, dpi=120, format="png")
            partial.replace(folder / "fronts.png")
        write_whole(folder / "report.json", self.to_json())
        write_whole(folder / "report.md", self.to_markdown("fronts.png" if figure is not None else None))
        return folder / "report.md"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"


def _table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    ruled = [rows[0], ["---"] * left + ["---:"] * (len(rows[0]) - left), *rows[1:]]
    return ["| " + " | ".join(row) + " |" for row in ruled]


# ---- the picture -----------------------------------------------------------------------------------------------------


def fronts_figure(report: ParetoReport) -> Figure | None:
    """All methods in one plot: means over seeds by rising lambda, with intervals in both directions.

    The axes show the trained models. The base model is often far from them: then it is an arrow at the border, and the
    legend says where it lies.
    """
    if not report.points:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    for method in report.methods:
        _draw_method(axes, method, [point for point in report.points if point.method == method])
    for point in report.points:
        if point.method == MAIN_ONLY:
            _draw_point(axes, point, "black", "*", 11)
            axes.plot([], [], color="black", marker="*", markersize=11, linestyle="none", label="main only (lambda 0)")
    axes.margins(0.08)
    if report.base is not None:
        _draw_base(axes, report.base)
    axes.set_xlabel(f"main loss: {report.main} (nats per {report.unit})")
    axes.set_ylabel(f"auxiliary loss: {report.auxiliary} (nats per {report.unit})")
    lambdas = sorted({point.lam for point in report.points if point.lam > 0})
    notes = ["bars: 95 % t-intervals over seeds"] if len(report.seeds) > 1 else []
    notes += (
        [f"larger markers: larger lambda\n({', '.join(f'{lam:g}' for lam in lambdas)})"] if len(lambdas) > 1 else []
    )
    figure.legend(
        loc="outside right upper",
        frameon=False,
        title="\n".join(notes) or None,
        title_fontsize=8,
        fontsize=9,
        alignment="left",
    )
    return figure


def _draw_method(axes: Axes, method: str, points: Sequence[FrontPoint]) -> None:
    colour, marker, line = _STYLES.get(method, ("#000000", "X", "-"))
    for size, point in zip(np.linspace(4.0, 9.0, max(len(points), 1)), points, strict=False):
        _draw_point(axes, point, colour, marker, float(size))
    axes.plot(
        [point.main.mean for point in points],
        [point.auxiliary.mean for point in points],
        color=colour,
        linestyle=line,
        linewidth=1.4,
    )
    axes.plot([], [], color=colour, marker=marker, markeredgecolor="black", linestyle=line, linewidth=1.4, label=method)


def _draw_point(axes: Axes, point: FrontPoint, colour: str, marker: str, size: float) -> None:
    spans = [
        None if value.low is None or value.high is None else [[value.mean - value.low], [value.high - value.mean]]
        for value in (point.main, point.auxiliary)
    ]
    axes.errorbar(
        point.main.mean,
        point.auxiliary.mean,
        xerr=spans[0],
        yerr=spans[1],
        color=colour,
        marker=marker,
        markersize=size,
        markeredgecolor="black",
        markeredgewidth=0.6,
        elinewidth=0.9,
        capsize=2,
        zorder=3,
    )


def _draw_base(axes: Axes, base: tuple[float, float]) -> None:
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    centre, half = limits.mean(axis=1), np.diff(limits, axis=1)[:, 0] / 2
    away = (np.array(base) - centre) / half  # 1 is the border
    label = "base model"
    if np.abs(away).max() <= 1.5:
        axes.plot(*base, color="0.45", marker="X", markersize=9, linestyle="none", markeredgecolor="black", label=label)
        axes.margins(0.08)
        return
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    at = np.clip(away, -0.97, 0.97)
    degrees = math.degrees(math.atan2(*(away - at)[::-1]))
    axes.plot(
        *(centre + at * half),
        color="0.45",
        marker=(3, 0, degrees - 90),
        markersize=9,
        linestyle="none",
        markeredgecolor="black",
        label=f"base model, outside:\nmain {base[0]:.3f}, auxiliary {base[1]:.3f}",
    )
