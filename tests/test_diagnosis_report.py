"""Reports of a diagnosis and of its baselines say what the figures say, in words that follow from them."""

import json
import math
import re
from dataclasses import replace

import pytest

from hf_momentum.diagnosis.baselines_report import BaselinesReport, Difference
from hf_momentum.diagnosis.diagnosis_report import DiagnosisReport
from hf_momentum.diagnosis.report_parts import percent
from hf_momentum.diagnosis.results import SCORES, Attribution, BaselineRun, Compared, Flips, GroupFacts
from hf_momentum.errors import InputError
from hf_momentum.evaluation.document import Picture, Table
from hf_momentum.evaluation.intervals import Interval
from hf_momentum.evaluation.metrics import Estimate
from tests import diagnosis_specimen

GROUPS = [GroupFacts(f"block.{place}", "block", size) for place, size in enumerate([300, 100, 500, 100])]


def around(values, half=0.1):
    return [Estimate(value, value - half, value + half) for value in values]


def attribution(raw, predictions=40, noise=None):
    return Attribution(predictions, 8, 1.5, {name: around(raw) for name in SCORES}, noise)


def made(contrast=(1.0, 4.0, 2.0, 3.0), first=(0.0, 0.9, 0.0, 0.1), half=0.1, **fields):
    """A diagnosis of four groups, of which block.1 is first."""
    raw, right = [2.0, 8.0, 4.0, 6.0], attribution([2.0, 2.0, 2.0, 2.0])
    trained = Compared(attribution(raw), right, around(contrast, half), list(first))
    random = Compared(attribution([1.0, 2.0, 3.0, 4.0]), right, around([2.0, 1.0, 4.0, 3.0]), [0.25] * 4)
    plain = {"trained": trained, "random": random, "groups": GROUPS, "errors": 50, "right": 150, "looked_at": 200}
    return DiagnosisReport("m", "d", "t", "example", **{**plain, **fields})


def table(report, *words):
    """The table whose header has all these words, as rows by their first cell."""
    blocks = report.document().blocks
    (found,) = [one for one in blocks if isinstance(one, Table) and set(words) <= set(one.header)]
    return {row[0]: dict(zip(found.header, row, strict=True)) for row in found.rows}


# ---- what a diagnosis says -------------------------------------------------------------------------------------------


def test_the_table_has_the_figures_in_the_order_of_the_ranking():
    rows = table(made(chosen=["block.1"]), "rank")
    assert list(rows) == ["**block.1**", "block.3", "block.2", "block.0"]
    assert rows["**block.1**"] == {
        "group": "**block.1**",
        "rank": "1",
        "contrast [95 %]": "4.00 [3.90, 4.10]",
        "raw [95 %]": "8.00 [7.90, 8.10]",
        "first in resamples": "90.0 %",
        "parameters": "100",
        "of all": "10.0 %",
    }


def test_noise_has_a_column_and_a_warning_where_it_is_more_than_half_of_a_chosen_group():
    loud = made().trained
    assert loud is not None
    for noise, warned in (([0.9, 0.51, 0.1, 0.1], True), ([0.9, 0.49, 0.1, 0.1], False)):
        report = made(trained=replace(loud, errors=replace(loud.errors, noise=noise)), chosen=["block.1"])
        assert table(report, "rank")["block.0"]["noise share"] == "90.0 %"
        assert any("of block.1 is what the choice" in said for said in report.sentences()) == warned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "point to block.1 (contrast 4.00 [3.90, 4.10], first in 90.0 % of resamples)."),
        ({"first": (0.3, 0.49, 0.0, 0.21)}, "not stable: block.1 is first in only 49.0 % of resamples."),
        ({"contrast": (1.0, 4.0, 2.0, 3.89)}, "first in 90.0 % of resamples)."),  # 0.09 in common of 0.2
        (
            {"contrast": (1.0, 4.0, 2.0, 3.91)},
            "not stable: its interval 4.00 [3.90, 4.10] and that of block.3, 3.91 [3.81, 4.01], overlap widely.",
        ),
        ({"contrast": (1.0, 4.0, 2.0, 3.95), "first": (0, 0.4, 0, 0.6)}, "40.0 % of resamples and its interval"),
        (
            {"chosen": ["block.1", "block.3"], "rule": "top 2"},
            "of resamples). Chosen (top 2): block.1 and block.3.",
        ),
        ({"score": "taylor"}, "point to block.1 (taylor 8.00 [7.90, 8.10])."),
    ],
)
def test_the_verdict_names_the_first_group_and_how_sure_it_is(change, said):
    report = made(**change)
    assert said in report.verdict()
    assert ("do not point clearly" in report.verdict()) == ("not stable" in said or "and its interval" in said)


