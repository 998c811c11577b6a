"""The first afternoon of a new user, with the commands that the pages name and nothing else, timed.

A table of their own -> init -> train -> evaluate -> push -> pull elsewhere -> predict. Everything runs as a user's
commands would, in processes of an installed environment; the Hub is the one of tests/loopback_hub.py.

    python scripts/new_user.py --bin ENVIRONMENT/bin --model FOLDER_OF_AN_ENCODER
"""

import argparse
import csv
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.loopback_hub import LoopbackHub  # noqa: E402

LONGEST = 600  # seconds, from the table to the prediction

# Run by a Python that must not have hf-momentum: what was pushed stands on its own.
PREDICT = """
import csv, sys
class Nowhere:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "hf_momentum":
            raise ImportError("hf_momentum is not installed here")
sys.meta_path.insert(0, Nowhere())
from transformers import pipeline
_, *rows = csv.reader(open(sys.argv[2], encoding="utf-8"))
told = pipeline("text-classification", model=sys.argv[1], device="cpu")([line for line, _ in rows])
print(sum(one["label"] == kind for one, (_, kind) in zip(told, rows)) / len(rows))
"""


def rows() -> Iterator[tuple[str, str]]:
    """Lines of Python's own manual and of its source: what anybody has, with two labels."""
    source = Path(sysconfig.get_paths()["stdlib"])
    prose = [line.strip() for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    code = [line.strip() for name in ("argparse", "ast", "inspect") for line in (source / f"{name}.py").open()]
    for said, written in zip(*([line for line in lines if len(line) > 30] for lines in (prose, code)), strict=False):
        yield said, "prose"
        yield written, "code"


def write_table(path: Path, found: Iterator[tuple[str, str]], most: int) -> None:
    """A table as a user would have it, with columns of their own names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("line", "kind"), *islice(found, most)])


def main() -> int:
    """Walk the way, print each step with its time, and fail if it took longer than ten minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent, help="of the environment")
    parser.add_argument("--model", type=Path, required=True, help="a folder with a text encoder and its tokenizer")
    parser.add_argument("--rows", type=int, default=400, help="of the table (%(default)s)")
    known = parser.parse_args()
    tool, began = str(known.bin / "hf-momentum"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, LoopbackHub() as hub:
        home, place = Path(folder), Path(folder) / "work"
        place.mkdir()
        found = rows()
        write_table(place / "lines.csv", found, known.rows)
        write_table(place / "other_lines.csv", found, 60)
        quiet = {"HOME": folder, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": ""}
        alone = {**os.environ, **quiet, "HF_HUB_OFFLINE": "1"}
        online = {**hub.environment(home / "hub"), **quiet}

        def run(words: list[str], environment: dict[str, str]) -> str:
            started = time.perf_counter()
            done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
            shown = " ".join([Path(words[0]).name, *words[1:]]).replace(folder, "~").splitlines()[0][:150]
            print(f"{time.perf_counter() - started:6.1f} s  {shown}", flush=True)
            if done.returncode:
                sys.exit(f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}")
            return done.stdout

        made = [tool, "init", "--data", "lines.csv", "--model", str(known.model), "--out", "my.yaml", "--yes"]
        said = run([*made, "--shifted", "others=other_lines.csv"], alone)
        for name in ("train", "evaluate"):  # as `init` itself says what to type next
            line = re.search(rf"hf-momentum {name} .*", said)
            if line is None:
                sys.exit(f"init names no command to {name}:\n{said}")
            run([tool, *line.group().split()[1:]], alone)
        report = json.loads((place / "outputs" / "my" / "report.json").read_text())
        if not (place / "outputs" / "my_evaluation" / "report.html").is_file():
            sys.exit("evaluate wrote no report where init's command says")
        run([tool, "push", "outputs/my", "me/lines", "--private"], online)
        elsewhere = home / "elsewhere"
        pull = ["download", "me/lines", "--local-dir", str(elsewhere)]
        run([str(known.bin / "hf"), *pull], {**online, "HF_HOME": str(home / "other hub")})
        told = run([str(known.bin / "python"), "-c", PREDICT, str(elsewhere), "other_lines.csv"], alone)
        right = float(told.splitlines()[-1])
        change = report["splits"][0]["change"]["accuracy"]
        seconds = time.perf_counter() - began
        print(f"accuracy rose by {change['value']:.3f} [{change['low']:.3f}, {change['high']:.3f}]")
        print(f"elsewhere, without hf-momentum, {right:.0%} of other lines were told right")
        print(f"{seconds:6.1f} s  in all")
        if right < 0.75 or seconds > LONGEST:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
