"""Writes docs/claims.md from docs/claims.json, which the other programs of this folder leave there.

    python scripts/claims/page.py          rewrite the page
    python scripts/claims/page.py --check  only say whether it is up to date (exit status 1 if not)

The JSON holds differences, seed by seed. Intervals, p-values and verdicts are formed from them here, each time.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ROOT, Size
from rows import NOT_TESTED, Judged, Row, as_data, from_data, judged, shown, verdict

DATA, PAGE = ROOT / "docs" / "claims.json", ROOT / "docs" / "claims.md"


@dataclass(frozen=True)
class Program:
    """What a program found: its rows, and facts that belong beside them (selected learning rates, means)."""

    name: str
    size: Size
    rows: Sequence[Row]
    facts: Sequence[str]


def keep(program: Program, path: Path) -> None:
    """Put a program's rows of one size into the JSON file, whole or not at all; rewrite the page that lies beside it."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"size": asdict(program.size), "rows": [as_data(row) for row in program.rows], "facts": [*program.facts]}
    data.setdefault(program.name, {})[program.size.name] = found
    for file, text in ((path, json.dumps(data, indent=1) + "\n"), (path.with_suffix(".md"), page(data))):
        partial = file.with_suffix(file.suffix + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


def page(data: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    raise NotImplementedError
