"""Launcher files, `train --accelerate_config`, and the main job end to end under FSDP2 and ZeRO-3."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, Trainer

from hf_momentum import launch
from hf_momentum.cli import main
from hf_momentum.errors import InputError
from hf_momentum.training import MomentumTrainer, MomentumTrainingArguments, job, load_recipe
from hf_momentum.training.processes import check_launch, environment_of_one_process, layout
from hf_momentum.training.recipe import shipped_folder
from tests.test_callbacks import small_trainer
from tests.test_training import final_weights

ROOT = Path(__file__).parent.parent
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

# name: (distributed type, processes, machines, ZeRO stage, optimizer offload, parameter offload)
SHIPPED = {
    "single": ("NO", 1, 1, None, None, None),
    "ddp": ("MULTI_GPU", 2, 1, None, None, None),
    "fsdp2": ("FSDP", 2, 1, None, None, None),
    "hsdp": ("FSDP", 4, 1, None, None, None),
    "multi_node_fsdp2": ("FSDP", 16, 2, None, None, None),
    "zero1": ("DEEPSPEED", 2, 1, 1, "none", "none"),
    "zero2": ("DEEPSPEED", 2, 1, 2, "none", "none"),
    "zero3": ("DEEPSPEED", 2, 1, 3, "none", "none"),
    "zero2_offload": ("DEEPSPEED", 2, 1, 2, "cpu", "none"),
    "zero3_offload": ("DEEPSPEED", 2, 1, 3, "cpu", "cpu"),
    "multi_node_zero3": ("DEEPSPEED", 16, 2, 3, "none", "none"),
}


# ---- the launcher files ---------------------------------------------------------------------------------------------


def test_the_shipped_files_are_these():
    assert {path.stem for path in shipped_folder("accelerate_configs").iterdir()} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_launcher_file_is_found_by_name_and_says_what_its_name_says(name):
    loaded = load_config_from_file(str(launch.find_accelerate_config(name)))
    deepspeed = loaded.deepspeed_config
    offload = [deepspeed.get(f"offload_{part}_device") for part in ("optimizer", "param")]
    found = (loaded.distributed_type.value, loaded.num_processes, loaded.num_machines, deepspeed.get("zero_stage"))
    assert (*found, *offload) == SHIPPED[name]
    assert loaded.mixed_precision == "no", "the recipe decides"
    assert not loaded.use_cpu, "a file for real machines"
    if loaded.distributed_type.value == "FSDP":
        assert loaded.fsdp_config["fsdp_version"] == 2
    if deepspeed.get("zero_stage") == 3:
        assert deepspeed["zero3_save_16bit_model"] is True
    if deepspeed and loaded.num_machines > 1:
        assert deepspeed["deepspeed_multinode_launcher"] == "standard"


def test_hsdp_copies_times_shards_are_its_processes():
    loaded = load_config_from_file(str(launch.find_accelerate_config("hsdp")))
    sizes = [loaded.parallelism_config[f"parallelism_config_dp_{part}_size"] for part in ("replicate", "shard")]
    assert sizes == [2, 2]


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that would have taken this process's place."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command) or sys.exit(0))
    return commands


def refused(words, capsys, started) -> str:
    assert main(["train", *map(str, words)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert started == []
    return lines[0]


def test_the_launcher_gets_the_file_the_options_and_the_recipe(started):
    words = ["--config", "quickstart", "--accelerate_config", "fsdp2", "--num_processes", "8", "--max_steps", "3"]
    with pytest.raises(SystemExit):
        main(["train", *words])
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[3:5] == ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
    assert command[5:7] == ["--num_processes=8", "--main_process_port=0"]
    assert command[7:] == ["-m", "hf_momentum", "train", "--config", "quickstart", "--max_steps", "3"]


def test_a_given_port_and_several_machines_are_passed_on(started):
    words = ["--accelerate_config", "multi_node_fsdp2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    with pytest.raises(SystemExit):
        main(["train", "--config", "quickstart", *words, "--main_process_port", "29501"])
    options = [word for word in started[0] if word.startswith("--m")]
    assert options == ["--machine_rank=1", "--main_process_ip=10.0.0.1", "--main_process_port=29501"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerate_config", "fsdp"], "no accelerate_config 'fsdp' (did you mean 'fsdp2'"),
        (["--num_processes", "2"], "--num_processes is for a launch; name one with --accelerate_config"),
        (["--accelerate_config", "ddp", "--num_processes", "two"], "num_processes must be a whole number"),
        (["--accelerate_config", "ddp", "--num_processes", "0"], "at least 1, got '0'"),
        (["--accelerate_config", "single", "--num_processes", "2"], "single.yaml starts a single process"),
        (["--accelerate_config", "hsdp", "--num_processes", "2"], "2 copies of the model over 2 processes each; start"),
        (["--accelerate_config", "multi_node_fsdp2"], "needs --main_process_ip, the first machine's"),
        (["--accelerate_config", "multi_node_fsdp2", "--num_processes", "3"], "cannot be shared by 2 machines"),
        (["--accelerate_config", "ddp", "--machine_rank", "1"], "machine_rank 1 does not exist among 1 machines"),
        (["--accelerate_config", ROOT / "recipes" / "quickstart.yaml"], "is not a file for accelerate launch"),
        (["--accelerate_config", "ddp", "--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--accelerate_config", "ddp", "--optim", "tamm"], "'tamm' is not accepted (did you mean 'tam'"),
    ],
)
def test_what_cannot_be_launched_is_one_line_and_nothing_starts(words, message, capsys, started):
    assert message in refused(["--config", "quickstart", *words], capsys, started)


def test_a_launch_inside_a_launch_is_refused(capsys, started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(["--config", "quickstart", "--accelerate_config", "ddp"], capsys, started)
    assert "already belongs to one" in line


def test_a_missing_deepspeed_is_named_with_its_remedy(capsys, started, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else found(name, *rest)
    )
    line = refused(["--config", "quickstart", "--accelerate_config", "zero3"], capsys, started)
    assert "DS_BUILD_OPS=0 pip install 'hf-momentum[deepspeed]'" in line


def test_the_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert all(name in "\n".join(lines) for name in SHIPPED if name != "single")


# ---- what the processes know of their launch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSp")]
)
def test_a_launch_whose_sharding_accelerate_left_out_is_refused(variable, name, tiny, tmp_path, monkeypatch):
    recipe = load_recipe(None, tiny.words(tmp_path / "out", optim="adamw_torch"))
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"told to shard the model with {name}.*leaves it out"):
        job.train(recipe)
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="started 2 processes, but this one sees 1"):
        check_launch(PartialState(cpu=True))


def test_a_process_of_its_own_gets_no_word_of_the_launcher_and_one_gpu(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "TORCHELASTIC_X"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    kept = environment_of_one_process(torch.device("cuda", 1))
    assert kept["CUDA_VISIBLE_DEVICES"] == "7"
    assert kept["PATH"] == os.environ["PATH"]
    assert not [
        name for name in kept if name.startswith(("WORLD", "LOCAL_R", "MASTER", "ACCELERATE", "FSDP", "TORCHE"))
    ]


@pytest.mark.parametrize(
    ("zero", "shown"),
    [
        ({"stage": 1}, "ZeRO-1, 2 processes"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "ZeRO-2 with optimizer offload, 2 processes"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
            "ZeRO-3 with optimizer and parameter offload, 2 processes",
        ),
    ],
)
def test_the_layout_names_stage_and_offload(zero, shown):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    accelerator = SimpleNamespace(
        distributed_type="DEEPSPEED", num_processes=2, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    assert layout(accelerator) == shown


def test_a_zero3_launch_that_could_not_save_is_refused(tiny, tmp_path):
    recipe = load_recipe(None, tiny.words(tmp_path / "out", optim="adamw_torch"))
    recipe.training.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    with pytest.raises(InputError, match="zero3_save_16bit_model is off"):
        job.train(recipe)


def test_a_look_before_training_happens_once_on_the_prepared_model(tmp_path):
    trainer = small_trainer(tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="tam")
    seen = []
    trainer.before_training = lambda: seen.append((trainer.state.global_step, trainer.lr_scheduler is not None))
    trainer.train()
    trainer.train()
    assert seen == [(0, True)]


def test_an_unknown_way_of_preparing_is_named_before_training(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="tam")
    trainer.before_training = lambda: None
    monkeypatch.setattr(Trainer, "_prepare_for_training", lambda self, max_steps: None)
    with pytest.raises(InputError, match=r"use transformers 5\.17"):
        trainer.train()


# ---- end to end, two CPU processes ----------------------------------------------------------------------------------


def launched(config: str, words: list[str]) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "cpu_shims"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "hf_momentum", "train", "--accelerate_config", config, *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory) -> Path:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("one") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fields = {"max_train_examples": 16, "per_device_train_batch_size": 4, "cache_dir": folder.parent / "cache"}
    job.train(load_recipe(None, tiny.words(folder, optim="tam", learning_rate=0.05, **fields)))
    torch.set_num_threads(threads)
    return folder


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ("fsdp2", "FSDP2, 2 processes"),
        pytest.param("zero3", "ZeRO-3, 2 processes", marks=needs_deepspeed),
    ],
)
def test_two_processes_with_a_sharded_model_are_the_run_of_one(config, shown, one, tiny, tmp_path):
    """Base model, losses before and after, parameter counts and the saved model, from a launch by name."""
    own_cache = config == "fsdp2"  # trains 'scratch' inside the launch; the other finds it
    cache = tmp_path / "cache" if own_cache else one.parent / "cache"
    fields = {"max_train_examples": 16, "per_device_train_batch_size": 2, "cache_dir": cache, "use_cpu": None}
    words = tiny.words(tmp_path / "out", optim="tam", learning_rate=0.05, **fields)
    result = launched(config, words)
    assert (tmp_path / "out" / "report.json").is_file(), result.stderr[-3000:]
    assert result.stdout.count("Report: ") == 1, "one process speaks"
    here, there = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", one))
    assert (here["facts"]["layout"], there["facts"]["layout"]) == (shown, "one process")
    assert here["facts"]["processes"] == 2
    assert here["facts"]["trained parameters"] == there["facts"]["trained parameters"]
    for a, b in zip(here["splits"], there["splits"], strict=True):
        assert a["examples"] == b["examples"]
        for when in ("before", "after"):
            assert a[when]["loss"]["value"] == pytest.approx(b[when]["loss"]["value"], rel=1e-5)
    assert here["splits"][0]["change"]["loss"]["value"] < -0.1, "it learnt"
    weights, expected = final_weights(tmp_path / "out"), final_weights(one)
    assert weights.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    assert max((weights[key] - expected[key]).abs().max() for key in weights) <= 1e-6 * scale
    kind = shown.split(",")[0]
    assert result.stderr.count("hf-momentum: TAM ") == 1 and f" on {kind}: " in result.stderr, "it says what runs"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.architectures == ["LlamaForCausalLM"]
    if own_cache:
        bases = [next((folder / "cache").rglob("model.safetensors")) for folder in (tmp_path, one.parent)]
        assert bases[0].parent.name == bases[1].parent.name
        assert bases[0].read_bytes() == bases[1].read_bytes()


@pytest.mark.xdist_group("two processes")
def test_an_error_in_the_processes_is_shown_and_ends_the_command(tiny, tmp_path):
    words = tiny.words(tmp_path / "out", optim="adamw_torch", use_cpu=None, train_dataset=tmp_path / "none.jsonl")
    result = launched("ddp", words)
    assert result.returncode != 0
    assert f"error: dataset file {tmp_path / 'none.jsonl'} does not exist" in result.stderr
    assert not (tmp_path / "out").exists()
