"""`hf-momentum run`: any script with our names of optimizers."""

import argparse
from collections.abc import Sequence

from hf_momentum.commands.parsing import command_parser

HELP = """\
Run any script, module or trl command that uses a Trainer with our --optim names registered, unchanged.

examples:
  hf-momentum run train.py --optim tam --output_dir out
  hf-momentum run trl sft --optim adatamw --model_name_or_path my-model ...
  accelerate launch -m hf_momentum.run train.py --optim tam"""


def parser() -> argparse.ArgumentParser:
    """Its options; all that follow the script are the script's own."""
    made = command_parser("run", HELP, usage="%(prog)s SCRIPT_OR_MODULE [its arguments]")
    made.add_argument("target", metavar="SCRIPT_OR_MODULE", help="a file, a module, trl, or an installed command")
    made.add_argument("rest", metavar="its arguments", nargs=argparse.REMAINDER, help="handed on as they are")
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    from hf_momentum.run import run

    run([known.target, *known.rest])
    return 0
