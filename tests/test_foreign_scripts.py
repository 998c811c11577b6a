"""Somebody else's script runs unchanged with our names, also under `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import PROSE, write_rows
from tests.test_distributed import launch

COMMAND = Path(sys.executable).with_name("hf-momentum")


def tiny_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_momentum.training.tokenizer import byte_tokenizer

    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)
    return folder


def test_trl_sft_script_trains_with_adatamw(tmp_path):
    """TRL's own `sft.py`, from the installed package, on a tiny local model and dataset."""
    pytest.importorskip("trl", reason="TRL is not installed")
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", [{"text": text} for text in PROSE * 4])
    out = tmp_path / "out"
    words = [
        "run", "trl.scripts.sft", "--model_name_or_path", tiny_llama(tmp_path / "model"), "--dataset_name", data,
        "--optim", "adatamw", "--optim_args", "gamma=0.95,betas=0.9:0.99", "--learning_rate", "1e-3", "--use_cpu",
        "--max_steps", "3", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--report_to", "none",
        "--bf16", "False", "--gradient_checkpointing", "False", "--output_dir", out,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    state = torch.load(out / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert {group["algorithm"] for group in state["param_groups"]} == {"AdaTAMW"}
    assert {group["gamma"] for group in state["param_groups"]} == {0.95}
    assert {tuple(group["betas"]) for group in state["param_groups"]} == {(0.9, 0.99)}
    history = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]


SCRIPT = '''
"""A script that has never heard of hf-momentum."""
import sys
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))
    def forward(self, x, labels):
        return {"loss": ((x * self.w).sum(-1) - labels).pow(2).mean()}

if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    data = [{"x": torch.randn(3), "labels": torch.tensor(0.0)} for _ in range(8)]
    trainer = Trainer(Model(), args, train_dataset=data)
    trainer.train()
    print("RAN", sys.argv[0], type(trainer.optimizer.optimizer).__name__, args.world_size, flush=True)
'''


def script_words(tmp_path) -> list[str]:
    script = tmp_path / "their_script.py"
    script.write_text(SCRIPT)
    fields = "--optim tam --use_cpu --max_steps 2 --report_to none --save_strategy no --disable_tqdm true"
    return [str(script), "--output_dir", str(tmp_path / "out"), *fields.split()]


def test_a_script_by_its_path(tmp_path):
    words = script_words(tmp_path)
    result = subprocess.run([COMMAND, "run", *words], capture_output=True, text=True, timeout=120)
    assert f"RAN {words[0]} TAM 1" in result.stdout, result.stderr[-2000:]
    plain = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert plain.returncode != 0 and "invalid choice: 'tam'" in plain.stderr, "without us the name is unknown"


def test_a_script_under_accelerate_launch(tmp_path):
    result = launch("-m", "hf_momentum.run", *script_words(tmp_path), timeout=120)
    assert result.stdout.count("TAM 2") == 2, result.stderr[-2000:]


def test_what_the_script_raises_is_its_own(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import sys\nsys.exit(7)\n")
    assert subprocess.run([COMMAND, "run", script], timeout=60).returncode == 7
