"""A comparison does each run once, loses nothing when it is killed, shares its runs, and treats optimizers alike."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.errors import TrainingStopped
from hf_momentum.evaluation.comparison import ComparisonReport
from hf_momentum.evaluation.results import RunScores
from hf_momentum.training import compare, compare_report, compare_runs
from hf_momentum.training.compare import BASE, Plan, Run
from hf_momentum.training.ledger import Ledger, Owner

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def words(tiny):
    """The tiny recipe with validation data and a shifted split, as overrides without an output folder."""
    fields = {
        "seed": 0,
        "optim": None,
        "learning_rate": None,
        "validation_dataset": tiny.folder / "code.jsonl",
        "shifted": f"told={tiny.folder / 'prose.jsonl'}",
    }

    def made(**more) -> list[str]:
        return [word for word in tiny.words("unused", **{**fields, **more}) if not word.startswith("--output_dir")]

    return made


def planned(words, folder, **changed) -> Plan:
    fields = {"methods": ["adamw_torch", "tam"], "trials": 3, "seeds": 2, "starts": {"adamw_torch": 0.01, "tam": 0.3}}
    return compare.plan(None, words, **{**fields, **changed}, folder=str(folder))


def ledger_of(made: Plan) -> Ledger:
    Path(made.folder).mkdir(parents=True, exist_ok=True)
    return Ledger(made.storage, made.study, lower_is_better=True)


class FakeRunner:
    """Scores that follow from the run alone, in place of training; `broken` runs end as they are told."""

    def __init__(self, **broken: str) -> None:
        self.ran: list[Run] = []
        self.broken = broken

    def __call__(self, made: Plan, run: Run) -> RunScores:
        self.ran.append(run)
        status = self.broken.get(f"{run.method.replace(' ', '_')}_{run.role}_{run.seed}", "finished")
        if status == "killed":
            raise KeyboardInterrupt
        best = {"adamw_torch": 0.1, "tam": 0.3}.get(run.method, 1.0)
        bowl = math.log10(max(run.learning_rate, 1e-9) / best) ** 2
        scores = {name: {"loss": 1 + bowl + run.seed / 10} for name in ("code", "told", "prose")}
        if status != "finished":
            return RunScores(run.method, run.role, run.learning_rate, run.seed, status, None, {}, 1.0, 0, "out of luck")
        return RunScores(
            run.method, run.role, run.learning_rate, run.seed, "finished", 1 + bowl, scores, 1.0, 2**20, gain=5.0
        )


# ---- which runs there are --------------------------------------------------------------------------------------------


def test_each_run_is_done_once_and_all_are_tuned_alike(words, tmp_path):
    made, runner = planned(words(), tmp_path, asked=["frozen_gate", "matched_lr"]), FakeRunner()
    records = compare_runs.work(made, ledger_of(made), run=runner, say=str)
    assert max(Counter(runner.ran).values()) == 1 and len(runner.ran) == len(records)
    tuning = Counter(run.method for run in runner.ran if run.role == "tuning")
    assert tuning == {"adamw_torch": 5, "tam": 5}, "adamw's best is above its grid of 3; tam gets as many"
    tests = Counter(run.method for run in runner.ran if run.role == "test")
    assert tests == {BASE: 1, "adamw_torch": 2, "tam": 2, "tam, frozen gate": 2, "tam, matched lr": 2}
    assert runner.ran[0].method == BASE, "what is wrong for all is found first"
    assert not {run.seed for run in runner.ran if run.role == "test" and run.method != BASE} & set(made.tuning_seeds)


def test_nothing_is_chosen_by_test_data(words, tmp_path):
    """Test scores that all point the other way change no learning rate."""

    class Turned(FakeRunner):
        def __call__(self, made, run):
            found = super().__call__(made, run)
            return replace(found, scores={split: {"loss": -x["loss"]} for split, x in found.scores.items()})

    rates = []
    for name, runner in (("straight", FakeRunner()), ("turned", Turned())):
        made = planned(words(), tmp_path / name)
        rates.append(compare.learning_rates(made, compare_runs.work(made, ledger_of(made), run=runner, say=str)))
    assert rates[0] == rates[1]


def test_controls_have_the_rates_that_follow_from_the_methods(words, tmp_path):
    made = planned(
        words(),
        tmp_path,
        methods=["adamw_torch", "tam", "vradam", "ahb_adamw", "critical_sgd", "adatamw"],
        starts={},
        asked=["frozen_gate", "matched_lr"],
        most=3,
    )
    records = compare_runs.work(made, ledger_of(made), run=FakeRunner(), say=str)
    rates = compare.learning_rates(made, records)
    assert rates["tam, frozen gate"] == rates["tam"], "the same run"
    for method in ("tam", "critical_sgd"):
        assert rates[f"{method}, matched lr"][1] == pytest.approx(rates[method][1] * 5.0 * 0.1, rel=1e-5)
    for method in ("vradam", "ahb_adamw", "adatamw"):
        assert rates[f"{method}, matched lr"][1] == pytest.approx(rates[method][1] * 5.0, rel=1e-5)
    names = {control.name for control in compare.controls(made)}
    assert names == set(rates) - set(made.methods) and "vradam, frozen gate" not in names
    optimizers = {name: made.recipe(Run(name, "test", 0.1, 1)).training for name in names}
    assert optimizers["tam, frozen gate"].optim_args == "fixed_damping=0.5"
    assert optimizers["critical_sgd, matched lr"].optim == "tam"
    assert optimizers["critical_sgd, matched lr"].optim_args == "fixed_damping=1.0"
    assert optimizers["vradam, matched lr"].optim == "adamw_torch"


def test_each_seed_can_be_tuned_by_itself(words, tmp_path):
    made, runner = planned(words(), tmp_path, each_seed=True), FakeRunner()
    records = compare_runs.work(made, ledger_of(made), run=runner, say=str)
    assert {run.seed for run in runner.ran if run.role == "tuning"} == set(made.seeds)
    report = compare_report.report(made, records)
    assert report.tuning_seeds == made.seeds and "--tune_each_seed" in report.command
    assert (len(records), len(records)) == compare_runs.counts(made, records)[:1] * 2


def test_other_optimizers_later_use_the_runs_that_are_there(words, tmp_path):
    first = planned(words(), tmp_path, methods=["adamw_torch"], starts={"adamw_torch": 0.01})
    compare_runs.work(first, ledger_of(first), run=FakeRunner(), say=str)
    both, runner = planned(words(), tmp_path), FakeRunner()
    compare_runs.work(both, ledger_of(both), run=runner, say=str)
    assert {run.method for run in runner.ran} == {"tam"}
    other, runner = planned(words(), tmp_path, arguments={"tam": "gamma=0.95"}), FakeRunner()
    compare_runs.work(other, ledger_of(other), run=runner, say=str)
    assert {run.method for run in runner.ran} == {"tam"}, "other arguments are another optimizer"
    longer, runner = planned(words(max_steps=5), tmp_path), FakeRunner()
    compare_runs.work(longer, ledger_of(longer), run=runner, say=str)
    assert BASE in {run.method for run in runner.ran}, "another recipe is another comparison"
    otherwise = planned(words(), tmp_path, selection="perplexity")
    assert ledger_of(otherwise).records() == {}, "a validation loss must not be taken for a perplexity"


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_crashed_run_is_told_the_rest_goes_on_and_the_next_command_repeats_it(words, tmp_path):
    made = planned(words(), tmp_path)
    told: list[str] = []
    records = compare_runs.work(made, ledger_of(made), run=FakeRunner(tam_test_1="failed"), say=told.append)
    report = compare_report.report(made, records)
    assert len([run for run in records.values() if run.status == "finished"]) == len(records) - 1
    assert any("tam" in line and "failed: out of luck" in line for line in told)
    assert report.troubles == ["tam, lr 0.3, seed 1 failed: out of luck"]
    assert "1 of 2 seeds of tam did not finish" in report.verdict()[0]
    again = FakeRunner()
    records = compare_runs.work(made, ledger_of(made), run=again, say=str)
    assert [str(run) for run in again.ran] == ["tam, lr 0.3, seed 1"]
    assert compare_report.report(made, records).troubles == []


def test_a_run_that_diverges_is_a_result_and_is_not_repeated(words, tmp_path):
    made = planned(words(), tmp_path)
    records = compare_runs.work(made, ledger_of(made), run=FakeRunner(tam_test_2="diverged"), say=str)
    assert [run.status for run in records.values()].count("diverged") == 1
    again = FakeRunner()
    compare_runs.work(made, ledger_of(made), run=again, say=str)
    assert again.ran == []


def test_what_no_run_survives_ends_the_comparison_at_its_first(words, tmp_path):
    made, runner = planned(words(), tmp_path), FakeRunner(base_model_test_0="failed")
    with pytest.raises(InputError, match="base model could not be measured: out of luck"):
        compare_runs.work(made, ledger_of(made), run=runner, say=str)
    assert len(runner.ran) == 1
    with pytest.raises(TrainingStopped, match="out of luck"):
        compare_runs.work(made, ledger_of(made), run=FakeRunner(base_model_test_0="diverged"), say=str)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "seeds must be at least 2, got 0"),
        (["--trials", "2"], "trials must be at least 3, got 2"),
        (["--ratio", "1"], "ratio must be above 1, got 1"),
        (["--most_trials", "2"], "most_trials must be at least trials"),
        (["--optim", "adamw_torch,tamm"], "unknown optimizer 'tamm' (did you mean 'tam'"),
        (["--optim", "tam,tam"], "optim holds a name twice"),
        (["--optim", ","], "optim is empty"),
        (["--controls", "frozen"], "unknown control 'frozen' (did you mean 'frozen_gate'"),
        (["--lr", "tam"], "--lr 'tam' is not of the form NAME=VALUE"),
        (["--lr", "tam=big"], "--lr takes numbers"),
        (["--lr", "tam=-1"], "a learning rate must be positive"),
        (["--lr", "vradam=1"], "--lr names 'vradam', which is not compared"),
        (["--with", "tam:gamma=2"], "gamma must be a number in [0, 1)"),
        (["--metric", "accurac"], "--metric 'accurac' is not measured (did you mean 'token_accuracy'"),
        (["--select", "bleu"], "--select 'bleu' is not measured"),
        (["--learning_rate=1"], "--learning_rate is set by the comparison; it is tuned"),
        (["--optim_args=gamma=0.9"], "--optim_args is set by the comparison"),
        (["--validation_dataset="], "code.jsonl@train[:90%] --validation_dataset"),
        (["--storage", "nowhere://x"], "storage 'nowhere://x' cannot be opened"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_a_slip_is_one_line(more, message, words, tmp_path, capsys):
    typed = [word for word in words() if not (more[0].startswith("--val") and word.startswith("--validation"))]
    more = [] if more[0] == "--validation_dataset=" else more
    recipe = tmp_path / "r.yaml"
    recipe.write_text("".join(f"{w[2:].partition('=')[0]}: {json.dumps(w.partition('=')[2])}\n" for w in typed))
    fixed = ["--config", str(recipe), "--output_dir", str(tmp_path / "out")]
    given = [] if "--optim" in more else ["--optim", "adamw_torch,tam"]
    assert main(["compare", *fixed, *given, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


# ---- several workers, and killed ones --------------------------------------------------------------------------------


WORKER = """
import json, sys, time, random
from hf_momentum.evaluation.results import RunScores
from hf_momentum.training import compare_runs
from hf_momentum.training.compare import Plan
from hf_momentum.training.ledger import Ledger
from tests.test_compare import FakeRunner

