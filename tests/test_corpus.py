"""The embedded corpus is large, parted by module, and its two kinds are what they are called."""

import ast

import pytest

from hf_momentum import InputError
from hf_momentum.training import corpus
from hf_momentum.training.sources import Source
from hf_momentum.training.tokenizer import byte_tokenizer


def test_there_is_enough_text_of_each_kind_and_split():
    for kind, split, least in [
        ("prose", "train", 1_000_000), ("prose", "test", 80_000), ("prose", "validation", 80_000),
        ("code", "train", 3_000_000), ("code", "test", 200_000), ("code", "validation", 200_000),
    ]:  # fmt: skip
        assert sum(map(len, corpus.stdlib_texts(kind, split))) > least, (kind, split)


def test_a_module_never_stands_in_two_splits():
    """Train text must not come back in the test text, not even as the other kind."""
    train = set(corpus.stdlib_texts("prose", "train")) | set(corpus.stdlib_texts("code", "train"))
    test = set(corpus.stdlib_texts("prose", "test")) | set(corpus.stdlib_texts("code", "test"))
    assert not train & test
    groups = {group: corpus.split_of(group) for group, _, _ in corpus._documents()}
    assert set(groups.values()) == {"train", "validation", "test"}


def test_code_holds_no_docstring_and_prose_is_made_of_them():
    source = 'class A:\n    """A long docstring. %s"""\n\n    def f(self):\n        return """kept"""\n' % (
        "word " * 40
    )
    prose, code = corpus.separate(source, ast.parse(source))
    assert prose.startswith("A long docstring.") and "word" not in code
    assert '"""kept"""' in code, "a string that is not a docstring is code"


def test_text_is_the_same_each_time_and_has_a_fingerprint():
    assert corpus.stdlib_texts("code", "test") == corpus.stdlib_texts("code", "test")
    first = corpus.fingerprint()
    corpus._documents.cache_clear()
    assert corpus.fingerprint() == first


def test_unknown_kind_or_split_lists_what_there_is():
    with pytest.raises(InputError, match=r"stdlib:poems@train does not exist.*prose, code"):
        corpus.stdlib_texts("poems", "train")
    with pytest.raises(InputError, match=r"train, validation, test"):
        Source.parse("stdlib:code@dev").load()


def test_tokens_are_bytes():
    tokenizer = byte_tokenizer(64)
    text = "def naïve(): return '→'\n\t"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
