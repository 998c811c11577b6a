"""The report of a diagnosis: to which layer groups the errors point, how sure that is, and whether it is about errors.

A score ranks the groups. Whether the ranking says anything about the errors is asked of controls: the same scores of
predictions that are right and of a model that has learned nothing, and the mere size of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_momentum.diagnosis.overlap import Correlation, spearman
from hf_momentum.diagnosis.report_parts import (
    Kind,
    another_version,
    closing,
    count,
    estimate_of,
    from_record,
    percent,
    shown,
    to_record,
)
from hf_momentum.diagnosis.results import SCORES, Attribution, Compared, GroupFacts
from hf_momentum.evaluation import pictures
from hf_momentum.evaluation.document import (
    Block,
    Bullets,
    Details,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    literal,
)
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.writing import listed, short, significant, write_whole

KIND = Kind("hf-momentum diagnosis", "hf-momentum diagnose")

FEW = 20  # errors, below which the report warns
CLOSE = 0.8  # rank correlation from which two rankings are called close

_RIGHT, _RANDOM = "right: ", "random: "

MEANING = {
    "contrast": "the gradient's norm on errors divided by that on right predictions of the same classes: above 1 the "
    "errors pull at a group more than what is right does",
    "raw": "the norm |g| of the gradient of the mean loss over the errors",
    "rms": "|g| divided by the square root of the number of weights: a group's size is taken out",
    "relative": "|g| / |w|: how far the errors pull, against what the weights are",
    "taylor": "the sum of |w g| over weights: how much the loss would change, in first order, without each of them",
}
INTERVALS = (
    "Intervals are from a bootstrap over micro-batches of examples: value times exp(±1.96 s), s the standard deviation "
    "of the log score over 1000 resamples. Resampling adds noise to a norm, so resampled norms lie above the score, "
    "and their spread is used, not their place."
)


@dataclass(frozen=True)
class Control:
    """A ranking of the same groups that knows nothing, or less, of the errors.

    Attributes:
        name: of the other ranking.
        correlation: of the two rankings, over the groups; None where one of them is the same for all groups, or a score
            is not a number.
        words: what it says.
        caution: whether the ranking may be about something else than errors.
    """

    name: str
    correlation: Correlation | None
    words: str
    caution: bool


@dataclass(frozen=True)
class DiagnosisReport:
    """Where a model's errors point.

    Attributes:
        model, data: as they were asked for.
        task: of the model.
        unit: what one prediction is: "example" or "token".
        looked_at, errors, right: predictions, and how many of them were wrong and right.
        groups: in the order of the model, as everything below has them.
        trained: scores of this model; None without errors.
        random: those of a model of the same architecture with random weights; None where it was not made.
        score: the one that ranks; instead of "contrast" it is "raw" where no prediction was right.
        chosen: groups that a repair would train.
        rule: how they were chosen, in words.
        notes: what a reader has to know, one sentence each.
        facts: what ran and what it cost, in the order to be listed.
        command: repeats the diagnosis.

    Example:
        >>> raw = {name: [Estimate(2.0, 1.5, 2.6), Estimate(1.0, 0.8, 1.2)] for name in SCORES}
        >>> found = Compared(Attribution(40, 40, 2.1, raw, None), None, [], [0.97, 0.03])
        >>> groups = [GroupFacts("block.0", "block", 900), GroupFacts("head", "head", 100)]
        >>> report = DiagnosisReport("m", "d", "t", "example", 90, 40, 50, groups, found, None, chosen=["block.0"])
        >>> print(report.verdict())
        The errors of m on d point to block.0 (raw 2.00 [1.50, 2.60], first in 97.0 % of resamples). Chosen: block.0.
        >>> DiagnosisReport.from_json(report.to_json()).to_json() == report.to_json()
        True
    """

    model: str
    data: str
    task: str
    unit: str
    looked_at: int
    errors: int
    right: int
    groups: Sequence[GroupFacts]
    trained: Compared | None
    random: Compared | None
    score: str = "contrast"
    chosen: Sequence[str] = ()
    rule: str = ""
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    version: int = 1

    # ---- for machines ----

    def to_json(self) -> str:
        """The record for machines: all that was found, and under "found" what the report makes of it."""
        found = {
            "verdict": self.verdict(),
            "ranked_by": self.ranked_by,
            "ranking": self.ranking,
            "controls": [asdict(control) for control in self.controls],
        }
        return to_record(KIND, self, found)

    @staticmethod
    def from_json(text: str, name: str = "the file") -> DiagnosisReport:
        """A report that `to_json` wrote.

        Args:
            text: the JSON.
            name: of the file, for errors.

        Raises:
            InputError: it is none.
        """
        content = from_record(KIND, text, name)
        try:
            return DiagnosisReport(
                **{
                    **content,
                    "groups": [GroupFacts(**one) for one in content["groups"]],
                    "trained": _compared_of(content["trained"]),
                    "random": _compared_of(content["random"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise another_version(KIND, name, error) from error

    # ---- what follows ----

    @property
    def names(self) -> list[str]:
        """Of the groups."""
        return [group.name for group in self.groups]

    @property
    def ranked_by(self) -> str:
        """The score that ranks: there is no contrast where nothing was right."""
        no_contrast = self.score == "contrast" and self.trained is not None and not self.trained.contrast
        return "raw" if no_contrast else self.score

    @cached_property
    def columns(self) -> dict[str, Sequence[Estimate]]:
        """Every score there is, by its name in the report."""
        found: dict[str, Sequence[Estimate]] = {}
        if self.trained is not None:
            if self.trained.contrast:
                found["contrast"] = self.trained.contrast
            found |= {name: self.trained.errors.scores[name] for name in SCORES}
            if self.trained.right is not None:
                found |= {_RIGHT + name: self.trained.right.scores[name] for name in ("raw", "rms")}
        if self.random is not None:
            if self.random.contrast:
                found[_RANDOM + "contrast"] = self.random.contrast
            found[_RANDOM + "raw"] = self.random.errors.scores["raw"]
        return found

    @cached_property
    def ranking(self) -> list[str]:
        """The groups from the largest score to the smallest; equal ones in the order of the model."""
        if self.trained is None:
            return []
        values = [one.value for one in self.columns[self.ranked_by]]
        places = sorted(range(len(values)), key=lambda place: -values[place] if math.isfinite(values[place]) else 1e300)
        return [self.names[place] for place in places]

    @cached_property
    def controls(self) -> list[Control]:
        """The ranking beside others of the same groups."""
        if self.trained is None:
            return []
        values = {name: [one.value for one in column] for name, column in self.columns.items()}
        values["parameters"] = [float(group.parameters) for group in self.groups]
        ranking = values[self.ranked_by]
        others = [name for name in _CONTROLS if name in values and name != self.ranked_by]
        return [_control(name, ranking, values[name]) for name in others]

    @property
    def first_share(self) -> float | None:
        """The share of resamples in which the first group is the first; only the contrast, or raw without it, has
        it."""
        if self.trained is None or self.score != "contrast":
            return None
        return self.trained.first[self.names.index(self.ranking[0])]

    def doubts(self) -> list[str]:
        """Why the ranking's first place is not sure; empty where it is.

        It is not where the first group is first in fewer than half of the resamples, or where its interval and the
        second's have more in common than half of the narrower one.
        """
        if len(self.ranking) < 2:
            return []
        first, second = self.ranking[:2]
        said = []
        share = self.first_share
        if share is not None and share < 0.5:
            said.append(f"{first} is first in only {percent(share)} of resamples")
        one, other = self._estimate(first), self._estimate(second)
        common = min(one.high, other.high) - max(one.low, other.low)
        if common > 0.5 * min(one.high - one.low, other.high - other.low):
            said.append(f"its interval {shown(one)} and that of {second}, {shown(other)}, overlap widely")
        return said

    # ---- for people ----

    def verdict(self) -> str:
        """One sentence: which groups the errors point to, and how sure that is."""
        if self.trained is None:
            if self.errors:
                wrong = f"{self.errors:,} of {count(self.looked_at, self.unit)} are wrong"
                return f"{wrong}, but no gradient of them was taken."
            looked = count(self.looked_at, self.unit)
            return f"{self._model} has none of {looked} of {self._data} wrong: there is nothing to learn from."
        first = self.ranking[0]
        whose = f"The errors of {self._model} on {self._data}"
        figure = f"{self.ranked_by} {shown(self._estimate(first))}"
        doubts = self.doubts()
        if doubts:
            said = f"{whose} do not point clearly to one group. {first} comes first ({figure}), but the ranking is not "
            said += f"stable: {' and '.join(doubts)}."
        else:
            share = self.first_share
            sure = "" if share is None else f", first in {percent(share)} of resamples"
            said = f"{whose} point to {first} ({figure}{sure})."
        if not self.chosen:
            return said
        return f"{said} Chosen{f' ({self.rule})' if self.rule else ''}: {listed(list(self.chosen))}."

    def sentences(self) -> list[str]:
        """What else a reader has to know before anything is retrained, one sentence each.

        Example:
            >>> DiagnosisReport("m", "d", "t", "example", 90, 0, 90, [], None, None).sentences()
            ['0 of 90 examples are wrong, 90 right.']
        """
        wrong = f"{self.errors:,} of {count(self.looked_at, self.unit)} are wrong, {self.right:,} right"
        if self.trained is None:
            return [f"{wrong}."]
        used = self.trained.errors.predictions
        right = self.trained.right
        beside = "none of the right ones" if right is None else f"{right.predictions:,} of the right ones"
        said = [f"{wrong}; the scores are of {used:,} of the wrong ones, and of {beside} beside them."]
        if used < FEW:
            first = self.ranking[0]
            one = self._estimate(first)
            said.append(
                f"Warning: {count(used, 'error')} are few. The interval of {first} is "
                f"{significant(one.high - one.low)} wide around a score of {significant(one.value)}; with another "
                "sample the ranking may be another."
            )
        if right is None:
            said.append(
                "No prediction is right, so there is no contrast: the raw score ranks, and a group may be first "
                "because its gradients are large on anything."
            )
        if self.random is None:
            said.append("No random model was made, so how much of the ranking is the architecture's is not known.")
        noise = self.trained.errors.noise
        loud = [name for name, share in zip(self.names, noise or [], strict=False) if share > 0.5]
        of_chosen = [name for name in loud if name in (self.chosen or self.ranking[:1])]
        if of_chosen:
            said.append(
                f"More than half of the squared gradient of {listed(of_chosen)} is what the choice of the examples "
                "would give by itself: that score is mostly noise."
            )
        said += [f"Caution: {control.words}." for control in self.controls if control.caution]
        if self.chosen:
            held = sum(group.parameters for group in self.groups if group.name in self.chosen)
            said.append(f"The chosen groups hold {percent(held / max(1, self._parameters))} of the parameters.")
        return said

    def document(self) -> Document:
        """The report for people."""
        blocks: list[Block] = [Verdict(literal(self.verdict())), Bullets([literal(one) for one in self.sentences()])]
        if self.trained is not None:
            blocks += [Heading("Where the errors point"), self._picture(), self._table(), Text(INTERVALS)]
            blocks += [Heading("Is it about the errors?"), *self._asked()]
            blocks += [
                Heading("What the scores mean"),
                Bullets([f"**{name}**: {MEANING[name]}." for name in MEANING if name in self.columns]),
            ]
            if _RIGHT + "raw" in self.columns or self.random is not None:
                blocks.append(
                    Text(
                        f'"{_RIGHT.strip()}" is the same of right predictions, "{_RANDOM.strip()}" the same of a model '
                        "of this architecture with random weights, of the same predictions."
                    )
                )
            blocks.append(Details("Every score with its interval", [self._every_score()]))
        return Document(literal(f"Where the errors of {self._model} point"), [*blocks, *self._closing()])

    def write(self, folder: Path) -> Path:
        """Write `report.json`, `report.md`, `report.html` and `plots/*.png`; each appears whole or not at all.

        Returns:
            The path of `report.html`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        page = self.document().write(folder)
        write_whole(folder / "report.json", self.to_json())
        return page

    # ---- parts of the document ----

    @property
    def _model(self) -> str:
        return short(self.model)

    @property
    def _data(self) -> str:
        return short(self.data)

    @property
    def _parameters(self) -> int:
        return sum(group.parameters for group in self.groups)

    def _estimate(self, group: str) -> Estimate:
        return self.columns[self.ranked_by][self.names.index(group)]

    def _picture(self) -> Picture:
        rows = [[column[place].value for column in self.columns.values()] for place in range(len(self.groups))]
        return Picture(
            "layer_scores",
            "Scores of each layer group. Columns have different units, so each is scaled by its own largest value; the "
            "figure itself stands in the cell. A column that looks like another says the same.",
            f"A matrix of scores: {len(self.groups)} layer groups by {listed(list(self.columns))}.",
            pictures.layer_scores(rows, self.names, list(self.columns), self.chosen),
        )

    def _table(self) -> Table:
        """The groups in the order of the ranking."""
        assert self.trained is not None
        noise, raw = self.trained.errors.noise, self.columns["raw"]
        by_name = {group.name: (place, group) for place, group in enumerate(self.groups)}
        contrast = self.ranked_by != "raw"
        rows = []
        for rank, name in enumerate(self.ranking, 1):
            place, group = by_name[name]
            rows.append(
                [
                    f"**{literal(name)}**" if name in self.chosen else literal(name),
                    str(rank),
                    shown(self._estimate(name)),
                    *([shown(raw[place])] if contrast else []),
                    *([percent(self.trained.first[place])] if self.score == "contrast" else []),
                    *([percent(noise[place])] if noise is not None else []),
                    f"{group.parameters:,}",
                    percent(group.parameters / max(1, self._parameters)),
                ]
            )
        header = ["group", "rank", f"{self.ranked_by} [95 %]", *(["raw [95 %]"] if contrast else [])]
        header += ["first in resamples"] if self.score == "contrast" else []
        header += ["noise share"] if noise is not None else []
        said = f"Ranked by {self.ranked_by}" + ("; chosen groups are bold." if self.chosen else ".")
        said += (
            " Noise share: how much of |g|² the choice of the examples would give to a gradient of 0." if noise else ""
        )
        return Table([*header, "parameters", "of all"], rows, caption=said)

    def _asked(self) -> list[Block]:
        if not self.controls:
            return [Text("There is no other ranking to compare with.")]
        rows = [
            [
                _CONTROLS[control.name].what,
                control.words,
                "" if control.correlation is None else f"{control.correlation.value:+.2f}",
                "" if control.correlation is None else f"{control.correlation.p_value:.3g}",
            ]
            for control in self.controls
        ]
        caption = (
            f"Rank correlation over {len(self.groups)} groups of the ranking by {self.ranked_by} with other rankings."
        )
        said = (
            "p is of no correlation, by permutation of the groups, without correction for the several rows. Groups are "
            "few and neighbours are alike, so a correlation is a hint and no proof."
        )
        return [
            Table(["the ranking against", "which says", "Spearman's rho", "p"], rows, left=2, caption=caption),
            Text(said),
        ]

    def _every_score(self) -> Table:
        rows = [
            [literal(name), *(shown(column[place]) for column in self.columns.values())]
            for place, name in enumerate(self.names)
        ]
        return Table(["group", *self.columns], rows)

    def _closing(self) -> list[Block]:
        return closing(self.facts, self.notes, self.command)


