"""The programs of scripts/claims: verdicts follow from the numbers, runs are kept, and figures are what they say."""

import doctest
import importlib
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from hf_momentum import InputError
from hf_momentum.evaluation.intervals import Interval
from tests.conftest import write_rows

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "scripts" / "claims"
NAMES = ("rows", "common", "pictures", "page", "tam", "vradam", "ahb", "critical", "vradam_edge", "bloop")
NAMES += ("layers", "planted", "repairs")


@pytest.fixture(scope="module")
def programs():
    """The programs as modules; they import each other as programs of one folder do."""
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture
def rows(programs):
    return programs["rows"]


@pytest.fixture
def common(programs):
    return programs["common"]


@pytest.fixture
def tiny(common):
    return common.Size("tiny", "digits", "mlp", 4, 16, 64, 3, 1, 2, 3, 4, 2)


@pytest.fixture
def lab(common, tiny, tmp_path):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    return common.Lab(tiny, common.Records(tmp_path / "runs.jsonl"), say=lambda line: None)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_in_docstrings_hold(programs, name):
    assert doctest.testmod(programs[name]).failed == 0


# ---- verdicts -------------------------------------------------------------------------------------------------------

BETTER, WORSE = (1.0, 1.2, 0.9, 1.1, 1.0), (-1.0, -1.2, -0.9, -1.1, -1.0)
NEITHER = (1.0, -1.2, 0.9, -1.1, 0.2)


@pytest.mark.parametrize(
    ("baseline", "control", "untuned", "said"),
    [
        (BETTER, BETTER, BETTER, "holds"),
        (BETTER, BETTER, NEITHER, "holds"),
        (BETTER, BETTER, WORSE, "does not hold"),
        (BETTER, NEITHER, BETTER, "no significant difference"),
        (BETTER, WORSE, BETTER, "does not hold"),
        (NEITHER, BETTER, BETTER, "holds only against the untuned baseline"),
        (WORSE, WORSE, BETTER, "holds only against the untuned baseline"),
        (BETTER, NEITHER, NEITHER, "no significant difference"),
        (NEITHER, NEITHER, WORSE, "does not hold"),
        (NEITHER, NEITHER, NEITHER, "no significant difference"),
        (BETTER, WORSE, NEITHER, "does not hold"),
        (WORSE, WORSE, WORSE, "does not hold"),
    ],
)
def test_the_verdict_follows_from_signs_and_significance(rows, baseline, control, untuned, said):
    compared = (
        rows.Comparison("SGD", "baseline", baseline),
        rows.Comparison("frozen", "control", control),
        rows.Comparison("SGD", "untuned", untuned),
    )
    row = rows.Row("better", "digits", "accuracy", "points", compared)
    assert rows.verdict(rows.judged([row])[0]) == said


def test_swapping_method_and_baseline_turns_the_verdict_round(rows):
    first, second = [2.0, 2.2, 1.9, 2.1], [1.0, 1.1, 1.0, 0.9]

    def said(method, other, **how):
        compared = (rows.comparison("other", "baseline", method, other, **how),)
        return rows.verdict(rows.judged([rows.Row("better", "", "", "", compared)])[0])

    assert said(first, second) == "holds"
    assert said(second, first) == "does not hold"
    assert said(first, second, lower_is_better=True) == "does not hold"
    assert said(first, first) == "no significant difference"
    assert said(first[:1], second[:1]) == "no significant difference"  # of one seed nothing follows


def test_without_numbers_or_with_untuned_baselines_alone_nothing_holds(rows):
    assert rows.verdict([]) == "not tested at the paper's scale"
    for differences, said in ((BETTER, "holds only against the untuned baseline"), (WORSE, "does not hold")):
        row = rows.Row("", "", "", "", (rows.Comparison("SGD", "untuned", differences),))
        assert rows.verdict(rows.judged([row])[0]) == said


def test_holm_corrects_over_all_rows_of_a_program(rows):
    slight = rows.Comparison("SGD", "baseline", (1.0, 0.6, 1.5, 0.8))
    none = rows.Comparison("SGD", "baseline", (1.0, -0.9, 0.1, -0.2))
    alone = rows.judged([rows.Row("", "", "", "", (slight,))])
    among = rows.judged([rows.Row("", "", "", "", (one,)) for one in (slight, *[none] * 5)])
    assert rows.verdict(alone[0]) == "holds"
    assert rows.verdict(among[0]) == "no significant difference"
    assert among[0][0].p_value == pytest.approx(6 * alone[0][0].p_value)


