"""Reports as a reader sees them: in headless Chromium no label lies on another one, nothing is cut off or too wide.

A copy of the page measures itself with a script and is read back. Pages with faults show that the measuring sees them.
"""

import importlib
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_momentum.evaluation.document import Document, Picture, Text
from tests import diagnosis_specimen, html_specimen

ROOT = Path(__file__).parent.parent
WIDTHS = (1280, 400)

# Runs at the start of the page: what goes wrong from here on.
LISTEN = """
window.faults = [];
addEventListener("error", event => faults.push(event.message || "not loaded: " + event.target.outerHTML), true);
addEventListener("securitypolicyviolation", event => faults.push("refused: " + event.blockedURI), true);
for (const name of ["error", "warn"]) console[name] = (...words) => faults.push(words.join(" "));
"""

# Runs once all is loaded and refused. Boxes of text hold some air above and below the letters, which may touch.
MEASURE = """
addEventListener("load", () => setTimeout(() => {
for (const folded of document.querySelectorAll("details")) folded.open = true;
const found = {overlaps: [], cut: [], small: [], wide: [], empty: [], unnamed: [], texts: 0, figures: 0};
const name = element => element.tagName + " " + (element.id || element.className.baseVal || element.className || "");
for (const drawing of document.querySelectorAll("svg, img")) {
  const frame = drawing.getBoundingClientRect();
  found.figures += 1;
  if (frame.width < 40 || frame.height < 40) found.empty.push(name(drawing));
  if (!(drawing.getAttribute("aria-label") || drawing.getAttribute("alt"))) found.unnamed.push(name(drawing));
  const boxes = [];
  for (const text of drawing.querySelectorAll("text")) {
    if (!text.textContent.trim()) continue;
    const scale = Math.sqrt(Math.abs(text.getScreenCTM().a ** 2 + text.getScreenCTM().b ** 2));
    const size = parseFloat(getComputedStyle(text).fontSize) * scale;
    const box = text.getBoundingClientRect(), air = 0.15 * size;
    found.texts += 1;
    if (size < 8) found.small.push([text.textContent, size]);
    const beyond = [frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom];
    if (Math.max(...beyond) > 1) found.cut.push(text.textContent);
    boxes.push([box.left + air, box.right - air, box.top + air, box.bottom - air, text.textContent]);
  }
  for (const [i, a] of boxes.entries())
    for (const b of boxes.slice(0, i))
      if (a[0] < b[1] && b[0] < a[1] && a[2] < b[3] && b[2] < a[3]) found.overlaps.push([a[4], b[4]]);
}
const window_width = document.documentElement.clientWidth;
for (const element of document.body.querySelectorAll("*")) {
  const scrolls = element.parentElement.closest(".wide, .card, pre");
  if (!scrolls && element.getBoundingClientRect().right > window_width + 1) found.wide.push(name(element));
}
const page_width = document.scrollingElement.scrollWidth;
if (page_width > window_width) found.wide.push("page " + page_width);
found.faults = faults;
frameElement.dataset.found = JSON.stringify(found);
}, 100));
"""

FAULTS = ("overlaps", "cut", "small", "wide", "empty", "unnamed", "faults")


@pytest.fixture(scope="module")
def shots():
    """The program that opens pages; its module is imported as a program of its folder is."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        program = importlib.import_module("report_screenshots")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    if program.browser() is None:
        pytest.skip("no Chromium on this machine: scripts/install_browser.sh installs Debian's")
    return program


class Frames(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, dict] = {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "iframe":
            told = dict(attributes)
            self.found[told["id"]] = json.loads(told["data-found"])


def measured(shots, pages: dict[str, str], widths=WIDTHS) -> tuple[dict[str, dict], str]:
    """What each page says of itself at each width, from one start of the browser; and the browser's console."""
    frames = "".join(
        shots.framed(
            shots.scripted(page, MEASURE).replace("<head>", f"<head><script>{LISTEN}</script>"),
            width,
            900,
            f"{name} {width}",
        )
        for name, page in pages.items()
        for width in widths
    )
    dom, console = shots.run(shots.host(frames), "--dump-dom")
    return Frames(dom).found, console


DIAGNOSES = {
    "diagnosis": diagnosis_specimen.diagnosis(70),
    "repair": diagnosis_specimen.repair(26, splits=10),
    "baselines": diagnosis_specimen.baselines(26, seeds=range(12)),
}
MANY = (html_specimen.MANY_METHODS, html_specimen.MANY_SPLITS)


