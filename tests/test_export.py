"""What `hf-momentum export` writes is bit for bit what the run held, and loads without this package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

from hf_momentum.cli import main
from hf_momentum.errors import InputError
from hf_momentum.training import MomentumTrainer, MomentumTrainingArguments
from hf_momentum.training.checkpoints import (
    base_state,
    check_checkpoint,
    faults,
    kind_of,
    load_deepspeed,
    optimizer_files,
    read_manifest,
)
from hf_momentum.training.export import by_number, export, optimizer_state, plain_name, read_weights
from tests.checkpoint_job import examples, network
from tests.launching import facts_of, launch

# One worker runs the whole module, so that each launch happens once.
pytestmark = pytest.mark.xdist_group("two processes")

SHORT = ("fsdp2-sharded", "zero2")
KINDS = {"ddp": "plain", "fsdp2-full": "fsdp-full", "fsdp2-sharded": "fsdp-sharded"}
TYPES = {"ddp": "MULTI_CPU", "fsdp2-full": "FSDP", "fsdp2-sharded": "FSDP"}


def layouts(*variants: str) -> list:
    """Every layout with each variant of the model; two of them in the short suite."""
    found = []
    for variant in variants:
        for layout in ("ddp", "fsdp2-sharded", "fsdp2-full", "zero1", "zero2", "zero3"):
            short = layout in SHORT and variant == "full"
            found.append(pytest.param(layout, variant, marks=() if short else pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of four steps with saves at 2 and 4, on two processes; each layout is launched once."""
    done: dict[tuple[str, str], Path] = {}

    def folder(layout: str, variant: str = "full") -> Path:
        if layout.startswith("zero"):
            pytest.importorskip("deepspeed")
        if (layout, variant) not in done:
            place = tmp_path_factory.mktemp("saved") / f"{layout}-{variant}"
            words = [] if variant == "full" else [f"--{variant}"]
            facts = facts_of(place, launch(layout, place, *words))
            assert (facts["processes"], facts["distributed_type"]) == (2, TYPES.get(layout, "DEEPSPEED"))
            done[layout, variant] = place
        return done[layout, variant]

    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_process(folder, max_steps=4).train()
    torch.set_num_threads(threads)
    return folder


def one_process(folder: Path, **fields) -> MomentumTrainer:
    set_seed(0)
    common = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "save_strategy": "steps"}
    common |= {"save_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "seed": 0}
    args = MomentumTrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**common, "max_steps": 4, **fields}
    )
    return MomentumTrainer(network(False, False), args, train_dataset=examples(), data_collator=default_data_collator)


