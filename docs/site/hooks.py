"""What makes pages written for GitHub's Markdown read the same on the site; MkDocs calls `on_page_markdown`."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^(```|~~~)")
_ITEM = re.compile(r"^(\s*)([-*]|\d+\.) ")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_SHOWN = re.compile(r"^<!-- show (\S+) -->$")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Called by MkDocs for every page."""
    return for_site(markdown, (DOCS / page.file.src_uri).parent)


def for_site(markdown: str, folder: Path) -> str:
    r"""A page of `folder` in Python-Markdown's dialect.

    - Contents of lists are indented by four spaces, and a list begins after an empty line.
    - A backslash at the end of a line breaks it.
    - Links to files that are not on the site become their names.
    - `<!-- show FILE -->` becomes the text of a file of docs/.

    Example:
        >>> print(for_site("Two:\n- a\n  - b\n", DOCS))
        Two:
        <BLANKLINE>
        - a
            - b
        >>> for_site("[the rule](../hf_momentum/errors.py), [a page](start.md)", DOCS)
        'the rule (hf_momentum/errors.py), [a page](start.md)'
    """
    lines: list[str] = []
    fenced = in_list = False
    for line in markdown.splitlines():
        if _FENCE.match(line):
            fenced, in_list = not fenced, False
            lines.append(line)
            continue
        if fenced:
            lines.append(line)
            continue
        item = _ITEM.match(line)
        if item and not item[1] and not in_list and lines and lines[-1].strip():
            lines.append("")
        if line.strip() and not line.startswith(" "):
            # A line that goes on lazily belongs to the item before it; only after an empty line does it end the list.
            in_list = bool(item) or (in_list and bool(lines[-1].strip()))
        shown = _SHOWN.match(line)
        if shown:
            lines += ["```python", (DOCS / shown[1]).read_text(encoding="utf-8").rstrip(), "```"]
            continue
        lines.append(_LINK.sub(lambda link: _on_the_site(link, folder), _indented(line, in_list)))
    return "\n".join(lines)


def _indented(line: str, in_list: bool) -> str:
    broken = re.sub(r"\\$", "  ", line)
    stripped = broken.lstrip(" ")
    spaces = len(broken) - len(stripped)
    # Items of `-` are continued by two spaces and those of `1.` by three.
    return " " * (4 * ((spaces + 1) // 2 if spaces % 3 else spaces // 3)) + stripped if in_list and spaces else broken


def _on_the_site(link: re.Match[str], folder: Path) -> str:
    text, target = link[1], Path(os.path.normpath(folder / link[2]))
    if target.is_relative_to(DOCS):
        return link[0]
    place = target.relative_to(ROOT).as_posix()
    named = text.strip("`")
    return text if place.endswith(named) else f"{text} ({place})"
