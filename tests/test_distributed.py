"""Two processes under `accelerate launch` are one run: the single process's trajectory, and exact resumption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training import job, load_recipe
from tests.launching import free_port
from tests.test_training import final_weights

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "accelerate_configs" / "ddp.yaml"
# One worker runs the whole module, so that each launch happens once.
pytestmark = pytest.mark.xdist_group("two processes")

CASES = [(name, lora) for name in ("tam", "adatam", "adatamw") for lora in (False, True)]
CASES += [(name, False) for name in OPTIMIZERS if name not in ("tam", "adatam", "adatamw")]
# The others run in the slow suite; the matrix has every optimizer under DDP as well.
SHORT = [("tam", False), ("adatamw", True), ("vradam", False), ("ahb_adamw", False)]
EACH = [
    pytest.param(
        case, id="-".join([case[0], "lora" if case[1] else "full"]), marks=[] if case in SHORT else [pytest.mark.slow]
    )
    for case in CASES
]
RATES = {"adatam": 1e-4, "adatamw": 1e-4}  # their steps are about ten times Adam's at the start
STEPS, HALF = 20, 10


def launch(*words: object, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
    command += ["--main_process_port", free_port(), *words]
    return subprocess.run(
        list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def launch_plan(folder: Path, plan: list) -> list[dict]:
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    result = launch(ROOT / "tests" / "distributed_job.py", folder / "plan.json")
    assert (folder / "facts.json").is_file(), result.stderr[-3000:]
    return json.loads((folder / "facts.json").read_text())


def label(name: str, lora: bool) -> str:
    return f"{name}-{'lora' if lora else 'full'}"


# use_cpu is left out of launched runs: the processes must find the CPU by themselves.
TWO = {"per_device_train_batch_size": 2, "use_cpu": None}


def words(tiny, folder: Path, kind: str, case, **fields) -> list[str]:
    name, lora = case
    common = {
        "optim": name,
        "lora": lora,
        "learning_rate": RATES.get(name, 1e-3 if OPTIMIZERS[name].adam_arguments else 0.05),
        "weight_decay": 0.1,
    }
    # 16 examples: batches of 4 fill every epoch. A last, smaller batch would be topped up by Accelerate.
    common |= {"max_train_examples": 16, "max_steps": STEPS, "save_strategy": "steps", "save_steps": HALF}
    return tiny.words(folder / kind / label(*case), **{**common, "max_grad_norm": 1.0, **fields})


@pytest.fixture(scope="module")
def cases(request) -> list:
    """Those that a selected test asks for."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = [item.callspec.params.get("case") for item in here]
    return [case for case in CASES if case in asked or case == ("tam", False)]


@pytest.fixture(scope="module")
def runs(tiny, cases, tmp_path_factory):
    """Each case on one process and on two, at equal global batch. Both evaluate before they train."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in cases:
        job.train(load_recipe(None, words(tiny, folder, "one", case, per_device_train_batch_size=4)))
    torch.set_num_threads(threads)
    plan = [(label(*case), words(tiny, folder, "two", case, **TWO)) for case in cases]
    return folder, launch_plan(folder / "plan-two", plan)


@pytest.fixture(scope="module")
def resumed(tiny, cases, runs):
    """The runs on two processes again, from the checkpoint at the half."""
    folder, _ = runs
    plan = []
    for case in cases:
        checkpoint = folder / "two" / label(*case) / f"checkpoint-{HALF}"
        plan.append((label(*case), words(tiny, folder, "resumed", case, resume_from_checkpoint=checkpoint, **TWO)))
    return launch_plan(folder / "plan-resumed", plan)


def test_two_processes_really_ran(runs, resumed):
    _, straight = runs
    for facts in [*straight, *resumed]:
        assert (facts["num_processes"], facts["distributed_type"], facts["error"]) == (2, "MULTI_CPU", None)
        assert facts["backend"] == "gloo"


@pytest.mark.parametrize("case", EACH)
def test_two_processes_follow_the_single_process_trajectory(case, runs):
    """Largest relative difference of the weights after 20 steps in float32: at most 1e-6."""
    folder, _ = runs
    one, two = (final_weights(folder / kind / label(*case)) for kind in ("one", "two"))
    assert one.keys() == two.keys()
    scale = max(value.abs().max() for value in one.values())
    difference = max((one[key] - two[key]).abs().max() for key in one)
    print(f"{label(*case)}: largest relative difference {difference / scale:.1e}")
    assert difference / scale <= 1e-6
    start = final_weights(folder / "one" / label(*case) / f"checkpoint-{HALF}")
    assert max((one[key] - start[key]).abs().max() for key in one) / scale > 1e-3, "the weights moved"


def test_the_gradients_were_correlated(runs):
    """With uncorrelated batches the cosine is near 0 and a wrong one would not show."""
    folder, _ = runs
    history = json.loads((folder / "two" / "tam-full" / "report.json").read_text())["history"]
    cosines = [entry["cosine"] for entry in history if "cosine" in entry]
    assert len(cosines) == STEPS
    assert max(cosines) > 0.3


@pytest.mark.parametrize("case", EACH)
@pytest.mark.usefixtures("resumed")
def test_two_processes_resume_bit_for_bit(case, runs):
    folder, _ = runs
    straight, again = (final_weights(folder / kind / label(*case)) for kind in ("two", "resumed"))
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def test_both_processes_measure_what_one_measures(runs):
    folder, _ = runs
    one, two = (json.loads((folder / kind / "tam-full" / "report.json").read_text()) for kind in ("one", "two"))
    for a, b in zip(one["splits"], two["splits"], strict=True):
        assert a["examples"] == b["examples"]
        assert a["after"]["loss"]["value"] == pytest.approx(b["after"]["loss"]["value"], rel=1e-6)
        assert a["after"]["accuracy"]["value"] == pytest.approx(b["after"]["accuracy"]["value"], abs=1e-9)


def test_main_job_runs_under_accelerate_launch_by_its_script(tiny, tmp_path):
    words = tiny.words(tmp_path / "out", use_cpu=None, max_steps=2, per_device_train_batch_size=2)
    result = launch(ROOT / "scripts" / "train.py", *words)
    assert (tmp_path / "out" / "report.md").is_file(), result.stderr[-3000:]
    assert result.stdout.count("Report: ") == 1, "one process speaks"
    assert "- **processes**: 2" in (tmp_path / "out" / "report.md").read_text()


def test_bad_input_under_accelerate_launch_ends_with_a_clear_line(tiny, tmp_path):
    words = tiny.words(tmp_path / "out", use_cpu=None, optim="tamm")
    result = launch(ROOT / "scripts" / "train.py", *words)
    assert result.returncode != 0
    assert "error: argument --optim: 'tamm' is not accepted (did you mean 'tam'" in result.stderr
    assert not (tmp_path / "out").exists()
