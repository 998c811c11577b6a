"""The exact tests are exact and calibrated, rows of many predictions count once, and a decision says why."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_momentum import InputError
from hf_momentum.diagnosis.results import Flips, Verified
from hf_momentum.diagnosis.verification import (
    decide,
    flips,
    mcnemar,
    negative_flip_rate,
    positive_flip_rate,
    row_p_value,
    verified,
)
from hf_momentum.evaluation.metrics import Estimate

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)


def binomial(fixed: int, broken: int) -> float:
    """The definition: both tails of a fair coin, as one fraction."""
    count = fixed + broken
    tail = sum(math.comb(count, k) for k in range(min(fixed, broken) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**count)))


# ---- flips -----------------------------------------------------------------------------------------------------------


@given(pairs)
def test_flips_are_counted_as_they_are_defined(given_pairs):
    before, after = (np.array([pair[side] for pair in given_pairs], dtype=bool) for side in (0, 1))
    found = flips(before, after)
    assert found == Flips(
        *(given_pairs.count(kind) for kind in [(False, True), (True, False), (True, True), (False, False)])
    )
    assert found.net == after.sum() - before.sum() and found.total == len(given_pairs)


def test_flip_rates_are_shares_of_all_predictions():
    found = Flips(fixed=62, broken=40, right=700, wrong=198)
    assert (positive_flip_rate(found), negative_flip_rate(found)) == (0.062, 0.04)
    with pytest.raises(ValueError, match="at least one prediction"):
        negative_flip_rate(Flips(0, 0, 0, 0))


def test_flips_of_other_examples_or_of_numbers_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        flips(np.zeros(2, bool), np.zeros(3, bool))
    with pytest.raises(ValueError, match="boolean arrays, got bool and int64"):
        flips(np.zeros(2, bool), np.array([2, 1]))


# ---- McNemar's test --------------------------------------------------------------------------------------------------


def test_p_values_worked_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 0) == 1.0
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 7) == 2 * (1 + 8) / 256
    assert mcnemar(4, 4) == 1.0


@given(st.integers(0, 700), st.integers(0, 700))
def test_p_values_are_the_binomial_ones(fixed, broken):
    assert mcnemar(fixed, broken) == pytest.approx(binomial(fixed, broken), rel=1e-9)
    assert mcnemar(fixed, broken) == mcnemar(broken, fixed)


def test_p_values_are_scipys_up_to_millions():
    stats = pytest.importorskip("scipy.stats", reason="scipy, which is only compared with, is not installed")
    for fixed, broken in [(500, 501), (560, 480), (10_400, 10_000), (1_000_000, 997_000), (1_000_000, 999_999)]:
        expected = min(1.0, 2 * stats.binom.cdf(min(fixed, broken), fixed + broken, 0.5))
        assert mcnemar(fixed, broken) == pytest.approx(expected, rel=1e-6)
    assert mcnemar(1_000_000, 1_000_000) == 1.0
    assert mcnemar(1_000_000, 0) == 0.0, "below what a float can hold"


def test_both_ways_to_sum_agree_where_they_meet(monkeypatch):
    summed = mcnemar(530, 470)
    monkeypatch.setattr("hf_momentum.diagnosis.verification._EXACT_UP_TO", 10)
    assert mcnemar(530, 470) == pytest.approx(summed, rel=1e-10)
    assert mcnemar(530, 470) != summed, "the other way was taken"


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="are counts, got -1 and 2"):
        mcnemar(-1, 2)


@pytest.mark.parametrize("count", [6, 25, 400])
def test_without_an_effect_at_most_one_in_twenty_is_significant(count):
    """Exactly, from the distribution itself: every outcome of `count` fair coins, weighed by how likely it is."""
    rejected = sum(math.comb(count, k) for k in range(count + 1) if mcnemar(k, count - k) < 0.05) / 2**count
    assert 0.01 < rejected <= 0.05


def test_drawn_flips_without_an_effect_are_significant_no_more_often_and_with_one_they_are():
    generator = np.random.default_rng(0)
    before = generator.random((2000, 300)) < 0.8
    for broken, fixed, low, high in [(0.1, 0.4, 0.02, 0.055), (0.05, 0.6, 0.9, 1.0)]:
        drawn = generator.random(before.shape)
        after = np.where(before, drawn >= broken, drawn < fixed)
        counts = [flips(one, other) for one, other in zip(before, after, strict=True)]
        share = np.mean([mcnemar(found.fixed, found.broken) < 0.05 for found in counts])
        assert low <= share <= high


# ---- rows of many predictions ----------------------------------------------------------------------------------------


def documents_without_effect(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """60 documents of 40 tokens. In each a change fixes tokens; a coin says which of the two models has it."""
    before = generator.random((60, 40)) < 0.7
    after = before | (generator.random(before.shape) < 0.3)
    swap = generator.random((60, 1)) < 0.5
    return np.where(swap, after, before), np.where(swap, before, after)


def test_over_tokens_mcnemar_rejects_what_is_not_there_and_over_rows_it_does_not():
    generator = np.random.default_rng(1)
    over_tokens, over_rows = [], []
    for _ in range(1000):
        before, after = documents_without_effect(generator)
        found = flips(before, after)
        over_tokens.append(mcnemar(found.fixed, found.broken) < 0.05)
        over_rows.append(row_p_value(before.sum(1), after.sum(1)) < 0.05)
    assert np.mean(over_tokens) > 0.2
    assert 0.01 < np.mean(over_rows) <= 0.055


def test_rows_without_a_net_change_do_not_count():
    before, after = np.array([5, 5, 5, 5, 5, 5, 9]), np.array([6, 6, 6, 6, 6, 9, 9])
    assert row_p_value(before, after) == mcnemar(6, 0)
    assert row_p_value(after, before) == mcnemar(0, 6)
    with pytest.raises(ValueError, match=r"\(7,\) and \(6,\)"):
        row_p_value(before, after[1:])


@given(pairs)
def test_rows_of_one_prediction_have_mcnemars_p_value(given_pairs):
    before, after = (np.array([pair[side] for pair in given_pairs], dtype=bool) for side in (0, 1))
    found = flips(before, after)
    assert row_p_value(before.astype(int), after.astype(int)) == mcnemar(found.fixed, found.broken)


# ---- one split -------------------------------------------------------------------------------------------------------


def test_a_split_of_single_predictions():
    generator = np.random.default_rng(2)
    before, after = generator.random(400) < 0.7, generator.random(400) < 0.8
    found = verified("check", "verification", "reviews@check", before, after)
    assert (found.name, found.role, found.source, found.examples) == ("check", "verification", "reviews@check", 400)
    assert found.flips == flips(before, after)
    assert found.p_value == mcnemar(found.flips.fixed, found.flips.broken)
    assert found.rows_better is None and found.rows_worse is None
    assert (found.before.value, found.after.value) == (before.mean(), after.mean())
    half = 1.96 * math.sqrt(found.after.value * (1 - found.after.value) / 400)
    assert found.after.high - found.after.low == pytest.approx(2 * half, rel=0.15)


def test_a_split_of_documents_is_tested_and_resampled_by_documents():
    generator = np.random.default_rng(3)
    before, after = documents_without_effect(generator)
    found = verified("news", "shifted", "news@test", iter(before), iter(after))
    assert found.examples == 60 and found.flips == flips(before, after)
    assert found.p_value == row_p_value(before.sum(1), after.sum(1)) != mcnemar(found.flips.fixed, found.flips.broken)
    assert (found.rows_better, found.rows_worse) == tuple(
        int(np.sum(np.sign(after.sum(1) - before.sum(1)) == sign)) for sign in (1, -1)
    )
    by_token = verified("news", "shifted", "news@test", before.reshape(-1), after.reshape(-1))
    assert by_token.before.value == found.before.value
    assert found.before.high - found.before.low > 1.1 * (by_token.before.high - by_token.before.low)


def test_documents_of_different_lengths_weigh_by_their_tokens_and_empty_ones_not_at_all():
    before = [np.array([True]), np.array([], dtype=bool), np.array([False, False, True])]
    after = [np.array([True]), np.array([], dtype=bool), np.array([True, True, False])]
    found = verified("a", "shifted", "a@test", before, after)
    assert (found.examples, found.before.value, found.after.value) == (2, 0.5, 0.75)
    assert found.flips == Flips(2, 1, 1, 0) and (found.rows_better, found.rows_worse) == (1, 0)


def test_splits_that_cannot_be_compared_are_refused():
    row = np.array([True])
    with pytest.raises(ValueError, match="split 'a': after has only 1 rows"):
        verified("a", "shifted", "a@test", [row, row], [row])
    with pytest.raises(ValueError, match=r"\(1,\) and \(2,\)"):
        verified("a", "shifted", "a@test", [row], [np.array([True, False])])
    with pytest.raises(InputError, match=r"split 'a' \(a@test\) has no predictions"):
        verified("a", "shifted", "a@test", [], [])


# ---- the decision ----------------------------------------------------------------------------------------------------

EVEN = Estimate(0.8, 0.7, 0.9)


def split(name: str, fixed: int, broken: int, role: str = "shifted") -> Verified:
    counted = Flips(fixed, broken, 800, 1000 - 800 - fixed - broken)
    return Verified(name, role, f"{name}@test", 1000, counted, mcnemar(fixed, broken), EVEN, EVEN)


GAIN = split("check", 62, 40, "verification")


@pytest.mark.parametrize(
    ("check", "others", "accepted", "said"),
    [
        (GAIN, [], True, ["net +22: a gain", "p = 0.0371, below 0.05", "No other split was looked at"]),
        (GAIN, [split("news", 40, 40)], True, ["No significant loss on the other split"]),
        (GAIN, [split("news", 30, 40)], True, ["news (shifted, news@test): 30 fixed and 40 broken", "a loss, not sig"]),
        (GAIN, [split("news", 20, 60)], False, ["A significant loss on the other split", "net -40"]),
        (GAIN, [split("news", 60, 20)], True, ["No significant loss on the other split"]),
        (split("check", 60, 41), [], False, ["net +19: a gain", "p = 0.0728, not below 0.05: not significant"]),
        (split("check", 40, 62), [], False, ["net -22: no gain", "p = 0.0371, below 0.05"]),
        (split("check", 0, 0), [], False, ["net +0: no gain", "p = 1, not below 0.05"]),
    ],
)  # fmt: skip
def test_a_repair_is_kept_by_the_rule_and_each_part_of_it_is_said(check, others, accepted, said):
    decision = decide(check, others)
    assert decision.accepted is accepted
    text = "\n".join(decision.reasons)
    assert all(words in text for words in said), text


def test_a_loss_among_many_splits_must_be_significant_over_all_of_them():
    loss = split("news", 40, 62)
    assert not decide(GAIN, [loss]).accepted
    among = decide(GAIN, [loss, split("mail", 30, 30), split("code", 31, 30)])
    assert among.accepted and "p = 0.0371 (over 3 splits p = 0.111): a loss, not significant" in among.reasons[-1]
    assert len(among.reasons) == 4, "splits without a loss are not listed"


def test_significant_losses_are_said_first():
    reasons = decide(GAIN, [split("mail", 30, 40), split("news", 10, 60)]).reasons
    assert reasons[2] == "A significant loss on 1 of the 2 other splits."
    assert reasons[3].startswith("news") and reasons[4].startswith("mail")


def test_a_stricter_alpha_is_kept_to():
    assert decide(GAIN, [], alpha=0.05).accepted and not decide(GAIN, [], alpha=0.01).accepted
    with pytest.raises(InputError, match="alpha must be between 0 and 1, got 5"):
        decide(GAIN, [], alpha=5)


def test_one_document_that_gains_much_does_not_outweigh_many_that_lose():
    """The p-value of rows is two-sided: it may be small because most rows are worse, though more tokens are right."""
    before = [np.zeros(200, dtype=bool)] + [np.ones(10, dtype=bool)] * 20
    after = [np.ones(200, dtype=bool)] + [np.array([False] + [True] * 9)] * 20
    found = verified("check", "verification", "text@check", before, after)
    assert found.flips.net == 180 and found.p_value < 0.001
    decision = decide(found, [])
    assert not decision.accepted
    assert "net +180, 1 of 21 rows better and 20 worse: no gain" in decision.reasons[0]
    assert not decide(GAIN, [replace(found, role="shifted")]).accepted, "a loss of most rows is a loss elsewhere too"
    turned = verified("news", "shifted", "news@test", after, before)
    assert not decide(turned, []).accepted, "nor do many that gain a little outweigh one that loses more"
    kept = decide(GAIN, [turned])
    assert kept.accepted and "a loss in all, though more rows are better" in kept.reasons[-1]