@pytest.mark.parametrize(("reach", "doubted"), [(3.99, False), (4.01, True)])
def test_intervals_overlap_widely_by_half_of_the_narrower_one(reach, doubted):
    trained = made().trained
    assert trained is not None
    contrast = [*around([1.0, 4.0, 2.0], 0.05), Estimate(3.0, 1.0, reach)]
    report = made(trained=replace(trained, contrast=contrast))
    # the narrower reaches from 3.95 to 4.05, so that half of it ends at 4.00
    assert bool(report.doubts()) == doubted
    assert doubted == ("overlap widely" in report.verdict())


def test_few_errors_are_warned_of_with_the_width_of_the_interval():
    trained = made().trained
    assert trained is not None
    for number, warned in ((19, True), (20, False)):
        few = replace(trained, errors=attribution([2.0, 8.0, 4.0, 6.0], number))
        warnings = [one for one in made(trained=few).sentences() if one.startswith("Warning")]
        assert len(warnings) == warned
        said = "Warning: 19 errors are few. The interval of block.1 is 0.200 wide around a score of 4.00"
        assert not warned or said in warnings[0]


def test_no_errors_are_nothing_to_learn_from(tmp_path):
    report = made(trained=None, random=None, errors=0, right=200)
    assert report.verdict() == "m has none of 200 examples of d wrong: there is nothing to learn from."
    assert not report.document().pictures and report.controls == [] == report.ranking
    assert json.loads(report.to_json())["trained"] is None
    assert DiagnosisReport.from_json(report.to_json()).to_json() == report.to_json()
    assert report.write(tmp_path).exists()


def test_errors_without_scores_are_not_called_none():
    assert made(trained=None).verdict() == "50 of 200 examples are wrong, but no gradient of them was taken."


def test_without_right_predictions_raw_ranks_and_says_so():
    report = made(trained=Compared(attribution([2.0, 8.0, 4.0, 6.0]), None, [], [0, 1, 0, 0]), right=0)
    assert report.ranked_by == "raw" and "point to block.1 (raw 8.00" in report.verdict()
    assert any("the raw score ranks" in said for said in report.sentences())
    assert not {"contrast", "right: raw"} & set(report.columns)
    assert "raw" not in [control.name for control in report.controls], "it is the ranking itself"


def test_a_score_that_is_not_finite_ranks_last():
    report = made(contrast=(1.0, math.nan, 2.0, 3.0))
    assert report.ranking == ["block.3", "block.2", "block.0", "block.1"]
    assert {control.words for control in report.controls} == {"nothing: a score is not a number"}
    report.document().to_html()


# ---- controls --------------------------------------------------------------------------------------------------------


