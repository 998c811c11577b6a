"""The pictures of comparisons and evaluations, as Matplotlib figures that no other code holds.

Every series differs from every other by its marker, its line and its hatching, and in lightness from its neighbours in
the list, so that a picture can be read without colours. Names are wrapped to the room that they have, by their measured
widths, and what does not fit makes the picture larger: no label lies on another one, however long they are.

A *figure* of a model is an `Estimate` (over examples) or an `Interval` (over seeds); its interval is drawn where it is
known.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from hf_momentum.evaluation.intervals import Interval
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.results import Point, ReliabilityBin
from hf_momentum.evaluation.robustness import Line
from hf_momentum.evaluation.writing import significant

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_SMALL, _NORMAL = 8.5, 9.5  # sizes of text, in points
_LINE = 12.0  # height of a line of small text, in points
_INCH = 72.0  # points
_WIDTH = 8.8  # inches
_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_INK, _SOFT, _FAINT = "#1c2126", "#5c646c", "#d5d9dd"


# ---- how a series looks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How one series is drawn; no two of `styles` share a colour, a marker, a line or a hatching."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]
    hatch: str


# The colours of Okabe and Ito, and darker ones of Paul Tol. The order keeps neighbours 15 steps of L* apart.
STYLES = (
    Style("#0072B2", "o", "-", ""),
    Style("#E69F00", "s", "--", "////"),
    Style("#D55E00", "^", "-.", ".."),
    Style("#56B4E9", "D", ":", "\\\\\\\\"),
    Style("#000000", "v", (0, (6, 1, 1, 1, 1, 1)), "xx"),
    Style("#009E73", "P", (0, (8, 3)), "||"),
    Style("#332288", "X", (0, (3, 1)), "---"),
    Style("#CC79A7", "<", (0, (1, 2.5)), "oo"),
    Style("#882255", ">", (0, (5, 1, 1, 1)), "++"),
    Style("#999933", "p", (0, (10, 2, 2, 2)), "OO"),
    Style("#7A4B12", "h", (0, (2, 2)), "//.."),
    Style("#999999", "*", (0, (12, 4)), "\\\\.."),
)


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name, by its place: give the same names in the same order to every picture of a report.

    Beyond 12, more than a reader can tell apart at a glance, markers and hatchings come again in other colours.

    Example:
        >>> styles(["adamw_torch", "tam"])["tam"].marker
        's'
    """
    found = {}
    for place, name in enumerate(names):
        turned = STYLES[(place + 5 * (place // len(STYLES))) % len(STYLES)]
        found[name] = replace(turned, colour=STYLES[place % len(STYLES)].colour)
    return found


# ---- accuracy under shift --------------------------------------------------------------------------------------------


def shift_scatter(
    points: Mapping[str, Sequence[Point]],
    line: Line | None = None,
    baselines: Collection[str] = (),
    x: str = "accuracy in distribution",
    y: str = "accuracy under shift",
) -> Figure:
    """Each model's score under shift against its score in distribution, with the line through the baselines.

    Args:
        points: by method; several are several seeds: they are drawn small, and their mean large.
        line: of `robustness.fit`; what lies on its better side is robust.
        baselines: the methods that it was fitted through, drawn hollow.
        x, y: labels of the axes.

    Raises:
        ValueError: there is no point.

    Example:
        >>> figure = shift_scatter({"tam": [Point("tam", 0.9, 0.8), Point("tam", 0.92, 0.81)]})
        >>> figure.axes[0].get_xlabel()
        'accuracy in distribution'
    """
    xs = {name: [point.in_distribution for point in series] for name, series in points.items() if series}
    ys = {name: [point.shifted for point in series] for name, series in points.items() if series}
    if not xs:
        raise ValueError("a picture of scores under shift needs at least one point")
    figure = _figure(4.4, legend=[*points, "", ""])
    axes = _bare(figure.subplots(), grid="both")
    looks = {name: style for name, style in styles(list(points)).items() if name in xs}
    for name, style in looks.items():
        face = "white" if name in baselines else style.colour
        if len(xs[name]) > 1:
            small: dict[str, Any] = {"ms": 4, "mfc": face, "mec": style.colour, "mew": 0.8, "alpha": 0.6}
            axes.plot(xs[name], ys[name], style.marker, zorder=2, **small)
        middle = ([statistics.fmean(xs[name])], [statistics.fmean(ys[name])])
        axes.plot(*middle, style.marker, label=_label(name), ms=9, mfc=face, mec=style.colour, mew=1.8, zorder=3)
    left, right = _limits(chain(*xs.values()))
    bottom, top = _limits(chain(*ys.values()))
    if line is not None:
        steps = [left + (right - left) * step / 200 for step in range(201)]
        drawn = [step for step in steps if line.scale == "linear" or 0 <= step <= 1]
        axes.plot(drawn, [line.at(step) for step in drawn], "--", color=_SOFT, lw=1.5, label="line through baselines")
    ends = (max(left, bottom), min(right, top))
    if ends[0] < ends[1]:
        axes.plot(ends, ends, ":", color=_SOFT, lw=1.3, label="as good as in distribution", zorder=1)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    _labels(axes, x, y)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


# ---- differences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One row of a picture of differences.

    Attributes:
        label: what is compared.
        interval: of the difference.
        group: rows of one group, such as a split, stand together below its name.
        significant: after correction for several comparisons, which the interval of one alone does not contain.
    """

    label: str
    interval: Interval | Estimate
    group: str = ""
    significant: bool = False


def differences(rows: Sequence[Difference], axis: str = "difference", digits: int = 3) -> Figure:
    """Differences with their 95 % intervals, one below the other, the figures beside them.

    Args:
        rows: in the order to be shown; those of a group follow each other.
        axis: what the difference is, its unit, and which side is better.
        digits: behind the point.

    Raises:
        ValueError: there is no row.

    Example:
        >>> figure = differences([Difference("tam", Interval(0.01, 0.002, 0.018), "news", True)])
        >>> [text.get_text() for text in figure.axes[0].texts], figure.axes[0].get_yticklabels()[0].get_text()
        (['+0.010 [+0.002, +0.018]'], 'news')
    """
    if not rows:
        raise ValueError("a picture of differences needs at least one row")
    room, colour = 190.0, STYLES[0].colour
    labels: list[tuple[float, str, bool]] = []  # height in lines, text, whether it heads a group
    heights: list[float] = []
    depth, group = 0.0, ""
    for row in rows:
        if row.group != group:
            group, depth = row.group, depth + (0.5 if heights else 0.0)
            text = wrapped(group, room, _SMALL * 1.1)
            labels.append((depth + _lines(text) / 2, text, True))
            depth += _lines(text) + 0.1
        text = wrapped(row.label, room, _SMALL)
        labels.append((depth + _lines(text) / 2 + 0.2, text, False))
        heights.append(labels[-1][0])
        depth += _lines(text) + 0.4
    figure = _figure(0.9 + depth * _LINE / _INCH)
    axes = _bare(figure.subplots(), grid="x")
    axes.axvline(0, color=_INK, lw=1, zorder=1)
    for height, row in zip(heights, rows, strict=True):
        middle, low, high = _bounds(row.interval)
        if low is not None and high is not None:
            axes.plot([low, high], [height, height], color=colour, lw=1.8, solid_capstyle="butt", zorder=2)
        face, weight = (colour, "bold") if row.significant else ("white", "normal")
        axes.plot([middle], [height], "o", ms=7, mfc=face, mec=colour, mew=1.6, zorder=3)
        right: dict[str, Any] = {
            "transform": axes.get_yaxis_transform(),
            "va": "center",
            "ha": "left",
            "weight": weight,
        }
        axes.text(1.02, height, _signed(row.interval, digits), fontsize=_SMALL, color=_INK, **right)
    axes.set_ylim(depth, 0)
    axes.set_xlim(_limits([0.0, *(value for row in rows for value in _bounds(row.interval) if value is not None)]))
    axes.set_yticks([height for height, _, _ in labels], [_literal(text) for _, text, _ in labels], ha="left")
    for tick, (_, _, heads) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if heads else "normal")
    widest = max(_width(line, _SMALL * (1.1 if heads else 1)) for _, text, heads in labels for line in text.split("\n"))
    axes.tick_params(axis="y", length=0, pad=widest + 8)
    axes.spines["left"].set_visible(False)
    _labels(axes, axis, "")
    marks = [_mark("o", colour, colour), _mark("o", "white", colour)]
    figure.legend(marks, ["significant", "not significant"], loc="outside upper left", ncols=2, **_LEGEND)
    return figure


# ---- tuning ----------------------------------------------------------------------------------------------------------


def tuned(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    chosen: Mapping[str, float],
    axis: str = "validation loss",
    lower_is_better: bool = True,
) -> Figure:
    """Validation score against learning rate, a panel for each method: was each best point interior?

    All panels have one scale of scores, which ends where the worse half of a method's points begins; what lies beyond
    it is a triangle at the border, and a run that diverged a cross.

    Args:
        curves: by method, pairs of learning rate and score; a score that is not finite is a run that diverged.
        chosen: the learning rate that was taken.
        axis: what the score is.
        lower_is_better: for the scores.

    Raises:
        ValueError: there is no method.

    Example:
        >>> curve = [(1e-4, 2.0), (1e-3, 1.0), (1e-2, math.inf)]
        >>> tuned({"tam": curve}, {"tam": 1e-3}).axes[0].get_title(loc="left")
        'tam\\nchosen: 0.001'
    """
    figure, panels = _panels(list(curves), 1.75, share_x=False)
    best, worst = _shown_scores(curves, 1 if lower_is_better else -1)
    border = 0.95 if lower_is_better else 0.05
    seen: dict[str, Artist] = {}
    for (name, style), axes in zip(styles(list(curves)).items(), panels, strict=True):
        curve = sorted(curves[name])
        finite = [(rate, score) for rate, score in curve if math.isfinite(score)]
        beyond = [rate for rate, score in finite if not min(best, worst) <= score <= max(best, worst)]
        axes.plot([r for r, _ in finite], [s for _, s in finite], "-", color=style.colour, lw=1.3)
        inside = [(rate, score) for rate, score in finite if rate not in beyond]
        small: dict[str, Any] = {"mfc": "white", "mec": style.colour, "mew": 1.2, "ls": "none"}
        axes.plot([r for r, _ in inside], [s for _, s in inside], "o", ms=5, zorder=2, **small)
        edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3, **small}
        diverged = [rate for rate, score in curve if not math.isfinite(score)]
        for rates, marker in ((beyond, "^" if lower_is_better else "v"), (diverged, "x")):
            if rates:  # no points at all have no place on a logarithmic axis, and the layout would fail
                axes.plot(rates, [border] * len(rates), marker, ms=6, **edge)
        taken = [score for rate, score in inside if rate == chosen.get(name)]
        axes.plot([chosen[name]] * len(taken) if taken else [], taken, "o", ms=8, color=style.colour, zorder=3)
        told = f"chosen: {_rate(chosen[name])}" if name in chosen else "none chosen"
        _head(axes, name, told, panels)
        _rates(axes, [rate for rate, _ in curve])
        seen |= {"tried": _mark("o", "white", _SOFT)} | ({"chosen": _mark("o", _SOFT, _SOFT)} if taken else {})
        seen |= {"off the scale": _mark("^" if lower_is_better else "v", "white", _SOFT)} if beyond else {}
        seen |= {"diverged": _mark("x", _SOFT, _SOFT)} if diverged else {}
    pad = 0.08 * (worst - best)
    panels[0].set_ylim(*sorted((best - pad, worst + pad)))
    figure.supxlabel("learning rate", fontsize=_NORMAL, color=_INK)
    figure.supylabel(_literal(axis), fontsize=_NORMAL, color=_INK)
    figure.legend(list(seen.values()), list(seen), loc="outside upper left", ncols=len(seen), **_LEGEND)
    return figure


def _shown_scores(curves: Mapping[str, Sequence[tuple[float, float]]], sign: int) -> tuple[float, float]:
    """The best score of all, and the worst that is shown: the worst of the methods' medians, so half of each is seen.

    Example:
        >>> _shown_scores({"a": [(1, 1.0), (2, 2.0), (3, 90.0)], "b": [(1, 1.5), (2, math.inf)]}, 1)
        (1.0, 2.25)
    """
    series = [[sign * score for _, score in curve if math.isfinite(score)] for curve in curves.values()]
    series = [scores for scores in series if scores]
    if not series:
        return 0.0, float(sign)
    best, worst = min(map(min, series)), max(map(statistics.median, series))
    worst = min(max(map(max, series)), worst + 0.25 * (worst - best))
    return sign * best, sign * (worst if worst > best else best + max(0.01 * abs(best), 1e-6))


def _rates(axes: Axes, rates: Sequence[float]) -> None:
    """A logarithmic axis whose few ticks are powers of ten, or else the two ends."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(rates), max(rates)
    powers = [
        10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ]
    ticks = powers[:: math.ceil(len(powers) / 4)] if len(powers) > 1 else sorted({low, high})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([_rate(tick) for tick in ticks])
    axes.set_xlim(low / 1.5, high * 1.5)


def _rate(rate: float) -> str:
    """Three digits, and no zeros that say nothing.

    Example:
        >>> _rate(0.003), _rate(1e-5)
        ('0.003', '1e-5')
    """
    return f"{rate:.3g}".replace("e-0", "e-")


# ---- forgetting ------------------------------------------------------------------------------------------------------


def forgetting_matrix(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    axis: str = "accuracy",
    digits: int = 2,
    outlined: Collection[tuple[int, int]] = (),
) -> Figure:
    """What a model could do on every domain after each stage of a stream: a row for each stage.

    Args:
        values: `[rows][columns]`; None or NaN where nothing was measured. A darker cell is a larger value.
        rows: the stages, from the first.
        columns: the domains.
        axis: what the values are.
        digits: behind the point.
        outlined: places (row, column) with a frame, such as the domain that a stage was trained on.

    Raises:
        ValueError: `values` is empty, or does not have a row and a column for each name.

    Example:
        >>> figure = forgetting_matrix([[0.9, None], [0.7, 0.8]], ["after books", "after news"], ["books", "news"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.90', '–', '0.70', '0.80']
    """
    if not rows or not columns or [len(row) for row in values] != [len(columns)] * len(rows):
        shape = f"{len(values)} rows of {sorted({len(row) for row in values})}"
        raise ValueError(f"values of a matrix must be {len(rows)} rows of {len(columns)}, got {shape}")
    everything = [value for row in values for value in row if value is not None and math.isfinite(value)]
    low, high = min(everything, default=0.0), max(everything, default=1.0)
    figure = _matrix(
        [
            [None if value is None else (value - low) / (high - low) if high > low else 0.5 for value in row]
            for row in values
        ],
        [["" if value is None else f"{value:.{digits}f}" for value in row] for row in values],
        rows,
        columns,
    )
    for i, j in outlined:
        _frame(figure.axes[0], i, j, 1)
    figure.axes[0].set_xlabel(f"{_literal(axis)}; darker is larger", fontsize=_SMALL, color=_SOFT, loc="left")
    return figure


def _matrix(
    shares: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    low_row: float = 26.0,
) -> Figure:
    """Cells with their figures in them, darker for a larger share in [0, 1]; None or NaN is an empty cell."""
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    shades = _shades()
    cell = max(46.0, min(86.0, 470 / len(columns)))
    beside = [wrapped(name, 170, _SMALL) for name in rows]
    above, upright = [wrapped(name, cell - 8, _SMALL) for name in columns], False
    if max(map(_lines, above)) > 3:
        above, upright = [wrapped(name, 120, _SMALL) for name in columns], True
        cell = max(cell, 4 + _LINE * max(map(_lines, above)))
    tall = max(low_row, _LINE * max(map(_lines, beside)) + 4)
    left, top = _widest(beside) + 24, (_widest(above) if upright else _LINE * max(map(_lines, above))) + 50
    figure = _figure((top + tall * len(rows)) / _INCH, width=(left + cell * len(columns) + 16) / _INCH)
    axes = figure.subplots()
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            known = share is not None and math.isfinite(share)
            shade = to_hex(shades(share or 0.0)) if known else "#ffffff"
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=shade, edgecolor="white", lw=1.5))
            text = texts[i][j].replace("-", _MINUS) if known else _DASH
            colour = "#000000" if lightness(shade) > 49.5 else "#ffffff"  # either way a contrast of 4.5
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=_SMALL, color=colour)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [_literal(name) for name in beside])
    axes.set_xticks([j + 0.5 for j in range(len(columns))], [_literal(name) for name in above])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK)
    axes.tick_params(axis="x", labelrotation=90 if upright else 0)
    axes.spines[:].set_visible(False)
    return figure


