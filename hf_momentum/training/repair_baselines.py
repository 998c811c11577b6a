"""Is a diagnosis worth anything? `hf-momentum repair --baselines`: other choices of what to train, at equal steps.

Beside the groups that the diagnosis chose: all weights; the head alone; as many random groups; all weights with each
group's learning rate times its relative gradient norm (after "surgical fine-tuning", arXiv 2210.11466; measured once,
on the errors, and divided by the largest); and every group by itself, the oracle. Each is tuned over the same learning
rates and mixtures on validation, from the same old model, and verified on the third split. A seed decides the samples
of the diagnosis, the order, the random groups and, unless the three splits are given, how the data are cut. Every run
is kept in OUT/runs.jsonl when it is done, so that an interrupted command repeats only what is missing.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_momentum.diagnosis.baselines_report import BaselinesReport
from hf_momentum.diagnosis.groups import LayerGroup, chosen_groups, layer_groups
from hf_momentum.diagnosis.results import SCORES, BaselineRun, Flips
from hf_momentum.diagnosis.verification import verified
from hf_momentum.errors import InputError
from hf_momentum.evaluation.writing import short
from hf_momentum.training.diagnose import chosen_of, diagnosed
from hf_momentum.training.evaluated import Evaluated, load_evaluated
from hf_momentum.training.predictions import Predictions
from hf_momentum.training.quiet import quiet
from hf_momentum.training.repair import Plan, Splits, claim, load_splits
from hf_momentum.training.retrain import Lessons, Trained, gain, lessons, retrain, weights_to_train
from hf_momentum.training.samples import Data, model_task


@dataclass(frozen=True)
class Way:
    """One choice of what to train.

    Attributes:
        method: as in `BaselineRun`.
        groups: that train.
        rates: a factor of the learning rate for each group by name; empty for 1.
    """

    method: str
    groups: Sequence[LayerGroup]
    rates: Mapping[str, float]


def run(plan: Plan, seeds: int, learning_rates: Sequence[float], command: str = "") -> BaselinesReport:
    """Carry out all that is missing, and report on everything.

    Args:
        plan: of the repair that is put to the test; its steps are those of all.
        seeds: how many, from the plan's on.
        learning_rates: over which each way is tuned; the plan's own alone, if there are none.

    Raises:
        InputError: as for `repair`, or a seed at which there is nothing to learn from.

    Example:
        >>> run  # then: run(plan, seeds=5, learning_rates=[1e-5, 1e-4]).verdict()
        <function run ...
    """
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}; intervals need at least 2")
    if plan.lora_r is not None:
        raise InputError("baselines train weights; leave lora_r out")
    folder = Path(plan.folder)
    claim(folder, replace(plan, overrides=[*plan.overrides, *map(str, learning_rates)]))
    rates = list(learning_rates) or [plan.training(plan.folder).learning_rate]
    records = _Records(folder / "runs.jsonl")
    runs: list[BaselineRun] = []
    scores, controls = {}, {}
    for seed in range(plan.settings.seed, plan.settings.seed + seeds):
        own = replace(plan, settings=replace(plan.settings, seed=seed))
        bench = None if records.complete(seed) else _Bench.load(own)
        found = records.diagnosis(seed)
        if found is None:
            assert bench is not None
            found = records.note_diagnosis(seed, bench.diagnose())
        scores[seed], controls[seed] = found["scores"], found["controls"]
        for method in found["ways"]:
            done = records.run(seed, method)
            if done is None:
                assert bench is not None
                done = records.note(bench.measure(bench.way(method, found), rates))
            runs.append(done)
    return BaselinesReport(
        title=f"{short(plan.settings.model)}: what to retrain on the errors of {short(plan.settings.data.source)}",
        unit="token" if plan.settings.data.task == "causal_lm" else "example",
        runs=runs,
        scores=scores,
        controls=controls,
        chosen_rule=plan.settings.rule.words(),
        facts=_facts(plan, rates),
        command=command,
        score=plan.settings.score,
    )


# ---- one seed --------------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """A model and its splits at one seed, with what the old model predicts."""

    plan: Plan
    evaluated: Evaluated
    splits: Splits
    groups: Sequence[LayerGroup]
    before: Predictions
    old: Sequence[Predictions]
    taught: Lessons

    @staticmethod
    def load(plan: Plan) -> "_Bench":
        settings = plan.settings
        evaluated = load_evaluated(
            settings.model,
            model_task(settings.data.task),
            settings.device,
            "float32",
            settings.revision,
            for_gradients=True,
        )
        splits = load_splits(plan, evaluated)
        before = splits.data.predictions(evaluated, settings.batch_size)
        measured = [splits.validation, splits.test, *splits.others]
        return _Bench(
            plan,
            evaluated,
            splits,
            layer_groups(evaluated.model, settings.split, settings.patterns),
            before,
            [held.predictions(evaluated, settings.batch_size) for held in measured],
            lessons(splits.data, before, plan.replay, settings.seed),
        )

    def diagnose(self) -> dict[str, Any]:
        """Scores and controls by name and group, the chosen groups, and the ways to be tried."""
        settings = self.plan.settings
        written = None
        if settings.data.task == "generation":
            written = np.array([bool(one.all()) for one in self.before.right]), None
        report, found = diagnosed(Data(self.evaluated, self.splits.data.examples, None, written), settings)
        if found.compared is None:
            raise InputError(f"seed {settings.seed}: the model has everything right that it would learn from")
        chosen = list(self.plan.layers)
        if chosen:
            chosen = [group.name for group in chosen_groups(self.groups, chosen)]
        else:
            chosen = chosen_of(found.compared, self.groups, settings.score, settings.rule)[1]
        compared, names = found.compared, [group.name for group in self.groups]
        scores = {score: compared.values(score) for score in (*(["contrast"] if compared.contrast else []), *SCORES)}
        controls = {}
        if compared.right is not None:
            controls["right-raw"] = [one.value for one in compared.right.scores["raw"]]
        if report.random is not None:
            controls["random-raw"] = report.random.values("raw")
            if report.random.contrast:
                controls["random-contrast"] = report.random.values("contrast")
        return {
            "scores": {name: dict(zip(names, values, strict=True)) for name, values in scores.items()},
            "controls": {name: dict(zip(names, values, strict=True)) for name, values in controls.items()},
            "chosen": chosen,
            "ways": ["chosen", "full", "head", "random", "relative_lr", *(f"group:{name}" for name in names)],
        }

    def way(self, method: str, found: Mapping[str, Any]) -> Way:
        """What a method trains."""
        chosen = [group for group in self.groups if group.name in found["chosen"]]
        if method == "chosen":
            return Way(method, chosen, {})
        if method == "full":
            return Way(method, self.groups, {})
        if method == "head":
            return Way(method, [_head(self.groups)], {})
        if method == "random":
            return Way(method, _random(self.groups, chosen, self.plan.settings.seed), {})
        if method == "relative_lr":
            relative = found["scores"]["relative"]
            largest = max(relative.values()) or 1.0
            return Way(method, self.groups, {name: value / largest for name, value in relative.items()})
        name = method.removeprefix("group:")
        return Way(method, [group for group in self.groups if group.name == name], {})

    def measure(self, way: Way, learning_rates: Sequence[float]) -> BaselineRun:
        """Train at every learning rate, take the best of validation, and verify it."""
        names = weights_to_train(way.groups, self.evaluated.model)
        trained = Trained.of(self.evaluated.model, names)
        by_group = {name: way.rates[group.name] for group in way.groups if way.rates for name in group.weights}
        best, weights = None, None
        for rate in learning_rates:
            given = {"save_strategy": "no", "learning_rate": str(rate), "disable_tqdm": "true"}
            training = self.plan.training(str(Path(self.plan.folder) / "training"), **given)
            with quiet():
                found = retrain(
                    self.evaluated,
                    trained,
                    self.taught,
                    self.splits.validation,
                    self.old[0],
                    training,
                    self.plan.distill,
                    self.plan.patience,
                    self.plan.shares,
                    rates=by_group or None,
                )
            mixture = next(one for one in found.mixtures if one.share == found.share)
            key = (mixture.flips.net, -mixture.loss)
            if best is None or key > best[0]:
                best, weights = (key, rate, found), trained.now()
            trained.put(trained.old)
        assert best is not None and weights is not None
        trained.put(weights)
        measured = [self.splits.test, *self.splits.others]
        new = [held.predictions(self.evaluated, self.plan.settings.batch_size) for held in measured]
        trained.put(trained.old)
        test = self.splits.test
        checked = verified("test", "verification", "", self.old[1].by_row(test.examples), new[0].by_row(test.examples))
        return BaselineRun(
            method=way.method,
            seed=self.plan.settings.seed,
            groups=[group.name for group in way.groups],
            parameters=trained.numel,
            learning_rate=best[1],
            share=best[2].share,
            steps=best[2].steps,
            flips=checked.flips,
            p_value=checked.p_value,
            shifted={
                held.split.name: gain(old, now).net
                for held, old, now in zip(self.splits.others, self.old[2:], new[1:], strict=True)
            },
        )


def _head(groups: Sequence[LayerGroup]) -> LayerGroup:
    """The head; the last group where the output embedding is tied to the input's."""
    return next((group for group in groups if group.kind == "head"), groups[-1])


