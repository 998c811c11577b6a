"""Each rule chooses what its definition says, in the order of the model; agreement of rankings is counted exactly."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_momentum import InputError
from hf_momentum.diagnosis.choice import Rule, above, choose, largest, summing_to, within
from hf_momentum.diagnosis.overlap import Correlation, Overlap, overlap, spearman

NAMES = ["embeddings", "block.0", "block.1", "block.2", "head"]
SCORES = [0.5, 0.25, 2.0, 0.25, 1.0]
PARAMETERS = [600, 100, 150, 100, 50]

score_lists = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=8)
shares = st.integers(1, 20).map(lambda twentieth: twentieth / 20)


def chosen(**rule) -> list[str]:
    return choose(NAMES, SCORES, PARAMETERS, Rule(**rule))


# ---- known answers ---------------------------------------------------------------------------------------------------


def test_top_takes_the_largest_and_names_them_in_the_order_of_the_model():
    assert chosen(top=3) == ["embeddings", "block.1", "head"]
    assert chosen(top=5) == NAMES


def test_threshold_is_mean_plus_z_population_deviations():
    # Worked by hand: mean 0.8, variance (0.09 + 0.3025 + 1.44 + 0.3025 + 0.04) / 5 = 0.435, deviation 0.6595.
    assert chosen(threshold=0) == ["block.1", "head"]
    assert chosen(threshold=0.303) == ["block.1", "head"]
    assert chosen(threshold=0.304) == ["block.1"]
    assert chosen(threshold=-0.5) == ["embeddings", "block.1", "head"]


def test_cumulative_is_the_fewest_groups_that_reach_the_share():
    # Of a sum of 4: 2, 3, 3.5, 3.75, 4.
    assert chosen(cumulative=0.5) == ["block.1"]
    assert chosen(cumulative=0.51) == ["block.1", "head"]
    assert chosen(cumulative=0.75) == ["block.1", "head"]
    assert chosen(cumulative=0.9) == ["embeddings", "block.0", "block.1", "head"]
    assert chosen(cumulative=1.0) == NAMES


def test_a_budget_passes_over_what_does_not_fit_and_goes_on():
    assert chosen(budget=0.05) == ["head"]
    assert chosen(budget=0.3) == ["block.0", "block.1", "head"], (
        "embeddings (0.6) score more than block.0, but are too large"
    )
    assert chosen(budget=0.2) == ["block.1", "head"]
    assert chosen(budget=0.8) == ["embeddings", "block.1", "head"]
    assert chosen(budget=1.0) == NAMES


def test_a_share_that_floating_point_cannot_hold_still_fits():
    assert 0.29 * 100 < 29, "the trap that this is about"
    assert within(["a", "b"], [1.0, 0.5], [29, 71], 0.29) == [0]
    assert math.fsum([0.7, 0.2]) < 0.9 * math.fsum([0.7, 0.1, 0.2]), "and the same trap in a sum of scores"
    assert summing_to([0.7, 0.1, 0.2], 0.9) == [0, 2]


@pytest.mark.parametrize("rule", [{"top": 2}, {"cumulative": 0.5}, {"budget": 0.5}])
def test_of_equal_scores_the_first_in_the_model_are_taken(rule):
    assert choose(list("abcd"), [1.0] * 4, [10] * 4, Rule(**rule)) == ["a", "b"]


# ---- what holds for all scores ---------------------------------------------------------------------------------------


@given(score_lists, st.data())
def test_no_group_left_out_scores_more_than_one_taken(scores, data):
    taken = largest(scores, data.draw(st.integers(1, len(scores))))
    left = set(range(len(scores))) - set(taken)
    assert all(scores[out] <= scores[one] for out in left for one in taken)
    assert all(out > one for out in left for one in taken if scores[out] == scores[one])


@given(score_lists.filter(any), shares)
def test_no_smaller_set_reaches_the_share(scores, share):
    taken = summing_to(scores, share)
    wanted = share * sum(scores) - 1e-9
    assert sum(scores[place] for place in taken) >= wanted
    assert all(sum(few) < wanted for few in combinations(scores, len(taken) - 1))


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(1, 50)), min_size=1, max_size=8), shares)
def test_a_budget_is_kept_and_nothing_that_would_have_fitted_is_left(groups, share):
    scores, parameters = [score for score, _ in groups], [count for _, count in groups]
    names = [str(place) for place in range(len(groups))]
    budget = share * sum(parameters) + 1e-9
    if min(parameters) > budget:
        with pytest.raises(InputError, match="fits no group"):
            within(names, scores, parameters, share)
        return
    taken = within(names, scores, parameters, share)
    used = sum(parameters[place] for place in taken)
    assert taken and used <= budget
    assert all(used + parameters[place] > budget for place in range(len(groups)) if place not in taken)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8), st.floats(-3, 3))
def test_a_threshold_that_chooses_none_says_which_would_choose_one(scores, z):
    try:
        taken = above(scores, z)
    except InputError as error:
        if "all scores are" in str(error):
            assert np.std(scores) <= 1e-9 * max(scores)
        else:
            limit = float(str(error).split("; below ")[1].split(" ")[0])
            assert limit <= z * (1 + 1e-9) and above(scores, 0.999 * limit), "what the message says must do"
    else:
        assert scores.index(max(scores)) in taken


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one of top, threshold, cumulative and budget; got none"),
        ({"top": 1, "budget": 0.5}, "got top and budget"),
        ({"top": 0}, "top must be a whole number of at least 1, got 0"),
        ({"top": 2.5}, "top must be a whole number of at least 1, got 2.5"),
        ({"threshold": math.nan}, "threshold must be a finite number"),
        ({"cumulative": 0}, "cumulative must be a share above 0 and up to 1, got 0"),
        ({"cumulative": math.nan}, "cumulative must be a share above 0 and up to 1, got nan"),
        ({"budget": 1.5}, "budget must be a share above 0 and up to 1, got 1.5"),
    ],
)
def test_a_rule_that_is_none_is_refused(rule, message):
    with pytest.raises(InputError, match=message):
        Rule(**rule)


@pytest.mark.parametrize(
    ("scores", "rule", "message"),
    [
        ([0.1, math.nan, 0.2], Rule(top=1), "the score of b is nan"),
        ([0.1, 0.2, math.inf], Rule(top=1), "the score of c is inf"),
        ([0.1, 0.2], Rule(top=1), "got 3 names, 2 scores and 3 parameter counts"),
        ([0.1, 0.2, 0.3], Rule(top=4), "top must be at most the number of groups, 3; got 4"),
        ([0.1, 0.1, 0.1], Rule(threshold=-1), "all scores are 0.1; use top"),
        ([0.1, 0.1, 0.4], Rule(threshold=2), "below 1.41 it would choose one"),
        ([0.0, 0.0, 0.0], Rule(cumulative=0.5), "all scores are 0"),
        ([0.1, -0.1, 0.3], Rule(cumulative=0.5), "scores of at least 0, got -0.1"),
        ([0.1, 0.2, 0.3], Rule(budget=0.2), "the smallest, b, needs 0.248 of all parameters"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(scores, rule, message):
    with pytest.raises(InputError, match=message):
        choose(["a", "b", "c"], scores, [300, 200, 308], rule)


def test_scores_that_differ_in_the_last_bit_alone_still_have_a_largest():
    assert above([1.0, 1.0 + 2**-52], 0.9) == [1]
    with pytest.raises(InputError, match="below 1 it would choose one"):
        above([1.0, 1.0 + 2**-52], 1.0)


def test_a_budget_of_what_the_message_says_fits():
    assert within(["a", "b", "c"], [0.1, 0.2, 0.3], [300, 200, 308], 0.248) == [1]


# ---- agreement of rankings -------------------------------------------------------------------------------------------


def test_rank_correlations_worked_by_hand():
    # 1 - 6 * (1 + 1) / (4 * 15) = 0.8; of 24 permutations 8 have |r| >= 0.8: one of 1, three of 0.8, and their mirrors.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == Correlation(0.8, 8 / 24, True)
    assert spearman([1, 2, 3], [9, 5, 1]) == Correlation(-1.0, 2 / 6, True)
    # Ranks 1, 2.5, 2.5, 4: only 12 orders differ, of which 2 are as monotonous as can be.
    assert spearman([1, 2, 2, 9], [0, 3, 3, 4]) == Correlation(1.0, pytest.approx(2 * 2 / 24), True)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2)))
def test_rank_correlations_are_scipys_and_p_values_count_permutations(two):
    stats = pytest.importorskip("scipy.stats", reason="scipy, which is only compared with, is not installed")
    first, second = two
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
        return
    assert found.value == pytest.approx(stats.spearmanr(first, second).statistic)
    ranks = stats.rankdata(first), stats.rankdata(second)
    every = [abs(np.corrcoef(ranks[0], order)[0, 1]) for order in permutations(ranks[1])]
    assert found.p_value == pytest.approx(np.mean([r >= abs(found.value) - 1e-9 for r in every]))


def test_nine_groups_are_counted_and_ten_are_drawn_with_nearly_the_same_p():
    stats = pytest.importorskip("scipy.stats", reason="scipy, which is only compared with, is not installed")
    first, second = list(range(9)), [2, 0, 1, 4, 3, 8, 5, 7, 6]
    exact = spearman(first, second)
    assert exact.exact and exact.p_value * math.factorial(9) == pytest.approx(round(exact.p_value * math.factorial(9)))
    # Student's approximation is near, and no more, at so few groups.
    assert exact.p_value == pytest.approx(stats.spearmanr(first, second).pvalue, rel=0.5)
    drawn = spearman([*first, 9], [2, 9, 5, 1, 0, 4, 3, 8, 7, 6])
    assert not drawn.exact and drawn == spearman([*first, 9], [2, 9, 5, 1, 0, 4, 3, 8, 7, 6])
    assert drawn.p_value == pytest.approx(stats.spearmanr([*first, 9], [2, 9, 5, 1, 0, 4, 3, 8, 7, 6]).pvalue, abs=0.03)


def test_a_drawn_p_value_is_never_0():
    assert spearman(range(40), range(40)) == Correlation(1.0, 1 / 10_001, False)


def test_lists_that_do_not_belong_together_have_no_correlation():
    with pytest.raises(InputError, match="got 2 and 3"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="got nan"):
        spearman([1, math.nan], [1, 2])
    assert spearman([1], [2]) is None


# ---- overlap ---------------------------------------------------------------------------------------------------------


def test_the_same_three_of_seven_are_one_in_thirty_five_by_chance():
    assert overlap("abc", "cba", 7) == Overlap(3, pytest.approx(9 / 7), pytest.approx(1 / 35))
    assert overlap("abc", "cde", 7).p_value == pytest.approx(31 / 35), "4 of 35 have none in common"
    assert overlap("abc", "def", 7) == Overlap(0, pytest.approx(9 / 7), 1.0)
    assert overlap("", "abc", 3) == Overlap(0, 0.0, 1.0)


@given(st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)), st.integers(12, 20))
def test_overlaps_are_as_likely_as_scipy_says(first, second, total):
    stats = pytest.importorskip("scipy.stats", reason="scipy, which is only compared with, is not installed")
    found = overlap(first, second, total)
    assert found.common == len(first & second)
    assert found.p_value == pytest.approx(stats.hypergeom.sf(found.common - 1, total, len(first), len(second)))


def test_more_groups_than_there_are_is_refused():
    with pytest.raises(InputError, match="at least the 4 groups"):
        overlap("ab", "cd", 3)
