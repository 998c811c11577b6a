"""Words of the command line and of its progress."""


def listed(text: str) -> list[str]:
    """The words of a list with commas.

    Example:
        >>> listed("bloop, mixed"), listed("")
        (['bloop', 'mixed'], [])
    """
    return [word.strip() for word in text.split(",") if word.strip()]


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
