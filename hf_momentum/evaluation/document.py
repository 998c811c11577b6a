"""One document, two forms: Markdown with pictures beside it, and one HTML file that needs nothing but a browser.

The HTML page asks nobody for anything: its style and its pictures stand inside it, and a content security policy tells
the browser to refuse whatever would load more. No script is needed to read it. Pictures are SVG with real text, so that
they can be searched and scaled. Equal documents give equal bytes.

In texts `**bold**` and `` `code` `` are marks; everything else is shown as it stands. `literal` guards names that may
contain a mark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_momentum.evaluation.writing import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = Path(__file__).with_name("page.css")
_CONTENTS_FROM = 4  # headings that make a page long enough for a list of contents
_PICTURE_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")


# ---- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The sentence that a reader came for."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 to 4; the title of the document is level 1."""

    text: str
    level: int = 2

    def __post_init__(self) -> None:
        if self.level not in (2, 3, 4):
            raise ValueError(f"level of heading {self.text!r} must be 2, 3 or 4, got {self.level}")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; its first `left` columns are words, the others figures, which stand at the right of their column.

    Raises:
        ValueError: a row does not have as many cells as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row {list(row)} must have {len(self.header)} cells like {list(self.header)}")


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        name: of its file, without ending: small letters, digits, single `-` and `_` between them.
        caption: what to read from it; stands below it.
        alt: what it shows, in words, for those who do not see it.
        figure: drawn by `hf_momentum.evaluation.pictures`, or any other.

    Raises:
        ValueError: the name cannot be a file's, or `alt` is empty.
    """

    name: str
    caption: str
    alt: str
    figure: Figure

    def __post_init__(self) -> None:
        if not _PICTURE_NAME.fullmatch(self.name):
            raise ValueError(f"name of a picture must be small letters, digits, '-' and '_', got {self.name!r}")
        if not self.alt.strip():
            raise ValueError(f"alt of picture {self.name!r} is empty: say in words what it shows")


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away below a summary until a reader asks for them."""

    summary: str
    blocks: Sequence[Block]


Block = Verdict | Heading | Text | Bullets | Table | Picture | Code | Details


# ---- marks in texts --------------------------------------------------------------------------------------------------

_MARK = re.compile(
    r"\\(?P<literal>[\\*`])"
    r"|`(?P<code>[^`]+)`"
    r"|\*\*(?=\S)(?P<bold>(?:\\[\\*`]|`[^`]+`|(?!\*\*).)+?)(?<=\S)\*\*",
    re.DOTALL,
)


def literal(text: str) -> str:
    r"""The text with its marks disarmed, for names and paths that others chose.

    Example:
        >>> print(literal("data/**/*.jsonl"))
        data/\*\*/\*.jsonl
        >>> Document("t", [Text(literal("a **b** `c`"))]).to_html().count("<p>a **b** `c`</p>")
        1
    """
    return re.sub(r"[\\*`]", r"\\\g<0>", text)


def _pieces(text: str) -> list[tuple[str, str]]:
    """Pairs of a kind ("text", "code" or "bold", whose content may hold code) and what is inside the mark."""
    found, plain, end = [], "", 0
    for mark in _MARK.finditer(text):
        plain += text[end : mark.start()]
        end = mark.end()
        if mark.lastgroup == "literal":
            plain += mark["literal"]
            continue
        if plain:
            found.append(("text", plain))
            plain = ""
        found.append((str(mark.lastgroup), mark[str(mark.lastgroup)]))
    plain += text[end:]
    return [*found, ("text", plain)] if plain else found


def _inline_html(text: str) -> str:
    shown = {
        "text": lambda inside: html.escape(inside, quote=False),
        "code": lambda inside: f"<code>{html.escape(inside, quote=False)}</code>",
        "bold": lambda inside: f"<strong>{_inline_html(inside)}</strong>",
    }
    return "".join(shown[kind](inside) for kind, inside in _pieces(text))


def _inline_markdown(text: str) -> str:
    shown = {"text": _escaped, "code": lambda inside: f"`{inside}`", "bold": lambda inside: _bold(inside)}
    return "".join(shown[kind](inside) for kind, inside in _pieces(" ".join(text.split())))


def _bold(text: str) -> str:
    return f"**{_inline_markdown(text)}**"


