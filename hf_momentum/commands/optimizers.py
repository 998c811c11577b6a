"""`hf-momentum optimizers`: the names of our optimizers and what they take."""

import argparse
from collections.abc import Sequence

from hf_momentum.commands.answers import add_json, answering
from hf_momentum.commands.parsing import command_parser

HELP = """\
List the optimizers, where each method comes from, and what --optim_args gives it.

example:
  hf-momentum optimizers"""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("optimizers", HELP)
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    from hf_momentum.integrations import OPTIMIZERS

    width = max(map(len, OPTIMIZERS))
    lines = [
        f"{name:<{width}}  {spec.summary}\n{'':<{width}}  {spec.source}; {spec.accepted()}"
        for name, spec in OPTIMIZERS.items()
    ]
    listed = [
        {
            "name": name,
            "summary": spec.summary,
            "source": spec.source,
            "arguments": {key: str(argument).partition(": ")[2] for key, argument in spec.arguments.items()},
        }
        for name, spec in OPTIMIZERS.items()
    ]
    with answering("optimizers", known.json) as answer:
        return answer.give(lines, optimizers=listed)
