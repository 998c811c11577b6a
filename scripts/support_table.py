"""Writes README's and docs/scale.md's tables of support from docs/support.json, which `make matrix` makes.

python scripts/support_table.py          rewrite the two files
python scripts/support_table.py --check  only say whether they are up to date (exit status 1 if not)
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_momentum.integrations import OPTIMIZERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "support.json"
BEGIN, END = "<!-- {} from {}: begin -->", "<!-- {}: end -->"


def support(results: Mapping[str, Any]) -> str:
    """Layout by method: exact, refused or untested."""
    differences, tolerance = results["differences"], results["tolerance"]
    rows = ["| layout | " + " | ".join(f"`{name}`" for name in OPTIMIZERS) + " |", "|---" * (len(OPTIMIZERS) + 1) + "|"]
    for layout, suffix in _layouts(differences):
        cells = [_word(differences.get(name + suffix, {}).get(layout), tolerance) for name in OPTIMIZERS]
        what = {"": "", "-lora": ", LoRA", "-accumulation": ", accumulation over 2", "-odd": ", odd sizes"}[suffix]
        rows.append(f"| {layout}{what} | " + " | ".join(cells) + " |")
    rows += [f"| {layout} | " + " | ".join(["refused"] * len(OPTIMIZERS)) + " |" for layout in results["refused"]]
    return "\n".join(rows)


def figures(results: Mapping[str, Any]) -> str:
    """Case by layout: the largest difference of any weight over the largest weight, after 20 steps."""
    differences = results["differences"]
    shown = list(dict.fromkeys(layout for layout, suffix in _layouts(differences) if suffix != "-odd"))
    return _by_layout(differences, shown)


def half(results: Mapping[str, Any]) -> str:
    """The same for bf16."""
    differences = results["differences"]
    layouts = dict.fromkeys(layout for found in differences.values() for layout in found if "bf16" in layout)
    return _by_layout(differences, list(layouts))


def _by_layout(differences: Mapping[str, Mapping[str, float]], shown: list[str]) -> str:
    rows = ["| case | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for label, found in differences.items():
        if any(layout in found for layout in shown):
            cells = [f"{found[layout]:.0e}" if layout in found else "" for layout in shown]
            rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _layouts(differences: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Layouts with the suffix of their cases, as they come up in the results of the first method."""
    first = next(iter(OPTIMIZERS))
    found = []
    for suffix in ("", "-lora", "-accumulation", "-odd"):
        found += [(layout, suffix) for layout in differences.get(first + suffix, {})]
    return found


def _word(difference: float | None, tolerance: float) -> str:
    if difference is None:
        return "untested"
    return "exact" if difference <= tolerance else f"off by {difference:.0e}"


def replaced(text: str, name: str, table: str, source: str = "docs/support.json") -> str:
    """`text` with `table` between the two markers of that name, which also say where the table comes from.

    Raises:
        ValueError: the markers are not there.

    Example:
        >>> replaced("<!-- t from docs/x.json: begin --> old <!-- t: end -->", "t", "new", "docs/x.json")
        '<!-- t from docs/x.json: begin -->\\n\\nnew\\n\\n<!-- t: end -->'
    """
    begin, end = BEGIN.format(name, source), END.format(name)
    before, found, rest = text.partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        raise ValueError(f"no markers {begin} and {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main() -> int:
    """Rewrite the tables, or check them."""
    results = json.loads(RESULTS.read_text())
    stale = []
    tables = (("README.md", "support", support), ("docs/scale.md", "figures", figures), ("docs/scale.md", "bf16", half))
    for file, name, table in tables:
        path = ROOT / file
        text = path.read_text()
        new = replaced(text, name, table(results))
        if new != text:
            stale.append(file)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale:
        print(("out of date: " if "--check" in sys.argv else "rewritten: ") + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
