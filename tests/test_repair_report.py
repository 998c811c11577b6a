"""The report of a repair says what was fixed and broken, whether it was kept, and what was frozen."""

import json
from dataclasses import replace

import pytest

from hf_momentum.diagnosis.repair_report import RepairReport
from hf_momentum.diagnosis.results import Decision, Flips
from hf_momentum.errors import InputError
from hf_momentum.evaluation.document import Details, Table
from tests import diagnosis_specimen

REPORT = diagnosis_specimen.repair()
ROLLED_BACK = replace(REPORT, decision=Decision(False, ["The net gain is not significant: p = 0.3."]))
NOTHING = replace(
    REPORT,
    verification=None,
    validation=None,
    others=[],
    mixtures=[],
    history=[],
    steps=0,
    errors=0,
    decision=Decision(False, ["No prediction of the diagnosis split is wrong."]),
)


def table(report, word):
    blocks = [
        inner for one in report.document().blocks for inner in (one.blocks if isinstance(one, Details) else [one])
    ]
    (found,) = [one for one in blocks if isinstance(one, Table) and word in one.header]
    return {row[0]: dict(zip(found.header, row, strict=True)) for row in found.rows}


def text(report):
    return report.document().to_markdown()


@pytest.mark.parametrize(
    ("report", "outcome", "verdict"),
    [
        (
            REPORT,
            "accepted",
            "Accepted: on verification 31 of 1,000 examples were fixed and 12 broken, net +19 (p = 0.0054), by 11.8 % "
            "of the parameters (block.1).",
        ),
        (ROLLED_BACK, "rolled back", "Rolled back, the model is as it was: on verification 31 of 1,000 examples"),
        (NOTHING, "nothing to repair", "Nothing to repair: distilbert-base-uncased is as it was."),
    ],
)
def test_the_verdict_is_the_decision_with_its_figures(report, outcome, verdict):
    assert report.outcome == outcome and report.verdict().startswith(verdict)
    assert json.loads(report.to_json())["found"]["outcome"] == outcome


def test_every_reason_is_a_sentence_of_the_report():
    assert REPORT.sentences()[:2] == [
        "On verification the net gain is 19 with p = 0.0054, below 0.05.",
        "On no other split is there a significant net loss.",
    ]
    assert ROLLED_BACK.sentences()[0] == "The net gain is not significant: p = 0.3."
    assert "50.0 % of the way" in REPORT.sentences()[2] and "fixed 21 and broke 5" in REPORT.sentences()[2]


def test_the_table_has_every_split_with_its_flip_rates():
    rows = table(REPORT, "negative flip rate")
    assert list(rows) == [
        "verification",
        *(f"typos, severity {step} (shifted)" for step in (1, 2, 3)),
        "validation",
    ]
    first = rows["verification"]
    assert (first["positive flip rate"], first["negative flip rate"]) == ("3.1 %", "1.2 %")
    assert (first["rows"], first["fixed"], first["broken"], first["net"], first["p"]) == (
        "1,000",
        "31",
        "12",
        "+19",
        "0.0054",
    )
    assert first["before [95 %]"].startswith("0.842 [") and first["after [95 %]"].startswith("0.861 [")
    last = rows["typos, severity 3 (shifted)"]
    assert (last["fixed"], last["broken"], last["net"]) == ("18", "16", "+2")


def test_rates_are_of_all_predictions_not_of_rows():
    """A row of a language model has many predictions."""
    split = replace(REPORT.verification, examples=50, flips=Flips(40, 10, 1800, 150))
    report = replace(REPORT, unit="token", verification=split)
    row = table(report, "negative flip rate")["verification"]
    assert (row["rows"], row["positive flip rate"], row["negative flip rate"]) == ("50", "2.0 %", "0.5 %")
    assert "40 of 2,000 tokens were fixed" in report.verdict()
    assert "sign test over rows" in text(report) and "McNemar" not in text(report)
    assert "McNemar" in text(REPORT)


def test_pictures_show_the_flips_and_the_path():
    drawn = {picture.name: picture.figure for picture in REPORT.document().pictures}
    assert list(drawn) == ["flips", "mixtures", "loss"]
    widths = [bar.get_width() for bar in drawn["flips"].axes[0].patches]
    assert widths[:5] == pytest.approx([3.1, 2.0, 1.9, 1.8, 100 * 21 / 516])
    assert widths[5:] == pytest.approx([-1.2, -1.4, -1.5, -1.6, -100 * 5 / 516])
    path, chosen = drawn["mixtures"].axes[0].get_lines()[:2]
    assert list(path.get_ydata()) == [0, 8, 16, 14, 8] and list(chosen.get_xdata()) == [0.5]
    assert table(REPORT, "share of new weights")["0.5 (chosen)"]["net"] == "+16"


def test_what_was_frozen_is_said():
    assert REPORT.frozen == ["embeddings", "block.0", "block.2", "norm", "head"]
    held = sum(group.parameters for group in REPORT.groups) - REPORT.trained_parameters
    assert f"Frozen, {held:,} parameters: embeddings, block.0, block.2, norm and head." in text(REPORT)
    assert "all 25 other groups" in text(diagnosis_specimen.repair(26))
    everything = replace(REPORT, chosen=[group.name for group in REPORT.groups])
    assert everything.frozen == [] and "Nothing was frozen." in text(everything)


def test_adapters_leave_all_weights_frozen():
    report = replace(REPORT, how="LoRA", trained_parameters=1000, all_parameters=100_000)
    assert report.frozen == [group.name for group in report.groups]
    assert "LoRA adapters were trained, 1,000 of 100,000 parameters (1.0 %) in block.1" in text(report)
    assert "all weights of the model itself were frozen" in text(report)


@pytest.mark.parametrize(
    ("change", "pictures"),
    [
        ({"history": []}, ["flips", "mixtures"]),
        ({"history": [{"step": 3, "eval_loss": 0.4}]}, ["flips", "mixtures"]),
        ({"mixtures": []}, ["flips", "loss"]),
        ({"others": [], "validation": None}, ["flips", "mixtures", "loss"]),
    ],
)
def test_what_is_missing_is_left_out(change, pictures):
    report = replace(REPORT, **change)
    assert [picture.name for picture in report.document().pictures] == pictures
    assert "## What was trained" in text(report)


def test_nothing_to_repair_has_no_figures(tmp_path):
    assert not NOTHING.document().pictures and "## Before" not in text(NOTHING)
    assert NOTHING.sentences() == ["No prediction of the diagnosis split is wrong."]
    assert NOTHING.write(tmp_path).exists()


@pytest.mark.parametrize("report", [REPORT, ROLLED_BACK, NOTHING], ids=lambda report: report.outcome)
def test_a_repair_comes_back_from_its_record(report):
    assert RepairReport.from_json(report.to_json()).to_json() == report.to_json()


def test_the_record_of_a_diagnosis_is_no_repair():
    with pytest.raises(InputError, match=r"x\.json is no report of `hf-momentum repair`"):
        RepairReport.from_json(diagnosis_specimen.diagnosis().to_json(), "x.json")
    with pytest.raises(InputError, match="another version"):
        RepairReport.from_json(json.dumps({"kind": "hf-momentum repair"}))


def test_a_repair_writes_a_page_and_its_records(tmp_path):
    assert REPORT.write(tmp_path) == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "report.json", "plots"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"flips.png", "mixtures.png", "loss.png"}
    assert REPORT.verdict() in (tmp_path / "report.md").read_text()
