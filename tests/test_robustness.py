"""The baselines' line is recovered exactly where it is known, and what cannot be fitted is said, not guessed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_momentum.evaluation.results import Point
from hf_momentum.evaluation.robustness import Line, fit, over_seeds

SHARES = (0.55, 0.7, 0.82, 0.9, 0.97)


def on_line(slope: float, intercept: float) -> list[Point]:
    """Points of which the logit under shift is exactly that of the line, by the odds rather than by logits."""
    odds = [(share / (1 - share)) ** slope * math.exp(intercept) for share in SHARES]
    return [Point(f"m{i}", share, o / (1 + o)) for i, (share, o) in enumerate(zip(SHARES, odds, strict=True))]


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_a_line_on_the_logit_scale_is_recovered(slope, intercept):
    line = fit(on_line(slope, intercept)).line
    assert line.slope == pytest.approx(slope, abs=1e-9) and line.intercept == pytest.approx(intercept, abs=1e-9)
    assert all(line.effective_robustness(point) == pytest.approx(0, abs=1e-9) for point in on_line(slope, intercept))


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_a_line_of_losses_is_recovered_as_it_is(slope, intercept):
    line = fit([Point("m", x, intercept + slope * x) for x in (0.5, 1.0, 4.0)], "linear").line
    assert line.slope == pytest.approx(slope, abs=1e-9) and line.intercept == pytest.approx(intercept, abs=1e-9)


def test_least_squares_counts_vertical_distances_alone():
    # Worked by hand: y = 1/3 + x is the line of least squares of these three.
    line = fit([Point("a", 0, 0), Point("b", 1, 2), Point("c", 2, 2)], "linear").line
    assert (line.slope, line.intercept) == pytest.approx((1, 1 / 3))


def test_a_straight_line_in_accuracy_is_not_one_on_the_logit_scale():
    """The scale matters: shifted = in distribution - 0.3 bends, so its points leave the fitted line."""
    points = [Point("m", x, x - 0.3) for x in SHARES]
    line = fit(points).line
    assert max(abs(line.effective_robustness(point)) for point in points) > 0.01


def test_above_the_line_is_robust_and_a_lower_loss_is_too():
    line = fit(on_line(0.9, -0.5)).line
    assert line.effective_robustness(Point("up", 0.8, line.at(0.8) + 0.03)) == pytest.approx(0.03)
    assert line.effective_robustness(Point("down", 0.8, line.at(0.8) - 0.03)) == pytest.approx(-0.03)
    losses = fit([Point("a", 1, 2), Point("b", 2, 3)], "linear").line
    assert losses.effective_robustness(Point("lower", 1.5, 2.4)) == pytest.approx(0.1)


def test_better_in_distribution_alone_earns_nothing():
    line = fit(on_line(0.9, -0.5)).line
    assert line.effective_robustness(Point("better", 0.95, line.at(0.95))) == 0
    assert line.at(0.95) > line.at(0.8)


@pytest.mark.parametrize("scale", ["logit", "linear"])
@pytest.mark.parametrize("points", [[], [Point("a", 0.8, 0.7)], [Point("a", 0.8, 0.7), Point("b", 0.8, 0.6)]])
def test_too_few_different_scores_give_a_reason_and_no_line(points, scale):
    found = fit(points, scale)
    assert found.line is None
    assert f"at least 2 different scores in distribution, got {min(1, len(points))}" in found.reason


def test_scores_that_differ_by_rounding_are_the_same():
    assert fit([Point("a", 0.3, 0.7), Point("b", 0.1 + 0.2, 0.6)]).line is None


def test_accuracies_of_0_and_1_and_lost_scores_are_left_out_and_named():
    perfect, lost = Point("perfect", 1.0, 0.9), Point("lost", math.nan, 0.5)
    found = fit([*on_line(1.0, -1.0), perfect, lost])
    assert list(found.left_out) == [perfect, lost] and found.line.points == len(SHARES)
    assert found.line.slope == pytest.approx(1.0)
    assert "2 left out" in fit([perfect, lost, Point("a", 0.5, 0.5)]).reason


def test_the_line_reaches_its_limits_at_0_and_1():
    line = fit(on_line(0.9, -0.5)).line
    assert (line.at(0.0), line.at(1.0)) == (0.0, 1.0)
    assert Line(0.0, 0.0, "logit", 2).at(1.0) == 0.5


def test_percentages_are_refused():
    with pytest.raises(ValueError, match=r"'bert' must lie between 0 and 1, got 93\.0"):
        fit([Point("bert", 93.0, 80.0), Point("other", 0.5, 0.4)])


def test_seeds_make_the_interval():
    line = Line(1.0, 0.0, "linear", 2)
    found = over_seeds(line, [Point("tam", 1.0, 1.0 - gain) for gain in (0.01, 0.02, 0.03)])
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02 - 0.02484, 0.02 + 0.02484), abs=1e-5)
    assert over_seeds(line, [Point("tam", 1.0, 0.9)]).low is None
