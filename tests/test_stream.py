"""A stream trains on a domain after another, measures all after each, survives being killed, and says what was lost."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.evaluation.forgetting import (
    StreamReport,
    average_forgetting,
    average_score,
    backward_transfer,
    figures,
    forgetting,
    forward_transfer,
)
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.training import stream
from hf_momentum.training.stream import Plan, Stage
from tests.conftest import write_rows

# ---- the figures -----------------------------------------------------------------------------------------------------

# Three domains: the first is forgotten and partly comes back, the second gains by the third.
MATRIX = [
    [0.20, 0.30, 0.10],
    [0.90, 0.40, 0.20],
    [0.50, 0.70, 0.30],
    [0.60, 0.80, 0.95],
]


def test_the_figures_are_those_of_the_papers_worked_by_hand():
    assert average_score(MATRIX) == pytest.approx((0.60 + 0.80 + 0.95) / 3)
    # Chaudhry et al.: the best of the earlier stages less the last; the second domain was never better than at the end.
    assert forgetting(MATRIX) == pytest.approx([0.90 - 0.60, 0.70 - 0.80])
    assert average_forgetting(MATRIX) == pytest.approx((0.30 - 0.10) / 2)
    # Lopez-Paz and Ranzato: the end less the diagonal, and the place above the diagonal less the base model.
    assert backward_transfer(MATRIX) == pytest.approx(((0.60 - 0.90) + (0.80 - 0.70)) / 2)
    assert forward_transfer(MATRIX) == pytest.approx(((0.40 - 0.30) + (0.30 - 0.10)) / 2)


def test_forgetting_looks_back_further_than_backward_transfer():
    """A domain may be best before or after its own stage; the base model does not count as a stage."""
    matrix = [[0.99, 0.0, 0.0], [0.5, 0.6, 0.0], [0.7, 0.4, 0.0], [0.6, 0.5, 0.9]]
    assert forgetting(matrix) == pytest.approx([0.7 - 0.6, 0.6 - 0.5])
    assert backward_transfer(matrix) == pytest.approx(((0.6 - 0.5) + (0.5 - 0.4)) / 2)


def test_losses_are_turned_so_that_forgetting_is_worse_and_transfer_better():
    losses = [[1 - value for value in row] for row in MATRIX]
    for figure in (average_forgetting, backward_transfer, forward_transfer):
        assert figure(losses, lower_is_better=True) == pytest.approx(figure(MATRIX))
        assert figure(losses) == pytest.approx(-figure(MATRIX)) or figure is average_forgetting
    assert average_score(losses) == pytest.approx(1 - average_score(MATRIX)), "a score stays in its own unit"


def test_over_seeds_the_intervals_are_students():
    other = [[value + 0.1 * (place == 0) for place, value in enumerate(row)] for row in MATRIX[:-1]] + [MATRIX[-1]]
    found = figures([MATRIX, other])["average forgetting"]
    assert found.mean == pytest.approx(0.125)
    assert found.high - found.mean == pytest.approx(12.706 * 0.025, rel=1e-3)
    assert figures([MATRIX])["average forgetting"].low is None


@pytest.mark.parametrize(
    "matrix", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [1.0], [1.0, 2]]]
)
def test_a_matrix_of_another_shape_is_refused(matrix):
    with pytest.raises(InputError, match=r"n \+ 1 rows of n >= 2 domains, the base model first; got \d rows of"):
        average_forgetting(matrix)


def report_of(*matrices, metric="accuracy") -> StreamReport:
    domains = ["films", "books", "news"]
    cells = {
        seed: [
            {name: {metric: Estimate(v, v - 0.01, v + 0.01)} for name, v in zip(domains, row, strict=True)}
            for row in matrix
        ]
        for seed, matrix in enumerate(matrices)
    }
    return StreamReport("t", domains, metric, list(cells), cells, {"seeds": len(matrices)}, "optim: tam", "run")


def test_the_verdict_follows_from_the_interval():
    assert report_of(MATRIX).verdict() == (
        "Average forgetting in accuracy is 0.100 [one seed], most on films (0.300); of a single seed, so nothing is "
        "known about other runs."
    )
    assert report_of(MATRIX, MATRIX).verdict().endswith("(0.300): earlier domains were forgotten.")
    better = [[1 - value for value in row] for row in MATRIX]
    assert report_of(MATRIX, better).verdict().endswith("no significant forgetting over 2 seeds.")
    assert "[-" in report_of(MATRIX, better).verdict()


def test_the_report_has_every_cell_and_frames_what_was_trained(tmp_path):
    path = report_of(MATRIX, MATRIX).write(tmp_path)
    told = json.loads((tmp_path / "stream.json").read_text())
    assert told["cells"]["1"][2]["books"]["accuracy"] == {"value": 0.7, "low": 0.69, "high": 0.71}
    assert told["figures"]["average forgetting"]["mean"] == pytest.approx(0.1)
    text = (tmp_path / "report.md").read_text()
    assert "| after books | 0.500 | 0.700 | 0.300 |" in text
    assert "| average forgetting |" in text and (tmp_path / "plots" / "forgetting_matrix.png").is_file()
    assert path.name == "report.html" and "0.95" in path.read_text()


# ---- the streams -----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tiny):
    """The tiny recipe as overrides, without data and output folder."""

    def made(**more) -> list[str]:
        fields = {"seed": 0, "train_dataset": None, "in_distribution": None, "must_not_forget": None, **more}
        return [word for word in tiny.words("unused", **fields) if not word.startswith("--output_dir")]

    return made


@pytest.fixture
def sources(tiny) -> list[str]:
    return [f"{name}={tiny.folder / name}.jsonl" for name in ("code", "prose")]


def planned(words, sources, folder, **changed) -> Plan:
    fields = {"domains": sources, "evaluation": sources, "seeds": 1, "metric": None}
    return stream.plan(None, words, **{**fields, **changed}, folder=str(folder))


class FakeStage:
    """Scores in place of training, written as a stage writes them; killed at the stage that it is told."""

    def __init__(self, killed_at: tuple[int, int] | None = None) -> None:
        self.ran, self.killed_at = [], killed_at

    def __call__(self, made: Plan, seed: int, stage: int) -> Stage:
        self.ran.append((seed, stage))
        if (seed, stage) == self.killed_at:
            raise KeyboardInterrupt
        figure = {"loss": Estimate(stage + seed / 10, 0.0, 9.0)}
        scores = dict.fromkeys(made.domains, figure)
        left = Stage(made.digest, scores if stage == 1 else {}, scores, 1.0)
        made.place(seed, stage).mkdir(parents=True, exist_ok=True)
        stream.write(made, seed, stage, left)
        return left


def test_a_killed_stream_repeats_only_what_is_not_finished(words, sources, tmp_path):
    made, said = planned(words(), sources, tmp_path, seeds=2), []
    first = FakeStage(killed_at=(1, 1))
    with pytest.raises(KeyboardInterrupt):
        stream.run_streams(made, run=first, say=said.append)
    assert first.ran == [(0, 1), (0, 2), (1, 1)]
    second = FakeStage()
    found = stream.run_streams(made, run=second, say=said.append)
    assert second.ran == [(1, 1), (1, 2)]
    assert said[-1] == "[4/4] seed 1, after prose: loss code 2.100, prose 2.100"
    again = FakeStage()
    assert stream.run_streams(made, run=again, say=str) == found and again.ran == []
    other = FakeStage()
    stream.run_streams(planned(words(learning_rate=0.01), sources, tmp_path, seeds=2), run=other, say=str)
    assert len(other.ran) == 4


def test_each_stage_continues_from_the_last_one_with_its_own_data(words, sources, tmp_path):
    made = planned(words(shifted=f"x={sources[0][5:]}", load_best_model_at_end=True), sources, tmp_path)
    first, second = made.recipe(0, 1), made.recipe(0, 2)
    assert (first.model.model_name_or_path, Path(second.model.model_name_or_path).parts[-2:]) == (
        "scratch",
        ("stage-1-code", "model"),
    )
    assert (first.data.train_dataset, second.data.train_dataset) == (sources[0][5:], sources[1][6:])
    for recipe in (first, second):
        assert recipe.data.in_distribution == sources and recipe.data.shifted == []
        assert recipe.training.save_strategy == "no" and not recipe.training.load_best_model_at_end


def test_a_real_stream_measures_all_domains_after_each_and_keeps_the_last_model(words, sources, tmp_path, capsys):
    typed = ["stream", "--config", "quickstart", "--domains", *sources, "--eval", *sources]
    typed += [
        "--output_dir",
        str(tmp_path / "out"),
        *words(lora=False, max_steps=20, optim="adamw_torch", learning_rate=0.005),
    ]
    assert main(typed) == 0
    told = json.loads((tmp_path / "out" / "stream.json").read_text())
    rows = [[row[name]["loss"]["value"] for name in ("code", "prose")] for row in told["cells"]["0"]]
    base, coded, prosed = rows
    assert coded[0] < base[0] - 0.5 and prosed[1] < coded[1] - 0.5, "each stage learns its own domain"
    assert prosed[0] > coded[0] + 0.05, "and the second forgets the first"
    assert told["figures"]["average forgetting"]["mean"] == pytest.approx(prosed[0] - coded[0])
    assert set(told["cells"]["0"][0]["code"]) == {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
    last = tmp_path / "out" / "seed-0" / "stage-2-prose" / "model"
    assert AutoConfig.from_pretrained(last).hidden_size == 32 and AutoTokenizer.from_pretrained(last)
    assert not (tmp_path / "out" / "seed-0" / "stage-1-code" / "model").exists()
    assert "Average forgetting in loss is" in capsys.readouterr().out
    assert main([*typed, "--json"]) == 0, "given again, it only reports"
    said = capsys.readouterr()
    assert json.loads(said.out)["report"]["figures"] == told["figures"] and "[1/2]" not in said.err
    assert json.loads((tmp_path / "out" / "stream.json").read_text()) == told


def test_an_adapter_is_merged_so_that_the_next_stage_begins_where_the_last_one_ended(words, sources, tmp_path):
    """Without a step, what is loaded for the second stage scores as the first one did."""
    made = planned(words(lora=True, learning_rate=0.05), sources, tmp_path)
    first = stream.run_stage(made, 0, 1)
    still = planned(words(lora=True, learning_rate=0.0), sources, tmp_path)
    second = stream.run_stage(still, 0, 2)
    for name in ("code", "prose"):
        assert second.after[name]["loss"].value == pytest.approx(first.after[name]["loss"].value, rel=1e-5)
        assert first.after[name]["loss"].value != pytest.approx(first.before[name]["loss"].value, rel=1e-3)


def test_classifiers_whose_domains_differ_in_their_classes_are_refused_before_any_stage(words, tmp_path):
    rows = {"a": ["good", "bad"], "b": ["good", "bad", "odd"]}
    paths = [
        f"{name}={write_rows(tmp_path / f'{name}.jsonl', [{'text': 't', 'label': label} for label in labels])}"
        for name, labels in rows.items()
    ]
    made = planned(words(task="sequence_classification"), paths, tmp_path / "never")
    assert made.metric == "accuracy"
    with pytest.raises(InputError, match="domains 'a' and 'b' differ in their classes: 'odd' is in one only"):
        stream.run_streams(made, run=FakeStage(), say=str)
    assert not (tmp_path / "never").exists()


BAD = [
    ({"domains": 1}, {}, "domains must be at least 2, got 1; a single one is what `train` is for"),
    ({"evaluation": []}, {}, r"eval is empty; give NAME=SOURCE@SPLIT for each domain"),
    ({"evaluation": ["cod=x.jsonl"]}, {}, r"eval names 'cod', which is no domain \(did you mean 'code'\?\); domains: "),
    ({"evaluation": 1}, {}, "domain 'prose' has no evaluation data; add prose=SOURCE@SPLIT to --eval"),
    ({"domains": ["a=x", "a=y"]}, {}, "domains names 'a' twice"),
    ({"domains": ["a/b=x", "c=y"]}, {}, "the name 'a/b' becomes a folder"),
    ({"domains": ["code", "c=y"]}, {}, "'code' does not name a split; write NAME=SOURCE@SPLIT"),
    ({"seeds": 0}, {}, "seeds must be at least 1, got 0"),
    ({"metric": "los"}, {}, r"unknown metric 'los' \(did you mean 'loss'\?\); accepted: loss, perplexity"),
    ({}, {"train_dataset": "x"}, "--train_dataset is set by the stream; name the training data .* --domains"),
    ({}, {"aux_dataset": "x=y"}, "a stream has no auxiliary objective"),
    ({}, {"learning_rate": -1}, "lr must be a number"),
]


@pytest.mark.parametrize(("changed", "fields", "message"), BAD)
def test_input_that_cannot_be_used_is_one_line_before_anything_is_written(
    changed, fields, message, words, sources, tmp_path
):
    changed = {
        name: sources[:value] if isinstance(value, int) and name != "seeds" else value
        for name, value in changed.items()
    }
    with pytest.raises(InputError, match=message) as error:
        planned(words(**fields), sources, tmp_path / "never", **changed)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "never").exists()
