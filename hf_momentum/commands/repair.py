"""`hf-momentum repair`: those layers retrained, and the result verified."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_momentum.commands.answers import add_json, answering, read_json
from hf_momentum.commands.parsing import add_data, add_groups, command_of, command_parser

HELP = """\
Retrain only the layer groups to which a model's errors point, with critically damped momentum, and prove on a third
split, which neither diagnosis nor training saw, that more was fixed than broken. Else the repair is rolled back.

examples:
  hf-momentum repair --model outputs/sentiment_minilm --data products.jsonl \\
    --output_dir outputs/repair
  hf-momentum repair --model mine --data failed.csv --validation v.csv --test t.csv \\
    --suite reviews --top 2
  hf-momentum repair --model mine --data failed.csv --layers head,block.11 --lora_r 8 --distill 1 \\
    --optim critical_sgd --learning_rate 1e-3 --max_steps 200
  hf-momentum repair --model mine --data failed.csv --baselines --seeds 5 --learning_rates 1e-5,5e-5

The model is not changed; an accepted repair lies in OUT/model. Any of transformers' TrainingArguments can be given as
--field value. A repair that was interrupted goes on when the command is given again. Exit status: 0 accepted, or
nothing to repair; 3 rolled back; 2 input that cannot be used."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("repair", HELP, usage="%(prog)s --model M --data D [options]")
    made.add_argument("--model", metavar="M", required=True, help="what to repair")
    made.add_argument("--data", metavar="D", required=True, help="SOURCE@SPLIT to diagnose and train on")
    made.add_argument("--validation", metavar="V", help="SOURCE@SPLIT to stop by and to choose the mixture")
    made.add_argument("--test", metavar="T", help="SOURCE@SPLIT that decides")
    made.add_argument("--cut", metavar="A,B,C", default="0.5,0.2,0.3", help="or parts of D (%(default)s)")
    made.add_argument("--suite", metavar="SUITE", help="splits on which nothing may be lost")
    made.add_argument("--source", metavar="NAME=SOURCE", action="append", default=[], help="in place of the suite's")
    made.add_argument("--layers", metavar="NAMES", default="", help="groups to train, in place of a diagnosis")
    add_groups(made)
    add_data(made)
    how = made.add_argument_group("training")
    how.add_argument("--lora_r", metavar="R", type=int, help="train LoRA adapters of this rank on just those groups")
    how.add_argument("--replay", metavar="N", type=float, default=1.0, help="right examples per error (%(default)s)")
    how.add_argument("--distill", metavar="W", type=float, default=0.0, help="pull to the old model (%(default)s)")
    how.add_argument("--patience", metavar="N", type=int, default=3, help="0: never stop early (%(default)s)")
    how.add_argument("--shares", metavar="LIST", default="0.25,0.5,0.75,1", help="of new weights (%(default)s)")
    how.add_argument("--alpha", metavar="P", type=float, default=0.05, help="of the decision (%(default)s)")
    how.add_argument("--keep_checkpoints", action="store_true", help="of the training, when it is over")
    others = made.add_more("comparison with other choices")
    others.add_argument("--baselines", action="store_true", help="train other choices too, and compare")
    others.add_argument("--seeds", metavar="N", type=int, default=5, help="from the seed on (%(default)s)")
    others.add_argument("--learning_rates", metavar="LIST", default="", help="over which validation tunes each way")
    made.add_argument("--batch_size", metavar="N", type=int, default=16, help="when measuring (%(default)s)")
    made.add_argument("--device", metavar="NAME", help="such as cpu; the accelerator unless given")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    made.add_argument("--seed", metavar="N", type=int, default=0, help="(%(default)s)")
    made.add_argument("--output_dir", metavar="OUT", default="outputs/repair", help="(%(default)s)")
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    known, overrides = parser().parse_known_args(words)
    from hf_momentum.training import repair, repair_baselines
    from hf_momentum.training.words import numbers

    plan = repair.plan_of(vars(known), overrides)
    command = command_of("repair", words)
    place = Path(known.output_dir)
    with answering("repair", known.json) as answer:
        if known.baselines:
            rates = numbers("learning_rates", known.learning_rates)
            compared = repair_baselines.run(plan, known.seeds, rates, command)
            path = compared.write(place)
            files = f"Report: {path} (and report.md, report.json, plots/)"
            lines = ["", compared.verdict(), *compared.sentences(), files]
            return answer.give(lines, **read_json(path.with_name("report.json")))
        found = repair.repair(plan, command)
        kept = f"Repaired model: {place / 'model'}" if found.decision.accepted else "The model stays as it was."
        files = f"Report: {place / 'report.html'} (and report.md, report.json)"
        status = repair.ROLLED_BACK if found.outcome == "rolled back" else 0
        lines = ["", found.verdict(), *found.sentences(), kept, files]
        return answer.give(lines, status, **read_json(place / "report.json"))