def _escaped(text: str) -> str:
    """What Markdown would take for a mark, disarmed; intervals such as [0.1, 0.2] and names like ahb_sgd stay."""
    text = re.sub(r"[\\`*~$]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"<(?=[A-Za-z/!?])|\](?=[(\[:])", r"\\\g<0>", text)
    return re.sub(r"&(?=#?\w+;)", "&amp;", text)


def _line(text: str) -> str:
    """A paragraph of Markdown: its first characters must not start a list, a quotation or a heading."""
    shown = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", _inline_markdown(text))
    return re.sub(r"^(?=>|(#+|-+|[+])(\s|$)|-{3})", r"\\", shown)


def _plain(text: str) -> str:
    """Without marks, for attributes."""
    return "".join(inside if kind != "bold" else _plain(inside) for kind, inside in _pieces(text))


# ---- the document ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A title and blocks.

    Raises:
        ValueError: two pictures have the same name.

    Example:
        >>> document = Document("Report", [Verdict("**tam** won"), Table(["method", "loss"], [["`tam`", "1.25"]])])
        >>> print(document.to_markdown())
        # Report
        <BLANKLINE>
        > **tam** won
        <BLANKLINE>
        | method | loss |
        | --- | ---: |
        | `tam` | 1.25 |
        <BLANKLINE>
        >>> '<td class="figure">1.25</td>' in document.to_html()
        True
    """

    title: str
    blocks: Sequence[Block]

    def __post_init__(self) -> None:
        names = [picture.name for picture in self.pictures]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each picture needs a name of its own; several are called {', '.join(twice)}")

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, folded ones included, in the order of the document."""
        return [block for block in _flat(self.blocks) if isinstance(block, Picture)]

    def to_markdown(self, pictures: str = "plots") -> str:
        """As Markdown that looks for `NAME.png` in the folder `pictures`."""
        return "\n\n".join([f"# {_inline_markdown(self.title)}", *_markdown(self.blocks, pictures)]) + "\n"

    def to_html(self) -> str:
        """As one page without any reference to another file."""
        headings = [block for block in _flat(self.blocks) if isinstance(block, Heading)]
        anchors = _anchors(headings)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
            f'<link rel="icon" href="data:,">\n<title>{html.escape(_plain(self.title))}</title>\n'
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n<h1>{_inline_html(self.title)}</h1>\n"
            f"{self._body(headings, anchors)}</main>\n</body>\n</html>\n"
        )

    def _body(self, headings: Sequence[Heading], anchors: Sequence[str]) -> str:
        """The list of contents stands before the first heading, below the verdict."""
        first = next((place for place, block in enumerate(self.blocks) if isinstance(block, Heading)), 0)
        left = iter(anchors)
        before, after = _html(self.blocks[:first], left), _html(self.blocks[first:], left)
        return before + _contents(headings, anchors) + after

    def write(self, folder: Path, stem: str = "report") -> Path:
        """Write `plots/*.png`, `STEM.md` and `STEM.html`; each file appears whole or not at all.

        Returns:
            The path of the HTML file.
        """
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            write_whole(folder / "plots" / f"{picture.name}.png", _png(picture.figure))
        write_whole(folder / f"{stem}.md", self.to_markdown())
        write_whole(folder / f"{stem}.html", self.to_html())
        return folder / f"{stem}.html"


def _flat(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from _flat(block.blocks)


def _anchors(headings: Sequence[Heading]) -> list[str]:
    """A different anchor for every heading, made of its words."""
    anchors: list[str] = []
    for heading in headings:
        slug = re.sub(r"[^a-z0-9]+", "-", _plain(heading.text).lower()).strip("-") or "section"
        anchor, count = slug, 1
        while anchor in anchors:
            count += 1
            anchor = f"{slug}-{count}"
        anchors.append(anchor)
    return anchors


def _contents(headings: Sequence[Heading], anchors: Sequence[str]) -> str:
    entries = [(h.text, anchor) for h, anchor in zip(headings, anchors, strict=True) if h.level == 2]
    if len(entries) < _CONTENTS_FROM:
        return ""
    items = "".join(f'<li><a href="#{anchor}">{_inline_html(text)}</a></li>' for text, anchor in entries)
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>\n'


# ---- Markdown --------------------------------------------------------------------------------------------------------


def _markdown(blocks: Sequence[Block], pictures: str) -> list[str]:
    return [_markdown_block(block, pictures) for block in blocks]


def _markdown_block(block: Block, pictures: str) -> str:
    match block:
        case Verdict(text):
            return f"> {_line(text)}"
        case Heading(text, level):
            return f"{'#' * level} {_inline_markdown(text)}"
        case Text(text):
            return _line(text)
        case Bullets(items):
            return "\n".join(f"- {_line(item)}" for item in items)
        case Table(header, rows, left, caption):
            ruled = ["---"] * left + ["---:"] * (len(header) - left)
            lines = [_row(header), "| " + " | ".join(ruled) + " |", *map(_row, rows)]
            return "\n".join([_line(caption), "", *lines] if caption else lines)
        case Picture(name, caption, alt, _):
            return f"![{_escaped(_plain(alt))}]({pictures}/{name}.png)" + (f"\n\n{_line(caption)}" if caption else "")
        case Code(text, language):
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"
        case Details(summary, inside):
            folded = "\n\n".join(_markdown(inside, pictures))
            return f"<details><summary>{_inline_html(summary)}</summary>\n\n{folded}\n\n</details>"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_inline_markdown(cell).replace("|", r"\|") for cell in cells) + " |"


# ---- HTML ------------------------------------------------------------------------------------------------------------


def _html(blocks: Sequence[Block], anchors: Iterator[str]) -> str:
    return "".join(_html_block(block, anchors) + "\n" for block in blocks)


def _html_block(block: Block, anchors: Iterator[str]) -> str:
    match block:
        case Verdict(text):
            return f'<p class="verdict">{_inline_html(text)}</p>'
        case Heading(text, level):
            return f'<h{level} id="{next(anchors)}">{_inline_html(text)}</h{level}>'
        case Text(text):
            return f"<p>{_inline_html(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "".join(f"<li>{_inline_html(item)}</li>\n" for item in items) + "</ul>"
        case Table():
            return _html_table(block)
        case Picture(name, caption, alt, figure):
            shown = f"<figcaption>{_inline_html(caption)}</figcaption>\n" if caption else ""
            return f'<figure>\n<div class="card" tabindex="0">\n{_svg(figure, name, alt)}\n</div>\n{shown}</figure>'
        case Code(text, language):
            kind = f' class="language-{html.escape(language)}"' if language else ""
            code = html.escape(text.strip("\n"), quote=False)
            return f'<pre tabindex="0"><code{kind}>{code}</code></pre>'
        case Details(summary, inside):
            return f"<details>\n<summary>{_inline_html(summary)}</summary>\n{_html(inside, anchors)}</details>"


def _html_table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str, scope: str = "") -> str:
        kinds = ["" if column < table.left else _kind(cell) for column, cell in enumerate(row)]
        inside = [_inline_html(cell) for cell in row]
        inside[:1] = [f'<div class="name">{first}</div>' for first in inside[:1]]
        return "".join(f"<{tag}{scope}{kind}>{cell}</{tag}>" for cell, kind in zip(inside, kinds, strict=True))

    caption = f'<p class="caption">{_inline_html(table.caption)}</p>\n' if table.caption else ""
    named = f' role="region" aria-label="{html.escape(_plain(table.caption))}"' if table.caption else ""
    head = cells(table.header, "th", ' scope="col"')
    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in table.rows)
    # A table wider than the window scrolls in itself; `tabindex` lets the keyboard do it too.
    return (
        f'{caption}<div class="wide" tabindex="0"{named}>\n<table>\n<thead>\n<tr>{head}</tr>\n</thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def _kind(cell: str) -> str:
    """Figures and their intervals are not broken into lines; words in their columns are."""
    return ' class="figure"' if any(letter.isdigit() for letter in cell) else ' class="figure words"'


# ---- pictures --------------------------------------------------------------------------------------------------------

# Text stays text. DejaVu is what Matplotlib measures with, and few fonts are wider: labels fit in another one too.
_SVG = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}


