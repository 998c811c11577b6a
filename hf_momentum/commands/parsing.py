"""What the commands' parsers share: errors of one line, and options that several commands have."""

import argparse
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_momentum.errors import InputError, nearest


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line with the next step, and whose help fits on a screen.

    Options of `add_more` stand in `--help-all` alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._more: list[argparse._ArgumentGroup] = []

    def add_more(self, title: str) -> argparse._ArgumentGroup:
        """A group of options that only some need."""
        if not self._more:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="list all options and exit")
        self._more.append(self.add_argument_group(title))
        return self._more[-1]

    def format_help(self, everything: bool = False) -> str:
        """The help; of every option if `everything`, else with a line that names the groups left out."""
        if everything or not self._more:
            return super().format_help()
        hidden = {action: action.help for group in self._more for action in group._group_actions}
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            text = super().format_help()
        finally:
            for action, words in hidden.items():
                action.help = words
        titles = "; ".join(str(group.title) for group in self._more)
        return f"{text}\n{self.prog} --help-all also has:\n  {titles}\n"

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
            self.error(f"unknown argument {typed!r}{nearest(typed, self._option_string_actions)}")
        return known


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, OneLineParser)
        print(parser.format_help(everything=True))
        parser.exit()


class _Paragraphs(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width, and leaves indented lines as they are; an option has one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks: list[list[str]] = [[]]
        for line in text.splitlines():
            if line.startswith(" ") or not line or line.endswith(("example:", "examples:")):
                blocks += [[line], []]
            else:
                blocks[-1].append(line)
        lines = []
        for block in blocks:
            whole = block and not block[0].startswith(" ") and block[0]
            lines += textwrap.wrap(" ".join(block), width) if whole else block
        return "\n".join(indent + line for line in lines)


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
        formatter_class=_Paragraphs,
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


def add_data(parser: OneLineParser) -> None:
    """How splits of data are read."""
    data = parser.add_more("how the data are read")
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


def add_groups(parser: OneLineParser) -> None:
    """How a model is parted into layer groups, and which are chosen."""
    groups = parser.add_more("layer groups")
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
