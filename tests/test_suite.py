"""Suites: what their YAML means, and that each thing which is wrong with one is said in one line."""

import math

import numpy as np
import pytest

from hf_momentum import InputError
from hf_momentum.evaluation.measured import (
    Measured,
    changes_from,
    gaps,
    means_over_severities,
    robustness_of,
    scorer_of,
)
from hf_momentum.evaluation.suite import SuiteSplit, overridden_sources, read_suite
from hf_momentum.training.recipe import shipped_folder
from hf_momentum.training.suite_rows import load_suite

INSIDE = "movies: {role: in_distribution, source: m.jsonl}"


def suite(*splits: str, above: str = "task: sequence_classification"):
    return read_suite("\n".join([above, "splits:", *(f"  {split}" for split in splits)]), "mine")


# ---- what a suite means ----------------------------------------------------------------------------------------------


def test_what_stands_above_the_splits_holds_for_all_and_a_split_may_say_otherwise():
    made = suite(
        INSIDE,
        "news: {role: shifted, kind: time, source: n.jsonl, text_column: body, metrics: [f1]}",
        above="task: sequence_classification\ntext_column: review\nmetrics: [accuracy]\nmax_examples: 50",
    )
    assert [(split.text_column, split.metrics, split.max_examples) for split in made.splits] == [
        ("review", ("accuracy",), 50),
        ("body", ("f1",), 50),
    ]
    assert made.splits[1].kind == "time" and made.reference.name == "movies"


def test_a_corrupted_split_is_its_clean_one_in_all_but_the_corruption():
    made = suite(
        "movies: {role: in_distribution, source: m.jsonl, max_examples: 9, seed: 4, text_column: review}",
        "typos: {role: shifted, of: movies, corruption: typos, severities: [2, 4], seed: 7}",
    )
    _, two, four = made.splits
    assert (two.name, two.severity, four.name, four.severity) == ("typos_2", 2, "typos_4", 4)
    # The same examples are drawn as of the clean split: `seed` of a corrupted one is the corruption's.
    assert (two.source, two.text_column, two.max_examples, two.seed) == ("m.jsonl", "review", 9, 4)
    assert (two.corruption_seed, two.kind, two.of) == (7, "corruption", "movies")


def test_a_source_given_in_place_of_the_suites_has_the_columns_of_the_whole_suite():
    text = "task: sequence_classification\nsplits:\n  a: {role: in_distribution, source: hub/x, text_column: sentence}"
    assert read_suite(text, "mine").splits[0].text_column == "sentence"
    replaced = read_suite(text, "mine", overridden_sources(["a=mine.jsonl"])).splits[0]
    assert (replaced.source, replaced.text_column) == ("mine.jsonl", "text")