made, log, seconds = Plan(**json.loads(sys.argv[1])), sys.argv[2], float(sys.argv[3])

class Slow(FakeRunner):
    def __call__(self, made, run):
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write(str(run) + "\\n")
        return super().__call__(made, run)

compare_runs.work(made, Ledger(made.storage, made.study, True), run=Slow(), say=str)
"""


def worker(made: Plan, log: Path, seconds: float) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", WORKER, json.dumps(asdict(made)), str(log), str(seconds)]
    return subprocess.Popen(words, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE)


def table_of(made: Plan) -> str:
    records = ledger_of(made).records()
    return compare_report.report(made, dict(sorted(records.items()))).to_json()


@pytest.fixture
def expected(words, tmp_path) -> tuple[Plan, str]:
    """A plan, and the table of a comparison that nobody disturbed."""
    made = planned(words(), tmp_path / "run", asked=["frozen_gate", "matched_lr"])
    quiet = replace(made, storage=f"sqlite:///{tmp_path / 'undisturbed.db'}")
    compare_runs.work(quiet, Ledger(quiet.storage, quiet.study, True), run=FakeRunner(), say=str)
    Path(made.folder).mkdir()
    return made, table_of(quiet)


def killed_ten_times(made: Plan, log: Path, wait: float) -> int:
    chance = random.Random(0)
    kills = 0
    for _ in range(10):
        process = worker(made, log, 0.05)
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.02)
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, wait))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    process = worker(made, log, 0.0)
    assert process.wait() == 0, process.stderr.read().decode()
    return kills


@pytest.mark.slow
def test_a_comparison_killed_ten_times_ends_with_the_same_table(expected, tmp_path):
    made, table = expected
    assert killed_ten_times(made, tmp_path / "log", 0.06) == 10
    assert table_of(made) == table
    ran = Counter((tmp_path / "log").read_text().split("\n")[:-1])
    lost = sum(count - 1 for count in ran.values())
    assert lost <= 10, "each kill repeats at most the run that it hit"


def test_a_killed_worker_s_run_is_free_again_and_the_table_is_the_same(expected, tmp_path):
    made, table = expected
    log, watch = tmp_path / "log", ledger_of(made)
    process = worker(made, log, 0.5)
    # Four are told and another is claimed, which takes half a second: the kill cannot fall between two runs.
    while len(watch.records()) < 4 or not watch.running() - set(watch.records()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert ledger_of(made).running(), "it was killed in the middle of a run"
    runner = FakeRunner()
    compare_runs.work(made, ledger_of(made), run=runner, say=str)
    finished_before = set(log.read_text().split("\n"))
    assert len({str(run) for run in runner.ran} & finished_before) <= 1, "only the run that the kill hit is repeated"
    assert table_of(made) == table


def test_two_workers_share_a_comparison_without_repeating_a_run(expected, tmp_path):
    made, table = expected
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = [worker(made, log, 0.05) for log in logs]
    for process in processes:
        assert process.wait() == 0, process.stderr.read().decode()
    ran = [log.read_text().split("\n")[:-1] for log in logs]
    assert not set(ran[0]) & set(ran[1]) and len(set(ran[0])) == len(ran[0]) and len(set(ran[1])) == len(ran[1])
    assert all(ran), "both did some of the work"
    assert table_of(made) == table


def test_a_worker_elsewhere_is_dead_once_its_counter_stands_still(tmp_path):
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    far = Ledger(url, "s", True)
    far.owner = Owner("another machine", 1, "1")
    trial = far.claim("run", {})
    near = Ledger(url, "s", True, grace=0.2)
    assert near.free_dead() == [] and near.claim("run", {}) is None
    time.sleep(0.15)
    far.beat(trial)
    assert near.free_dead() == []
    time.sleep(0.15)
    assert near.free_dead() == [], "it has shown a sign of life since"
    time.sleep(0.3)
    assert near.free_dead() == ["run"] and near.claim("run", {}) is not None
    record = RunScores("tam", "test", 0.1, 0, "finished", 1.0, {}, 1.0, 1)
    assert not far.tell(trial, record), "who was thought dead and comes back finds that it no longer has the run"
    assert near.records() == {}


def test_a_result_counts_once_it_is_written_though_its_worker_died_before_it_closed_the_trial(tmp_path):
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    first = Ledger(url, "s", True)
    first.owner = replace(first.owner, started="long ago")  # a process of this machine that is gone
    trial = first.claim("run", {})
    record = RunScores("tam", "test", 0.1, 0, "finished", 1.0, {}, 1.0, 1)
    first.storage.set_trial_user_attr(trial, "record", asdict(record))
    for _ in range(2):  # for the worker that frees it, and for all that come later
        ledger = Ledger(url, "s", True)
        ledger.free_dead()
        assert ledger.records() == {"run": record} and ledger.running() == set()


POSTGRES = next((str(p.parent) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)


@pytest.fixture
def postgres(tmp_path):
    """A PostgreSQL server of its own on the loopback interface."""
    if POSTGRES is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path("/tmp") / f"hf-momentum-postgres-{os.getpid()}"
    folder.mkdir()
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/tmp"}
    subprocess.run([*as_user, f"{POSTGRES}/initdb", "-D", data, "-U", "hf", "-A", "trust"], **quiet)
    start = [*as_user, f"{POSTGRES}/pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log"]
    subprocess.run([*start, "start"], **quiet)
    try:
        yield f"postgresql+psycopg://hf@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*as_user, f"{POSTGRES}/pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(folder)


@pytest.mark.postgres
@pytest.mark.slow
def test_two_workers_on_one_postgresql_share_a_comparison_without_repeating_a_run(expected, postgres, tmp_path):
    made, table = expected
    test_two_workers_share_a_comparison_without_repeating_a_run((replace(made, storage=postgres), table), tmp_path)


# ---- real runs -------------------------------------------------------------------------------------------------------


def test_the_command_trains_tunes_and_writes_the_report(words, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("".join(f"{w[2:].partition('=')[0]}: {json.dumps(w.partition('=')[2])}\n" for w in words()))
    typed = [
        "--config",
        str(recipe),
        "--optim",
        "adamw_torch,tam",
        "--trials",
        "3",
        "--seeds",
        "2",
        "--most_trials",
        "3",
    ]
    typed += ["--controls", "frozen_gate", "--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    assert main(["compare", *typed, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "13 runs: 6 to tune 2 optimizers, 4 tests on 2 seeds, 2 controls, and the base model" in said
    assert "About" in said and not (tmp_path / "out" / "report.html").exists()
    assert main(["compare", *typed]) == 0
    printed = capsys.readouterr().out
    assert "tam against adamw_torch: " in printed and "tam against tam, frozen gate: " in printed
    assert "2 test seeds are few" in (tmp_path / "out" / "report.md").read_text()
    report = ComparisonReport.from_json((tmp_path / "out" / "report.json").read_text())
    finished = [run for run in report.runs if run.status == "finished"]
    assert len(finished) == 12
    for run in finished:
        measured = (
            {"code", "told", "prose"}
            if run.role == "test"
            else {"code", "told"}
            if run.method == report.baseline
            else set()
        )
        assert set(run.scores) == measured, "tuning sees no test data but for the baseline's line"
        assert run.peak_memory > 2**20 and run.seconds > 0
    tam = next(run for run in finished if run.method == "tam" and run.role == "test")
    frozen = next(run for run in finished if run.method == "tam, frozen gate" and run.seed == tam.seed)
    assert tam.learning_rate == frozen.learning_rate and tam.scores != frozen.scores
    assert frozen.gain == pytest.approx(5.0, rel=1e-5), "1/2 / (1 - 0.9)"
    assert main(["compare", *typed, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["command"] == "compare" and "13 done" in " ".join(answer["summary"])


def test_a_run_whose_process_dies_is_told_with_its_log(words, tmp_path):
    made = planned([*words(), "--model_name_or_path=nowhere/at/all"], tmp_path)
    with pytest.raises(InputError, match="base model could not be measured: model 'nowhere/at/all'"):
        compare_runs.work(made, ledger_of(made), say=str)
    run = Run("tam", "tuning", 0.1, 0)
    process = compare_runs._begin(compare_runs._context(), made, run, 0, 0, 1)
    process.process.kill()
    while (found := process.result()) is None:
        time.sleep(0.05)
    assert found.status == "failed" and "ended with status -9" in found.message and str(process.log) in found.message
