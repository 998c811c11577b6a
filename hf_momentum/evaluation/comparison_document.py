"""A comparison as a document: verdict, differences, shift, tuning, cost, every figure, and how it was done."""

from collections.abc import Sequence

from hf_momentum.evaluation import pictures
from hf_momentum.evaluation.comparison import ComparisonReport, Difference
from hf_momentum.evaluation.document import (
    Block,
    Bullets,
    Code,
    Details,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    literal,
)
from hf_momentum.evaluation.intervals import t_interval
from hf_momentum.evaluation.results import Point

_SHIFT = [
    "in distribution",
    "shifted",
    "gap",
    "worst shifted split",
    "effective robustness",
    "change on must not forget",
]


def document(report: ComparisonReport) -> Document:
    """The report for people."""
    blocks: list[Block] = [Verdict(literal(report.headline()))]
    if any(one.size for one in (*report.against_baseline, *report.against_controls)):
        blocks.append(Bullets([literal(sentence) for sentence in report.verdict()]))
    if report.troubles:
        blocks += [Heading("What failed"), Bullets([literal(trouble) for trouble in report.troubles])]
    blocks += [Heading("Every split"), *_splits(report)]
    rows = [*report.against_baseline, *report.against_controls]
    if any(one.size for one in rows):
        blocks += [Heading("Differences"), *_differences(report)]
    if any("shifted" in figures for figures in report.shift_figures().values()):
        blocks += [Heading("Under shift"), *_shift(report)]
    blocks += [Heading("Tuning"), *_tuning(report)]
    blocks += [Heading("Cost"), _cost(report), Text(_COST)]
    luck = _LUCK["each" if len(report.tuning_seeds) > 1 else "once"]
    blocks += [Heading("How it was compared"), Bullets([*_METHOD, luck, *map(literal, report.fairness)])]
    if report.controls:
        blocks += [Bullets([f"**{literal(control.name)}**: {control.what}." for control in report.controls])]
    blocks += [
        Heading("What ran"),
        Bullets([f"**{name}**: {literal(str(value))}" for name, value in report.facts.items()]),
    ]
    blocks += [Details("Every metric on every split", [_every_metric(report)]), Details("Every run", [_runs(report)])]
    blocks += [Heading("Run it again"), Code(report.command, "bash"), Code(report.recipe.strip(), "yaml")]
    return Document(report.title, blocks)


_LUCK = {
    "once": "All test seeds share the learning rates that one seed's tuning chose. The intervals are about these "
    "settings: "
    "how lucky that tuning was is not in them. (Where tuning is noisy, two equal optimizers end at different rates and "
    "truly differ a little; `--tune_each_seed` puts that into the intervals.)",
    "each": "Every test seed was tuned by itself, so the luck of tuning is in the intervals.",
}
_METHOD = [
    "Learning rates were chosen on validation data; test splits were measured at the end of a schedule, and nothing "
    "was "
    "chosen by them. Every optimizer was tuned with the same number of runs: each grid was widened until its best "
    "point "
    "was interior, and those that were done early got points beside their best one.",
    "Intervals are 95 % t-intervals over seeds, paired by seed where two methods are compared. They do not contain "
    "what "
    "other evaluation examples would change. p-values are after Holm's correction over all differences of a table; the "
    "intervals are those of each comparison alone.",
    '"No significant difference" is not a proof that there is none: it may be that there were too few seeds.',
]
_COST = (
    "Time is that of training alone, relative to the baseline's run of the same seed, on a machine that may have had "
    "other work; memory is the peak of the run's own process."
)


def _splits(report: ComparisonReport) -> list[Block]:
    """The metric of each method on each split: means over seeds."""
    scores = report.scores(report.metric)
    rows = [
        [
            f"`{name}`",
            _rates(report, name),
            *(_shown(list(scores[name][split.name].values())) for split in report.splits),
        ]
        for name in report.everyone
    ]
    header = [
        "method",
        "learning rate",
        *(literal(f"{split.name} ({_role(split.role, split.kind)})") for split in report.splits),
    ]
    caption = f"{report.metric}, mean over seeds with its 95 % t-interval."
    if report.base:
        base = [report.base.get(split.name, {}).get(report.metric) for split in report.splits]
        rows.insert(0, ["base model", "", *("" if value is None else f"{value:.3f}" for value in base)])
    return [Table(header, rows, left=1, caption=caption)]


def _rates(report: ComparisonReport, name: str) -> str:
    rates = sorted(set(report.learning_rates.get(name, {}).values()))
    return "" if not rates else f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"


def _role(role: str, kind: str | None) -> str:
    return f"{role}: {kind}" if kind else role


def _shown(values: Sequence[float]) -> str:
    return str(t_interval(values)) if values else "no finished run"


def _differences(report: ComparisonReport) -> list[Block]:
    rows = [*report.against_baseline, *report.against_controls]
    drawn = [
        pictures.Difference(f"{one.method} minus {one.other}", one.size, one.split, one.words in ("better", "worse"))
        for split in report.splits
        for one in rows
        if one.split == split.name and one.size is not None
    ]
    better = "left of 0 is better" if report.lower_is_better else "right of 0 is better"
    picture = Picture(
        "differences",
        "Differences over paired seeds with 95 % t-intervals; marked ones are significant after Holm's correction.",
        f"For each split, the difference in {report.metric} of each method to the baseline and to its controls.",
        pictures.differences(drawn, f"difference in {report.metric}: {better}", report.digits),
    )
    header = ["difference", "split", "seeds", f"{report.metric} [95 %]", "p", "p after Holm", "the first is"]
    table = [_row(one, report.digits) for one in rows]
    return [picture, Table(header, table, left=2)]


