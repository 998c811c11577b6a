"""Line pictures of the page: one figure, some panels side by side, told apart by colour, dash and marker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Okabe and Ito's palette: distinct to colour-blind readers, and with the dashes and markers in grey too.
STYLES = (
    ("#0072B2", "-", "o"),
    ("#E69F00", "-", "s"),
    ("#E69F00", ":", "D"),
    ("#009E73", "-", "^"),
    ("#009E73", ":", "v"),
    ("#CC79A7", "--", "x"),
)


@dataclass(frozen=True)
class Panel:
    """One pair of axes: `series` has x and y by name; the same names, in the same order, in all panels."""

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_x: bool = False
    log_y: bool = False
    level: float | None = None
    y_limits: tuple[float, float] | None = None


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side, with one legend above them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, (x, y)), (colour, line, marker) in zip(panel.series.items(), STYLES, strict=False):
            axes.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=4, markevery=0.08, label=name)
        if panel.level is not None:
            axes.axhline(panel.level, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log" if panel.log_x else "linear")
        axes.set_yscale("log" if panel.log_y else "linear")
        if panel.y_limits is not None:
            axes.set_ylim(*panel.y_limits)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
