"""Do errors point to the same layers, whether SGD or Adam trained the model? (arXiv 2603.28921)

    python scripts/claims/layers.py     digits, some ten minutes on one core

One ResNet, trained by SGD with momentum and by AdamW from the same first weights with the same batches, each at its
tuned learning rate. Both are diagnosed on digits of writers that neither has seen: which 3 layer groups have the
largest scores? What the two choose in common is held against chance, and against what each has in common with the
choice of a model of other, random weights on the same examples: an agreement that needs no training says nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from common import TASKS, Enlarged, Examples, Lab, Setting, Size, arguments, enlarged, fitted, laboratory, tuning_facts
from page import Program, keep
from rows import Row, means, versus

from hf_momentum import InputError
from hf_momentum.diagnosis.choice import Rule, choose
from hf_momentum.diagnosis.overlap import overlap, spearman
from hf_momentum.diagnosis.results import SCORES, Compared
from hf_momentum.evaluation.suite import SuiteSplit, Task
from hf_momentum.training import examples as packaged
from hf_momentum.training.evaluated import Evaluated, untrained
from hf_momentum.training.samples import Data, Settings, attribute, scores_of

SGD, ADAM = "SGD 0.9", "AdamW"
CANDIDATES = {SGD: ("sgd", 0.05, {"momentum": 0.9}), ADAM: ("adamw", 2e-3, {"weight_decay": 0.01})}
ALL_SCORES = ("contrast", *SCORES)
SPLITS = ("blocks", "parts")
TOP = 3
SEEDS, TRIALS = 10, 5
OTHER_SEED = 10_000  # the random model does not have the first weights of the trained ones


# ---- one diagnosis ---------------------------------------------------------------------------------------------------


def pictures(given: Examples) -> packaged.Examples:
    """Images as the package's functions take them."""
    images, labels = enlarged(given[0]), given[1]
    return packaged.Examples(
        sizes=[1] * len(labels),
        inputs=lambda batch: {"pixel_values": images[list(batch)]},
        targets=lambda batch: labels[list(batch)],
        rows=range(len(labels)),
        classes=labels.tolist(),
    )


def sized(lab: Lab) -> Size:
    """The ResNet's size.

    Raises:
        InputError: of another task than the digits.
    """
    if lab.size.task != "digits":
        raise InputError(
            f"--size {lab.size.name} is of {lab.size.task}, and layers are looked at on digits; take small"
        )
    return replace(lab.size, model="resnet", seeds=min(SEEDS, lab.size.seeds))


def image_model(net: Enlarged) -> Evaluated:
    """The network inside, in evaluation mode."""
    return Evaluated("", net.model.eval(), None)


def diagnosed(
    evaluated: Evaluated, held: packaged.Examples, task: Task, split: str, seed: int, random: bool = False
) -> dict[str, Any]:
    """Scores of all groups by errors, by right examples and, if asked for, by a random model's view of the same.

    Raises:
        InputError: nothing is wrong.
    """
    settings = Settings("", SuiteSplit("held", "in distribution", task=task), split=split, batch_size=32, seed=seed)
    data = Data(evaluated, held, None, None)
    found = attribute(evaluated, data, settings)
    if found.compared is None:
        raise InputError(f"seed {seed}: none of {found.looked_at} is wrong, so there is nothing to diagnose")
    views = {"errors": _ranking(found.compared)}
    if found.compared.right is not None:
        views["right"] = {score: [one.value for one in found.compared.right.scores[score]] for score in SCORES}
    if random:
        other = untrained(evaluated, task, seed + OTHER_SEED)
        views["random"] = _ranking(scores_of(other, data, settings, found))
    groups = [group.name for group in found.groups]
    return {"wrong": found.errors, "looked at": found.looked_at, "groups": groups, "scores": views}


def _ranking(compared: Compared) -> dict[str, list[float]]:
    """All scores of the errors. Without a right example of the classes that are wrong there is no contrast; then raw
    stands for it, as it does in `hf-momentum diagnose`."""
    found = {score: compared.values(score) for score in SCORES}
    return {"contrast": compared.values("contrast") if compared.right else found["raw"], **found}


def top(found: Mapping[str, Any], view: str, score: str, count: int = TOP) -> list[str]:
    """The groups with the largest scores; none where the view is lacking."""
    if view not in found["scores"]:
        return []
    groups = found["groups"]
    return choose(groups, found["scores"][view][score], [1] * len(groups), Rule(top=count))


# ---- SGD and Adam ----------------------------------------------------------------------------------------------------


