"""The grid runs every point once, loses nothing when it is killed, goes on when a run fails, and treats all alike."""

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.errors import TrainingStopped
from hf_momentum.evaluation.pareto import MAIN_ONLY
from hf_momentum.training import MomentumTrainer, job, load_recipe, pareto
from hf_momentum.training.pareto import BASE, Plan, Point, Record
from hf_momentum.training.replay import ReplayMixture


@pytest.fixture
def words(tiny):
    """The tiny recipe with an auxiliary objective, as overrides without an output folder."""
    fields = {
        "seed": 0,
        "aux_dataset": f"prose={tiny.folder / 'prose.jsonl'}",
        "auxiliary": f"told={tiny.folder / 'prose.jsonl'}",
    }

    def made(**more) -> list[str]:
        return [word for word in tiny.words("unused", **{**fields, **more}) if not word.startswith("--output_dir")]

    return made


def planned(words, folder, **changed) -> Plan:
    fields = {"surgeries": ["bloop", "mixed"], "lambdas": [0.1, 1.0], "seeds": 2, "main": None, "auxiliary": None}
    return pareto.plan(None, words, **{**fields, **changed}, folder=str(folder))


class FakeRunner:
    """Losses that follow from the point, in place of training; `broken` points raise or fail as they are told."""

    def __init__(self, **broken: str) -> None:
        self.ran: list[Point] = []
        self.broken = broken

    def __call__(self, made: Plan, point: Point) -> Record:
        self.ran.append(point)
        status = self.broken.get(point.surgery, "finished")
        if status == "killed":
            raise KeyboardInterrupt
        gain = {"bloop": 0.9, "mixed": 0.3}.get(point.surgery, 0.0)
        losses = {"code": 1 + point.lam / 10 + point.seed / 100, "told": 2 - gain * (0.5 + point.lam / 10)}
        message = "" if status == "finished" else "out of luck"
        losses = losses if status == "finished" else {}
        return Record(point.surgery, point.lam, point.seed, made.digest, status, losses, 3.0, message)


def lines_of(folder: Path) -> list[str]:
    return (folder / "runs.jsonl").read_text().splitlines()


# ---- what is to be run -----------------------------------------------------------------------------------------------


def test_the_grid_is_every_surgery_lambda_and_seed_and_main_only_per_seed_and_the_base_once(words, tmp_path):
    points = planned(words(seed=5), tmp_path).points()
    assert points[0] == Point(BASE, 0.0, 5)
    assert [point for point in points if point.surgery == MAIN_ONLY] == [Point(MAIN_ONLY, 0.0, s) for s in (5, 6)]
    rest = {(point.surgery, point.lam, point.seed) for point in points if point.surgery not in (BASE, MAIN_ONLY)}
    assert rest == {(s, lam, seed) for s in ("bloop", "mixed") for lam in (0.1, 1.0) for seed in (5, 6)}
    assert len(points) == 1 + 2 + 8


def test_main_and_auxiliary_are_the_recipes_first_unless_chosen(words, tmp_path):
    made = planned(words(), tmp_path)
    assert (made.main, made.auxiliary) == ("code", "told")
    chosen = planned(words(), tmp_path, main="prose", auxiliary="code")
    assert (chosen.main, chosen.auxiliary) == ("prose", "code")


def test_runs_differ_in_nothing_but_what_they_are_named_by(words, tmp_path):
    """The same steps and batches for all; replay alone sees the auxiliary examples in the main batch."""
    made = planned(words(per_device_train_batch_size=3, aux_batch_size=2), tmp_path, surgeries=["bloop", "replay"])
    recipes = {point: made.recipe(point) for point in made.points()}
    for point, recipe in recipes.items():
        assert (recipe.training.seed, recipe.training.data_seed) == (point.seed, point.seed)
        assert recipe.bloop.lam == [point.lam]
        assert recipe.bloop.surgery == (point.surgery if point.surgery in ("bloop", "replay") else "mixed")
        assert recipe.training.max_steps == 4
        assert recipe.training.save_strategy == "no" and not recipe.training.load_best_model_at_end
        assert recipe.training.per_device_train_batch_size == (5 if point.surgery == "replay" else 3)


def test_the_digest_knows_the_recipe_and_not_the_point(words, tmp_path):
    digest = planned(words(), tmp_path).digest
    assert planned(words(seed=7, save_strategy="no"), tmp_path / "other", seeds=5, lambdas=[3.0]).digest == digest
    assert planned(words(learning_rate=0.01), tmp_path).digest != digest
    assert planned(words(rho="auto"), tmp_path).digest != digest


