"""`hf-momentum init`: what it makes of data, that test rows stay apart, settings that fit, and a recipe that trains."""

import json
import random
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from hf_momentum.cli import main
from hf_momentum.errors import InputError
from hf_momentum.training.arguments import DataArguments, ModelArguments
from hf_momentum.training.fitting import fit
from hf_momentum.training.hardware import Hardware
from hf_momentum.training.look import Look, look_at, refuse
from hf_momentum.training.memory import GIB, Size
from hf_momentum.training.models import Base, load_model
from hf_momentum.training.new_recipe import TASKS, Wish, learning_rate, propose
from hf_momentum.training.parting import is_ordered, parts_of, shuffled
from hf_momentum.training.recipe import load_recipe
from hf_momentum.training.sources import Loader, Source, named_splits

CPU = Hardware("CPU", "cpu", 1, 16 * GIB, False, False)
GPU = Hardware("GPU", "cuda", 1, 80 * GIB, True, False)


def reviews(count: int = 120, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    words = {"good": ["great", "lovely", "superb"], "bad": ["awful", "boring", "poor"]}
    rows = []
    for number in range(count):
        label = draw.choice(sorted(words))
        text = " ".join(draw.choice(words[label]) for _ in range(6))
        rows.append({"id": number, "review": f"{text} film of the year {number}", "verdict": label})
    return rows


def written(path: Path, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).to_csv(str(path), index=False)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A Bert of two layers, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "great", "lovely", "superb", "awful", "boring", "poor", "film", "of", "year"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The head of a Bert reads the first position alone: it has to be the same token in every text.
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


# ---- what the data are ----------------------------------------------------------------------------------------------

MESSAGES = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes"}] for n in range(30)]
TEXTS = [f"a text that is number {n}" for n in range(30)]


@pytest.mark.parametrize(
    ("columns", "look"),
    [
        ({"text": TEXTS}, ("causal_lm", "text", "")),
        ({"text": TEXTS, "label": [0, 1] * 15}, ("sequence_classification", "text", "label")),
        (
            {"Review": TEXTS, "stars": ["1", "5", "3"] * 10, "id": list(range(30))},
            ("sequence_classification", "Review", "stars"),
        ),
        (
            {"title": ["short"] * 30, "body": [text * 5 for text in TEXTS], "y": [True, False] * 15},
            ("sequence_classification", "body", "y"),
        ),
        ({"text": TEXTS, "label": [1.0, 0.0] * 15}, ("sequence_classification", "text", "label")),
        ({"text": TEXTS, "label": list("abcdefghij") * 3}, ("sequence_classification", "text", "label")),
        ({"text": ["a line", ""] * 15}, ("causal_lm", "text", "")),
        ({"messages": MESSAGES}, ("chat", "", "")),
        ({"conversations": MESSAGES}, ("chat", "", "")),
        ({"prompt": TEXTS, "completion": TEXTS}, ("chat", "", "")),
        ({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}, ("preference", "", "")),
    ],
    ids=[
        *("text", "label", "stars", "title and body", "whole floats", "few rows a class", "lines", "messages"),
        *("conversations", "prompt", "preference"),
    ],
)
def test_the_task_follows_from_the_columns(columns, look):
    found = look_at(datasets.Dataset.from_dict(columns), refuse)
    assert (found.task, found.text, found.label) == look


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([n + 0.5 for n in range(30)], "30 different numbers: a quantity, which no task here predicts"),
        (list(range(30)), "30 different values in 30 rows: hardly classes"),
        (["one"] * 30, "a single class, 'one'"),
        ([["one", "two"]] * 30, "several values in a row"),
        ([1.0, 0.0] * 14 + [1.0, None], "is empty in 1 of 30 rows"),
    ],
    ids=["regression", "identifiers", "one class", "several labels", "a missing integer"],
)
@pytest.mark.parametrize("named", [None, "label"])
def test_a_column_called_label_is_never_left_out_in_silence(labels, message, named):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "lang": ["en", "de"] * 15, "label": labels})
    with pytest.raises(InputError, match=message) as refused:
        look_at(rows, refuse, label=named)
    assert "remove them" in str(refused.value) or "--task causal_lm" in str(refused.value)
    assert look_at(rows, refuse, task="causal_lm", text="text").task == "causal_lm"


