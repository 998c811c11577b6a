"""Pictures say what they were given, can be told apart without colours, and refuse what they cannot show."""

import io
import math
import warnings
from itertools import pairwise

import matplotlib.colors
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_momentum.evaluation import pictures
from hf_momentum.evaluation.intervals import Interval
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.pictures import STYLES, Difference, lightness, styles, wrapped
from hf_momentum.evaluation.results import Point, ReliabilityBin
from hf_momentum.evaluation.robustness import Line

# ---- without colours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["colour", "marker", "line", "hatch"])
def test_no_two_series_share_a_marker_a_line_or_a_hatching(part):
    assert len({getattr(style, part) for style in STYLES}) == len(STYLES) == 12


def test_neighbours_differ_in_grey():
    grey = [lightness(style.colour) for style in STYLES]
    assert min(abs(a - b) for a, b in pairwise(grey)) >= 15
    assert max(grey) < 75, "lines must be seen on white"


@pytest.mark.parametrize(
    ("colour", "value"), [("#000000", 0), ("#ffffff", 100), ("#777777", 50.03), ("#ff0000", 53.24)]
)
def test_lightness_is_that_of_cielab(colour, value):
    assert lightness(colour) == pytest.approx(value, abs=0.01)


def test_bars_carry_their_hatching_and_scatter_its_markers():
    scores = {"before": {"a": Estimate(0.5, 0.4, 0.6)}, "after": {"a": Estimate(0.6, 0.5, 0.7)}}
    bars = pictures.split_bars(scores).axes[0].patches
    assert [bar.get_hatch() or "" for bar in bars] == [STYLES[0].hatch, STYLES[1].hatch]
    lines = pictures.shift_scatter({"a": [Point("a", 0.8, 0.7)], "b": [Point("b", 0.9, 0.7)]}).axes[0].get_lines()
    assert [line.get_marker() for line in lines[:2]] == ["o", "s"]


@pytest.mark.parametrize("low", [0.0, -3.0])
def test_figures_in_a_matrix_have_contrast_whatever_their_shade(low):
    values = [[low + step / 40 for step in range(41)]]
    axes = pictures.forgetting_matrix(values, ["r"], [str(step) for step in range(41)]).axes[0]
    ratios = []
    for cell, text in zip(axes.patches, axes.texts, strict=True):
        first, second = (_luminance(colour) for colour in (cell.get_facecolor(), text.get_color()))
        ratios.append((max(first, second) + 0.05) / (min(first, second) + 0.05))
    assert min(ratios) >= 4.5
    shades = [_luminance(cell.get_facecolor()) for cell in axes.patches]
    assert shades == sorted(shades, reverse=True), "darker is larger"


def _luminance(colour) -> float:
    from matplotlib.colors import to_rgb

    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_name_keeps_its_style_and_more_names_than_styles_still_differ():
    names = [f"m{n}" for n in range(30)]
    assert styles(names)["m3"] == STYLES[3] == styles(names[:4])["m3"]
    assert len({(style.colour, style.marker) for style in styles(names).values()}) == 30


# ---- names -----------------------------------------------------------------------------------------------------------


@given(st.text(alphabet="abW _-/.", max_size=40), st.sampled_from([20.0, 60.0, 140.0]))
def test_wrapping_keeps_every_letter_and_the_room(text, room):
    lines = wrapped(text, room, 8.5).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(pictures._width(line, 8.5) <= room for line in lines)


def test_names_are_cut_where_they_have_joints():
    assert wrapped("critical_adamw at matched lr", 72, 8.5) == "critical_adamw\nat matched lr"


