"""Real text that every machine with Python has: the standard library's prose, its code, and records of its functions.

Kinds of one domain, parted cleanly, make a distribution shift without a download. Prose is the language reference in
`pydoc_data` and the docstrings; code is the source with the docstrings taken out; json is a record in a fixed format
for each public function, which teaches a model that format. All that comes from one module falls into the same split,
so that nothing a model saw in training stands in its test text in another form.
"""

import ast
import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from tqdm.auto import tqdm

from hf_momentum.errors import InputError

Kind = Literal["prose", "code", "json"]
Split = Literal["train", "validation", "test"]

# Not the library itself: its tests and applications, packages of others, and tables of character codes.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_SKIPPED |= {"encodings", "pydoc_data", "__pycache__"}
_SHORTEST_DOCSTRING = 120  # shorter ones are labels, not prose


def stdlib_texts(kind: str, split: str) -> list[str]:
    """The documents of one kind and split, in a fixed order for a given Python version.

    Args:
        kind: "prose", "code" or "json" (each text one JSON object on one line, as `records` makes them).
        split: "train" (80 % of the modules), "validation" or "test" (10 % each), by a hash of the module's name.

    Raises:
        InputError: another kind or split.

    Example:
        >>> texts = stdlib_texts("prose", "test")
        >>> len(texts) > 5 and all(isinstance(text, str) for text in texts)
        True
    """
    if kind not in get_args(Kind) or split not in get_args(Split):
        raise InputError(
            f"stdlib:{kind}@{split} does not exist; write stdlib:KIND@SPLIT with KIND one of "
            f"{', '.join(get_args(Kind))} and SPLIT one of {', '.join(get_args(Split))}"
        )
    return [text for group, found, text in _documents() if found == kind and split_of(group) == split]


def split_of(group: str) -> Split:
    """The split into which everything of one module falls.

    Example:
        >>> split_of("argparse") in ("train", "validation", "test")
        True
    """
    tenth = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


@lru_cache(maxsize=1)
def _documents() -> tuple[tuple[str, Kind, str], ...]:
    # A few texts stand under two names (the topics "if" and "else"), which could fall into different splits.
    first_of_each = {text: (group, kind, text) for group, kind, text in reversed(list(_read()))}
    return tuple(reversed(first_of_each.values()))


def _read() -> Iterator[tuple[str, Kind, str]]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield f"topic {name}", "prose", text
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if not _SKIPPED & set(path.relative_to(library).parts)]
    for path in tqdm(files, desc="reading the standard library", unit="file", leave=False):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of the library are deliberately not valid Python
        parts = path.relative_to(library).with_suffix("").parts
        group = parts[0]
        prose, code = separate(source, tree)
        if prose:
            yield group, "prose", prose
        if code.strip():
            yield group, "code", code
        if not any(part.startswith("_") for part in parts if part != "__init__"):
            for record in records(tree, ".".join(part for part in parts if part != "__init__")):
                yield group, "json", record


def separate(source: str, tree: ast.Module) -> tuple[str, str]:
    """A module's longer docstrings, joined, and its source without any docstring.

    Example:
        >>> source = 'def f():\\n    "Say hello."\\n    return 1\\n'
        >>> separate(source, ast.parse(source))
        ('', 'def f():\\n    return 1\\n')
    """
    lines = source.splitlines(keepends=True)
    prose = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        if len(text) >= _SHORTEST_DOCSTRING:
            prose.append(text)
        statement = node.body[0]
        for line in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[line] = ""
    return "\n\n".join(prose), "".join(lines)


def records(tree: ast.Module, module: str) -> Iterator[str]:
    """One JSON object on one line for each public function of a module and method of its public classes.

    Keys, in this order: `name` (qualified by its class), `module`, `arguments` (as they are written, without
    annotations and defaults, `self` and `cls` left out) and `summary`, the docstring's first line. A function without a
    docstring has no record.

    Example:
        >>> source = 'class A:\\n    def f(self, x: int, *rest, y=1):\\n        "Say hello.  "\\n'
        >>> list(records(ast.parse(source), "m"))
        ['{"name": "A.f", "module": "m", "arguments": ["x", "*rest", "y"], "summary": "Say hello."}']
    """
    for name, function in _public_functions(tree.body):
        summary = (ast.get_docstring(function) or "").strip().partition("\n")[0].strip()
        if summary:
            record = {"name": name, "module": module, "arguments": _arguments(function.args), "summary": summary}
            yield json.dumps(record, ensure_ascii=False)


def _public_functions(
    body: list[ast.stmt], within: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from _public_functions(node.body, f"{within}{node.name}.")
            else:
                yield f"{within}{node.name}", node


def _arguments(arguments: ast.arguments) -> list[str]:
    plain = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    rest = [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    named = [argument.arg for argument in arguments.kwonlyargs]
    keywords = [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return [name for name in plain if name not in ("self", "cls")] + rest + named + keywords


def fingerprint() -> str:
    """A short hash of all the text, so that a report says which corpus (which Python) it is about.

    Example:
        >>> len(fingerprint())
        12
    """
    digest = hashlib.sha256()
    for group, kind, text in _documents():
        digest.update(f"{group}\0{kind}\0{text}\0".encode())
    return digest.hexdigest()[:12]
