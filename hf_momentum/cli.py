"""The command `hf-momentum`: parse, call one function, print."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hf_momentum.errors import InputError, TrainingStopped

TRAIN_HELP = """\
Run a recipe: fine-tune, measure every split before and after, and write a report.

examples:
  hf-momentum train --config recipes/quickstart.yaml
  hf-momentum train --config quickstart --optim adatamw --learning_rate 1e-3 --output_dir outputs/adatamw
  hf-momentum train --accelerate_config fsdp2 --num_processes 8 --config quickstart

On several GPUs, --accelerate_config names how they share the model: ddp, fsdp2, hsdp, zero1, zero2, zero3,
zero2_offload, zero3_offload, multi_node_fsdp2, multi_node_zero3, or a file of your own for `accelerate launch`.

Any field of a recipe can be given as --field value and wins over the file. `hf-momentum train --help-fields` lists
them all: model, data, LoRA, and every field of transformers' TrainingArguments."""

PARETO_HELP = """\
Train a recipe with an auxiliary objective over a grid of surgeries, lambdas and seeds, and draw the fronts of main
against auxiliary loss; one sentence says whether Bloop's front was better, whichever way it came out.

examples:
  hf-momentum pareto --config bloop_domain --surgeries bloop,mixed,pcgrad,replay --lambdas 0.01,0.1,1 --seeds 3 \\
    --output_dir outputs/domain
  hf-momentum pareto --config bloop_domain --lambdas 0.1,1 --output_dir outputs/domain --max_steps 50 --dry-run

Besides, every seed is trained once on the main data alone, and the base model is measured. Each finished run is kept in
OUT/runs.jsonl: the same command, given again, runs only what is missing. Any field of a recipe but surgery, lam and
data_seed can be given as --field value. Exit status 1: a run failed."""

COMPARE_HELP = """\
Say, with intervals over seeds, whether one optimizer beats another on a recipe: in distribution, under shift, in
forgetting, in time and in memory. Each is tuned with the same number of runs on validation data, by a grid of learning
rates that is widened until its best point is interior; then each runs at its best one with new seeds.

examples:
  hf-momentum compare --config sentiment_minilm --optim adamw_torch,tam,adatamw,vradam --trials 6 --seeds 5 \
    --controls frozen_gate,matched_lr --output_dir outputs/comparison
  hf-momentum compare --config quickstart --optim adamw_torch,tam --dry-run --output_dir outputs/comparison \
    --validation_dataset stdlib:code@validation

The first optimizer is the baseline. Runs are kept in OUT/runs.db, or in any database: --storage
postgresql+psycopg://user@host/db lets many machines work through one comparison (give each the same command). A killed
command, given again, repeats only what was not finished. Any field of a recipe but the optimizer's own can be given as
--field value. Exit status 1: a run failed."""

STREAM_HELP = """\
Fine-tune one model through a sequence of domains, measure it on all of them before and after each, and draw the
forgetting matrix: what the model could do on every domain after every stage.

example:
  hf-momentum stream --config sentiment_minilm --seeds 3 --output_dir outputs/stream \\
    --domains films=films.jsonl@train books=books.jsonl@train --eval films=films_test.jsonl@test books=b_test.jsonl@test

Optimizer and learning-rate schedule begin anew in each stage. Each finished stage is kept: the same command, given
again, runs only what is missing. Any field of a recipe but its data can be given as --field value."""

EVALUATE_HELP = """\
Score a model on every split of a suite: in distribution, under shift, on corrupted rows, on what it must not forget.

examples:
  hf-momentum evaluate --model outputs/quickstart --suite stdlib --output_dir outputs/quickstart_stdlib
  hf-momentum evaluate --model outputs/mine/checkpoint-400 --base my-base --suite suites/mine.yaml
  hf-momentum evaluate --model outputs/sentiment_minilm --suite reviews --source movies=movies_test.jsonl \\
    --source products=products_test.jsonl --source news=news_test.jsonl
  hf-momentum evaluate --model mine --suite reviews --baselines outputs/a/report.json outputs/b/report.json

MODEL is a Hub name, a folder, PEFT adapters, or a checkpoint of a run under any launch. SUITE is a YAML file or a
shipped one: stdlib (language models; needs no network), reviews (sentiment). Intervals are over examples."""