def _row(one: Difference, digits: int) -> list[str]:
    size = one.size.shown(digits) if one.size is not None else ""
    p_values = [f"{value:.3g}" for value in (one.p_value, one.adjusted)]
    return [
        literal(f"{one.method} minus {one.other}"),
        literal(one.split),
        str(len(one.seeds)),
        size,
        *p_values,
        one.words,
    ]


def _shift(report: ComparisonReport) -> list[Block]:
    figures = report.shift_figures()
    present = [name for name in _SHIFT if any(name in values for values in figures.values())]
    rows = [
        [f"`{method}`", *(str(values[name]) if name in values else "" for name in present)]
        for method, values in figures.items()
    ]
    points: dict[str, list[Point]] = {
        name: [place for run in runs if run.status == "finished" and (place := report.place(run)) is not None]
        for name, runs in report.tests.items()
        if name in report.methods
    }
    points = {name: places for name, places in points.items() if places}
    blocks: list[Block] = []
    if points:
        blocks.append(
            Picture(
                "shift",
                "Each point is one seed; the line goes through all runs of the baseline, also those at other learning "
                "rates. Above it a model is better under shift than its score in distribution predicts.",
                f"{report.metric} under shift against {report.metric} in distribution, by method.",
                pictures.shift_scatter(
                    points,
                    report.line.line,
                    [report.baseline],
                    f"{report.metric} in distribution",
                    f"{report.metric} under shift",
                ),
            )
        )
    blocks.append(
        Table(["method", *present], rows, caption=f"{report.metric}; means over seeds with 95 % t-intervals.")
    )
    line = report.line.line
    if line is None:
        blocks.append(Text(f"No effective robustness: {literal(report.line.reason)}."))
    else:
        blocks.append(
            Text(
                f"Effective robustness is the distance from the baseline's line (slope {line.slope:.2f} on the "
                f"{line.scale} scale, {line.points} runs), positive where a model is better than the line. The line is "
                "taken as known."
            )
        )
    return blocks


def _tuning(report: ComparisonReport) -> list[Block]:
    rows = []
    for method in report.methods:
        runs = report.tuning_runs(method)
        tried = [run.learning_rate for run in runs]
        rates = sorted(report.learning_rates.get(method, {}).values())
        best = report.curves[method].get(rates[len(rates) // 2]) if rates else None
        rows.append(
            [
                f"`{method}`",
                str(len(runs)),
                f"{tried[0]:g} to {tried[-1]:g}" if tried else "",
                str(sum(run.status == "diverged" for run in runs)),
                _rates(report, method),
                "" if best is None else f"{best:.4f}",
                "no, at an end" if method in report.edges else "yes",
            ]
        )
    header = ["method", "runs", "tried", "diverged", "best", f"validation {report.selection}", "interior"]
    blocks: list[Block] = []
    curves = {method: list(curve.items()) for method, curve in report.curves.items() if curve}
    if curves:
        middle = {
            name: sorted(report.learning_rates[name].values()) for name in curves if report.learning_rates.get(name)
        }
        each = "One run for each point." if len(report.tuning_seeds) == 1 else "Each point is a mean over tuning seeds."
        blocks.append(
            Picture(
                "tuning",
                f"{each} Flat curves are easy to tune.",
                f"Validation {report.selection} against learning rate, by method, with the chosen rate marked.",
                pictures.tuned(
                    curves,
                    {name: rates[len(rates) // 2] for name, rates in middle.items()},
                    f"validation {report.selection}",
                ),
            )
        )
    return [*blocks, Table(header, rows)]


def _cost(report: ComparisonReport) -> Table:
    rows = [
        [f"`{name}`", f"{seconds:.3g}", "" if ratio is None else ratio.shown(2), f"{peak:.0f}"]
        for name, (seconds, ratio, peak) in report.costs().items()
    ]
    return Table(["method", "seconds (median)", "time over the baseline's [95 %]", "peak memory, MiB"], rows)


def _every_metric(report: ComparisonReport) -> Table:
    by_metric = {metric: report.scores(metric) for metric in report.metrics}
    rows = [
        [
            f"`{name}`",
            literal(split.name),
            *(_shown(list(by_metric[metric][name][split.name].values())) for metric in report.metrics),
        ]
        for name in report.everyone
        for split in report.splits
    ]
    return Table(["method", "split", *(metric.replace("_", " ") for metric in report.metrics)], rows, left=2)


def _runs(report: ComparisonReport) -> Table:
    rows = [
        [
            f"`{run.method}`",
            run.role,
            run.status,
            f"{run.learning_rate:g}",
            str(run.seed),
            "" if run.validation is None else f"{run.validation:.4f}",
            *(_score(run.scores.get(split.name, {}).get(report.metric)) for split in report.splits),
            f"{run.seconds:.3g}",
        ]
        for run in report.runs
    ]
    header = [
        "method",
        "role",
        "ended",
        "learning rate",
        "seed",
        "validation",
        *(s.name for s in report.splits),
        "seconds",
    ]
    return Table(header, rows, left=3)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
