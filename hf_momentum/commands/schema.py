"""`hf-momentum schema`: the JSON schema of recipes, for editors."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.parsing import command_parser

HELP = """\
Print the JSON schema of recipes (draft 2020-12): every field with its type, choices, default and help.

examples:
  hf-momentum schema --out recipe.schema.json

An editor with the YAML language server then completes and checks a recipe whose first line is
  # yaml-language-server: $schema=recipe.schema.json"""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("schema", HELP)
    made.add_argument("--out", metavar="FILE", help="write it there; on standard output unless given")
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    from hf_momentum.evaluation.writing import write_whole
    from hf_momentum.training.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    if known.out is None:
        print(text, end="", flush=True)
        return 0
    Path(known.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(known.out), text)
    print(f"Schema: {known.out}")
    return 0
