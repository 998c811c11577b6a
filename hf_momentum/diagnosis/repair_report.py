"""The report of a repair: what it fixed and broke on examples that it never saw, and whether it was kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_momentum.diagnosis.report_parts import (
    Kind,
    another_version,
    closing,
    count,
    estimate_of,
    from_record,
    percent,
    to_record,
)
from hf_momentum.diagnosis.results import Decision, Flips, GroupFacts, Mixture, Outcome, Verified
from hf_momentum.evaluation import pictures, plots
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
from hf_momentum.evaluation.writing import listed, short, write_whole

KIND = Kind("hf-momentum repair", "hf-momentum repair")

_NAMED = 8  # groups that a sentence may name one by one

TERMS = (
    "Fixed: wrong before, right after. Broken: right before, wrong after. Net: fixed less broken. The positive and the "
    "negative flip rate are fixed and broken over all predictions of a split. Before and after are the shares that are "
    "right, with 95 % bootstrap intervals over rows."
)
_OVER = {
    "example": "p is McNemar's, exact and two-sided: of as many examples fixed as broken.",
    "token": "p is of the exact two-sided sign test over rows, by each row's net change: tokens of one row depend on "
    "each other, so they are not counted one by one.",
}


@dataclass(frozen=True)
class RepairReport:
    """What retraining a few layer groups on a model's errors did.

    Attributes:
        model: as it was asked for.
        task: of the model.
        unit: what one prediction is: "example" or "token".
        chosen: the groups that were trained.
        groups: all of the model, in its order.
        how: "weights" or "LoRA".
        trained_parameters, all_parameters: how many numbers were trained, of how many of the model.
        optimizer: in words.
        steps: optimizer steps that were made.
        stopped: why training ended, in words.
        errors, replay: on how many wrong and right predictions it was trained.
        mixtures: validation on the way from the old weights to the new ones.
        share: of the new weights, that was taken.
        verification: the split that decides; None where nothing was to be repaired.
        others: every other split, before and after.
        decision: whether the repair is kept, and why.
        validation: the split by which training was stopped and the share chosen; None as for `verification`.
        history: the Trainer's log, one dictionary for each entry.
        notes: what a reader has to know, one sentence each.
        facts: what ran and what it cost, in the order to be listed.
        command: repeats the repair.

    Example:
        >>> from hf_momentum.evaluation.metrics import Estimate
        >>> before, after = Estimate(0.8, 0.75, 0.85), Estimate(0.84, 0.8, 0.88)
        >>> checked = Verified("held out", "verification", "x@test", 300, Flips(15, 3, 237, 45), 0.0075, before, after)
        >>> report = RepairReport(
        ...     "m", "t", "example", ["head"], [GroupFacts("head", "head", 20), GroupFacts("block.0", "block", 80)],
        ...     "weights", 20, 100, "sgd", 50, "all steps were made", 60, 60, [], 1.0, checked, [],
        ...     Decision(True, ["Net gain of 12, p = 0.0075."]), None,
        ... )
        >>> report.verdict().partition(":")[0], report.outcome
        ('Accepted', 'accepted')
        >>> RepairReport.from_json(report.to_json()).to_json() == report.to_json()
        True
    """

    model: str
    task: str
    unit: str
    chosen: Sequence[str]
    groups: Sequence[GroupFacts]
    how: str
    trained_parameters: int
    all_parameters: int
    optimizer: str
    steps: int
    stopped: str
    errors: int
    replay: int
    mixtures: Sequence[Mixture]
    share: float
    verification: Verified | None
    others: Sequence[Verified]
    decision: Decision
    validation: Verified | None
    history: Sequence[dict[str, float]] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    version: int = 1

    # ---- for machines ----

    def to_json(self) -> str:
        """The record for machines: all that was done, and under "found" what the report makes of it."""
        found = {
            "outcome": self.outcome,
            "verdict": self.verdict(),
            "net": {split.name: split.flips.net for split in self.splits},
            "frozen": self.frozen,
        }
        return to_record(KIND, self, found)

    @staticmethod
    def from_json(text: str, name: str = "the file") -> RepairReport:
        """A report that `to_json` wrote.

        Args:
            text: the JSON.
            name: of the file, for errors.

        Raises:
            InputError: it is none.
        """
        content = from_record(KIND, text, name)
        try:
            return RepairReport(
                **{
                    **content,
                    "groups": [GroupFacts(**one) for one in content["groups"]],
                    "mixtures": [Mixture(**{**one, "flips": Flips(**one["flips"])}) for one in content["mixtures"]],
                    "verification": _verified_of(content["verification"]),
                    "others": [_split_of(one) for one in content["others"]],
                    "decision": Decision(**content["decision"]),
                    "validation": _verified_of(content["validation"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise another_version(KIND, name, error) from error

    # ---- what follows ----

    @property
    def outcome(self) -> Outcome:
        """What became of the model."""
        if self.verification is None:
            return "nothing to repair"
        return "accepted" if self.decision.accepted else "rolled back"

    @property
    def splits(self) -> list[Verified]:
        """All that were measured before and after, the one that decides first."""
        return [*([self.verification] if self.verification else []), *self.others]

    @property
    def frozen(self) -> list[str]:
        """Groups of which no weight was trained; with LoRA that is all of them."""
        return [group.name for group in self.groups if self.how == "LoRA" or group.name not in self.chosen]

    # ---- for people ----

    def verdict(self) -> str:
        """One sentence: whether the repair was kept, what it fixed and broke, and how much was trained for it."""
        if self.verification is None:
            return f"Nothing to repair: {short(self.model)} is as it was."
        split = self.verification
        flips = split.flips
        said = (
            f"on {split.name} {flips.fixed:,} of {count(flips.total, self.unit)} were fixed and {flips.broken:,} "
            f"broken, net {flips.net:+,} (p = {split.p_value:.2g}), by {percent(self._share_trained)} of the "
            f"parameters ({listed(list(self.chosen))})"
        )
        if self.outcome == "accepted":
            return f"Accepted: {said}."
        return f"Rolled back, the model is as it was: {said}."

    def sentences(self) -> list[str]:
        """What else a reader has to know, one sentence each: the reasons first.

        Example:
            >>> decision = Decision(False, ["No prediction is wrong."])
            >>> report = RepairReport(
            ...     "m", "t", "example", [], [], "weights", 0, 9, "", 0, "", 0, 0, [], 0.0, None, [], decision, None
            ... )
            >>> report.sentences()
            ['No prediction is wrong.']
        """
        said = list(self.decision.reasons)
        if self.verification is None:
            return said
        if self.validation is not None:
            flips = self.validation.flips
            said.append(
                f"{percent(self.share)} of the way from the old weights to the new ones was taken: on "
                f"{self.validation.name} that fixed {flips.fixed:,} and broke {flips.broken:,}. It was chosen there, "
                "so these figures are too good."
            )
        return said

    def document(self) -> Document:
        """The report for people."""
        blocks: list[Block] = [Verdict(literal(self.verdict()))]
        if self.sentences():
            blocks.append(Bullets([literal(one) for one in self.sentences()]))
        if self.splits:
            blocks += [
                Heading("Before and after"),
                self._picture(),
                *self._table(),
            ]
        if self.mixtures:
            blocks += [Heading("How far to go"), *self._path()]
        if self.verification is not None:
            blocks += [Heading("What was trained"), *self._trained()]
        blocks += closing(self.facts, self.notes, self.command)
        return Document(literal(f"Repair of {short(self.model)}"), blocks)

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
    def _share_trained(self) -> float:
        return self.trained_parameters / max(1, self.all_parameters)

    def _picture(self) -> Picture:
        counts = {
            _named(split): (split.flips.fixed, split.flips.broken, split.flips.total)
            for split in [*self.splits, *([self.validation] if self.validation else [])]
        }
        return Picture(
            "flips",
            f"What became right and what became wrong on every split, in shares of its {self.unit}s. The repair was "
            "fitted to validation, so that one looks better than it is.",
            f"Fixed and broken {self.unit}s of {listed(list(counts))}.",
            pictures.flips(counts, self.unit),
        )

    def _table(self) -> list[Block]:
        splits = [*self.splits, *([self.validation] if self.validation else [])]
        rows = [
            [
                literal(_named(split)),
                f"{split.examples:,}",
                str(split.before),
                str(split.after),
                f"{split.flips.fixed:,}",
                f"{split.flips.broken:,}",
                f"{split.flips.net:+,}",
                f"{split.p_value:.3g}",
                percent(split.flips.fixed / max(1, split.flips.total)),
                percent(split.flips.broken / max(1, split.flips.total)),
            ]
            for split in splits
        ]
        header = ["split", "rows", "before [95 %]", "after [95 %]", "fixed", "broken", "net", "p"]
        sources = [f"**{literal(split.name)}**: {literal(short(split.source))}" for split in splits]
        return [
            Table([*header, "positive flip rate", "negative flip rate"], rows),
            Text(TERMS),
            Text(self._p_values()),
            Details("Where the splits are from", [Bullets(sources)]),
        ]

    def _p_values(self) -> str:
        said = _OVER.get(self.unit, _OVER["token"])
        return f"{said} p is that of each split alone, without correction for their number." if self.others else said

    def _path(self) -> list[Block]:
        points = [(one.share, float(one.flips.net), one.loss) for one in self.mixtures]
        rows = [
            [
                f"{one.share:g}" + (" (chosen)" if math.isclose(one.share, self.share) else ""),
                f"{one.flips.fixed:,}",
                f"{one.flips.broken:,}",
                f"{one.flips.net:+,}",
                f"{one.loss:.4f}",
            ]
            for one in self.mixtures
        ]
        return [
            Picture(
                "mixtures",
                "Net gain and loss on validation between the old weights (0) and the new ones (1).",
                f"Net gain and loss at {len(points)} shares of the new weights; {self.share:g} was chosen.",
                pictures.mixture_path(points, self.share, self.unit),
            ),
            Details("All shares", [Table(["share of new weights", "fixed", "broken", "net", "loss"], rows)]),
        ]

    def _trained(self) -> list[Block]:
        numbers = (
            f"{self.trained_parameters:,} of {self.all_parameters:,} parameters ({percent(self._share_trained)}) in "
            f"{listed([literal(name) for name in self.chosen])}"
        )
        if self.how == "LoRA":
            what = f"LoRA adapters were trained, {numbers}; all weights of the model itself were frozen."
        else:
            held = sum(group.parameters for group in self.groups if group.name in self.frozen)
            names = listed([literal(name) for name in self.frozen])
            if len(self.frozen) > _NAMED:
                names = f"all {len(self.frozen)} other groups"
            frozen = f"Frozen, {held:,} parameters: {names}." if self.frozen else "Nothing was frozen."
            what = f"Weights were trained, {numbers}. {frozen}"
        items = [
            what,
            f"Trained on {count(self.errors, 'error')} and {self.replay:,} right predictions for "
            f"{count(self.steps, 'step')} with {literal(self.optimizer)}; ended because {literal(self.stopped)}.",
        ]
        blocks: list[Block] = [Bullets(items)]
        curve = plots.loss_figure(self.history, self.unit)
        if curve is not None:
            blocks.append(
                Picture(
                    "loss",
                    "Loss of the repair's own training batches, errors and replay together, and of validation.",
                    f"Training loss over {self.steps} steps.",
                    curve,
                )
            )
        return blocks


def _named(split: Verified) -> str:
    return split.name if split.name == split.role else f"{split.name} ({split.role})"


def _verified_of(content: Mapping[str, Any] | None) -> Verified | None:
    return None if content is None else _split_of(content)


def _split_of(content: Mapping[str, Any]) -> Verified:
    return Verified(
        **{
            **content,
            "flips": Flips(**content["flips"]),
            "before": estimate_of(content["before"]),
            "after": estimate_of(content["after"]),
        }
    )
