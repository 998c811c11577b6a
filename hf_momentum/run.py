"""Run somebody else's script or module with our optimizer names registered, without editing it.

hf-momentum run train.py --optim tam ...
hf-momentum run trl.scripts.sft --optim adatamw ...
accelerate launch -m hf_momentum.run train.py --optim tam ...
"""

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.errors import InputError


def run(arguments: Sequence[str]) -> None:
    """Run `arguments[0]`, a script's path or a module's name, as `__main__` with the rest as its arguments.

    Raises:
        InputError: no target is given, or it is neither a file nor an importable module.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise InputError("usage: hf-momentum run SCRIPT_OR_MODULE [its arguments]")
    target, *rest = arguments
    if Path(target).is_file():
        sys.argv = [target, *rest]
        sys.path[0] = str(Path(target).resolve().parent)  # as `python script.py` does
        runpy.run_path(target, run_name="__main__")
        return
    try:
        found = importlib.util.find_spec(target)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise InputError(f"{target!r} is neither a file nor a module that can be imported here")
    sys.argv = [target, *rest]
    runpy.run_module(target, run_name="__main__", alter_sys=True)


def main() -> None:
    """Entry point of `python -m hf_momentum.run`."""
    try:
        run(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