def _svg(figure: Figure, name: str, alt: str) -> str:
    """The figure for the inside of a page: no header, no metadata, and ids that no other figure has."""
    import matplotlib

    _settle(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({**_SVG, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'(\sid=")|(url\(#)|\sxlink:href="#', lambda found: _own(found, name), drawn)
    opening = re.search(r"<svg[^>]*>", drawn)
    assert opening is not None
    box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', opening[0])
    assert box is not None
    width, height = float(box[1]), float(box[2])
    inside = re.sub(r"\s*\n\s*", "\n", drawn[opening.end() :]).strip()
    # It may shrink with the window to three quarters; a smaller one would be hard to read, so its card scrolls.
    return (
        f'<svg role="img" aria-label="{html.escape(_plain(alt))}" viewBox="0 0 {width:g} {height:g}" '
        f'style="width: {width:g}pt; min-width: {0.75 * width:g}pt">\n{inside}'
    )


def _settle(figure: Figure) -> None:
    """Lay the figure out once: a constrained layout moves a little with each drawing, and both files must be equal."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def _own(found: re.Match[str], name: str) -> str:
    prefix = f"plot-{name}--"
    if found[1]:
        return f"{found[1]}{prefix}"
    return f"{found[2]}{prefix}" if found[2] else f' href="#{prefix}'


def _png(figure: Figure) -> bytes:
    _settle(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
