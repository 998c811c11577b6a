"""The code blocks of README and docs, what each needs around it, and how commands are rehearsed: for test_docs.py.

As a program it takes blocks from a file and writes what went wrong with each into another one, in a process of its own,
because blocks register names and leave folders: `python -m tests.doc_blocks FOLDER BLOCKS RESULTS`. Blocks of a page
share a namespace and come in their order; Python is executed, and a command is taken up to where its work begins.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


# ---- the blocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: its file, from the root.
        number: its place among the blocks of its language on that page, from 1.
        language: what stands behind the fence.
        text: what stands in it.
        extra: options that make its commands small enough to run to their end; None: they are rehearsed.
    """

    page: str
    number: int
    language: str
    text: str
    extra: list[str] | None = None

    @property
    def name(self) -> str:
        return f"{self.page} {self.language} {self.number}"


def blocks_of(page: str, text: str) -> list[Block]:
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        language, indent = match[2], len(match[1])
        body = "".join(line[indent:] for line in match[3].splitlines(keepends=True))
        number = 1 + sum(block.language == language for block in found)
        found.append(Block(page, number, language, body))
    return found


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def every_block() -> list[Block]:
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages()}
    return [block for page, text in texts.items() for block in blocks_of(page, text)]


# ---- Python ---------------------------------------------------------------------------------------------------------


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))


def rows() -> list[dict[str, Any]]:
    import torch

    return [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4


def training_arguments() -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="out", report_to="none", use_cpu=True)


def trainer() -> Any:
    from transformers import Trainer

    return Trainer(tiny_model(), training_arguments(), train_dataset=rows())


# What a reader has already: a page's blocks may use it without making it.
READERS: dict[str, Callable[[], Any]] = {
    "model": tiny_model,
    "args": training_arguments,
    "code": rows,
    "prose": rows,
    "trainer": trainer,
}


class Reader(dict):
    """A namespace in which the reader's own variables are made when they are first asked for."""

    def __missing__(self, name: str) -> Any:
        if name not in READERS:
            raise KeyError(name)
        self[name] = READERS[name]()
        return self[name]


