"""Is a planted fault found, and is it mended by retraining the faulty layers alone? (arXiv 2603.28921)

    python scripts/claims/planted.py                                     a ResNet on digits, on one core
    python scripts/claims/planted.py --encoder FOLDER --reviews FOLDER   a text encoder fine-tuned on films

One block of a trained model, another at each seed, is damaged in one of three ways. Then all layer groups are scored
on data that were not trained on: is the damaged one first? The same is asked of scores by right examples alone, which
know nothing of the errors, and of the model without the damage. For the worst noise the block is then retrained, and
in another run all weights, with equal steps, each at the best of three learning rates on validation.

FOLDER of reviews holds movies_train.jsonl, movies_validation.jsonl and movies_test.jsonl, with columns text and label.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import TASKS, Enlarged, Examples, Lab, Setting, fitted, laboratory, parser, shape
from layers import ALL_SCORES, SEEDS, diagnosed, image_model, pictures, sized, top
from page import Program, keep
from rows import Row, means, versus
from torch import Tensor
from torch.nn import functional

from hf_momentum.diagnosis.groups import LayerGroup, layer_groups
from hf_momentum.diagnosis.results import SCORES
from hf_momentum.evaluation.suite import SuiteSplit, Task
from hf_momentum.training import examples as packaged
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.predictions import Held, Predictions
from hf_momentum.training.quiet import quiet
from hf_momentum.training.repair import Plan
from hf_momentum.training.retrain import Trained, gain, lessons, retrain
from hf_momentum.training.samples import Settings
from hf_momentum.training.suite_rows import load_rows

LR = 0.05  # of SGD with momentum 0.9, near what the tuning of layers.py selects
WORST = "noise of 1.2 std"
FAULTS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise of 0.7 std": lambda w, g: w + 0.7 * w.std() * torch.randn(w.shape, generator=g),
    WORST: lambda w, g: w + 1.2 * w.std() * torch.randn(w.shape, generator=g),
    "rows permuted": lambda w, g: w[torch.randperm(len(w), generator=g)],
}
"""What is done to each weight matrix (or convolution) of the block."""

LEAST = 0.02  # accuracy that a fault has to cost for a share of it to be formed
PLANTED, FULL = "the planted block", "all weights"
# Learning rates and steps of a repair; the optimizer is the one of `hf-momentum repair` for the task.
REPAIRS: Mapping[Task, tuple[Sequence[float], int]] = {
    "image_classification": ((0.03, 0.1, 0.3), 60),
    "sequence_classification": ((5e-5, 1.5e-4, 5e-4), 20),
}


@dataclass(frozen=True)
class Trial:
    """A trained model, and data that nothing else has seen.

    Attributes:
        held: whose errors are diagnosed.
        taught, validation, test: for the repair.
    """

    evaluated: Evaluated
    task: Task
    held: packaged.Examples
    taught: Held
    validation: Held
    test: Held


# ---- pictures and texts ----------------------------------------------------------------------------------------------


def image_trial(setting: Setting, device: str = "cpu") -> Trial:
    """A ResNet trained on digits; diagnosed on other writers, repaired by its own training data."""
    net, _ = fitted(setting, device)
    assert isinstance(net, Enlarged)
    data = TASKS[setting.task](setting.seed)

    def held(name: str, part: Examples) -> Held:
        return _held(name, "image_classification", pictures(part))

    return Trial(
        image_model(net),
        "image_classification",
        pictures(data.shifted["writers"]),
        held("taught", data.train),
        held("validation", data.validation),
        held("test", data.test),
    )


def _held(name: str, task: Task, given: packaged.Examples) -> Held:
    import datasets

    return Held(SuiteSplit(name, "in distribution", task=task), datasets.Dataset.from_dict({}), given)


@dataclass(frozen=True)
class Texts:
    """How a text encoder is fine-tuned, and how many reviews are in each part."""

    steps: int = 60
    batch: int = 16
    lr: float = 2e-4
    length: int = 40
    held: int = 200
    taught: int = 300
    validation: int = 120
    test: int = 400


def text_trial(encoder: Path, reviews: Path, given: Texts, seed: int) -> Trial:
    """An encoder fine-tuned on films from a head drawn by the seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    evaluated = Evaluated(encoder.name, model.eval(), AutoTokenizer.from_pretrained(encoder))
    task: Task = "sequence_classification"

    def parts(name: str, *sizes: int) -> list[packaged.Examples]:
        split = SuiteSplit(name, "in distribution", source=str(reviews / f"movies_{name}.jsonl"), task=task)
        split = replace(split, block_size=given.length)
        rows, found, start = load_rows(split).shuffle(seed=seed), [], 0
        for size in sizes:
            found.append(packaged.examples_of(evaluated, rows.select(range(start, start + size)), split))
            start += size
        return found

    known, taught = parts("train", given.steps * given.batch, given.taught)
    held, validation = parts("validation", given.held, given.validation)
    (test,) = parts("test", given.test)
    fine_tune(model, known, given)
    measured = [_held(name, task, part) for name, part in (("taught", taught), ("validation", validation))]
    return Trial(evaluated, task, held, *measured, _held("test", task, test))