DIAGNOSE_HELP = """\
Find the layer groups to which a model's own errors point: the gradient of the mean loss over what it has wrong, group
by group, beside that over what it has right and that of a model with random weights.

examples:
  hf-momentum diagnose --model outputs/sentiment_minilm --data products.jsonl@train --output_dir outputs/diagnosis
  hf-momentum diagnose --model outputs/quickstart --data stdlib:code@validation --split parts --top 4
  hf-momentum diagnose --model mine --data failed.csv --against passed.csv --group early='*.layer.[01].*'
  hf-momentum diagnose --accelerate_config fsdp2 --num_processes 8 --model mine --data hard.jsonl

MODEL is a Hub name, a folder, PEFT adapters, or a checkpoint of a run under any launch. It is not changed. Exit status
0 also where there is no error to learn from."""

REPAIR_HELP = """\
Retrain only the layer groups to which a model's errors point, with critically damped momentum, and prove on a third
split, which neither diagnosis nor training saw, that more was fixed than broken. Else the repair is rolled back.

examples:
  hf-momentum repair --model outputs/sentiment_minilm --data products.jsonl --output_dir outputs/repair
  hf-momentum repair --model mine --data failed.csv --validation v.csv --test t.csv --suite reviews --top 2
  hf-momentum repair --model mine --data failed.csv --layers head,block.11 --lora_r 8 --distill 1 \\
    --optim critical_sgd --learning_rate 1e-3 --max_steps 200
  hf-momentum repair --model mine --data failed.csv --baselines --seeds 5 --learning_rates 1e-5,5e-5

The model is not changed; an accepted repair lies in OUT/model. Any of transformers' TrainingArguments can be given as
--field value. A repair that was interrupted goes on when the command is given again. Exit status: 0 accepted, or
nothing to repair; 3 rolled back; 2 input that cannot be used."""

RUN_HELP = """\
Run any script or module that uses a Trainer with our --optim names registered, unchanged.

examples:
  hf-momentum run train.py --optim tam --output_dir out
  hf-momentum run trl sft --optim adatamw --model_name_or_path my-model ...
  accelerate launch -m hf_momentum.run train.py --optim tam"""

EXPORT_HELP = """\
Write a checkpoint of any launch (one process, DDP, FSDP2, DeepSpeed) as a plain folder that from_pretrained reads.

examples:
  hf-momentum export outputs/run/checkpoint-400 my-model
  hf-momentum export outputs/run/checkpoint-400 my-model --dtype bfloat16
  hf-momentum export outputs/run/checkpoint-400 continued --resumable"""


