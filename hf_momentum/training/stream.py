"""A stream of shifts: one model is fine-tuned on a sequence of domains, and measured on all of them after each.

Every stage is a run of the recipe on the data of its domain, from the weights that the stage before left, with a new
optimizer and a new learning-rate schedule. With LoRA a stage's adapter is merged into the weights, and the next stage
begins a new one. A finished stage leaves its model and a line of scores: whoever gives the same command again repeats
only what has none.
"""

import gc
import importlib.metadata
import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback

from hf_momentum.errors import InputError, nearest
from hf_momentum.evaluation.forgetting import StreamReport
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.scores import metric_names, scorer, scores
from hf_momentum.training import job
from hf_momentum.training.plans import ALONE, check_overrides, digest
from hf_momentum.training.processes import launched_processes
from hf_momentum.training.quiet import quiet
from hf_momentum.training.recipe import Recipe, load_recipe, split_name
from hf_momentum.training.sources import Source
from hf_momentum.training.trainer import MomentumTrainer

Scores = Mapping[str, Mapping[str, Estimate]]  # by domain and metric

# What a stream decides in every stage; the rest is the recipe's.
_SET = {
    **ALONE,
    "eval_strategy": "no",
    "logging_strategy": "no",
    "log_dynamics": "false",
}
_VARIED = {"seed", "data_seed", "output_dir", "train_dataset", "in_distribution", "shifted", "must_not_forget"}
_NOT_TO_GIVE = {
    "train_dataset": "name the training data of each domain with --domains",
    "in_distribution": "name the evaluation data of each domain with --eval",
    "data_seed": "the streams' seeds are --seed and the ones after it",
    "resume_from_checkpoint": "finished stages are not repeated anyway",
}


@dataclass(frozen=True)
class Plan:
    """Streams that were checked, as `plan` makes them.

    Attributes:
        config, overrides: the recipe, as for `load_recipe`.
        domains: name and source of each domain's training data, in the order of training.
        evaluation: source of each domain's evaluation data, by its name.
        seeds: one stream for each.
        metric: what the matrix shows.
        folder: where everything is written.
        digest: of all that shapes a stage but its seed; files are known by their names, not by what they hold.
    """

    config: str | None
    overrides: Sequence[str]
    domains: Mapping[str, str]
    evaluation: Mapping[str, str]
    seeds: Sequence[int]
    metric: str
    folder: str
    digest: str

    def place(self, seed: int, stage: int) -> Path:
        """The folder of a stage, counted from 1."""
        return Path(self.folder) / f"seed-{seed}" / f"stage-{stage}-{list(self.domains)[stage - 1]}"

    def recipe(self, seed: int, stage: int) -> Recipe:
        """The recipe of one stage."""
        words = [f"--train_dataset={list(self.domains.values())[stage - 1]}", "--in_distribution"]
        words += [f"{name}={self.evaluation[name]}" for name in self.domains]
        words += [f"--seed={seed}", f"--data_seed={seed}", f"--output_dir={self.place(seed, stage)}"]
        words += [f"--{name}={value}" for name, value in _SET.items()]
        if stage > 1:
            words.append(f"--model_name_or_path={self.place(seed, stage - 1) / 'model'}")
        recipe = load_recipe(self.config, [*self.overrides, *words])
        recipe.data.shifted, recipe.data.must_not_forget, recipe.data.auxiliary = [], [], []
        recipe.data.validation_dataset = None  # nothing is selected here
        if stage > 1:
            recipe.model.model_revision = None  # that is the base model's
        return recipe


@dataclass(frozen=True)
class Stage:
    """What one stage left: `stage.json` in its folder.

    Attributes:
        digest: of the plan that it belongs to.
        before: scores of the base model, in the first stage; empty in the others, which begin where the last one ended.
        after: scores at its end.
        seconds: of training alone.
    """

    digest: str
    before: Scores
    after: Scores
    seconds: float


