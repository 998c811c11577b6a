"""What the commands' parsers share: errors of one line, and options that several commands have."""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_momentum.errors import InputError, nearest


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line with the next step, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError where argparse would print its usage and exit."""
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and name the option that an unknown one resembles.

        Raises:
            InputError: a word that is not accepted, or one that is missing.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            typed = unknown[0].partition("=")[0]
            self.error(f"unknown argument {unknown[0]!r}{nearest(typed, self._option_string_actions)}")
        return known


def command_parser(name: str, description: str, usage: str | None = None) -> OneLineParser:
    """The parser of one command.

    Args:
        name: of the command.
        description: its `HELP`, printed as it stands.
        usage: where the usual list of all options would be long.

    Example:
        >>> command_parser("train", "Run a recipe.").prog
        'hf-momentum train'
    """
    return OneLineParser(
        prog=f"hf-momentum {name}",
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def command_of(command: str, words: Sequence[str]) -> str:
    """The command line that repeats it.

    Example:
        >>> command_of("diagnose", ["--model", "my model"])
        "hf-momentum diagnose --model 'my model'"
    """
    return shlex.join(["hf-momentum", command, *words])


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """The options of a launch on several processes."""
    several = parser.add_argument_group("several processes (each option wins over the file)")
    several.add_argument("--accelerate_config", metavar="NAME", help="a file for accelerate launch, or a shipped one")
    several.add_argument("--num_processes", metavar="N", help="over all machines; one per GPU")
    several.add_argument("--num_machines", metavar="M", help="run the same command on each of them")
    several.add_argument("--machine_rank", metavar="R", help="which of them this is, from 0")
    several.add_argument("--main_process_ip", metavar="IP", help="address of machine 0")
    several.add_argument("--main_process_port", metavar="P", help="a port there; on one machine any free one")


def add_data(parser: argparse.ArgumentParser) -> None:
    """How splits of data are read."""
    data = parser.add_argument_group("how the data are read")
    data.add_argument(
        "--task",
        metavar="NAME",
        help="causal_lm (errors are tokens), generation (errors are texts that are not the reference), "
        "sequence_classification or image_classification; by the model unless given",
    )
    for column in ("text", "label", "image", "prompt", "reference"):
        data.add_argument(f"--{column}_column", metavar="NAME", default=column, help="(%(default)s)")
    data.add_argument("--classes", metavar="NAMES", default="", help="of the outputs in their order, with commas")
    data.add_argument("--block_size", metavar="N", type=int, help="tokens of an input at most")
    data.add_argument("--max_examples", metavar="N", type=int, help="of each dataset at most, drawn by the seed")
    data.add_argument("--max_new_tokens", metavar="N", type=int, default=32, help="for generation (%(default)s)")


def add_groups(parser: argparse.ArgumentParser) -> None:
    """How a model is parted into layer groups, and which are chosen."""
    groups = parser.add_argument_group("layer groups")
    groups.add_argument(
        "--split", choices=("blocks", "parts"), default="blocks", help="parts: attention, MLP and norms"
    )
    groups.add_argument(
        "--group", metavar="NAME=PATTERN", action="append", default=[], help="a group of your own: of parameters"
    )
    groups.add_argument("--score", metavar="NAME", default="contrast", help="contrast, raw, rms, relative or taylor")
    groups.add_argument("--top", metavar="K", type=int, help="choose the K largest scores (3)")
    groups.add_argument("--threshold", metavar="Z", type=float, help="or those above mean + Z std")
    groups.add_argument("--cumulative", metavar="SHARE", type=float, help="or the fewest with that share of all scores")
    groups.add_argument("--budget", metavar="SHARE", type=float, help="or what fits into that share of the parameters")
