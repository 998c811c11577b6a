"""What a command prints: lines for people, or under `--json` one object on standard output and nothing beside it."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option of every command that has a result."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, and all else on standard error")


class Answer:
    """One command's answer.

    Args:
        command: its name.
        as_json: whether a machine reads it.
    """

    def __init__(self, command: str, as_json: bool) -> None:
        self.command, self.as_json = command, as_json
        self.document: dict[str, Any] | None = None

    def give(self, lines: Sequence[str], status: int = 0, **fields: Any) -> int:
        """Say it once.

        Args:
            lines: for people.
            status: the command's exit status.
            fields: for machines, beside `command`, `exit` and `summary` (the lines without empty ones).

        Returns:
            `status`.

        Example:
            >>> Answer("export", False).give(["Exported to out"], folder="out")
            Exported to out
            0
        """
        if self.as_json:
            summary = [line.strip() for line in lines if line.strip()]
            self.document = {"command": self.command, "exit": status, "summary": summary, **fields}
        else:
            print("\n".join(lines), flush=True)
        return status


@contextlib.contextmanager
def answering(command: str, as_json: bool) -> Iterator[Answer]:
    """For as long as it lasts, whatever prints to standard output prints to standard error; the answer comes last.

    Without `as_json` nothing is turned aside. What C libraries and child processes print is turned aside, too.

    Example:
        >>> with answering("export", True) as answer:
        ...     print("a progress line")
        ...     status = answer.give(["Exported to out"], folder="out")
        {"command": "export", "exit": 0, "summary": ["Exported to out"], "folder": "out"}
    """
    answer = Answer(command, as_json)
    if not as_json:
        yield answer
        return
    with _aside():
        yield answer
    if answer.document is not None:
        print_json(answer.document)


def print_json(document: Mapping[str, Any]) -> None:
    """One line of JSON proper: numbers that are not finite become null.

    Example:
        >>> print_json({"loss": float("nan")})
        {"loss": null}
    """
    print(json.dumps(_finite(document), allow_nan=False), flush=True)


def read_json(path: Path, *without: str) -> dict[str, Any]:
    """The fields of an answer that has a report: `output_dir`, `report_json` (its place) and `report` (what it holds).

    Args:
        path: of the report for machines.
        *without: keys to leave out, because they are long.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    short = {key: value for key, value in report.items() if key not in without}
    return {"output_dir": str(path.parent), "report_json": str(path), "report": short}


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
