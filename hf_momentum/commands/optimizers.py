"""`hf-momentum optimizers`: the names of our optimizers and what they take."""

import argparse
from collections.abc import Sequence

from hf_momentum.commands.parsing import command_parser

HELP = """\
List the optimizers, where each method comes from, and what --optim_args gives it.

example:
  hf-momentum optimizers"""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    return command_parser("optimizers", HELP)


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    parser().parse_args(words)
    from hf_momentum.integrations import OPTIMIZERS

    width = max(map(len, OPTIMIZERS))
    for name, spec in OPTIMIZERS.items():
        print(f"{name:<{width}}  {spec.summary}\n{'':<{width}}  {spec.source}; {spec.accepted()}")
    return 0
