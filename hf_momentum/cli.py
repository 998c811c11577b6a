"""The command `hf-momentum`: find the command that was typed and call its module in `commands/`."""

import argparse
import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence

from hf_momentum.commands.answers import print_json
from hf_momentum.errors import InputError, TrainingStopped, nearest

# Each is the module of that name in commands/, imported when it is asked for, and its line in the help.
COMMANDS = {
    "init": "write a recipe for your own model and data",
    "train": "run a recipe and write its report",
    "evaluate": "score a model on a suite of splits",
    "compare": "compare tuned optimizers over seeds",
    "pareto": "compare gradient surgeries by their fronts",
    "stream": "fine-tune through domains and see what is forgotten",
    "diagnose": "find the layers that a model's errors point to",
    "repair": "retrain those layers, and verify it",
    "run": "run any script with our --optim names",
    "export": "write a checkpoint as a plain folder",
    "push": "push a run or a checkpoint to the Hub",
    "doctor": "check this installation, and say what will be refused",
    "optimizers": "list the optimizers and their arguments",
    "schema": "print the JSON schema of recipes, for editors",
    "completion": "print what a shell needs to complete our words",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: the command's own, 2 after one line on standard error for input that cannot be used, 130 after
        an interrupt from the keyboard.

    Example:
        >>> main(["optimizers"])
        tam ... Heavy ball whose gradients are damped by their angle to the momentum (torque-aware momentum).
        ...
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _refuse(words, "interrupted", 128 + signal.SIGINT)
    except (InputError, TrainingStopped) as error:
        return _refuse(words, str(error), 2)
    except OSError as error:
        if error.errno not in _OF_THE_PLACE or error.filename is None:
            raise
        why = f"{error.filename}: {error.strerror}; name another place, or check what is there and who may write to it"
        return _refuse(words, why, 2)


# A path that cannot be used as it was meant. A file that is missing is looked for where it is named.
_OF_THE_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def _refuse(words: Sequence[str], why: str, status: int) -> int:
    if "--json" in words and words[0] != "run":  # what follows `run` is another program's
        print_json({"error": why, "exit": status})
    else:
        print(f"error: {why}", file=sys.stderr, flush=True)
    return status


def _dispatch(words: list[str]) -> int:
    if not words:
        raise InputError("no command; `hf-momentum --help` lists them, and `hf-momentum COMMAND --help` explains one")
    name, *rest = words
    if name in ("-h", "--help"):
        _parser().print_help()
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"hf-momentum {version('hf-momentum')}")
        return 0
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)}; `hf-momentum --help` lists them")
    status: int = importlib.import_module(f"hf_momentum.commands.{name}").main(rest)
    return status


def _parser() -> argparse.ArgumentParser:
    """For the help alone: words are read by the command's own parser."""
    parser = argparse.ArgumentParser(
        prog="hf-momentum",
        description="Momentum and gradient methods for fine-tuning, measured under distribution shift.",
        epilog="example: hf-momentum train --config recipes/quickstart.yaml",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    return parser


def console() -> None:
    """Entry point of the installed command and of `python -m hf_momentum`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every data-loader fork
    try:
        try:
            sys.exit(main())
        finally:
            sys.stdout.flush()  # here, where it can be answered for
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(128 + signal.SIGPIPE)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed, as `| head` does; nothing more is then written to it."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True
