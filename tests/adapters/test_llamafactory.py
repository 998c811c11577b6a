"""LLaMA-Factory's own entry with our optimizer. `make adapters` runs it, in an environment with its versions."""

import importlib.util
import json

import pytest
import yaml

from tests.adapters.replay import check, trained_by
from tests.adapters.specimen import SETTINGS, loaded, texts, tiny_llama

if importlib.util.find_spec("llamafactory") is None:
    pytest.skip("LLaMA-Factory is not installed here: make adapters", allow_module_level=True)


def settings_file(tmp_path, **fields):
    rows = texts(tmp_path / "texts.jsonl")
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"texts": {"file_name": rows.name, "columns": {"prompt": "text"}}})
    )
    common = {
        "model_name_or_path": str(tiny_llama(tmp_path / "model")), "stage": "pt", "do_train": True,
        "finetuning_type": "full", "dataset": "texts", "dataset_dir": str(tmp_path), "cutoff_len": 64,
        "per_device_train_batch_size": 4, "max_steps": 4, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "output_dir": str(tmp_path / "out"), "disable_gradient_checkpointing": True,
    }  # fmt: skip
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(common | SETTINGS | fields))
    return str(file)


def test_its_own_entry_trains_with_our_optimizer_as_our_trainer_does(tmp_path):
    file = settings_file(tmp_path, optim="tam")
    # It asks for an older transformers than ours does; with this variable it runs with a newer one.
    run = trained_by(tmp_path, "hf_momentum.run", "llamafactory.launcher", file, DISABLE_VERSION_CHECK="1")
    assert run.optimizer == "TAM"
    assert [group["gamma"] for group in run.groups] == [0.95, 0.95]
    assert (run.steps, len(run.batches)) == (4, 8)
    check(run, loaded(tmp_path / "model"), tmp_path / "ours", optim="tam", **SETTINGS)
