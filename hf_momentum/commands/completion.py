"""`hf-momentum completion`: what a shell needs to complete our words."""

import argparse
import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from hf_momentum import commands
from hf_momentum.commands.parsing import OneLineParser, command_parser
from hf_momentum.errors import InputError

SHELLS = ("bash", "zsh", "fish")

HELP = """\
Print the script with which a shell completes commands, options, recipe fields, optimizers and shipped recipes.

examples:
  hf-momentum completion bash > ~/.local/share/bash-completion/completions/hf-momentum
  hf-momentum completion zsh > ~/.zfunc/_hf-momentum
  hf-momentum completion fish > ~/.config/fish/completions/hf-momentum.fish

A new shell then completes. For zsh, ~/.zfunc must be in fpath before compinit runs."""

# These take any field of a recipe beside their own options.
_WITH_FIELDS = ("train", "pareto", "compare", "stream", "doctor")


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("completion", HELP)
    made.add_argument("shell", choices=SHELLS, help="which shell")
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    print(script(known.shell), flush=True)
    return 0


def script(shell: str) -> str:
    """The script for one shell.

    Raises:
        InputError: shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion needs shtab, which is not installed; run pip install shtab") from error
    from hf_momentum.training.recipe import shipped_folder

    names = {
        folder: [
            str(path.relative_to(shipped_folder(folder)).with_suffix(""))
            for path in sorted(shipped_folder(folder).rglob("*.yaml"))
        ]
        for folder in ("recipes", "accelerate_configs", "suites")
    }
    preamble = {
        "bash": "\n".join(
            f'_hf_momentum_{key}() {{ compgen -W "{" ".join(found)}" -- "$1"; compgen -f -- "$1"; }}'
            for key, found in names.items()
        ),
        "zsh": "\n".join(
            f"_hf_momentum_{key}() {{ _alternative 'shipped:shipped:({' '.join(found)})' 'files:file:_files' }}"
            for key, found in names.items()
        ),
        "fish": "",
    }
    return str(shtab.complete(_whole_parser(shtab.FILE, names), shell, preamble=preamble[shell]))


def command_parsers() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Each command's line, from its module's first one, and its parser.

    Example:
        >>> command_parsers()["export"][0]
        'a checkpoint as a plain folder'
    """
    found = {}
    for entry in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{entry.name}")
        start, _, line = (module.__doc__ or "").splitlines()[0].partition(": ")
        if start == f"`hf-momentum {entry.name}`":
            found[entry.name] = (line.rstrip("."), module.parser())
    return found


def _whole_parser(file: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> argparse.ArgumentParser:
    """All commands with their options, and the fields of recipes where they are taken, as one parser."""
    from hf_momentum.integrations import OPTIMIZERS
    from hf_momentum.training import recipe

    fields = recipe.parser()._actions
    shipped = {
        "config": _shipped("recipes", names["recipes"], file),
        "accelerate_config": _shipped("accelerate_configs", names["accelerate_configs"], file),
        "suite": _shipped("suites", names["suites"], file),
    }
    whole = OneLineParser(prog="hf-momentum", description="")
    whole.add_argument("--version", action="store_true", help="print the version and exit")
    every = whole.add_subparsers(metavar="COMMAND")
    for name, (line, made) in command_parsers().items():
        own = every.add_parser(name, help=line, add_help=False, parents=[made], conflict_handler="resolve")
        own.description = line
        taken = {option for action in made._actions for option in action.option_strings}
        if name in _WITH_FIELDS:
            _add_fields(own, fields, taken)
        for action in own._actions:
            action.help = _short(action.help)
            if action.dest == "optim" and action.choices is None:
                action.choices = list(OPTIMIZERS)
            elif action.dest in shipped:
                action.complete = shipped[action.dest]  # type: ignore[attr-defined]
            elif action.choices is None and action.nargs != 0:
                action.complete = file  # type: ignore[attr-defined]
    return whole


def _add_fields(own: argparse.ArgumentParser, fields: Sequence[argparse.Action], taken: set[str]) -> None:
    for action in fields:
        option = f"--{action.dest}"
        if action.dest != "help" and option in action.option_strings and option not in taken:
            choices = None if action.choices is None else [str(choice) for choice in action.choices]
            own.add_argument(option, choices=choices, help=action.help)


def _shipped(folder: str, names: Sequence[str], file: Mapping[str, str]) -> dict[str, str]:
    function = f"_hf_momentum_{folder}"
    return {"bash": function, "zsh": function, "fish": f"{' '.join(names)} {file['fish']}"}


def _short(text: str | None) -> str:
    """The first clause of a help text, without what argparse would fill in."""
    words = " ".join((text or "").split()).replace("(%(default)s)", "").replace("%(default)s", "").replace("%", "%%")
    return words[:70].strip()
