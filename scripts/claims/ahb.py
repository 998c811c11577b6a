"""How large a learning rate AHB bears, beside SGD with momentum at the same and at a matched one (arXiv 2110.09057).

    python scripts/claims/ahb.py                 digits, some minutes on one core
    python scripts/claims/ahb.py --size gpu      CIFAR-10 and ResNet-18

AHB-SGD, SGD with momentum 0.9 and plain SGD run over the same learning rates, three to a decade, from where all learn
slowly to where all diverge; with minibatches and with (nearly) full batches. A range of learning rates is as wide when
each is divided by ten: only its width, in decades, and the accuracy at a matched rate can show robustness.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common import ROOT, Lab, Setting, arguments, in_distribution, laboratory, validation_loss
from page import Program, keep
from pictures import Panel, draw
from rows import Row, means, versus

from hf_momentum.evaluation.tuning import best, rung

PICTURE = ROOT / "docs" / "images" / "claims_ahb.png"
RUNGS = range(-9, 6)  # learning rates 10^(-3) to 10^(5/3)
SEEDS = 8
WITHIN = 2.0  # points of accuracy below an optimizer's best that count as being as good
METHODS = {"AHB": ("ahb", {}), "SGD 0.9": ("sgd", {"momentum": 0.9}), "plain SGD": ("sgd", {})}


def learning_rate(index: int) -> float:
    """Three to a decade.

    Example:
        >>> learning_rate(-3), learning_rate(0)
        (0.1, 1.0)
    """
    return rung(1.0, 10 ** (1 / 3), index)


def width(accuracies: Sequence[float]) -> float:
    """Decades of learning rates without a gap around the best one that are within WITHIN points of it.

    Example:
        >>> width([50.0, 97.0, 98.0, 96.5, 10.0, 97.5])
        1.0
    """
    top = max(range(len(accuracies)), key=accuracies.__getitem__)
    first = last = top
    while first > 0 and accuracies[first - 1] >= accuracies[top] - WITHIN:
        first -= 1
    while last + 1 < len(accuracies) and accuracies[last + 1] >= accuracies[top] - WITHIN:
        last += 1
    return (last - first + 1) / 3


def program(lab: Lab) -> Program:
    """Run the grids, select on the tuning seeds, and compare."""
    lab = lab.fewer(SEEDS)
    rows, facts, panels = [], [], []
    for regime, batch, steps in (
        ("minibatch", lab.size.batch, lab.size.steps),
        ("full batch", lab.size.large_batch, lab.size.large_steps),
    ):
        common = {"batch": batch, "steps": steps, "model": "mlp" if lab.size.task == "digits" else lab.size.model}
        grids = {name: _grid(lab, method, {**options, **common}) for name, (method, options) in METHODS.items()}
        where = f"{regime} ({batch})"
        setting = f"{lab.size.task}, {common['model']}, {steps} steps of {batch}"
        found = {name: [_accuracies(lab, setting) for setting in grid] for name, grid in grids.items()}
        for name, table in found.items():
            by_rate = ", ".join(
                f"{s.lr:.3g}: {statistics.fmean(a):.1f}" for s, a in zip(grids[name], table, strict=True)
            )
            facts.append(f"Accuracy of {name} by learning rate, {where}: {by_rate}")
        panels.append(_panel(where, grids, found))
        chosen = {name: _selected(lab, grid) for name, grid in grids.items()}
        facts.append(
            f"Selected, {where}: " + ", ".join(f"{name} {grids[name][i].lr:.3g}" for name, i in chosen.items())
        )
        facts += [f"{name}, {where}: the selected one is AT AN END" for name, i in chosen.items() if _at_end(i)]
        rows += [
            _large(lab, where, setting, grids, found, chosen["SGD 0.9"], facts),
            _wide(where, setting, found, facts),
            _tuned(where, setting, found, chosen, facts),
        ]
    if lab.size.name == "small":
        draw(panels, PICTURE)
    return Program("ahb", lab.size.name, rows, facts)


def _grid(lab: Lab, method: str, given: Mapping[str, object]) -> list[Setting]:
    return [lab.size.setting(method, learning_rate(index), **given) for index in RUNGS]


def _accuracies(lab: Lab, setting: Setting) -> list[float]:
    return [in_distribution(run, "accuracy") for run in lab.results(setting)]


def _selected(lab: Lab, grid: Sequence[Setting]) -> int:
    losses = {s.lr: statistics.fmean(map(validation_loss, lab.tuning_results(s))) for s in grid}
    return [s.lr for s in grid].index(best(losses) or grid[0].lr)


Found = Mapping[str, Sequence[Sequence[float]]]


def _at_end(index: int) -> bool:
    return index in (0, len(RUNGS) - 1)


def _panel(where: str, grids: Mapping[str, list[Setting]], found: Found) -> Panel:
    rates = [setting.lr for setting in grids["AHB"]]
    means_by_name = {name: [statistics.fmean(accuracies) for accuracies in table] for name, table in found.items()}
    series = {name: (rates, values) for name, values in means_by_name.items()}
    series["SGD 0.9 at a tenth of it"] = (rates[3:], means_by_name["SGD 0.9"][:-3])
    return Panel(where, "learning rate", "test accuracy (%)", series, log_x=True)


def _large(
    lab: Lab,
    where: str,
    setting: str,
    grids: Mapping[str, list[Setting]],
    found: Found,
    tuned: int,
    facts: list[str],
) -> Row:
    large = min(tuned + 3, len(RUNGS) - 1)
    ours = grids["AHB"][large]
    # SGD with momentum 0.9 has ten times the effective rate of a plain step.
    matched = replace(grids["SGD 0.9"][large], lr=ours.lr * lab.mean_gain(ours) / 10)
    values = found["AHB"][large]
    others = {
        "SGD 0.9 at a tenth of it (its tuned one)": ("control", found["SGD 0.9"][large - 3]),
        "SGD 0.9 at the measured effective learning rate": ("control", _accuracies(lab, matched)),
        "SGD 0.9 at the same": ("untuned", found["SGD 0.9"][large]),
    }
    listed = {"AHB": values} | {name: other for name, (_, other) in others.items()}
    facts.append(
        f"At learning rate {ours.lr:.3g}, {where}, measured match {matched.lr:.3g}: {means('percent', listed)}"
    )
    claim = f"AHB bears ten times SGD 0.9's learning rate, {where}"
    return Row(claim, setting, "accuracy at the end", "points", versus(values, others))


def _wide(where: str, setting: str, found: Found, facts: list[str]) -> Row:
    widths = {name: [width(accuracies) for accuracies in zip(*table, strict=True)] for name, table in found.items()}
    facts.append(f"Decades within {WITHIN:g} points of the best, {where}: {means('decades', widths)}")
    others = {"SGD 0.9": ("baseline", widths["SGD 0.9"]), "plain SGD": ("control", widths["plain SGD"])}
    claim = f"AHB has a wider range of good learning rates, {where}"
    figure = f"decades within {WITHIN:g} points of its best"
    return Row(claim, setting, figure, "decades", versus(widths["AHB"], others))


def _tuned(where: str, setting: str, found: Found, chosen: Mapping[str, int], facts: list[str]) -> Row:
    values = {name: found[name][index] for name, index in chosen.items()}
    facts.append(f"Tuned, {where}: {means('percent', values)}")
    others = {
        "SGD 0.9, tuned": ("baseline", values["SGD 0.9"]),
        "plain SGD, tuned": ("control", values["plain SGD"]),
        "SGD 0.9 at AHB's learning rate": ("untuned", found["SGD 0.9"][chosen["AHB"]]),
    }
    claim = f"AHB generalises better, each at its own learning rate, {where}"
    return Row(claim, setting, "accuracy at the end", "points", versus(values["AHB"], others))


if __name__ == "__main__":
    args = arguments("ahb", None)
    keep(program(laboratory("ahb", args)), args.json)
