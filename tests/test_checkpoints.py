"""Complete or torn, which one is the last, which optimizer saved it: told before anything is loaded."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_momentum.errors import InputError
from hf_momentum.integrations.what_runs import WhatRunsCallback
from hf_momentum.optim import VRAdam
from hf_momentum.training import MomentumTrainer, MomentumTrainingArguments
from hf_momentum.training.checkpoints import (
    MANIFEST,
    check_checkpoint,
    checkpoints_in,
    deepspeed_files,
    faults,
    find_checkpoint,
    kind_of,
    last_complete,
    load_deepspeed,
    load_distributed,
    optimizer_files,
    read_manifest,
    rotate,
    saved_algorithms,
    write_manifest,
)
from hf_momentum.training.export import read_weights
from tests.checkpoint_job import examples, network


def arguments(folder: Path, **fields) -> dict:
    common = {"output_dir": str(folder), "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    common |= {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 0}
    return {**common, "learning_rate": 0.05, **fields}


def trainer(folder: Path, **fields) -> MomentumTrainer:
    set_seed(0)
    args = MomentumTrainingArguments(**arguments(folder, **{"optim": "tam", **fields}))
    return MomentumTrainer(network(False, False), args, train_dataset=examples(), data_collator=default_data_collator)


def weights(run: MomentumTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def cut(path: Path, keep: int | None = None) -> None:
    """Truncate a file to `keep` bytes, or to half of it."""
    os.truncate(path, path.stat().st_size // 2 if keep is None else keep)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps with checkpoints at 2, 4 and 6, and its last weights."""
    folder = tmp_path_factory.mktemp("finished")
    run = trainer(folder)
    run.train()
    return folder, weights(run)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A checkpoint of transformers' own Trainer, which writes no manifest."""
    folder = tmp_path_factory.mktemp("foreign")
    set_seed(0)
    args = TrainingArguments(**arguments(folder, max_steps=2, optim="adamw_torch"))
    Trainer(network(False, False), args, train_dataset=examples(), data_collator=default_data_collator).train()
    return folder / "checkpoint-2"


