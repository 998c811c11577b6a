"""What every report needs: lists in words, and files that appear whole or not at all."""

from collections.abc import Sequence
from pathlib import Path


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"]), listed([])
        ('a, b and c', 'a', '')
    """
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


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
