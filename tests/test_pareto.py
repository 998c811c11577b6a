"""Fronts are measured and compared as a textbook would, and the words follow from the figures, whichever way."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_momentum.evaluation.intervals import Interval, holm, t_interval, t_quantile, t_test, t_within
from hf_momentum.evaluation.pareto import (
    MAIN_ONLY,
    ParetoReport,
    Run,
    compare,
    fronts_figure,
    hypervolume,
    non_dominated,
)

LOSSES = arrays(
    np.float64, st.tuples(st.integers(0, 12), st.just(2)), elements=st.floats(0, 4).map(lambda x: round(x, 2))
)


# ---- points and areas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0.0),
        ([[1, 1]], 9.0),
        ([[0, 3], [3, 0]], 4 + 4 - 1),
        ([[1, 3], [2, 2], [3, 1]], 3 + 2 + 1),
        ([[2, 2], [2, 2]], 4.0),
        ([[4, 0], [0, 4], [5, 5]], 0.0),
    ],
)
def test_hypervolumes_of_fronts_that_can_be_counted_by_hand(points, area):
    assert hypervolume(np.array(points, dtype=float).reshape(-1, 2), (4, 4)) == area


@given(LOSSES)
def test_hypervolume_is_the_share_of_a_fine_grid_that_is_dominated(points):
    """Counting small squares shares nothing with the sweep; the losses lie on the squares' corners."""
    corners = np.arange(0, 400) / 100
    x, y = np.meshgrid(corners, corners, indexing="ij")
    dominated = np.zeros_like(x, dtype=bool)
    for point in points:
        dominated |= (x >= point[0] - 1e-9) & (y >= point[1] - 1e-9)
    assert hypervolume(points, (4, 4)) == pytest.approx(dominated.sum() / 10_000, abs=1e-9)


@given(LOSSES, st.randoms())
def test_points_that_others_dominate_and_their_order_change_nothing(points, random):
    reference = (4.0, 4.0)
    added = [[x + random.random(), y + random.random()] for x, y in points]
    more = np.array([*points.tolist(), *added]).reshape(-1, 2)
    shuffled = more[random.sample(range(len(more)), len(more))]
    assert hypervolume(shuffled, reference) == pytest.approx(hypervolume(points, reference), abs=1e-12)
    assert hypervolume(non_dominated(points), reference) == hypervolume(points, reference)


@given(LOSSES)
def test_the_front_is_what_no_other_point_beats(points):
    def beaten(point) -> bool:
        return any((other <= point).all() and (other < point).any() for other in points)

    front = non_dominated(points)
    assert {tuple(point) for point in front} == {tuple(point) for point in points if not beaten(point)}
    assert len(np.unique(front, axis=0)) == len(front)


# ---- intervals and tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "within", "quantile"),
    [
        *[(1, 0.95, 12.7062), (2, 0.95, 4.3027), (3, 0.95, 3.1824), (4, 0.99, 4.6041), (9, 0.95, 2.2622)],
        *[(9, 0.9, 1.8331), (30, 0.95, 2.0423), (120, 0.99, 2.6174)],
    ],
)
def test_students_t_is_the_tables(degrees, within, quantile):
    assert t_quantile(within, degrees) == pytest.approx(quantile, abs=5e-5)
    assert t_within(-quantile, degrees) == t_within(quantile, degrees) == pytest.approx(within, abs=1e-4)


def test_holm_corrects_step_by_step():
    # By hand: 4 x 0.01; 3 x 0.015 = 0.045; 2 x 0.02 = 0.04, raised to 0.045; 1 x 0.3.
    assert holm([0.3, 0.01, 0.02, 0.015]) == pytest.approx([0.3, 0.04, 0.045, 0.045])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_t_intervals_cover_the_true_mean_in_95_of_100_simulations(seeds):
    generator = np.random.default_rng(0)
    covered = 0
    for values in generator.normal(1.7, 0.3, (2000, seeds)).tolist():
        interval = t_interval(values)
        covered += interval.low <= 1.7 <= interval.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_intervals_of_the_normal_distribution_would_be_seen():
    """The simulation above is sensitive: 1.96 standard errors are too few for three seeds."""
    values = np.random.default_rng(0).normal(0, 1, (2000, 3))
    half = 1.96 * values.std(1, ddof=1) / math.sqrt(3)
    assert np.mean(np.abs(values.mean(1)) <= half) < 0.9


def test_one_seed_has_no_interval_and_the_test_no_power():
    assert t_interval([1.5]) == Interval(1.5, None, None)
    assert t_test([5.0]) == 1.0
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])


