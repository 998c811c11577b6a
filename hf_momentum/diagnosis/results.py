"""What diagnosis and repair find, as plain data. No mathematics, no drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_momentum.evaluation.metrics import Estimate

SCORES = ("raw", "rms", "relative", "taylor")


@dataclass(frozen=True)
class GroupFacts:
    """A layer group as a report knows it: its name, its kind (see `groups.py`) and how many weights it has.

    Example:
        >>> GroupFacts("block.3", "block", 1000).name
        'block.3'
    """

    name: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class Attribution:
    """Scores of the gradient of the mean loss over one sample of predictions, group by group.

    Attributes:
        predictions: over how many the loss was averaged: examples, or tokens.
        units: how many micro-batches were resampled for the intervals.
        loss: the mean loss in nats.
        scores: by name (those of SCORES), one for each group; intervals are over examples.
        noise: for each group the share of |g|^2 that the choice of the examples would give to a gradient of 0; near 1
            the score is noise. None with fewer than two units.
    """

    predictions: int
    units: int
    loss: float
    scores: Mapping[str, Sequence[Estimate]]
    noise: Sequence[float] | None


@dataclass(frozen=True)
class Compared:
    """Errors of one model beside what it has right.

    Attributes:
        errors: of wrong predictions.
        right: of right ones, matched by class; None where there are none.
        contrast: raw score of errors / (eps + raw score of right ones) for each group; empty without `right`.
        first: for each group the share of resamples in which its contrast (without `right`: its raw score) is largest.
    """

    errors: Attribution
    right: Attribution | None
    contrast: Sequence[Estimate]
    first: Sequence[float]

    def values(self, score: str) -> list[float]:
        """One score of all groups: one of SCORES, of the errors, or "contrast".

        Example:
            >>> found = Attribution(5, 5, 1.0, {"raw": [Estimate(2.0, 1.0, 3.0)]}, None)
            >>> Compared(found, None, [], [1.0]).values("raw")
            [2.0]
        """
        found = self.contrast if score == "contrast" else self.errors.scores[score]
        return [one.value for one in found]


@dataclass(frozen=True)
class Flips:
    """How predictions changed between two models on the same examples.

    Attributes:
        fixed: wrong before, right after.
        broken: right before, wrong after.
        right, wrong: right both times, wrong both times.
    """

    fixed: int
    broken: int
    right: int
    wrong: int

    @property
    def total(self) -> int:
        """All predictions."""
        return self.fixed + self.broken + self.right + self.wrong

    @property
    def net(self) -> int:
        """Fixed minus broken.

        Example:
            >>> Flips(fixed=5, broken=2, right=90, wrong=3).net
            3
        """
        return self.fixed - self.broken


@dataclass(frozen=True)
class Verified:
    """One split before and after.

    Attributes:
        name: of the split.
        role: "verification", or that of a suite's split: "in distribution", "shifted", "must not forget".
        source: SOURCE@SPLIT.
        examples: rows of it; a language model makes many predictions on each.
        flips: of single predictions.
        p_value: exact, two-sided, of as many fixed as broken ones; over rows where a row has many predictions.
        before, after: the share that is right, with intervals over rows.
        rows_better, rows_worse: rows with more, or fewer, right predictions after; what the p-value is about. None
            where each row has one prediction.
    """

    name: str
    role: str
    source: str
    examples: int
    flips: Flips
    p_value: float
    before: Estimate
    after: Estimate
    rows_better: int | None = None
    rows_worse: int | None = None


@dataclass(frozen=True)
class Decision:
    """Whether a repair is kept, and why.

    Attributes:
        accepted: or rolled back.
        reasons: sentences, the rule's parts in their order, each with its figures.
    """

    accepted: bool
    reasons: Sequence[str]


@dataclass(frozen=True)
class Mixture:
    """Validation at one place between the old weights (share 0) and the new ones (share 1)."""

    share: float
    flips: Flips
    loss: float


@dataclass(frozen=True)
class BaselineRun:
    """One way to retrain, at one seed, on the verification split.

    Attributes:
        method: "chosen", "full", "head", "random", "relative_lr" or "group:NAME" for a single group.
        seed: of order, dropout and random choices.
        groups: what was trained.
        parameters: how many weights were trained.
        learning_rate: the best on validation of those tried.
        share: of the new weights, chosen on validation.
        steps: optimizer steps, the same for all.
        flips, p_value: on the verification split.
        shifted: net gain on each other split.
    """

    method: str
    seed: int
    groups: Sequence[str]
    parameters: int
    learning_rate: float
    share: float
    steps: int
    flips: Flips
    p_value: float
    shifted: Mapping[str, int]


Outcome = Literal["accepted", "rolled back", "nothing to repair"]
