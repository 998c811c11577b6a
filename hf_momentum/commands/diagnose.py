"""`hf-momentum diagnose`: the layers that a model's errors point to."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import add_data, add_groups, add_launcher, command_of, command_parser

HELP = """\
Find the layer groups to which a model's own errors point: the gradient of the mean loss over what it has wrong, group
by group, beside that over what it has right and that of a model with random weights.

examples:
  hf-momentum diagnose --model outputs/sentiment_minilm --data products.jsonl@train \\
    --output_dir outputs/diagnosis
  hf-momentum diagnose --model outputs/quickstart --data stdlib:code@validation --split parts \\
    --top 4
  hf-momentum diagnose --model mine --data failed.csv --against passed.csv \\
    --group early='*.layer.[01].*'
  hf-momentum diagnose --accelerate_config fsdp2 --num_processes 8 --model mine --data hard.jsonl

MODEL is a Hub name, a folder, PEFT adapters, or a checkpoint of a run under any launch. It is not changed. Exit status
0 also where there is no error to learn from."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("diagnose", HELP, usage="%(prog)s --model M --data D [--against CORRECT] [options]")
    made.add_argument("--model", metavar="M", required=True, help="what to diagnose")
    made.add_argument("--data", metavar="D", required=True, help="SOURCE@SPLIT whose errors are looked at")
    made.add_argument("--against", metavar="CORRECT", help="take what is right from there, not from D")
    add_groups(made)
    add_data(made)
    made.add_argument(
        "--lora_weights", choices=("base", "delta"), default="base", help="what a LoRA model's weights are"
    )
    made.add_argument("--no-random", action="store_true", help="leave out the model with random weights")
    made.add_argument("--batch_size", metavar="N", type=int, default=16, help="examples at a time (%(default)s)")
    made.add_argument("--device", metavar="NAME", help="such as cuda:1; the accelerator unless given")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    made.add_argument("--seed", metavar="N", type=int, default=0, help="(%(default)s)")
    made.add_argument("--output_dir", metavar="OUT", default="outputs/diagnosis", help="(%(default)s)")
    add_launcher(made)
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    from hf_momentum import launch
    from hf_momentum.training import diagnose

    settings = diagnose.settings_of(vars(known))
    diagnose.check(settings)
    launch.relaunch("diagnose", words, known.accelerate_config, launch.flags_of(vars(known)))
    with answering("diagnose", known.json) as answer:
        report = diagnose.diagnose(settings, command_of("diagnose", words))
        if report is None:  # another process has it
            return 0
        path = report.write(Path(known.output_dir))
        lines = ["", report.verdict(), *report.sentences(), f"Report: {path} (and report.md, report.json, plots/)"]
        return answer.give(lines, **read_json(path.with_name("report.json")))