BAD = [
    ({"surgeries": ["blop"]}, {}, r"unknown surgery 'blop' \(did you mean 'bloop'.*accepted: bloop, mixed, replay"),
    ({"surgeries": []}, {}, "surgeries is empty; accepted: bloop"),
    ({"surgeries": ["bloop", "bloop"]}, {}, "surgeries holds a value twice"),
    ({"lambdas": []}, {}, "lambdas is empty"),
    ({"lambdas": [0.1, -1.0]}, {}, "lambdas must be positive numbers, got -1"),
    ({"lambdas": [float("nan")]}, {}, "lambdas must be positive numbers, got nan"),
    ({"lambdas": [float("inf")]}, {}, "lambdas must be positive numbers, got inf"),
    ({"lambdas": [0.0, 1.0]}, {}, "lambdas holds 0, which is the main-only run"),
    ({"lambdas": [1.0, 1.0]}, {}, "lambdas holds a value twice"),
    ({"seeds": 0}, {}, "seeds must be at least 1, got 0"),
    ({}, {"auxiliary": None}, r"the recipe has no split of auxiliary; add auxiliary: \[NAME=SOURCE@SPLIT\]"),
    ({}, {"aux_dataset": None}, "the recipe has no auxiliary data; name some with aux_dataset"),
    ({}, {"in_distribution": None}, "the recipe has no split of in_distribution"),
    ({"main": "cod"}, {}, r"--main 'cod' is no split of the recipe \(did you mean 'code'.*it has code, prose, told"),
    ({"main": "told"}, {}, "main and auxiliary are the same split, 'told'"),
    ({}, {"max_steps": None, "num_train_epochs": 1}, "the recipe counts epochs.*set max_steps"),
    ({}, {"lam": 0.1}, "--lam is set by the grid; give the weights with --lambdas"),
    ({}, {"surgery": "mixed"}, "--surgery is set by the grid"),
    ({}, {"learning_rate": -1}, "lr must be a number"),
]


@pytest.mark.parametrize(("changed", "fields", "message"), BAD)
def test_input_that_cannot_be_used_is_one_line_before_anything_is_written(changed, fields, message, words, tmp_path):
    typed = words()
    for name, value in fields.items():
        typed = [word for word in typed if not word.startswith(f"--{name}=")]
        typed += [] if value is None else [f"--{name}={value}"]
    with pytest.raises(InputError, match=message) as error:
        planned(typed, tmp_path / "never", **changed)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "never").exists()


# ---- running it ------------------------------------------------------------------------------------------------------


def test_every_point_runs_once_and_leaves_a_line(words, tmp_path):
    made, runner, said = planned(words(), tmp_path / "out"), FakeRunner(), []
    records = pareto.run_grid(made, run=runner, say=said.append)
    assert runner.ran == made.points() == list(records)
    assert [json.loads(line)["status"] for line in lines_of(tmp_path / "out")] == ["finished"] * 11
    assert said[2] == "[3/11] bloop, lambda 0.1, seed 0: code 1.010, told 1.541 after 3 s; 8 to go, about 24 s"
    assert said[0].startswith("[1/11] base model: code") and said[0].endswith("; 10 to go")
    assert said[-1].startswith("[11/11] ") and "to go" not in said[-1]


def test_a_killed_command_repeats_only_what_has_no_line(words, tmp_path):
    made = planned(words(), tmp_path / "out")
    first = FakeRunner(mixed="killed")
    with pytest.raises(KeyboardInterrupt):
        pareto.run_grid(made, run=first, say=str)
    with open(tmp_path / "out" / "runs.jsonl", "a") as file:
        file.write('{"surgery": "mixed", "la')  # the process died while it wrote
    second = FakeRunner()
    records = pareto.run_grid(made, run=second, say=str)
    assert second.ran == [point for point in made.points() if point not in first.ran[:-1]]
    assert list(records) == made.points() and all(record.status == "finished" for record in records.values())
    assert len([line for line in lines_of(tmp_path / "out") if line.endswith("}")]) == 11
    third = FakeRunner()
    assert pareto.run_grid(made, run=third, say=str) == records and third.ran == []


