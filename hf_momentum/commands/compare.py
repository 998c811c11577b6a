"""`hf-momentum compare`: tuned optimizers compared over seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import command_parser

HELP = """\
Say, with intervals over seeds, whether one optimizer beats another on a recipe: in distribution, under shift, in
forgetting, in time and in memory. Each is tuned with the same number of runs on validation data, by a grid of learning
rates that is widened until its best point is interior; then each runs at its best one with new seeds.

examples:
  hf-momentum compare --config sentiment_minilm --optim adamw_torch,tam,adatamw,vradam \\
    --trials 6 --seeds 5 \
    --controls frozen_gate,matched_lr --output_dir outputs/comparison
  hf-momentum compare --config quickstart --optim adamw_torch,tam --dry-run \\
    --output_dir outputs/comparison \
    --validation_dataset stdlib:code@validation

The first optimizer is the baseline. Runs are kept in OUT/runs.db, or in any database: --storage
postgresql+psycopg://user@host/db lets many machines work through one comparison (give each the same command). A killed
command, given again, repeats only what was not finished. Any field of a recipe but the optimizer's own can be given as
--field value. Exit status 1: a run failed."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("compare", HELP, usage="%(prog)s --config RECIPE --optim NAMES --output_dir OUT [options]")
    made.add_argument("--config", metavar="RECIPE", required=True, help="a YAML file, or a shipped recipe's name")
    made.add_argument("--optim", metavar="NAMES", required=True, help="optimizers with commas, the baseline first")
    made.add_argument("--trials", metavar="N", type=int, default=6, help="learning rates of each grid (%(default)s)")
    made.add_argument("--seeds", metavar="N", type=int, default=5, help="test runs of each optimizer (%(default)s)")
    made.add_argument("--controls", metavar="NAMES", default="", help="frozen_gate,matched_lr: runs without the idea")
    made.add_argument("--lr", metavar="NAME=VALUE", action="append", default=[], help="middle of an optimizer's grid")
    made.add_argument("--with", metavar="NAME:ARGS", action="append", default=[], help="its --optim_args", dest="args")
    made.add_argument("--ratio", metavar="R", type=float, default=10**0.5, help="between neighbours (sqrt 10)")
    made.add_argument("--most_trials", metavar="N", type=int, help="a grid is widened no further (3 x trials)")
    made.add_argument("--metric", metavar="NAME", help="what is compared; the task's main metric unless given")
    made.add_argument("--select", metavar="NAME", help="what chooses learning rates; the compared metric unless given")
    made.add_argument("--tune_each_seed", action="store_true", help="tune every test seed by itself; N times the runs")
    made.add_argument("--storage", metavar="URL", help="of an Optuna storage; OUT/runs.db unless given")
    made.add_argument("--jobs", metavar="N", type=int, default=1, help="runs side by side (%(default)s)")
    made.add_argument("--dry-run", action="store_true", help="say how many runs and how long; compare nothing")
    made.add_argument("--output_dir", metavar="OUT", required=True, help="for runs.db, logs and the report")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known, overrides = parser().parse_known_args(words)
    from hf_momentum.evaluation.scores import LOWER_IS_BETTER
    from hf_momentum.training import compare, compare_report, compare_runs
    from hf_momentum.training.ledger import Ledger
    from hf_momentum.training.words import listed

    made = compare.plan(
        known.config,
        overrides,
        methods=listed(known.optim),
        trials=known.trials,
        seeds=known.seeds,
        folder=known.output_dir,
        storage=known.storage,
        asked=listed(known.controls),
        ratio=known.ratio,
        most=known.most_trials,
        starts=compare.rates(known.lr),
        arguments=compare.pairs("with", ":", known.args),
        metric=known.metric,
        selection=known.select,
        each_seed=known.tune_each_seed,
    )
    Path(known.output_dir).mkdir(parents=True, exist_ok=True)
    ledger = Ledger(made.storage, made.study, made.selection in LOWER_IS_BETTER)
    with answering("compare", known.json) as answer:
        if known.dry_run:
            return answer.give([compare_report.outlook(made, ledger, known.jobs)])
        records = compare_runs.work(made, ledger, known.jobs)
        report = compare_report.report(made, records)
        path = report.write(Path(known.output_dir))
        files = f"Report: {path} (and report.md, report.json, plots/)"
        lines = ["", *report.troubles, *report.verdict(), report.headline(), files]
        failed = any(run.status == "failed" for run in report.runs)
        return answer.give(lines, int(failed), **read_json(path.with_name("report.json")))
