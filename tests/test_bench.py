"""The benchmarks measure what they say: rotated, paired, in one process; and the page follows from their JSON files."""

import doctest
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ("bench_shapes", "bench_optimizers", "bench_table", "bench_training", "state_dtype_curves")


@pytest.fixture(scope="module")
def scripts():
    """The programs as modules; they import each other as programs of one folder do."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield {name: importlib.import_module(name) for name in SCRIPTS}
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def optimizers(scripts):
    return scripts["bench_optimizers"]


@pytest.fixture
def curves(scripts):
    return scripts["state_dtype_curves"]


@pytest.fixture(autouse=True)
def threads():
    """The programs set the number of threads for their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_examples_in_docstrings_hold(scripts, name):
    assert doctest.testmod(scripts[name]).failed == 0


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_the_order_rotates_and_warm_up_is_left_out(optimizers):
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    times = optimizers.measure(runs, rounds=3, warmup=2, timer=lambda run: run() or {"ms": float(len(called))})
    assert "".join(called) == "abc" + "bca" + "cab" + "abc" + "bca"
    # The calls are counted from 1; the first two rounds are warm-up, so a's are the calls 8, 10 and 15.
    assert times["a"]["ms"] == [8.0, 10.0, 15.0]


def test_ratios_are_paired_by_round(optimizers):
    """A machine that is three times slower in one round leaves paired ratios alone; those of medians would move."""
    theirs = [1.0, 1.0, 3.0, 1.0, 3.0]
    ours = [2.0 * x for x in theirs]
    assert optimizers.paired_ratios(ours, theirs) == [2.0, 2.0, 2.0]
    assert optimizers.paired_ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == [2.0, 3.0, 4.0]


def test_shapes_written_out_are_those_of_the_real_classes(scripts):
    for name, (_, build, written_out) in scripts["bench_shapes"].MODELS.items():
        assert sorted(build()) == sorted(written_out()), name


def test_small_state_is_counted_in_bytes(optimizers):
    weight = torch.nn.Parameter(torch.zeros(100))
    weight.grad = torch.ones(100)
    optimizer = optimizers.fused_adamw([weight])
    optimizer.step()
    assert optimizers.state_bytes(optimizer) == 2 * 400 + 4  # two averages and a counter

    @dataclass
    class Packed:
        of: torch.nn.Parameter
        codes: torch.Tensor
        scales: torch.Tensor

    optimizer.state[weight]["exp_avg"] = {0: (Packed(weight, torch.zeros(100, dtype=torch.int8), torch.zeros(1)),)}
    assert optimizers.state_bytes(optimizer) == 400 + 4 + 104  # the weight itself is not its own


def test_rows_that_do_not_fit_together_are_measured_in_passes(optimizers):
    def row(name, against=None):
        return optimizers.Row(name, optimizers.fused_adamw, against)

    rows = [row("adamw"), row("sgd", "adamw"), row("a", "sgd"), row("b", "adamw"), row("huge", "adamw")]
    needs = {"adamw": 2, "sgd": 1, "a": 1, "b": 3, "huge": 9}
    groups, left_out = optimizers.passes(rows, needs, free=5)
    assert [[one.name for one in group] for group in groups] == [["adamw", "sgd", "a"], ["adamw", "b"]]
    assert left_out == ["huge"]
    # Without room for its baseline a row is measured alone.
    groups, _ = optimizers.passes(rows[:4], needs, free=4)
    assert [[one.name for one in group] for group in groups][-1] == ["b"]


def test_abnormal_numbers_are_refused(optimizers):
    optimizers.require_normal([torch.tensor([0.0, 1e-30, -1.0]), torch.tensor([1])], "x")
    for value in (float("nan"), float("inf"), 1e-42):
        with pytest.raises(RuntimeError, match="denormal"):
            optimizers.require_normal([torch.tensor([1.0, value])], "x")


def test_gradients_are_clipped_in_every_round(optimizers):
    """Else a kernel that leaves small gradients alone would skip the work that is to be timed."""
    timer = optimizers.clock_timer()
    bench = optimizers.Bench.of([(50, 40), (30,)], torch.float32, torch.device("cpu"), 2, 0, timer)
    norms = []
    for _ in range(3):
        norms.append(float(torch.nn.utils.clip_grad_norm_(bench.params, optimizers.CLIP_TO)))
    assert norms == pytest.approx([2.0, 1.0, 1.0], rel=0.1)