def test_more_seeds_or_lambdas_add_runs_and_another_recipe_starts_anew(words, tmp_path):
    pareto.run_grid(planned(words(), tmp_path), run=FakeRunner(), say=str)
    more = FakeRunner()
    pareto.run_grid(planned(words(), tmp_path, lambdas=[0.1, 1.0, 3.0]), run=more, say=str)
    assert {point.lam for point in more.ran} == {3.0} and len(more.ran) == 4
    other = FakeRunner()
    pareto.run_grid(planned(words(learning_rate=0.01), tmp_path), run=other, say=str)
    assert len(other.ran) == 11


def test_a_failed_run_is_told_of_and_repeated_and_the_rest_goes_on(words, tmp_path):
    made, said = planned(words(), tmp_path), []
    records = pareto.run_grid(made, run=FakeRunner(mixed="failed"), say=said.append)
    assert [record.status for record in records.values()].count("failed") == 4 and len(records) == 11
    assert any("mixed, lambda 0.1, seed 0: failed: out of luck" in line for line in said)
    made_report = pareto.report(made, records)
    assert len(made_report.troubles) == 4 and made_report.volumes["mixed"] == {}
    assert made_report.verdict().startswith("Too few common seeds to compare bloop with mixed")
    again = FakeRunner()
    assert all(record.status == "finished" for record in pareto.run_grid(made, run=again, say=str).values())
    assert {point.surgery for point in again.ran} == {"mixed"} and len(again.ran) == 4


def test_a_run_that_stopped_is_a_result(words, tmp_path):
    made = planned(words(), tmp_path)
    records = pareto.run_grid(made, run=FakeRunner(mixed="stopped"), say=str)
    again = FakeRunner()
    pareto.run_grid(made, run=again, say=str)
    assert again.ran == []
    made_report = pareto.report(made, records)
    assert sorted(made_report.volumes["mixed"]) == [0, 1]
    assert "mixed, lambda 0.1, seed 0 stopped: out of luck; it has no point on its front" in made_report.troubles


@pytest.mark.parametrize(("status", "kind"), [("failed", InputError), ("stopped", TrainingStopped)])
def test_without_a_base_model_nothing_is_run(status, kind, words, tmp_path):
    runner = FakeRunner(**{BASE: status})
    with pytest.raises(kind, match="the base model could not be measured: out of luck"):
        pareto.run_grid(planned(words(), tmp_path / "out"), run=runner, say=str)
    assert len(runner.ran) == 1 and not (tmp_path / "out" / "runs.jsonl").exists()


def test_a_dry_run_says_how_many_and_how_long_and_writes_nothing(words, tmp_path):
    made = planned(words(), tmp_path / "out")
    assert pareto.outlook(made, 1).startswith(
        "11 runs: 8 of 2 surgeries x 2 lambdas x 2 seeds, 2 main only, and the base model measured once; 0 finished, "
        "11 to run; how long is known once"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt):
        pareto.run_grid(made, run=FakeRunner(mixed="killed"), say=str)
    assert pareto.outlook(made, 1).endswith("4 finished, 7 to run, about 21 s")
    assert pareto.outlook(made, 2).endswith("4 finished, 7 to run, about 10 s")


def test_the_report_holds_what_ran_and_what_was_held_equal(words, tmp_path):
    made = planned(words(gradient_accumulation_steps=2), tmp_path)
    records = pareto.run_grid(made, run=FakeRunner(), say=str)
    made_report = pareto.report(made, records)
    text = made_report.to_markdown()
    assert made_report.base == (1.0, 2.0) and len(made_report.runs) == 10
    assert "In each step a surgery sees 8 main and 8 auxiliary examples; replay sees 16 of one mixture" in text
    assert "nats per byte" in text and "All runs have 4 steps" in text
    assert made_report.verdict().startswith("bloop won against mixed: ")
    assert "--surgeries bloop,mixed --lambdas 0.1,1 --seeds 2 --main code --auxiliary told" in made_report.command


# ---- the command -----------------------------------------------------------------------------------------------------


def command(tmp_path, typed, *more: str) -> int:
    """With a recipe file, as a user has one."""
    path = tmp_path / "recipe.yaml"
    path.write_text("# a recipe\n" + "".join(f"{w.removeprefix('--').replace('=', ': ', 1)}\n" for w in typed))
    grid = ["--surgeries", "bloop,mixed", "--lambdas", "0.1,1", "--seeds", "2", "--output_dir", str(tmp_path / "out")]
    return main(["pareto", "--config", str(path), *grid, *more])


