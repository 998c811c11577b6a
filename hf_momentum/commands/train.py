"""`hf-momentum train`: a recipe, run and reported."""

import argparse
from collections.abc import Sequence

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import add_launcher, command_parser
from hf_momentum.errors import InputError

HELP = """\
Run a recipe: fine-tune, measure every split before and after, and write a report.

examples:
  hf-momentum train --config recipes/quickstart.yaml
  hf-momentum train --config quickstart --optim adatamw --learning_rate 1e-3 \\
    --output_dir outputs/adatamw
  hf-momentum train --accelerate_config fsdp2 --num_processes 8 --config quickstart

On several GPUs, --accelerate_config names how they share the model: ddp, fsdp2, hsdp, zero1, zero2, zero3,
zero2_offload, zero3_offload, multi_node_fsdp2, multi_node_zero3, or a file of your own for `accelerate launch`.

Any field of a recipe can be given as --field value and wins over the file. `hf-momentum train --help-fields` lists
them all: model, data, LoRA, and every field of transformers' TrainingArguments."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser(
        "train", HELP, usage="%(prog)s --config RECIPE [--accelerate_config NAME] [options] [--field value ...]"
    )
    made.add_argument("--config", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    add_launcher(made)
    made.add_argument("--help-fields", action="store_true", help="list every field of a recipe and exit")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known, overrides = parser().parse_known_args(words)
    from hf_momentum import launch
    from hf_momentum.training import recipe

    if known.help_fields:
        print(recipe.parser().format_help())
        return 0
    if known.config is None and not overrides:
        raise InputError("train needs --config RECIPE, for example --config recipes/quickstart.yaml")
    start = launch.asked_launch(known.accelerate_config, launch.flags_of(vars(known)))
    # Before anything is launched, so that a slip is one line and not one traceback for each process.
    loaded = recipe.load_recipe(known.config, overrides, others=list(vars(known)))
    if start is not None:
        config = [] if known.config is None else ["--config", known.config]
        start.replace_this_process([*config, *overrides, *(["--json"] if known.json else [])])

    with answering("train", known.json) as answer:
        from hf_momentum.training import job

        outcome = job.train(loaded)
        if not outcome.is_main:
            return 0
        return answer.give(["", *job.summary(outcome)], **read_json(outcome.folder / "report.json", "history"))
