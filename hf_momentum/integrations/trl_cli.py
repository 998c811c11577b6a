"""`hf-momentum run trl sft ...`: TRL's own scripts, in this process, with their own parsers.

The command `trl` starts every script in a new process, in which our names would not be known.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence

from hf_momentum.errors import InputError, nearest


def run(words: Sequence[str]) -> None:
    """Do what `trl` does with these words, such as `["sft", "--optim", "tam", ...]`, without starting a process.

    Raises:
        InputError: TRL is not installed, has no such script, or its script does not know an argument. Those of
            `accelerate launch`, which `trl` takes among its own, go to `accelerate launch` itself.
    """
    if importlib.util.find_spec("trl") is None:
        raise InputError("trl is not installed: pip install 'hf-momentum[trl]'")
    import trl.scripts

    names = [module.name for module in pkgutil.iter_modules(trl.scripts.__path__)]
    script = importlib.import_module(f"trl.scripts.{words[0]}") if words and words[0] in names else None
    if script is None or "make_parser" not in vars(script):
        named = repr(words[0]) if words else "none"
        close = nearest(words[0], names) if words else ""
        raise InputError(f"trl: name a training script, such as sft or dpo; got {named}{close}")
    parser = script.make_parser(prog=f"trl {words[0]}")
    *parsed, unknown = parser.parse_args_and_config(list(words[1:]), return_remaining_strings=True)
    if unknown:
        raise InputError(
            f"trl {words[0]} does not know {' '.join(unknown)}. What is meant for the launcher goes before it: "
            f"accelerate launch ... -m hf_momentum.run trl {words[0]} ..."
        )
    script.main(*parsed)
