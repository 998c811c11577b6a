"""Every parameter of a model is in exactly one layer group, and the groups are those that the model is built of."""

import re
from dataclasses import dataclass

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_momentum import InputError
from hf_momentum.diagnosis.groups import chosen_groups, layer_groups, plain_name

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
PICTURES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BLOCKS = ["block.0", "block.1"]


@dataclass(frozen=True)
class Architecture:
    """A model by its class, without weights, and the groups it should have."""

    name: str
    config: dict
    blocks: list[str]
    parts: list[str]

    def model(self) -> nn.Module:
        kind = getattr(transformers, self.name)
        with torch.device("meta"):
            return kind(kind.config_class(**self.config))


def each_block(*parts, blocks=BLOCKS):
    return [f"{block}.{part}" for block in blocks for part in parts]


def decoder(name, ends, **more):
    """Models that are built as Llama is."""
    parts = each_block("attention", "mlp", "norm")
    return Architecture(name, SMALL | more, ["embeddings", *BLOCKS, *ends], ["embeddings", *parts, *ends])


ARCHITECTURES = [
    Architecture(
        "BertForSequenceClassification",
        SMALL,
        ["embeddings", *BLOCKS, "pooler", "head"],
        ["embeddings", *each_block("attention", "mlp"), "pooler", "head"],
    ),
    Architecture(
        "BertForMaskedLM",  # its head's weight is the embeddings'
        SMALL,
        ["embeddings", *BLOCKS, "head"],
        ["embeddings", *each_block("attention", "mlp"), "head"],
    ),
    Architecture(
        "RobertaForSequenceClassification",
        SMALL,
        ["embeddings", *BLOCKS, "head"],
        ["embeddings", *each_block("attention", "mlp"), "head"],
    ),
    Architecture(
        "ModernBertForSequenceClassification",
        SMALL | {"cls_token_id": 1, "sep_token_id": 1},
        ["embeddings", *BLOCKS, "norm", "head"],
        # The first block has no norm before its attention.
        [
            "embeddings",
            *["block.0.attention", "block.0.norm", "block.0.mlp"],
            *["block.1.norm", "block.1.attention", "block.1.mlp"],
            *["norm", "head"],
        ],
    ),
    Architecture(
        "DistilBertForSequenceClassification",
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        ["embeddings", *BLOCKS, "head"],
        ["embeddings", *each_block("attention", "norm", "mlp"), "head"],
    ),
    Architecture(
        "GPT2LMHeadModel",
        {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1},
        ["embeddings", *BLOCKS, "norm"],
        ["embeddings", *each_block("norm", "attention", "mlp"), "norm"],
    ),
    decoder("LlamaForCausalLM", ["norm", "head"], tie_word_embeddings=False),
    decoder("LlamaForCausalLM", ["norm"], tie_word_embeddings=True),
    decoder("LlamaForSequenceClassification", ["norm", "head"]),
    decoder("Qwen3ForCausalLM", ["norm", "head"], tie_word_embeddings=False, **HEADS),
    decoder("GemmaForCausalLM", ["norm"], **HEADS),
    decoder("MixtralForCausalLM", ["norm", "head"], num_local_experts=3, num_key_value_heads=1),
    Architecture(
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        ["embeddings", "encoder.block.0", "encoder.block.1", "norm", "decoder.block.0", "decoder.block.1"],
        [
            "embeddings",
            *each_block("0", "1", blocks=["encoder.block.0", "encoder.block.1"]),
            "norm",
            *each_block("0", "1", "2", blocks=["decoder.block.0", "decoder.block.1"]),
        ],
    ),
    Architecture(
        "ViTForImageClassification",
        PICTURES | {"image_size": 16, "patch_size": 4},
        ["embeddings", *BLOCKS, "norm", "head"],
        ["embeddings", *each_block("attention", "norm", "mlp"), "norm", "head"],
    ),
    Architecture(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        ["embeddings", *BLOCKS, "head"],
        ["embeddings", "block.0.0", "block.1.0", "block.1.1", "head"],
    ),
    Architecture(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
        ["embeddings", *BLOCKS, "norm", "head"],
        ["embeddings", "block.0.0", "block.1.downsampling_layer", "block.1.0", "block.1.1", "norm", "head"],
    ),
    Architecture(
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2},
        ["embeddings", *BLOCKS, "norm", "head"],
        ["embeddings", "block.0.0", "block.0.downsample", "block.1.0", "block.1.1", "norm", "head"],
    ),
]
TIED = {"BertForMaskedLM": "cls.predictions.decoder.weight", "GPT2LMHeadModel": "lm_head.weight"}
IDS = [
    architecture.name + ("-tied" if architecture.config.get("tie_word_embeddings") else "")
    for architecture in ARCHITECTURES
]