# ---- the programs, on tiny shapes -----------------------------------------------------------------------------------


def test_steps_and_scaling_are_measured(optimizers, tmp_path, capsys):
    words = ["--tables", "step", "peers", "--shapes", "tiny", "--rounds", "3", "--warmup", "1", "--peer-rounds", "1"]
    words += ["--scaling", "--scaling-parameters", "1000", "--scaling-tensors", "10", "20"]
    words += ["--threads", "1", "--output", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    assert optimizers.main(words) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = found["tables"][0]["rows"]
    assert list(rows) == ["adamw", "sgd", *optimizers.TARGETS]
    assert rows["tam"]["against"] == "adamw" and rows["critical_sgd"]["against"] == "sgd"
    assert rows["tam"]["target"] == 1.05 and len(rows["tam"]["ratio"]) == 3
    assert rows["tam"]["state_bytes_per_parameter"] == pytest.approx(4, rel=0.1)
    assert [point["tensors"] for point in found["scaling"]["tensors"]] == [10, 20]
    assert {"processor", "torch", "threads", "dtype"} <= set(found["facts"])
    assert (tmp_path / "bench.png").stat().st_size > 1000
    said = capsys.readouterr().out
    for peer in ("pytorch_optimizer TAM", "torchao AdamW8bit", "bitsandbytes AdamW8bit"):
        assert peer in said


def test_clipping_and_small_state_are_measured(optimizers, tmp_path):
    words = ["--tables", "clip", "state", "--shapes", "tiny", "--rounds", "2", "--warmup", "1", "--threads", "1"]
    words += ["--optimizers", "tam", "vradam", "--output", str(tmp_path / "bench.json")]
    assert optimizers.main(words) == 0
    clip, state = (table["rows"] for table in json.loads((tmp_path / "bench.json").read_text())["tables"])
    assert list(clip) == ["clip+adamw", "adamw", "clip", "tam", "vradam"]
    assert clip["tam"]["target"] == 0.65 and clip["tam"]["against"] == "clip+adamw"
    assert list(state)[:3] == ["tam", "tam bfloat16", "tam int8"]
    assert state["tam int8"]["against"] == "tam"
    assert state["tam bfloat16"]["bytes_per_state_element"] == pytest.approx(2, rel=0.15)
    assert state["tam int8"]["bytes_per_state_element"] < 1.4  # small tensors may keep float32


def test_surgery_is_measured_and_added_to_what_is_there(optimizers, tmp_path, capsys):
    words = ["--shapes", "tiny", "--rounds", "2", "--warmup", "1", "--threads", "1", "--optimizers", "tam"]
    file = tmp_path / "bench.json"
    assert optimizers.main([*words, "--tables", "step", "surgery", "--output", str(file)]) == 0
    first = json.loads(file.read_text())
    assert optimizers.main([*words, "--tables", "surgery", "--output", str(file), "--add"]) == 0
    step, surgery = json.loads(file.read_text())["tables"]
    assert step == first["tables"][0]
    assert surgery["rows"] != first["tables"][1]["rows"]
    assert list(surgery["rows"]) == ["adamw", "bloop surgery", "bloop combine"]
    assert surgery["rows"]["bloop combine"]["target"] == 0.85
    assert surgery["rows"]["bloop surgery"]["state_bytes_per_parameter"] == pytest.approx(4, rel=1e-3)
    with pytest.raises(SystemExit):
        optimizers.main([*words[:-2], "--rounds", "3", "--tables", "surgery", "--output", str(file), "--add"])
    assert "was measured with another rounds; write to another file" in capsys.readouterr().err


def test_the_rows_of_a_surgery_do_what_one_does(optimizers):
    bench = optimizers.Bench.of([(50, 40), (30,)], torch.float32, torch.device("cpu"), 2, 0, optimizers.clock_timer())
    for absorbs in (True, False):
        rows = optimizers.Surgery(bench.params, absorbs=absorbs)
        old = [rows.state[param]["average"].clone() for param in bench.params]
        rows.step()
        left = sum(float((param.grad * e).sum()) for param, e in zip(bench.params, old, strict=True))
        assert abs(left) < 1e-6
        for param, e in zip(bench.params, old, strict=True):
            expected = (1 - rows.RHO) * e - rows.RHO * (not absorbs) * param.grad
            assert torch.allclose(rows.state[param]["average"], expected, rtol=1e-5, atol=1e-8)


def test_whole_trainer_steps_are_measured(scripts, tmp_path):
    training = scripts["bench_training"]
    words = ["--width", "32", "--layers", "1", "--vocabulary", "64", "--length", "8", "--batch", "2", "--threads", "1"]
    words += ["--steps", "2", "--warmup", "1", "--rounds", "2", "--optimizers", "tam"]
    words += ["--output", str(tmp_path / "training.json")]
    assert training.main(words) == 0
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert list(rows) == ["adamw_torch_fused", "tam"]
    assert all(line["tokens_per_second"][1] > 0 for line in rows.values())
    assert rows["tam"]["against"] == "adamw_torch_fused"
    assert rows["tam"]["state_bytes"] < 0.6 * rows["adamw_torch_fused"]["state_bytes"]


def test_curves_are_trained_once_and_compared(curves, tiny, tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    words = [word.removeprefix("--").partition("=") for word in tiny.words(tmp_path / "out")]
    recipe.write_text("".join(f"{key}: {value}\n" for key, _, value in words))
    asked = ["--recipes", str(recipe), "--seeds", "2", "--steps", "5", "--dtypes", "float32", "int8"]
    asked += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "curves.json")]
    asked += ["--plot", str(tmp_path / "curves.png"), "--page", str(tmp_path / "none.md")]
    assert curves.main(asked) == 0
    found = json.loads((tmp_path / "curves.json").read_text())["recipes"]["small"]
    assert found["seeds"] == [0, 1] and found["steps"] == [5]
    assert set(found["differences"]) == {"code", "prose"} and set(found["differences"]["code"]) == {"int8"}
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert str(tmp_path) not in (tmp_path / "curves.json").read_text()
    capsys.readouterr()
    assert curves.main(asked) == 0
    assert ": training" not in capsys.readouterr().out


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_the_paired_interval_of_a_case_by_hand(curves):
    # Mean 3; squares of the deviations 4, 1, 0, 1, 4 sum to 10, so s = sqrt(10 / 4) and s / sqrt(5) = sqrt(1 / 2).
    mean, low, high = curves.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * 0.5**0.5
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        curves.t_interval([1.0])