def plan(
    config: str | None,
    overrides: Sequence[str],
    domains: Sequence[str],
    evaluation: Sequence[str],
    seeds: int,
    metric: str | None,
    folder: str,
) -> Plan:
    """Check everything that can be checked before the first stage; nothing is written.

    Args:
        config: a recipe; what it names as training and evaluation data is not used.
        overrides: `--field=value` on top of it.
        domains: NAME=SOURCE@SPLIT of each domain's training data, in the order of training; at least two.
        evaluation: NAME=SOURCE@SPLIT of each domain's evaluation data, by the same names.
        seeds: how many streams, with seeds counted from the recipe's `seed`.
        metric: what the matrix shows; the task's main one without.
        folder: the output folder.

    Raises:
        InputError: fewer than two domains, a domain without evaluation data or evaluation data of no domain, a name
            given twice, an unknown metric, too few seeds, a field that the stream sets itself, or a recipe that does
            not fit.
    """
    if launched_processes() > 1:
        raise InputError("stream runs on one process; start it without a launcher")
    trained, measured = _named("domains", domains), _named("eval", evaluation)
    if len(trained) < 2:
        raise InputError(f"domains must be at least 2, got {len(trained)}; a single one is what `train` is for")
    if not measured:
        raise InputError("eval is empty; give NAME=SOURCE@SPLIT for each domain")
    for name in measured:
        if name not in trained:
            known = ", ".join(trained)
            raise InputError(f"eval names {name!r}, which is no domain{nearest(name, trained)}; domains: {known}")
    missing = [name for name in trained if name not in measured]
    if missing:
        raise InputError(f"domain {missing[0]!r} has no evaluation data; add {missing[0]}=SOURCE@SPLIT to --eval")
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}; intervals need at least 2")
    check_overrides(overrides, _NOT_TO_GIVE, "the stream")
    made = Plan(config, list(overrides), trained, measured, [0], metric or "", folder, "")
    recipe = load_recipe(
        config, [*overrides, f"--train_dataset={trained[next(iter(trained))]}", f"--output_dir={folder}"]
    )
    if recipe.bloop.aux_dataset or recipe.bloop.aux_loss is not None:
        raise InputError("a stream has no auxiliary objective; leave aux_dataset and aux_loss out of the recipe")
    accepted = [name for name in metric_names(recipe.model.task) if name != "f1_binary"]
    if metric is not None and metric not in accepted:
        raise InputError(f"unknown metric {metric!r}{nearest(metric, accepted)}; accepted: {', '.join(accepted)}")
    made = Plan(
        config=config,
        overrides=list(overrides),
        domains=trained,
        evaluation={name: measured[name] for name in trained},
        seeds=[recipe.training.seed + index for index in range(seeds)],
        metric=metric or accepted[0],
        folder=folder,
        digest=digest(recipe, {*_VARIED, *_SET}, domains=list(trained.items()), evaluation=sorted(measured.items())),
    )
    made.recipe(made.seeds[0], 1)
    return made