def check(model: nn.Module, groups) -> None:
    """Every parameter in exactly one group, in the order of the model, and counted."""
    named = dict(model.named_parameters())
    placed = [name for group in groups for name in (*group.weights, *group.adapters)]
    assert len(placed) == len(set(placed)), "a parameter is in two groups"
    assert set(placed) == {name for name in named if ".original_module." not in name}
    for group in groups:
        assert group.numel == sum(named[name].numel() for name in group.weights)
        for names in (group.weights, group.adapters):
            assert list(names) == [name for name in named if name in names]
    first = [min(list(named).index(name) for name in (*group.weights, *group.adapters)) for group in groups]
    assert first == sorted(first), "groups stand in the order of the model"
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
@pytest.mark.parametrize("split", ["blocks", "parts"])
def test_groups_of_an_architecture(architecture, split):
    model = architecture.model()
    groups = layer_groups(model, split)
    check(model, groups)
    assert [group.name for group in groups] == getattr(architecture, split)
    for group in groups:
        word = group.name.split(".")
        kind = "block" if "block" in word else {"pooler": "other"}.get(word[0], word[0])
        assert group.kind == kind
    assert sum(group.numel for group in groups) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
def test_parts_are_parts_of_blocks(architecture):
    model = architecture.model()
    owner = {name: group.name for group in layer_groups(model) for name in group.weights}
    for part in layer_groups(model, "parts"):
        (block,) = {owner[name] for name in part.weights}
        assert part.name == block or part.name.startswith(f"{block}.")


def test_parts_hold_what_they_are_called_after():
    model = decoder("LlamaForCausalLM", []).model()
    parts = {group.name: group for group in layer_groups(model, "parts")}
    assert {name.split(".")[3] for name in parts["block.1.attention"].weights} == {"self_attn"}
    assert {name.split(".")[3] for name in parts["block.1.mlp"].weights} == {"mlp"}
    assert all("norm" in name and name.startswith("model.layers.1") for name in parts["block.1.norm"].weights)
    (t5,) = (one for one in ARCHITECTURES if one.name.startswith("T5"))
    parts = {group.name: group for group in layer_groups(t5.model(), "parts")}
    assert all("EncDecAttention" in name or "norm" in name for name in parts["decoder.block.0.1"].weights)


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.name in TIED], ids=lambda one: one.name)
def test_a_tied_weight_is_listed_once_where_it_stands_first(architecture):
    model = architecture.model()
    assert model.get_input_embeddings().weight is model.get_parameter(TIED[architecture.name])
    groups = {group.name: group for group in layer_groups(model)}
    embeddings = [name for name in groups["embeddings"].weights if model.get_parameter(name).numel() == 50 * 16]
    assert len(embeddings) == 1
    assert all(TIED[architecture.name] not in group.weights for group in groups.values())