def test_ratios_are_shown_as_ratios_with_their_bounds(rows):
    one = rows.Judged("SGD", "baseline", Interval(math.log(1.9), 0.0, math.log(4.0)), 0.0001)
    assert rows.shown(one, "times") == "1.90 times [1.00, 4.00], p < 0.001"


# ---- data, runs, records --------------------------------------------------------------------------------------------


def test_parts_do_not_overlap_and_shifted_sets_keep_their_labels(common, lab):
    images, _ = common.digit_images()
    data = common.digits(3)
    parts = [part[0].flatten(1) for part in (data.train, data.validation, data.test, data.shifted["writers"])]
    assert sum(map(len, parts)) == len(images)
    assert len(torch.cat(parts).unique(dim=0)) == len(images.flatten(1).unique(dim=0))
    for name in common.SHIFTS:
        assert torch.equal(data.shifted[name][1], data.test[1])
        assert (data.shifted[name][0] - data.test[0]).abs().mean() > 0.02
        assert torch.equal(data.shifted[name][0], common.digits(3).shifted[name][0])
    assert not torch.equal(common.digits(4).train[1], data.train[1])


def test_the_same_setting_gives_the_same_run_and_every_field_matters(common, tiny):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    base = tiny.setting("sgd", 0.1, momentum=0.9)
    assert base.options == {"momentum": 0.9}
    first = common.train(base)
    assert common.train(base) == first
    for changed in (
        {"seed": 1},
        {"lr": 0.2},
        {"steps": 5},
        {"batch": 8},
        {"options": {}},
        {"root": 0.05},
        {"law": "critical"},
        {"clip": 0.01},
        {"model": "cnn"},
    ):
        assert common.train(replace(base, **changed))["scores"] != first["scores"], changed


def test_a_root_rate_is_the_effective_rate_of_the_critical_law(common, tiny):
    law, root = tiny.setting("sgd", 0.1), tiny.setting("sgd", 0.1, root=0.05)
    for step in range(tiny.steps):
        lr = common.rate(law, step)
        assert common.rate(root, step) / (1 - 0.9) == pytest.approx(math.sqrt(lr) / 2)


def test_a_diverged_run_counts_as_one_that_guesses(common, tiny):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    result = common.train(tiny.setting("sgd", 1e30))
    assert result["diverged"]
    assert result["scores"]["test"] == {"loss": math.log(10), "accuracy": 0.1}


def test_gains_are_those_of_the_optimizer(common, tiny):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    assert common.train(tiny.setting("tam", 0.1, fixed_damping=0.5))["gain"] == pytest.approx(5.0)
    assert common.train(tiny.setting("vradam", 1e-3, beta3=0.0))["gain"] == pytest.approx(1.0)
    assert common.train(tiny.setting("ahb", 1e-3, delta=1.0))["gain"] == pytest.approx(1.0)


def test_records_tell_settings_apart_in_every_field(common, tiny, tmp_path):
    records, base = common.Records(tmp_path / "runs.jsonl"), tiny.setting("sgd", 0.1)
    changes = (
        {},
        {"seed": 1},
        {"lr": 0.2},
        {"options": {"momentum": 0.9}},
        {"root": 0.5},
        {"law": "demon"},
        {"clip": 1.0},
    )
    for index, change in enumerate(changes):
        setting = asdict(replace(base, **change))
        assert records.kept(setting, lambda index=index: {"index": index}) == {"index": index}