def test_the_quantiles_are_students(curves):
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(curves.T_975, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


def test_differences_are_taken_seed_by_seed(curves):
    def run(dtype, seed, loss):
        settings = {"optim": "tam", "max_steps": "5"}
        return {
            "recipe": "r", "state_dtype": dtype, "seed": seed, "unit": "byte", "settings": settings,
            "train": [[5, loss]], "final": {"code": loss},
        }  # fmt: skip

    # The seeds differ by 10, int8 by 0.1 within each seed: unpaired nothing could be seen.
    runs = [run(d, s, 10.0 * s + (0.1 + 0.001 * s) * (d == "int8")) for s in range(5) for d in ("int8", "float32")]
    line = curves.summary(runs)["recipes"]["r"]["differences"]["code"]["int8"]
    assert line["mean"] == pytest.approx(0.102) and 0.09 < line["low"] < line["high"] < 0.11
    assert line["verdict"] == "higher loss"


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_page_follow_from_the_json_files(scripts):
    table = scripts["bench_table"]
    page = (ROOT / "docs" / "performance.md").read_text()
    assert table.written(page, table.load()) == page, "run python scripts/bench_table.py"


def test_a_changed_figure_changes_the_page(scripts):
    table = scripts["bench_table"]
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = {
        "adamw": {"ms": [1, 2, 3], "state_bytes_per_parameter": 8.0},
        "tam": {
            "ms": [1, 2, 3], "ratio": [1.231, 1.232, 1.233], "against": "adamw", "target": 1.05, "at_least": False,
            "state_bytes_per_parameter": 4.0,
        },
    }  # fmt: skip
    measured = {"tables": [{"table": "step", "shape": "gpt2", "parameters": 10, "tensors": 1, "rows": rows}]}
    new = table.written(page, {"cpu": measured})
    assert "**1.23** (1.23-1.23), aim 1.05: missed" in new and new != page
    rows["tam"]["ratio"] = [1.0, 1.04, 1.05]
    assert "**1.04** (1.00-1.05), aim 1.05: met" in table.written(page, {"cpu": measured})


def test_what_is_not_measured_says_that_it_is_predicted(scripts):
    text = scripts["bench_table"].steps({})
    assert "predicted 1.29 (36 of 28 bytes), aim 1.30" in text
    assert "**" not in text
