"""`hf-momentum init`: a recipe for one's own model and data."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering
from hf_momentum.commands.parsing import command_parser
from hf_momentum.errors import InputError

HELP = """\
Write a recipe for your own model and data: looks at the data, finds the task, sets rows apart for validation and test,
and picks settings that fit into this machine's memory. Every value has its reason beside it.

examples:
  hf-momentum init --data reviews.csv
  hf-momentum init --data reviews.csv --model sentence-transformers/all-MiniLM-L6-v2 \\
    --optim adatamw \\
    --shifted products=products.csv --out reviews.yaml
  hf-momentum init --data chats.jsonl --model Qwen/Qwen3-0.6B --lora --yes

On a terminal it asks for what is not given, unless --yes. Nothing is written over without --force."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("init", HELP, usage="%(prog)s --data D [--model M] [options]")
    made.add_argument("--data", metavar="D", help=".csv, .tsv, .jsonl, .json, .parquet, .txt, a folder, or a Hub name")
    made.add_argument("--test", metavar="D", help="SOURCE@SPLIT to test on, in place of a tenth of the data")
    made.add_argument("--shifted", metavar="NAME=D", nargs="+", default=[], help="data of other distributions")
    made.add_argument("--model", metavar="M", help="a Hub name or a folder; a small one of the task's unless given")
    made.add_argument(
        "--task", metavar="NAME", help="sequence_classification, image_classification, causal_lm, chat or preference"
    )
    for column in ("text", "label", "image"):
        made.add_argument(f"--{column}_column", metavar="NAME", help="found by name and content unless given")
    made.add_argument("--optim", metavar="NAME", help="as `hf-momentum optimizers` lists them (adamw_torch)")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--lora", action="store_true", help="train adapters; by size and memory unless given")
    how.add_argument("--full", action="store_true", help="train all weights")
    made.add_argument("--out", metavar="FILE", default="my_recipe.yaml", help="(%(default)s)")
    made.add_argument("--force", action="store_true", help="write over files that are there")
    made.add_argument("--yes", action="store_true", help="ask nothing")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    asks = sys.stdin.isatty() and not known.yes and not known.json
    if known.data is None and not asks:
        raise InputError("init needs --data: a file, a folder or a Hub name, for example --data reviews.csv")
    out = Path(known.out)
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {known.out!r} must end in .yaml")
    if out.exists() and not known.force:
        raise InputError(f"{out} exists; give another name with --out, or --force to write over it")
    if asks:
        _ask_for(known, _reply)
    with answering("init", known.json) as answer:
        from hf_momentum.training import hardware, look, new_recipe
        from hf_momentum.training.quiet import quiet

        if known.task is not None and known.task not in new_recipe.TASKS:
            raise InputError(f"--task {known.task!r} is not known; accepted: {', '.join(new_recipe.TASKS)}")
        _check_optim(known.optim)
        wish = new_recipe.Wish(
            data=known.data,
            model=known.model,
            task=known.task,
            text_column=known.text_column,
            label_column=known.label_column,
            image_column=known.image_column,
            optim=known.optim or "adamw_torch",
            lora=True if known.lora else False if known.full else None,
            shifted=known.shifted,
            test=known.test,
            out=out,
        )
        choose = (lambda flag, names: ask_one(flag, names, _reply)) if asks else look.refuse
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names of its own
            proposal = new_recipe.propose(wish, hardware.find_hardware(), choose)
            proposal.write(known.force)
        return answer.give(
            proposal.lines(),
            recipe=str(out),
            task=proposal.look.task,
            columns={"text": proposal.look.text, "label": proposal.look.label, "image": proposal.look.image},
            splits={
                "train": proposal.parts.train,
                "validation": proposal.parts.validation,
                "test": proposal.parts.test,
            },
            model=proposal.model,
            lora=proposal.fit.lora,
            suite=str(proposal.suite_file) if proposal.suite else None,
            written=[str(path) for path in proposal.written()],
            memory_bytes=None if proposal.fit.memory is None else proposal.fit.memory.total,
            minutes=proposal.minutes,
            notes=list(proposal.notes),
            next=proposal.next_command(),
            then=proposal.then_command() or None,
        )


def ask_one(flag: str, candidates: Sequence[str], ask: Callable[[str], str]) -> str:
    """One of the candidates, by its number or name; asked again until it is one.

    Example:
        >>> ask_one("label_column", ["stars", "topic"], lambda question: "2")
        1. stars
        2. topic
        'topic'
    """
    print("\n".join(f"{number}. {name}" for number, name in enumerate(candidates, start=1)))
    while True:
        reply = ask(f"Which is the {flag.replace('_', ' ')}? ").strip()
        if reply in candidates:
            return reply
        if reply.isdecimal() and 1 <= int(reply) <= len(candidates):
            return candidates[int(reply) - 1]


def _reply(question: str) -> str:
    try:
        return input(question)
    except EOFError as error:
        raise InputError("no reply; give what was asked for as an option, or --yes to be asked nothing") from error


def _ask_for(known: argparse.Namespace, ask: Callable[[str], str]) -> None:
    """The few questions of a terminal; an empty reply takes what stands in brackets."""
    if known.data is None:
        known.data = ask("Data (a file, a folder or a Hub name): ").strip()
        if not known.data:
            raise InputError("init needs --data: a file, a folder or a Hub name, for example --data reviews.csv")
    if known.model is None:
        known.model = ask("Model (a Hub name or a folder) [a small one]: ").strip() or None
    if known.optim is None:
        known.optim = ask("Optimizer (`hf-momentum optimizers` lists ours) [adamw_torch]: ").strip() or None
    if not known.lora and not known.full:
        reply = ask("Train all weights or LoRA adapters? full/lora [what fits]: ").strip().lower()
        known.lora, known.full = reply == "lora", reply == "full"


def _check_optim(name: str | None) -> None:
    from transformers.training_args import OptimizerNames

    from hf_momentum.errors import nearest
    from hf_momentum.integrations import OPTIMIZERS

    known = {*OPTIMIZERS, *(member.value for member in OptimizerNames)}
    if name is not None and name not in known:
        raise InputError(f"--optim {name!r} is not known{nearest(name, known)}; our own: {', '.join(OPTIMIZERS)}")