class Plain(nn.Module):
    """Without a list of layers, with a parameter of its own and one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.words = nn.Embedding(7, 4)
        self.first, self.second = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 4))
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight


def test_a_model_without_lists_of_layers_has_a_group_for_each_module():
    model = Plain()
    groups = layer_groups(model)
    check(model, groups)
    assert [(group.name, group.kind, group.numel) for group in groups] == [
        ("weights", "other", 3),
        ("embeddings", "embeddings", 28),
        ("first", "other", 25),
        ("second.0", "other", 24),
    ]


def test_layers_in_a_row_are_blocks_and_have_no_parts():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    for split in ("blocks", "parts"):
        groups = layer_groups(model, split)
        check(model, groups)
        assert [(group.name, group.numel) for group in groups] == [("block.0", 9), ("block.1", 6), ("block.3", 4)]


def test_an_mlp_of_layers_in_a_row_is_one_part():
    block = nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))})
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "layers": nn.ModuleList([block])})
    groups = layer_groups(model, "parts")
    check(model, groups)
    assert [group.name for group in groups] == ["embeddings", "block.0.attention", "block.0.mlp"]


def test_a_model_without_parameters_has_no_group():
    assert layer_groups(nn.ReLU()) == []


# ---- patterns --------------------------------------------------------------------------------------------------------


def test_patterns_take_parameters_out_of_their_groups_and_the_first_wins():
    model = decoder("LlamaForCausalLM", []).model()
    patterns = {"queries": "*.q_proj.weight", "early": "*.layers.[0]*", "norms": "*norm*"}
    groups = layer_groups(model, patterns=patterns)
    check(model, groups)
    by_name = {group.name: group for group in groups}
    assert [group.name for group in groups] == ["embeddings", "queries", "early", "block.1", "norms", "head"]
    assert len(by_name["queries"].weights) == 2, "of both blocks"
    assert len(by_name["early"].weights) == 8 and by_name["early"].kind == "pattern"
    # Those of the first block went with it, and of the norm nothing is left.
    assert [name.removeprefix("model.") for name in by_name["norms"].weights] == [
        "layers.1.input_layernorm.weight",
        "layers.1.post_attention_layernorm.weight",
        "norm.weight",
    ]


NAMES = [name for name, _ in decoder("LlamaForCausalLM", []).model().named_parameters()]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 12), min_size=4, max_size=4),
    st.sampled_from(["blocks", "parts"]),
)
def test_with_any_patterns_every_parameter_is_in_one_group(names, lengths, split):
    """Patterns made from names by cutting off their beginnings."""
    model = decoder("LlamaForCausalLM", []).model()
    patterns = {f"own {i}": f"*{name[-length:]}" for i, (name, length) in enumerate(zip(names, lengths, strict=False))}
    try:
        groups = layer_groups(model, split, patterns)
    except InputError as error:
        refused = re.match(r"group pattern (own \d)=", str(error))[1]
        endings = [pattern[1:] for own, pattern in patterns.items() if own <= refused]
        matching = [name for name in NAMES if name.endswith(endings[-1])]
        assert all(name.endswith(tuple(endings[:-1])) for name in matching), "refused, though something was left for it"
        return
    check(model, groups)
    for own, pattern in patterns.items():
        (group,) = [group for group in groups if group.name == own]
        assert all(name.endswith(pattern[1:]) for name in group.weights)


@pytest.mark.parametrize(
    ("patterns", "split", "message"),
    [
        (
            {"early": "layer.0.*"},
            "blocks",
            "group pattern early=layer.0.* matches no parameter. Names are like "
            "model.embed_tokens.weight; the groups are embeddings, block.0, block.1, norm, head",
        ),
        ({"all": "*", "more": "*.mlp.*"}, "blocks", "group pattern more=*.mlp.* matches no parameter that is left. "),
        ({"block.1": "*.layers.0.*"}, "blocks", "a pattern is named 'block.1', as a group is; name it otherwise"),
        ({"block.0": "*.q_proj.weight"}, "blocks", "a pattern is named 'block.0', as a group is; name it otherwise"),
        ({}, "halves", "split 'halves' is not accepted; blocks or parts"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(patterns, split, message):
    model = decoder("LlamaForCausalLM", [], tie_word_embeddings=False).model()
    with pytest.raises(InputError, match=re.escape(message)):
        layer_groups(model, split, patterns)


def test_a_pattern_may_have_the_name_of_a_group_of_which_it_leaves_nothing():
    model = decoder("LlamaForCausalLM", [], tie_word_embeddings=False).model()
    groups = layer_groups(model, patterns={"block.0": "model.layers.0.*"})
    check(model, groups)
    assert [group.name for group in groups] == ["embeddings", "block.0", "block.1", "norm", "head"]


def test_groups_are_chosen_by_name_and_pattern_in_the_order_of_the_model():
    groups = layer_groups(decoder("LlamaForCausalLM", [], tie_word_embeddings=False).model(), "parts")
    chosen = chosen_groups(groups, ["head", "*.norm", "block.0.mlp", "head"])
    assert [group.name for group in chosen] == ["block.0.mlp", "block.0.norm", "block.1.norm", "head"]
    with pytest.raises(InputError, match=r"no group matches 'heat' \(did you mean 'head'"):
        chosen_groups(groups, ["block.0.mlp", "heat"])


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def adapted(base=None, **fields):
    model = base or LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    return get_peft_model(model, LoraConfig(r=2, **fields))


@pytest.mark.parametrize("split", ["blocks", "parts"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"], ["down_proj"]])
def test_an_adapted_model_has_the_groups_of_the_model_with_adapters_beside_them(split, targets):
    plain = {group.name: group for group in layer_groups(LlamaForCausalLM(LlamaConfig(**SMALL)), split)}
    model = adapted(target_modules=targets)
    groups = layer_groups(model, split)
    check(model, groups)
    assert [(group.name, group.kind, group.numel) for group in groups] == [
        (group.name, group.kind, group.numel) for group in plain.values()
    ]
    for group in groups:
        assert [plain_name(name) for name in group.weights] == list(plain[group.name].weights)
        held = {name for name in group.weights if ".base_layer." in name}
        assert {plain_name(name) for name in held} == {f"{plain_name(name)}.weight" for name in group.adapters}
        assert len(group.adapters) == 2 * len(held)
    assert any(group.adapters for group in groups)


def test_modules_that_are_saved_whole_are_the_weights_of_their_group():
    base = BertForSequenceClassification(BertConfig(**SMALL))
    model = adapted(base, task_type="SEQ_CLS", target_modules="all-linear")
    groups = layer_groups(model)
    check(model, groups)
    head = groups[-1]
    assert head.name == "head" and head.numel == 2 * 16 + 2 and head.adapters == ()
    assert all(".modules_to_save.default." in name for name in head.weights)
    model = adapted(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    groups = layer_groups(model)
    check(model, groups)
    assert [(group.name, group.numel) for group in groups if not group.adapters] == [
        ("embeddings", 800),
        ("norm", 16),
        ("head", 800),
    ]


def test_adapters_go_where_a_pattern_puts_their_weight():
    model = adapted(target_modules=["q_proj", "v_proj"])
    groups = {group.name: group for group in layer_groups(model, patterns={"queries": "*.q_proj.weight"})}
    check(model, list(groups.values()))
    assert len(groups["queries"].weights) == 2 and len(groups["queries"].adapters) == 4
    assert all("q_proj" in name for name in groups["queries"].adapters)
    assert all("v_proj" in name for name in groups["block.0"].adapters)


def test_parts_of_an_mlp_in_a_row_do_not_depend_on_adapters():
    block = nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))})
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "layers": nn.ModuleList([block])})
    model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*mlp\.[02]"))
    groups = layer_groups(model, "parts")
    check(model, groups)
    assert [group.name for group in groups] == ["embeddings", "block.0.attention", "block.0.mlp"]
    assert len(groups[-1].adapters) == 4
