"""`hf-momentum doctor`: bounds come from the metadata, refusals from those who refuse, and no token is shown."""

import importlib.metadata
import json

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from hf_momentum.cli import main
from hf_momentum.commands import checkup
from hf_momentum.launch import find_accelerate_config

FLAGS = dict.fromkeys(("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"))


def test_a_sound_installation_is_well(capsys):
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] and {finding["topic"] for finding in answer["findings"]} == {
        "versions",
        "devices",
        "caches",
        "hub",
    }
    assert main(["doctor"]) == 0
    assert "All well" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("installed", "state", "step"),
    [("5.20.0", "ok", ""), ("4.50.0", "refused", "pip install 'transformers>=5.17'"), (None, "refused", "pip install")],
)
def test_versions_are_held_against_the_installed_metadata(installed, state, step, monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "transformers":
            return real(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["transformers>=5.17", 'trl>=99; extra == "trl"'])
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.name: finding for finding in checkup.versions()}
    assert found["transformers"].state == state and step in found["transformers"].next
    assert found["trl"].state == "note", "an extra that does not fit refuses nothing"


def launched(tmp_path, name: str, **changes) -> list[checkup.Finding]:
    content = yaml.safe_load(find_accelerate_config(name).read_text())
    for key, value in changes.items():
        part = (
            content
            if key in content
            else content.setdefault("fsdp_config" if "fsdp" in key else "deepspeed_config", {})
        )
        part[key] = value
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.dump(content))
    return [finding for finding in checkup.launch(str(path), FLAGS, "tam") if finding.state == "refused"]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("fsdp2", {"fsdp_version": 1}, "Set fsdp_version: 2"),
        ("zero2_offload", {"offload_optimizer_device": "nvme"}, "offload_optimizer.device is 'nvme'"),
        ("zero3_offload", {"offload_param_device": "nvme"}, "offload_param.device is 'nvme'"),
    ],
)
def test_what_training_would_refuse_is_said_before(name, changes, reason, tmp_path):
    before = [finding.what for finding in launched(tmp_path, name)]
    added = [finding.what for finding in launched(tmp_path, name, **changes) if finding.what not in before]
    assert len(added) == 1 and reason in added[0]


def test_tensor_parallelism_is_refused(tmp_path):
    content = yaml.safe_load(find_accelerate_config("fsdp2").read_text())
    content["parallelism_config"] = {"parallelism_config_tp_size": 2, "parallelism_config_dp_shard_size": 2}
    path = tmp_path / "tp.yaml"
    path.write_text(yaml.dump(content))
    found = [finding.what for finding in checkup.launch(str(path), FLAGS, "tam") if finding.state == "refused"]
    assert any("mesh dimension tp (tensor, expert or pipeline parallelism)" in what for what in found)


def test_ddp_and_foreign_optimizers_are_not_refused():
    assert not [finding for finding in checkup.launch("ddp", FLAGS, "tam") if finding.state == "refused"]
    assert "not one of ours" in list(checkup.launch("ddp", FLAGS, "adamw_torch"))[-1].what


def test_a_recipe_is_looked_at_with_its_data(tmp_path, capsys):
    words = ["doctor", "--config", "quickstart", "--json"]
    assert main(words) == 0
    names = {finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "stdlib:prose@test" in names
    assert main([*words, "--train_dataset", str(tmp_path / "gone.csv")]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"] and answer["exit"] == 1
    (refused,) = [finding for finding in answer["findings"] if finding["state"] == "refused"]
    assert "does not exist" in refused["what"]
    assert main([*words, "--optim", "adatmw"]) == 1
    assert "did you mean 'adatamw'" in capsys.readouterr().out


class _Answers:
    def head(self, url: str, timeout: float) -> None:
        assert timeout <= 5


def test_the_token_is_never_shown(monkeypatch, capsys):
    token = "hf_a_token_that_must_not_be_seen"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", _Answers)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "ada"})
    assert main(["doctor"]) == 0
    shown = capsys.readouterr()
    assert "as ada" in shown.out and token not in shown.out + shown.err

    def denied(self):
        raise ValueError(f"401 for {token}")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", denied)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr()
    assert "token is not accepted (ValueError) -> hf auth login" in shown.out and token not in shown.out + shown.err


def test_a_hub_that_does_not_answer_is_a_note(monkeypatch):
    def silent():
        raise TimeoutError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", silent)
    (finding,) = checkup.hub()
    assert finding.state == "note" and "does not answer (TimeoutError)" in finding.what and finding.next
