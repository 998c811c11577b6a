"""`hf-momentum stream`: one model through a sequence of domains."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import command_parser

HELP = """\
Fine-tune one model through a sequence of domains, measure it on all of them before and after each, and draw the
forgetting matrix: what the model could do on every domain after every stage.

example:
  hf-momentum stream --config sentiment_minilm --seeds 3 --output_dir outputs/stream \\
    --domains films=films.jsonl@train books=books.jsonl@train \\
    --eval films=films_test.jsonl@test books=b_test.jsonl@test

Optimizer and learning-rate schedule begin anew in each stage. Each finished stage is kept: the same command, given
again, runs only what is missing. Any field of a recipe but its data can be given as --field value."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser(
        "stream",
        HELP,
        usage="%(prog)s --config RECIPE --domains D ... --eval D ... --output_dir OUT [options]",
    )
    entry = "NAME=SOURCE@SPLIT"
    made.add_argument("--config", metavar="RECIPE", required=True, help="a YAML file, or a shipped recipe's name")
    made.add_argument(
        "--domains", metavar=entry, nargs="*", default=[], help="training data of each domain, in this order"
    )
    made.add_argument(
        "--eval", metavar=entry, nargs="*", default=[], help="evaluation data of each domain, by the same names"
    )
    made.add_argument("--seeds", metavar="N", type=int, default=1, help="from the recipe's seed on (%(default)s)")
    made.add_argument("--metric", metavar="NAME", help="of the matrix; the task's main one unless given")
    made.add_argument("--output_dir", metavar="OUT", required=True, help="for the stages and the report")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known, overrides = parser().parse_known_args(words)
    from hf_momentum.training import stream

    made = stream.plan(
        known.config,
        overrides,
        domains=known.domains,
        evaluation=known.eval,
        seeds=known.seeds,
        metric=known.metric,
        folder=known.output_dir,
    )
    with answering("stream", known.json) as answer:
        report = stream.report(made, stream.run_streams(made))
        path = report.write(Path(known.output_dir))
        lines = ["", report.verdict(), f"Report: {path} (and report.md, stream.json, plots/)"]
        return answer.give(lines, **read_json(path.with_name("stream.json")))
