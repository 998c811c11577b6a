"""The embedded corpus is large, parted by module, and its kinds are what they are called."""

import ast
import json

import pytest

from hf_momentum import InputError
from hf_momentum.training import corpus
from hf_momentum.training.sources import Source
from hf_momentum.training.tokenizer import byte_tokenizer


def test_there_is_enough_text_of_each_kind_and_split():
    for kind, split, least in [
        ("prose", "train", 1_000_000), ("prose", "test", 80_000), ("prose", "validation", 80_000),
        ("code", "train", 3_000_000), ("code", "test", 200_000), ("code", "validation", 200_000),
        ("json", "train", 300_000), ("json", "test", 20_000), ("json", "validation", 15_000),
    ]:  # fmt: skip
        assert sum(map(len, corpus.stdlib_texts(kind, split))) > least, (kind, split)


def test_a_module_never_stands_in_two_splits():
    """Train text must not come back in the test text, not even as the other kind."""
    train, validation, test = (
        {text for kind in ("prose", "code", "json") for text in corpus.stdlib_texts(kind, split)}
        for split in ("train", "validation", "test")
    )
    assert not train & test and not train & validation and not validation & test
    groups = {group: corpus.split_of(group) for group, _, _ in corpus._documents()}
    assert set(groups.values()) == {"train", "validation", "test"}


def test_code_holds_no_docstring_and_prose_is_made_of_them():
    source = 'class A:\n    """A long docstring. %s"""\n\n    def f(self):\n        return """kept"""\n' % (
        "word " * 40
    )
    prose, code = corpus.separate(source, ast.parse(source))
    assert prose.startswith("A long docstring.") and "word" not in code
    assert '"""kept"""' in code, "a string that is not a docstring is code"


def test_every_record_is_one_json_object_of_the_same_format():
    modules = {split: set() for split in ("train", "validation", "test")}
    for split, found in modules.items():
        for text in corpus.stdlib_texts("json", split):
            record = json.loads(text)
            assert list(record) == ["name", "module", "arguments", "summary"] and "\n" not in text
            assert record["summary"] and not record["name"].startswith("_")
            found.add(record["module"].partition(".")[0])
    assert {"argparse", "pathlib"} <= set().union(*modules.values())
    assert all(corpus.split_of(module) == split for split, found in modules.items() for module in found)


def test_records_are_read_from_the_source_and_leave_out_what_is_private():
    source = """
import no_such_module

def _private(): "Hidden."
def bare(): return 1
async def public(a, /, b, *c, d=1, **e):
    '''Say hello.

    More.'''
    def inner(): "Hidden."
class Kind:
    def method(self, x): "Do it."
    @classmethod
    def made(cls): "Make it."
    def __len__(self): "Hidden."
class _Hidden:
    def method(self): "Hidden."
"""
    found = [json.loads(text) for text in corpus.records(ast.parse(source), "m")]
    assert found == [
        {"name": "public", "module": "m", "arguments": ["a", "b", "*c", "d", "**e"], "summary": "Say hello."},
        {"name": "Kind.method", "module": "m", "arguments": ["x"], "summary": "Do it."},
        {"name": "Kind.made", "module": "m", "arguments": [], "summary": "Make it."},
    ]


def test_text_is_the_same_each_time_and_has_a_fingerprint():
    assert corpus.stdlib_texts("code", "test") == corpus.stdlib_texts("code", "test")
    first = corpus.fingerprint()
    corpus._documents.cache_clear()
    assert corpus.fingerprint() == first


def test_unknown_kind_or_split_lists_what_there_is():
    with pytest.raises(InputError, match=r"stdlib:poems@train does not exist.*prose, code, json"):
        corpus.stdlib_texts("poems", "train")
    with pytest.raises(InputError, match=r"train, validation, test"):
        Source.parse("stdlib:code@dev").load()


def test_tokens_are_bytes():
    tokenizer = byte_tokenizer(64)
    text = "def naïve(): return '→'\n\t"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
