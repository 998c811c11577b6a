"""The tiny model and the rows that all foreign trainers are run with."""

from pathlib import Path

from tests.conftest import write_rows

# All of one length: axolotl takes the mean over micro-batches of their means, transformers the mean over all tokens.
QUESTIONS = [f"Where does the {size} river run {way}?" for size in ("long", "wide") for way in ("down", "past")] * 16


def tiny_llama(folder: Path) -> Path:
    """Written to `folder`, with a tokenizer over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_momentum.training.tokenizer import byte_tokenizer

    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)
    return folder


def loaded(folder: Path):
    """The model in `folder`, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")


def chats(file: Path) -> Path:
    """Rows of messages."""
    answer = {"role": "assistant", "content": "To the sea."}
    write_rows(file, [{"messages": [{"role": "user", "content": question}, answer]} for question in QUESTIONS])
    return file


def texts(file: Path) -> Path:
    """Rows of text."""
    write_rows(file, [{"text": f"{question} To the sea."} for question in QUESTIONS])
    return file


# As the foreign trainers name them, too. Every one of them is seen in the weights.
SETTINGS = {
    "learning_rate": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.5, "lr_scheduler_type": "linear",
    "optim_args": "gamma=0.95", "gradient_accumulation_steps": 2,
}  # fmt: skip