def test_without_scikit_learn_it_says_so(common, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        common.digit_images.__wrapped__()


def test_tuning_widens_to_an_interior_best_with_equal_budgets(common, lab, monkeypatch):
    centres = {"tam": 0.8, "sgd": 0.01}

    def bowl(setting):
        return [{"scores": {"validation": {"loss": math.log(setting.lr / centres[setting.method]) ** 2}}}]

    monkeypatch.setattr(lab, "tuning_results", bowl)
    lab.size = replace(lab.size, most=20)
    candidates = {name: lab.size.setting(name, 0.05) for name in centres}
    tuned = lab.tuned(candidates)
    for name, centre in centres.items():
        assert tuned[name].interior
        assert min(tuned[name].grid) < tuned[name].lr < max(tuned[name].grid)
        assert tuned[name].lr == pytest.approx(centre, rel=0.42)  # half a step of the grid
    assert len({len(one.grid) for one in tuned.values()}) == 1
    lab.size = replace(lab.size, most=4)
    stopped = lab.tuned(candidates)
    assert not stopped["tam"].interior
    assert any("AT AN END" in fact for fact in common.tuning_facts(stopped))


def test_seeds_of_the_tuning_are_not_those_of_the_figures(common):
    for size in common.SIZES.values():
        assert size.seeds <= common.TUNING_SEED


# ---- the programs, end to end ---------------------------------------------------------------------------------------


def check(programs, program, tmp_path, seeds=2):
    """The rows have their seeds, and the page that is written beside the JSON shows a verdict for each."""
    path = tmp_path / "claims.json"
    programs["page"].keep(program, path)
    assert program.rows
    for row in program.rows:
        assert row.seeds == seeds
        assert all(math.isfinite(value) for one in row.comparisons for value in one.differences)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    for row in program.rows:
        claim = programs["page"].escaped(row.claim)
        assert f"| {claim} | {row.setting} | {seeds} | **" in text
        assert f"| {claim}<br>({row.setting}) | {row.figure} | " in text
    tables = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {6}
    assert "**not tested at the paper's scale**" in text


@pytest.mark.parametrize("name", ["tam", "vradam", "critical"])
def test_program(programs, lab, tmp_path, name):
    check(programs, programs[name].program(lab), tmp_path)
    kept = [json.loads(line) for line in lab.records.path.read_text(encoding="utf-8").splitlines()]
    CONTROLS[name]([one["what"] for one in kept if one["what"]["seed"] < 1000], kept)


def controls_of_tam(run, kept):
    for method, baseline, unit in (("tam", "sgd", 10), ("adatamw", "adamw", 1)):
        (lr,) = {one["lr"] for one in run if one["method"] == method}  # the frozen gate has the method's own rate
        assert {one["options"].get("fixed_damping") for one in run if one["method"] == method} == {None, 0.5}
        own = [one for one in kept if one["what"]["method"] == method and one["what"]["seed"] >= 1000]
        (gain,) = [one["result"]["gain"] for one in own if one["what"]["lr"] == lr]
        rates = {one["lr"] for one in run if one["method"] == baseline}
        assert lr in rates and any(rate == pytest.approx(lr * gain / unit) for rate in rates)


def controls_of_vradam(run, kept):
    for clip in (None, 1.0):
        (lr,) = {one["lr"] for one in run if (one["method"], one["clip"]) == ("vradam", clip)}
        own = [one for one in kept if (one["what"]["method"], one["what"]["clip"]) == ("vradam", clip)]
        (gain,) = [x["result"]["gain"] for x in own if x["what"]["lr"] == lr and x["what"]["seed"] >= 1000]
        rates = {one["lr"] for one in run if (one["method"], one["clip"]) == ("adamw", clip)}
        assert lr in rates and any(rate == pytest.approx(lr * gain) for rate in rates)


def controls_of_critical(run, kept):
    published = {(one["law"], one["root"], one["options"].get("momentum", 0)) for one in run if one["lr"] == 0.1}
    assert published >= {("critical", None, 0.9), ("hybrid", None, 0.9), (None, None, 0.9)}
    assert {(root, momentum) for _, root, momentum in published if root} == {(0.05, 0.9), (0.5, 0)}
    assert {one["law"] for one in run} == {"critical", "hybrid", None, "onecycle", "demon"}


CONTROLS = {"tam": controls_of_tam, "vradam": controls_of_vradam, "critical": controls_of_critical}


def test_ahb(programs, lab, tmp_path, monkeypatch):
    monkeypatch.setattr(programs["ahb"], "RUNGS", range(-4, 1))
    check(programs, programs["ahb"].program(lab), tmp_path)


def test_a_method_that_does_not_learn_is_found_out(programs, common, lab, monkeypatch):
    class Idle(common.TAM):
        def step(self, closure=None):
            kept = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            super().step(closure)
            with torch.no_grad():
                torch._foreach_copy_([p for group in self.param_groups for p in group["params"]], kept)

    lab.size = replace(lab.size, steps=30, seeds=4)
    monkeypatch.setitem(common.METHODS, "tam", Idle)
    rows = programs["tam"].program(lab).rows
    verdicts = [programs["rows"].verdict(compared) for compared in programs["rows"].judged(rows)]
    assert verdicts[0] == "does not hold"
    assert [one.better for one in programs["rows"].judged(rows)[0]] == [False] * 4


def test_vradam_edge(programs, lab, tmp_path, monkeypatch):
    edge = programs["vradam_edge"]
    monkeypatch.setitem(edge.EDGES, "small", edge.Edge("digits", 20, 4, 0.003, None, 10, 10))
    monkeypatch.setattr(edge, "PICTURE", tmp_path / "edge.png")
    check(programs, edge.program(lab, edge.EDGES["small"]), tmp_path)
    assert (tmp_path / "edge.png").stat().st_size > 1000


def test_bloop(programs, tmp_path):
    report = json.loads((ROOT / "docs" / "bloop_fronts.json").read_text(encoding="utf-8"))
    check(programs, programs["bloop"].program(report), tmp_path, seeds=3)
    found = programs["bloop"].program(report).rows[0].comparisons[0]
    assert sum(found.differences) / 3000 == pytest.approx(report["comparisons"][0]["difference"]["mean"])


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_digits(common, monkeypatch, programs):
    """A few digits in each part, so that a diagnosis takes a moment."""

    def small(seed):
        data = common.digits(seed)
        train, validation, test, writers = (
            tuple(part[:count] for part in examples)
            for examples, count in (
                (data.train, 48),
                (data.validation, 16),
                (data.test, 16),
                (data.shifted["writers"], 8),
            )
        )
        return replace(data, train=train, validation=validation, test=test, shifted={"writers": writers})

    for name in ("common", "layers", "planted"):
        monkeypatch.setattr(programs[name], "TASKS", {"digits": small})
    common._data.cache_clear()
    yield
    common._data.cache_clear()


def test_layers(programs, lab, few_digits, tmp_path):
    check(programs, programs["layers"].program(lab), tmp_path)
    kept = [json.loads(line) for line in lab.records.path.read_text(encoding="utf-8").splitlines()]
    runs = [one for one in kept if "program" in one["what"]]
    assert {(one["what"]["method"], one["what"]["seed"]) for one in runs} == {
        (method, seed) for method in ("sgd", "adamw") for seed in (0, 1)
    }
    assert {one["what"]["model"] for one in kept} == {"resnet"}
    assert [len(runs[0]["result"][split]["groups"]) for split in ("blocks", "parts")] == [6, 10]


def test_both_optimizers_begin_with_the_same_weights_and_see_the_same_batches(common, tiny, few_digits):
    """With steps of no length only the statistics of the batches move, and those are the same."""
    states = []
    for method, seed in (("sgd", 0), ("adamw", 0), ("sgd", 1)):
        setting = replace(tiny.setting(method, 1e-30, weight_decay=0.0), model="resnet", seed=seed)
        states.append(common.fitted(setting)[0].state_dict())
    moved = [name for name in states[0] if name.endswith("running_mean")]
    assert moved and all(states[0][name].any() for name in moved)
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-20) for name in states[0])
    assert not any(torch.allclose(states[0][name], states[2][name]) for name in moved)