# ---- comparisons -----------------------------------------------------------------------------------------------------


def simulated(generator, methods: dict[str, float], seeds: int = 3, noise: float = 0.01) -> list[Run]:
    """Fronts of a given gain in auxiliary loss, with noise of the seed (common to all) and of each run."""
    runs = []
    for seed in range(seeds):
        common = generator.normal(0, 3 * noise, 2)
        runs.append(Run(MAIN_ONLY, 0.0, seed, tuple(common + generator.normal(0, noise, 2) + [1.0, 2.0])))
        for method, gain in methods.items():
            for lam in (0.1, 0.3, 1.0):
                losses = common + generator.normal(0, noise, 2) + [1 + 0.1 * lam, 2 - gain * (0.5 + lam / 2)]
                runs.append(Run(method, lam, seed, tuple(losses.tolist())))
    return runs


def report(runs: list[Run], base=(1.4, 2.2), **fields) -> ParetoReport:
    methods = [method for method in dict.fromkeys(run.method for run in runs) if method != MAIN_ONLY]
    lambdas = sorted({run.lam for run in runs} - {0.0})
    seeds = sorted({run.seed for run in runs})
    return ParetoReport("title", "code", "prose", "byte", methods, lambdas, seeds, runs, base, **fields)


def test_clearly_different_fronts_are_called_so_whichever_way():
    generator = np.random.default_rng(0)
    won = report(simulated(generator, {"bloop": 0.5, "mixed": 0.2, "pcgrad": 0.25}, seeds=5))
    assert won.verdict().startswith("bloop won against mixed and pcgrad: difference in hypervolume 0.")
    lost = report(simulated(generator, {"bloop": 0.2, "mixed": 0.5, "pcgrad": 0.52}, seeds=5))
    assert lost.verdict().startswith("bloop lost to mixed and pcgrad: difference in hypervolume -0.")
    split = report(simulated(generator, {"mixed": 0.8, "bloop": 0.5, "simple": 0.2}, seeds=5))
    assert split.verdict().startswith("bloop won against simple; bloop lost to mixed: ")
    for one in (won, lost, split):
        assert "5 seeds (0, 1, 2, 3, 4)" in one.verdict() and "(nats per byte)²" in one.verdict()
        assert "the worst losses of all 50 finished runs" in one.verdict() or len(one.runs) != 50
        assert one.verdict().endswith("fixed for all methods and seeds.")


def test_equal_fronts_show_no_significant_difference():
    runs = simulated(np.random.default_rng(0), {"bloop": 0.3})
    twins = runs + [Run("mixed", run.lam, run.seed, run.losses) for run in runs if run.method == "bloop"]
    same = report(twins)
    assert same.verdict().startswith("No significant difference between bloop and mixed: ")
    assert same.comparisons[0].difference == Interval(0.0, 0.0, 0.0) and same.comparisons[0].p_value == 1.0


def test_a_difference_of_rounding_is_none():
    """Three differences of 1e-17 have no spread; a t-test would be certain."""
    volumes = {"bloop": dict.fromkeys(range(3), 0.1 + 0.2), "mixed": dict.fromkeys(range(3), 0.3)}
    assert volumes["bloop"][0] != volumes["mixed"][0]
    assert compare(volumes, "bloop")[0].words == "no significant difference"


def test_identical_methods_are_called_different_in_at_most_5_of_100_simulations():
    generator = np.random.default_rng(0)
    gains = {"bloop": 0.3, "mixed": 0.3, "pcgrad": 0.3, "simple": 0.3}
    wrong = uncorrected = 0
    for _ in range(1000):
        comparisons = report(simulated(generator, gains)).comparisons
        wrong += any(one.words != "no significant difference" for one in comparisons)
        uncorrected += any(one.p_value < 0.05 for one in comparisons)
    assert wrong / 1000 <= 0.05
    assert uncorrected / 1000 > 0.06, "without Holm's correction the simulation sees too many"


def test_pairing_sees_what_the_seeds_noise_hides():
    generator = np.random.default_rng(0)
    common, own = generator.normal(0.3, 0.1, 5), generator.normal(0, 0.004, (2, 5))
    volumes = {"bloop": dict(enumerate(common + 0.05 + own[0])), "mixed": dict(enumerate(common + own[1]))}
    first, second = (t_interval(list(volumes[method].values())) for method in ("bloop", "mixed"))
    assert first.low < second.high, "the two intervals overlap"
    assert compare(volumes, "bloop")[0].words == "larger"