def outcomes(blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """Each block's name and what went wrong with it, or nothing."""
    spaces: dict[str, Reader] = {}
    for block in blocks:
        space = spaces.setdefault(block.page, Reader(__name__="page"))
        error = ""
        try:
            if block.language == "python":
                exec(compile(block.text, block.name, "exec"), space)
            else:
                for words in commands_of(block.text):
                    rehearse(words) if block.extra is None else really_run([*words, *block.extra])
        except BaseException:  # a parser leaves by SystemExit
            error = traceback.format_exc(limit=-2)
        yield block.name, error


# ---- bash -----------------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[list[str]]:
    """The words of each command of a bash block, of each part of a pipe, and of what stands in `$(...)`.

    Comments, continued lines, assignments before a command, and the files that output goes to are gone.
    """
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;()<>"):
                skip = ">" in word
                # A list goes on behind what it is written to.
                if not skip and words:
                    found.append(words)
                    words = []
            elif skip:
                skip = False
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                found += [shlex.split(inner) for inner in re.findall(r"\$\(([^()]*)\)", word) if "hf-momentum" in inner]
                words.append(word)
    return [words for words in found if words[0] not in SHELL]


# What a shell does by itself: nothing of ours is in it.
SHELL = {"cd", "echo", "eval", "export", "mkdir", "source"}


class Rehearsed(Exception):
    """A command has come to where its work begins: all that was typed has been understood and checked."""


# Where the work of each command begins. What comes before, its own parser and all checks, really runs.
WORK = {
    "train": ["hf_momentum.training.job.train", "hf_momentum.launch.Launch.replace_this_process"],
    "evaluate": ["hf_momentum.training.evaluate.evaluate"],
    "compare": ["hf_momentum.training.compare_runs.work"],
    "pareto": ["hf_momentum.training.pareto.run_grid"],
    "stream": ["hf_momentum.training.stream.run_streams"],
    "diagnose": ["hf_momentum.training.diagnose.diagnose", "hf_momentum.launch.Launch.replace_this_process"],
    "repair": ["hf_momentum.training.repair.repair", "hf_momentum.training.repair_baselines.run"],
    "export": ["hf_momentum.training.export.export"],
    "run": ["hf_momentum.run.run"],
    "push": ["hf_momentum.training.hub.push"],
    "init": [],
    "optimizers": [],
}


# Programs of other packages on our pages, and why they are not rehearsed.
FOREIGN: dict[str, str] = {"swift": "ms-swift has an environment of its own: tests/adapters/test_ms_swift.py runs it"}


def rehearse(words: list[str]) -> None:
    """Take a command up to its work, in the folder where we are; whatever it raises is what its reader would see."""
    program, *rest = words
    if program == "hf-momentum":
        _rehearse_ours(rest)
    elif program == "accelerate":
        _rehearse_launch(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        for word in rest:
            assert "=" in word or word in targets, f"there is no `make {word}`; there are {targets}"
    elif program == "python":
        _rehearse_script(rest)
    elif program == "pip":
        _rehearse_install(rest)
    elif program in FOREIGN:
        return
    else:
        raise AssertionError(f"nothing here knows how to rehearse {program!r}; add it, or list the block as not run")


def really_run(words: list[str]) -> None:
    from hf_momentum.cli import main as command

    assert words[0] == "hf-momentum", words
    status = command(words[1:])
    assert status == 0, f"{shlex.join(words)} ended with {status}"


def _rehearse_ours(words: list[str]) -> None:
    from hf_momentum.cli import COMMANDS

    name, *rest = words
    if name == "init" and "--force" not in rest:
        rest.append("--force")  # several pages write one recipe
    assert name in COMMANDS, f"there is no command {name!r}; there are {list(COMMANDS)}"
    module = importlib.import_module(f"hf_momentum.commands.{name}")
    if name not in WORK:
        module.parser().parse_args(rest)
        return

    def begin(*args: Any, **kwargs: Any) -> NoReturn:
        raise Rehearsed

    with ExitStack() as stack:
        for place in WORK[name]:
            stack.enter_context(mock.patch(place, begin))
        # Most recipes are for a GPU, which a reader of theirs has.
        stack.enter_context(mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True))
        try:
            status = module.main(rest)
        except Rehearsed:
            return
    assert not WORK[name] and status == 0, f"{shlex.join(words)} ended with {status} before it came to its work"


def _rehearse_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", words
    known = launch_command_parser().parse_args(words[1:])
    if known.config_file:
        assert (ROOT / known.config_file).is_file(), f"there is no {known.config_file}"
    if known.module:
        assert importlib.util.find_spec(known.training_script), f"there is no module {known.training_script}"


def _rehearse_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    accepted = set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    for word in words[1:]:
        assert not word.startswith("--") or word in accepted, f"{words[0]} has no {word}; it has {sorted(accepted)}"


def _rehearse_install(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[0] == "install", words
    for word in words[1:]:
        for extra in re.findall(r"^(?:\.|hf-momentum)\[(.*)\]$", word):
            assert set(extra.split(",")) <= set(extras), f"there is no extra {extra!r}; there are {list(extras)}"


# What a reader has lying about, by the names that the pages use. Rows have the columns of the recipes.
ROWS = [{"text": "a good one", "label": 1}, {"text": "a bad one", "label": 0}] * 24
TABLES = [
    *(f"{name}{part}.jsonl" for name in ("movies", "products", "news") for part in ("", "_train", "_test")),
    *(f"reviews/{name}.jsonl" for name in ("movies_train", "movies_validation", "movies_test", "news_test")),
    "reviews/products_test.jsonl",
    "hard.jsonl",
]
CSVS = ["reviews.csv", "products.csv", "phones.csv"]
CLASSIFIERS = ["outputs/sentiment_minilm", "mine", "d_minilm", "outputs/repair_digits/model"]
SUITE = "task: sequence_classification\nsplits: {a: {role: in_distribution, source: movies_test.jsonl}}\n"


def furnish(folder: Path) -> None:
    """Make the working directory of a reader: a copy of what the repository has, and data and models of one's own."""
    for name in ("recipes", "suites", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / name)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 2}
    texts = dict.fromkeys(TABLES, lines) | dict.fromkeys(CSVS, table)
    texts |= {f"{name}/config.json": json.dumps(config) for name in CLASSIFIERS}
    texts |= {"suites/mine.yaml": SUITE, "my_suite.yaml": SUITE}
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main(folder: str, blocks: str, results: str) -> None:
    chosen = [Block(**fields) for fields in json.loads(Path(blocks).read_text(encoding="utf-8"))]
    place = Path(results).resolve()
    os.chdir(folder)
    sys.path.insert(0, str(DOCS / "files"))  # a reader has copied them
    place.write_text(json.dumps(dict(outcomes(chosen))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