GROUPS = ["embeddings", "block.0", "block.1", "block.2", "block.3", "head"]


def diagnosis(errors, right=None, random=None, wrong=30):
    """What a diagnosis says whose scores are these, whatever they are called."""
    views = {"errors": errors, "right": right or errors, "random": random or errors}
    scores = {
        view: {score: values for score in ("contrast", "raw", "rms", "relative", "taylor")}
        for view, values in views.items()
    }
    return {"wrong": wrong, "looked at": 600, "groups": GROUPS, "scores": scores}


def test_an_agreement_that_random_weights_share_does_not_hold(programs):
    early, late = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    said = []
    for sgd, adam, random in ((early, early, late), (early, early, early), (early, late, early)):
        pairs = [(diagnosis(sgd, random=random), diagnosis(adam, random=random))] * 10
        row, fact = programs["layers"]._agreement(pairs, "blocks", "raw", "digits")
        said.append((programs["rows"].verdict(programs["rows"].judged([row])[0]), fact))
    assert [verdict for verdict, _ in said] == ["holds", "no significant difference", "does not hold"]
    assert "both 3.00, chance 1.50" in said[0][1] and "all 3 the same in 10 of 10" in said[0][1]
    assert "both 0.00, chance 1.50" in said[2][1] and "rank correlation over all groups -1.00" in said[2][1]


