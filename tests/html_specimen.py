"""Documents with every block and every picture: one as a reader will meet it, one with as much as can come at once."""

import math
import random
from collections.abc import Sequence

from hf_momentum.evaluation import pictures
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
)
from hf_momentum.evaluation.intervals import Interval
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.results import Point, ReliabilityBin
from hf_momentum.evaluation.robustness import fit

METHODS = ("adamw_torch", "tam", "adatamw", "vradam")
SPLITS = ("movies", "products", "news 2024", "typos, severity 3")

MANY_METHODS = (
    "adamw_torch",
    "tam",
    "tam with frozen gate",
    "adatamw",
    "adatamw with frozen gate",
    "vradam",
    "vradam at matched effective learning rate",
    "ahb_adamw",
    "critical_adamw",
    "critical_adamw_hybrid_without_long_buffer",
    "sgd at matched effective learning rate",
    "an_optimizer_of_a_$user$_with_a_name_without_any_end_in_sight",
)
MANY_SPLITS = (
    "movies",
    "products",
    "amazon_reviews_electronics_2019_to_2023",
    "news",
    "typos, severity 3",
    "case, severity 5",
    "words dropped, severity 1",
    "a very long name of a split that somebody wrote as a whole sentence",
    "Wikipedia_must_not_be_forgotten_under_any_circumstances",
    "x",
)


def document(methods: Sequence[str] = METHODS, splits: Sequence[str] = SPLITS) -> Document:
    """Every block and every picture, of made-up figures."""
    random_ = random.Random(0)

    def around(middle: float, half: float) -> Interval:
        half *= random_.uniform(0.5, 1.5)
        return Interval(middle, middle - half, middle + half)

    quality = {method: random_.uniform(0.86, 0.93) for method in methods}
    points = {
        method: [
            Point(method, quality[method] + random_.gauss(0, 0.004), quality[method] - 0.09 + random_.gauss(0, 0.008))
            for _ in range(5)
        ]
        for method in methods
    }
    baselines = [method for method in methods if "tam" not in method]
    line = fit([point for method in baselines for point in points[method]]).line
    rows = [
        pictures.Difference(method, around(random_.gauss(0.004, 0.006), 0.008), split, random_.random() < 0.2)
        for split in splits
        for method in methods[1:]
    ]
    curves = {
        method: [(rate, 0.3 + 0.05 * abs(math.log10(rate / best)) ** 2 + random_.uniform(0, 0.01)) for rate in grid]
        + [(grid[-1] * 2, 5.0), (grid[-1] * 4, math.inf)]
        for method in methods
        for best in [10 ** random_.uniform(-4.5, -2)]
        for grid in [[best * 2.0**step for step in range(-3, 4)]]
    }
    chosen = {method: min(curve, key=lambda pair: pair[1])[0] for method, curve in curves.items()}
    matrix = [
        [
            None if i == 0 and j == 1 else 0.55 + 0.4 * (i == j + 1) + random_.uniform(0, 0.04)
            for j in range(len(splits))
        ]
        for i in range(len(splits) + 1)
    ]
    bins = {
        split: [ReliabilityBin(c, min(1, max(0, c - random_.gauss(0.06, 0.05))), int(900 * c**4) + 3) for c in steps]
        for split in splits
        for steps in [[(step + 0.5) / 15 for step in range(7, 15)]]
    }
    corrupted = {
        name: {
            step: Estimate(value, value - 0.02, value + 0.02)
            for step in range(6)
            for value in [quality[name] - 0.02 * step * random_.uniform(0.5, 1.5)]
        }
        for name in methods
    }
    bars = {
        method: {split: around(quality[method] - 0.05 * index, 0.02) for index, split in enumerate(splits)}
        for method in methods
    }
    table = Table(
        ["method", "seeds", *(f"{split} [95 %]" for split in splits)],
        [[f"`{method}`", "5", *(str(bars[method][split]) for split in splits)] for method in methods],
        caption="Accuracy at the end of the schedule: means over seeds with 95 % t-intervals.",
    )
    blocks: list[Block] = [
        Verdict(f"**No significant difference** between `{methods[1]}` and a tuned `{methods[0]}` on {splits[0]}."),
        Text("A < b & c > d, 5 * 3 * 2, [0.1, 0.2], a_name_with_underscores and <script>alert(1)</script> stay text."),
        Heading("Every split"),
        table,
        Picture(
            "splits",
            "Means over seeds; bars are 95 % intervals.",
            "Accuracy of methods by split.",
            pictures.split_bars(bars),
        ),
        Heading("Differences"),
        Picture(
            "differences",
            "Paired over seeds. Filled: significant after Holm's correction.",
            f"Differences in accuracy from {methods[0]} on {len(splits)} splits.",
            pictures.differences(rows, f"accuracy minus that of {methods[0]} (right of 0 is better)"),
        ),
        Heading("Shift"),
        Picture(
            "shift",
            "Hollow: the baselines, through which the line is fitted.",
            "Accuracy under shift against accuracy in distribution.",
            pictures.shift_scatter(points, line, baselines, y=f"accuracy on {splits[1]}"),
        ),
        Picture("severities", "Corruptions.", "Accuracy by severity.", pictures.severities(corrupted)),
        Heading("Tuning"),
        Picture(
            "tuning",
            "All best points are interior.",
            "Validation loss against learning rate.",
            pictures.tuned(curves, chosen),
        ),
        Heading("Forgetting"),
        Picture(
            "forgetting",
            "A row for each stage.",
            "Accuracy on each domain after each stage.",
            pictures.forgetting_matrix(
                matrix,
                ["base model", *(f"after {split}" for split in splits)],
                splits,
                outlined=[(index + 1, index) for index in range(len(splits))],
            ),
        ),
        Heading("Calibration"),
        Picture(
            "calibration", "Below the diagonal: too sure.", "Accuracy against confidence.", pictures.reliability(bins)
        ),
        Heading("What ran"),
        Bullets(["**model**: `a/model`", "**memory**: 1.2 GB", "a `code with spaces` and **bold with `code` inside**"]),
        Heading("Run it again", 3),
        Code("hf-momentum compare --config recipe.yaml --optim adamw_torch,tam " + "--word " * 30, "bash"),
        Details(
            "All runs", [Text("Folded away."), Table(["run", "loss"], [["1", "0.5"]]), Code("a: 1\nb: <2>\n", "yaml")]
        ),
    ]
    return Document(f"Comparison of {len(methods)} optimizers on {len(splits)} splits", blocks)
