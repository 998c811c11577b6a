"""Pushing to the Hub: real clients and real files against a server on the loopback interface."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load, load_file, save_file

from hf_momentum.cli import main
from hf_momentum.errors import InputError
from hf_momentum.evaluation import Report
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.papers import paper_of
from hf_momentum.training import MomentumTrainer, MomentumTrainingArguments, card, load_recipe
from hf_momentum.training.card import papers
from hf_momentum.training.checkpoints import find_checkpoint
from hf_momentum.training.export import export
from hf_momentum.training.hub import before_training
from hf_momentum.training.hub_contents import gather
from hf_momentum.training.scrubbing import arguments_json, secret_in
from tests.loopback_hub import LoopbackHub

SECRET = "hf_recognisable" + "Q" * 20


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Every wait before a retry, instead of waiting."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def hub(monkeypatch, waits):
    with LoopbackHub(users={SECRET: "me", "hf_of_a_reader": "me:read"}) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield made


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A finished run with all weights trained, and its checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("hub") / "a run"
    assert main(["train", *tiny.words(out, save_strategy="steps", save_steps=2)]) == 0
    return out


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "adapters"
    assert main(["train", *tiny.words(out, lora=True, learning_rate=0.5)]) == 0
    return out


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder with a model in two files, as from_pretrained would read it."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.full((25_000,), float(number))}, folder / name)
        names[f"w{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(words: list[object], capsys) -> str:
    """The one line with which a command ends; the exit status is 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


# What is pushed


def test_a_run_is_pushed_whole_and_says_so(hub, run, capsys):
    assert main(["push", str(run), "me/model"]) == 0
    files = hub.files("me/model")
    assert set(files) == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("training_args.json", "recipe.yaml", "report.json", "report.md", "README.md"),
        *(f"plots/{path.name}" for path in (run / "plots").iterdir()),
    }
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    said = capsys.readouterr().out
    kinds = ("model:", "tokenizer:", "training arguments:", "recipe:", "report:", "pictures:", "model card:")
    assert all(f"\n  {kind}" in said for kind in kinds)
    assert "training_args.bin (a pickle" in said and "checkpoint-2/" in said and "optimizer state: none" in said
    assert said.strip().splitlines()[-1] == f"{hub.url}/me/model/commit/{hub.repos['me/model'].branches['main']}"


def test_no_folder_of_this_machine_is_told(hub, run, tiny):
    assert main(["push", str(run), "me/model", "--push_optimizer"]) == 0
    told = {path: content for path, content in hub.files("me/model").items() if not path.endswith(".pt")}
    places = [str(tiny.folder), str(run), str(run.parent), str(Path.home())]
    assert not [(path, place) for path, content in told.items() for place in places if place.encode() in content]
    recipe = yaml.safe_load(told["recipe.yaml"])
    assert recipe["train_dataset"] == "code.jsonl" and recipe["output_dir"] == "a run"


