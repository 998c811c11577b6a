"""The tensors that an optimizer gets from real models, for `bench_optimizers.py`.

The shapes come from transformers' and PEFT's own classes, built on the meta device, where no memory is taken. On a
machine without those packages they are written out from the same numbers; `tests/test_bench.py` holds the two equal.
"""

from collections.abc import Callable

Shapes = list[tuple[int, ...]]

# Width, layers, heads of a GPT-2 of 92M parameters in 256 tensors; vocabulary and positions are GPT-2's.
GPT2 = {"n_embd": 512, "n_layer": 21, "n_head": 8, "vocab_size": 50257, "n_positions": 1024}

# The numbers of meta-llama/Llama-3.2-1B: 1.24B parameters in 146 tensors.
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

# The numbers of HuggingFaceTB/SmolLM2-135M. Its LoRA adapters are many and small: 4.9M parameters in 420 tensors.
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

LORA_RANK = 16


def gpt2_written_out(n_embd: int, n_layer: int, n_head: int, vocab_size: int, n_positions: int) -> Shapes:
    """The tensors of a GPT-2 whose head is its embedding.

    Example:
        >>> sum(a * (b[0] if b else 1) for a, *b in gpt2_written_out(**GPT2)) // 10**6
        92
    """
    del n_head  # it cuts the tensors up and does not size them
    block = [
        *[(n_embd,), (n_embd,), (n_embd, 3 * n_embd), (3 * n_embd,), (n_embd, n_embd), (n_embd,)],
        *[(n_embd,), (n_embd,), (n_embd, 4 * n_embd), (4 * n_embd,), (4 * n_embd, n_embd), (n_embd,)],
    ]
    return [(vocab_size, n_embd), (n_positions, n_embd), *block * n_layer, (n_embd,), (n_embd,)]


def llama_linears(config: dict[str, int]) -> Shapes:
    """The weights `(out, in)` of the linear layers of one block of a Llama.

    Example:
        >>> llama_linears(SMOLLM2_135M)[:2]
        [(576, 576), (192, 576)]
    """
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return [
        *[(queries, width), (keys, width), (keys, width), (width, queries)],
        *[(inner, width), (inner, width), (width, inner)],
    ]


def llama_written_out(config: dict[str, int]) -> Shapes:
    """The tensors of a Llama whose head is its embedding.

    Example:
        >>> len(llama_written_out(LLAMA_1B))
        146
    """
    width = config["hidden_size"]
    block = [*llama_linears(config), (width,), (width,)]
    return [(config["vocab_size"], width), *block * config["num_hidden_layers"], (width,)]


def lora_written_out(config: dict[str, int], rank: int = LORA_RANK) -> Shapes:
    """The adapters A `(rank, in)` and B `(out, rank)` on every linear layer of a Llama's blocks.

    Example:
        >>> lora_written_out(SMOLLM2_135M)[:2], len(lora_written_out(SMOLLM2_135M))
        ([(16, 576), (576, 16)], 420)
    """
    block = [shape for out, into in llama_linears(config) for shape in ((rank, into), (out, rank))]
    return block * config["num_hidden_layers"]


def _gpt2_on_meta() -> Shapes:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**GPT2))
    return [tuple(parameter.shape) for parameter in model.parameters()]


def _llama_on_meta(config: dict[str, int], rank: int | None = None) -> Shapes:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
        if rank is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]


# Name: what it is, how to build it, and the same written out.
MODELS: dict[str, tuple[str, Callable[[], Shapes], Callable[[], Shapes]]] = {
    "gpt2": ("a GPT-2 of 92M parameters", _gpt2_on_meta, lambda: gpt2_written_out(**GPT2)),
    "llama-1b": ("Llama-3.2-1B", lambda: _llama_on_meta(LLAMA_1B), lambda: llama_written_out(LLAMA_1B)),
    "lora": (
        "LoRA r=16 on all linear layers of SmolLM2-135M",
        lambda: _llama_on_meta(SMOLLM2_135M, LORA_RANK),
        lambda: lora_written_out(SMOLLM2_135M),
    ),
    "lora-1b": (
        "LoRA r=16 on all linear layers of Llama-3.2-1B",
        lambda: _llama_on_meta(LLAMA_1B, LORA_RANK),
        lambda: lora_written_out(LLAMA_1B),
    ),
    "tiny": (
        "a GPT-2 of two narrow blocks, to try the program out",
        lambda: [(1024, 8), *[(8,), (8, 24), (24,)] * 2],
        lambda: [(1024, 8), *[(8,), (8, 24), (24,)] * 2],
    ),
}


def shapes_of(name: str) -> Shapes:
    """The shapes of one of `MODELS`.

    Raises:
        ValueError: there is no model of that name.

    Example:
        >>> len(shapes_of("tiny"))
        7
    """
    if name not in MODELS:
        raise ValueError(f"no model shapes {name!r}; there are {', '.join(MODELS)}")
    _, build, written_out = MODELS[name]
    try:
        return build()
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "peft"):
            raise
        return written_out()