@pytest.mark.parametrize("name", ["$x$", "$", "_hidden", "%s", "<b>&"])
def test_names_are_shown_as_they_are(name):
    """Matplotlib sets what stands between dollars as mathematics, and leaves `_names` out of legends."""
    figure = pictures.split_bars({"other": {}, name: {name: Estimate(0.5, 0.4, 0.6)}})
    buffer = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert buffer.getvalue().count(f"{escaped}</text>") == 2, "once on the axis, once in the legend"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_line_of_the_baselines_is_drawn_where_it_lies():
    line = Line(0.9, -0.5, "logit", 3)
    points = {"base": [Point("base", 0.7, 0.6)], "tam": [Point("tam", 0.9, 0.85)]}
    axes = pictures.shift_scatter(points, line, ["base"]).axes[0]
    drawn = next(one for one in axes.get_lines() if one.get_label() == "line through baselines")
    assert drawn.get_ydata() == pytest.approx([line.at(x) for x in drawn.get_xdata()])
    assert [one.get_markerfacecolor() for one in axes.get_lines()[:2]] == ["white", STYLES[1].colour]


def test_seeds_are_small_and_their_mean_is_large():
    points = {"tam": [Point("tam", 0.8, 0.7), Point("tam", 0.9, 0.6)]}
    seeds, mean = pictures.shift_scatter(points).axes[0].get_lines()[:2]
    assert seeds.get_markersize() < mean.get_markersize()
    assert (mean.get_xdata()[0], mean.get_ydata()[0]) == pytest.approx((0.85, 0.65))


def test_one_seed_has_no_interval_and_says_so():
    rows = [Difference("a", Interval(-0.0001, None, None)), Difference("b", Interval(0.1, -0.1, 0.3))]
    axes = pictures.differences(rows).axes[0]
    assert [text.get_text() for text in axes.texts] == ["+0.000 [one seed]", "+0.100 [\N{MINUS SIGN}0.100, +0.300]"]
    assert sum(len(line.get_xdata()) == 2 and line.get_linewidth() > 1.5 for line in axes.get_lines()) == 1


def test_a_significant_difference_is_filled():
    rows = [Difference("a", Interval(0.1, 0.05, 0.15), significant=flag) for flag in (True, False)]
    marks = [line for line in pictures.differences(rows).axes[0].get_lines() if line.get_marker() == "o"]
    assert [mark.get_markerfacecolor() for mark in marks] == [STYLES[0].colour, "white"]


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_off_the_scale_or_diverged_stands_at_the_border(sign):
    curve = [(1e-4, sign * 1.7), (1e-3, sign * 1.0), (1e-2, sign * 1.5), (1e-1, sign * 90.0), (1.0, math.inf)]
    axes = pictures.tuned({"tam": curve}, {"tam": 1e-3}, lower_is_better=sign == 1).axes[0]
    low, high = axes.get_ylim()
    assert low < sign * 1.0 < high and not low < sign * 90.0 < high
    by_marker = {line.get_marker(): list(line.get_xdata()) for line in axes.get_lines()}
    assert by_marker["^" if sign == 1 else "v"] == [0.1] and by_marker["x"] == [1.0]


def test_a_method_that_only_diverged_has_an_empty_panel():
    curves = {"tam": [(1e-3, math.inf)], "adamw_torch": [(1e-3, 1.0), (1e-2, 1.0)]}
    axes = pictures.tuned(curves, {"adamw_torch": 1e-3}).axes
    assert axes[0].get_title(loc="left") == "tam\nnone chosen"
    assert pictures.tuned({"tam": [(1e-3, math.nan)]}, {}).axes


def test_the_calibration_error_is_the_mean_gap_by_examples():
    bins = [ReliabilityBin(0.6, 0.5, 30), ReliabilityBin(0.9, 1.0, 10), ReliabilityBin(0.1, 0.9, 0)]
    title = pictures.reliability({"news": bins, "empty": []}).axes[0].get_title(loc="left")
    assert title == f"news\ncalibration error {(30 * 0.1 + 10 * 0.1) / 40:.3f}"


def test_a_series_may_lack_a_split_and_a_score_may_be_negative():
    scores = {"a": {"x": Estimate(-0.5, -0.7, -0.2)}, "b": {"x": Estimate(0.1, 0, 0.2), "y": Estimate(0.3, 0.2, 0.4)}}
    axes = pictures.split_bars(scores).axes[0]
    assert len(axes.patches) == 3 and axes.get_xlim()[0] < -0.7 and axes.get_xlim()[1] > 0.4