def _frame(axes: Axes, row: int, column: int, width: int) -> None:
    """Around cells of a matrix."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column, row), width, 1, fill=False, edgecolor="#E69F00", lw=2.5))


# ---- calibration, corruptions, splits --------------------------------------------------------------------------------


def reliability(bins_by_split: Mapping[str, Sequence[ReliabilityBin]]) -> Figure:
    """How often a model is right against how sure it is, a panel for each split; on the diagonal it is calibrated.

    Raises:
        ValueError: there is no split.

    Example:
        >>> reliability({"news": [ReliabilityBin(0.9, 0.8, 50)]}).axes[0].get_title(loc="left")
        'news\\ncalibration error 0.100'
    """
    figure, panels = _panels(list(bins_by_split), 2.05, share_x=True)
    for (name, bins), axes in zip(bins_by_split.items(), panels, strict=True):
        used = [one for one in bins if one.count]
        total = sum(one.count for one in used)
        axes.plot([0, 1], [0, 1], ":", color=_SOFT, lw=1.3)
        axes.vlines(
            [one.confidence for one in used],
            [one.confidence for one in used],
            [one.accuracy for one in used],
            color=STYLES[1].colour,
            lw=2.2,
        )
        areas = [10 + 110 * one.count / total for one in used]
        xs, ys = [one.confidence for one in used], [one.accuracy for one in used]
        axes.scatter(xs, ys, s=areas, color=STYLES[0].colour, edgecolor="white", linewidth=0.6, zorder=3, clip_on=False)
        error = sum(one.count * abs(one.accuracy - one.confidence) for one in used) / total if total else math.nan
        _head(axes, name, f"calibration error {error:.3f}" if total else "no example", panels)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    figure.supxlabel("confidence (larger dots: more examples)", fontsize=_NORMAL, color=_INK)
    figure.supylabel("share that is right", fontsize=_NORMAL, color=_INK)
    return figure


def severities(curves: Mapping[str, Mapping[int, Interval | Estimate]], axis: str = "accuracy") -> Figure:
    """A score against the severity of a corruption, 0 for clean rows.

    Up to four curves share one panel; more have a panel each, with the others behind in grey.

    Args:
        curves: by corruption, or by method: figure by severity.
        axis: what the score is.

    Raises:
        ValueError: there is no curve.

    Example:
        >>> severities({"typos": {0: Estimate(0.9, 0.88, 0.92), 3: Estimate(0.8, 0.77, 0.83)}}).axes[0].get_ylabel()
        'accuracy'
    """
    looks = styles(list(curves))
    apart = len(curves) > 4
    if apart:
        figure, panels = _panels(list(curves), 1.75, share_x=True)
    else:
        if not curves:
            raise ValueError("a picture of severities needs at least one curve")
        figure = _figure(4.0, legend=list(curves))
        panels = [_bare(figure.subplots(), grid="y")] * len(curves)
    for place, ((name, style), axes) in enumerate(zip(looks.items(), panels, strict=True)):
        if apart:
            for other in curves.values():
                axes.plot(sorted(other), [_bounds(other[step])[0] for step in sorted(other)], color=_FAINT, lw=1.2)
            _head(axes, name, "", panels)
        steps = sorted(curves[name])
        # Intervals of several curves would lie on each other.
        shifted = [step + (0 if apart else 0.07 * (place - (len(curves) - 1) / 2)) for step in steps]
        middles = [_bounds(curves[name][step])[0] for step in steps]
        mark: dict[str, Any] = {
            "marker": style.marker,
            "ms": 6,
            "mec": "white",
            "mew": 0.6,
            "ls": style.line,
            "lw": 1.6,
        }
        axes.errorbar(
            shifted,
            middles,
            yerr=_arms([curves[name][step] for step in steps]),
            color=style.colour,
            capsize=2.5,
            label=_label(name),
            **mark,
        )
    for axes in dict.fromkeys(panels):
        axes.set_xticks(sorted({step for curve in curves.values() for step in curve}))
    if apart:
        figure.supxlabel("severity (0: clean)", fontsize=_NORMAL, color=_INK)
        figure.supylabel(_literal(axis), fontsize=_NORMAL, color=_INK)
    else:
        _labels(panels[0], "severity (0: clean)", axis)
        _legend(figure, *panels[0].get_legend_handles_labels())
    return figure


def split_bars(scores: Mapping[str, Mapping[str, Interval | Estimate]], axis: str = "accuracy") -> Figure:
    """Each split's score with its interval, grouped by split.

    Up to four series are bars from 0 with their figures. More would be as thin as lines: they are dots, on an axis that
    need not begin at 0.

    Args:
        scores: by series (a method, or "before" and "after"): figure by split. A series may lack a split.
        axis: what the score is.

    Raises:
        ValueError: there is no figure.

    Example:
        >>> figure = split_bars({"before": {"news": Estimate(0.8, 0.7, 0.9)}, "after": {"news": Estimate(0.9, 0.8, 1)}})
        >>> len(figure.axes[0].patches), figure.axes[0].get_yticklabels()[0].get_text()
        (2, 'news')
    """
    names = list(dict.fromkeys(chain(*scores.values())))
    if not names:
        raise ValueError("a picture of splits needs at least one figure")
    bars = len(scores) <= 4
    labels = [wrapped(name, 170, _SMALL) for name in names]
    step = 15.0 if bars else 9.0
    group = max(step * len(scores), _LINE * max(map(_lines, labels))) + 10
    figure = _figure((group * len(names) + 50) / _INCH, legend=list(scores) if len(scores) > 1 else ())
    axes = _bare(figure.subplots(), grid="x")
    for place, (name, style) in enumerate(styles(list(scores)).items()):
        found = [(row, scores[name][split]) for row, split in enumerate(names) if split in scores[name]]
        heights = [row + (place - (len(scores) - 1) / 2) * step / group for row, _ in found]
        draw = _draw_bars if bars else _draw_dots
        draw(axes, heights, [one for _, one in found], name, style, step / group)
    for row in range(1, len(names)) if len(scores) > 1 else ():
        axes.axhline(row - 0.5, color=_FAINT, lw=0.7)
    axes.set_yticks(range(len(names)), [_literal(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    reached = [end for series in scores.values() for one in series.values() for end in _bounds(one) if end is not None]
    low, high = _limits(reached)
    room = 0.12 * (max(high, 0.0) - min(low, 0.0))  # for the figures
    axes.set_xlim((min(low, 0.0), max(high, 0.0) + room) if bars else (low, high))
    _labels(axes, axis, "")
    if len(scores) > 1:
        _legend(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_bars(
    axes: Axes, heights: list[float], figures: list[Interval | Estimate], name: str, style: Style, step: float
) -> None:
    look: dict[str, Any] = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.4}
    error = {"ecolor": _INK, "elinewidth": 1.1, "capsize": 2}
    middles = [_bounds(one)[0] for one in figures]
    axes.barh(heights, middles, height=0.86 * step, xerr=_arms(figures), error_kw=error, label=_label(name), **look)
    for height, one in zip(heights, figures, strict=True):
        end = max([0.0, *(end for end in _bounds(one) if end is not None and math.isfinite(end))])
        text = f"{_bounds(one)[0]:.3f}".replace("-", _MINUS)
        beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 0), "va": "center"}
        axes.annotate(text, (end, height), fontsize=_SMALL, color=_INK, **beside)


def _draw_dots(
    axes: Axes, heights: list[float], figures: list[Interval | Estimate], name: str, style: Style, step: float
) -> None:
    look: dict[str, Any] = {
        "fmt": style.marker,
        "color": style.colour,
        "ms": 5,
        "elinewidth": 1.3,
        "label": _label(name),
    }
    axes.errorbar([_bounds(one)[0] for one in figures], heights, xerr=_arms(figures), **look)


# ---- diagnosis and repair --------------------------------------------------------------------------------------------


def layer_scores(
    values: Sequence[Sequence[float | None]],
    groups: Sequence[str],
    scores: Sequence[str],
    chosen: Collection[str] = (),
) -> Figure:
    """Scores of layer groups: a row for each group, a column for each score, every column with a scale of its own.

    Args:
        values: `[groups][scores]`, not below 0; None or NaN where nothing was measured. The darkest cell of a column is
            its largest value.
        groups: their names, in the order of the model.
        scores: their names.
        chosen: groups with a frame around their row.

    Raises:
        ValueError: `values` is empty, or does not have a row for each group and a column for each score.

    Example:
        >>> figure = layer_scores([[2.0, 1e-5], [1.0, None]], ["block.0", "head"], ["contrast", "rms"], ["head"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['2.00', '1.00e−5', '1.00', '–']
    """
    if not groups or not scores or [len(row) for row in values] != [len(scores)] * len(groups):
        shape = f"{len(values)} rows of {sorted({len(row) for row in values})}"
        raise ValueError(f"values of layer scores must be {len(groups)} rows of {len(scores)}, got {shape}")
    known = [[math.nan if value is None else value for value in row] for row in values]
    largest = [max(filter(math.isfinite, column), default=0.0) for column in zip(*known, strict=True)]
    figure = _matrix(
        [[_share(value, top) for value, top in zip(row, largest, strict=True)] for row in known],
        [[significant(value) for value in row] for row in known],
        groups,
        scores,
        low_row=18.0,
    )
    for place, group in enumerate(groups):
        if group in chosen:
            _frame(figure.axes[0], place, 0, len(scores))
    said = "darker is larger; every column has its own scale, from 0 to its largest value"
    figure.axes[0].set_xlabel(said + ("; framed: chosen" if chosen else ""), fontsize=_SMALL, color=_SOFT, loc="left")
    return figure


def _share(value: float, largest: float) -> float | None:
    if not math.isfinite(value):
        return None
    return min(1.0, max(0.0, value / largest)) if largest > 0 else 0.0


def flips(counts: Mapping[str, tuple[int, int, int]], unit: str = "prediction") -> Figure:
    """How many predictions became right and how many became wrong: bars to both sides of 0, a row for each split.

    Args:
        counts: by split: fixed, broken, and all predictions. Bars are shares of all, so that splits can be compared.
        unit: what one of them is.

    Raises:
        ValueError: there is no split.

    Example:
        >>> figure = flips({"verification": (31, 12, 1000)})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['31 fixed', '12 broken']
    """
    if not counts:
        raise ValueError("a picture of flips needs at least one split")
    labels = [wrapped(name, 170, _SMALL) for name in counts]
    row = max(26.0, _LINE * max(map(_lines, labels)) + 8)
    figure = _figure((row * len(labels) + 80) / _INCH)
    axes = _bare(figure.subplots(), grid="x")
    fixed = [100 * better / max(total, 1) for better, _, total in counts.values()]
    broken = [100 * worse / max(total, 1) for _, worse, total in counts.values()]
    places = range(len(labels))
    hollow: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4, "height": 0.62}
    axes.barh(places, fixed, color=STYLES[0].colour, hatch=STYLES[0].hatch, label="fixed", **hollow)
    axes.barh(
        places, [-share for share in broken], color=STYLES[1].colour, hatch=STYLES[1].hatch, label="broken", **hollow
    )
    net = [better - worse for better, worse in zip(fixed, broken, strict=True)]
    axes.plot(net, places, "D", ms=6.5, mfc="white", mec=_INK, mew=1.4, ls="none", label="net", zorder=3)
    for place, (better, worse, _) in zip(places, counts.values(), strict=True):
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": _SMALL, "color": _INK}
        axes.annotate(f"{better:,} fixed", (fixed[place], place), xytext=(9, 0), ha="left", **beside)
        axes.annotate(f"{worse:,} broken", (-broken[place], place), xytext=(-9, 0), ha="right", **beside)
    axes.axvline(0, color=_INK, lw=1, zorder=2)
    axes.set_yticks(list(places), [_literal(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    span = (max(fixed) + max(broken)) or 1.0  # for the words at both ends
    axes.set_xlim(-max(broken) - 0.3 * span, max(fixed) + 0.3 * span)
    axes.xaxis.set_major_formatter(lambda share, _: f"{abs(share):g}")
    _labels(axes, f"% of all {unit}s: broken to the left, fixed to the right", "")
    handles, names = axes.get_legend_handles_labels()  # lines stand before bars
    figure.legend([*handles[1:], handles[0]], [*names[1:], names[0]], loc="outside upper left", ncols=3, **_LEGEND)
    return figure


def mixture_path(points: Sequence[tuple[float, float, float]], chosen: float, unit: str = "prediction") -> Figure:
    """Validation on the way from the old weights to the new ones: the net gain, and the loss beside it.

    Args:
        points: triples of the share of the new weights, the net gain there, and the loss in nats.
        chosen: the share that was taken.
        unit: what one prediction is.

    Raises:
        ValueError: there is no point.

    Example:
        >>> figure = mixture_path([(0.0, 0, 0.9), (0.5, 8, 0.7), (1.0, 5, 0.8)], 0.5)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['net gain (predictions)', 'loss (nats per prediction)']
    """
    if not points:
        raise ValueError("a picture of a path between weights needs at least one point")
    path = sorted(points)
    figure = _figure(2.9)
    names = (f"net gain ({unit}s)", f"loss (nats per {unit})")
    for axes, name, which, style in zip(figure.subplots(1, 2), names, (1, 2), STYLES, strict=False):
        _bare(axes, grid="y")
        shares, values = [point[0] for point in path], [point[which] for point in path]
        axes.plot(shares, values, style.line, color=style.colour, marker="o", ms=5, mfc="white", mew=1.3, label="tried")
        taken = [point for point in path if math.isclose(point[0], chosen, abs_tol=1e-9)]
        axes.plot(
            [point[0] for point in taken],
            [point[which] for point in taken],
            "D",
            ms=9,
            color=_INK,
            ls="none",
            label="chosen",
            zorder=3,
        )
        axes.set(xlim=(-0.05, 1.05), ylim=_limits([*values, 0.0] if which == 1 else values))
        _labels(axes, "share of the new weights", name)
        if which == 1:
            axes.axhline(0, color=_INK, lw=1, zorder=1)
    figure.legend(
        [_mark("o", "white", _SOFT), _mark("D", _INK, _INK)],
        ["tried", "chosen"],
        loc="outside upper left",
        ncols=2,
        **_LEGEND,
    )
    return figure


def score_against_gain(
    points: Mapping[str, Sequence[tuple[float, float, bool]]], x: str = "score", y: str = "net gain"
) -> Figure:
    """What retraining a single layer group gained against the score that it had before.

    Args:
        points: by series, such as a seed: for each group its score, its net gain, and whether it was chosen.
        x, y: labels of the axes.

    Raises:
        ValueError: there is no point.

    Example:
        >>> figure = score_against_gain({"seed 0": [(2.1, 9.0, True), (1.2, 3.0, False)]}, x="contrast")
        >>> figure.axes[0].get_xlabel()
        'contrast'
    """
    everything = list(chain(*points.values()))
    if not everything:
        raise ValueError("a picture of scores and gains needs at least one point")
    marks = [_mark("o", _SOFT, _SOFT), _mark("o", "white", _SOFT)]
    figure = _figure(4.2, legend=[*points, "", "", ""])
    axes = _bare(figure.subplots(), grid="both")
    axes.axhline(0, color=_INK, lw=1, zorder=1)
    handles: list[Artist] = []
    for (_, series), style in zip(points.items(), styles(list(points)).values(), strict=True):
        look: dict[str, Any] = {"ls": "none", "marker": style.marker, "ms": 6.5, "mec": style.colour, "mew": 1.4}
        for taken, face in ((False, "white"), (True, style.colour)):
            shown = [(score, gain) for score, gain, chosen in series if chosen == taken]
            axes.plot([score for score, _ in shown], [gain for _, gain in shown], mfc=face, zorder=2 + taken, **look)
        handles.append(_mark(style.marker, style.colour, style.colour))
    scores = [score for score, _, _ in everything if math.isfinite(score)]
    axes.set_ylim(_limits([0.0, *(gain for _, gain, _ in everything)]))
    if scores and min(scores) > 0 and max(scores) > 100 * min(scores):
        axes.set_xscale("log")
    else:
        axes.set_xlim(_limits(scores))
    _labels(axes, x, y)
    _legend(figure, [*handles, *marks], [*points, "filled: chosen", "hollow: not chosen"])
    return figure


# ---- layers of a model -----------------------------------------------------------------------------------------------


def layer_heat_map(
    values: Sequence[Sequence[float | None]],
    groups: Sequence[str],
    steps: Sequence[int],
    axis: str,
    logarithmic: bool = True,
) -> Figure:
    """A quantity of every layer group over training: a row for each group, a column for each logged step.

    Args:
        values: `[groups][steps]`; a place where nothing finite was measured is hatched. A darker cell is larger.
        groups: names, from the input of the model to its output.
        steps: in the order of the columns, which are equally wide however far the steps are apart.
        axis: what the values are.
        logarithmic: whether equal factors are equal differences of shade; 0 then has that of the smallest other value.

    Raises:
        ValueError: `values` is empty, or does not have a row for each group and a column for each step.

    Example:
        >>> figure = layer_heat_map([[1.0, 2.0], [0.1, None]], ["embeddings", "head"], [10, 20], "norm of the gradient")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['embeddings', 'head']
    """
    from matplotlib.colors import LogNorm, Normalize

    rows = _layer_rows(values, groups, steps)
    known = [value for row in rows for value in row if math.isfinite(value) and (value > 0 or not logarithmic)]
    low, high = min(known, default=1.0), max(known, default=1.0)
    if logarithmic:
        rows = [[max(value, low) for value in row] for row in rows]
        norm: Any = LogNorm(low, high if high > low else 1.01 * low)
    else:
        norm = Normalize(min(low, 0.0), max(high, 1.0))
    beside = [wrapped(name, 260, _SMALL) for name in groups]
    tall = max(_LINE * max(map(_lines, beside)) + 1, 130 / len(groups))
    figure = _figure((tall * len(groups) + 75) / _INCH)
    axes = figure.subplots()
    axes.patch.set(facecolor="white", edgecolor=_FAINT, hatch="////")
    ends = ([column - 0.5 for column in range(len(steps) + 1)], [row - 0.5 for row in range(len(groups) + 1)])
    mesh = axes.pcolormesh(*ends, rows, cmap=_shades(), norm=norm, rasterized=True)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [_literal(name) for name in beside])
    places = _few(len(steps), 8)
    axes.set_xticks(places, [str(steps[place]) for place in places])
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    _labels(axes, "step", "")
    height = tall * len(groups)
    shrink = min(1.0, 300 / height)  # beside the first rows of a long picture
    bar = figure.colorbar(mesh, ax=axes, shrink=shrink, anchor=(0.0, 1.0), pad=0.02, aspect=shrink * height / 9)
    bar.set_label(_literal(axis), fontsize=_NORMAL, color=_INK)
    _quiet_bar(bar)
    return figure


def layer_curves(
    values: Mapping[str, Sequence[Sequence[float | None]]],
    groups: Sequence[str],
    steps: Sequence[int],
    linear: Collection[str] = (),
) -> Figure:
    """Quantities of every layer group over training, a panel for each quantity.

    Up to six groups have the looks of `styles`. More have a shade by their place in the model, from dark at the input
    to light at the output; which curve is which of two neighbours is for `layer_heat_map` to say.

    Args:
        values: by what they are, which is the label of the panel's axis: `[groups][steps]`; a curve has a gap where
            nothing finite was measured.
        groups: names, from the input of the model to its output.
        steps: at which they were measured.
        linear: the quantities whose axis is not logarithmic but from 0 to 1.

    Raises:
        ValueError: there is no quantity, or one does not have a row for each group and a column for each step.

    Example:
        >>> norms = [[1.0, 2.0], [0.1, 0.2]]
        >>> figure = layer_curves({"norm of the gradient": norms}, ["embeddings", "head"], [10, 20])
        >>> figure.axes[0].get_ylabel()
        'norm of the gradient'
    """
    if not values:
        raise ValueError("a picture of layers needs at least one quantity")
    from matplotlib.ticker import MaxNLocator

    tables = {name: _layer_rows(rows, groups, steps) for name, rows in values.items()}
    few = len(groups) <= 6
    figure = _figure(0.6 + 2.3 * len(tables), legend=list(groups) if few else ())
    panels = [_bare(axes, grid="y") for axes in figure.subplots(len(tables), squeeze=False, sharex=True).flat]
    for (name, rows), axes in zip(tables.items(), panels, strict=True):
        if name in linear:
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_yscale("log")
            axes.tick_params(axis="y", which="minor", labelsize=_SMALL, color=_SOFT, labelcolor=_INK)
            rows = [[value if value > 0 else math.nan for value in row] for row in rows]
        for place, (group, row) in enumerate(zip(groups, rows, strict=True)):
            style = STYLES[place % len(STYLES)]
            look: dict[str, Any] = {
                "color": style.colour,
                "ls": style.line,
                "marker": style.marker,
                "ms": 4.5,
                "lw": 1.5,
            }
            look |= {"mec": "white", "mew": 0.5, "markevery": max(1, len(steps) // 12)}
            if not few:
                look = {"color": _depths()(place / (len(groups) - 1)), "lw": 1.1}
            alone = all(math.isnan(value) for value in row[::2]) or all(math.isnan(value) for value in row[1::2])
            axes.plot(steps, row, label=_label(group), **(look | ({"marker": "o", "ms": 4} if alone else {})))
        if not any(math.isfinite(value) for row in rows for value in row):
            axes.set_yticks([])
        axes.set_ylabel(_literal(wrapped(name, 150, _NORMAL)), fontsize=_NORMAL, color=_INK)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _labels(panels[-1], "step", panels[-1].get_ylabel())
    if few:
        _legend(figure, *panels[0].get_legend_handles_labels())
    else:
        _depth_bar(figure, panels, groups)
    return figure


def _layer_rows(
    values: Sequence[Sequence[float | None]], groups: Sequence[str], steps: Sequence[int]
) -> list[list[float]]:
    """The same with NaN for what is not finite, checked for its shape."""
    if not groups or not steps or [len(row) for row in values] != [len(steps)] * len(groups):
        shape = f"{len(values)} rows of {sorted({len(row) for row in values})}"
        raise ValueError(f"values of layers must be {len(groups)} rows of {len(steps)}, got {shape}")
    return [[value if value is not None and math.isfinite(value) else math.nan for value in row] for row in values]


def _few(count: int, most: int) -> list[int]:
    """Places in a list, about equally far apart and `most` at most, the first and the last among them.

    Example:
        >>> _few(5, 8), _few(20, 5), _few(1, 5)
        ([0, 1, 2, 3, 4], [0, 5, 10, 14, 19], [0])
    """
    shown = min(count, most)
    return [round(place * (count - 1) / max(shown - 1, 1)) for place in range(shown)]


def _shades() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blues", ["#eef5fb", "#62aedb", "#0b5c94", "#06263f"])


def _depths() -> Colormap:
    """From dark to light, and from blue to orange; every shade can be seen on white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("depths", ["#1b1147", "#6b1d81", "#c83e73", "#f7a35c"])


def _depth_bar(figure: Figure, panels: Sequence[Axes], groups: Sequence[str]) -> None:
    """Which shade is which group: a bar with the names of some."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(0, len(groups) - 1), _depths()), ax=list(panels), fraction=0.03, pad=0.02, aspect=40
    )
    bar.ax.invert_yaxis()  # the input above, as in the heat map
    shown = [wrapped(group, _NAME_ROOM, _SMALL) for group in groups]
    # What a name needs of the bar, which is nearly as high as the figure.
    room = (_INCH * figure.get_figheight() - 50) / (_LINE * max(map(_lines, shown)) + 2)
    places = _few(len(groups), max(2, min(16, int(room))))
    bar.set_ticks(places, labels=[_literal(shown[place]) for place in places])
    _quiet_bar(bar)


def _quiet_bar(bar: Colorbar) -> None:
    bar.ax.tick_params(which="both", labelsize=_SMALL, color=_SOFT, labelcolor=_INK)
    bar.outline.set_visible(False)


# ---- what all of them share ------------------------------------------------------------------------------------------

_LEGEND: dict[str, Any] = {
    "fontsize": _SMALL,
    "frameon": False,
    "labelcolor": _INK,
    "handlelength": 2.6,
    "borderaxespad": 0.2,
}
_NAME_ROOM = 140.0  # points for a name in the legend


def wrapped(text: str, room: float, size: float) -> str:
    """The text in lines no wider than `room`, cut at spaces, `_`, `-`, `/` and `.`, or anywhere if it must be.

    Args:
        text: any.
        room: in points.
        size: of the font, in points.

    Example:
        >>> wrapped("amazon_reviews_electronics", 80, 8.5).split()
        ['amazon_reviews_', 'electronics']
    """
    lines = [""]
    for word in re.findall(r"[^\s_/.-]*[\s_/.-]|[^\s_/.-]+", " ".join(text.split())):
        if lines[-1] and _width((lines[-1] + word).rstrip(), size) > room:
            lines.append("")
        for letter in word:
            if lines[-1] and _width((lines[-1] + letter).rstrip(), size) > room:
                lines.append("")
            lines[-1] += letter
    return "\n".join(line.strip() for line in lines)


def lightness(colour: str) -> float:
    """L* of CIELAB, from 0 for black to 100 for white, of a colour such as "#0072B2".

    Example:
        >>> round(lightness("#ffffff")), round(lightness("#0072B2"))
        (100, 46)
    """
    shares = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    luminance = sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 216 / 24389 else luminance * 24389 / 27


@cache
def _width(text: str, size: float) -> float:
    """In points, in the font that Matplotlib brings along; few others are wider."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0])


def _widest(texts: Iterable[str]) -> float:
    return max(_width(line, _SMALL) for text in texts for line in text.split("\n"))


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _literal(text: str) -> str:
    """For Matplotlib, which would set what stands between dollars as mathematics."""
    return text.replace("$", r"\$")


def _figure(height: float, width: float = _WIDTH, legend: Sequence[str] = ()) -> Figure:
    """A figure of so many inches, or as high as its legend needs."""
    from matplotlib.figure import Figure

    lines = sum(_lines(wrapped(name, _NAME_ROOM, _SMALL)) for name in legend)
    figure = Figure(figsize=(width, max(height, (lines * _LINE + 5 * len(legend) + 20) / _INCH)), layout="constrained")
    return figure


def _bare(axes: Axes, grid: str) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.grid(axis=grid, color=_FAINT, lw=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_SMALL, color=_SOFT, labelcolor=_INK)
    return axes


def _panels(names: Sequence[str], height: float, share_x: bool) -> tuple[Figure, list[Axes]]:
    """A panel for each name, up to four beside each other; their scores share one axis."""
    if not names:
        raise ValueError("a picture of panels needs at least one series")
    rows = math.ceil(len(names) / 4)
    columns = math.ceil(len(names) / rows)
    heads = max(_lines(wrapped(name, _PANEL_ROOM, _SMALL)) for name in names)
    figure = _figure(rows * (height + (heads + 1) * _LINE / _INCH) + 0.6, width=0.6 + 2.05 * max(columns, 2))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=share_x)
    panels = [_bare(axes, grid="y") for axes in grid.flat]
    for axes in panels[len(names) :]:
        axes.remove()
    if share_x:  # what hangs over an empty place shows its ticks
        for axes in panels[max(0, len(names) - columns) : len(names)]:
            axes.tick_params(labelbottom=True)
    return figure, panels[: len(names)]


_PANEL_ROOM = 122.0  # points for a line above a panel


def _head(axes: Axes, name: str, told: str, panels: Sequence[Axes]) -> None:
    text = wrapped(name, _PANEL_ROOM, _SMALL) + (f"\n{told}" if told else "")
    axes.set_title(_literal(text), fontsize=_SMALL, color=_INK, loc="left")


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(_literal(x), fontsize=_NORMAL, color=_INK)
    axes.set_ylabel(_literal(y), fontsize=_NORMAL, color=_INK)


def _label(name: str) -> str:
    """For a legend: Matplotlib leaves out names that begin with `_`."""
    return f" {name}" if name.startswith("_") else name


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Beside the axes."""
    shown = [_label(_literal(wrapped(name, _NAME_ROOM, _SMALL))) for name in names]
    figure.legend(handles, shown, loc="outside right upper", labelspacing=0.6, **_LEGEND)


def _mark(marker: str, face: str, edge: str) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="none", marker=marker, mfc=face, mec=edge, mew=1.4, ms=6.5)


def _bounds(one: Interval | Estimate) -> tuple[float, float | None, float | None]:
    """Middle and ends of a figure. What is not finite, such as an exploded perplexity, becomes NaN or no end."""
    middle = one.mean if isinstance(one, Interval) else one.value
    low, high = (end if end is not None and math.isfinite(end) else None for end in (one.low, one.high))
    return (middle if math.isfinite(middle) else math.nan), low, high


def _arms(figures: Sequence[Interval | Estimate]) -> list[list[float]]:
    """Lengths below and above, 0 where the interval is not known."""
    triples = [_bounds(one) for one in figures]
    below = [max(0.0, middle - low) if low is not None else 0.0 for middle, low, _ in triples]
    return [below, [max(0.0, high - middle) if high is not None else 0.0 for middle, _, high in triples]]


def _limits(values: Iterable[float]) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    pad = max(0.07 * (high - low), 0.002 * max(abs(low), abs(high)), 1e-9)
    return low - pad, high + pad


def _signed(one: Interval | Estimate, digits: int) -> str:
    def shown(value: float) -> str:
        return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", _MINUS)  # -0.0 + 0.0 is 0.0

    middle, low, high = _bounds(one)
    return f"{shown(middle)} " + (
        f"[{shown(low)}, {shown(high)}]" if low is not None and high is not None else "[one seed]"
    )
