"""Which layer groups to retrain, from their scores: four rules, of which a choice follows exactly one.

All rules take the largest scores first and, of equal ones, the group that stands first in the model. What they choose
is named in the order of the model.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from hf_momentum.errors import InputError

# A share such as 0.29 of 100 is 28.999999999999996 in floating point; a group of 29 must still fit.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Rule:
    """How groups are chosen; exactly one field is set.

    Attributes:
        top: so many groups with the largest scores; a whole number from 1.
        threshold: z; the groups whose score is above mean + z std over all groups (population std).
        cumulative: a share in (0, 1]; the fewest groups whose scores sum to that share of all scores.
        budget: a share in (0, 1] of all parameters; the largest scores first, what does not fit is passed over.

    Raises:
        InputError: none or several are set, or a value is not accepted.

    Example:
        >>> Rule(top=3)
        Rule(top=3, threshold=None, cumulative=None, budget=None)
        >>> Rule(budget=18)
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: budget must be a share above 0 and up to 1, got 18
    """

    top: int | None = None
    threshold: float | None = None
    cumulative: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise InputError(f"groups are chosen by exactly one of top, threshold, cumulative and budget; got {got}")
        if self.top is not None and (not isinstance(self.top, int) or self.top < 1):
            raise InputError(f"top must be a whole number of at least 1, got {self.top}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InputError(f"threshold must be a finite number of standard deviations, got {self.threshold}")
        for name, share in (("cumulative", self.cumulative), ("budget", self.budget)):
            if share is not None and not 0 < share <= 1:
                raise InputError(f"{name} must be a share above 0 and up to 1, got {share}")

    def words(self) -> str:
        """The rule as a reader takes it.

        Example:
            >>> Rule(top=3).words(), Rule(budget=0.1).words()
            ('the 3 with the largest scores', 'the largest scores that fit into 10 % of the parameters')
        """
        if self.top is not None:
            return "the one with the largest score" if self.top == 1 else f"the {self.top} with the largest scores"
        if self.threshold is not None:
            return f"scores above mean + {self.threshold:g} std"
        if self.cumulative is not None:
            return f"the fewest whose scores sum to {100 * self.cumulative:g} % of all"
        return f"the largest scores that fit into {100 * (self.budget or 0):g} % of the parameters"


def choose(names: Sequence[str], scores: Sequence[float], parameters: Sequence[int], rule: Rule) -> list[str]:
    """The groups that a rule chooses, at least one, in the order of the model.

    Args:
        names: of all groups, in the order of the model.
        scores: one for each; larger is more to blame.
        parameters: how many weights each has.
        rule: which are chosen.

    Raises:
        InputError: the three differ in length or are empty, a score is not finite, or the rule chooses none.

    Example:
        >>> names, scores, parameters = ["embeddings", "block.0", "head"], [0.1, 0.5, 0.9], [700, 200, 100]
        >>> choose(names, scores, parameters, Rule(top=2))
        ['block.0', 'head']
        >>> choose(names, scores, parameters, Rule(threshold=0.5))
        ['head']
        >>> choose(names, scores, parameters, Rule(cumulative=0.9))
        ['block.0', 'head']
        >>> choose(names, scores, parameters, Rule(budget=0.1))
        ['head']
    """
    if not len(names) == len(scores) == len(parameters) or not names:
        got = f"{len(names)} names, {len(scores)} scores and {len(parameters)} parameter counts"
        raise InputError(f"a choice needs a score and a parameter count for each of at least one group; got {got}")
    for name, score in zip(names, scores, strict=True):
        if not math.isfinite(score):
            raise InputError(f"the score of {name} is {score}; a choice needs finite scores. Look at the model's loss")
    if rule.top is not None:
        places = largest(scores, rule.top)
    elif rule.threshold is not None:
        places = above(scores, rule.threshold)
    elif rule.cumulative is not None:
        places = summing_to(scores, rule.cumulative)
    else:
        assert rule.budget is not None  # Rule has checked that one is set
        places = within(names, scores, parameters, rule.budget)
    return [names[place] for place in places]


def largest(scores: Sequence[float], count: int) -> list[int]:
    """Places of the `count` largest scores, in order.

    Raises:
        InputError: there are fewer scores.

    Example:
        >>> largest([0.1, 0.9, 0.5, 0.9], 2), largest([0.5, 0.5, 0.5], 1)
        ([1, 3], [0])
    """
    if count > len(scores):
        raise InputError(f"top must be at most the number of groups, {len(scores)}; got {count}")
    return sorted(_descending(scores)[:count])


def above(scores: Sequence[float], z: float) -> list[int]:
    """Places of the scores above mean + z std over all of them (population std), in order.

    Raises:
        InputError: there is none; the message says which z would choose one.

    Example:
        >>> above([1.0, 1.0, 1.0, 5.0], 1.5)
        [3]
        >>> above([1.0, 1.0, 1.0, 5.0], 2.0)
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: threshold 2.0 chooses no group; below 1.73 it would choose one
    """
    # Distances from the largest are exact where scores are close, and `statistics` sums them exactly: equal scores have
    # no spread, and the largest is above the mean of any others.
    below = [float(score - max(scores)) for score in scores]
    mean, spread = statistics.mean(below), statistics.pstdev(below)
    if spread == 0:
        raise InputError(f"threshold {z} chooses no group, nor would another: all scores are {scores[0]:.3g}; use top")
    chosen = [place for place, distance in enumerate(below) if distance > mean + z * spread]
    if not chosen:
        limit = _three_digits(-mean / spread, up=False)
        raise InputError(f"threshold {z} chooses no group; below {limit} it would choose one")
    return chosen


def summing_to(scores: Sequence[float], share: float) -> list[int]:
    """Places of the fewest scores, the largest first, that sum to at least a share of all, in order.

    Raises:
        InputError: a score is negative, or all are 0.

    Example:
        >>> summing_to([1.0, 4.0, 2.0, 3.0], 0.7), summing_to([1.0, 0.0], 1.0)
        ([1, 3], [0])
    """
    if min(scores) < 0:
        raise InputError(f"cumulative needs scores of at least 0, got {min(scores):.3g}; use top or threshold")
    wanted = share * math.fsum(scores) * (1 - _ROUNDING)
    if wanted == 0:
        raise InputError(f"cumulative {share} chooses no group: all scores are 0; the errors point nowhere")
    order = _descending(scores)
    count = next(k for k in range(1, len(scores) + 1) if math.fsum(scores[place] for place in order[:k]) >= wanted)
    return sorted(order[:count])


def within(names: Sequence[str], scores: Sequence[float], parameters: Sequence[int], share: float) -> list[int]:
    """Places of the groups that fit into a share of all parameters, in order.

    The largest score first; a group that does not fit into what is left is passed over, and smaller ones may follow.

    Raises:
        InputError: none fits; the message names the smallest. Or there are no parameters at all.

    Example:
        >>> within(["a", "b", "c"], [0.9, 0.5, 0.1], [90, 5, 5], 0.1)
        [1, 2]
        >>> within(["a", "b"], [0.9, 0.5], [90, 10], 0.05)
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: budget 0.05 fits no group; the smallest, b, needs 0.1 of all parameters
    """
    total = sum(parameters)
    if total == 0:
        raise InputError(f"budget {share} is a share of 0 parameters; use top, threshold or cumulative")
    left, chosen = share * total + _ROUNDING * total, []
    for place in _descending(scores):
        if parameters[place] <= left:
            left -= parameters[place]
            chosen.append(place)
    if not chosen:
        smallest = min(range(len(names)), key=parameters.__getitem__)
        needed = _three_digits(parameters[smallest] / total, up=True)
        raise InputError(
            f"budget {share} fits no group; the smallest, {names[smallest]}, needs {needed} of all parameters"
        )
    return sorted(chosen)


def _descending(scores: Sequence[float]) -> list[int]:
    """Places from the largest score to the smallest; equal ones as they stand."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def _three_digits(value: float, up: bool) -> str:
    """A positive value rounded away from what would not be enough, so that what the message says will do."""
    scale = 10.0 ** (2 - math.floor(math.log10(value)))
    scaled = value * scale
    near = round(scaled)
    whole = near if math.isclose(scaled, near, rel_tol=1e-9) else math.ceil(scaled) if up else math.floor(scaled)
    return f"{whole / scale:.6g}"