@pytest.mark.parametrize("path", sorted(shipped_folder("suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_are_read_and_survive_writing(path):
    made = load_suite(path.stem)
    assert made == load_suite(str(path)) and made.description
    assert read_suite(made.to_yaml(), made.name) == made
    assert {split.role for split in made.splits} >= {"in distribution", "shifted"}


# ---- what is wrong with a suite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["movies: {role: shifted, kind: domain, source: m}"], "no in-distribution split"),
        ([INSIDE, "movies: {role: in_distribution, source: n}"], "'movies' is given twice (line 4)"),
        ([INSIDE, "a: {role: shifted, source: n}"], "does not say how; add kind: with one of domain, corruption"),
        (["movies: {role: in_distribution, kind: domain, source: m}"], "only shifted splits have"),
        (
            [INSIDE, "a: {role: shiftd, kind: domain, source: n}"],
            "role 'shiftd' is not accepted (did you mean 'shifted'?)",
        ),
        (
            [INSIDE, "a: {role: shifted, kind: domian, source: n}"],
            "kind 'domian' is not accepted (did you mean 'domain'",
        ),
        ([INSIDE, "a: {source: n}"], "has no role; one of in_distribution"),
        (["movies: {role: in_distribution}"], "split 'movies' has no source"),
        (["movies: {role: in_distribution, source: m, lm_eval: arc_easy}"], "both source and lm_eval"),
        (["movies: {role: in_distribution, source: m, sauce: x}"], "unknown key 'sauce' (did you mean 'source'"),
        (["movies: {role: in_distribution, source: 3}"], "source must be text, got 3"),
        (["movies: {role: in_distribution, source: m, max_examples: 0}"], "max_examples must be at least 1, got 0"),
        (["movies: {role: in_distribution, source: m, max_examples: true}"], "must be a whole number, got True"),
        (["movies: {role: in_distribution, source: m, metrics: [acuracy]}"], "unknown metric 'acuracy'"),
        (["movies: {role: in_distribution, source: m, metrics: [f1, f1]}"], "a metric is given twice"),
        (["movies: {role: in_distribution, source: m, metrics: accuracy}"], "metrics must be a list"),
        (["movies: {role: in_distribution, source: m, task: causal_ml}"], "task 'causal_ml' is not accepted"),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: typoes, severity: 1}"], "did you mean 'typos'"),
        (
            [INSIDE, "t: {role: shifted, of: movie, corruption: typos, severity: 1}"],
            "no split 'movie' above it (did you",
        ),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: typos, severity: 6}"], "severity must be"),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: typos, severity: 0}"], "severity must be"),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: typos}"], "either severity: 1 to 5, or severities:"),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: typos, severities: [1, 1]}"], "different numbers"),
        ([INSIDE, "t: {role: shifted, of: movies, severity: 1}"], "corruption is missing"),
        ([INSIDE, "t: {role: must_not_forget, of: movies, corruption: typos, severity: 1}"], "its role is shifted"),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: typos, severity: 1, source: x}"], "unknown key 'source'"),
        ([INSIDE, "t: {role: shifted, of: movies, corruption: gaussian_noise, severity: 1}"], "gaussian_noise"),
        (["1: {role: in_distribution, source: m}"], "put it in quotes"),
        (["a/b: {role: in_distribution, source: m}"], "a name is made of letters"),
        (["movies: m.jsonl"], "expected keys such as role and source, got str"),
    ],
)
def test_bad_suites_are_refused_in_one_line(splits, message):
    with pytest.raises(InputError) as caught:
        suite(*splits)
    assert message in str(caught.value) and str(caught.value).startswith("mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splits: {a: [", "is not YAML"),
        ("- a\n- b", "is not a suite"),
        ("task: causal_lm", "needs `splits:`"),
        ("taks: causal_lm\nsplits: {}", "unknown key 'taks' (did you mean 'task'"),
    ],
)
def test_files_that_are_no_suites_are_refused(text, message):
    with pytest.raises(InputError, match="mine") as caught:
        read_suite(text, "mine")
    assert message in str(caught.value)


def test_sources_and_names_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no split 'film'.* it has movies, products"):
        load_suite("reviews", ["film=x.jsonl"])
    with pytest.raises(InputError, match="takes its rows from 'movies'; give that one a source"):
        load_suite("reviews", ["typos=x.jsonl"])
    with pytest.raises(InputError, match="NAME=SOURCE@SPLIT"):
        load_suite("reviews", ["movies"])
    with pytest.raises(
        InputError, match=r"no suite 'revews' \(did you mean 'reviews'\?\); shipped: cifar10, reviews, stdlib"
    ):
        load_suite("revews")
    with pytest.raises(InputError, match="max_examples must be at least 1"):
        load_suite("stdlib", max_examples=0)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not a text file in UTF-8"):
        load_suite(str(tmp_path / "bytes.yaml"))


# ---- from rows to differences ----------------------------------------------------------------------------------------