def test_labels_are_looked_for_in_the_whole_file(here):
    """As of reviews in order of their labels, of which the first 20 000 are of one class."""
    rows = datasets.Dataset.from_dict({"text": ["some words"] * 50_000, "verdict": [0] * 25_000 + [1] * 25_000})
    assert look_at(rows, refuse).label == "verdict"


def test_columns_that_a_chat_does_not_have_are_named():
    with pytest.raises(InputError, match=r"task chat takes the columns messages or .*; these data have body"):
        look_at(datasets.Dataset.from_dict({"body": TEXTS}), refuse, task="chat")


class _Templated:
    """A tokenizer of words whose template writes sixteen of them round every message."""

    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize):
        return " ".join(f"{'<|> ' * 16}{message['role']} {message['content']}" for message in messages)


def test_conversations_are_measured_as_the_template_writes_them():
    rows = datasets.Dataset.from_dict({"messages": MESSAGES})
    (first, *_) = Look("chat").sequences(rows, _Templated())
    assert first.count("<|>") == 32 and "user question 0" in first
    (plain, *_) = Look("chat").sequences(rows)
    assert plain == "question 0\nyes"
    shared = [[{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]]
    (first,) = Look("chat").sequences(datasets.Dataset.from_dict({"conversations": shared}), _Templated())
    assert "user why?" in first and "assistant so" in first
    calls = [[{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]]
    assert Look("chat").sequences(datasets.Dataset.from_dict({"messages": calls})) == ['[{"name": "add"}]']


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["why? "], "chosen": ["because of it"], "rejected": ["no"]},
        {
            "prompt": [[{"role": "user", "content": "why?"}]],
            "chosen": [[{"role": "assistant", "content": "because of it"}]],
            "rejected": [[{"role": "assistant", "content": "no"}]],
        },
        {
            "chosen": [[{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because of it"}]],
            "rejected": [[{"role": "user", "content": "why?"}, {"role": "assistant", "content": "no"}]],
        },
    ],
    ids=["strings", "lists", "the prompt inside"],
)
def test_of_a_pair_the_longer_side_is_measured(columns):
    (longest,) = Look("preference").sequences(datasets.Dataset.from_dict(columns))
    assert longest.split() == ["why?", "because", "of", "it"]


def test_a_folder_of_pictures_is_image_classification(here):
    for kind, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        for number in range(15):
            (here / "pictures" / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(here / "pictures" / kind / f"{number}.png")
    proposal = propose(Wish("pictures", model="no-network/vit"), CPU, refuse)
    assert proposal.look == Look("image_classification", label="label", image="image", why="image holds pictures")
    assert "ordered by label" in " ".join(proposal.notes), "folders come one after the other"
    assert not proposal.fit.lora, "the suggested model has no layers for adapters"
    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained("resnet")
    assert not propose(Wish("pictures", model="resnet"), CPU, refuse).fit.lora
    proposal.write()
    assert load_recipe("my_recipe.yaml").data.image_column == "image"


def test_what_is_in_doubt_is_asked_or_refused_with_the_flag():
    rows = datasets.Dataset.from_dict({"text": TEXTS, "a": [0, 1] * 15, "b": [0, 1, 2] * 10})
    with pytest.raises(InputError, match="a, b; choose one with --label_column"):
        look_at(rows, refuse)
    assert look_at(rows, lambda flag, names: names[1]).label == "b"
    with pytest.raises(InputError, match=r"--label_column 'lable' does not exist.*columns are text, a, b"):
        look_at(rows, refuse, label="lable")


# ---- splits ---------------------------------------------------------------------------------------------------------


def rows_of(source: str) -> set[str]:
    return {str(row) for row in Source.parse(source).load()}


@pytest.mark.parametrize("order", ["as drawn", "by label", "twice"])
def test_test_rows_are_never_trained_on_and_every_row_is_used(order, here):
    rows = reviews()
    if order == "by label":
        rows = sorted(rows, key=lambda row: row["verdict"])
    if order == "twice":
        rows = rows + rows  # the same reviews again, at the other end of the file
    place = written(here / "reviews.csv", rows)
    recipe = propose(Wish(place), CPU, refuse).write()
    ((_, _, test),) = named_splits(recipe.data)
    parts = [rows_of(source) for source in (recipe.data.train_dataset, recipe.data.validation_dataset, test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert set.union(*parts) == rows_of(place)
    assert (here / "my_recipe_data").exists() == (order != "as drawn")
    labels = [set(Source.parse(source).load()["verdict"]) for source in (recipe.data.train_dataset, test)]
    assert labels == [{"good", "bad"}] * 2


def test_order_is_told_from_chance():
    draw = random.Random(0)
    labels = [draw.choice("abc") for _ in range(300)]
    assert not is_ordered(labels)
    assert is_ordered(sorted(labels))
    assert is_ordered(sorted(labels)[:150] + sorted(labels)[150:][::-1])


def test_splits_that_are_there_are_used_and_one_with_hidden_labels_is_not():
    rows = datasets.Dataset.from_list(reviews())
    look = Look("sequence_classification", text="review", label="verdict")
    parts = parts_of("owner/name", {"train": rows, "test": rows.select(range(20))}, look, Path("x"))
    assert parts.test == "owner/name@test"
    assert parts.validation == "owner/name@train[90%:]"
    assert "flatter" in parts.notes[0], "these test rows are in train"
    hidden = rows.remove_columns("verdict").add_column("verdict", ["-1"] * len(rows))
    parts = parts_of("owner/name", {"train": rows, "validation": rows, "test": hidden}, look, Path("x"))
    assert parts.test == "owner/name@validation"


def test_a_class_of_one_row_is_trained_on():
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * 14 + [1] * 15 + [2]})
    train, *_ = shuffled(rows, Look("sequence_classification", text="text", label="label"), [0.1, 0.1])
    assert 29 in train


def test_small_classes_give_rows_to_every_part():
    rows = datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(100)], "label": list(range(25)) * 4})
    parts = shuffled(rows, Look("sequence_classification", text="text", label="label"), [0.1, 0.1])
    assert [len(part) for part in parts] == [80, 10, 10]
    assert {rows[index]["label"] for index in parts[0]} == set(range(25))