def test_planted(programs, lab, few_digits, tmp_path, monkeypatch):
    monkeypatch.setitem(programs["planted"].REPAIRS, "image_classification", ((0.1,), 2))
    program = programs["planted"].program(lab)
    rows = [row for row in program.rows if "restores" not in row.claim]  # after 4 steps there may be nothing to lose
    check(programs, replace(program, rows=rows), tmp_path)
    kept = [json.loads(line)["result"] for line in lab.records.path.read_text(encoding="utf-8").splitlines()]
    assert [one["group"] for one in kept] == ["block.0", "block.1"]
    for one in kept:
        wrong = [one["found"][fault]["scores"]["errors"]["raw"] for fault in ("", *programs["planted"].FAULTS)]
        assert len({tuple(values) for values in wrong}) == 4, "every fault changes the model, and none is left in it"
        part, whole = one["mended"].values()
        assert 0 < part["parameters"] < whole["parameters"] == 143_978


def test_planted_in_texts(programs, lab, tmp_path, monkeypatch):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "it", "is"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "tiny")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tiny")
    for part in ("train", "validation", "test"):
        rows = [{"text": f"{words[5 + n % 2]} film {'it is ' * (n % 3)}", "label": n % 2} for n in range(60)]
        write_rows(tmp_path / f"movies_{part}.jsonl", rows)
    monkeypatch.setitem(programs["planted"].REPAIRS, "sequence_classification", ((1e-3,), 2))
    given = programs["planted"].Texts(steps=3, batch=8, held=24, taught=24, validation=24, test=24)
    program = programs["planted"].text_program(lab, tmp_path / "tiny", tmp_path, 2, given)
    rows = [row for row in program.rows if "restores" not in row.claim]
    check(programs, replace(program, rows=rows), tmp_path)
    kept = [json.loads(line)["result"] for line in lab.records.path.read_text(encoding="utf-8").splitlines()]
    assert [one["group"] for one in kept] == ["block.0", "block.1"]
    assert kept[0]["found"][""]["groups"] == ["embeddings", "block.0", "block.1", "pooler", "head"]


def test_a_score_that_finds_the_planted_block_holds_only_if_it_knows_of_the_errors(programs):
    planted = programs["planted"]
    first, other = [1.0, 9.0, 2.0, 3.0, 4.0, 5.0], [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]

    def said(errors, right, without):
        repair = {"accuracy": 0.89, "fixed": 9, "broken": 1, "rate": 0.1, "parameters": 5}
        run = {
            "group": "block.0",
            "found": {"": diagnosis(without), **{fault: diagnosis(errors, right) for fault in planted.FAULTS}},
            "accuracy": {"before": 0.9, "damaged": 0.5},
            "mended": {planted.PLANTED: repair, planted.FULL: {**repair, "accuracy": 0.8, "broken": 4}},
        }
        rows, facts = planted.rows_of([run] * 10, "digits")
        assert "of 10 seeds: by errors contrast" in facts[0]
        return [programs["rows"].verdict(one) for one in programs["rows"].judged(rows)]

    assert said(first, other, other) == ["holds"] * 5
    assert said(first, first, other)[:3] == ["no significant difference"] * 3
    assert said(first, other, first)[:3] == ["no significant difference"] * 3
    assert said(other, other, other)[:3] == ["does not hold"] * 3


def test_faults_do_what_their_names_say(programs):
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    faults = {
        name: fault(weight, torch.Generator().manual_seed(1)) for name, fault in programs["planted"].FAULTS.items()
    }
    for name, share in (("noise of 0.7 std", 0.7), ("noise of 1.2 std", 1.2)):
        assert (faults[name] - weight).std().item() == pytest.approx(share * weight.std().item(), rel=0.05)
    rows = faults["rows permuted"]
    assert not torch.equal(rows, weight) and torch.equal(rows.sort(0).values, weight.sort(0).values)
    assert {tuple(row.tolist()) for row in rows} == {tuple(row.tolist()) for row in weight}


