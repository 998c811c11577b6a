"""Models so small that a repair takes a second, each with a fault that a repair can find and mend, and their data."""

import copy
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import examples_of
from hf_momentum.training.predictions import Held
from hf_momentum.training.tokenizer import byte_tokenizer
from tests.conftest import write_rows

WORDS = ["[PAD]", "[UNK]", "good", "bad", *(f"w{number}" for number in range(60))]


def held(evaluated: Evaluated, rows: list[dict], task: str, name: str = "data", **fields) -> Held:
    split = SuiteSplit(name, "in distribution", source=name, task=task, **fields)
    table = datasets.Dataset.from_list(rows)
    return Held(split, table, examples_of(evaluated, table, split))


def _fitted(model, inputs, labels, steps: int, rate: float):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        given = {name: value[batch] for name, value in inputs.items()}
        optimizer.zero_grad()
        model(**given, labels=labels[batch]).loss.backward()
        optimizer.step()
    return model.eval()


# ---- texts -----------------------------------------------------------------------------------------------------------


def reviews(count: int, seed: int) -> list[dict]:
    """Texts of noise with one word that decides."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(count):
        label = int(generator.random() < 0.5)
        words = [f"w{number}" for number in generator.integers(60, size=7)]
        words[generator.integers(7)] = ["bad", "good"][label]
        found.append({"text": " ".join(words), "label": label})
    return found


def word_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16, padding_side="right"
    )


def classifier(faulty: bool = True) -> Evaluated:
    """Knows the two words; its fault is a bias of the head that calls some good ones bad."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    tokenizer, rows = word_tokenizer(), reviews(400, seed=99)
    labels = torch.tensor([row["label"] for row in rows])
    inputs = dict(tokenizer([row["text"] for row in rows], return_tensors="pt", return_token_type_ids=False))
    model = _fitted(BertForSequenceClassification(config), inputs, labels, 40, 3e-3)
    if faulty:
        with torch.no_grad():
            logits = model(**inputs).logits
            shift = (logits[:, 1] - logits[:, 0])[labels == 1].median() / 2
            model.classifier.bias += torch.stack([shift, -shift])
    return Evaluated("classifier", model, tokenizer)


# ---- pictures --------------------------------------------------------------------------------------------------------


def digits(count: int, start: int = 0) -> datasets.Dataset:
    """Pictures of 0, 1 and 2."""
    every = load_digits(n_class=3)
    chosen = slice(start, start + count)
    pictures = [np.kron(image / 16 * 255, np.ones((2, 2))).astype(np.uint8) for image in every.images[chosen]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1", "2"])})
    rows = {"image": [Image.fromarray(one) for one in pictures], "label": every.target[chosen].tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def seeing(faulty: bool = True) -> Evaluated:
    """A ResNet with BatchNorm, with the same fault."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    rows = digits(200)
    inputs = dict(processor(images=[one.convert("RGB") for one in rows["image"]], return_tensors="pt"))
    model = _fitted(ResNetForImageClassification(config), inputs, torch.tensor(rows["label"]), 30, 1e-2)
    if faulty:
        with torch.no_grad():
            logits = model(**inputs).logits
            model.classifier[1].bias[0] += (logits.max(1).values - logits[:, 0]).median()
    return Evaluated("seeing", model, processor)


# ---- language --------------------------------------------------------------------------------------------------------


def language() -> Evaluated:
    """Untrained."""
    torch.manual_seed(3)
    tokenizer = byte_tokenizer(64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Evaluated("language", LlamaForCausalLM(config).eval(), tokenizer)


def letters(count: int, seed: int) -> list[dict]:
    """Numbered texts in which mostly the next letter of the alphabet follows."""
    generator, found = np.random.default_rng(seed), []
    for number in range(count):
        places = np.cumsum(np.where(generator.random(20) < 0.8, 1, generator.integers(26, size=20))) % 26
        found.append({"text": f"{seed}{number:02} " + "".join(chr(97 + place) for place in places)})
    return found


def copied(model):
    return copy.deepcopy(model)


def saved(evaluated: Evaluated, folder: Path) -> str:
    evaluated.model.save_pretrained(folder)
    evaluated.processor.save_pretrained(folder)
    return str(folder)


def written(folder: Path, **rows: list[dict]) -> dict[str, str]:
    """A file for each split."""
    return {name: write_rows(folder / f"{name}.jsonl", content) for name, content in rows.items()}


def record(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())