def test_the_command_writes_the_report_and_prints_the_verdict(words, tmp_path, capsys, monkeypatch):
    real = pareto.run_grid
    monkeypatch.setattr(pareto, "run_grid", partial(real, run=FakeRunner()))
    assert command(tmp_path, words()) == 0
    printed = capsys.readouterr().out
    assert "[11/11] " in printed and "\nbloop won against mixed: " in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"runs.jsonl", "report.md", "report.json", "fronts.png"}
    assert command(tmp_path, words(), "--dry-run") == 0
    assert "11 finished, 0 to run" in capsys.readouterr().out
    monkeypatch.setattr(pareto, "run_grid", partial(real, run=FakeRunner(mixed="failed")))
    assert command(tmp_path, words(), "--learning_rate", "0.01", "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit"] == 1 and any("seed 1 failed: out of luck" in line for line in answer["summary"])
    assert Path(answer["report_json"]).is_file() and answer["report"]["methods"] == ["bloop", "mixed"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--surgeries", "bloop,mixd"], "unknown surgery 'mixd' (did you mean 'mixed'"),
        (["--lambdas", "a,b"], "lambdas must be numbers with commas, such as 0.01,0.1,1; got 'a,b'"),
        (["--lambdas=-1"], "lambdas must be positive numbers, got -1"),
        (["--lambdas", ""], "lambdas is empty"),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--learnin_rate", "1"], "did you mean 'learning_rate'"),
    ],
)
def test_a_slip_is_one_line_and_nothing_is_written(more, message, words, tmp_path, capsys):
    assert command(tmp_path, words(), *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


# ---- real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """A whole grid in this process: its plan, and its records."""
    folder = tmp_path_factory.mktemp("real") / "out"
    fields = {"aux_dataset": f"prose={tiny.folder / 'prose.jsonl'}", "auxiliary": f"told={tiny.folder / 'prose.jsonl'}"}
    typed = tiny.words("unused", **fields, seed=0, learning_rate=0.2, max_steps=6)
    typed = [word for word in typed if not word.startswith("--output_dir")]
    made = planned(typed, folder, surgeries=["bloop", "replay"], lambdas=[1.0])
    return made, pareto.run_grid(made, say=str)


def test_real_runs_learn_what_they_are_trained_on(real):
    made, records = real
    assert all(record.status == "finished" for record in records.values()), records
    assert all(set(record.losses) == {"code", "prose", "told"} for record in records.values())
    base, alone = records[Point(BASE, 0.0, 0)], records[Point(MAIN_ONLY, 0.0, 0)]
    assert alone.losses["code"] < base.losses["code"], "training on code lowers its loss"
    for surgery in ("bloop", "replay"):
        found = records[Point(surgery, 1.0, 0)]
        assert found.losses["told"] < alone.losses["told"], "auxiliary examples lower the auxiliary loss"
        assert found.losses["told"] == found.losses["prose"], "the two splits are one file"
    assert {path.name for path in Path(made.folder).iterdir()} == {"runs.jsonl"}, "a run leaves a line and no weights"


def test_all_seeds_are_measured_on_the_same_examples(real):
    """Where the recipe limits them: the untrained model then has the same losses whatever the seed."""
    made, records = real
    few = replace(made, overrides=[*made.overrides, "--max_eval_examples=2"])
    first, second = (pareto.run_point(few, Point(BASE, 0.0, seed)).losses for seed in (0, 1))
    assert first == second != records[Point(BASE, 0.0, 0)].losses


def test_seeds_differ_in_what_they_see(real):
    _, records = real
    assert records[Point(MAIN_ONLY, 0.0, 0)].losses != records[Point(MAIN_ONLY, 0.0, 1)].losses


def test_base_and_main_only_are_what_the_main_job_finds_without_an_auxiliary_objective(real, tmp_path):
    made, records = real
    words = [word for word in made.overrides if not word.startswith(("--aux_dataset", "--output_dir"))]
    outcome = job.train(load_recipe(None, [*words, f"--output_dir={tmp_path}"]))
    for point, when in ((Point(BASE, 0.0, 0), "before"), (Point(MAIN_ONLY, 0.0, 0), "after")):
        expected = {split.name: getattr(split, when)["loss"].value for split in outcome.report.splits}
        assert records[point].losses == expected, point


def test_replay_sees_as_many_examples_per_step_as_a_surgery(real):
    made, _ = real
    trainers = {name: job.prepare(made.recipe(Point(name, 1.0, 0))).trainer for name in ("bloop", "replay")}
    sizes = {name: len(next(iter(trainer.get_train_dataloader()))["input_ids"]) for name, trainer in trainers.items()}
    assert sizes == {"bloop": 4, "replay": 8}
    assert isinstance(trainers["replay"].train_dataset, ReplayMixture)


def test_a_run_is_the_same_alone_as_behind_others(real):
    """Nothing of one run is left behind for the next: neither random states nor an Accelerator's."""
    made, records = real
    for point in (Point("bloop", 1.0, 1), Point("replay", 1.0, 0)):
        assert pareto.run_point(made, point).losses == records[point].losses


@pytest.mark.slow  # half a minute; the processes of a comparison (tests/test_compare.py) stay in the short suite
def test_processes_side_by_side_find_what_one_process_finds(real, tmp_path):
    made, _ = real
    other = replace(made, folder=str(tmp_path / "out"), surgeries=["bloop"], seeds=[0])
    said: list[str] = []
    found = pareto.run_grid(other, jobs=2, say=said.append)
    assert list(found) == other.points() and len(said) == 3
    for point in other.points():
        assert found[point].status == "finished", found[point].message
        # Both processes may have other numbers of threads, hence another order of their sums.
        assert found[point].losses == pytest.approx(pareto.run_point(made, point).losses, rel=1e-5)
    assert {path.name for path in (tmp_path / "out" / "logs").iterdir()} == {"main_only-0-0.log", "bloop-1-0.log"}


def test_what_breaks_is_a_failed_run_with_its_reason(real):
    """The overrides are changed behind the plan's back, as when a data file goes away."""
    made, _ = real
    record = pareto.run_point(
        replace(made, overrides=[*made.overrides, "--train_dataset=gone.jsonl"]), made.points()[1]
    )
    assert (record.status, record.losses) == ("failed", {})
    assert record.message == "dataset file gone.jsonl does not exist"


def test_a_process_that_dies_is_a_failed_run(words, tmp_path, monkeypatch):
    """As when the system kills it for its memory: it cannot say so itself."""
    made = planned(words(), tmp_path, seeds=1)
    monkeypatch.setattr(pareto.sys, "executable", "false")
    records = pareto.run_grid(made, jobs=2, run=FakeRunner(), say=str)
    failed = [record for record in records.values() if record.status == "failed"]
    assert len(failed) == 5 and "its process ended with status 1; see the log" in failed[0].message
    assert len(lines_of(tmp_path)) == 6


def test_a_diverging_run_stops_and_is_a_result(real):
    made, _ = real
    wild = replace(made, overrides=[*made.overrides, "--learning_rate=1e30", "--max_grad_norm=0"])
    record = pareto.run_point(wild, Point("bloop", 1.0, 0))
    assert (record.status, record.losses) == ("stopped", {}) and record.message


def test_the_memory_of_a_run_is_free_before_the_next(real):
    """Without waiting for Python to look for circles by itself, which it does when it likes."""
    made, _ = real
    gc.disable()
    try:
        assert pareto.run_point(made, Point("bloop", 1.0, 0)).status == "finished"
        assert not [found for found in gc.get_objects() if issubclass(type(found), MomentumTrainer)]
    finally:
        gc.enable()


# ---- the shipped recipes ---------------------------------------------------------------------------------------------


SMALL = ["--scratch_steps=2", "--scratch_hidden_size=32", "--scratch_layers=1", "--block_size=64", "--max_steps=2"]
SMALL += ["--max_train_examples=64", "--max_eval_examples=4", "--use_cpu", "--disable_tqdm=true"]
SHIPPED = {"bloop_domain": ("prose", "code"), "bloop_format": ("code", "json"), "bloop_replay": ("code", "prose")}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_have_a_front(name, tmp_path):
    made = pareto.plan(name, ["--use_cpu"], ["bloop", "mixed", "replay"], [0.1], 1, None, None, str(tmp_path))
    assert (made.main, made.auxiliary) == SHIPPED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name, tmp_path, tmp_path_factory):
    words = [*SMALL, f"--cache_dir={tmp_path_factory.getbasetemp() / 'recipes'}"]
    made = pareto.plan(name, words, ["bloop"], [0.1], 1, None, None, str(tmp_path))
    record = pareto.run_point(made, Point("bloop", 0.1, 0))
    assert record.status == "finished", record.message
    assert set(SHIPPED[name]) <= set(record.losses)