def run(setting: Setting, device: str = "cpu") -> dict[str, Any]:
    """Train, and diagnose on digits of other writers."""
    net, result = fitted(setting, device)
    assert isinstance(net, Enlarged)
    held = pictures(TASKS[setting.task](setting.seed).shifted["writers"])
    return {
        "accuracy": result["scores"]["test"]["accuracy"],
        **{
            split: diagnosed(image_model(net), held, "image_classification", split, setting.seed, random=True)
            for split in SPLITS
        },
    }


def program(lab: Lab) -> Program:
    """Tune, train, diagnose, and compare the choices."""
    size = sized(lab)
    size = replace(size, tuning_seeds=min(2, size.tuning_seeds), trials=min(TRIALS, size.trials))
    lab = Lab(size, lab.records, lab.device, lab.say)
    candidates = {name: size.setting(method, lr, **given) for name, (method, lr, given) in CANDIDATES.items()}
    tuned = lab.tuned(candidates)
    facts, found = tuning_facts(tuned), {}
    for name in candidates:
        setting = replace(candidates[name], lr=tuned[name].lr)
        found[name] = []
        for seed in range(size.seeds):
            one = replace(setting, seed=seed)
            what = {"program": "layers", **asdict(one)}
            found[name].append(lab.records.kept(what, lambda one=one: run(one, lab.device)))
            lab.say(f"{name}, seed {seed}: {found[name][-1]['blocks']['wrong']} wrong")
    wrong = {name: [run["blocks"]["wrong"] for run in runs] for name, runs in found.items()}
    right = {name: [100 * run["accuracy"] for run in runs] for name, runs in found.items()}
    total = found[SGD][0]["blocks"]["looked at"]
    facts += [
        f"Test accuracy: {means('percent', right)}",
        f"Wrong of {total} digits of other writers: {means('on average', wrong, 0)}",
    ]
    rows = []
    for split in SPLITS:
        pairs = [(one[split], other[split]) for one, other in zip(found[SGD], found[ADAM], strict=True)]
        for score in ALL_SCORES:
            row, fact = _agreement(pairs, split, score, size.words)
            rows.append(row)
            facts.append(fact)
    return Program("layers", size.name, rows, facts)


def _agreement(pairs: Sequence[tuple[Any, Any]], split: str, score: str, words: str) -> tuple[Row, str]:
    """A score's row, and what else is known of it."""
    total = len(pairs[0][0]["groups"])
    plain = "raw" if score == "contrast" else score  # right examples alone have no contrast
    ours = [_common(top(sgd, "errors", score), top(adam, "errors", score), total) for sgd, adam in pairs]
    both_right = [_common(top(sgd, "right", plain), top(adam, "right", plain), total) for sgd, adam in pairs]
    random, right = (
        [
            statistics.fmean(_common(top(one, "errors", score), top(one, *other), total) for one in pair)
            for pair in pairs
        ]
        for other in (("random", score), ("right", plain))
    )
    chance = TOP * TOP / total
    against = {"chance": ("baseline", [chance] * len(pairs)), "the choice of random weights": ("control", random)}
    claim = f"Errors of SGD's and Adam's model point to the same {TOP} of {total} groups, by {score}"
    row = Row(claim, words, f"groups that both choose, of {TOP}", "groups", versus(ours, against))
    rho = [spearman(sgd["scores"]["errors"][score], adam["scores"]["errors"][score]) for sgd, adam in pairs]
    known = [one.value for one in rho if one is not None]
    shown = {
        "both": ours,
        "chance": [chance],
        "each with random weights": random,
        "each with its right examples": right,
        "both by right examples alone": both_right,
    }
    fact = (
        f"{split}, {score}: of {TOP} groups in common {means('', shown)}; all {TOP} the same in "
        f"{sum(one == TOP for one in ours)} of {len(pairs)}, by chance 1 in {math.comb(total, TOP)}; rank correlation "
        f"over all groups {statistics.fmean(known):.2f}; most often chosen {_often(pairs, score)}"
    )
    return row, fact


def _common(first: Sequence[str], second: Sequence[str], total: int) -> int:
    return overlap(first, second, total).common


def _often(pairs: Sequence[tuple[Any, Any]], score: str) -> str:
    """How often SGD's and Adam's model choose each group, the most frequent three."""
    parts = []
    for place, name in enumerate((SGD, ADAM)):
        chosen = [group for pair in pairs for group in top(pair[place], "errors", score)]
        counts = {group: chosen.count(group) for group in pairs[0][0]["groups"]}
        first = sorted(counts, key=lambda group: -counts[group])[:TOP]
        parts.append(f"{name} {', '.join(f'{group} {counts[group]}' for group in first)}")
    return "; ".join(parts)


if __name__ == "__main__":
    args = arguments("layers", None)
    keep(program(laboratory("layers", args)), args.json)
