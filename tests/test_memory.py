"""What a run is said to need is what is there: parameters and state exactly, activations within a quarter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_momentum import InputError, create_optimizer
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training.memory import Size, estimate, saved_bytes, state_bytes

WIDTH = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 64}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # with dropout the CPU has no fused attention


def llama(layers):
    return LlamaForCausalLM(
        LlamaConfig(**WIDTH, num_key_value_heads=2, intermediate_size=768, num_hidden_layers=layers)
    )


def qwen3(layers):
    config = Qwen3Config(**WIDTH, num_key_value_heads=2, intermediate_size=768, num_hidden_layers=layers, head_dim=64)
    return Qwen3ForCausalLM(config)


def modernbert(layers):
    config = ModernBertConfig(**WIDTH, **ENDS, intermediate_size=384, num_hidden_layers=layers)
    return ModernBertForSequenceClassification(config)


def bert(layers):
    return BertForSequenceClassification(BertConfig(**WIDTH, **CALM, intermediate_size=1024, num_hidden_layers=layers))


def vit(layers):
    widths = {name: value for name, value in WIDTH.items() if name != "vocab_size"}
    config = ViTConfig(**widths, **CALM, intermediate_size=1024, num_hidden_layers=layers, image_size=32, patch_size=2)
    return ViTForImageClassification(config)


def blocks_keep(model, dtype) -> tuple[int, int]:
    """Bytes that the graph of a forward pass keeps, without the copies of weights that autocast makes; and tokens."""
    tokens, two = 256, torch.zeros(2, dtype=torch.long)
    if model.config.model_type == "vit":
        tokens, batch = 257, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": two}
    else:
        words = torch.randint(3, 64, (2, tokens))
        batch = {"input_ids": words, "labels": words if Size.of(model).vocabulary else two}
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(model, lambda: model(**batch))
    copies = 2 * Size.of(model).linear if dtype is torch.float32 else 0
    return kept - copies, 2 * tokens


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("make", [llama, qwen3, modernbert, bert, vit])
def test_blocks_keep_what_is_estimated(make, lora):
    """Of two and of four blocks: the difference is two blocks, whatever stands around them."""
    kept, said = [], []
    for layers in (2, 4):
        model, dtype = make(layers), torch.float32
        if lora:
            dtype = torch.bfloat16
            model = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules="all-linear"))
        bytes_, tokens = blocks_keep(model.train(), dtype)
        kept.append(bytes_)
        memory = estimate(Size.of(model), tokens=tokens, state=0, dtype=str(dtype).removeprefix("torch."))
        said.append(memory.activations)
    assert said[1] - said[0] == pytest.approx(kept[1] - kept[0], rel=0.3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_the_optimizer_keeps(name):
    weight = torch.nn.Parameter(torch.ones(8192))
    optimizer = create_optimizer(name, [weight], lr=1e-3)
    for _ in range(2):
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.step()
    held = sum(value.nbytes for value in optimizer.state_dict()["state"][0].values() if value.numel() > 1)
    assert state_bytes(name) == held / 8192


def test_a_language_model_is_counted_as_it_is():
    with torch.device("meta"):
        size = Size.of(llama(3))
    model = llama(3)
    assert size.parameters == size.trained == sum(param.numel() for param in model.parameters())
    block = sum(param.numel() for param in model.model.layers.parameters() if param.ndim == 2)
    assert (size.linear, size.layers, size.hidden, size.vocabulary) == (block, 3, 256, 64)


@pytest.mark.parametrize("make", [llama, bert])
def test_adapters_are_counted_without_making_them(make):
    targets, saved = (["query", "value"], ["classifier"]) if make is bert else (["all-linear"], [])
    planned = Size.of(make(2), 4, targets, saved)
    config = LoraConfig(r=4, target_modules=targets if make is bert else "all-linear", modules_to_save=saved or None)
    assert planned == Size.of(get_peft_model(make(2), config))


def test_of_an_adapter_only_what_trains_has_gradients_and_state():
    size = Size.of(get_peft_model(llama(2), LoraConfig(r=4, target_modules="all-linear")))
    memory = estimate(size, tokens=8, state=8.0, dtype="bfloat16")
    assert 0 < size.trained < size.parameters / 10
    assert (memory.gradients, memory.state) == (4 * size.trained, 8 * size.trained)
    assert memory.weights == 2 * (size.parameters - size.trained) + 4 * size.trained
    packed = estimate(size, tokens=8, state=8.0, dtype="bfloat16", four_bit=True)
    others = size.parameters - size.trained - size.linear
    assert packed.weights == pytest.approx(0.516 * size.linear + 4 * others + 4 * size.trained, rel=1e-3)


def test_shards_and_recomputation_cost_less():
    size = Size.of(llama(4))
    whole = estimate(size, tokens=512, state=8.0)
    assert estimate(size, tokens=512, state=8.0, processes=8).state == whole.state / 8
    assert estimate(size, tokens=512, state=8.0, checkpointing=True).activations < whole.activations / 2


def test_what_is_not_known_is_refused():
    size = Size.of(llama(1))
    with pytest.raises(InputError, match="dtype must be float32, bfloat16 or float16, got 'int8'"):
        estimate(size, tokens=8, state=8.0, dtype="int8")
    with pytest.raises(InputError, match="tokens must be at least 1, got 0"):
        estimate(size, tokens=0, state=8.0)
    with pytest.raises(InputError, match="optim 'lion_8bit': its state is not known here; accepted: tam"):
        state_bytes("lion_8bit")