@pytest.fixture(scope="module")
def good(shots):
    few = html_specimen.document(html_specimen.METHODS[:2], html_specimen.SPLITS[:2])
    many = html_specimen.document(MANY[0], MANY[1][1:4], domains=MANY[1])
    committed = (ROOT / "docs" / "comparison_reviews" / "report.html").read_text()
    pages = {"few": few.to_html(), "many": many.to_html(), "committed": committed}
    return measured(shots, pages | {name: report.document().to_html() for name, report in DIAGNOSES.items()})


def reads_well(found: dict) -> bool:
    assert {fault: found[fault] for fault in FAULTS if found[fault]} == {}
    return found["figures"] == 7


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "texts"), [("few", 80), ("many", 400)])
def test_a_report_reads_well(good, name, texts, width):
    found = good[0][f"{name} {width}"]
    assert reads_well(found) and found["texts"] > texts


@pytest.mark.parametrize("width", WIDTHS)
def test_the_committed_comparison_reads_well(good, width):
    found = good[0][f"committed {width}"]
    assert {fault: found[fault] for fault in FAULTS if found[fault]} == {} and found["figures"] == 3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "figures", "texts"), [("diagnosis", 1, 700), ("repair", 3, 60), ("baselines", 2, 50)])
def test_reports_of_diagnosis_and_repair_read_well(good, name, figures, texts, width):
    found = good[0][f"{name} {width}"]
    assert {fault: found[fault] for fault in FAULTS if found[fault]} == {}
    assert found["figures"] == figures and found["texts"] > texts


@pytest.mark.slow
def test_the_most_crowded_report_reads_well(shots):
    found, console = measured(shots, {"all": html_specimen.document(*MANY).to_html()})
    assert all(reads_well(one) for one in found.values()) and console == ""


def test_the_console_stays_empty(good):
    assert good[1] == ""


def faulty(kind: str) -> str:
    """A page with one fault of its kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.text(0.1, 0.5, "one label", fontsize=9)
    if kind == "overlaps":
        axes.text(0.15, 0.52, "another label", fontsize=9)
    if kind == "cut":
        axes.text(0.8, 0.2, "a label that leaves the picture", fontsize=9)
    if kind == "small":
        axes.text(0.1, 0.2, "tiny", fontsize=4)
    page = Document("t", [Text("x"), Picture("p", "", "words", figure)]).to_html()
    put = {
        "wide": '<div style="width: 3000px">x</div>',
        "empty": '<img alt="nothing" src="data:,">',
        "unnamed": '<svg width="50" height="50"></svg>',
        "faults": '<img alt="from elsewhere" width="50" height="50" src="https://example.invalid/x.png">',
    }
    return page.replace("</main>", f"{put.get(kind, '')}</main>")


@pytest.fixture(scope="module")
def bad(shots):
    return measured(shots, {kind: faulty(kind) for kind in ("none", *FAULTS)}, (1280,))[0]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_page_with_a_fault_is_found_out(bad, kind):
    assert bad[f"{kind} 1280"][kind]
    assert not any(bad["none 1280"][fault] for fault in FAULTS)


def test_screenshots_show_the_whole_page(shots, tmp_path):
    from PIL import Image

    report = Document("t", [Text(f"Line {n}.") for n in range(60)]).write(tmp_path)
    assert shots.main([str(report), "--output", str(tmp_path), "--name", "x", "--only", "narrow"]) == 0
    with Image.open(tmp_path / "x_narrow.png") as picture:
        assert picture.width == 400 and picture.height > 60 * 25
        last = picture.convert("L").crop((0, picture.height - 200, 400, picture.height))
        assert last.getextrema()[0] < 100 < last.getextrema()[1], "the last line is in the picture"


def test_unknown_views_are_refused(shots, tmp_path, capsys):
    with pytest.raises(SystemExit):
        shots.main([str(tmp_path / "x.html"), "--only", "sepia"])
    assert "--only must be of light, dark, grey, narrow, got sepia" in capsys.readouterr().err


def install(path: str) -> str:
    command = ["/bin/sh", str(ROOT / "scripts" / "install_browser.sh")]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=True).stderr


def test_installing_a_browser_does_nothing_where_there_is_one(tmp_path):
    (tmp_path / "chromium").write_text("")
    (tmp_path / "chromium").chmod(0o755)
    assert install(str(tmp_path)) == ""


def test_installing_a_browser_never_fails_and_says_why_it_did_not(tmp_path):
    assert "no apt-get" in install(str(tmp_path))