def test_paths_with_spaces_and_other_letters_are_shortened_too(hub, small, tmp_path):
    odd = tmp_path / "Jo Mäx" / "数据"
    folder = shutil.copytree(small, odd / "run")
    arguments = MomentumTrainingArguments(output_dir=str(folder), use_cpu=True)
    (folder / "training_args.json").write_text(arguments_json(arguments))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": str(odd / "my base")}))
    data = odd / "so long a name that a line of YAML would be folded in its midst" / "x.jsonl"
    recipe = load_recipe("quickstart", [f"--output_dir={folder}", f"--train_dataset={data}@train"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["push", str(folder), "me/model"]) == 0
    files = hub.files("me/model")
    assert json.loads(files["training_args.json"])["output_dir"] == "run"
    assert json.loads(files["config.json"])["_name_or_path"] == "my base"
    assert yaml.safe_load(files["recipe.yaml"])["train_dataset"] == "x.jsonl@train"
    for path in ("training_args.json", "config.json", "recipe.yaml", "README.md"):
        assert not [part for part in ("Jo", "xE4", "00e4", "x4", "so long a name") if part.encode() in files[path]], (
            path
        )


def test_a_card_of_peft_names_no_folder_of_this_machine(hub, adapters):
    base = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = adapters.with_name("theirs")
    shutil.copytree(adapters, theirs)
    tags = [f"base_model:adapter:{base}", "lora"]  # as PEFT 0.21 writes it
    (theirs / "README.md").write_text(f"---\n{yaml.safe_dump({'base_model': base, 'tags': tags})}---\n\nMine.\n")
    for words, named in (([], None), (["--base", "me/base"], "me/base")):
        assert main(["push", str(theirs), "me/adapters", *words]) == 0
        card = hub.files("me/adapters")["README.md"].decode()
        told = yaml.safe_load(card.split("---")[1])
        assert told.get("base_model") == named and told["tags"] == ["lora"] and "Mine." in card
    shutil.rmtree(theirs)


def test_the_results_of_the_card_are_read_by_the_hubs_own_library(hub, run):
    assert main(["push", str(run), "me/model"]) == 0
    report = json.loads(hub.files("me/model")["report.json"])
    card = ModelCard(hub.files("me/model")["README.md"].decode())
    told = {(one.dataset_config, one.metric_type): one.metric_value for one in card.data.eval_results}
    expected = {
        (split["name"], metric): one["value"] for split in report["splits"] for metric, one in split["after"].items()
    }
    assert told == pytest.approx(expected, abs=1e-6) and len(told) == len(card.data.eval_results)
    assert str(ModelCard(str(card))) == str(card)


def test_an_optimizer_of_somebody_else_has_a_card_without_a_paper_of_ours(monkeypatch):
    theirs = replace(OPTIMIZERS["tam"], name="signum", source="arXiv 1802.04434")
    monkeypatch.setattr(card, "OPTIMIZERS", {**OPTIMIZERS, "signum": theirs})
    report = Report("Signum", "byte", [], [], {}, "aux_dataset: a=b", "hf-momentum train")
    text = card.model_card(report, None, False, "signum", [])
    assert "(arXiv 1802.04434)" in text and "The method is that of" not in text
    assert "Besides: [Careful with that Scalpel" in text and text.count("@misc{") == 1
    alone = card.model_card(replace(report, recipe="a: 1"), None, False, "signum", [])
    assert "(arXiv 1802.04434)" in alone and "## Citation" not in alone


def test_the_card_says_what_ran_how_well_and_whom_to_cite(hub, run):
    assert main(["push", str(run), "me/model"]) == 0
    card = hub.files("me/model")["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    report = json.loads(hub.files("me/model")["report.json"])
    results = metadata["model-index"][0]["results"]
    assert {result["dataset"]["name"] for result in results} == {"code (in distribution)", "prose (must not forget)"}
    loss = next(m for m in results[0]["metrics"] if m["type"] == "loss")["value"]
    assert loss == pytest.approx(report["splits"][0]["after"]["loss"]["value"], abs=1e-6)
    for part in ("**layout**: one process", "**versions**: hf-momentum", "**code**: ", "## Limits", "gamma=0.9"):
        assert part in card
    assert "@misc{malviya2024torque," in card and "eprint = {2412.18790}" in card
    assert "base_model" not in metadata  # trained here from scratch


def test_every_optimizer_names_a_paper_that_can_be_cited():
    for name, spec in OPTIMIZERS.items():
        assert paper_of(spec.source).arxiv in spec.source
        assert papers(name, {})[0].bibtex().startswith("@misc{")
    assert papers("adamw_torch", {"momentum_schedule": "hybrid"})[0].arxiv == "2603.28921"


def test_training_arguments_are_pushed_as_json(hub, run):
    assert main(["push", str(run), "me/model"]) == 0
    told = json.loads(hub.files("me/model")["training_args.json"])
    assert told["optim"] == "tam" and told["learning_rate"] == 0.05 and told["output_dir"] == "a run"
    assert not [name for name in told if name.endswith("_token")]


def test_what_is_called_a_token_and_is_no_secret_stays(tmp_path):
    pytest.importorskip("trl")
    from hf_momentum.training.trl_trainers import MomentumSFTConfig

    config = MomentumSFTConfig(
        output_dir=str(tmp_path), eos_token="<|end|>", hub_token=SECRET, use_cpu=True, bf16=False
    )
    told = json.loads(arguments_json(config))
    assert told["eos_token"] == "<|end|>" and "hub_token" not in told


def test_a_checkpoint_claims_no_figures_of_the_end_of_its_run(hub, run):
    assert main(["push", str(run / "checkpoint-2"), "me/model"]) == 0
    files = hub.files("me/model")
    assert "report.json" not in files and files["recipe.yaml"]
    card = files["README.md"].decode()
    assert "Checkpoint after 2 optimizer steps" in card and "model-index" not in card and "@misc{malviya" in card
    assert files["model.safetensors"] == (run / "checkpoint-2" / "model.safetensors").read_bytes()


def test_weights_can_be_pushed_in_fewer_bits(hub, run):
    assert main(["push", str(run), "me/model", "--dtype", "bfloat16"]) == 0
    files = hub.files("me/model")
    assert len(files["model.safetensors"]) < 0.6 * (run / "model.safetensors").stat().st_size
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"
    assert [path.name for path in run.parent.iterdir()] == ["a run"]  # nothing of the conversion stays


def test_a_conversion_takes_every_template_along_and_no_folder_of_the_users(hub, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "plots"))
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tools.jinja", "video_preprocessor_config.json"):
        (folder / name).write_text("{}")
    neighbours = [tmp_path / name for name in ("run.push", "model.partial")]
    for neighbour in neighbours:
        neighbour.mkdir()
    assert main(["push", str(folder), "me/model", "--dtype", "bfloat16"]) == 0
    assert {"additional_chat_templates/tools.jinja", "video_preprocessor_config.json"} <= set(hub.files("me/model"))
    assert export(folder, tmp_path / "model").is_dir() and all(neighbour.is_dir() for neighbour in neighbours)


def test_json_has_the_address(hub, run, capsys):
    capsys.readouterr()
    assert main(["push", str(run), "model", "--private", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["repo_id"] == "me/model" and told["private"] is True and told["url"].startswith(f"{hub.url}/me/model")
    assert any("training_args.json" in line for line in told["summary"])


def test_a_checkpoint_of_shards_is_put_together_first(hub, run, tmp_path):
    from torch.distributed import checkpoint as distributed

    shards = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", shards)
    for name in ("model.safetensors", "optimizer.pt", "complete.json"):
        (shards / name).unlink()
    weights = load_file(run / "checkpoint-2" / "model.safetensors")
    writer = distributed.FileSystemWriter(shards / "pytorch_model_fsdp_0")
    distributed.save({"model": weights}, storage_writer=writer, no_dist=True)
    assert main(["push", str(shards), "me/model"]) == 0
    got = load(hub.files("me/model")["model.safetensors"])
    assert got.keys() == weights.keys() and all(torch.equal(got[name], weights[name]) for name in got)
    assert [path.name for path in shards.parent.iterdir()] == ["checkpoint-2"]


# What others can do with it

WITHOUT_US = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_momentum":
            raise ImportError("hf-momentum is not installed")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM

out = sys.argv[1]
tokens = AutoTokenizer.from_pretrained("me/model")("def add(x):", return_tensors="pt").input_ids
full = AutoModelForCausalLM.from_pretrained("me/model")(tokens).logits
adapted = AutoPeftModelForCausalLM.from_pretrained("me/adapters")(tokens).logits
assert "hf_momentum" not in sys.modules
torch.save({"tokens": tokens, "full": full, "adapted": adapted}, out)
"""


def test_from_pretrained_reads_it_without_hf_momentum(hub, run, adapters, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    base = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
    for words in ([run, "me/model"], [base, "me/base"], [adapters, "me/adapters", "--base", "me/base"]):
        assert main(["push", *map(str, words), "--private"]) == 0
    script, out = tmp_path / "theirs.py", tmp_path / "out.pt"
    script.write_text(WITHOUT_US)
    environment = hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, str(script), str(out)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(out, weights_only=True)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(run)(theirs["tokens"]).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(adapters)(theirs["tokens"]).logits
    torch.testing.assert_close(theirs["full"], ours)
    torch.testing.assert_close(theirs["adapted"], adapted)
    card = yaml.safe_load(hub.files("me/adapters")["README.md"].decode().split("---")[1])
    assert card["base_model"] == "me/base"


def test_adapters_on_a_model_of_this_machine_say_so(hub, adapters, capsys):
    assert main(["push", str(adapters), "me/adapters"]) == 0
    assert "push that too, and name it here with --base" in capsys.readouterr().out
    assert json.loads(hub.files("me/adapters")["adapter_config.json"])["base_model_name_or_path"] is None
    assert hub.files("me/adapters")["README.md"].decode().count("that was not pushed with them") == 1
    assert main(["push", str(adapters), "me/others", "--base", "me/base"]) == 0
    assert "that was not pushed" not in hub.files("me/others")["README.md"].decode()


def test_training_goes_on_from_a_pushed_checkpoint_to_the_same_weights(hub, run, tiny, tmp_path):
    assert main(["push", str(run / "checkpoint-2"), "me/state", "--push_optimizer"]) == 0
    got = snapshot_download("me/state", endpoint=hub.url, local_dir=tmp_path / "got")
    words = tiny.words(tmp_path / "out", save_strategy="no", resume_from_checkpoint=got)
    assert main(["train", *words]) == 0
    ours, theirs = load_file(run / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_state_of_a_run_lies_beside_its_model(hub, run, tiny, tmp_path):
    assert main(["push", str(run), "me/model", "--push_optimizer"]) == 0
    files = hub.files("me/model")
    assert {path for path in files if path.startswith("last-checkpoint/")} >= {
        *(f"last-checkpoint/{name}" for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "complete.json")),
        "last-checkpoint/trainer_state.json",
    }
    assert hub.uploads[digest(run / "model.safetensors")] == 1  # the same object, sent once
    got = Path(snapshot_download("me/model", endpoint=hub.url, local_dir=tmp_path / "got")) / "last-checkpoint"
    words = tiny.words(tmp_path / "out", max_steps=5, resume_from_checkpoint=got)
    assert main(["train", *words]) == 0
    # A download that was cut short is noticed.
    (got / "optimizer.pt").write_bytes((got / "optimizer.pt").read_bytes()[:-10])
    assert main(["train", *tiny.words(tmp_path / "again", max_steps=5, resume_from_checkpoint=got)]) == 2


def test_a_run_without_checkpoints_has_no_state_to_push(hub, adapters, capsys):
    line = refused(["push", adapters, "me/adapters", "--push_optimizer"], capsys)
    assert "--save_strategy steps" in line and "me/adapters" not in line.split(";")[0]


# Where it goes


def test_a_private_repository_stays_private(hub, small):
    hub.add_repo("me/secret", private=True)
    assert main(["push", str(small), "me/secret"]) == 0
    assert hub.repos["me/secret"].private
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.url, token=False).model_info("me/secret")


def test_private_is_not_promised_for_a_public_repository(hub, small, capsys):
    hub.add_repo("me/known")
    line = refused(["push", small, "me/known", "--private"], capsys)
    assert "exists and is public" in line and hub.files("me/known") == {}


def test_a_new_repository_is_as_private_as_asked_for(hub, small, capsys):
    assert main(["push", str(small), "me/new", "--private"]) == 0
    assert main(["push", str(small), "me/open"]) == 0
    assert (hub.repos["me/new"].private, hub.repos["me/open"].private) == (True, False)
    said = capsys.readouterr().out
    assert "to me/new (private)" in said and "to me/open (public)" in said


def test_a_new_repository_follows_its_owners_default_unless_told_otherwise(hub, small):
    hub.private_by_default = True
    assert main(["push", str(small), "me/new"]) == 0
    for told in (False, None):
        arguments = MomentumTrainingArguments(
            output_dir="out", use_cpu=True, push_to_hub=True, hub_model_id=f"me/{told}", hub_private_repo=told
        )
        assert before_training(arguments).private is told
    assert [hub.repos[name].private for name in ("me/new", "me/False", "me/None")] == [True, False, True]


def test_a_branch_and_a_pull_request(hub, small, capsys):
    assert main(["push", str(small), "me/model", "--revision", "dev"]) == 0
    assert hub.files("me/model") == {} and "config.json" in hub.files("me/model", "dev")
    hub.add_repo("other/model")
    assert main(["push", str(small), "other/model", "--create_pr"]) == 0
    assert capsys.readouterr().out.strip().endswith("/other/model/discussions/1")
    assert hub.files("other/model") == {} and "config.json" in hub.files("other/model", "refs/pr/1")


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(hub, small, run, capsys):
    assert main(["push", str(small), "me/model"]) == 0
    assert main(["push", str(run), "me/model"]) == 0
    assert "removed there: model-00001-of-00002.safetensors" in capsys.readouterr().out
    assert [path for path in hub.files("me/model") if path.endswith(".safetensors")] == ["model.safetensors"]


def test_no_optimizer_state_of_an_earlier_push_stays_beside_other_weights(hub, run, capsys):
    assert main(["push", str(run / "checkpoint-2"), "me/model", "--push_optimizer"]) == 0
    assert main(["push", str(run), "me/model"]) == 0
    assert "complete.json, optimizer.pt" in capsys.readouterr().out.partition("removed there: ")[2]
    left = ("complete.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
    assert not set(left) & set(hub.files("me/model"))
    assert main(["push", str(run), "me/model", "--push_optimizer"]) == 0
    assert main(["push", str(run), "me/model"]) == 0
    assert "last-checkpoint/optimizer.pt" in hub.files("me/model")  # its weights lie beside it


# What goes wrong


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        ("hf_wrong_and_not_known", "me/model", ["does not accept the token (401", "hf auth login"]),
        ("", "me/model", ["no token", "hf auth login", "HF_TOKEN"]),
        (SECRET, "other/model", ["may not write there (403", "repository of your own", "say again: hf-momentum push"]),
        ("hf_of_a_reader", "me/model", ["may not write there (403"]),
        (SECRET, "me/not a name", ["write OWNER/NAME"]),
    ],
)
def test_who_may_not_push_reads_why_and_what_to_do(hub, small, monkeypatch, tmp_path, capsys, token, repo, expected):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    line = refused(["push", small, repo], capsys)
    assert all(part in line for part in expected) and not (token and token in line)


def test_offline_is_said_before_anything_is_asked(hub, small, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(["push", small, "me/model"], capsys)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("where", "status", "headers"),
    [
        *((place, 500, {}) for place in ("GET /api/models", "repos/create", "preupload", "PUT", "objects/batch")),
        ("/commit/", 500, {}),
        *((place, 429, {"Retry-After": "7"}) for place in ("repos/create", "PUT", "/commit/")),
    ],
)
def test_trouble_that_passes_is_waited_for(hub, small, waits, where, status, headers):
    hub.fail_next(where, times=2, status=status, headers=headers)
    assert main(["push", str(small), "me/model"]) == 0
    assert len(waits) == 2
    assert set(waits) <= ({7.0, 8.0} if headers else {1.0, 2.0})
    assert set(hub.files("me/model")) == {path.name for path in small.iterdir()} | {"README.md"}


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("GET /api/models", 500, "trouble of its own"),
        ("PUT", 500, "trouble of its own"),
        ("PUT", 429, "too many requests"),
        ("/commit/", 429, "too many requests"),
    ],
)
def test_trouble_that_stays_is_one_line_and_the_same_command_mends_it(hub, small, capsys, where, status, words):
    hub.fail_next(where, times=10**6, status=status)
    line = refused(["push", small, "me/model"], capsys)
    assert words in line and f"{status}" in line
    assert f"nothing is lost, all lies in {small}; then say again: hf-momentum push {small} me/model" in line
    hub.heal()
    assert main(["push", str(small), "me/model"]) == 0
    assert all(count == 1 for count in hub.uploads.values())


def test_a_connection_that_is_cut_is_made_again(hub, small):
    hub.fail_next("PUT", status=None, cut_after=1000)
    assert main(["push", str(small), "me/model"]) == 0
    assert sum(request.startswith("PUT") for request in hub.requests) == 3
    assert hub.files("me/model")["model-00001-of-00002.safetensors"]


def test_a_commit_whose_answer_was_lost_is_there_once(hub, small):
    hub.fail_next("/commit/", status=None, cut_after=10)
    assert main(["push", str(small), "me/model"]) == 0
    assert [title for title, _ in hub.repos["me/model"].commits.values()][1:] == ["hf-momentum push of small"]


def test_an_upload_that_was_killed_goes_on_where_it_was(hub, small, tmp_path):
    done, stuck = (digest(small / f"model-0000{number}-of-00002.safetensors") for number in (1, 2))
    hub.fail_next(f"PUT .*{stuck}", status=None, stall_after=5000)
    command = [sys.executable, "-m", "hf_momentum", "push", str(small), "me/model"]
    environment = hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert hub.stalled.wait(120)
        deadline = time.monotonic() + 60
        while not hub.uploads[done]:
            assert time.monotonic() < deadline
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    hub.release()
    assert hub.files("me/model") == {}  # in one commit, or not at all
    assert main(["push", str(small), "me/model"]) == 0
    assert (hub.uploads[done], hub.uploads[stuck]) == (1, 1)
    assert digest(small / "model-00002-of-00002.safetensors") in {
        hashlib.sha256(content).hexdigest() for content in hub.files("me/model").values()
    }


def test_a_hub_without_xet_storage_is_told_what_to_set():
    from hf_momentum.training.hub_client import reason

    error = ConnectionError("404 Not Found for /api/models/me/model/xet-write-token/main")
    assert "HF_HUB_DISABLE_XET=1" in reason(error) and "HF_HUB_DISABLE_XET" not in reason(ConnectionError("no route"))


def test_large_objects_go_in_parts(hub, small):
    hub.multipart_from = 40_000
    assert main(["push", str(small), "me/model"]) == 0
    assert sum("/part/" in request for request in hub.requests) == 6
    assert hub.files("me/model")["model-00001-of-00002.safetensors"] == next(small.glob("*1-of*")).read_bytes()


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("model*")], "holds no weights"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"\x10"), "is torn"),
        (lambda folder: (folder / "recipe.yaml").write_text(f"hub_token: {SECRET}\n"), "holds what looks like a token"),
        (lambda folder: (folder / "README.md").write_text("hub_token: of_another\n"), "README.md holds what looks"),
        (lambda folder: (folder / "README.md").write_text("---\na: [1\n---\n"), "README.md: the card's metadata"),
        (lambda folder: (folder / "recipe.yaml").write_text("a: [1\n"), "recipe.yaml is not YAML"),
        (lambda folder: (folder / "recipe.yaml").write_text("- a\n"), "recipe.yaml is not a recipe"),
    ],
)
def test_a_folder_that_cannot_be_pushed_is_refused(hub, small, capsys, break_it, expected):
    break_it(small)
    line = refused(["push", small, "me/model"], capsys)
    assert expected in line and SECRET not in line and hub.files("me/model") == {}


@pytest.mark.parametrize("command", ["compare", "pareto", "stream"])
def test_reports_that_repeat_their_command_take_no_token(command, capsys, tmp_path):
    words = {"compare": ["--optim", "tam,adamw_torch"], "pareto": [], "stream": []}[command]
    if command == "stream":
        words = ["--domains", "a=stdlib:code", "b=stdlib:prose", "--eval", "a=stdlib:code@test", "b=stdlib:prose@test"]
    common = ["--config", "bloop_domain" if command == "pareto" else "quickstart", "--output_dir", tmp_path / "out"]
    line = refused([command, *common, *words, f"--hub_token={SECRET}"], capsys)
    assert "set HF_TOKEN" in line and SECRET not in line


def test_an_interrupted_run_names_its_last_checkpoint(hub, run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-2").symlink_to(run / "checkpoint-2")
    assert "checkpoint-2, push that" in refused(["push", tmp_path / "run", "me/model"], capsys)


# A disk that fills up


@pytest.fixture(params=["size of a file", "size of a disk"])
def little_room(request, tmp_path):
    """A folder in which the fourth checkpoint file does not fit, and a function that makes room."""
    place = tmp_path / "little"
    place.mkdir()
    if request.param == "size of a file":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write that goes beyond fails, as on a full disk

        def limit(size: int | None) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits if size is None else (size, limits[1]))

        yield place, limit
        limit(None)
        signal.signal(signal.SIGXFSZ, old)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")

    def fill(size: int | None) -> None:
        filler = place / "filler"
        filler.unlink(missing_ok=True)
        if size is not None:
            free = os.statvfs(place)
            filler.write_bytes(b"\0" * (free.f_bavail * free.f_bsize - size))

    yield place, fill
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_while_saving_is_one_line_and_resuming_ends_as_if_nothing_had_been(
    little_room, tiny, run, capsys, monkeypatch
):
    place, room = little_room
    words = tiny.words(place / "out", save_strategy="steps", save_steps=2)
    from hf_momentum.training import trainer

    taken = trainer.write_manifest

    def fill_then(*args: object, **fields: object) -> object:
        manifest = taken(*args, **fields)
        room(60_000)  # after the first whole checkpoint
        return manifest

    monkeypatch.setattr(trainer, "write_manifest", fill_then)
    line = refused(["train", *words], capsys)
    room(None)
    monkeypatch.setattr(trainer, "write_manifest", taken)
    assert "no space was left on the disk" in line and "checkpoint-2 is complete" in line
    assert "--resume_from_checkpoint true" in line
    assert main(["train", *words, "--resume_from_checkpoint", "true"]) == 0
    ours, again = load_file(run / "model.safetensors"), load_file(place / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_full_disk_while_converting_leaves_nothing_and_the_same_command_succeeds(
    little_room, hub, run, capsys, monkeypatch
):
    place, room = little_room
    folder = place / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    room(20_000)
    line = refused(["push", folder, "me/model", "--dtype", "bfloat16"], capsys)
    room(None)
    assert "no space is left on the disk" in line and "hf-momentum push" in line
    assert [path.name for path in place.iterdir()] == ["model"]
    assert main(["push", str(folder), "me/model", "--dtype", "bfloat16"]) == 0


# hf-momentum train --push_to_hub


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_token_of_a_run_is_in_no_file_and_no_line(hub, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    words = tiny.words(
        tmp_path / "out", push_to_hub=True, hub_token=SECRET, hub_model_id="me/run", save_strategy="steps", save_steps=2
    )
    assert main(["train", *words]) == 0
    monkeypatch.delenv("HF_TOKEN")
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err and f"{hub.url}/me/run/commit/" in said.out
    local = everything_in(tmp_path / "out")
    pushed = {
        f"{number} {path}": hub.content(blob)
        for number, (_, files) in hub.repos["me/run"].commits.items()
        for path, blob in files.items()
    }
    assert any(name.endswith("training_args.bin") for name in local)
    assert not [name for name, content in (local | pushed).items() if SECRET.encode() in content]
    final = hub.files("me/run")
    assert {"model.safetensors", "report.json", "recipe.yaml", "training_args.json"} <= set(final)
    assert "training_args.bin" not in final  # transformers pushed it during training


def test_a_token_in_a_pickle_would_be_found(tmp_path):
    """The search above is not blind to what torch.save writes."""
    from transformers import TrainingArguments

    torch.save(TrainingArguments(output_dir="out", hub_token=SECRET, use_cpu=True), tmp_path / "training_args.bin")
    assert SECRET.encode() in (tmp_path / "training_args.bin").read_bytes()


def test_a_push_that_fails_after_training_loses_nothing(hub, tiny, tmp_path, capsys):
    hub.fail_next("/commit/", times=10**6, status=500)
    words = tiny.words(tmp_path / "out", push_to_hub=True, hub_model_id="me/run", hub_strategy="end")
    line = refused(["train", *words], capsys)
    assert f"hf-momentum push {tmp_path / 'out'} me/run" in line
    assert (tmp_path / "out" / "report.json").is_file() and (tmp_path / "out" / "model.safetensors").is_file()
    hub.heal()
    assert main(line.partition("say again: hf-momentum ")[2].split()) == 0
    assert hub.files("me/run")["report.json"]


def test_a_checkpoint_that_transformers_pushed_is_resumed(hub, run, tmp_path):
    """As `--hub_strategy checkpoint` leaves it; the pickle goes with the push at the end."""
    HfApi(endpoint=hub.url, token=SECRET).create_repo("me/run")
    pushed = run / "checkpoint-2"
    assert (pushed / "training_args.bin").is_file()
    HfApi(endpoint=hub.url, token=SECRET).upload_folder(
        repo_id="me/run", folder_path=pushed, path_in_repo="last-checkpoint"
    )
    assert main(["push", str(run), "me/run"]) == 0
    assert "last-checkpoint/training_args.bin" not in hub.files("me/run")
    got = snapshot_download("me/run", endpoint=hub.url, local_dir=tmp_path / "got")
    assert find_checkpoint(f"{got}/last-checkpoint", None) == f"{got}/last-checkpoint"


def test_no_right_to_write_is_noticed_before_training(hub, tiny, tmp_path, capsys):
    hub.add_repo("other/model")
    line = refused(["train", *tiny.words(tmp_path / "out", push_to_hub=True, hub_model_id="other/model")], capsys)
    assert "403" in line and "nothing was trained yet" in line and not (tmp_path / "out").exists()


def test_a_hub_that_does_not_know_the_question_is_pushed_to(hub, small):
    hub.fail_next("auth-check", status=404)
    hub.add_repo("me/model")
    assert main(["push", str(small), "me/model"]) == 0


def test_a_trainer_asks_for_its_repository_with_patience(hub, waits, monkeypatch):
    from transformers.utils import hub as transformers_hub

    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    hub.fail_next("repos/create", times=2, status=500)
    arguments = MomentumTrainingArguments(output_dir="out", use_cpu=True, push_to_hub=True, hub_model_id="me/model")
    MomentumTrainer(torch.nn.Linear(1, 1), arguments)
    assert "me/model" in hub.repos and waits == [1.0, 2.0]
    hub.fail_next("repos/create", times=10**6, status=500)
    with pytest.raises(InputError, match="me/model: the Hub has trouble of its own"):
        MomentumTrainer(torch.nn.Linear(1, 1), arguments)


def test_a_wrong_token_is_noticed_before_training(hub, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_not_known")
    line = refused(["train", *tiny.words(tmp_path / "out", push_to_hub=True, hub_model_id="me/run")], capsys)
    assert "401" in line and "nothing was trained yet" in line and not (tmp_path / "out").exists()


# The server itself


def test_the_server_takes_no_object_that_differs_from_its_number(hub):
    api = HfApi(endpoint=hub.url, token=SECRET)
    api.create_repo("me/model")
    addition = CommitOperationAdd("w.safetensors", b"\0" * 100)
    addition.upload_info.sha256 = hashlib.sha256(b"something else").digest()
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        api.create_commit("me/model", [addition], commit_message="wrong")
    assert hub.files("me/model") == {} and hub.uploaded_bytes == 0


def test_a_token_of_the_stored_login_is_found_in_a_text(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("of-another-server\n")
    assert secret_in("key: of-another-server") == "of-an..." and secret_in("key: of") is None


def test_gather_says_why_there_is_nothing():
    with pytest.raises(InputError, match="is not a folder"):
        gather(Path("no such folder"), Path("staging"))


def test_pickled_arguments_hold_no_token(tmp_path):
    """As a Trainer of one's own pickles them beside every checkpoint."""
    args = MomentumTrainingArguments(output_dir=str(tmp_path), hub_token=SECRET, use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).output_dir == str(tmp_path)
    assert args.hub_token == SECRET
