"""What the user can mend: exceptions that the command line prints as a single line, and the word that was meant."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A recipe, argument, dataset or checkpoint that cannot be used as given.

    The message names what was given, what is accepted, and what to do. Programs may catch it as `ValueError`.

    Example:
        >>> raise InputError("lora_r must be at least 1, got 0")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: lora_r must be at least 1, got 0
    """


class TrainingStopped(RuntimeError):
    """A run that had to stop, such as for a non-finite loss; the message says where and what to do.

    Example:
        >>> raise TrainingStopped("loss is nan at step 3")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.TrainingStopped: loss is nan at step 3
    """


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` (did you mean ...?)` for the candidates that resemble `name`, or nothing.

    Example:
        >>> nearest("adatmw", ["tam", "adatamw", "adatam"])
        " (did you mean 'adatamw' or 'adatam'?)"
    """
    close = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
