"""What was measured, as plain data: scores of one model on every split of a suite, and runs of several optimizers.

Two kinds of intervals exist and are never mixed. An `Estimate` is a figure of one model with a bootstrap interval over
the *examples* of a split: how far another sample of the same distribution might move it. An `Interval` is a mean over
*seeds* with Student's t: how far another training run might.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from hf_momentum.evaluation.metrics import Estimate

Role = Literal["in distribution", "shifted", "must not forget", "auxiliary"]
Shift = Literal["domain", "corruption", "label", "time"]
ROLES: tuple[str, ...] = get_args(Role)
SHIFTS: tuple[str, ...] = get_args(Shift)


@dataclass(frozen=True)
class ReliabilityBin:
    """Examples of one range of confidence: their mean confidence, the share that was right, and how many there are."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class SplitScores:
    """One model on one split.

    Attributes:
        name, role: as in the suite.
        kind: how it is shifted; None unless it is.
        source: where its rows come from.
        examples: how many were evaluated.
        scores: each metric with its bootstrap interval over examples; the first is the split's main one.
        groups: the same by the value of the group column; empty without one.
        reliability: bins of the reliability diagram, for classifiers.
        corruption, severity: what was done to the rows, and how strongly, 1 to 5; None and 0 for clean rows.
    """

    name: str
    role: Role
    kind: Shift | None
    source: str
    examples: int
    scores: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    reliability: Sequence[ReliabilityBin] = ()
    corruption: str | None = None
    severity: int = 0


@dataclass(frozen=True)
class Point:
    """A model's place in the picture of accuracy under shift against accuracy in distribution."""

    label: str
    in_distribution: float
    shifted: float


@dataclass(frozen=True)
class RunScores:
    """One training run of a comparison.

    Attributes:
        method: an optimizer's name, or that of a control such as "tam with frozen gate".
        role: "tuning" (its validation score chose the learning rate) or "test" (its scores are compared).
        learning_rate: the peak of its schedule.
        seed: of the order of the data and of what is random in the model; the same one is paired across methods.
        status: "finished"; "diverged" when the loss was not finite, which is a result; "failed", which is none.
        validation: the selection metric on validation data at the end of the schedule; None unless finished.
        scores: metric by split at the end of the schedule; empty unless it was measured.
        seconds: time of training alone.
        peak_memory: of the process in bytes (of the device where there is one).
        message: why it diverged or failed.
        gain: effective learning rate over the nominal one, a mean over the steps, where the optimizer knows it.
    """

    method: str
    role: Literal["tuning", "test"]
    learning_rate: float
    seed: int
    status: Literal["finished", "diverged", "failed"]
    validation: float | None
    scores: Mapping[str, Mapping[str, float]]
    seconds: float
    peak_memory: int
    message: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class SplitFacts:
    """What a comparison's report says of a split."""

    name: str
    role: Role
    kind: Shift | None
    source: str
