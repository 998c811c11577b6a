"""A tokenizer whose tokens are bytes: nothing to train, nothing to download, and loss per token is loss per byte."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token for each of the 256 bytes and one that ends a document.

    Args:
        context: the longest sequence the model takes.

    Example:
        >>> tokenizer = byte_tokenizer(256)
        >>> len(tokenizer), len(tokenizer("naïve")["input_ids"]), tokenizer.decode(tokenizer("naïve")["input_ids"])
        (257, 6, 'naïve')
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
