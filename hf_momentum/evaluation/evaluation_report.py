"""The report of one model on one suite: every split side by side, and what a shift, a corruption or training cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_momentum.errors import InputError
from hf_momentum.evaluation import pictures
from hf_momentum.evaluation.document import (
    Block,
    Bullets,
    Code,
    Details,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    literal,
)
from hf_momentum.evaluation.hub import eval_results
from hf_momentum.evaluation.measured import Against, Mean, Robustness, lower_is_better
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.results import Point, ReliabilityBin, SplitScores
from hf_momentum.evaluation.robustness import Line
from hf_momentum.evaluation.scores import worst_group
from hf_momentum.evaluation.writing import listed, short, write_whole

KIND = "hf-momentum evaluation"

_MOST_IN_PICTURE = 12  # models that a reader can tell apart

INTERVALS = (
    "Every interval is a 95 % bootstrap interval over the examples of a split: how far another sample of the same "
    "distribution might move the figure. It says nothing about another training run. A difference is called "
    "significant where its interval leaves out 0; that there are several is not corrected for."
)


@dataclass(frozen=True)
class EvaluationReport:
    """One model on one suite.

    Attributes:
        model: as it was asked for.
        suite: its name.
        splits: scores of each, in the suite's order.
        tasks: of each split, by its name.
        gaps: shifted splits against the ones that they are shifts of.
        means: over severities of a corruption.
        base: the model that forgetting is measured against; None without one.
        changes: this model less its base, on every split.
        robustness: effective robustness, where baselines were given.
        facts: what ran and what it cost, in the order to be listed.
        notes: what a reader has to know, one sentence each.
        suite_yaml: repeats the suite.
        command: repeats the evaluation.
    """

    model: str
    suite: str
    splits: Sequence[SplitScores]
    tasks: Mapping[str, str] = field(default_factory=dict)
    gaps: Sequence[Against] = ()
    means: Sequence[Mean] = ()
    base: str | None = None
    changes: Sequence[Against] = ()
    robustness: Sequence[Robustness] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    suite_yaml: str = ""
    command: str = ""
    version: int = 1

    # ---- for machines ----

    def to_json(self) -> str:
        """The record for machines."""
        return json.dumps({"kind": KIND, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "the file") -> EvaluationReport:
        """A report that `to_json` wrote.

        Args:
            text: the JSON.
            name: of the file, for errors.

        Raises:
            InputError: it is none.

        Example:
            >>> report = EvaluationReport("m", "s", [SplitScores("a", "in distribution", None, "x", 9, {})])
            >>> EvaluationReport.from_json(report.to_json()).to_json() == report.to_json()
            True
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{name} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise InputError(f"{name} is no report of `hf-momentum evaluate`; name a report.json that it wrote")
        try:
            return EvaluationReport(
                **{
                    **content,
                    "splits": [_split_of(one) for one in content["splits"]],
                    "gaps": [_against_of(one) for one in content["gaps"]],
                    "means": [_mean_of(one) for one in content["means"]],
                    "changes": [_against_of(one) for one in content["changes"]],
                    "robustness": [_robustness_of(one) for one in content["robustness"]],
                }
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{name} is a report of another version ({error}); evaluate that model again") from error

    def values(self) -> dict[str, dict[str, float]]:
        """Each metric's value by split, as other reports take it for a baseline."""
        return {split.name: {name: one.value for name, one in split.scores.items()} for split in self.splits}

    def model_index(self) -> str:
        """The metadata that the Hub shows as evaluation results: YAML with the key `model-index`.

        Example:
            >>> splits = [SplitScores("a", "in distribution", None, "x@test", 9, {"accuracy": Estimate(0.5, 0.4, 0.6)})]
            >>> print(EvaluationReport("m", "s", splits).model_index().splitlines()[0])
            model-index:
        """
        from huggingface_hub import ModelCardData

        name = short(self.model)
        results = [
            result
            for split in self.splits
            for result in eval_results(
                _HUB_TASKS.get(self.tasks.get(split.name, ""), "other"),
                split.name,
                _what(split),
                split.source,
                split.scores,
                {metric: _words(metric) for metric in split.scores},
            )
        ]
        return ModelCardData(model_name=name, eval_results=results).to_yaml().strip() + "\n"

    def card(self) -> str:
        """A fragment of a model card: metadata, the table of all splits, and what its intervals are."""
        table = Document(f"Evaluation on {self.suite}", [self._table(), *map(Text, self._sentences()), Text(INTERVALS)])
        return f"---\n{self.model_index()}---\n\n{table.to_markdown()}"

    # ---- for people ----

    def verdict(self) -> str:
        """One sentence: how good the model is in distribution, and where it loses most."""
        inside = next(split for split in self.splits if split.role == "in distribution")
        metric = _main(inside)
        said = f"{_words(metric).capitalize()} in distribution ({inside.name}): {inside.scores[metric]}."
        worse = [
            (gap, gap.scores[metric])
            for gap in self.gaps
            if metric in gap.scores and _worse(metric, gap.scores[metric])
        ]
        if worse:
            gap, most = max(worse, key=lambda each: abs(each[1].value))
            return f"{said} Under shift it is worst on {gap.split}: {_signed(most)}."
        compared = [gap.split for gap in self.gaps if metric in gap.scores]
        return f"{said} On {listed(compared)} it is not significantly worse." if compared else said

    def summary(self) -> list[str]:
        """The last lines that a person reads in the terminal: the verdict, and one line for each split.

        Example:
            >>> splits = [SplitScores("a", "in distribution", None, "x", 9, {"accuracy": Estimate(0.5, 0.4, 0.6)})]
            >>> EvaluationReport("m", "s", splits).summary()[0]
            'Accuracy in distribution (a): 0.500 [0.400, 0.600].'
        """
        width = max(len(split.name) for split in self.splits)
        lines = [
            f"  {split.name:<{width}}  {_what(split)}: "
            + ", ".join(f"{_words(metric)} {one}" for metric, one in list(split.scores.items())[:2])
            for split in self.splits
        ]
        changes = [
            f"  {one.split:<{width}}  against the base: {_words(metric)} {_signed(change)}"
            for one in self.changes
            for metric, change in list(one.scores.items())[:1]
        ]
        return [
            self.verdict(),
            *lines,
            *changes,
            "Intervals are over examples: they say nothing about other training runs.",
        ]

    def document(self) -> Document:
        """The report for people."""
        blocks: list[Block] = [Verdict(literal(self.verdict()))]
        if self._sentences():
            blocks.append(Bullets(self._sentences()))
        blocks += [Heading("Every split"), self._table(), Text(INTERVALS), self._bars(), self._all_metrics()]
        blocks += [*self._shift(), *self._groups(), *self._corruptions(), *self._calibration(), *self._forgetting()]
        blocks += [
            Heading("What ran"),
            Bullets([f"**{name}**: {literal(text)}" for name, text in self.facts.items()]),
        ]
        if self.notes:
            blocks.append(Bullets([literal(note) for note in self.notes]))
        blocks.append(Heading("Run it again"))
        blocks.append(Code(self.command, "bash"))
        blocks.append(Details("The suite", [Code(self.suite_yaml.strip(), "yaml")]))
        return Document(literal(f"{short(self.model)} on {self.suite}"), blocks)

    def write(self, folder: Path) -> Path:
        """Write `report.json`, `report.md`, `report.html`, `plots/*.png` and `card.md` (for the model's README).

        Returns:
            The path of `report.html`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        page = self.document().write(folder)
        for name, text in (("report.json", self.to_json()), ("card.md", self.card())):
            write_whole(folder / name, text)
        return page

    # ---- parts of the document ----

    @cached_property
    def _metrics(self) -> list[str]:
        """All metrics of all splits, in the order of their first occurrence."""
        return list(dict.fromkeys(metric for split in self.splits for metric in split.scores))

    def _table(self) -> Table:
        """The main metric of each split with its gap, both with intervals, and the other metrics without."""
        by_split = {gap.split: gap for gap in self.gaps}
        main = _main(self.splits[0])
        others = [metric for metric in self._metrics if metric != main]
        rows = []
        for split in self.splits:
            row = [literal(split.name), _what(split), f"{split.examples:,}", _figure(split, main)]
            if self.gaps:
                gap = by_split.get(split.name)
                row.append(_signed(gap.scores[main]) if gap and main in gap.scores else "")
            rows.append(row + [f"{split.scores[name].value:.3f}" if name in split.scores else "" for name in others])
        header = [
            "split",
            "what it is",
            "examples",
            _words(main),
            *(["gap"] if self.gaps else []),
            *map(_words, others),
        ]
        return Table(header, rows, left=2, caption=f"`gap`: less that of {self._others()}." if self.gaps else "")

    def _all_metrics(self) -> Details:
        rows = [[literal(split.name), *(_figure(split, metric) for metric in self._metrics)] for split in self.splits]
        return Details("Every metric with its interval", [Table(["split", *map(_words, self._metrics)], rows)])

    def _others(self) -> str:
        return listed(list(dict.fromkeys(literal(gap.other) for gap in self.gaps)))

    def _sentences(self) -> list[str]:
        """What the differences say, one sentence for each shift and each change from the base."""
        within = {name for mean in self.means for name in mean.splits}
        said = [_gap_sentence(gap) for gap in self.gaps if gap.split not in within]
        for mean in self.means:
            name = f"**{literal(mean.corruption)}** of {literal(mean.of)}, mean over severities {_steps(mean)}"
            said.append(_difference_sentence(name, *next(iter(mean.changes.items()))))
        roles = {split.name: split.role for split in self.splits}
        said += [_change_sentence(one, roles[one.split]) for one in self.changes if one.split not in within]
        for one in self.robustness:
            if one.effective is not None and one.split not in within:
                said.append(
                    f"**{literal(one.split)}**: effective robustness {_signed(one.effective)} in {_words(one.metric)} "
                    f"against {len(one.baselines)} baselines."
                )
        return said

    def _shift(self) -> list[Block]:
        if not self.gaps:
            return []
        metric = next(iter(self.gaps[0].scores))
        rows = [
            pictures.Difference(
                f"{gap.split} - {gap.other}", gap.scores[metric], significant=gap.scores[metric].excludes_zero
            )
            for gap in self.gaps
            if metric in gap.scores
        ]
        better = "left is better" if lower_is_better(metric) else "right is better"
        blocks: list[Block] = [
            Heading("Under shift"),
            Picture(
                "gaps",
                f"{_words(metric).capitalize()} under shift less that in distribution, with 95 % intervals over "
                "examples.",
                f"Differences of {_words(metric)} for {listed([row.label for row in rows])}",
                pictures.differences(rows, f"difference in {_words(metric)} ({better})"),
            ),
        ]
        return [*blocks, *self._robust()]

    def _robust(self) -> list[Block]:
        """Effective robustness of every shift; a picture of those that are no severities of one corruption."""
        if not self.robustness:
            return []
        within = {name for mean in self.means for name in mean.splits}
        header = [
            "split",
            "against",
            "metric",
            "in distribution",
            "under shift",
            "the line predicts",
            "effective robustness",
        ]
        rows = [
            [
                literal(one.split),
                literal(one.other),
                _words(one.metric),
                f"{one.point.in_distribution:.3f}",
                f"{one.point.shifted:.3f}",
                "" if one.line is None else f"{one.line.at(one.point.in_distribution):.3f}",
                one.reason if one.effective is None else _signed(one.effective),
            ]
            for one in self.robustness
        ]
        said = (
            "Effective robustness is how much better the model is under shift than a line through the baselines "
            "predicts from its score in distribution. The line is taken as known: how uncertain it is, is in no "
            "interval"
        )
        most = max(len(one.baselines) for one in self.robustness)
        said += ", and through two points there always is one." if most == 2 else "."
        pictured = [one for one in self.robustness if one.split not in within and len(one.baselines) < _MOST_IN_PICTURE]
        return [
            Heading("Effective robustness", 3),
            Table(header, rows, left=3),
            Text(said),
            *(self._scatter(one) for one in pictured),
        ]

    def _scatter(self, one: Robustness) -> Picture:
        shorts = [short(point.label) for point in one.baselines]
        names = shorts if len({*shorts, short(self.model)}) > len(shorts) else [point.label for point in one.baselines]
        points = {name: [point] for name, point in zip(names, one.baselines, strict=True)}
        return Picture(
            f"robustness_{_file(one.split)}",
            f"{_words(one.metric).capitalize()} on {literal(one.split)} against that on {literal(one.other)}.",
            f"{_words(one.metric)} on {one.split} against {one.other}, for {listed([*names, short(self.model)])}",
            pictures.shift_scatter(
                {**points, short(self.model): [one.point]},
                one.line,
                names,
                f"{_words(one.metric)} on {one.other}",
                f"{_words(one.metric)} on {one.split}",
            ),
        )

    def _groups(self) -> list[Block]:
        grouped = [split for split in self.splits if split.groups]
        if not grouped:
            return []
        worst, tables = [], []
        for split in grouped:
            metric = _main(split)
            name, value = worst_group(split.groups, metric)
            worst.append([literal(split.name), _words(metric), str(split.scores[metric]), literal(name), str(value)])
            rows = [[literal(name), *map(str, scores.values())] for name, scores in split.groups.items()]
            tables.append(Table(["group", *map(_words, split.scores)], rows, caption=literal(split.name)))
        header = ["split", "metric", "all", "worst group", "there"]
        said = (
            "The interval of the worst group is that of this group alone. That it was chosen as the worst is not in "
            "it: among many small groups the worst looks worse than it is."
        )
        return [Heading("Worst group"), Table(header, worst, left=2), Text(said), Details("All groups", tables)]

    def _bars(self) -> Picture:
        """The main metric of the first split, wherever it was measured."""
        metric = _main(self.splits[0])
        shown = {split.name: split.scores[metric] for split in self.splits if metric in split.scores}
        return Picture(
            "splits",
            f"{_words(metric).capitalize()} on every split, with 95 % intervals over examples.",
            f"Bars of {_words(metric)} for {listed(list(shown))}",
            pictures.split_bars({short(self.model): shown}, _words(metric)),
        )

    def _corruptions(self) -> list[Block]:
        if not self.means:
            return []
        by_name = {split.name: split for split in self.splits}
        metrics = list(self.means[0].scores)
        metric = metrics[0]
        curves: dict[str, dict[int, Estimate]] = {}
        for mean in self.means:
            family = [by_name[mean.of], *(by_name[name] for name in mean.splits)]
            curves[f"{mean.corruption} of {mean.of}"] = {
                split.severity: split.scores[metric] for split in family if metric in split.scores
            }
        rows = [
            [
                literal(f"{mean.corruption} of {mean.of}"),
                _steps(mean),
                *(str(mean.scores[name]) if name in mean.scores else "" for name in metrics),
            ]
            for mean in self.means
        ]
        return [
            Heading("Corruptions"),
            Picture(
                "severities",
                f"{_words(metric).capitalize()} by severity, with 95 % intervals over examples. Severities are ours, "
                "not those of a benchmark.",
                f"Curves of {_words(metric)} over severities for {listed(list(curves))}",
                pictures.severities(curves, _words(metric)),
            ),
            Table(["corruption", "mean over severities", *map(_words, metrics)], rows, left=2),
        ]

    def _calibration(self) -> list[Block]:
        bins = {
            split.name: split.reliability for split in self.splits if split.reliability and split.corruption is None
        }
        if not bins:
            return []
        caption = (
            "How often the model is right against how confident it says it is. On the diagonal the two agree; below it "
            "the model is overconfident."
        )
        alt = f"Reliability diagrams for {listed(list(bins))}"
        said = (
            "A calibration error is a sum of absolute values, so chance alone makes it larger than 0, the more the "
            "fewer the examples. Its intervals allow for that, and cover the truth less often than the others do."
        )
        return [Heading("Calibration"), Picture("reliability", caption, alt, pictures.reliability(bins)), Text(said)]

    def _forgetting(self) -> list[Block]:
        if not self.changes:
            return []
        roles = {split.name: split.role for split in self.splits}
        rows = [
            [
                literal(one.split),
                roles[one.split],
                *(_signed(one.scores[m]) if m in one.scores else "" for m in self._metrics),
            ]
            for one in self.changes
        ]
        caption = f"This model less {literal(short(self.base or ''))}, over the same examples."
        return [
            Heading("Against the base model"),
            Table(["split", "role", *map(_words, self._metrics)], rows, left=2, caption=caption),
        ]


# ---- words -----------------------------------------------------------------------------------------------------------

_HUB_TASKS = {
    "causal_lm": "text-generation",
    "generation": "text-generation",
    "sequence_classification": "text-classification",
    "image_classification": "image-classification",
}


def _main(split: SplitScores) -> str:
    return next(iter(split.scores))


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _figure(split: SplitScores, metric: str) -> str:
    return str(split.scores[metric]) if metric in split.scores else ""


def _what(split: SplitScores) -> str:
    if split.corruption is not None:
        return f"shifted: {split.corruption}, severity {split.severity}"
    return f"{split.role}: {split.kind}" if split.kind else split.role


def _ending(place: str) -> str:
    """Of a file on this machine its name alone."""
    return Path(place).name if Path(place).suffix else place


def _signed(value: Estimate) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _file(name: str) -> str:
    return "_".join(filter(None, "".join(c if c.isalnum() else " " for c in name.lower()).split()))


def _worse(metric: str, change: Estimate) -> bool:
    return change.low > 0 if lower_is_better(metric) else change.high < 0


def _steps(mean: Mean) -> str:
    return listed([str(severity) for severity in mean.severities])


def _gap_sentence(gap: Against) -> str:
    name = f"**{literal(gap.split)}** against {literal(gap.other)}"
    return _difference_sentence(name, *next(iter(gap.scores.items())))


def _change_sentence(one: Against, role: str) -> str:
    metric, change = next(iter(one.scores.items()))
    name = f"**{literal(one.split)}** ({role}) against the base model"
    if role == "must not forget" and change.excludes_zero and _worse(metric, change):
        return f"{name}: forgetting, {_words(metric)} is worse by {_size(change)}."
    return _difference_sentence(name, metric, change)


def _difference_sentence(name: str, metric: str, change: Estimate) -> str:
    if not change.excludes_zero:
        return f"{name}: no significant difference in {_words(metric)}, {_signed(change)}."
    return f"{name}: {_words(metric)} is {'worse' if _worse(metric, change) else 'better'} by {_size(change)}."


def _size(change: Estimate) -> str:
    """A difference without its sign, which the words around it say."""
    return str(change if change.value >= 0 else Estimate(-change.value, -change.high, -change.low))


# ---- reading back ----------------------------------------------------------------------------------------------------


def _scores_of(content: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(**value) for name, value in content.items()}


def _against_of(content: Mapping[str, Any]) -> Against:
    return Against(**{**content, "scores": _scores_of(content["scores"])})


def _mean_of(content: Mapping[str, Any]) -> Mean:
    return Mean(**{**content, "scores": _scores_of(content["scores"]), "changes": _scores_of(content["changes"])})


def _split_of(content: Mapping[str, Any]) -> SplitScores:
    return SplitScores(
        **{
            **content,
            "scores": _scores_of(content["scores"]),
            "groups": {name: _scores_of(scores) for name, scores in content["groups"].items()},
            "reliability": _listed_of(ReliabilityBin, content["reliability"]),
        }
    )


def _robustness_of(content: Mapping[str, Any]) -> Robustness:
    return Robustness(
        **{
            **content,
            "baselines": _listed_of(Point, content["baselines"]),
            "point": Point(**content["point"]),
            "line": None if content["line"] is None else Line(**content["line"]),
            "effective": None if content["effective"] is None else Estimate(**content["effective"]),
        }
    )


def _listed_of(cls: type, content: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [cls(**one) for one in content]
