"""Sentence Transformers' Trainer with our optimizers: the class that ran, and its weights against our own Trainer's."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip(
    "sentence_transformers", reason="Sentence Transformers is not installed: pip install 'hf-momentum[adapters]'"
)

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses

import hf_momentum
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.training.tokenizer import byte_tokenizer
from tests.adapters.replay import Run, check
from tests.adapters.specimen import SETTINGS

RIVERS = [f"The {size} river runs {way}." for size in ("long", "wide", "old") for way in ("down", "past", "on")] * 4
PAIRS = Dataset.from_dict({"anchor": RIVERS, "positive": RIVERS[1:] + RIVERS[:1]})
LABELLED = Dataset.from_dict({"one": RIVERS, "other": RIVERS[2:] + RIVERS[:2], "label": [n % 3 for n in range(36)]})


def encoder(folder) -> SentenceTransformer:
    """Without dropout, whose draws would have to be repeated."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer = byte_tokenizer(128)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    words = Transformer(str(folder))
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")


class WithLosses(nn.Module):
    """What Sentence Transformers optimizes, as our Trainer takes a model: losses, the encoder inside, by name."""

    def __init__(self, by_name: dict[str, nn.Module]) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict(by_name)

    def forward(self, features, target, which):
        return {"loss": self.by_name[which](features, target)}


def trained(tmp_path, data, by_name: dict[str, nn.Module], **settings) -> tuple[Run, WithLosses, object]:
    """Train, and note with which features each loss was called."""
    seen: list[dict] = []

    def note(which):
        return lambda module, positional: seen.append(
            copy.deepcopy({"features": list(positional[0]), "target": positional[1], "which": which})
        )

    network = WithLosses(by_name)
    before, untouched = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    hooks = [loss.register_forward_pre_hook(note(which)) for which, loss in by_name.items()]
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=4,
        per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    model = next(iter(by_name.values())).model
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=data, loss=by_name if len(by_name) > 1 else next(iter(by_name.values()))
    )
    trainer.train()
    for hook in hooks:
        hook.remove()
    optimizer = base_optimizer(trainer.optimizer)
    return Run(type(optimizer).__name__, [], seen, 4, before, network.state_dict()), untouched, optimizer


def test_one_loss_trains_as_in_our_trainer(tmp_path):
    model = encoder(tmp_path / "model")
    loss = losses.MultipleNegativesRankingLoss(model)
    run, network, _ = trained(tmp_path, PAIRS, {"pairs": loss}, optim="tam", **SETTINGS)
    assert run.optimizer == "TAM" and len(run.batches) == 8
    check(run, network, tmp_path, optim="tam", **SETTINGS)


def test_several_losses_with_weights_of_their_own_train_as_in_our_trainer(tmp_path):
    """A step may leave one of them without gradients. Its Trainer clips the encoder alone, the optimizer all it has."""
    settings = SETTINGS | {"max_grad_norm": 0.0, "optim_args": "gamma=0.95,max_grad_norm=0.5"}
    model = encoder(tmp_path / "model")
    several = {
        "pairs": losses.MultipleNegativesRankingLoss(model),
        "labelled": losses.SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3),
    }
    data = {"pairs": PAIRS, "labelled": LABELLED}
    run, network, optimizer = trained(tmp_path, data, several, optim="tam", **settings)
    assert run.optimizer == "TAM" and {batch["which"] for batch in run.batches} == set(several)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert {id(param) for param in several["labelled"].classifier.parameters()} <= held
    otherwise = ({"weight_decay": 0.0}, {"optim_args": "gamma=0.95"}, {"lr_scheduler_type": "constant"})
    check(run, network, tmp_path, otherwise, optim="tam", **settings)


def test_learning_rates_of_single_modules_make_groups_of_ours(tmp_path):
    model = encoder(tmp_path / "model")
    loss = losses.SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3)
    rates = {"optim": "adatamw", "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    run, _, optimizer = trained(
        tmp_path, LABELLED, {"labelled": loss}, **rates, learning_rate_mapping={"classifier": 1e-2}
    )
    assert type(optimizer) is hf_momentum.AdaTAMW
    rate_of = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert {rate_of[id(param)] for param in loss.classifier.parameters()} == {1e-2}
    assert {rate_of[id(param)] for param in model.parameters()} == {1e-3}
    classifier = "by_name.labelled.classifier.weight"
    assert not torch.equal(run.before[classifier], run.after[classifier])
