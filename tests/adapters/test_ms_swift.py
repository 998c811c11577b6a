"""ms-swift's own entry with our optimizer. `make adapters` runs it, in an environment with ms-swift's versions."""

import importlib.util

import pytest

from tests.adapters.replay import check, trained_by
from tests.adapters.specimen import SETTINGS, chats, loaded, tiny_llama

if importlib.util.find_spec("swift") is None:
    pytest.skip("ms-swift is not installed here: make adapters", allow_module_level=True)


def words(tmp_path, **fields) -> list[str]:
    plugin = tmp_path / "momentum.py"
    plugin.write_text("import hf_momentum.integrations.ms_swift\n")
    common = {
        "external_plugins": plugin, "model": tiny_llama(tmp_path / "model"), "model_type": "llama",
        "template": "dummy", "dataset": chats(tmp_path / "chats.jsonl"), "tuner_type": "full", "max_length": 128,
        "torch_dtype": "float32", "bf16": "false", "attn_impl": "eager", "gradient_checkpointing": "false",
        "max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no",
        "dataset_num_proc": 1, "dataloader_num_workers": 0, "use_hf": "true", "check_model": "false",
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    return [str(word) for key, value in (common | SETTINGS | fields).items() for word in (f"--{key}", value)]


def test_the_plugin_trains_with_our_optimizer_as_our_trainer_does(tmp_path):
    run = trained_by(tmp_path, "swift.cli.sft", *words(tmp_path, optimizer="tam"))
    assert run.optimizer == "TAM"
    assert [group["gamma"] for group in run.groups] == [0.95, 0.95]
    assert (run.steps, len(run.batches)) == (4, 8)
    check(run, loaded(tmp_path / "model"), tmp_path / "ours", optim="tam", **SETTINGS)