def test_more_series_than_bars_can_show_are_dots():
    scores = {f"m{n}": {"x": Interval(0.8, None, None)} for n in range(5)}
    axes = pictures.split_bars(scores).axes[0]
    assert not axes.patches and [line.get_marker() for line in axes.get_lines()[:5]] == [s.marker for s in STYLES[:5]]


def test_equal_and_single_values_have_room():
    for draw in (
        lambda: pictures.shift_scatter({"a": [Point("a", 1.0, 1.0)]}, Line(1.0, 0.0, "logit", 2)),
        lambda: pictures.differences([Difference("a", Interval(0.0, 0.0, 0.0))]),
        lambda: pictures.split_bars({"a": {"x": Interval(0.0, None, None)}}),
        lambda: pictures.tuned({"a": [(1e-3, 1.0)]}, {"a": 1e-3}),
        lambda: pictures.forgetting_matrix([[0.5]], ["r"], ["c"]),
        lambda: pictures.forgetting_matrix([[None]], ["r"], ["c"]),
        lambda: pictures.severities({"a": {0: Interval(0.5, None, None)}}),
    ):
        for axes in draw().axes:
            assert axes.get_xlim()[0] != axes.get_xlim()[1] and axes.get_ylim()[0] != axes.get_ylim()[1]


def test_figures_that_are_not_finite_have_no_place_and_break_nothing():
    lost, good = Estimate(math.inf, 3.0, math.inf), Estimate(2.0, 1.0, 3.0)
    nowhere = Interval(math.nan, math.nan, math.nan)
    for figure in (
        pictures.split_bars({"a": {"x": lost, "y": good}}),
        pictures.split_bars({str(n): {"x": lost, "y": good} for n in range(6)}),
        pictures.differences([Difference("a", nowhere), Difference("b", Interval(0.1, 0.0, 0.2))]),
        pictures.shift_scatter({"a": [Point("a", math.nan, 1.0)], "b": [Point("b", 2.0, 3.0)]}),
        pictures.severities({"a": {0: good, 5: lost}}),
        pictures.split_bars({"a": {"x": nowhere}}),
    ):
        figure.savefig(io.BytesIO(), format="svg")
        assert all(math.isfinite(end) for end in (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()))
    texts = [text.get_text() for text in pictures.split_bars({"a": {"x": lost, "y": good}}).axes[0].texts]
    assert texts == ["nan", "2.000"]


