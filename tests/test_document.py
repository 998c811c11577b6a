"""A document says the same in both its forms, asks nobody for anything, and shows marks of others as they stand."""

import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_momentum.evaluation.document import (
    Bullets,
    Code,
    Details,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    literal,
)
from tests import html_specimen

VOID = {"meta", "link", "br", "hr", "img", "input"}
STYLE = Path(__file__).parent.parent / "hf_momentum" / "evaluation" / "page.css"


@pytest.fixture(scope="module")
def document() -> Document:
    return html_specimen.document(html_specimen.METHODS[:2], html_specimen.SPLITS[:2])


@pytest.fixture(scope="module")
def page(document) -> str:
    return document.to_html()


# ---- the page --------------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Reads a page and complains about tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "title", "script", "nav", "svg"} & set(self.open):
            self.words.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]


def test_every_tag_is_closed_in_order(page):
    assert len(Parsed(page).tags) > 500
    with pytest.raises(AssertionError, match="closes"):
        Parsed(page.replace("</figure>", "", 1))


def outside(page: str) -> list[str]:
    """What a page refers to outside of itself, anchors and data aside."""
    parsed = Parsed(page)
    found = parsed.values("src", "href", "srcset", "data", "action", "poster", "xlink:href")
    found += re.findall(r"url\(\s*[\"']?([^)\"']*)", page) + re.findall(r"@import[^;]*", page)
    return [one for one in found if not one.startswith(("#", "data:"))]


def test_nothing_is_asked_of_anybody(page):
    assert outside(page) == []
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in Parsed(page).tags}
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "fault", ['<img src="//x/a.png">', '<link href="https://x/a.css">', "<p style='background: url(http://x/a)'></p>"]
)
def test_a_reference_to_others_would_be_seen(page, fault):
    assert outside(page.replace("</main>", f"{fault}</main>"))


def test_no_two_figures_share_an_identity_and_every_reference_has_its_target(page):
    parsed = Parsed(page)
    identities = parsed.values("id")
    assert len(set(identities)) == len(identities)
    targets = {one[1:] for one in parsed.values("href") if one.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", page)
    )
    assert len(targets) > 20 and targets <= set(identities)


def test_pictures_hold_real_text_and_say_what_they_show(document, page):
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawn) == len(document.pictures) == 7
    for picture, svg in zip(document.pictures, drawn, strict=True):
        root = xml.etree.ElementTree.fromstring(svg)
        assert root.attrib["aria-label"] == picture.alt and root.attrib["role"] == "img"
        assert [text.text for text in root.iter("text")], picture.name
    assert "validation loss" in page and "line through baselines" in page


def test_equal_documents_give_equal_bytes(document, page, tmp_path):
    again = html_specimen.document(html_specimen.METHODS[:2], html_specimen.SPLITS[:2])
    assert again.to_html() == page and again.to_html() == page, "drawing must not change the figure either"
    first, second = Document("t", document.blocks[4:5]), Document("t", again.blocks[4:5])
    names = [
        path.relative_to(tmp_path / "a") for path in [first.write(tmp_path / "a"), *(tmp_path / "a/plots").iterdir()]
    ]
    second.write(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_both_forms_and_the_pictures_are_written(document, tmp_path):
    short = Document(document.title, [document.blocks[0], *(b for b in document.blocks if isinstance(b, Picture))][:2])
    path = short.write(tmp_path / "deep" / "folder", stem="comparison")
    assert path == tmp_path / "deep" / "folder" / "comparison.html" and path.read_text() == short.to_html()
    text = path.with_suffix(".md").read_text()
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG"), name
    assert sorted(one.name for one in path.parent.rglob("*") if one.is_file()) == [
        "comparison.html",
        "comparison.md",
        "splits.png",
    ], "no part of a file is left over"


def test_a_write_that_fails_leaves_the_former_page_whole(tmp_path, monkeypatch):
    path = Document("before", []).write(tmp_path)
    former = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        Document("after", []).write(tmp_path)
    assert path.read_bytes() == former


def contents(count: int) -> str:
    return Document("t", [Verdict("v"), *(Heading(f"Part {n % 3}") for n in range(count))]).to_html()


def test_a_long_page_has_a_list_of_contents_below_the_verdict_with_anchors_of_their_own():
    assert "<nav" not in contents(3)
    page = contents(4)
    assert re.findall(r'<h2 id="(.*?)"', page) == re.findall(r'<a href="#(.*?)"', page)
    assert len(set(re.findall(r'<h2 id="(.*?)"', page))) == 4
    assert page.index("verdict") < page.index("<nav") < page.index("<h2")


def test_equal_blocks_may_stand_twice():
    heading = Heading("Same")
    Parsed(page := Document("t", [heading, heading]).to_html())
    assert re.findall(r'<h2 id="(.*?)"', page) == ["same", "same-2"]


# ---- both forms say the same -----------------------------------------------------------------------------------------


def words(page: str) -> str:
    return "".join("".join(Parsed(page).words).split())


def rendered(markdown: str) -> str:
    """Markdown as an independent program reads it."""
    markdown_it = pytest.importorskip(
        "markdown_it", reason="markdown-it, which reads the Markdown back, is not installed"
    )
    return markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)