def test_repairs(programs, tmp_path):
    repairs = programs["repairs"]
    report = repairs.BaselinesReport.from_json((repairs.REPORTS["small"] / "report.json").read_text(encoding="utf-8"))
    (program,) = repairs.program({"small": report})
    check(programs, program, tmp_path, seeds=5)
    gains, against, foretold = program.rows
    nets = [run.flips.net for run in report.runs if run.method == "chosen"]
    assert list(gains.comparisons[0].differences) == nets
    full = [run.flips.net for run in report.runs if run.method == "full"]
    assert list(against.comparisons[0].differences) == [a - b for a, b in zip(nets, full, strict=True)]
    assert len(against.comparisons) == 4
    assert foretold.comparisons[0].differences == tuple(report.correlations["contrast"].values())


def test_a_killed_program_repeats_only_what_had_not_finished(programs, common, lab, tiny, tmp_path, monkeypatch):
    whole = programs["tam"].program(lab)
    train, trained = common.train, []

    def killed(setting, device):
        if len(trained) == 11:
            raise KeyboardInterrupt
        trained.append(setting)
        return train(setting, device)

    path = tmp_path / "killed.jsonl"
    monkeypatch.setattr(common, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        programs["tam"].program(common.Lab(tiny, common.Records(path), say=lambda line: None))
    path.write_bytes(path.read_bytes()[:-20])  # and the last line was torn
    monkeypatch.setattr(common, "train", lambda setting, device: trained.append(setting) or train(setting, device))
    resumed = programs["tam"].program(common.Lab(tiny, common.Records(path), say=lambda line: None))
    assert resumed == whole
    assert len(trained) == len(lab.records.found) + 1  # the torn one ran twice
    trained.clear()
    assert programs["tam"].program(common.Lab(tiny, common.Records(path), say=lambda line: None)) == whole
    assert not trained


@pytest.mark.parametrize("weighted", [False, True])
def test_sharpness_is_the_top_eigenvalue(programs, weighted):
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    scale = torch.linspace(0.2, 3, 8, dtype=torch.float64) if weighted else torch.ones(8, dtype=torch.float64)

    def loss(w):
        return (torch.tanh(x @ w[:6].view(3, 2)) @ w[6:] - y).square().mean()

    exact = torch.linalg.eigvalsh(scale[:, None] * torch.autograd.functional.hessian(loss, w) * scale)
    found = programs["vradam_edge"].top_eigenvalue(
        lambda: torch.autograd.grad(loss(w), [w], create_graph=True), [w], [scale], 300
    )
    assert found == pytest.approx(exact[exact.abs().argmax()].item(), rel=1e-6)


def test_the_large_size_runs_on_images_of_the_hub(common, monkeypatch, tmp_path):
    import datasets
    import numpy
    from PIL import Image

    def tiny_hub(name, split):
        draw = numpy.random.default_rng(len(split))
        images = [Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=numpy.uint8)) for _ in range(20)]
        return {"img": images, "label": [index % 10 for index in range(20)]}

    monkeypatch.setattr(datasets, "load_dataset", tiny_hub)
    common.hub_images.cache_clear()
    common._data.cache_clear()
    monkeypatch.setitem(common.MODELS, "resnet18", lambda: common.resnet18(width=8))
    size = replace(common.SIZES["gpu"], steps=2, batch=4)
    result = common.train(size.setting("tam", 0.01, every=1))
    common.hub_images.cache_clear()
    common._data.cache_clear()
    assert set(result["scores"]) == {"validation", "test", *common.SHIFTS}
    assert not result["diverged"] and len(result["curve"]) == 2
    assert 11e6 < sum(p.numel() for p in common.resnet18().parameters()) < 11.3e6


# ---- the committed page ---------------------------------------------------------------------------------------------


def test_the_page_is_what_its_figures_give(programs):
    assert programs["page"].main(["--check"]) == 0


def test_every_program_has_its_rows(programs):
    data = json.loads((ROOT / "docs" / "claims.json").read_text(encoding="utf-8"))
    assert set(data) == set(programs["page"].ABOUT)
    for name, found in data.items():
        for row in found["small"]["rows"]:
            least = {"bloop": 3, "repairs": 5}.get(name, 8)
            assert all(len(one["differences"]) >= least for one in row["comparisons"])
