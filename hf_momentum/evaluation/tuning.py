"""Learning rates to try: a grid in equal ratios that widens until its best point is interior, with equal budgets.

Every optimizer begins with the same number of points around a start of its own. While the best point of one lies at an
end of its grid, the grid is widened there. When all are interior, those that needed fewer points than the greediest get
the rest too, between their best point and its neighbours: so no optimizer is tuned with more runs than another.
"""

import math
from collections.abc import Mapping, Sequence

Scores = Mapping[float, float]
"""Score by learning rate, lower better; infinite where the run diverged or failed."""


def rung(start: float, ratio: float, index: float) -> float:
    """`start * ratio ** index`, to six digits, so that equal rungs are equal numbers wherever they are formed.

    Example:
        >>> rung(1e-3, 2.0, 1), rung(1e-3, 2.0, -0.5)
        (0.002, 0.000707107)
    """
    return float(f"{start * ratio**index:.6g}")


def first_grid(start: float, ratio: float, trials: int) -> list[float]:
    """`trials` learning rates around `start` in equal ratios, rising; with an even number one more lies below it.

    Example:
        >>> first_grid(1e-3, 10.0, 3), first_grid(1e-3, 10.0, 2)
        ([0.0001, 0.001, 0.01], [0.0001, 0.001])
    """
    return [rung(start, ratio, index - trials // 2) for index in range(trials)]


def best(scores: Scores) -> float | None:
    """The learning rate of the lowest score; of equal ones the middle one, or the lower of two; None if none is finite.

    Example:
        >>> best({0.1: 2.0, 0.2: 1.0, 0.4: 1.0, 0.8: 1.0}), best({0.1: math.inf})
        (0.4, None)
    """
    lowest = min(scores.values(), default=math.inf)
    if not math.isfinite(lowest):
        return None
    equal = sorted(lr for lr, score in scores.items() if score == lowest)
    return equal[(len(equal) - 1) // 2]


def interior(scores: Scores) -> bool:
    """Whether the best learning rate has tried ones on both sides.

    Example:
        >>> interior({0.1: 2.0, 0.2: 1.0, 0.4: math.inf}), interior({0.1: 1.0, 0.2: 2.0})
        (True, False)
    """
    chosen = best(scores)
    return chosen is not None and min(scores) < chosen < max(scores)


def widened(scores: Scores, ratio: float) -> float:
    """The next learning rate of a grid whose best point is at an end: beyond that end, or below if none is finite.

    Example:
        >>> widened({0.1: 1.0, 0.2: 2.0}, 2.0), widened({0.1: 2.0, 0.2: 1.0}, 2.0), widened({0.1: math.inf}, 2.0)
        (0.05, 0.4, 0.05)
    """
    upwards = best(scores) == max(scores) and len(scores) > 1
    return rung(max(scores) if upwards else min(scores), ratio, 1 if upwards else -1)


def refined(scores: Scores) -> float:
    """The middle, on a logarithmic scale, of the best point and a neighbour: the farther, or of two as far the better.

    Example:
        >>> refined({1.0: 5.0, 4.0: 1.0, 16.0: 3.0})
        8.0
        >>> refined({1.0: 5.0, 4.0: 1.0, 8.0: 0.5, 16.0: 3.0})
        5.65685
    """
    chosen = best(scores)
    if chosen is None or not interior(scores):
        raise ValueError("only a grid with an interior best point can be refined")
    below, above = max(lr for lr in scores if lr < chosen), min(lr for lr in scores if lr > chosen)
    widths = math.log(chosen / below), math.log(above / chosen)
    if math.isclose(*widths, rel_tol=1e-3):
        neighbour = below if scores[below] < scores[above] else above
    else:
        neighbour = below if widths[0] > widths[1] else above
    return rung(math.sqrt(chosen * neighbour), 1.0, 0)


def proposals(
    finished: Mapping[str, Scores], starts: Mapping[str, float], ratio: float, trials: int, most: int
) -> dict[str, list[float]]:
    """The learning rates that are to be tried next, by optimizer; all lists are empty when tuning is done.

    The answer depends on finished runs alone, not on their order, so a tuning that was stopped goes on as if it had not
    been. Points of the first grid can run side by side; later ones follow from those before, one at a time.

    Args:
        finished: the scores so far, by optimizer.
        starts: the middle of each first grid.
        ratio: between neighbours, above 1.
        trials: points of the first grid, at least 3.
        most: no optimizer gets more; one whose best is at an end by then stays there, and is to be told of.

    Example:
        >>> proposals({}, {"tam": 1.0}, 10.0, 3, 8)
        {'tam': [0.1, 1.0, 10.0]}
        >>> bowl = {"tam": {0.1: 3.0, 1.0: 1.0, 10.0: 2.0}, "adam": {0.1: 1.0, 1.0: 2.0, 10.0: 3.0}}
        >>> proposals(bowl, {"tam": 1.0, "adam": 1.0}, 10.0, 3, 8)
        {'tam': [], 'adam': [0.01]}
        >>> bowl["adam"][0.01] = 2.0  # interior now, with four points: the other one gets its fourth, too
        >>> proposals(bowl, {"tam": 1.0, "adam": 1.0}, 10.0, 3, 8)
        {'tam': [3.16228], 'adam': []}
    """
    wanted: dict[str, list[float]] = {}
    for name, start in starts.items():
        scores = finished.get(name, {})
        grid = [lr for lr in first_grid(start, ratio, trials) if lr not in scores]
        settled = bool(grid) or interior(scores) or len(scores) >= most
        wanted[name] = grid if settled else [widened(scores, ratio)]
    if any(wanted.values()):
        return wanted
    budget = max(len(finished[name]) for name in starts)
    return {
        name: [refined(finished[name])] if len(finished[name]) < budget and interior(finished[name]) else []
        for name in starts
    }


def at_the_edge(finished: Mapping[str, Scores]) -> Sequence[str]:
    """Names of those whose best learning rate is at an end of what was tried, or that have none.

    Example:
        >>> at_the_edge({"tam": {0.1: 1.0, 0.2: 2.0}, "adam": {0.1: 2.0, 0.2: 1.0, 0.4: 2.0}})
        ['tam']
    """
    return [name for name, scores in finished.items() if not interior(scores)]