def test_rows_that_are_all_alike_cannot_be_parted(here):
    place = written(here / "same.csv", [{"text": "the same words in each of the rows of it"}] * 30)
    with pytest.raises(InputError, match="too few different rows to set some apart for validation"):
        propose(Wish(place), CPU, refuse)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("and_commas.csv", "text;label\n" + "a, b;0\nb;1\nc, d, e;0\n" * 30, "separated by semicolons; save it"),
        ("commas.csv", "text,label\na,0\n" + "a, b, c,0\nb,1\n" * 30, "into quotes"),
        ("latin.csv", "text,label\n" + "caf\udce9,0\nb,1\n" * 30, "save it as UTF-8"),
        ("table.xlsx", "PK", "has an ending that is not read; take .jsonl"),
        ("gaps.csv", "text,label\n" + "a,0\nb,1\n" * 20 + ",1\n", "'text' is empty in 1 of 41 rows of train"),
        ("few.csv", "text,label\na,0\nb,1\n", "at least 20"),
        ("semicolons.csv", "text;label\n" + "a;0\n" * 30, "separated by semicolons"),
        ("empty.csv", "", "is empty"),
        (
            "holes.csv",
            "text,label\n" + "some words,x\nother words,y\n" * 20 + "more words,\n",
            "is empty in 1 of 41 rows",
        ),
        ("one.csv", "text,label\n" + "".join(f"words {n},x\n" for n in range(30)), "a single class"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(name, text, message, here, capsys):
    (here / name).write_text(text, errors="surrogateescape")
    words = (
        ["init", "--data", name, "--label_column", "label"]
        if "label" in text and ";" not in text
        else ["init", "--data", name]
    )
    assert main(words) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and shown[-1].startswith("error: ")
    assert not (here / "my_recipe.yaml").exists()


def test_shifted_data_must_have_the_same_columns_and_labels(here):
    place = written(here / "reviews.csv", reviews())
    written(here / "other.csv", [{"text": "x", "verdict": "good"}])
    written(here / "stars.csv", [{"review": "x", "verdict": "five"}])
    with pytest.raises(InputError, match="no column 'review'"):
        propose(Wish(place, shifted=["other=other.csv"]), CPU, refuse)
    with pytest.raises(InputError, match="labels 'five' are not in the training data"):
        propose(Wish(place, shifted=["stars=stars.csv"]), CPU, refuse)
    with pytest.raises(InputError, match="--test: its labels 'five'"):
        propose(Wish(place, test="stars.csv"), CPU, refuse)
    with pytest.raises(InputError, match="no column 'review'"):
        propose(Wish(place, test="other.csv", task="causal_lm", text_column="review"), CPU, refuse)
    for name in ("test", "typos"):
        with pytest.raises(InputError, match=f"a split is called {name} already"):
            propose(Wish(place, shifted=[f"{name}={place}"]), CPU, refuse)


# ---- settings -------------------------------------------------------------------------------------------------------

BIG = Size(8_000_000_000, 8_000_000_000, 7_000_000_000, 2_000_000, 4096, 36, 150_000)
ADAPTED = Size(8_040_000_000, 40_000_000, 7_000_000_000, 2_000_000, 4096, 36, 150_000)


@pytest.mark.parametrize("memory", [200, 48, 24, 12])
def test_the_effective_batch_is_kept_and_the_settings_fit(memory):
    hardware = Hardware("GPU", "cuda", 1, memory * GIB, True, False)
    chosen = fit({False: BIG, True: ADAPTED}, hardware, optim="adatamw", batch=16, length=512)
    assert chosen.micro_batch * chosen.accumulation == 16
    assert chosen.lora
    assert chosen.four_bit == (memory < 24)
    assert bool(chosen.note) == (chosen.memory.total > hardware.usable)
    assert not chosen.note or memory == 12


def test_all_weights_stay_all_weights_when_the_user_says_so():
    chosen = fit({False: BIG, True: ADAPTED}, GPU, optim="adatamw", batch=16, length=512, lora=False)
    assert not chosen.lora and not chosen.four_bit and chosen.state_dtype == "int8"
    assert "fsdp2" in chosen.note


def test_both_sides_of_a_pair_and_no_second_model_are_in_memory(here):
    answers = {"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}
    datasets.Dataset.from_dict(answers).to_json("pairs.jsonl")
    datasets.Dataset.from_dict({"prompt": TEXTS, "completion": TEXTS}).to_json("answers.jsonl")
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=99).save_pretrained("llama")
    pairs = propose(Wish("pairs.jsonl", model="llama"), CPU, refuse)
    single = propose(Wish("answers.jsonl", model="llama"), CPU, refuse)
    assert (pairs.fit.micro_batch, pairs.fit.memory.state) == (single.fit.micro_batch, single.fit.memory.state)
    assert pairs.fit.memory.activations == 2 * single.fit.memory.activations
    assert "precompute_ref_log_probs: true" in pairs.text and "precompute" not in single.text


def test_more_memory_is_never_used_worse():
    """On a larger device fewer means of saving memory are taken."""
    kinds = []
    for memory in (8, 16, 24, 40, 80, 200):
        hardware = Hardware("GPU", "cuda", 1, memory * GIB, True, False)
        chosen = fit({False: BIG, True: ADAPTED}, hardware, optim="tam", batch=16, length=512)
        kinds.append((chosen.four_bit, chosen.dtype == "bfloat16", chosen.checkpointing))
    assert kinds == sorted(kinds, reverse=True)


def test_learning_rates_follow_the_table_of_optimizers():
    adam = learning_rate("adamw_torch", "causal_lm", lora=False)[0]
    assert learning_rate("adatamw", "causal_lm", lora=False)[0] == pytest.approx(0.2 * adam)
    assert learning_rate("vradam", "causal_lm", lora=False)[0] == adam
    assert learning_rate("critical_sgd", "causal_lm", lora=True)[0] == 0.25
    assert learning_rate("tam", "causal_lm", lora=False)[0] > 100 * adam


# ---- the command ----------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_without_force(here, capsys):
    place = written(here / "reviews.csv", sorted(reviews(), key=lambda row: row["verdict"]))
    assert main(["init", "--data", place]) == 0
    assert "Next: hf-momentum train --config my_recipe.yaml" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in here.rglob("*.*") if path.is_file()}
    assert main(["init", "--data", place]) == 2
    assert "--force" in capsys.readouterr().err
    Path("my_recipe.yaml").unlink()
    assert main(["init", "--data", place]) == 2, "the files of the splits are there still"
    assert not Path("my_recipe.yaml").exists()
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "my_recipe.yaml")
    assert main(["init", "--data", place, "--force"]) == 0