@pytest.mark.parametrize(("layout", "variant"), layouts("full", "lora", "tied"))
def test_the_weights_equal_those_that_the_run_held_bit_for_bit(layout, variant, saved, tmp_path):
    run = saved(layout, variant)
    checkpoint = run / "run" / "checkpoint-2"
    assert kind_of(checkpoint) == KINDS.get(layout, "deepspeed")
    out = export(checkpoint, tmp_path / "out")

    truth = load_file(run / "truth-2.safetensors")
    if variant == "lora":
        truth = {name.replace(".default.", "."): value for name, value in truth.items() if "lora_" in name}
    if variant == "tied":
        del truth["lm_head.weight"]
    found = load_file(out / ("adapter_model.safetensors" if variant == "lora" else "model.safetensors"))
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    later = load_file(run / "truth-4.safetensors")
    assert any(name in later and not torch.equal(found[name], later[name]) for name in found) or variant == "lora"

    assert AutoTokenizer.from_pretrained(out)("river")["input_ids"]
    assert (out / "README.md").is_file()
    if variant == "lora":
        from peft import PeftModel

        set_seed(0)
        loaded = PeftModel.from_pretrained(network(False, False), out).state_dict()
        names = {name.replace(".default.", "."): value for name, value in loaded.items()}
        assert all(torch.equal(names[name], value) for name, value in truth.items())
        return
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in truth.items())
    if variant == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_result_loads_where_this_package_is_not(saved, tmp_path):
    out = export(saved("fsdp2-sharded") / "run" / "checkpoint-4", tmp_path / "out")
    code = (
        "import sys; sys.modules['hf_momentum'] = None; from transformers import AutoModelForCausalLM; "
        f"print(AutoModelForCausalLM.from_pretrained({str(out)!r}).num_parameters())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == network(False, False).num_parameters()


def test_a_sharded_checkpoint_carries_what_describes_the_model(saved):
    names = {path.name for path in (saved("fsdp2-sharded") / "run" / "checkpoint-2").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names


@pytest.mark.parametrize("layout", SHORT)
def test_the_manifest_covers_the_files_of_both_processes(layout, saved):
    checkpoint = saved(layout) / "run" / "checkpoint-4"
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.processes, manifest.kind) == (4, 2, KINDS.get(layout, "deepspeed"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest.files.keys()
    parts = [name for name in manifest.files if "__1_0.distcp" in name or "zero_pp_rank_1" in name]
    assert parts
    assert faults(checkpoint) == faults(checkpoint, manifest_needed=False) == []
    check_checkpoint(str(checkpoint), "adamw_torch", 2, TYPES.get(layout, "DEEPSPEED"))
    with pytest.raises(InputError, match="another package, not by tam"):
        check_checkpoint(str(checkpoint), "tam")


def test_zero_on_another_number_of_processes_is_refused(saved):
    checkpoint = str(saved("zero2") / "run" / "checkpoint-4")
    with pytest.raises(InputError, match=r"saved by 2 processes under ZeRO, and 1 run now.*export .* OUT --resumable"):
        check_checkpoint(checkpoint, "adamw_torch", 1, "DEEPSPEED")


# --- resumable -------------------------------------------------------------------------------------------------------


def write_pieces(checkpoint: Path, whole: dict) -> None:
    """The tables that an optimizer leaves, made here from DeepSpeed's own record, which stages 1 and 2 keep."""
    shapes = {name: value.shape for name, value in whole.items()}
    saved = {rank: load_deepspeed(path)["optimizer_state_dict"] for rank, path in optimizer_files(checkpoint)}
    names: list[list[str]] = [[] for _ in saved[0]["param_slice_mappings"]]
    for rank in sorted(saved):
        for group, mapping in enumerate(saved[rank]["param_slice_mappings"]):
            names[group] += [name for name in mapping if name not in names[group]]
    tensors = [
        {"name": name, "shape": list(shapes[name]), "group": group, "position": position}
        for group, members in enumerate(names)
        for position, name in enumerate(members)
    ]
    index = {tensor["name"]: number for number, tensor in enumerate(tensors)}
    reached = dict.fromkeys(index, 0)
    for rank in sorted(saved):
        holders = []
        for group, mapping in enumerate(saved[rank]["param_slice_mappings"]):
            pieces = []
            for name, place in mapping.items():
                piece = {"tensor": index[name], "start": place.start, "from": reached[name], "numel": place.numel}
                reached[name] += place.numel
                pieces.append(piece)
            holders.append({"group": group, "state_index": group, "pieces": pieces})
        table = {"algorithm": "AdamW", "process": rank, "processes": len(saved), "tensors": tensors, "holders": holders}
        (checkpoint / f"pieces-rank{rank}.json").write_text(json.dumps(table))


@pytest.fixture
def pieces(saved, tmp_path) -> Path:
    """A ZeRO-2 checkpoint with its tables of pieces."""
    checkpoint = Path(shutil.copytree(saved("zero2") / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))
    write_pieces(checkpoint, load_file(saved("zero2") / "truth-2.safetensors"))
    return checkpoint


def assert_same_state(one: dict, two: dict, relative: float) -> None:
    assert one["state"].keys() == two["state"].keys()
    for number, entry in one["state"].items():
        assert entry.keys() == two["state"][number].keys()
        for quantity, value in entry.items():
            other = two["state"][number][quantity]
            assert value.shape == other.shape, (number, quantity)
            assert (value - other).abs().max() <= relative * value.abs().max(), (number, quantity)
    assert [group["params"] for group in one["param_groups"]] == [group["params"] for group in two["param_groups"]]
    for a, b in zip(one["param_groups"], two["param_groups"], strict=True):
        assert {key: a[key] for key in ("lr", "betas", "weight_decay", "eps")} == {
            key: b[key] for key in ("lr", "betas", "weight_decay", "eps")
        }


def test_the_pieces_of_flat_partitions_make_the_state_of_a_single_process(pieces, alone):
    state = optimizer_state(pieces)
    assert_same_state(torch.load(alone / "checkpoint-2" / "optimizer.pt"), state, 2e-5)


@pytest.mark.parametrize("layout", ["fsdp2-sharded", pytest.param("fsdp2-full", marks=pytest.mark.slow)])
def test_the_state_of_shards_makes_the_state_of_a_single_process(layout, saved, alone):
    state = optimizer_state(saved(layout) / "run" / "checkpoint-2")
    assert_same_state(torch.load(alone / "checkpoint-2" / "optimizer.pt"), state, 2e-5)


@pytest.mark.parametrize("layout", SHORT)
def test_one_process_continues_from_what_two_saved(layout, saved, request, alone, tmp_path):
    checkpoint = request.getfixturevalue("pieces") if layout == "zero2" else saved(layout) / "run" / "checkpoint-2"
    out = export(checkpoint, tmp_path / "run-on-one" / "checkpoint-2", resumable=True)
    assert faults(out) == []
    assert (kind_of(out), read_manifest(out).step) == ("plain", 2)
    run = one_process(out.parent)
    run.train(resume_from_checkpoint=True)
    expected, found = load_file(alone / "checkpoint-4" / "model.safetensors"), run.model.state_dict()
    scale = max(value.abs().max() for value in expected.values())
    difference = max((expected[name] - found[name]).abs().max() for name in expected) / scale
    assert difference <= 1e-6
    start = read_weights(out)
    assert max((expected[name] - start[name]).abs().max() for name in expected) / scale > 1e-4, "the weights moved"


def test_pieces_that_leave_a_gap_are_refused(pieces):
    table = json.loads((pieces / "pieces-rank1.json").read_text())
    table["holders"][0]["pieces"].pop()
    (pieces / "pieces-rank1.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"the pieces of lm_head\.weight's exp_avg hold 0 of 8224 numbers"):
        optimizer_state(pieces)


def test_pieces_beyond_the_flat_partition_are_refused(pieces):
    table = json.loads((pieces / "pieces-rank1.json").read_text())
    table["holders"][0]["pieces"][0]["start"] = 10**9
    (pieces / "pieces-rank1.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="cannot be cut into tensors"):
        optimizer_state(pieces)


def test_a_missing_table_is_refused(pieces):
    (pieces / "pieces-rank1.json").unlink()
    with pytest.raises(InputError, match=r"for processes \[0\] of 2"):
        optimizer_state(pieces)
    (pieces / "pieces-rank0.json").unlink()
    with pytest.raises(InputError, match=r"has no pieces-rank0\.json"):
        export(pieces, pieces.parent / "out", resumable=True)
    assert not (pieces.parent / "out").exists(), "nothing is left of an export that failed"
    assert [path.name for path in pieces.parent.iterdir()] == [pieces.name]


def test_stage_3_keeps_its_state_under_another_name():
    inner = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
    for name in ("base_optimizer_state", "optimizer_state_dict"):
        assert base_state({"optimizer_state_dict": {name: inner}}) is inner


# --- without a launch ------------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_exports_in_another_type_and_loads_in_it(alone, tmp_path, capfd):
    from tests.checkpoint_job import byte_tokenizer

    byte_tokenizer(32).save_pretrained(alone)
    assert main(["export", str(alone / "checkpoint-2"), str(tmp_path / "out"), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["folder"] == str(tmp_path / "out")
    truth = load_file(alone / "checkpoint-2" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, truth[name].bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("river")["input_ids"], "taken from the folder above"


def test_what_cannot_be_exported_is_one_line(alone, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("1")
    assert main(["export", str(alone / "checkpoint-2"), str(taken)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    torn = Path(shutil.copytree(alone / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-1])
    assert main(["export", str(torn), str(tmp_path / "out")]) == 2
    assert "is torn: model.safetensors has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_configuration_is_refused_with_what_to_do(alone, tmp_path):
    bare = Path(shutil.copytree(alone / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))
    (bare / "config.json").unlink()
    (bare / "complete.json").unlink()
    with pytest.raises(InputError, match=r"has a config\.json .* copy that of the base model"):
        export(bare, tmp_path / "out")


def test_round_robin_gradients_are_refused_for_their_order_is_not_recorded(saved, tmp_path):
    checkpoint = Path(shutil.copytree(saved("zero2") / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))
    for _, path in optimizer_files(checkpoint):
        content = torch.load(path, weights_only=False)
        content["ds_config"]["zero_optimization"]["round_robin_gradients"] = True
        torch.save(content, path)
    (checkpoint / "complete.json").unlink()
    with pytest.raises(InputError, match="round_robin_gradients"):
        read_weights(checkpoint)


def test_without_deepspeed_the_message_says_what_to_install(tmp_path, monkeypatch):
    from tests.test_checkpoints import zero

    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", None)
    with pytest.raises(InputError, match=r"pip install 'hf-momentum\[deepspeed\]'"):
        read_weights(zero(tmp_path / "checkpoint-2", [0]))


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.norm.weight", "model.norm.weight"),
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.module_list.0.weight", "model.module_list.0.weight"),
    ],
)
def test_names_lose_their_wrappers(wrapped, plain):
    assert plain_name(wrapped) == plain


def test_adapters_and_whole_trained_modules_have_the_names_that_peft_reads(tmp_path):
    """The names of a state dict, as shards hold them, against those that PEFT itself saves."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "embed_tokens"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(network(False, False), config)
    model.save_pretrained(tmp_path / "truth")
    truth = load_file(tmp_path / "truth" / "adapter_model.safetensors")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    torch.save({name: value.detach() for name, value in trained.items()}, checkpoint / "pytorch_model_fsdp.bin")
    shutil.copy(tmp_path / "truth" / "adapter_config.json", checkpoint)
    found = read_weights(checkpoint)
    assert found.keys() <= truth.keys()
    assert {name for name in truth if "base_layer" not in name} == set(found)
    assert all(torch.equal(found[name], truth[name]) for name in found)


def test_a_group_that_shards_drop_is_put_back():
    """Without weight decay nothing is left of LoRA; a Trainer's optimizer has two groups all the same."""
    named = {"state": {"a": {"step": 3}}, "param_groups": [{"weight_decay": 0.1, "params": ["a"]}]}
    groups = by_number(named)["param_groups"]
    assert groups == [{"weight_decay": 0.1, "params": [0]}, {"weight_decay": 0.0, "params": []}]
