"""`hf-momentum export`: a checkpoint as a plain folder."""

import argparse
from collections.abc import Sequence

from hf_momentum.commands.answers import add_json, answering
from hf_momentum.commands.parsing import command_parser

HELP = """\
Write a checkpoint of any launch (one process, DDP, FSDP2, DeepSpeed) as a plain folder that from_pretrained reads.

examples:
  hf-momentum export outputs/run/checkpoint-400 my-model
  hf-momentum export outputs/run/checkpoint-400 my-model --dtype bfloat16
  hf-momentum export outputs/run/checkpoint-400 continued --resumable"""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("export", HELP)
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder such as outputs/run/checkpoint-400")
    made.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    made.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; as they were saved without it"
    )
    made.add_argument(
        "--resumable",
        action="store_true",
        help="also the state of optimizer and schedule, whole, to continue under any launch",
    )
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known = parser().parse_args(words)
    with answering("export", known.json) as answer:
        from hf_momentum.training.export import export

        folder = export(known.checkpoint, known.out, known.dtype, known.resumable)
        return answer.give([f"Exported to {folder}"], folder=str(folder))