def test_questions_are_asked_on_a_terminal_only(here, monkeypatch, capsys):
    place = written(here / "reviews.csv", reviews())
    replies = iter([place, "", "vradam", "lora"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(replies))
    assert main(["init"]) == 0
    recipe = load_recipe("my_recipe.yaml")
    assert recipe.training.optim.value == "vradam" and recipe.peft.lora
    assert main(["init", "--data", place, "--out", "second.yaml", "--yes"]) == 0, "nothing is asked"


def test_conversations_of_roles_reach_trl_as_messages(here):
    rows = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    for name, conversation, column in (("roles", MESSAGES[0], "messages"), ("shared", rows, "conversations")):
        datasets.Dataset.from_dict({"conversations": [conversation] * 3}).to_json(f"{name}.jsonl")
        loader = Loader("chat", DataArguments(train_dataset=f"{name}.jsonl"), None, 0)
        assert loader.training().examples.column_names == [column]


def test_a_head_for_other_classes_makes_way(encoder):
    arguments = ModelArguments(task="sequence_classification", model_name_or_path=encoder)
    base = Base(encoder, AutoTokenizer.from_pretrained(encoder), from_scratch=False)
    assert load_model(base, arguments, ["good", "bad", "neither"]).classifier.out_features == 3


def test_the_next_commands_can_be_pasted(here):
    proposal = propose(Wish(written(here / "reviews.csv", reviews()), out=Path("my place/a b.yaml")), CPU, refuse)
    assert shlex.split(proposal.next_command())[-2:] == ["--config", "my place/a b.yaml"]
    assert shlex.split(proposal.then_command())[-1] == "outputs/a b_evaluation"


def test_a_terminal_that_ends_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: (_ for _ in ()).throw(EOFError))
    assert main(["init"]) == 2
    assert "--yes" in capsys.readouterr().err