def test_a_manifest_names_every_file_and_its_size(folder):
    checkpoint = folder / "checkpoint-4"
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.processes, manifest.kind) == (4, 1, "plain")
    assert manifest.files == {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= manifest.files.keys()
    assert faults(checkpoint) == []


def names_of_files() -> list[str]:
    return ["optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth", "config.json"]


@pytest.mark.parametrize("name", names_of_files())
def test_a_file_that_is_short_or_missing_makes_a_checkpoint_torn(name, folder, capsys):
    path = folder / "checkpoint-6" / name
    size = path.stat().st_size
    cut(path, size - 1)
    assert faults(folder / "checkpoint-6") == [f"{name} has {size - 1} of {size} bytes"]
    assert last_complete(folder) == folder / "checkpoint-4"
    assert f"checkpoint-6 is torn: {name} has {size - 1} of {size} bytes; skipped" in capsys.readouterr().out
    path.unlink()
    assert faults(folder / "checkpoint-6") == [f"{name} is missing"]


@pytest.mark.parametrize("content", [None, "", '{"format": 1', "[]", '{"format": 1, "step": 6}'])
def test_without_a_manifest_that_can_be_read_a_checkpoint_is_torn(content, folder):
    manifest = folder / "checkpoint-6" / MANIFEST
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    assert faults(folder / "checkpoint-6")
    assert last_complete(folder, speak=False) == folder / "checkpoint-4"


def test_a_manifest_of_a_later_version_is_refused(folder):
    manifest = folder / "checkpoint-6" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        faults(folder / "checkpoint-6")


def test_the_latest_is_the_one_of_most_steps_not_of_the_longest_name(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100.old", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


def test_resuming_passes_over_the_torn_one_and_ends_bit_for_bit(folder, finished, capsys):
    cut(folder / "checkpoint-6" / "optimizer.pt")
    (folder / "checkpoint-4" / MANIFEST).unlink()
    again = trainer(folder)
    again.train(resume_from_checkpoint=True)
    words = capsys.readouterr().out
    assert "checkpoint-6 is torn: optimizer.pt has" in words
    assert "checkpoint-4 is torn: complete.json is missing; skipped" in words
    expected, found = finished[1], weights(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not faults(folder / "checkpoint-4") and not faults(folder / "checkpoint-6"), "both were written anew"


def test_with_nothing_complete_the_torn_ones_are_named(folder):
    for path in checkpoints_in(folder):
        (path / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"none of checkpoint-6, checkpoint-4, checkpoint-2 .* is complete"):
        find_checkpoint("true", str(folder))
    with pytest.raises(InputError, match="no checkpoint in"):
        find_checkpoint("true", str(folder / "elsewhere"))


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json", "scheduler.pt"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_torn_checkpoint_that_is_named_is_refused(name, manifest, folder):
    checkpoint = folder / "checkpoint-6"
    if not manifest:
        (checkpoint / MANIFEST).unlink()
    assert find_checkpoint(str(checkpoint), None) == str(checkpoint)
    cut(checkpoint / name)
    with pytest.raises(InputError, match=f"is torn: {name}"):
        find_checkpoint(str(checkpoint), None)


def test_a_checkpoint_of_a_plain_trainer_can_be_named(foreign, tmp_path):
    assert not (foreign / MANIFEST).exists()
    assert find_checkpoint(str(foreign), None) == str(foreign)
    assert last_complete(foreign.parent, speak=False) is None
    run = trainer(tmp_path, optim="adamw_torch", max_steps=4)
    run.train(resume_from_checkpoint=str(foreign))
    assert run.state.global_step == 4


def test_a_safetensors_header_that_is_cut_is_seen(foreign, tmp_path):
    checkpoint = Path(shutil.copytree(foreign, tmp_path / "checkpoint-2"))
    for keep in (4, 20):
        cut(checkpoint / "model.safetensors", keep)
        assert faults(checkpoint, manifest_needed=False) == ["model.safetensors has no whole header"]


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The folders that FSDP2 writes, saved by one process."""
    import torch.distributed.checkpoint as dcp

    checkpoint = tmp_path / "run" / "checkpoint-2"
    tensors = {"model": {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4)}}
    groups = [{"lr": 0.1, "algorithm": "TAM", "params": ["a.weight", "b.bias"]}]
    state = {"optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(2, 3)}}, "param_groups": groups}}
    dcp.save(tensors, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save(state, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    return checkpoint


def test_a_sharded_checkpoint_is_whole_when_every_part_has_the_bytes_that_its_metadata_names(sharded):
    assert kind_of(sharded) == "fsdp-sharded"
    assert faults(sharded, manifest_needed=False) == []
    entries = load_distributed(sharded / "pytorch_model_fsdp_0")
    assert torch.equal(entries["model.a.weight"], torch.arange(6.0).view(2, 3))
    part = next((sharded / "optimizer_0").glob("*.distcp"))
    size = part.stat().st_size
    cut(part, 100)
    assert faults(sharded, manifest_needed=False) == [f"optimizer_0/{part.name} has 100 of {size} bytes"]
    part.unlink()
    assert faults(sharded, manifest_needed=False) == [f"optimizer_0/{part.name} is missing"]
    cut(sharded / "optimizer_0" / ".metadata")
    assert faults(sharded, manifest_needed=False) == ["optimizer_0/.metadata cannot be read"]
    (sharded / "optimizer_0" / ".metadata").unlink()
    assert faults(sharded, manifest_needed=False) == ["optimizer_0/.metadata is missing"]


def zero(folder: Path, ranks: list[int], algorithm: str | None = "TAM") -> Path:
    """What DeepSpeed writes under ZeRO-2, without its tensors."""
    (folder / "global_step2").mkdir(parents=True)
    (folder / "latest").write_text("global_step2\n")
    (folder / "trainer_state.json").write_text("{}")
    group = {"params": [0]} if algorithm is None else {"params": [0], "algorithm": algorithm}
    content = {"optimizer_state_dict": {"base_optimizer_state": {"state": {}, "param_groups": [group]}}}
    torch.save({"module": {}}, folder / "global_step2" / "mp_rank_00_model_states.pt")
    for rank in ranks:
        torch.save(content, folder / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_a_zero_checkpoint_needs_the_file_of_every_process(tmp_path):
    whole = zero(tmp_path / "whole", list(range(12)))
    assert kind_of(whole) == "deepspeed"
    assert [rank for rank, _ in optimizer_files(whole)] == list(range(12)), "by number, not by name"
    assert faults(whole, manifest_needed=False) == []
    cut(optimizer_files(whole)[1][1])
    name = "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert faults(whole, manifest_needed=False) == [f"{name} has no end"]
    gap = zero(tmp_path / "gap", [0, 2])
    assert faults(gap, manifest_needed=False) == ["global_step2/ lacks the optimizer states of process 1"]
    shutil.rmtree(gap / "global_step2")
    assert faults(gap, manifest_needed=False) == ["global_step2/ is missing"]


def test_another_number_of_processes_under_zero_is_refused_with_the_command_that_converts(tmp_path):
    checkpoint = str(zero(tmp_path / "checkpoint-2", [0, 1]))
    check_checkpoint(checkpoint, "tam", 2, "DEEPSPEED")
    with pytest.raises(InputError, match="saved by 2 processes under ZeRO, and 3 run now") as caught:
        check_checkpoint(checkpoint, "tam", 3, "DEEPSPEED")
    assert f"hf-momentum export {checkpoint} OUT --resumable" in str(caught.value)


def test_another_kind_of_launch_is_refused(folder, sharded, tmp_path):
    """transformers would train on from the weights with a fresh optimizer, and say nothing.

    Whole tensors can be cut up for any layout, if the optimizer is one of ours.
    """
    plain, partitioned = str(folder / "checkpoint-6"), str(zero(tmp_path / "checkpoint-2", [0]))
    for checkpoint, fits in [(plain, "NO"), (plain, "MULTI_GPU"), (str(sharded), "FSDP"), (partitioned, "DEEPSPEED")]:
        check_checkpoint(checkpoint, "tam", 1, fits)
    for checkpoint, unfit in [(str(sharded), "NO"), (str(sharded), "DEEPSPEED"), (partitioned, "MULTI_CPU")]:
        with pytest.raises(InputError, match=r"was saved under .* and cannot continue under"):
            check_checkpoint(checkpoint, "tam", 1, unfit)
    for other in ("FSDP", "DEEPSPEED"):
        check_checkpoint(plain, "tam", 1, other)
        with pytest.raises(InputError, match="the state of adamw_torch cannot be cut up"):
            check_checkpoint(plain, "adamw_torch", 1, other)


def test_the_optimizer_that_saved_is_known_for_every_kind(folder, sharded, foreign, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    groups = [{"params": ["a"], "algorithm": "TAM"}]
    torch.save({"state": {}, "param_groups": groups}, full / "optimizer.bin")
    partitioned = zero(tmp_path / "zero", [0, 1])
    for checkpoint in (folder / "checkpoint-6", sharded, full, partitioned):
        assert saved_algorithms(checkpoint, kind_of(checkpoint)) == {"TAM"}
        check_checkpoint(str(checkpoint), "tam")
        for other in ("adatam", "adamw_torch"):
            with pytest.raises(InputError, match=f"was saved by TAM, not by {other}"):
                check_checkpoint(str(checkpoint), other)
    for checkpoint in (foreign, zero(tmp_path / "adam", [0], algorithm=None)):
        check_checkpoint(str(checkpoint), "adamw_torch")
        with pytest.raises(InputError, match="an optimizer of another package, not by tam"):
            check_checkpoint(str(checkpoint), "tam")


def test_weights_alone_are_no_checkpoint_to_continue_from(folder):
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"holds no optimizer\.pt"):
        check_checkpoint(str(folder / "checkpoint-6"), "tam")


def test_the_trainer_refuses_another_optimizer_before_it_loads(folder):
    other = trainer(folder, optim="adatam")
    before = weights(other)
    with pytest.raises(InputError, match="was saved by TAM, not by adatam"):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], value) for name, value in weights(other).items())


def test_the_trainer_refuses_a_learning_rate_that_the_checkpoint_would_not_take(folder):
    """Its scheduler's state has the old one: the run would go on with that, and its report would name the new one."""
    other = trainer(folder, learning_rate=0.123)
    with pytest.raises(InputError, match=r"learning rate that it was saved with, .*, not 0\.123; resume with that one"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"optim_args": "gamma=0.95"}, "continues with gamma=0.9, with which it was saved, not 0.95"),
        ({"weight_decay": 0.3}, "continues with weight_decay=0.0, with which it was saved, not 0.3"),
    ],
    ids=["gamma", "weight_decay"],
)
def test_options_that_the_checkpoint_would_replace_are_refused(fields, told, folder):
    with pytest.raises(InputError, match=told):
        trainer(folder, **fields).train(resume_from_checkpoint=True)


