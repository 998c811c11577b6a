"""What every report needs: lists, figures and names in words, and files that appear whole or not at all."""

import math
from collections.abc import Sequence
from pathlib import Path


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"]), listed([])
        ('a, b and c', 'a', '')
    """
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def significant(value: float) -> str:
    """A figure of any size with three digits that count.

    Example:
        >>> significant(0.01234), significant(1.2345e-5), significant(12.345), significant(123456.7), significant(0)
        ('0.0123', '1.23e-5', '12.3', '123,457', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def short(place: str) -> str:
    """A path is a long story about one machine: its end says what it is.

    Example:
        >>> short("/here/runs/tuned/model"), short("gpt2")
        ('tuned/model', 'gpt2')
    """
    path = Path(place)
    return str(Path(*path.parts[-2:])) if path.is_absolute() else place


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that who looks while it is written, or after the process died, finds the old one or the new one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.md"
        >>> write_whole(path, "text"), path.read_text()
        (None, 'text')
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
