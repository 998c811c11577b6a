"""Words of the command line and of its progress."""

from hf_momentum.errors import InputError


def listed(text: str) -> list[str]:
    """The words of a list with commas.

    Example:
        >>> listed("bloop, mixed"), listed("")
        (['bloop', 'mixed'], [])
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(name: str, text: str) -> list[float]:
    """The numbers of a list with commas.

    Raises:
        InputError: a word is no number; `name` says of which argument.

    Example:
        >>> numbers("lambdas", "0.01,1")
        [0.01, 1.0]
    """
    try:
        return [float(word) for word in listed(text)]
    except ValueError as error:
        raise InputError(f"{name} must be numbers with commas, such as 0.01,0.1,1; got {text!r}") from error


def duration(seconds: float) -> str:
    """In the unit that fits.

    Example:
        >>> duration(12.3), duration(600), duration(9000)
        ('12 s', '10 min', '2.5 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