def test_controls_are_rank_correlations_over_the_groups():
    found = {one.name: one.correlation and one.correlation.value for one in made().controls}
    # ranks of the contrast: 1 4 2 3; random contrast 2 1 4 3, random raw 1 2 3 4: 1 - 6 sum d^2 / 60
    assert found["random: contrast"] == pytest.approx(1 - 6 * (1 + 9 + 4 + 0) / 60)
    assert found["random: raw"] == pytest.approx(1 - 6 * (0 + 4 + 1 + 1) / 60)
    assert found["raw"] == pytest.approx(1.0) and found["right: raw"] is None
    # sizes 300 100 500 100 have ranks 3 1.5 4 1.5: means 2.5, products of deviations over their norms
    assert found["parameters"] == pytest.approx((-1.5 * 0.5 + 1.5 * -1 - 0.5 * 1.5 + 0.5 * -1) / math.sqrt(5 * 4.5))


@pytest.mark.parametrize(
    ("contrast", "caution"),
    [
        ([2.0, 1.0, 4.0, 3.0], None),
        ([1.0, 4.0, 2.0, 3.0], "more about the architecture than about the errors"),
    ],
)
def test_a_random_model_that_ranks_alike_is_a_caution(contrast, caution):
    random = made().random
    assert random is not None
    said = made(random=replace(random, contrast=around(contrast))).sentences()
    assert any(one.startswith("Caution: the ranking is close to that of a random model") for one in said) == bool(
        caution
    )
    assert caution is None or any(caution in one for one in said)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([10, 40, 20, 30], "large groups are first whatever"),
        ([40, 10, 30, 20], "small groups are first whatever"),
    ],
)
def test_a_ranking_by_size_is_a_caution_in_both_directions(sizes, words):
    groups = [replace(group, parameters=size) for group, size in zip(GROUPS, sizes, strict=True)]
    cautions = [one for one in made(groups=groups).sentences() if one.startswith("Caution")]
    assert len(cautions) == 1 and words in cautions[0]
    assert "it may be chance (p = " in cautions[0], "of four groups nothing is significant"


def test_twelve_groups_in_the_same_order_are_no_chance():
    report = diagnosis_specimen.diagnosis(12)
    assert report.trained is not None
    same = replace(report, random=report.trained)
    (control,) = [one for one in same.controls if one.name == "random: contrast"]
    assert control.caution and "chance" not in control.words and control.correlation.p_value < 0.05


def test_a_missing_random_model_is_said():
    report = made(random=None)
    assert any("No random model" in said for said in report.sentences())
    assert not any("random" in name for name in (*report.columns, *(one.name for one in report.controls)))


def test_the_picture_has_every_score_of_every_group():
    (picture,) = made().document().pictures
    texts = [text.get_text() for text in picture.figure.axes[0].texts]
    assert len(made().columns) == 9 and len(texts) == 36
    assert texts[9:18] == ["4.00", "8.00", "8.00", "8.00", "8.00", "2.00", "2.00", "1.00", "2.00"]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "report", [made(), made(random=None), diagnosis_specimen.diagnosis()], ids=["plain", "no random", "specimen"]
)
def test_a_diagnosis_comes_back_from_its_record(report):
    assert DiagnosisReport.from_json(report.to_json()).to_json() == report.to_json()
    content = json.loads(report.to_json())
    assert content["found"]["verdict"] == report.verdict() and content["found"]["ranking"] == report.ranking


@pytest.mark.parametrize("cls", [DiagnosisReport, BaselinesReport])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: "no json", "x.json is not JSON"),
        (lambda content: json.dumps({**content, "kind": "hf-momentum evaluation"}), "x.json is no report of `hf-mom"),
        (lambda content: json.dumps([1]), "x.json is no report of `hf-mom"),
        (lambda content: json.dumps({**content, "surprise": 1}), "another version .*surprise"),
        (lambda content: json.dumps({"kind": content["kind"]}), "another version"),
    ],
)
def test_what_is_no_report_is_refused(cls, spoil, message):
    report = made() if cls is DiagnosisReport else against([[1, 2, 3]])
    with pytest.raises(InputError, match=message):
        cls.from_json(spoil(json.loads(report.to_json())), "x.json")