def classified(
    name: str, right: list[int], role: str = "shifted", of: str | None = None, severity: int = 0
) -> Measured:
    """Rows of a classifier of two classes that is right, or not, with confidence 0.8."""
    ones = np.array(right, dtype=np.float64)
    labels = np.arange(len(ones)) % 2
    predicted = np.where(ones == 1, labels, 1 - labels)
    losses = np.where(ones == 1, -math.log(0.8), -math.log(0.2))
    rows = np.stack([losses, np.ones_like(ones), ones, np.full_like(ones, 0.8), predicted, labels], axis=1)
    corruption = None if of is None else "typos"
    split = SuiteSplit(
        name,
        role,
        "domain" if role == "shifted" else None,
        task="sequence_classification",
        of=of,
        corruption=corruption,
        severity=severity,
    )
    return Measured(split, rows, scorer_of(split, 2))


CLEAN = classified("movies", [1, 1, 1, 0] * 50, "in distribution")


def test_a_corrupted_split_is_paired_with_its_clean_one_and_another_shift_is_not():
    """Where the same examples fail, a paired difference is certain, and one of two samples is not."""
    same = classified("typos", [1, 1, 1, 0] * 50, of="movies", severity=1)
    other = classified("news", [1, 1, 1, 0] * 50)
    (paired, unpaired) = gaps([CLEAN, same, other])
    assert paired.paired and str(paired.scores["accuracy"]) == "0.000 [0.000, 0.000]"
    assert not unpaired.paired and unpaired.scores["accuracy"].low < -0.03 < 0.03 < unpaired.scores["accuracy"].high


def test_the_mean_over_severities_is_that_of_the_splits_and_its_change_is_paired():
    one = classified("typos_1", [1, 1, 0, 0] * 50, of="movies", severity=1)
    two = classified("typos_2", [1, 0, 0, 0] * 50, of="movies", severity=2)
    (mean,) = means_over_severities([CLEAN, one, two])
    assert mean.scores["accuracy"].value == pytest.approx((0.5 + 0.25) / 2)
    assert mean.changes["accuracy"].value == pytest.approx((0.5 + 0.25) / 2 - 0.75)
    # Of examples that are all of a kind every sample has the same change: paired, and not two samples.
    certain = classified("movies", [1] * 60, "in distribution")
    worse = [classified(f"typos_{step}", [0] * 60, of="movies", severity=step) for step in (1, 2)]
    (mean,) = means_over_severities([certain, *worse])
    assert str(mean.changes["accuracy"]) == "-1.000 [-1.000, -1.000]"
    assert means_over_severities([CLEAN, one]) == [], "the mean of one is that one"


def test_effective_robustness_is_the_distance_from_the_baselines_line():
    """On a line with slope 1 through the origin of the logit scale, shifted accuracy is what it is in distribution."""
    baselines = {str(a): {"movies": {"accuracy": a}, "news": {"accuracy": a}} for a in (0.6, 0.7, 0.9)}
    news = classified("news", [1, 1, 1, 1, 0] * 40)
    (found,) = robustness_of([CLEAN, news], gaps([CLEAN, news]), baselines, "mine")
    assert found.effective.value == pytest.approx(0.8 - 0.75)
    assert found.effective.low < found.effective.value < found.effective.high
    (few,) = robustness_of([CLEAN, news], gaps([CLEAN, news]), dict(list(baselines.items())[:1]), "mine")
    assert few.line is None and few.effective is None and "at least 2" in few.reason


def language(tokens: list[int]) -> Measured:
    split = SuiteSplit("code", "in distribution")
    rows = np.array([[2.0 * count, count, 1.0, 10.0] for count in tokens])
    return Measured(split, rows, scorer_of(split))


def test_models_that_count_other_tokens_are_compared_in_bits_per_byte_alone():
    (same,) = changes_from([language([4, 5])], [language([4, 5])], "base")
    assert list(same.scores) == ["loss", "perplexity", "token_accuracy", "bits_per_byte"]
    (other,) = changes_from([language([4, 5])], [language([8, 10])], "base")
    assert list(other.scores) == ["bits_per_byte"]
    assert other.scores["bits_per_byte"].value == pytest.approx(2 * (18 - 9) / math.log(2) / 20)
