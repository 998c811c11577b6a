"""What makes pages written for GitHub's Markdown read the same on the site; MkDocs calls `on_page_markdown`."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"

_ITEM = re.compile(r"^(\s*)([-*]|\d+\.) ")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_SHOWN = re.compile(r"^<!-- show (\S+) -->$")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Called by MkDocs for every page."""
    return for_site(markdown, (DOCS / page.file.src_uri).parent)


def for_site(markdown: str, folder: Path) -> str:
    r"""A page of `folder` in Python-Markdown's dialect.

    - Contents of lists are indented by four spaces, and a list begins after an empty line.
    - What is folded is Markdown.
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
    fence: int | None = None  # spaces before the fence that is open
    in_list = after_fence = loose = False  # loose: the item has an empty line in it
    for line in markdown.splitlines():
        spaces = len(line) - len(line.lstrip(" "))
        shown, item = _SHOWN.match(line), _ITEM.match(line)
        if line.lstrip().startswith("```"):
            in_list = in_list and spaces > 0
            fence, after_fence = (spaces, False) if fence is None else (None, True)
            lines.append(" " * _deeper(spaces, in_list) + line.lstrip(" "))
        elif fence is not None:
            lines.append(" " * (_deeper(fence, in_list) - fence) + line if line.strip() else line)
        elif shown:
            lines += ["```python", (DOCS / shown[1]).read_text(encoding="utf-8").rstrip(), "```"]
        else:
            above = lines[-1] if lines else ""
            if item and above.strip() and (after_fence or (not spaces and (loose or not in_list))):
                lines.append("")
            loose = in_list and (not line.strip() or (loose and spaces > 0))
            if line.strip() and not spaces:
                # A line that goes on lazily belongs to the item above it; after an empty line it ends the list.
                in_list = bool(item) or (in_list and bool(above.strip()))
            after_fence = False
            text = re.sub(r"\\$", "  ", line.lstrip(" ")).replace("<details>", '<details markdown="1">')
            lines.append(" " * _deeper(spaces, in_list) + _LINK.sub(lambda link: _on_the_site(link, folder), text))
    return "\n".join(lines)


def _deeper(spaces: int, in_list: bool) -> int:
    """Items of `-` are continued by two spaces and those of `1.` by three; Python-Markdown wants four."""
    return 4 * ((spaces + 2) // 3) if in_list else spaces


def _on_the_site(link: re.Match[str], folder: Path) -> str:
    text, target = link[1], Path(os.path.normpath(folder / link[2]))
    if target.is_relative_to(DOCS):
        return link[0]
    place = target.relative_to(ROOT).as_posix()
    named = text.strip("`/")
    return text if place.endswith(named) else f"{text} ({place})"