# ---- words of the controls -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    what: str
    close: str
    caution: bool = True


_CONTROLS = {
    "raw": _Asked(
        "raw gradient norm of the errors",
        "the right predictions change the ranking little: it is close to that by the raw norm of the errors",
        caution=False,
    ),
    "rms": _Asked(
        "norm by size (rms) of the errors",
        "the ranking is close to that by the norm without a group's size",
        caution=False,
    ),
    _RIGHT + "raw": _Asked(
        "raw gradient norm of right predictions",
        "the ranking is close to that by right predictions: it says more about the model than about its errors",
    ),
    _RANDOM + "contrast": _Asked(
        "contrast of a random model",
        "the ranking is close to that of a random model: it says more about the architecture than about the errors",
    ),
    _RANDOM + "raw": _Asked(
        "raw gradient norm of a random model",
        "the ranking is close to that by the raw norms of a random model: it says more about the architecture than "
        "about the errors",
    ),
    "parameters": _Asked(
        "number of parameters",
        "the ranking is close to that by size: large groups are first whatever the errors are",
    ),
}


def _control(name: str, ranking: Sequence[float], other: Sequence[float]) -> Control:
    asked = _CONTROLS[name]
    if any(map(math.isnan, (*ranking, *other))):
        return Control(name, None, "nothing: a score is not a number", False)
    found = spearman(ranking, other)
    if found is None:
        return Control(name, None, "nothing: one of the two is the same for all groups", False)
    chance = f"; of so few groups it may be chance (p = {found.p_value:.2g})" if found.p_value >= 0.05 else ""
    if found.value > CLOSE:
        return Control(name, found, asked.close + chance, asked.caution)
    if name == "parameters" and found.value < -CLOSE:
        words = "the ranking is close to the reverse of that by size: small groups are first whatever the errors are"
        return Control(name, found, words + chance, True)
    if found.p_value < 0.05:
        return Control(name, found, f"{'partly alike' if found.value > 0 else 'partly the reverse'}, not close", False)
    return Control(name, found, "no significant correlation", False)


# ---- reading back ----------------------------------------------------------------------------------------------------


def _compared_of(content: Mapping[str, Any] | None) -> Compared | None:
    if content is None:
        return None
    errors = _attribution_of(content["errors"])
    assert errors is not None
    contrast = [estimate_of(one) for one in content["contrast"]]
    return Compared(errors, _attribution_of(content["right"]), contrast, content["first"])


def _attribution_of(content: Mapping[str, Any] | None) -> Attribution | None:
    if content is None:
        return None
    scores = {name: [estimate_of(one) for one in column] for name, column in content["scores"].items()}
    return Attribution(**{**content, "scores": scores})
