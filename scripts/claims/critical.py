"""Steps to a given accuracy under the critical law of momentum and its hybrid (arXiv 2603.28921).

    python scripts/claims/critical.py              digits, some minutes on one core
    python scripts/claims/critical.py --size gpu   CIFAR-10 and ResNet-18

The paper's levels are 90 % and 95 % on CIFAR-10, where its model ends at an error of about 5 %: twice the final error,
and little more than it. Here they are EARLY and LATE times the final validation error of a tuned constant 0.9. A run
that never gets there counts with all its steps. Accuracy is measured on the way, every `every` steps.

First as published, at learning rate 0.1 for all, with the two controls of equal effective rate; then everything tuned
for the number of steps itself, on validation data, with equal budgets.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common import ROOT, Lab, Setting, arguments, laboratory, tuning_facts
from page import Program, keep
from pictures import Panel, draw
from rows import Role, Row, means, versus

PICTURE = ROOT / "docs" / "images" / "claims_critical.png"
PUBLISHED = 0.1  # the learning rate of the paper
EARLY, LATE = 2.0, 1.2
SGD = "SGD 0.9"
# The laws of torch's SGD that are tuned; each gets its momentum from a MomentumSchedule, but for the constant.
LAWS = {"critical": "critical", "hybrid": "hybrid", SGD: None, "one-cycle": "onecycle", "demon": "demon"}


def steps_to(curve: list[list[float]], level: float, steps: int, column: int) -> int:
    """The first measured step with an accuracy of at least `level`; all of them if none has. Column 1: validation.

    Example:
        >>> steps_to([[10, 0.5, 0.4], [20, 0.9, 0.8]], 0.8, 100, 1), steps_to([[10, 0.5, 0.4]], 0.8, 100, 2)
        (20, 100)
    """
    return int(next((entry[0] for entry in curve if entry[column] >= level), steps))


def program(lab: Lab) -> Program:
    """Find the levels, tune for each, run, and compare."""
    candidates = {
        name: lab.size.setting("sgd", 0.05 if name == SGD else PUBLISHED, momentum=0.9, law=law, every=lab.size.every)
        for name, law in LAWS.items()
    }
    constant = lab.tuned({SGD: candidates[SGD]})[SGD]
    final = lab.tuning_results(replace(candidates[SGD], lr=constant.lr))
    error = statistics.fmean(1 - run["scores"]["validation"]["accuracy"] for run in final)
    facts = [f"Final validation error of {SGD}, tuned for validation loss (lr {constant.lr:g}): {100 * error:.2f} %"]
    rows, panels = [], []
    for method, words, factor in (("critical", "early", EARLY), ("hybrid", "late", LATE)):
        level = 1 - factor * error

        def score(run: Mapping[str, Any], level: float = level) -> float:
            return math.log(steps_to(run["curve"], level, lab.size.steps, 1))

        tuned = lab.tuned(candidates, score)
        facts += [f"For the {words} level, {100 * level:.2f} %: {line}" for line in tuning_facts(tuned)]
        best = {name: replace(candidates[name], lr=tuned[name].lr) for name in candidates}
        published = replace(candidates[method], lr=PUBLISHED)
        others = _matched(published) | {f"{SGD} at the same learning rate": ("untuned", _constant(published))}
        name = f"{words} level ({100 * level:.1f} %)"
        claim = f"The {method} law reaches the {name} sooner than constant 0.9, at learning rate {PUBLISHED:g}"
        rows.append(_row(lab, claim, method, published, others, level, facts))
        panels.append(_panel(lab, f"{method}, {name}", {method: ("baseline", published)} | others, level))
        rivals = [other for other in best if other != method and (method, other) != ("critical", "hybrid")]
        others = {f"{other}, tuned": ("baseline", best[other]) for other in rivals}
        others |= _matched(best[method]) | {f"{SGD} at the same learning rate": ("untuned", _constant(best[method]))}
        claim = f"The {method} law reaches the {name} sooner than constant 0.9 and other laws, all tuned"
        rows.append(_row(lab, claim, method, best[method], others, level, facts))
    if lab.size.name == "small":
        draw(panels, PICTURE)
    return Program("critical", lab.size.name, rows, facts)


Opponents = dict[str, tuple[Role, Setting]]


def _constant(setting: Setting) -> Setting:
    return replace(setting, law=None)


def _matched(setting: Setting) -> Opponents:
    """The effective rate of the critical law, sqrt(lr(t)) / 2, with a constant momentum and with none."""
    constant = _constant(setting)
    return {
        "constant 0.9 with 0.05 √lr(t)": ("control", replace(constant, root=0.05)),
        "no momentum with √lr(t) / 2": ("control", replace(constant, root=0.5, options={})),
    }


def _panel(lab: Lab, title: str, settings: Opponents, level: float) -> Panel:
    series = {}
    for name, (_, setting) in settings.items():
        curves = [run["curve"] for run in lab.results(setting)]
        accuracies = [100 * statistics.fmean(entry[2] for entry in at) for at in zip(*curves, strict=True)]
        series[name] = ([entry[0] for entry in curves[0]], accuracies)
    bounds = (100 * level - 15, 100.0)
    return Panel(title, "step", "test accuracy (%)", series, level=100 * level, y_limits=bounds)


def _row(lab: Lab, claim: str, method: str, setting: Setting, others: Opponents, level: float, facts: list[str]) -> Row:
    runs = {name: lab.results(one) for name, (_, one) in {method: ("baseline", setting), **others}.items()}
    taken = {name: [steps_to(run["curve"], level, lab.size.steps, 2) for run in found] for name, found in runs.items()}
    never = {name: sum(max(e[2] for e in run["curve"]) < level for run in found) for name, found in runs.items()}
    facts.append(f"Steps. {claim}: {means('steps on average', taken, 0)}")
    if any(never.values()):
        facts.append(f"Never got there, of {lab.size.seeds}: " + ", ".join(f"{n} {c}" for n, c in never.items() if c))
    logs = {name: [math.log(steps) for steps in found] for name, found in taken.items()}
    compared = versus(
        logs[method], {name: (role, logs[name]) for name, (role, _) in others.items()}, lower_is_better=True
    )
    return Row(claim, lab.size.words, "steps of the other over its own", "times", compared)


if __name__ == "__main__":
    args = arguments("critical", None)
    keep(program(laboratory("critical", args)), args.json)