def test_a_seed_counts_when_all_its_runs_are_done_and_a_run_that_stopped_is_done():
    runs = simulated(np.random.default_rng(0), {"bloop": 0.5, "mixed": 0.3}, seeds=4)
    missing = [run for run in runs if (run.method, run.lam, run.seed) != ("mixed", 0.3, 2)]
    assert sorted(report(missing).volumes["mixed"]) == [0, 1, 3]
    assert list(report(missing).comparisons[0].seeds) == [0, 1, 3]
    assert "3 seeds (0, 1, 3)" in report(missing).verdict()
    stopped = [*missing, Run("mixed", 0.3, 2, None)]
    assert sorted(report(stopped).volumes["mixed"]) == [0, 1, 2, 3]
    assert report(stopped).volumes["mixed"][2] < report(runs).volumes["mixed"][2]
    (point,) = [point for point in report(stopped).points if (point.method, point.lam) == ("mixed", 0.3)]
    assert point.seeds == 3


def test_the_reference_is_the_worst_of_all_finished_runs_and_leaves_the_base_model_out():
    runs = [Run(MAIN_ONLY, 0.0, 0, (1.0, 3.0)), Run("bloop", 1.0, 0, (2.0, 1.0)), Run("mixed", 1.0, 0, None)]
    assert report(runs, base=(9.0, 9.0)).reference == (2.0, 3.0)


def test_too_few_seeds_are_said_to_be_too_few():
    one = report(simulated(np.random.default_rng(0), {"bloop": 0.5, "mixed": 0.1}, seeds=1))
    assert one.verdict().startswith("Too few common seeds to compare bloop with mixed: ")
    assert "[one seed]" in one.to_markdown()
    alone = report(simulated(np.random.default_rng(0), {"mixed": 0.5}))
    assert alone.verdict() == "mixed was run alone, so there is nothing to compare."


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_is_written_whole(tmp_path: Path):
    runs = simulated(np.random.default_rng(0), {"bloop": 0.5, "mixed": 0.2})
    fields = {
        "facts": {"steps": 7},
        "troubles": ["mixed, lambda 3, seed 0 failed: out of memory"],
        "fairness": ["Fair."],
    }
    made = report(runs, **fields, recipe="optim: tam\n", command="hf-momentum pareto")
    text = made.write(tmp_path).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fronts.png", "report.json", "report.md"]
    assert text.splitlines()[2] == f"**{made.verdict()}**"
    for expected in (
        "| bloop | 0.1 | 3 |",
        "| base model |",
        "out of memory",
        "- Fair.",
        "nats per byte",
        "optim: tam",
    ):
        assert expected in text
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["verdict"] == made.verdict() and record["facts"] == {"steps": 7}
    assert record["hypervolumes"]["bloop"]["0"] == made.volumes["bloop"][0]
    assert len(record["runs"]) == len(runs) and record["comparisons"][0]["words"] == "larger"


def test_a_report_without_a_finished_run_says_so(tmp_path: Path):
    empty = ParetoReport("t", "code", "prose", "byte", ["bloop"], [1.0], [0], [Run("bloop", 1.0, 0, None)], None)
    assert empty.verdict() == "No run finished, so there is nothing to compare."
    empty.write(tmp_path)
    assert not (tmp_path / "fronts.png").exists()


def test_the_picture_has_bars_in_both_directions_units_and_styles_that_differ_in_grey():
    names = ("bloop", "mixed", "pcgrad", "replay", "dynamic_barrier", "simple")
    figure = fronts_figure(report(simulated(np.random.default_rng(0), dict.fromkeys(names, 0.3))))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "main loss: code (nats per byte)"
    assert axes.get_ylabel() == "auxiliary loss: prose (nats per byte)"
    labelled = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(labelled) >= {*names, "main only (lambda 0)"}
    assert len({labelled[name].get_marker() for name in names}) == 6
    assert all(bars.has_xerr and bars.has_yerr for bars in axes.containers) and len(axes.containers) == 1 + 6 * 3


@pytest.mark.parametrize(("base", "inside"), [((1.05, 1.8), True), ((9.0, 1.8), False), ((0.1, 8.0), False)])
def test_a_far_base_model_does_not_squeeze_the_fronts(base, inside):
    figure = fronts_figure(report(simulated(np.random.default_rng(0), {"bloop": 0.3}), base=base))
    axes = figure.axes[0]
    (label,) = [line.get_label() for line in axes.lines if line.get_label().startswith("base model")]
    assert (label == "base model") == inside
    if not inside:
        assert f"main {base[0]:.3f}" in label and axes.get_xlim()[1] < 2 and axes.get_ylim()[1] < 3