@pytest.mark.parametrize(
    ("make", "plots"),
    [
        (diagnosis_specimen.diagnosis, {"layer_scores.png"}),
        (diagnosis_specimen.baselines, {"score_against_gain.png", "net_gain.png"}),
    ],
)
def test_reports_write_a_page_and_its_records(tmp_path, make, plots):
    report = make()
    assert report.write(tmp_path) == tmp_path / "report.html"
    assert {path.name for path in (tmp_path / "plots").iterdir()} == plots
    assert report.verdict() in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.json").read_text() == report.to_json()


@pytest.mark.parametrize(
    ("share", "said"), [(1.5, "150 %"), (0.99951, "100 %"), (0.9994, "99.9 %"), (0.00002, "0.002 %"), (0, "0 %")]
)
def test_shares_keep_what_counts(share, said):
    assert percent(share) == said


# ---- baselines -------------------------------------------------------------------------------------------------------


def run(method, seed, net, groups=("g0",), parameters=10, rate=1e-3, **shifted):
    flips = Flips(20 + net, 20, 800, 150)
    return BaselineRun(method, seed, groups, parameters, rate, 1.0, 100, flips, 0.05, shifted)


def against(gains, scores=(1.0, 2.0, 3.0), controls=None, more=()):
    """Single groups g0, g1, ... with their gains at each seed; scores are alike at all seeds unless they are lists."""
    names = [f"g{place}" for place in range(len(gains[0]))]
    runs = [
        run(f"group:{name}", seed, net, [name], 10 * (place + 1))
        for seed, nets in enumerate(gains)
        for place, (name, net) in enumerate(zip(names, nets, strict=True))
    ]

    def by_seed(values):
        each = values if isinstance(values[0], list) else [values] * len(gains)
        return [dict(zip(names, one, strict=True)) for one in each]

    columns = {name: by_seed(values) for name, values in (controls or {}).items()}
    return BaselinesReport(
        "t",
        "example",
        [*runs, *more],
        {seed: {"contrast": one} for seed, one in enumerate(by_seed(scores))},
        {seed: {name: column[seed] for name, column in columns.items()} for seed in range(len(gains))},
        "top 1",
    )


SIX = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
ALIKE = [[1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [1, 3, 2, 4, 5, 6], [2, 1, 3, 4, 6, 5]]
TURNED = [one[::-1] for one in ALIKE]
NEITHER = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [2, 1, 3, 4, 6, 5], [5, 6, 4, 3, 1, 2]]
SIZES_NOT = [3.0, 6.0, 1.0, 5.0, 2.0, 4.0]


def of_sizes(report, sizes):
    """The same with another number of parameters for each group, which else is as the contrast is."""
    known = dict(zip([f"g{place}" for place in range(6)], sizes, strict=True))
    return replace(report, runs=[replace(one, parameters=int(known[one.groups[0]])) for one in report.runs])


def test_correlations_are_spearman_s_at_each_seed():
    report = against([[1, 2, 4, 3], [4, 3, 2, 1]], (1.0, 2.0, 3.0, 4.0), {"right-raw": [4.0, 3.0, 2.0, 1.0]})
    assert report.correlations["contrast"] == pytest.approx({0: 0.8, 1: -1.0})
    assert report.correlations["right-raw"] == pytest.approx({0: -0.8, 1: 1.0})
    assert report.correlations["number of parameters"] == pytest.approx({0: 0.8, 1: -1.0})


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (
            of_sizes(against(ALIKE, SIX, {"right-raw": [*SIX[::-1]]}), SIZES_NOT),
            "The diagnosis was worth something: the rank correlation of contrast with the net gain of single groups "
            "is 0.94",
        ),
        (
            of_sizes(against(ALIKE, SIX, {"right-raw": [*SIX]}), SIZES_NOT),
            "was not shown to do it better than raw norm of right predictions, which knows nothing of the errors",
        ),
        (against(ALIKE, SIX), "was not shown to do it better than number of parameters, which knows nothing"),
        (
            of_sizes(
                against(
                    ALIKE, [2.0, 3.0, 1.0, 4.0, 6.0, 5.0], {"random-contrast": [[float(x) for x in s] for s in ALIKE]}
                ),
                SIZES_NOT,
            ),
            "but contrast of a random model foretold it better",
        ),
        (against(TURNED, SIX), "The diagnosis misled: "),
        (against(NEITHER, SIX), "was not shown to be worth anything: the rank correlation of contrast with the net"),
        (against([ALIKE[1]], SIX), "Of one seed only, "),
        (against([[1, 2], [2, 1]], (1.0, 2.0)), "not known: at no seed are there three single groups"),
        (against([[1, 1, 1], [2, 2, 2]]), "not known: at no seed are there three single groups"),
        (BaselinesReport("t", "token", [], {}, {}, "top 1"), "not known"),
    ],
)
def test_the_verdict_follows_from_the_correlations(report, said):
    assert said in report.verdict()
    report.document().to_html()


