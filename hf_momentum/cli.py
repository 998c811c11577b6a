"""The command `hf-momentum`: parse, call one function, print."""

import argparse
import os
import sys
from collections.abc import Sequence

from hf_momentum.errors import InputError, TrainingStopped

TRAIN_HELP = """\
Run a recipe: fine-tune, measure every split before and after, and write a report.

examples:
  hf-momentum train --config recipes/quickstart.yaml
  hf-momentum train --config quickstart --optim adatamw --learning_rate 1e-3 --output_dir outputs/adatamw
  accelerate launch --config_file accelerate_configs/ddp.yaml scripts/train.py --config quickstart

Any field of a recipe can be given as --field value and wins over the file. `hf-momentum train --help-fields` lists
them all: model, data, LoRA, and every field of transformers' TrainingArguments."""

RUN_HELP = """\
Run any script or module that uses a Trainer with our --optim names registered, unchanged.

examples:
  hf-momentum run train.py --optim tam --output_dir out
  hf-momentum run trl.scripts.sft --optim adatamw --model_name_or_path my-model ...
  accelerate launch -m hf_momentum.run train.py --optim tam"""

EXPORT_HELP = """\
Write a checkpoint of any launch (one process, DDP, FSDP2, DeepSpeed) as a plain folder that from_pretrained reads.

examples:
  hf-momentum export outputs/run/checkpoint-400 my-model
  hf-momentum export outputs/run/checkpoint-400 my-model --dtype bfloat16
  hf-momentum export outputs/run/checkpoint-400 continued --resumable"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0, or 2 after one line on standard error for input that cannot be used.

    Example:
        >>> main(["optimizers"])
        tam ... Heavy ball whose gradients are damped by their angle to the momentum (torque-aware momentum).
        ...
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except (InputError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _dispatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hf-momentum",
        description="Momentum and gradient methods for fine-tuning, measured under distribution shift.",
        epilog="example: hf-momentum train --config recipes/quickstart.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="run a recipe and write its report", add_help=False)
    commands.add_parser("run", help="run any script with our --optim names", add_help=False)
    commands.add_parser("export", help="write a checkpoint as a plain folder", add_help=False)
    commands.add_parser("optimizers", help="list the optimizers and their arguments")
    command = parser.parse_known_args(words[:1])[0].command
    rest = words[1:]
    if command == "train":
        return _train(rest)
    if command == "run":
        return _run(rest)
    if command == "export":
        return _export(rest)
    parser.parse_args(words)
    return _optimizers()


def _train(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hf-momentum train",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("--help-fields", action="store_true", help="list every field of a recipe and exit")
    known, overrides = parser.parse_known_args(words)
    from hf_momentum.training import recipe

    if known.help_fields:
        print(recipe.parser().format_help())
        return 0
    if known.config is None and not overrides:
        raise InputError("train needs --config RECIPE, for example --config recipes/quickstart.yaml")
    loaded = recipe.load_recipe(known.config, overrides)

    from hf_momentum.training import job

    outcome = job.train(loaded)
    if outcome.is_main:
        print("\n" + "\n".join(job.summary(outcome)), flush=True)
    return 0


def _run(words: list[str]) -> int:
    from hf_momentum.run import run

    if not words or words[0] in ("-h", "--help"):
        print(RUN_HELP)
        return 0 if words else 2
    run(words)
    return 0


def _export(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hf-momentum export",
        description=EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder such as outputs/run/checkpoint-400")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; as they were saved without it"
    )
    parser.add_argument(
        "--resumable",
        action="store_true",
        help="also the state of optimizer and schedule, whole, for one process or DDP",
    )
    known = parser.parse_args(words)
    from hf_momentum.training.export import export

    print(f"Exported to {export(known.checkpoint, known.out, known.dtype, known.resumable)}", flush=True)
    return 0


def _optimizers() -> int:
    from hf_momentum.integrations import OPTIMIZERS

    width = max(map(len, OPTIMIZERS))
    for name, spec in OPTIMIZERS.items():
        print(f"{name:<{width}}  {spec.summary}\n{'':<{width}}  {spec.source}; {spec.accepted()}")
    return 0


def console() -> None:
    """Entry point of the installed command and of `python -m hf_momentum`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every data-loader fork
    sys.exit(main())
