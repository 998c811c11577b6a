"""Run somebody else's script or module with our optimizer names registered, without editing it.

hf-momentum run train.py --optim tam ...
hf-momentum run trl sft --optim adatamw ...
hf-momentum run llamafactory.launcher settings.yaml
accelerate launch -m hf_momentum.run train.py --optim tam ...
"""

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from hf_momentum.errors import InputError
from hf_momentum.integrations import trl_cli


def run(arguments: Sequence[str]) -> None:
    """Run `arguments[0]` with the rest as its arguments, in this process.

    It is one of: a script's path; `trl`, with the name of TRL's script as first argument; the name of a module, or of a
    package with a `__main__`; an installed command, such as `llamafactory-cli`, which runs as it is: where it starts
    processes of its own, these do not know our names.

    Raises:
        InputError: no target is given, or it is none of these.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise InputError("usage: hf-momentum run SCRIPT_OR_MODULE [its arguments]")
    target, *rest = arguments
    sys.argv = [target, *rest]
    if Path(target).is_file():
        sys.path[0] = str(Path(target).resolve().parent)  # as `python script.py` does
        runpy.run_path(target, run_name="__main__")
    elif target == "trl":
        trl_cli.run(rest)
    elif _runs_as_module(target):
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        commands = entry_points(group="console_scripts", name=target)
        if not commands:
            raise InputError(f"{target!r} is neither a file nor a module or command that is installed here")
        sys.exit(next(iter(commands)).load()())


def _runs_as_module(name: str) -> bool:
    if not all(part.isidentifier() for part in name.split(".")):  # such as ./train.py
        return False
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__")
    except (ModuleNotFoundError, ValueError):
        return False
    return found is not None


def main() -> None:
    """Entry point of `python -m hf_momentum.run`."""
    try:
        run(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