def _named(argument: str, entries: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for entry in entries:
        name, source = split_name(entry)
        if name in named:
            raise InputError(f"{argument} names {name!r} twice; give every domain a name of its own")
        if not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{argument}: the name {name!r} becomes a folder; use letters, digits, - and _")
        named[name] = source
    return named


# ---- one stage -------------------------------------------------------------------------------------------------------


def run_stage(made: Plan, seed: int, stage: int) -> Stage:
    """Train on one domain and measure all; leaves the model and then `stage.json`, each whole or not at all.

    Raises:
        InputError: data or model cannot be used as given.
        TrainingStopped: the loss became NaN or infinite.
    """
    for later in range(stage, len(made.domains) + 1):  # what followed other weights is not this stream's
        (made.place(seed, later) / "stage.json").unlink(missing_ok=True)
    with quiet():
        recipe = made.recipe(seed, stage)
        prepared = job.prepare(recipe)
        trainer = prepared.trainer
        trainer.remove_callback(PrinterCallback)  # there is one line for each stage, from the stream
        before = _measured(recipe.model.task, prepared, "before") if stage == 1 else {}
        seconds = trainer.train().metrics["train_runtime"]
        left = Stage(made.digest, before, _measured(recipe.model.task, prepared, "after"), seconds)
        _keep(trainer, made.place(seed, stage))
    write(made, seed, stage, left)
    if stage > 1:  # the last model is all that the rest of the stream needs
        shutil.rmtree(made.place(seed, stage - 1) / "model", ignore_errors=True)
    return left


def _keep(trainer: MomentumTrainer, folder: Path) -> None:
    """The model and its tokenizer as a plain folder, which appears whole or not at all."""
    model: Any = trainer.model
    partial = folder / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (model.merge_and_unload() if isinstance(model, PeftModel) else model).save_pretrained(partial)
    trainer.processing_class.save_pretrained(partial)  # type: ignore[union-attr]
    shutil.rmtree(folder / "model", ignore_errors=True)
    partial.replace(folder / "model")


def _measured(task: str, prepared: job.Prepared, when: str) -> dict[str, dict[str, Estimate]]:
    config: Any = prepared.trainer.model.config
    found = {}
    for split in prepared.splits:
        made = scorer(task, classes=getattr(config, "num_labels", 0), bytes_per_token=split.bytes_per_token)
        found[split.name] = scores(made, job.measure(prepared.trainer, split, when))
    return found


def write(made: Plan, seed: int, stage: int, left: Stage) -> None:
    """Keep what a stage left, whole, in its folder."""
    path = made.place(seed, stage) / "stage.json"
    partial = path.with_name("stage.json.partial")
    partial.write_text(json.dumps(asdict(left), indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def read(made: Plan, seed: int, stage: int) -> Stage | None:
    """What a finished stage of this plan left, or None."""
    path = made.place(seed, stage) / "stage.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    if told["digest"] != made.digest:
        return None
    for when in ("before", "after"):
        told[when] = {
            domain: {name: Estimate(**estimate) for name, estimate in metrics.items()}
            for domain, metrics in told[when].items()
        }
    return Stage(**told)


# ---- the streams -----------------------------------------------------------------------------------------------------


def run_streams(
    made: Plan,
    run: Callable[[Plan, int, int], Stage] = run_stage,
    say: Callable[[str], None] = print,
) -> dict[int, list[Stage]]:
    """Run every stage that is not finished yet, seed by seed, and tell of each.

    Args:
        made: from `plan`.
        run: what one stage is.
        say: is given one line for each stage that ran.

    Returns:
        The stages of every seed.

    Raises:
        InputError: data or model cannot be used as given; for classifiers also if the domains differ in their classes.
        TrainingStopped: a loss became NaN or infinite.
    """
    _check_classes(made)
    names, done = list(made.domains), 0
    streams: dict[int, list[Stage]] = {}
    for seed in made.seeds:
        streams[seed] = []
        for stage in range(1, len(names) + 1):
            done += 1
            found = read(made, seed, stage)
            if found is None:
                found = run(made, seed, stage)
                shown = ", ".join(f"{name} {found.after[name][made.metric].value:.3f}" for name in names)
                count = f"{done}/{len(made.seeds) * len(names)}"
                say(f"[{count}] seed {seed}, after {names[stage - 1]}: {made.metric.replace('_', ' ')} {shown}")
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            streams[seed].append(found)
    return streams


def _check_classes(made: Plan) -> None:
    """Refuse domains whose classifiers would differ, which only the second stage would find."""
    recipe = made.recipe(made.seeds[0], 1)
    column = recipe.data.label_column
    if recipe.model.task == "causal_lm":
        return
    first: tuple[str, set[Any]] | None = None
    with quiet():
        for name, source in made.domains.items():
            rows = Source.parse(source).load()
            if column not in rows.column_names:
                raise InputError(f"domain {name!r} has no column {column!r}; set label_column")
            classes = set(rows[column])
            if first is not None and classes != first[1]:
                odd = sorted(map(str, classes ^ first[1]))[0]
                raise InputError(f"domains {first[0]!r} and {name!r} differ in their classes: {odd!r} is in one only")
            first = first or (name, classes)


def report(made: Plan, streams: Mapping[int, Sequence[Stage]]) -> StreamReport:
    """What the stages say."""
    recipe = made.recipe(made.seeds[0], 1)
    training = recipe.training
    optimizer = str(getattr(training.optim, "value", training.optim))
    length = f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    seconds = sum(stage.seconds for stages in streams.values() for stage in stages)
    facts = {
        "model": f"{recipe.model.model_name_or_path}, {'LoRA' if recipe.peft.lora else 'all weights'}",
        **{f"domain {name}": f"{source}, measured on {made.evaluation[name]}" for name, source in made.domains.items()},
        "optimizer": f"{optimizer}, learning rate {training.learning_rate:g}, {length} in each stage; optimizer and "
        "schedule begin anew in each",
        "seeds": ", ".join(map(str, made.seeds)),
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else training.device.type,
        "time": f"{seconds:.0f} s of training, summed over all stages",
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("hf-momentum", "torch", "transformers", "peft")
        ),
    }
    return StreamReport(
        title=f"{recipe.name} through {', then '.join(made.domains)}: what {optimizer} kept",
        domains=list(made.domains),
        metric=made.metric,
        seeds=made.seeds,
        cells={seed: [stages[0].before, *(stage.after for stage in stages)] for seed, stages in streams.items()},
        facts=facts,
        recipe=load_recipe(made.config, [*made.overrides, f"--output_dir={made.folder}"]).to_yaml(),
        command=_command(made),
    )


def _command(made: Plan) -> str:
    config = [] if made.config is None else ["--config", made.config]
    words = ["--domains", *(f"{name}={source}" for name, source in made.domains.items())]
    words += ["--eval", *(f"{name}={source}" for name, source in made.evaluation.items())]
    words += ["--seeds", str(len(made.seeds)), "--metric", made.metric, "--output_dir", made.folder]
    return shlex.join(["hf-momentum", "stream", *config, *words, *made.overrides])
