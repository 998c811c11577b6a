"""`--optim_args` is typed and strict, and the factory makes the groups that the Trainer makes."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_momentum import InputError, create_optimizer, optimizer_cls_and_kwargs
from hf_momentum.integrations import OPTIMIZERS, decay_groups
from hf_momentum.integrations.optim_args import parse_optim_args


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tam", None, {}),
        ("tam", "", {}),
        ("tam", " gamma = 0.95 , granularity=tensor ", {"gamma": 0.95, "granularity": "tensor"}),
        ("tam", "maximize=False", {"maximize": False}),
        ("tam", "decoupled_weight_decay=0,fixed_damping=0.5", {"decoupled_weight_decay": False, "fixed_damping": 0.5}),
        ("tam", "fixed_damping=none", {"fixed_damping": None}),
        ("adatamw", "betas=0.9:0.99,eps=1e-6,ema=TRUE", {"betas": (0.9, 0.99), "eps": 1e-6, "ema": True}),
    ],
)
def test_values_arrive_in_their_annotated_types(name, text, expected):
    parsed = parse_optim_args(OPTIMIZERS[name], text)
    assert parsed == expected
    assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tam", "gama=0.9", r"no argument 'gama' \(did you mean 'gamma'\?\)\. Accepted: momentum: float = 0.9; gamma"),
        ("tam", "betas=0.9:0.99", "no argument 'betas'"),
        ("tam", "gamma=big", "gamma=big is not a number. Accepted"),
        ("tam", "gamma=1.5", r"gamma must be a number in \[0, 1\), got 1.5"),
        ("tam", "gamma=nan", "gamma must be a number"),
        ("tam", "maximize=maybe", "maximize=maybe is not true or false"),
        ("tam", "granularity=layer", "granularity=layer is not one of global, tensor"),
        ("adatam", "betas=0.9", "betas=0.9 is not numbers parted by colons"),
        ("adatam", "betas=0.9:0.99:0.999", "betas"),
        ("tam", "gamma", "'gamma' is not key=value"),
        ("tam", "gamma=", "'gamma=' is not key=value"),
        ("tam", "gamma=0.9,,momentum=0.9", "empty item"),
        ("tam", "gamma=0.9,gamma=0.8", "gamma is given twice"),
        ("tam", "lr=0.1", "lr is set by --learning_rate"),
        ("adatamw", "weight_decay=0.1", "weight_decay is set by --weight_decay"),
    ],
)
def test_anything_else_stops_with_what_is_accepted(name, text, message):
    with pytest.raises(InputError, match=message):
        parse_optim_args(OPTIMIZERS[name], text)


def test_factory_rejects_by_name_value_and_range():
    params = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(InputError, match=r"unknown optimizer 'tamm' \(did you mean 'tam'"):
        create_optimizer("tamm", params, lr=0.1)
    with pytest.raises(InputError, match="tam has no argument 'beta'"):
        create_optimizer("tam", params, lr=0.1, beta=0.9)
    with pytest.raises(InputError, match="lr must be a number"):
        create_optimizer("tam", params, lr=-0.1)
    with pytest.raises(InputError, match=r"got 1\.0"):
        optimizer_cls_and_kwargs("tam", lr=0.1, gamma=1.0)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(InputError, match="Linear has no parameter that requires a gradient"):
        create_optimizer("tam", frozen, lr=0.1)


def test_factory_takes_parameters_and_groups_as_they_are():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    groups = create_optimizer("adatamw", [{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.01), (0.1, 0.01)]


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = [
    lambda: LlamaForCausalLM(LlamaConfig(vocab_size=50, **SMALL)),
    lambda: BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL)),
    lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)),
    lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **SMALL)),
]


@pytest.mark.parametrize("make", MODELS)
def test_factory_makes_the_groups_that_the_trainer_makes(make, tmp_path):
    model = make()
    next(model.parameters()).requires_grad_(False)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, weight_decay=0.1, optim="tam", report_to="none")
    theirs = Trainer(model, args).create_optimizer().param_groups
    ours = create_optimizer("tam", model, lr=args.learning_rate, weight_decay=0.1).param_groups
    assert [{id(p) for p in group["params"]} for group in ours] == [
        {id(p) for p in group["params"]} for group in theirs
    ]
    assert [group["weight_decay"] for group in ours] == [0.1, 0.0]


def test_an_empty_group_is_left_out():
    assert [len(group["params"]) for group in decay_groups(torch.nn.LayerNorm(3))] == [2]