def test_the_interval_of_the_correlation_is_student_s():
    rhos = [1.0, 1 - 6 * 2 / 210, 1 - 6 * 2 / 210, 1 - 6 * 2 / 210, 1 - 6 * 4 / 210]
    mean = sum(rhos) / 5
    half = 2.776445 * math.sqrt(sum((rho - mean) ** 2 for rho in rhos) / 4 / 5)
    assert f"is {mean:.2f} [{mean - half:.2f}, {mean + half:.2f}] over 5 seeds" in against(ALIKE, SIX).verdict()


def test_a_control_at_too_few_seeds_is_no_control():
    report = of_sizes(against(ALIKE, SIX, {"right-raw": [*SIX]}), SIZES_NOT)
    report = replace(report, controls={0: report.controls[0]})
    assert report.worth[1].words == "too few seeds" and "worth something" in report.verdict()
    sole = replace(report, runs=[replace(one, parameters=5) for one in report.runs], controls={})
    assert "No control is there to compare it with" in sole.verdict()


def test_p_values_are_corrected_over_the_score_and_its_controls():
    report = of_sizes(against(ALIKE, SIX, {"right-raw": [*SIX[::-1]]}), SIZES_NOT)
    raw = sorted(one.p_value for one in report.worth)
    assert len(raw) == 3 and min(one.adjusted for one in report.worth) == pytest.approx(3 * raw[0])


@pytest.mark.parametrize(("adjusted", "words"), [(0.049, "larger"), (0.05, "no significant difference")])
def test_words_follow_from_the_corrected_p_value(adjusted, words):
    assert Difference("full", [0, 1], Interval(2.0, 1.0, 3.0), 0.001, adjusted).words == words


def test_a_group_whose_score_is_not_a_number_is_left_out():
    assert against([[1, 2, 9, 3]], (1.0, 2.0, math.nan, 3.0)).correlations["contrast"] == {0: 1.0}


METHODS = [run("chosen", seed, net, typos=net - 9) for seed, net in enumerate([10, 12, 14])] + [
    *(
        run("full", seed, net, parameters=1000, rate=rate)
        for seed, net, rate in [(0, 4, 1e-4), (1, 6, 1e-4), (2, 8, 1e-3)]
    ),
    *(run("head", seed, net) for seed, net in enumerate([11, 9, 16])),
    *(run("random", seed, net) for seed in range(3) for net in (seed, seed + 2)),
]


def test_the_table_of_methods_has_means_over_seeds():
    rows = table(against([[1, 3, 16]] * 3, more=METHODS), "trained", "fixed")
    half = 4.302653 * 2 / math.sqrt(3)
    chosen = rows["the groups that the diagnosis chose"]
    assert chosen["net gain [95 %]"] == f"12.0 [{12 - half:.1f}, {12 + half:.1f}]"
    assert (chosen["fixed"], chosen["broken"], chosen["seeds"]) == ("32.0", "20.0", "3")
    assert chosen["net on typos [95 %]"].startswith("3.0 [")
    assert rows["all weights"]["net on typos [95 %]"] == ""
    assert (rows["all weights"]["parameters"], rows["all weights"]["learning rate"]) == ("1,000", "0.0001")
    assert rows["as many groups at random"]["net gain [95 %]"].startswith("2.0 ["), "two runs at a seed are one"


