"""`hf-momentum pareto`: gradient surgeries compared by their fronts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import command_parser

HELP = """\
Train a recipe with an auxiliary objective over a grid of surgeries, lambdas and seeds, and draw the fronts of main
against auxiliary loss; one sentence says whether Bloop's front was better, whichever way it came out.

examples:
  hf-momentum pareto --config bloop_domain --surgeries bloop,mixed,pcgrad,replay \\
    --lambdas 0.01,0.1,1 --seeds 3 \\
    --output_dir outputs/domain
  hf-momentum pareto --config bloop_domain --lambdas 0.1,1 --output_dir outputs/domain \\
    --max_steps 50 --dry-run

Besides, every seed is trained once on the main data alone, and the base model is measured. Each finished run is kept in
OUT/runs.jsonl: the same command, given again, runs only what is missing. Any field of a recipe but surgery, lam and
data_seed can be given as --field value. Exit status 1: a run failed."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("pareto", HELP, usage="%(prog)s --config RECIPE --output_dir OUT [options]")
    made.add_argument("--config", metavar="RECIPE", required=True, help="a YAML file, or a shipped recipe's name")
    made.add_argument("--surgeries", metavar="NAMES", default="bloop,mixed,pcgrad,replay", help="(%(default)s)")
    made.add_argument("--lambdas", metavar="WEIGHTS", default="0.01,0.1,1", help="(%(default)s)")
    made.add_argument("--seeds", metavar="N", type=int, default=3, help="from the recipe's seed on (%(default)s)")
    made.add_argument("--main", metavar="SPLIT", help="the first of in_distribution unless given")
    made.add_argument("--auxiliary", metavar="SPLIT", help="the first of auxiliary unless given")
    made.add_argument("--jobs", metavar="N", type=int, default=1, help="runs side by side (%(default)s)")
    made.add_argument("--dry-run", action="store_true", help="say how many runs and how long; run nothing")
    made.add_argument("--output_dir", metavar="OUT", required=True, help="for runs.jsonl, the report and fronts.png")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known, overrides = parser().parse_known_args(words)
    from hf_momentum.training import pareto
    from hf_momentum.training.words import listed, numbers

    made = pareto.plan(
        known.config,
        overrides,
        surgeries=listed(known.surgeries),
        lambdas=numbers("lambdas", known.lambdas),
        seeds=known.seeds,
        main=known.main,
        auxiliary=known.auxiliary,
        folder=known.output_dir,
    )
    with answering("pareto", known.json) as answer:
        if known.dry_run:
            return answer.give([pareto.outlook(made, known.jobs)])
        records = pareto.run_grid(made, known.jobs)
        report = pareto.report(made, records)
        path = report.write(Path(known.output_dir))
        lines = ["", *report.troubles, report.verdict(), f"Report: {path} (and report.json, fronts.png)"]
        failed = any(record.status == "failed" for record in records.values())
        return answer.give(lines, int(failed), **read_json(path.with_name("report.json")))