class _OneLineParser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0, or 2 after one line on standard error for input that cannot be used.

    Example:
        >>> main(["optimizers"])
        tam ... Heavy ball whose gradients are damped by their angle to the momentum (torque-aware momentum).
        ...
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except (InputError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _dispatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hf-momentum",
        description="Momentum and gradient methods for fine-tuning, measured under distribution shift.",
        epilog="example: hf-momentum train --config recipes/quickstart.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="run a recipe and write its report", add_help=False)
    commands.add_parser("pareto", help="compare gradient surgeries by their fronts", add_help=False)
    commands.add_parser("compare", help="compare tuned optimizers over seeds", add_help=False)
    commands.add_parser("stream", help="fine-tune through domains and see what is forgotten", add_help=False)
    commands.add_parser("evaluate", help="score a model on a suite of splits", add_help=False)
    commands.add_parser("diagnose", help="find the layers that a model's errors point to", add_help=False)
    commands.add_parser("repair", help="retrain those layers, and verify it", add_help=False)
    commands.add_parser("run", help="run any script with our --optim names", add_help=False)
    commands.add_parser("export", help="write a checkpoint as a plain folder", add_help=False)
    commands.add_parser("optimizers", help="list the optimizers and their arguments")
    command = parser.parse_known_args(words[:1])[0].command
    rest = words[1:]
    if command == "train":
        return _train(rest)
    if command == "pareto":
        return _pareto(rest)
    if command == "compare":
        return _compare(rest)
    if command == "stream":
        return _stream(rest)
    if command == "evaluate":
        return _evaluate(rest)
    if command == "diagnose":
        return _diagnose(rest)
    if command == "repair":
        return _repair(rest)
    if command == "run":
        return _run(rest)
    if command == "export":
        return _export(rest)
    parser.parse_args(words)
    return _optimizers()


def _train(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hf-momentum train",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    _add_launcher(parser)
    parser.add_argument("--help-fields", action="store_true", help="list every field of a recipe and exit")
    known, overrides = parser.parse_known_args(words)
    from hf_momentum import launch
    from hf_momentum.training import recipe

    if known.help_fields:
        print(recipe.parser().format_help())
        return 0
    if known.config is None and not overrides:
        raise InputError("train needs --config RECIPE, for example --config recipes/quickstart.yaml")
    flags = {name: getattr(known, name) for name in launch.LAUNCHER_FLAGS}
    if known.accelerate_config is None:
        for name, value in flags.items():
            if value is not None:
                raise InputError(f"--{name} is for a launch; name one with --accelerate_config, such as ddp or fsdp2")
    else:
        start = launch.prepare_launch(known.accelerate_config, flags)
    # Before anything is launched, so that a slip is one line and not one traceback for each process.
    loaded = recipe.load_recipe(known.config, overrides)
    if known.accelerate_config is not None:
        config = [] if known.config is None else ["--config", known.config]
        start.replace_this_process([*config, *overrides])

    from hf_momentum.training import job

    outcome = job.train(loaded)
    if outcome.is_main:
        print("\n" + "\n".join(job.summary(outcome)), flush=True)
    return 0


def _pareto(words: list[str]) -> int:
    parser = _OneLineParser(
        prog="hf-momentum pareto",
        description=PARETO_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--surgeries", metavar="NAMES", default="bloop,mixed,pcgrad,replay", help="(%(default)s)")
    parser.add_argument("--lambdas", metavar="WEIGHTS", default="0.01,0.1,1", help="(%(default)s)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="from the recipe's seed on (%(default)s)")
    parser.add_argument("--main", metavar="SPLIT", help="the first of in_distribution unless given")
    parser.add_argument("--auxiliary", metavar="SPLIT", help="the first of auxiliary unless given")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say how many runs and how long; run nothing")
    parser.add_argument("--output_dir", metavar="OUT", required=True, help="for runs.jsonl, the report and fronts.png")
    known, overrides = parser.parse_known_args(words)
    from hf_momentum.training import pareto
    from hf_momentum.training.words import listed, numbers

    made = pareto.plan(
        known.config,
        overrides,
        surgeries=listed(known.surgeries),
        lambdas=numbers("lambdas", known.lambdas),
        seeds=known.seeds,
        main=known.main,
        auxiliary=known.auxiliary,
        folder=known.output_dir,
    )
    if known.dry_run:
        print(pareto.outlook(made, known.jobs), flush=True)
        return 0
    records = pareto.run_grid(made, known.jobs)
    report = pareto.report(made, records)
    path = report.write(Path(known.output_dir))
    print("\n" + "\n".join([*report.troubles, report.verdict(), f"Report: {path} (and report.json, fronts.png)"]))
    return 1 if any(record.status == "failed" for record in records.values()) else 0


def _compare(words: list[str]) -> int:
    parser = _OneLineParser(
        prog="hf-momentum compare",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--optim", metavar="NAMES", required=True, help="optimizers with commas, the baseline first")
    parser.add_argument("--trials", metavar="N", type=int, default=6, help="learning rates of each grid (%(default)s)")
    parser.add_argument("--seeds", metavar="N", type=int, default=5, help="test runs of each optimizer (%(default)s)")
    parser.add_argument("--controls", metavar="NAMES", default="", help="frozen_gate,matched_lr: runs without the idea")
    parser.add_argument("--lr", metavar="NAME=VALUE", action="append", default=[], help="middle of an optimizer's grid")
    parser.add_argument(
        "--with", metavar="NAME:ARGS", action="append", default=[], help="its --optim_args", dest="args"
    )
    parser.add_argument("--ratio", metavar="R", type=float, default=10**0.5, help="between neighbours (sqrt 10)")
    parser.add_argument("--most_trials", metavar="N", type=int, help="a grid is widened no further (3 x trials)")
    parser.add_argument("--metric", metavar="NAME", help="what is compared; the task's main metric unless given")
    parser.add_argument(
        "--select", metavar="NAME", help="what chooses learning rates; the compared metric unless given"
    )
    parser.add_argument(
        "--tune_each_seed", action="store_true", help="tune every test seed by itself; N times the runs"
    )
    parser.add_argument("--storage", metavar="URL", help="of an Optuna storage; OUT/runs.db unless given")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say how many runs and how long; compare nothing")
    parser.add_argument("--output_dir", metavar="OUT", required=True, help="for runs.db, logs and the report")
    known, overrides = parser.parse_known_args(words)
    from hf_momentum.evaluation.scores import LOWER_IS_BETTER
    from hf_momentum.training import compare, compare_report, compare_runs
    from hf_momentum.training.ledger import Ledger
    from hf_momentum.training.words import listed

    made = compare.plan(
        known.config,
        overrides,
        methods=listed(known.optim),
        trials=known.trials,
        seeds=known.seeds,
        folder=known.output_dir,
        storage=known.storage,
        asked=listed(known.controls),
        ratio=known.ratio,
        most=known.most_trials,
        starts=compare.rates(known.lr),
        arguments=compare.pairs("with", ":", known.args),
        metric=known.metric,
        selection=known.select,
        each_seed=known.tune_each_seed,
    )
    Path(known.output_dir).mkdir(parents=True, exist_ok=True)
    ledger = Ledger(made.storage, made.study, made.selection in LOWER_IS_BETTER)
    if known.dry_run:
        print(compare_report.outlook(made, ledger, known.jobs), flush=True)
        return 0
    records = compare_runs.work(made, ledger, known.jobs)
    report = compare_report.report(made, records)
    path = report.write(Path(known.output_dir))
    print(
        "\n"
        + "\n".join(
            [
                *report.troubles,
                *report.verdict(),
                report.headline(),
                f"Report: {path} (and report.md, report.json, plots/)",
            ]
        )
    )
    return 1 if any(run.status == "failed" for run in report.runs) else 0


def _stream(words: list[str]) -> int:
    parser = _OneLineParser(
        prog="hf-momentum stream",
        description=STREAM_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    entry = "NAME=SOURCE@SPLIT"
    parser.add_argument("--config", metavar="RECIPE", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument(
        "--domains", metavar=entry, nargs="*", default=[], help="training data of each domain, in this order"
    )
    parser.add_argument(
        "--eval", metavar=entry, nargs="*", default=[], help="evaluation data of each domain, by the same names"
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="from the recipe's seed on (%(default)s)")
    parser.add_argument("--metric", metavar="NAME", help="of the matrix; the task's main one unless given")
    parser.add_argument("--output_dir", metavar="OUT", required=True, help="for the stages and the report")
    known, overrides = parser.parse_known_args(words)
    from hf_momentum.training import stream

    made = stream.plan(
        known.config,
        overrides,
        domains=known.domains,
        evaluation=known.eval,
        seeds=known.seeds,
        metric=known.metric,
        folder=known.output_dir,
    )
    report = stream.report(made, stream.run_streams(made))
    path = report.write(Path(known.output_dir))
    print(f"\n{report.verdict()}\nReport: {path} (and report.md, stream.json, plots/)", flush=True)
    return 0


def _evaluate(words: list[str]) -> int:
    parser = _OneLineParser(
        prog="hf-momentum evaluate",
        description=EVALUATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="MODEL", required=True, help="what is evaluated")
    parser.add_argument("--suite", metavar="SUITE", required=True, help="a YAML file, or a shipped suite's name")
    parser.add_argument("--source", metavar="NAME=SOURCE", action="append", default=[], help="replace a split's source")
    parser.add_argument("--base", metavar="MODEL", help="the model before fine-tuning, for what was forgotten")
    parser.add_argument("--baselines", metavar="JSON", nargs="+", default=[], help="reports, for effective robustness")
    parser.add_argument("--batch_size", metavar="N", type=int, default=16, help="examples at a time (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (the accelerator, if there is one)")
    parser.add_argument("--dtype", metavar="DTYPE", default="auto", help="auto (as saved), float32, bfloat16, float16")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    parser.add_argument("--max_examples", metavar="N", type=int, help="of each split at most")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (%(default)s)")
    parser.add_argument("--output_dir", metavar="OUT", default="outputs/evaluation", help="(%(default)s)")
    known = parser.parse_args(words)
    from hf_momentum.training import evaluate

    settings = evaluate.Settings(
        model=known.model,
        base=known.base,
        baselines=known.baselines,
        batch_size=known.batch_size,
        device=known.device,
        dtype=known.dtype,
        revision=known.revision,
        seed=known.seed,
    )
    suite = evaluate.load_suite(known.suite, known.source, known.max_examples)
    report = evaluate.evaluate(suite, settings, evaluate.command_of(words))
    path = report.write(Path(known.output_dir))
    print("\n" + "\n".join([*report.summary(), f"Report: {path} (and report.md, report.json, card.md, plots/)"]))
    return 0


def _add_launcher(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group("several processes (each option wins over the file)")
    several.add_argument("--accelerate_config", metavar="NAME", help="a file for accelerate launch, or a shipped one")
    several.add_argument("--num_processes", metavar="N", help="over all machines; one per GPU")
    several.add_argument("--num_machines", metavar="M", help="run the same command on each of them")
    several.add_argument("--machine_rank", metavar="R", help="which of them this is, from 0")
    several.add_argument("--main_process_ip", metavar="IP", help="address of machine 0")
    several.add_argument("--main_process_port", metavar="P", help="a port there; on one machine any free one")


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("how the data are read")
    data.add_argument(
        "--task",
        metavar="NAME",
        help="causal_lm (errors are tokens), generation (errors are texts that are not the reference), "
        "sequence_classification or image_classification; by the model unless given",
    )
    for column in ("text", "label", "image", "prompt", "reference"):
        data.add_argument(f"--{column}_column", metavar="NAME", default=column, help="(%(default)s)")
    data.add_argument("--classes", metavar="NAMES", default="", help="of the outputs in their order, with commas")
    data.add_argument("--block_size", metavar="N", type=int, help="tokens of an input at most")
    data.add_argument("--max_examples", metavar="N", type=int, help="of each dataset at most, drawn by the seed")
    data.add_argument("--max_new_tokens", metavar="N", type=int, default=32, help="for generation (%(default)s)")


def _add_groups(parser: argparse.ArgumentParser) -> None:
    groups = parser.add_argument_group("layer groups")
    groups.add_argument(
        "--split", choices=("blocks", "parts"), default="blocks", help="parts: attention, MLP and norms"
    )
    groups.add_argument(
        "--group", metavar="NAME=PATTERN", action="append", default=[], help="a group of your own: of parameters"
    )
    groups.add_argument("--score", metavar="NAME", default="contrast", help="contrast, raw, rms, relative or taylor")
    groups.add_argument("--top", metavar="K", type=int, help="choose the K largest scores (3)")
    groups.add_argument("--threshold", metavar="Z", type=float, help="or those above mean + Z std")
    groups.add_argument("--cumulative", metavar="SHARE", type=float, help="or the fewest with that share of all scores")
    groups.add_argument("--budget", metavar="SHARE", type=float, help="or what fits into that share of the parameters")


def _diagnose(words: list[str]) -> int:
    parser = _OneLineParser(
        prog="hf-momentum diagnose",
        usage="%(prog)s --model M --data D [--against CORRECT] [options]",
        description=DIAGNOSE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="M", required=True, help="what to diagnose")
    parser.add_argument("--data", metavar="D", required=True, help="SOURCE@SPLIT whose errors are looked at")
    parser.add_argument("--against", metavar="CORRECT", help="take what is right from there, not from D")
    _add_groups(parser)
    _add_data(parser)
    parser.add_argument(
        "--lora_weights", choices=("base", "delta"), default="base", help="what a LoRA model's weights are"
    )
    parser.add_argument("--no-random", action="store_true", help="leave out the model with random weights")
    parser.add_argument("--batch_size", metavar="N", type=int, default=16, help="examples at a time (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1; the accelerator unless given")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output_dir", metavar="OUT", default="outputs/diagnosis", help="(%(default)s)")
    _add_launcher(parser)
    known = parser.parse_args(words)
    from hf_momentum import launch
    from hf_momentum.training import diagnose

    settings = diagnose.settings_of(vars(known))
    diagnose.check(settings)
    launch.relaunch("diagnose", words, known.accelerate_config, {n: getattr(known, n) for n in launch.LAUNCHER_FLAGS})
    report = diagnose.diagnose(settings, diagnose.command_of("diagnose", words))
    if report is not None:
        files = f"Report: {report.write(Path(known.output_dir))} (and report.md, report.json, plots/)"
        print("\n" + "\n".join([report.verdict(), *report.sentences(), files]))
    return 0


def _repair(words: list[str]) -> int:
    parser = _OneLineParser(
        prog="hf-momentum repair",
        description=REPAIR_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="M", required=True, help="what to repair")
    parser.add_argument("--data", metavar="D", required=True, help="SOURCE@SPLIT to diagnose and train on")
    parser.add_argument("--validation", metavar="V", help="SOURCE@SPLIT to stop by and to choose the mixture")
    parser.add_argument("--test", metavar="T", help="SOURCE@SPLIT that decides")
    parser.add_argument("--cut", metavar="A,B,C", default="0.5,0.2,0.3", help="or parts of D (%(default)s)")
    parser.add_argument("--suite", metavar="SUITE", help="splits on which nothing may be lost")
    parser.add_argument("--source", metavar="NAME=SOURCE", action="append", default=[], help="in place of the suite's")
    parser.add_argument("--layers", metavar="NAMES", default="", help="groups to train, in place of a diagnosis")
    _add_groups(parser)
    _add_data(parser)
    how = parser.add_argument_group("training")
    how.add_argument("--lora_r", metavar="R", type=int, help="train LoRA adapters of this rank on just those groups")
    how.add_argument("--replay", metavar="N", type=float, default=1.0, help="right examples per error (%(default)s)")
    how.add_argument("--distill", metavar="W", type=float, default=0.0, help="pull to the old model (%(default)s)")
    how.add_argument("--patience", metavar="N", type=int, default=3, help="0: never stop early (%(default)s)")
    how.add_argument("--shares", metavar="LIST", default="0.25,0.5,0.75,1", help="of new weights (%(default)s)")
    how.add_argument("--alpha", metavar="P", type=float, default=0.05, help="of the decision (%(default)s)")
    how.add_argument("--keep_checkpoints", action="store_true", help="of the training, when it is over")
    others = parser.add_argument_group("is the diagnosis worth anything?")
    others.add_argument("--baselines", action="store_true", help="train other choices too, and compare")
    others.add_argument("--seeds", metavar="N", type=int, default=5, help="from the seed on (%(default)s)")
    others.add_argument("--learning_rates", metavar="LIST", default="", help="over which validation tunes each way")
    parser.add_argument("--batch_size", metavar="N", type=int, default=16, help="when measuring (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="such as cpu; the accelerator unless given")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output_dir", metavar="OUT", default="outputs/repair", help="(%(default)s)")
    known, overrides = parser.parse_known_args(words)
    from hf_momentum.training import diagnose, repair, repair_baselines
    from hf_momentum.training.words import numbers

    plan = repair.plan_of(vars(known), overrides)
    command = diagnose.command_of("repair", words)
    place = Path(known.output_dir)
    if known.baselines:
        rates = numbers("learning_rates", known.learning_rates)
        report = repair_baselines.run(plan, known.seeds, rates, command)
        files = f"Report: {report.write(place)} (and report.md, report.json, plots/)"
        print("\n" + "\n".join([report.verdict(), *report.sentences(), files]))
        return 0
    found = repair.repair(plan, command)
    kept = f"Repaired model: {place / 'model'}" if found.decision.accepted else "The model stays as it was."
    files = f"Report: {place / 'report.html'} (and report.md, report.json)"
    print("\n" + "\n".join([found.verdict(), *found.sentences(), kept, files]))
    return repair.ROLLED_BACK if found.outcome == "rolled back" else 0


def _run(words: list[str]) -> int:
    from hf_momentum.run import run

    if not words or words[0] in ("-h", "--help"):
        print(RUN_HELP)
        return 0 if words else 2
    run(words)
    return 0


def _export(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hf-momentum export",
        description=EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder such as outputs/run/checkpoint-400")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; as they were saved without it"
    )
    parser.add_argument(
        "--resumable",
        action="store_true",
        help="also the state of optimizer and schedule, whole, to continue under any launch",
    )
    known = parser.parse_args(words)
    from hf_momentum.training.export import export

    print(f"Exported to {export(known.checkpoint, known.out, known.dtype, known.resumable)}", flush=True)
    return 0


def _optimizers() -> int:
    from hf_momentum.integrations import OPTIMIZERS

    width = max(map(len, OPTIMIZERS))
    for name, spec in OPTIMIZERS.items():
        print(f"{name:<{width}}  {spec.summary}\n{'':<{width}}  {spec.source}; {spec.accepted()}")
    return 0


def console() -> None:
    """Entry point of the installed command and of `python -m hf_momentum`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every data-loader fork
    sys.exit(main())