def test_a_momentum_that_a_schedule_moved_is_no_other_option(tmp_path):
    optimizer = VRAdam([torch.nn.Parameter(torch.zeros(2))])
    args, state = MomentumTrainingArguments(**arguments(tmp_path, optim="vradam")), TrainerState(global_step=2)
    optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    WhatRunsCallback().on_train_begin(args, state, TrainerControl(), optimizer)
    optimizer.param_groups[0]["betas"] = (0.5, 0.99)
    with pytest.raises(InputError, match=r"continues with betas=\(0\.5, 0\.99\)"):
        WhatRunsCallback().on_train_begin(args, state, TrainerControl(), optimizer)


class Watch(TrainerCallback):
    """Looks into the run's folder at every save."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.complete = folder, []

    def on_save(self, args, state, control, **kwargs) -> None:
        self.complete.append([path.name for path in checkpoints_in(self.folder) if not faults(path)])


def test_the_limit_holds_after_every_save(tmp_path):
    run = trainer(tmp_path, save_total_limit=1)
    watch = Watch(tmp_path)
    run.add_callback(watch)
    run.train()
    assert watch.complete == [["checkpoint-2"], ["checkpoint-4"], ["checkpoint-6"]]
    assert run.args.save_total_limit == 1


def test_the_last_complete_checkpoint_outlives_a_save_that_fails(tmp_path, monkeypatch):
    """transformers deletes old checkpoints inside its save, before other processes have finished theirs."""
    run = trainer(tmp_path, save_total_limit=1)
    wait = run.accelerator.wait_for_everyone

    def fail_after_the_save() -> None:
        if (tmp_path / "checkpoint-4" / "trainer_state.json").is_file():
            raise RuntimeError("a process died")
        wait()

    monkeypatch.setattr(run.accelerator, "wait_for_everyone", fail_after_the_save)
    with pytest.raises(RuntimeError, match="a process died"):
        run.train()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert last_complete(tmp_path, speak=False) == tmp_path / "checkpoint-2"
    assert run.args.save_total_limit == 1, "the limit is put back"


def test_a_save_over_an_old_folder_starts_from_an_empty_one(tmp_path):
    old = tmp_path / "checkpoint-2"
    old.mkdir()
    (old / "of_another_run.bin").write_bytes(b"1")
    write_manifest(old, 2, 8)
    trainer(tmp_path, max_steps=2).train()
    assert not (old / "of_another_run.bin").exists()
    assert read_manifest(old).processes == 1


def test_rotation_deletes_torn_checkpoints_first_and_the_oldest_next(tmp_path):
    for age, step in enumerate((2, 4, 6, 8)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 6:
            write_manifest(folder, step, 1)
            os.utime(folder / MANIFEST, (age, age))
    newest, best = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    os.utime(newest / MANIFEST, (9, 9))  # written last: the run went back to an earlier step

    def left() -> list[str]:
        return [path.name for path in checkpoints_in(tmp_path)]

    for limit in (None, 0, 4):
        rotate(tmp_path, limit, keep=[newest])
        assert len(left()) == 4
    rotate(tmp_path, 3, keep=[newest])
    assert left() == ["checkpoint-8", "checkpoint-4", "checkpoint-2"]
    rotate(tmp_path, 1, keep=[newest, best, None])
    assert left() == ["checkpoint-4", "checkpoint-2"]
    rotate(tmp_path, 1, keep=[newest])
    assert left() == ["checkpoint-4"]


class _Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_deepspeed_checkpoint_that_would_run_code_is_refused_before_anything_unpickles_it(tmp_path):
    pytest.importorskip("deepspeed")
    checkpoint, marker = zero(tmp_path / "checkpoint-2", [0]), tmp_path / "was here"
    torch.save({"optimizer_state_dict": {}, "extra": _Runs(marker)}, deepspeed_files(checkpoint)[0])
    for use in (
        lambda: load_deepspeed(deepspeed_files(checkpoint)[0]),
        lambda: check_checkpoint(str(checkpoint), "tam", 1, "DEEPSPEED"),
        lambda: read_weights(checkpoint),
    ):
        with pytest.raises(InputError, match="might run code"):
            use()
    assert not marker.exists()
    torch.load(deepspeed_files(checkpoint)[0], weights_only=False)  # what was refused would have run
    assert marker.exists()


def test_shards_that_would_run_code_are_refused_before_anything_unpickles_them(sharded, tmp_path):
    import torch.distributed.checkpoint as dcp

    marker = tmp_path / "was here"
    assert read_weights(sharded).keys() == {"a.weight", "b.bias"}
    optimizer, table = sharded / "optimizer_0", sharded / "pytorch_model_fsdp_0" / ".metadata"
    shutil.rmtree(optimizer)  # an entry beside the tensors
    groups = [{"lr": 0.1, "algorithm": "TAM", "params": ["a.weight"], "extra": _Runs(marker)}]
    dcp.save({"optimizer": {"state": {}, "param_groups": groups}}, checkpoint_id=optimizer, no_dist=True)
    for use in (lambda: load_distributed(optimizer), lambda: check_checkpoint(str(sharded), "tam", 1, "FSDP")):
        with pytest.raises(InputError, match="might run code"):
            use()
    table.write_bytes(pickle.dumps(_Runs(marker)))  # the table itself
    for use in (
        lambda: faults(sharded, manifest_needed=False),
        lambda: check_checkpoint(str(sharded), "tam", 1, "FSDP"),
        lambda: read_weights(sharded),
    ):
        with pytest.raises(InputError, match="might run code"):
            use()
    assert not marker.exists()
    pickle.loads(table.read_bytes())  # what was refused would have run
    assert marker.exists()