def both(*blocks) -> None:
    document = Document("Title", blocks)
    assert words(rendered(document.to_markdown())) == words(document.to_html())


NASTY = (
    "a * b * c ** d ** e",
    "_x_ and ahb_adamw_ and __init__",
    "[0.1, 0.2] [a](b) [c][d]",
    "<script>alert(1)</script> a<b>c & d &amp; &lt;",
    "p < 0.05 and > 3",
    "~~no~~ ~1~",
    r"C:\new\*\_x",
    "$x$ | y || z",
    "`",
    "a ``b`` c",
    "**",
    "**bold with `co*de`** and `**code**`",
    "1. one",
    "12) twelve",
    "- dash",
    "+ plus",
    "# head",
    "> quote",
    "---",
    "***",
    "===",
    "![x](y)",
    "naïve “quotes” 日本",
    "a\nb",
)


@pytest.mark.parametrize("text", NASTY)
def test_marks_of_markdown_and_html_stay_text_in_both_forms(text):
    for shown in (text, literal(text)):
        both(Text(shown), Verdict(shown), Bullets([shown, "x"]), Table(["a", shown], [[shown, "1"]], caption=shown))


@given(st.text(alphabet="ab 12.-+*_`\\[]()<>&#~|!$:/;=", max_size=24).filter(str.strip))
@example("*a*")
def test_any_name_stays_what_it_is(text):
    """As it stands in HTML; in Markdown as another program reads it."""
    both(Text(literal(text)), Table(["x", literal(text)], [[literal(text), "1"]]))
    page = Document("t", [Text(literal(text))]).to_html()
    assert words(page) == "".join(f"t{text}".split())


def test_bold_and_code_are_marks():
    page = Document("t", [Text("a **b `c` d** e `f`")]).to_html()
    assert "<p>a <strong>b <code>c</code> d</strong> e <code>f</code></p>" in page
    assert "a **b `c` d** e `f`" in Document("t", [Text("a **b `c` d** e `f`")]).to_markdown()


def test_text_of_every_block_is_in_both_forms(document):
    both(*(block for block in document.blocks if not isinstance(block, Picture | Details | Code)))


def test_folded_parts_and_code_are_in_both_forms():
    blocks = [Details("All <runs>", [Text("inside"), Code("a ``` b\n````", "yaml")]), Code("x < 1")]
    text, page = Document("t", blocks).to_markdown(), Document("t", blocks).to_html()
    assert (
        "<details><summary>All &lt;runs&gt;</summary>\n\ninside\n\n`````yaml\na ``` b\n````\n`````\n\n</details>"
        in text
    )
    assert "<pre" in page and "x &lt; 1" in page and "<summary>All &lt;runs&gt;</summary>" in page
    assert "a ``` b" in rendered(text), "a fence longer than any within"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Upper", "a b", "../x", "a--b", "ä", "-a"])
def test_names_of_pictures_that_cannot_be_files_are_refused(name):
    with pytest.raises(ValueError, match="name of a picture must be small letters"):
        Picture(name, "c", "a", None)


def test_a_picture_without_words_for_it_is_refused():
    with pytest.raises(ValueError, match="alt of picture 'x' is empty"):
        Picture("x", "c", " ", None)


def test_two_pictures_of_one_name_are_refused_even_if_one_is_folded_away():
    picture = Picture("x", "c", "a", None)
    with pytest.raises(ValueError, match="several are called x"):
        Document("t", [picture, Details("s", [picture])])


def test_a_row_that_does_not_fit_its_header_is_refused():
    with pytest.raises(ValueError, match="must have 2 cells"):
        Table(["a", "b"], [["1"]])


@pytest.mark.parametrize("level", [0, 1, 5])
def test_levels_of_headings(level):
    with pytest.raises(ValueError, match=f"must be 2, 3 or 4, got {level}"):
        Heading("x", level)


# ---- the style -------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_by_day_by_night_and_on_paper():
    """4.5 to 1, as the guidelines for accessible pages ask for text."""
    assert contrast("#ffffff", "#000000") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    palettes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    ]
    assert len(palettes) == 3
    for palette in palettes:
        for ink in ("ink", "soft", "accent"):
            assert min(contrast(palette[ink], palette[ground]) for ground in ("paper", "tint")) >= 4.5, (ink, palette)
