"""Made-up reports of diagnosis, repair and baselines, as a reader will meet them."""

import random
from collections.abc import Sequence

from hf_momentum.diagnosis.baselines_report import BASELINES, BaselinesReport
from hf_momentum.diagnosis.diagnosis_report import DiagnosisReport
from hf_momentum.diagnosis.repair_report import RepairReport
from hf_momentum.diagnosis.results import (
    SCORES,
    Attribution,
    BaselineRun,
    Compared,
    Decision,
    Flips,
    GroupFacts,
    Mixture,
    Verified,
)
from hf_momentum.evaluation.metrics import Estimate


def groups(number: int) -> list[GroupFacts]:
    """Embeddings, blocks, norm and head: `number` in all; of very many the names are long."""
    prefix, suffix = ("decoder.block", ".attention") if number > 30 else ("block", "")
    blocks = [GroupFacts(f"{prefix}.{place}{suffix}", "block", 7_087_872) for place in range(number - 3)]
    ends = [GroupFacts("norm", "norm", 768), GroupFacts("head", "head", 1_538)]
    return [GroupFacts("embeddings", "embeddings", 38_597_376), *blocks, *ends]


def about(value: float, spread: float = 0.1) -> Estimate:
    """A figure with an interval around it."""
    return Estimate(value, value * (1 - spread), value * (1 + spread))


def compared(number: int, seed: int, peak: int | None = None, predictions: int = 140) -> Compared:
    """Scores of so many groups; the errors' gradient is largest in the group at `peak`."""
    chance = random.Random(seed)

    def attribution(lifted: int | None) -> Attribution:
        raw = [chance.uniform(0.4, 1.2) * (3 if place == lifted else 1) for place in range(number)]
        scale = {"raw": 1.0, "rms": 3e-4, "relative": 0.01, "taylor": 0.2}
        scores = {name: [about(value * scale[name] * chance.uniform(0.9, 1.1)) for value in raw] for name in SCORES}
        return Attribution(predictions, predictions, 2.1, scores, [chance.uniform(0.02, 0.4) for _ in raw])

    errors, right = attribution(peak), attribution(None)
    pairs = zip(errors.scores["raw"], right.scores["raw"], strict=True)
    contrast = [about(one.value / other.value, 0.15) for one, other in pairs]
    best = max(range(number), key=lambda place: contrast[place].value)
    first = [0.93 if place == best else 0.07 / (number - 1) for place in range(number)]
    return Compared(errors, right, contrast, first)


def diagnosis(number: int = 6) -> DiagnosisReport:
    """Of a model with so many layer groups."""
    facts = groups(number)
    return DiagnosisReport(
        "distilbert-base-uncased",
        "reviews.csv@diagnosis",
        "sequence_classification",
        "example",
        1000,
        143,
        857,
        facts,
        compared(number, 1, peak=2),
        compared(number, 2),
        chosen=[facts[2].name],
        rule="the largest contrast",
        notes=["Labels of 3 rows were missing."],
        facts={"seed": "0", "time": "41 s", "memory": "1.2 GB"},
        command="hf-momentum diagnose --model distilbert-base-uncased --data reviews.csv --split 0.4,0.3,0.3",
    )


def verified(name: str, role: str, flips: Flips, p_value: float) -> Verified:
    """A split before and after."""
    before = (flips.right + flips.broken) / flips.total
    after = (flips.right + flips.fixed) / flips.total
    return Verified(
        name, role, f"reviews.csv@{name}", flips.total, flips, p_value, about(before, 0.03), about(after, 0.03)
    )


def repair(number: int = 6, splits: int = 3) -> RepairReport:
    """Of the same model."""
    facts = groups(number)
    return RepairReport(
        "distilbert-base-uncased",
        "sequence_classification",
        "example",
        [facts[2].name],
        facts,
        "weights",
        facts[2].parameters,
        sum(one.parameters for one in facts),
        "SGD with critical momentum, learning rate 0.01",
        120,
        "validation loss had not fallen for 3 evaluations",
        143,
        143,
        [
            Mixture(share / 4, Flips(fixed, broken, 400, 90), 0.5 - 0.05 * share)
            for share, fixed, broken in [(0, 0, 0), (1, 9, 1), (2, 21, 5), (3, 24, 10), (4, 27, 19)]
        ],
        0.5,
        verified("verification", "verification", Flips(31, 12, 830, 127), 0.0054),
        [
            verified(f"typos, severity {place + 1}", "shifted", Flips(20 - place, 14 + place, 700, 266), 0.39)
            for place in range(splits)
        ],
        Decision(
            True,
            [
                "On verification the net gain is 19 with p = 0.0054, below 0.05.",
                "On no other split is there a significant net loss.",
            ],
        ),
        verified("validation", "validation", Flips(21, 5, 400, 90), 0.002),
        [
            *({"step": 10 * step, "loss": 1.4 / step} for step in range(1, 13)),
            *({"step": 40 * step, "eval_loss": 0.5 - 0.03 * step} for step in range(1, 4)),
        ],
        facts={"seed": "0", "time": "3 min"},
        command="hf-momentum repair --diagnosis outputs/diagnosis",
    )


def baselines(number: int = 6, seeds: Sequence[int] = (0, 1, 2, 3, 4), worth: float = 1.0) -> BaselinesReport:
    """The score foretells the gain of each group as far as `worth` goes; noise is added."""
    facts, runs, scores, controls = groups(number), [], {}, {}
    chance = random.Random(0)

    def run(method: str, seed: int, names: Sequence[str], size: int, net: float) -> BaselineRun:
        broken = chance.randrange(4, 15)
        flips = Flips(max(0, broken + round(net)), broken, 800, 150)
        return BaselineRun(method, seed, names, size, 3e-4, 0.5, 120, flips, 0.1, {"typos": round(net / 2)})

    for seed in seeds:
        found, random_model = compared(number, 10 + seed, peak=2), compared(number, 50 + seed)
        names = [one.name for one in facts]
        columns = {"contrast": found.contrast, **found.errors.scores}
        scores[seed] = {
            name: {group: one.value for group, one in zip(names, column, strict=True)}
            for name, column in columns.items()
        }
        assert found.right is not None
        beside = {"right-raw": found.right.scores["raw"], "random-contrast": random_model.contrast}
        controls[seed] = {
            name: {group: one.value for group, one in zip(names, column, strict=True)}
            for name, column in beside.items()
        }
        for one in facts:
            net = 6 * worth * (scores[seed]["contrast"][one.name] - 1) + chance.gauss(0, 2.0)
            runs.append(run(f"group:{one.name}", seed, [one.name], one.parameters, net))
        best = max(names, key=scores[seed]["contrast"].__getitem__)
        runs.append(run("chosen", seed, [best], facts[2].parameters, 14 + chance.gauss(0, 2)))
        for method, net in zip(BASELINES, (9, 3, 1, 8), strict=True):
            runs.append(run(method, seed, names, 81_000_000, net + chance.gauss(0, 2)))
    return BaselinesReport(
        "distilbert-base-uncased: was the diagnosis worth anything?",
        "example",
        runs,
        scores,
        controls,
        "the largest contrast",
        {"learning rates": "1e-4, 3e-4 and 1e-3 for each"},
        "hf-momentum repair --baselines",
    )
