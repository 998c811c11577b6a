"""The pictures of a report. Colours are told apart in grey too, and every axis says what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_momentum.evaluation.report import Report

# Dark blue, orange and teal of the Okabe-Ito palette: distinct to colour-blind readers and of different lightness.
DARK, WARM, COOL = "#0072B2", "#E69F00", "#009E73"

# Quantities that optimizers report, with the words and range of their axis.
DYNAMICS: dict[str, tuple[str, tuple[float, float] | None]] = {
    "cosine": ("cosine of m and g", (-1.05, 1.05)),
    "damping": ("damping factor d", (-0.05, 1.05)),
    "curvature": ("curvature l", None),
    "beta": ("momentum beta", (-0.05, 1.05)),
    "mu": ("momentum mu", (-0.05, 1.05)),
    "damping_ratio": ("damping ratio", None),
    "measured_curvature": ("curvature L", None),
    "lr_ratio": ("lr_t / lr", (-0.05, 1.05)),
    "momentum_norm": ("norm of m", None),
    "scheduled_momentum": ("scheduled momentum", (-0.05, 1.05)),
    "effective_lr": ("effective lr", None),
    "update_norm": ("norm of the update", None),
}


def draw_all(report: Report, folder: Path) -> list[tuple[str, Path]]:
    """Draw what the report has data for; returns pairs of caption and path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for caption, name, figure in (
        ("Each split before and after", "splits.png", splits_figure(report)),
        ("Loss over the steps", "loss.png", loss_figure(report.history, report.unit)),
        ("The optimizer's inner quantities over the steps", "dynamics.png", dynamics_figure(report.history)),
    ):
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            drawn.append((caption, folder / name))
    return drawn


def _figure(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 3.6) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False, sharex=rows > 1).flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    return figure


def splits_figure(report: Report) -> Figure | None:
    """Bars before and after for the first metric and accuracy, with intervals."""
    if not report.splits:
        return None
    first = report.splits[0]
    metrics = [metric for metric in ("loss", "accuracy") if metric in first.before]
    figure = _figure(1, len(metrics), width=3.6 * len(metrics) + 0.4)
    places = range(len(report.splits))
    for axes, metric in zip(figure.axes, metrics, strict=True):
        for offset, when, colour, hatch in ((-0.2, "before", WARM, "//"), (0.2, "after", DARK, "")):
            values = [getattr(split, when)[metric] for split in report.splits]
            axes.bar(
                [place + offset for place in places],
                [value.value for value in values],
                width=0.38,
                yerr=[[v.value - v.low for v in values], [v.high - v.value for v in values]],
                capsize=3,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=when,
            )
        axes.set_xticks(list(places), [f"{split.name}\n({split.role})" for split in report.splits], fontsize=8)
        axes.set_ylabel(f"loss (nats per {report.unit})" if metric == "loss" else report.label(metric))
    figure.axes[0].legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def loss_figure(history: Sequence[dict[str, float]], unit: str) -> Figure | None:
    """Training loss, and validation loss where it was evaluated."""
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not train:
        return None
    figure = _figure()
    axes = figure.axes[0]
    axes.plot(*zip(*train, strict=True), color=DARK, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=WARM, marker="o", linestyle="--", label="validation")
        axes.legend(frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss (nats per {unit})")
    return figure


def dynamics_figure(history: Sequence[dict[str, float]]) -> Figure | None:
    """One panel for each inner quantity that the optimizer logged."""
    logged = [name for name in DYNAMICS if any(name in entry for entry in history)]
    if not logged:
        return None
    figure = _figure(len(logged), 1, height=0.8 + 1.7 * len(logged))
    for axes, name, colour in zip(figure.axes, logged, cycle((DARK, COOL)), strict=False):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        label, limits = DYNAMICS[name]
        axes.plot(*zip(*points, strict=True), color=colour)
        axes.set_ylabel(label)
        if limits is not None:
            axes.set_ylim(*limits)
    figure.axes[-1].set_xlabel("optimizer step")
    return figure