def _random(groups: Sequence[LayerGroup], chosen: Sequence[LayerGroup], seed: int) -> list[LayerGroup]:
    """As many other groups: of 200 draws the one with the most similar number of weights, not the chosen ones again."""
    generator = np.random.default_rng([seed, 2])
    wanted, names = sum(group.numel for group in chosen), {group.name for group in chosen}
    draws = []
    for _ in range(200):
        places = sorted(generator.choice(len(groups), size=len(chosen), replace=False).tolist())
        drawn = [groups[place] for place in places]
        if {group.name for group in drawn} != names:
            draws.append(drawn)
    if not draws:
        raise InputError("the rule chooses all groups, so that there are no others; choose fewer")
    # Of like ones any: the first would often be the chosen with one group changed.
    draws.sort(key=lambda drawn: abs(sum(group.numel for group in drawn) - wanted))
    return draws[int(generator.integers(max(1, len(draws) // 4)))]


# ---- records ---------------------------------------------------------------------------------------------------------


class _Records:
    """What is done, as JSON lines; a line that a dying process left half written does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))

    def diagnosis(self, seed: int) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["seed"] == seed and line["what"] == "diagnosis"), None)

    def note_diagnosis(self, seed: int, content: Mapping[str, Any]) -> dict[str, Any]:
        line = {"what": "diagnosis", "seed": seed, **content}
        self._add(line)
        return line

    def run(self, seed: int, method: str) -> BaselineRun | None:
        for line in self.lines:
            if line["what"] == "run" and line["seed"] == seed and line["method"] == method:
                content = {name: value for name, value in line.items() if name != "what"}
                return BaselineRun(**{**content, "flips": Flips(**content["flips"])})
        return None

    def note(self, run: BaselineRun) -> BaselineRun:
        self._add({"what": "run", **asdict(run)})
        return run

    def complete(self, seed: int) -> bool:
        found = self.diagnosis(seed)
        return found is not None and all(self.run(seed, method) is not None for method in found["ways"])


def _facts(plan: Plan, rates: Sequence[float]) -> dict[str, str]:
    training = plan.training(plan.folder)
    return {
        "optimizer": str(getattr(training.optim, "value", training.optim)),
        "steps": f"{training.max_steps} at most, validation every {int(training.eval_steps or 1)}",
        "learning rates": ", ".join(f"{rate:g}" for rate in rates),
        "shares of the new weights": ", ".join(f"{share:g}" for share in plan.shares),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("hf-momentum", "torch", "transformers")
        )
        + f", Python {platform.python_version()}",
        "threads": str(torch.get_num_threads()),
    }