def test_differences_are_paired_and_corrected_together():
    report = against([[1, 3, 16]] * 3, more=METHODS)
    found = {one.other: one for one in report.against}
    assert list(found) == ["full", "head", "random"]
    assert found["full"].size is not None and found["full"].size.mean == 6 and found["full"].p_value == 0.25
    assert found["random"].adjusted == pytest.approx(3 * found["random"].p_value)
    assert [one.words for one in found.values()] == ["no significant difference"] * 2 + ["larger"]
    said = report.sentences()
    assert "It gained more than retraining as many groups at random." in said
    assert "No significant difference in net gain from retraining all weights and the last layer only." in said


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([[1, 3, 16]] * 3, "The best single group gained 16.0; the chosen ones reached 75.0 % of that (12.0)."),
        ([[1, 3, 20], [16, 3, 1], [1, 12, 3]], "The best single group gained 16.0; the chosen ones reached 75.0 %"),
        ([[0, -3, -1]] * 3, "gained 0.0; the chosen ones 12.0, and no single group was worth retraining."),
    ],
)
def test_the_oracle_is_the_best_group_of_each_seed_and_called_optimistic(gains, said):
    (sentence,) = [one for one in against(gains, more=METHODS).sentences() if "best single" in one]
    assert said in sentence and "optimistic" in sentence


def test_one_seed_has_no_intervals_and_says_so():
    report = against([[1, 3, 16]], more=[METHODS[0], METHODS[3]])
    assert "There is one seed, so there are no intervals, and nothing is known about other runs." in report.sentences()
    assert "Too few seeds to compare it with retraining all weights." in report.sentences()
    assert table(report, "trained", "fixed")["all weights"]["net gain [95 %]"] == "4.0 [one seed]"
    # three groups in one order have six permutations, of which two are as extreme
    p = float(re.search(r"p = ([\d.]+) over groups", report.verdict())[1])
    assert p == pytest.approx(2 / 6, abs=0.005)


@pytest.mark.parametrize(
    ("report", "pictures"),
    [
        (against([[1, 3, 16]] * 2), ["score_against_gain"]),
        (replace(against([[1, 3, 16]] * 2), runs=METHODS), ["net_gain"]),
        (replace(against([[1, 3, 16]] * 2, more=METHODS[3:6]), scores={}), ["net_gain"]),
        (BaselinesReport("t", "token", [], {}, {}, "top 1"), []),
    ],
    ids=["single groups only", "no single group", "neither scores nor chosen", "nothing"],
)
def test_missing_methods_leave_out_what_they_would_say(report, pictures):
    document = report.document()
    assert [picture.name for picture in document.pictures] == pictures
    assert document.to_markdown().startswith("# t")
    assert BaselinesReport.from_json(report.to_json()).to_json() == report.to_json()


def test_the_scatter_has_each_group_at_its_score_and_gain():
    (picture,) = [
        block
        for block in against([[1, 3, 16]], more=[run("chosen", 0, 5, ["g2"])]).document().blocks
        if isinstance(block, Picture) and block.name == "score_against_gain"
    ]
    drawn = [
        (x, y, line.get_markerfacecolor() != "white")
        for line in picture.figure.axes[0].get_lines()
        if line.get_marker() == "o"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]
    assert sorted(drawn) == [(1.0, 1, False), (2.0, 3, False), (3.0, 16, True)]


def test_a_control_must_not_be_called_as_a_score_is():
    with pytest.raises(InputError, match="controls has 'contrast', which another ranking is called"):
        against([[1, 2, 3]], controls={"contrast": [1.0, 2.0, 3.0]})