@pytest.mark.parametrize("count", [1, 6])
def test_panels_are_laid_out_whatever_their_number(count):
    """Matplotlib warns where it finds no layout, and then lets labels lie on each other."""
    names = [f"m{n}" for n in range(count)]
    figures = [
        pictures.tuned({name: [(1e-4, 2.0), (1e-3, 1.0)] for name in names}, dict.fromkeys(names, 1e-3)),
        pictures.tuned({name: [(1e-4, 2.0), (1e-3, math.inf)] for name in names}, {}),
        pictures.reliability({name: [] for name in names}),
        pictures.severities({name: {0: Interval(0.5, None, None), 5: Interval(0.4, 0.3, 0.5)} for name in names}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures:
            figure.draw_without_rendering()


# ---- diagnosis and repair --------------------------------------------------------------------------------------------


def test_every_column_of_layer_scores_has_its_own_scale_and_its_figures():
    values = [[4.0, 1e-5], [1.0, 2e-5], [None, math.nan]]
    axes = pictures.layer_scores(values, ["a", "b", "c"], ["raw", "rms"], ["b"]).axes[0]
    assert [text.get_text() for text in axes.texts] == [
        "4.00",
        "1.00e\N{MINUS SIGN}5",
        "1.00",
        "2.00e\N{MINUS SIGN}5",
        *["\N{EN DASH}"] * 2,
    ]
    shades = [patch.get_facecolor() for patch in axes.patches]
    assert shades[0] == shades[3] and _luminance(shades[2]) > _luminance(shades[1]) > _luminance(shades[0])
    assert _luminance(shades[4]) == 1
    (frame,) = axes.patches[6:]
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((0, 1), 2, 1)


def test_columns_of_zeros_and_of_nothing_are_pale():
    axes = pictures.layer_scores([[0.0, None], [0.0, None]], ["a", "b"], ["x", "y"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "\N{EN DASH}"] * 2
    assert min(_luminance(patch.get_facecolor()) for patch in axes.patches) > 0.85


def test_flips_are_shares_of_their_split_and_net_lies_between():
    axes = pictures.flips({"a": (30, 10, 1000), "b": (3, 5, 50)}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([3.0, 6.0, -1.0, -10.0])
    (net,) = [line for line in axes.get_lines() if line.get_marker() == "D"]
    assert list(net.get_xdata()) == pytest.approx([2.0, -4.0])
    assert [text.get_text() for text in axes.texts] == ["30 fixed", "10 broken", "3 fixed", "5 broken"]


def test_a_path_is_drawn_in_order_and_only_the_chosen_share_is_marked():
    axes = pictures.mixture_path([(1.0, 2, 0.7), (0.0, 0, 0.9), (0.5, 6, 0.6)], 0.5).axes
    for one, values in zip(axes, ([0, 6, 2], [0.9, 0.6, 0.7]), strict=True):
        path, taken = one.get_lines()[:2]
        assert (list(path.get_xdata()), list(path.get_ydata())) == ([0, 0.5, 1], values)
        assert (list(taken.get_xdata()), list(taken.get_ydata())) == ([0.5], [values[1]])


def test_chosen_groups_are_filled_and_wide_scores_have_a_logarithmic_axis():
    points = {"seed 0": [(1.0, 2.0, True), (3.0, 1.0, False)], "seed 1": [(2.0, 0.0, False)]}
    axes = pictures.score_against_gain(points).axes[0]
    marks = [line for line in axes.get_lines() if line.get_marker() != "None"]
    filled = [line for line in marks if line.get_markerfacecolor() == line.get_markeredgecolor()]
    assert [list(line.get_xdata()) for line in filled if len(line.get_xdata())] == [[1.0]]
    assert sum(len(line.get_xdata()) for line in marks) == 3
    assert axes.get_xscale() == "linear"
    assert pictures.score_against_gain({"s": [(1e-3, 1, False), (1.0, 2, False)]}).axes[0].get_xscale() == "log"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.layer_scores([[math.inf, math.nan]], ["a"], ["x", "y"]),
        lambda: pictures.flips({"a": (0, 0, 0)}),
        lambda: pictures.mixture_path([(0.0, 0.0, math.nan)], 0.5),
        lambda: pictures.score_against_gain({"a": [(math.nan, 1.0, True)], "b": []}),
        lambda: pictures.score_against_gain({"a": [(0.0, 0.0, False)]}),
    ],
)
def test_nothing_breaks_where_there_is_little_to_draw(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw()
        figure.draw_without_rendering()
    assert all(math.isfinite(end) for axes in figure.axes for end in (*axes.get_xlim(), *axes.get_ylim()))


# ---- layers ----------------------------------------------------------------------------------------------------------


def layers(count, steps=12):
    blocks = [f"block.{n // 2}.{('attention', 'mlp')[n % 2]}" for n in range(count - 2)]
    values = [[10.0 ** ((row * 7 + step) % 5 - 3) for step in range(steps)] for row in range(count)]
    return values, ["embeddings", *blocks, "a_pattern_of_ones_own.with_a_long_name_indeed"], list(range(10, 130, 10))


def heat_map(count):
    return pictures.layer_heat_map(*layers(count), "norm")


def curves(count):
    values, groups, steps = layers(count)
    return pictures.layer_curves({"norm": values, "update": values}, groups, steps)


@pytest.mark.parametrize("count", [6, 14, 80])
@pytest.mark.parametrize("draw", [heat_map, curves])
def test_names_of_layer_groups_do_not_lie_on_each_other(draw, count):
    figure = draw(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    named = figure.axes[0] if draw is heat_map else figure.axes[-1]
    labels = [
        label.get_window_extent() for label in named.get_yticklabels() if label.get_text().startswith(("e", "b", "a"))
    ]
    if draw is curves and count <= 6:
        labels = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    labels = sorted(labels, key=lambda box: box.y0)
    assert len(labels) == (count if draw is heat_map else min(count, 12)), "a bar of shades names some"
    assert all(below.y1 <= above.y0 for below, above in pairwise(labels))
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in labels), "none is cut off"


def test_a_heat_map_has_equal_differences_for_equal_factors_and_no_shade_for_what_was_not_measured():
    values = [[1e-3, 1e-1, 10.0, None], [0.0, math.nan, math.inf, 1e-3]]
    mesh = pictures.layer_heat_map(values, ["a", "b"], [1, 2, 3, 4], "norm").axes[0].collections[0]
    shades = mesh.norm(mesh.get_array().reshape(2, 4))
    assert list(shades[0][:3]) == pytest.approx([0.0, 0.5, 1.0])
    assert list(shades.mask[0]) == [False, False, False, True] and list(shades.mask[1]) == [False, True, True, False]
    assert shades[1][0] == 0.0, "0 has no logarithm; it is shown as the smallest"
    straight = pictures.layer_heat_map([[0.2, 0.7]], ["a"], [1, 2], "share", logarithmic=False).axes[0].collections[0]
    assert list(straight.norm(straight.get_array().flatten())) == pytest.approx([0.2, 0.7]), "from 0 to 1"


def test_curves_of_many_groups_go_from_dark_to_light_and_few_have_their_styles():
    lines = curves(14).axes[0].get_lines()
    grey = [lightness(matplotlib.colors.to_hex(line.get_color())) for line in lines]
    assert grey == sorted(grey) and len(set(grey)) == 14 and grey[-1] < 80, "seen on white"
    assert [line.get_marker() for line in curves(6).axes[0].get_lines()] == [style.marker for style in STYLES[:6]]


def test_layers_may_lack_every_value_of_a_quantity_and_have_one_step():
    nothing = [[None], [None]]
    figure = pictures.layer_curves({"norm": [[1.0], [0.0]], "noise": nothing}, ["a", "b"], [5], linear=["noise"])
    figure.draw_without_rendering()
    assert figure.axes[0].get_lines()[0].get_marker() == "o", "a single value has no line"
    pictures.layer_heat_map(nothing, ["a", "b"], [5], "norm").draw_without_rendering()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pictures.shift_scatter({"a": []}), "at least one point"),
        (lambda: pictures.differences([]), "at least one row"),
        (lambda: pictures.tuned({}, {}), "at least one series"),
        (lambda: pictures.reliability({}), "at least one series"),
        (lambda: pictures.severities({}), "at least one curve"),
        (lambda: pictures.split_bars({"a": {}}), "at least one figure"),
        (lambda: pictures.layer_scores([], [], []), "must be 0 rows of 0"),
        (lambda: pictures.layer_scores([[1.0]], ["r"], ["a", "b"]), r"must be 1 rows of 2, got 1 rows of \[1\]"),
        (lambda: pictures.flips({}), "at least one split"),
        (lambda: pictures.mixture_path([], 0.5), "at least one point"),
        (lambda: pictures.score_against_gain({"a": []}), "at least one point"),
        (lambda: pictures.forgetting_matrix([], [], []), "must be 0 rows of 0"),
        (lambda: pictures.forgetting_matrix([[1.0]], ["r"], ["a", "b"]), r"must be 1 rows of 2, got 1 rows of \[1\]"),
        (lambda: pictures.layer_heat_map([[1.0]], ["a"], [1, 2], "norm"), r"must be 1 rows of 2, got 1 rows of \[1\]"),
        (lambda: pictures.layer_heat_map([], [], [], "norm"), "must be 0 rows of 0"),
        (lambda: pictures.layer_curves({}, ["a"], [1]), "at least one quantity"),
    ],
)
def test_what_cannot_be_shown_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
