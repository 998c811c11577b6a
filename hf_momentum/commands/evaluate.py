"""`hf-momentum evaluate`: one model on a suite of splits."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import command_of, command_parser

HELP = """\
Score a model on every split of a suite: in distribution, under shift, on corrupted rows, on what it must not forget.

examples:
  hf-momentum evaluate --model outputs/quickstart --suite stdlib \\
    --output_dir outputs/quickstart_stdlib
  hf-momentum evaluate --model outputs/mine/checkpoint-400 --base my-base --suite suites/mine.yaml
  hf-momentum evaluate --model outputs/sentiment_minilm --suite reviews \\
    --source movies=movies_test.jsonl \\
    --source products=products_test.jsonl --source news=news_test.jsonl
  hf-momentum evaluate --model mine --suite reviews \\
    --baselines outputs/a/report.json outputs/b/report.json

MODEL is a Hub name, a folder, PEFT adapters, or a checkpoint of a run under any launch. SUITE is a YAML file or a
shipped one: stdlib (language models; needs no network), reviews (sentiment). Intervals are over examples."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("evaluate", HELP, usage="%(prog)s --model MODEL --suite SUITE [options]")
    made.add_argument("--model", metavar="MODEL", required=True, help="what is evaluated")
    made.add_argument("--suite", metavar="SUITE", required=True, help="a YAML file, or a shipped suite's name")
    made.add_argument("--source", metavar="NAME=SOURCE", action="append", default=[], help="replace a split's source")
    made.add_argument("--base", metavar="MODEL", help="the model before fine-tuning, for what was forgotten")
    made.add_argument("--baselines", metavar="JSON", nargs="+", default=[], help="reports, for effective robustness")
    made.add_argument("--batch_size", metavar="N", type=int, default=16, help="examples at a time (%(default)s)")
    made.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (the accelerator, if there is one)")
    made.add_argument("--dtype", metavar="DTYPE", default="auto", help="auto (as saved), float32, bfloat16, float16")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    made.add_argument("--max_examples", metavar="N", type=int, help="of each split at most")
    made.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (%(default)s)")
    made.add_argument("--output_dir", metavar="OUT", default="outputs/evaluation", help="(%(default)s)")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    from hf_momentum.training import evaluate

    settings = evaluate.Settings(
        model=known.model,
        base=known.base,
        baselines=known.baselines,
        batch_size=known.batch_size,
        device=known.device,
        dtype=known.dtype,
        revision=known.revision,
        seed=known.seed,
    )
    suite = evaluate.load_suite(known.suite, known.source, known.max_examples)
    with answering("evaluate", known.json) as answer:
        report = evaluate.evaluate(suite, settings, command_of("evaluate", words))
        path = report.write(Path(known.output_dir))
        lines = ["", *report.summary(), f"Report: {path} (and report.md, report.json, card.md, plots/)"]
        return answer.give(lines, **read_json(path.with_name("report.json")))
