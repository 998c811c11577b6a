"""axolotl's own entry with our plugin. `make adapters` runs it, in an environment with axolotl's versions."""

import importlib.util

import pytest
import yaml

from hf_momentum import InputError
from tests.adapters.replay import check, trained_by
from tests.adapters.specimen import SETTINGS, loaded, texts, tiny_llama

if importlib.util.find_spec("axolotl") is None:
    pytest.skip("axolotl is not installed here: make adapters", allow_module_level=True)


def settings_file(tmp_path, **fields):
    settings = {key: value for key, value in SETTINGS.items() if key != "lr_scheduler_type"}
    common = {
        "base_model": str(tiny_llama(tmp_path / "model")), "model_type": "LlamaForCausalLM",
        "plugins": ["hf_momentum.integrations.axolotl.HFMomentumPlugin"], "lr_scheduler": "linear",
        "datasets": [{"path": str(texts(tmp_path / "texts.jsonl")), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(tmp_path / "prepared"), "val_set_size": 0, "sequence_len": 128,
        "micro_batch_size": 4, "max_steps": 4, "output_dir": str(tmp_path / "out"), "bf16": False, "fp16": False,
        "tf32": False, "attn_implementation": "eager", "sample_packing": False, "save_strategy": "no",
        "logging_steps": 1, "gradient_checkpointing": False, "special_tokens": {"pad_token": "<|end|>"},
    }  # fmt: skip
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(common | settings | fields))
    return file


def test_the_plugin_trains_with_our_optimizer_as_our_trainer_does(tmp_path):
    file = settings_file(tmp_path, optimizer="tam")
    run = trained_by(tmp_path, "axolotl.cli.train", file, AXOLOTL_DO_NOT_TRACK="1")
    assert run.optimizer == "TAM"
    assert [group["gamma"] for group in run.groups] == [0.95, 0.95]
    assert (run.steps, len(run.batches)) == (4, 8)
    check(run, loaded(tmp_path / "model"), tmp_path / "ours", optim="tam", **SETTINGS)


def test_the_plugin_refuses_a_name_that_is_not_ours():
    from hf_momentum.integrations.axolotl import HFMomentumPlugin

    with pytest.raises(InputError, match=r"optimizer is 'tamm', which is not hf-momentum's .did you mean 'tam'"):
        HFMomentumPlugin().register({"optimizer": "tamm"})
    HFMomentumPlugin().register({"optimizer": "vradam"})