def fine_tune(model: Any, known: packaged.Examples, given: Texts) -> None:
    """One pass over the examples with AdamW: linear warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step, given.steps))
    model.train()
    for step in range(given.steps):
        batch = range(step * given.batch, (step + 1) * given.batch)
        functional.cross_entropy(model(**known.inputs(batch)).logits, known.targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.eval()


# ---- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def planted(model: Any, group: LayerGroup, fault: str, seed: int) -> Iterator[None]:
    """The model with a fault in one group, for a while.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> before = model[1].weight.clone()
        >>> with planted(model, layer_groups(model)[1], WORST, seed=0):
        ...     bool((model[1].weight != before).all())
        True
        >>> torch.equal(model[1].weight, before)
        True
    """
    weights = [parameter for name, parameter in model.named_parameters() if name in group.weights]
    matrices = [parameter for parameter in weights if parameter.dim() > 1]
    old = [matrix.detach().clone() for matrix in matrices]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for matrix in matrices:
                matrix.copy_(FAULTS[fault](matrix.cpu(), generator))
        yield
    finally:
        with torch.no_grad():
            for matrix, before in zip(matrices, old, strict=True):
                matrix.copy_(before)


def run(trial: Trial, seed: int) -> dict[str, Any]:
    """Damage one block, diagnose, and mend it."""
    model = trial.evaluated.model
    blocks = [group for group in layer_groups(model) if group.kind == "block"]
    group = blocks[seed % len(blocks)]
    before = trial.test.predictions(trial.evaluated, 32)
    found = {"": diagnosed(trial.evaluated, trial.held, trial.task, "blocks", seed)}
    for fault in FAULTS:
        with planted(model, group, fault, seed):
            found[fault] = diagnosed(trial.evaluated, trial.held, trial.task, "blocks", seed)
    with planted(model, group, WORST, seed):
        damaged = trial.test.predictions(trial.evaluated, 32)
        ways = {PLANTED: group.weights, FULL: [name for name, _ in model.named_parameters()]}
        mended = {name: mend(trial, names, damaged, seed) for name, names in ways.items()}
    accuracies = {"before": before.accuracy, "damaged": damaged.accuracy}
    return {"group": group.name, "found": found, "accuracy": accuracies, "mended": mended}


def mend(trial: Trial, names: Sequence[str], damaged: Predictions, seed: int) -> dict[str, Any]:
    """Retrain some weights at each learning rate, and measure the best of validation on the test split."""
    evaluated, (rates, steps) = trial.evaluated, REPAIRS[trial.task]
    taught = lessons(trial.taught, trial.taught.predictions(evaluated, 32), 1.0, seed)
    before = trial.validation.predictions(evaluated, 32)
    trained = Trained.of(evaluated.model, names)
    overrides = [f"--max_steps={steps}", f"--logging_steps={steps}", "--save_strategy=no", "--disable_tqdm=true"]
    best: tuple[tuple[int, float], float, dict[str, Tensor]] | None = None
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("", trial.taught.split, seed=seed)
        plan = Plan(settings, folder, overrides=[*overrides, "--per_device_eval_batch_size=32"])
        for rate in rates:
            training = plan.training(folder, learning_rate=str(rate))
            with quiet():
                found = retrain(evaluated, trained, taught, trial.validation, before, training)
            mixture = next(one for one in found.mixtures if one.share == found.share)
            key = (mixture.flips.net, -mixture.loss)
            if best is None or key > best[0]:
                best = key, rate, trained.now()
            trained.put(trained.old)
    assert best is not None
    trained.put(best[2])
    after = trial.test.predictions(evaluated, 32)
    trained.put(trained.old)
    evaluated.model.requires_grad_(True)
    changed = gain(damaged, after)
    return {
        "accuracy": after.accuracy,
        "fixed": changed.fixed,
        "broken": changed.broken,
        "rate": best[1],
        "parameters": trained.numel,
    }


# ---- figures ---------------------------------------------------------------------------------------------------------


def rows_of(runs: Sequence[Mapping[str, Any]], words: str) -> tuple[list[Row], list[str]]:
    """What the runs say."""
    rows, facts = [], []
    groups = runs[0]["found"][""]["groups"]
    for fault in FAULTS:
        ours = _first(runs, fault, "errors", "contrast")
        against = {
            "nine seeds in ten": ("baseline", [90.0] * len(runs)),
            f"chance, 1 in {len(groups)}": ("baseline", [100 / len(groups)] * len(runs)),
            "raw of right examples alone": ("control", _first(runs, fault, "right", "raw")),
            "the same model without the fault": ("control", _first(runs, "", "errors", "contrast")),
        }
        claim = f"The contrast puts the block with a planted fault first: {fault}"
        rows.append(Row(claim, words, "seeds in which it does, in percent", "points", versus(ours, against)))
        by_errors, by_right, without = (
            {score: _count(_first(runs, one, view, score)) for score in scores}
            for one, view, scores in (
                (fault, "errors", ALL_SCORES),
                (fault, "right", SCORES),
                ("", "errors", ALL_SCORES),
            )
        )
        wrong = statistics.fmean(run["found"][fault]["wrong"] for run in runs)
        facts.append(
            f"{fault} ({wrong:.0f} of {runs[0]['found'][fault]['looked at']} wrong on average), the block first of "
            f"{len(groups)} groups, of {len(runs)} seeds: by errors {_listed(by_errors)}; by right examples alone "
            f"{_listed(by_right)}; in the model without the fault {_listed(without)}"
        )
    mended, more = _mended(runs, words)
    return rows + mended, facts + more


def _first(runs: Sequence[Mapping[str, Any]], fault: str, view: str, score: str) -> list[float]:
    """100 where the planted group has the largest score, seed by seed; 0 where the view is lacking."""
    return [100.0 * (top(run["found"][fault], view, score, 1) == [run["group"]]) for run in runs]


def _count(hits: Sequence[float]) -> int:
    return sum(hit > 0 for hit in hits)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _mended(runs: Sequence[Mapping[str, Any]], words: str) -> tuple[list[Row], list[str]]:
    accuracy = {
        "before the fault": [100 * run["accuracy"]["before"] for run in runs],
        "with it": [100 * run["accuracy"]["damaged"] for run in runs],
    }
    accuracy |= {f"{way} retrained": [100 * run["mended"][way]["accuracy"] for run in runs] for way in (PLANTED, FULL)}
    # Of next to nothing there are no shares.
    hurt = [run for run in runs if run["accuracy"]["before"] - run["accuracy"]["damaged"] >= LEAST]
    shares = {way: [restored(run, way) for run in hurt] for way in (PLANTED, FULL)}
    broken, fixed = (
        {way: [run["mended"][way][figure] for run in runs] for way in (PLANTED, FULL)} for figure in ("broken", "fixed")
    )
    back = versus(shares[PLANTED], {"90 %": ("baseline", [90.0] * len(hurt))}) if hurt else ()
    full = {"all weights at equal steps": ("baseline", broken[FULL])}
    rows = [
        Row(f"Retraining the damaged block alone ({WORST}) restores 90 % of the accuracy that was lost", words,
            "accuracy restored, in percent of what was lost", "points", back),
        Row(f"Retraining the damaged block alone ({WORST}) breaks fewer cases than retraining all weights", words,
            "right cases with the fault that are wrong after the repair", "cases",
            versus(broken[PLANTED], full, lower_is_better=True)),
    ]  # fmt: skip
    rates = {way: sorted({run["mended"][way]["rate"] for run in runs}) for way in (PLANTED, FULL)}
    facts = [
        f"Test accuracy, {WORST}: {means('percent', accuracy)}; broken cases {means('', broken, 1)}; fixed cases "
        f"{means('', fixed, 1)}; learning rates that validation chose: "
        + "; ".join(f"{way} {', '.join(f'{rate:g}' for rate in found)}" for way, found in rates.items()),
    ]
    if hurt:
        facts.append(
            f"Restored of what was lost, at the {len(hurt)} of {len(runs)} seeds where it was {100 * LEAST:g} points "
            f"or more: {means('percent', shares, 1)}"
        )
    return rows, facts


def restored(run: Mapping[str, Any], way: str) -> float:
    """The share of the lost accuracy that is back, in percent.

    Example:
        >>> one = {"accuracy": {"before": 0.9, "damaged": 0.5}, "mended": {"all weights": {"accuracy": 0.8}}}
        >>> round(restored(one, "all weights"), 6)
        75.0
    """
    lost = run["accuracy"]["before"] - run["accuracy"]["damaged"]
    return 100 * (run["mended"][way]["accuracy"] - run["accuracy"]["damaged"]) / lost


# ---- programs --------------------------------------------------------------------------------------------------------


def program(lab: Lab) -> Program:
    """The ResNet."""
    size = sized(lab)
    setting, runs = size.setting("sgd", LR, momentum=0.9), []
    for seed in range(size.seeds):
        one = replace(setting, seed=seed)
        what = {"program": "planted", **asdict(one)}
        runs.append(lab.records.kept(what, lambda one=one: run(image_trial(one, lab.device), one.seed)))
        lab.say(f"seed {seed}: {runs[-1]['group']}")
    return Program("planted", size.name, *rows_of(runs, size.words))


def text_program(lab: Lab, encoder: Path, reviews: Path, seeds: int, given: Texts) -> Program:
    """The encoder."""
    runs = []
    for seed in range(seeds):
        what = {"program": "planted", "encoder": encoder.name, "seed": seed, **asdict(given)}
        runs.append(lab.records.kept(what, lambda seed=seed: run(text_trial(encoder, reviews, given, seed), seed)))
        lab.say(f"{encoder.name}, seed {seed}: {runs[-1]['group']}")
    words = f"reviews of films, {encoder.name}, {given.steps} steps of {given.batch}"
    return Program("planted", "reviews", *rows_of(runs, words))


def main(given: Sequence[str] | None = None) -> None:
    """Images; or texts, if an encoder is given."""
    words = parser("planted")
    words.add_argument("--encoder", type=Path, default=None, help="a folder with a text encoder, to be fine-tuned")
    words.add_argument("--reviews", type=Path, default=None, help="a folder with reviews of films")
    words.add_argument("--seeds", type=int, default=SEEDS, help="of the encoder's runs")
    args = words.parse_args(given)
    lab = laboratory("planted", args)
    if args.encoder is None:
        keep(program(lab), args.json)
    elif args.reviews is None:
        words.error("--encoder needs --reviews, a folder with movies_train.jsonl, _validation and _test")
    else:
        keep(text_program(lab, args.encoder, args.reviews, args.seeds, Texts()), args.json)


if __name__ == "__main__":
    main()
