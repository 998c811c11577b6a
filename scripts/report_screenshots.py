"""Screenshots of an HTML report, to be looked at as a reader would: by day, by night, in grey and on a telephone.

    python scripts/report_screenshots.py outputs/report.html --output shots
    python scripts/report_screenshots.py outputs/report.html --output shots --only light,narrow

Writes NAME_light.png, NAME_dark.png, NAME_grey.png and NAME_narrow.png with headless Chromium, each of the whole page.
"""

import argparse
import html
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDE, NARROW = 1280, 400  # pixels
_HIGHEST = 16000  # pixels that Chromium puts into one picture
_NARROWEST = 500  # pixels of a window of Chromium

# What is done to a copy of the page, and the width and colour scheme that it is shown with.
VIEWS: dict[str, tuple[str, int, str]] = {
    "light": ("", WIDE, "light"),
    "dark": ("", WIDE, "dark"),
    "grey": ("html { filter: grayscale(1); }", WIDE, "light"),
    "narrow": ("", NARROW, "light"),
}


def browser() -> str | None:
    """The path of Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(page: str, *flags: str, size: tuple[int, int] = (WIDE, 900), scheme: str = "light") -> tuple[str, str]:
    """Open a page, given as text, in headless Chromium.

    Returns:
        Standard output, which is the document after its scripts with `--dump-dom`, and what was written to the console.

    Raises:
        RuntimeError: there is no browser, or it failed.
    """
    found = browser()
    if found is None:
        raise RuntimeError("no Chromium: install Debian's chromium, or run scripts/install_browser.sh")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        command = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000", "--enable-logging=stderr"]
        command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
        command += [f"--window-size={size[0]},{size[1]}", *flags, path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError(f"{found} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def framed(page: str, width: int, height: int = 900, identity: str = "page") -> str:
    """A frame that shows a page as a window of so many pixels would; real windows cannot be so narrow."""
    size = f'width="{width}" height="{height}"'
    return f'<iframe id="{identity}" {size} style="border: 0; display: block" srcdoc="{html.escape(page)}"></iframe>'


def host(frames: str) -> str:
    """A page that holds nothing but frames."""
    return f'<!DOCTYPE html><html><head><meta charset="utf-8"></head><body style="margin: 0">{frames}</body></html>'


def scripted(page: str, script: str) -> str:
    """A copy of a page with a script at its end, which its content security policy is told to allow."""
    allowed = page.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    return allowed.replace("</body>", f"<script>{script}</script></body>")


def height(page: str, width: int) -> int:
    """Height of the whole page in pixels when it is so wide."""
    told = "parent.document.body.dataset.height = Math.ceil(document.documentElement.getBoundingClientRect().height);"
    dom, _ = run(host(framed(scripted(page, told), width)), "--dump-dom")
    found = re.search(r'data-height="(\d+)"', dom)
    if found is None:
        raise RuntimeError("the page did not say how high it is")
    return min(int(found[1]), _HIGHEST)


def screenshot(page: str, target: Path, width: int = WIDE, scheme: str = "light") -> None:
    """A picture of the whole page; folded parts are opened."""
    from PIL import Image

    page = page.replace("<details>", "<details open>")
    high = height(page, width)
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        window = (max(width, _NARROWEST), high + 200)  # a part of the window is not the page's
        run(host(framed(page, width, high)), f"--screenshot={shot}", size=window, scheme=scheme)
        buffer = io.BytesIO()
        with Image.open(shot) as picture:
            picture.crop((0, 0, width, high)).convert("RGB").quantize(256).save(buffer, "png", optimize=True)
        target.write_bytes(buffer.getvalue())


def main(words: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="an HTML report")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the pictures; default: here")
    parser.add_argument("--name", help="what their names begin with; default: that of the report")
    parser.add_argument("--only", default=",".join(VIEWS), help=f"some of {', '.join(VIEWS)}, separated by commas")
    chosen = parser.parse_args(words)
    unknown = sorted(set(chosen.only.split(",")) - set(VIEWS))
    if unknown:
        parser.error(f"--only must be of {', '.join(VIEWS)}, got {', '.join(unknown)}")
    if browser() is None:
        parser.error("there is no Chromium: install Debian's chromium, or run scripts/install_browser.sh")
    page = chosen.report.read_text(encoding="utf-8")
    chosen.output.mkdir(parents=True, exist_ok=True)
    for view in chosen.only.split(","):
        style, width, scheme = VIEWS[view]
        target = chosen.output / f"{chosen.name or chosen.report.stem}_{view}.png"
        screenshot(page.replace("</style>", f"{style}</style>", 1), target, width, scheme)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
