"""`hf-momentum push`: a run or a checkpoint, on the Hub."""

import argparse
from collections.abc import Sequence
from functools import partial

from hf_momentum.commands.answers import add_json, answering
from hf_momentum.commands.parsing import command_parser

HELP = """\
Push a run, a checkpoint of any launch or a folder with a model to the Hub: model or adapters, tokenizer, training
arguments, recipe, report, pictures, and a model card. from_pretrained reads it without hf-momentum.

examples:
  hf-momentum push outputs/run me/my-model --private
  hf-momentum push outputs/run/checkpoint-400 me/my-model --revision step-400 --push_optimizer

Log in first with `hf auth login`, or set HF_TOKEN. A repository that exists keeps its visibility. A push that was
interrupted goes on when the command is given again: what has arrived is not sent twice."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("push", HELP)
    made.add_argument("folder", metavar="RUN_OR_CHECKPOINT", help="a folder such as outputs/run")
    made.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME, or a NAME of your own")
    made.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    made.add_argument("--revision", metavar="BRANCH", help="of the repository, made if it is not there (main)")
    made.add_argument("--push_optimizer", action="store_true", help="also what others need to continue training")
    made.add_argument("--commit_message", metavar="TEXT", help="title of the commit")
    made.add_argument("--create_pr", action="store_true", help="propose it as a pull request")
    made.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; as they were saved without it"
    )
    made.add_argument("--base", metavar="OWNER/NAME", help="the model that the adapters sit on, as the Hub knows it")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = vars(parser().parse_args(words))
    as_json = known.pop("json")
    with answering("push", as_json) as answer:
        from hf_momentum.training.hub import Wishes, push

        lines: list[str] = []
        # People read what is pushed before it has arrived, and where it lies afterwards.
        pushed = push(Wishes(**known), lines.append if as_json else partial(print, flush=True))
        return answer.give([*lines, pushed.url], repo_id=pushed.repo_id, private=pushed.private, url=pushed.url)