def test_init_train_and_evaluate_on_a_table_of_ones_own(here, encoder, capfd):
    place = written(here / "reviews.csv", sorted(reviews(), key=lambda row: row["verdict"]))
    shifted = written(here / "phones.csv", [{**row, "review": f"phone {row['review']}"} for row in reviews(40, seed=1)])
    words = [
        "init",
        "--data",
        place,
        "--model",
        encoder,
        "--optim",
        "adatamw",
        "--shifted",
        f"phones={shifted}",
        "--json",
    ]
    assert main(words) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["task"] in TASKS and answer["memory_bytes"] > 0 and answer["minutes"] > 0
    assert answer["next"] == "hf-momentum train --config my_recipe.yaml"
    assert answer["written"][:2] == ["my_recipe.yaml", "my_recipe_suite.yaml"]
    # Random weights want more than the rate for trained ones; all six seeds that were tried learn at this one.
    words = ["train", "--config", "my_recipe.yaml", "--json", "--learning_rate", "0.0002"]
    assert main(words) == 0
    trained = json.loads(capfd.readouterr().out)
    assert trained["command"] == "train" and Path(trained["report_json"]).is_file()
    splits = {split["name"]: split for split in trained["report"]["splits"]}
    assert splits["test"]["after"]["accuracy"]["value"] > 0.9
    assert splits["phones"]["role"] == "shifted" and splits["phones"]["after"]["accuracy"]["value"] > 0.9
    assert main([*answer["then"].split()[1:], "--json"]) == 0  # as `init` said it
    measured = json.loads(capfd.readouterr().out)["report"]
    assert {"test", "phones", "typos_1"} <= {split["name"] for split in measured["splits"]}, measured["splits"]
