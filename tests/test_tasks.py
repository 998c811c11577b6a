"""Recipes of every task: TRL's trainers and classifiers of pictures measure what they say, and train as TRL's own."""

import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_momentum.cli import main
from hf_momentum.errors import InputError
from hf_momentum.optim import TAM, AdaTAMW
from hf_momentum.training import MomentumTrainingArguments, job, load_recipe
from hf_momentum.training.evaluate import Settings, evaluate, load_suite
from hf_momentum.training.evaluated import load_evaluated
from hf_momentum.training.hub_contents import gather
from hf_momentum.training.tokenizer import byte_tokenizer
from hf_momentum.training.trainer import MomentumMixin

trl = pytest.importorskip("trl")

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def _write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A tiny language model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    def chat(i: int) -> list[dict]:
        return [{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": f"it is {2 * i}"}]

    return _write(tmp_path_factory.mktemp("chats") / "chats.jsonl", [{"messages": chat(i)} for i in range(24)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+{i}?"}],
            "chosen": [{"role": "assistant", "content": f"it is {2 * i}"}],
            "rejected": [{"role": "assistant", "content": "no" * (1 + i % 3)}],
        }
        for i in range(24)
    ]
    return _write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def _words(task: str, model: Path, data: str, out: Path, **more: object) -> list[str]:
    given = {
        "task": task,
        "model_name_or_path": model,
        "train_dataset": f"{data}@train[:16]",
        "in_distribution": f"sums={data}@train[16:]",
        "optim": "adatamw",
        "learning_rate": 1e-3,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "output_dir": out,
    }
    if task in ("chat", "preference"):
        given |= {"bf16": False, "gradient_checkpointing": False, "max_length": 128}
    return [f"--{name}={value}" for name, value in {**given, **more}.items()]


def _pushed(run: Path) -> set[str]:
    """What `hf-momentum push` would send."""
    return {item.path for item in gather(run, run.with_name("staging")).items}


def _answers(folder: Path, tokens: list[int], prompt: int) -> tuple[float, int, int]:
    """Nats, number and hits of the tokens after the prompt, one forward pass by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    places = range(max(prompt, 1), len(tokens))
    right = sum(int(logs[i - 1].argmax()) == tokens[i] for i in places)
    return -sum(float(logs[i - 1, tokens[i]]) for i in places), len(places), right


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])  # packed batches are one long row; what is measured is not
def test_a_chat_is_measured_by_its_answers_alone(chatty, chats, tmp_path, packing):
    words = _words("chat", chatty, chats, tmp_path, assistant_only_loss=True, packing=packing)
    prepared = job.prepare(load_recipe(None, words))
    measured = job.measure(prepared.trainer, prepared.splits[0], "before")
    tokenizer = byte_tokenizer(512)
    for row, text in zip(measured, range(16, 24), strict=True):
        prompt, answer = f"<user>{text}+{text}?<assistant>", f"it is {2 * text}{tokenizer.eos_token}"
        first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = first + tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert np.allclose(row, _answers(chatty, whole, len(first)), rtol=1e-5), text


def test_a_chat_recipe_trains_with_our_optimizer_and_reports(chatty, chats, tmp_path):
    assert main(["train", *_words("chat", chatty, chats, tmp_path, assistant_only_loss=True, optim="tam")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (split,) = report["splits"]
    assert report["unit"] == "token" and "bits_per_byte" not in split["after"]
    assert split["change"]["loss"]["high"] < 0  # every answer begins alike: three steps are enough
    assert "cosine" in report["history"][0] and report["facts"]["optimizer"].startswith("`tam`")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0
    assert {"model.safetensors", "chat_template.jinja", "recipe.yaml", "report.json"} <= _pushed(tmp_path)


def test_a_chat_trains_as_with_trls_own_trainer(chatty, chats, tmp_path):
    ours = job.prepare(load_recipe(None, _words("chat", chatty, chats, tmp_path, lora=True))).trainer
    ours.train()
    recipe = load_recipe(None, _words("chat", chatty, chats, tmp_path, lora=True))
    set_seed(42)  # TRL does so itself since its version 1
    theirs = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(chatty, dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            optim="adatamw",
            learning_rate=1e-3,
            max_steps=3,
            per_device_train_batch_size=4,
            report_to="none",
            bf16=False,
            use_cpu=True,
            max_length=128,
            logging_steps=1,
        ),
        train_dataset=datasets.load_dataset("json", data_files=chats, split="train[:16]"),
        processing_class=ours.processing_class,
        peft_config=job.lora_config(recipe.model, recipe.peft),
    )
    theirs.train()
    assert type(theirs.optimizer.optimizer) is AdaTAMW
    found = dict(ours.model.named_parameters())
    moved = 0
    for name, value in theirs.model.named_parameters():
        assert torch.equal(value, found[name]), name
        moved += value.requires_grad and "lora_B" in name and bool(value.any())
    assert moved > 0


def test_an_auxiliary_objective_joins_a_chat(chatty, chats, tmp_path):
    words = _words("chat", chatty, chats, tmp_path, aux_dataset=f"first={chats}@train[:8]", lam=0.5)
    trainer = job.prepare(load_recipe(None, words)).trainer
    trainer.train()
    assert any("aux_loss" in entry for entry in trainer.state.log_history)
    assert isinstance(trainer, MomentumMixin)


# ---- preferences -----------------------------------------------------------------------------------------------------


def test_a_preference_is_measured_by_both_answers(chatty, pairs, tmp_path):
    prepared = job.prepare(load_recipe(None, _words("preference", chatty, pairs, tmp_path, beta=0.2)))
    assert prepared.trainer.args.beta == 0.2
    measured = job.measure(prepared.trainer, prepared.splits[0], "before")
    tokenizer = byte_tokenizer(512)
    for row, number in zip(measured, range(16, 24), strict=True):
        sums = []
        for answer in (f"it is {2 * number}", "no" * (1 + number % 3)):
            first = tokenizer(f"<user>{number}+{number}?", add_special_tokens=False)["input_ids"]
            rest = tokenizer(f"<assistant>{answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
            sums += _answers(chatty, first + rest, len(first))[:2]
        assert np.allclose(row, [*sums, 1, sums[0] < sums[2]], rtol=1e-5), number


def test_a_prompt_that_stands_in_both_conversations_is_taken_once(chatty, pairs, tmp_path):
    """As in the alignment handbook's data: a text in `prompt`, and conversations that begin with it."""
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    both = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    told = [{"prompt": row["prompt"][0]["content"], **two} for row, two in zip(rows, both, strict=True)]
    found = []
    for data in (pairs, _write(tmp_path / "told.jsonl", told)):
        prepared = job.prepare(load_recipe(None, _words("preference", chatty, data, tmp_path)))
        found.append(job.measure(prepared.trainer, prepared.splits[0], "before"))
    assert np.array_equal(*found)


def test_a_preference_recipe_trains_and_reports(chatty, pairs, tmp_path):
    words = _words("preference", chatty, pairs, tmp_path, lora=True, learning_rate=0.01)
    assert main(["train", *words]) == 0
    (split,) = json.loads((tmp_path / "report.json").read_text())["splits"]
    assert list(split["after"]) == ["accuracy", "margin", "chosen_loss"]
    assert split["change"]["margin"]["low"] > 0
    assert f"trl {trl.__version__}" in (tmp_path / "README.md").read_text()


def test_adapters_name_a_folder_by_its_whole_path(chatty, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(chatty.parent)
    words = _words("preference", chatty.name, pairs, tmp_path, lora=True)
    model = job.prepare(load_recipe(None, words)).trainer.model
    assert model.peft_config["default"].base_model_name_or_path == str(chatty)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    sklearn = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    found = sklearn.load_digits()
    pictures = [Image.fromarray((picture * 15).astype("uint8")) for picture in found.images[:200]]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": found.target[:200].tolist()})
    rows = rows.cast_column("img", datasets.Image())
    path = str(tmp_path_factory.mktemp("digits") / "digits.parquet")
    rows.cast_column("label", datasets.ClassLabel(names=[f"digit {i}" for i in range(10)])).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Three classes: the head of another task, as that of a model trained on ImageNet.
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_labels=3)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    try:
        AutoImageProcessor.from_pretrained(folder)
    except ImportError:
        pytest.skip("transformers 5.17 reads pictures with torchvision, which is not here")
    return folder


def test_a_recipe_of_pictures_learns_and_names_its_classes(seeing, digits, tmp_path):
    words = _words("image_classification", seeing, digits, tmp_path, image_column="img", max_steps=40)
    splits = [f"--train_dataset={digits}@train[:150]", f"--in_distribution=sums={digits}@train[150:]"]
    sizes = [
        "--per_device_train_batch_size=32",
        "--per_device_eval_batch_size=50",
        "--optim=vradam",
        "--learning_rate=0.005",
    ]
    assert main(["train", *words, *splits, *sizes]) == 0
    (split,) = json.loads((tmp_path / "report.json").read_text())["splits"]
    assert split["examples"] == 50 and split["change"]["loss"]["high"] < 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label[7] == "digit 7"
    assert {"model.safetensors", "preprocessor_config.json", "recipe.yaml", "README.md"} <= _pushed(tmp_path)
    assert "type: image-classification" in (tmp_path / "README.md").read_text()


def test_a_suite_of_pictures_is_evaluated_in_training_as_the_command_does(seeing, digits, tmp_path):
    path = tmp_path / "digits.yaml"
    splits = f"""
      pictures: {{role: in_distribution, source: "{digits}@train[150:]"}}
      faint:    {{role: shifted, of: pictures, corruption: contrast, severities: [1, 5]}}
    """
    path.write_text(f"task: image_classification\nimage_column: img\nsplits:{splits}")
    fields = {"evaluation_suite": path, "eval_strategy": "steps", "eval_steps": 40, "max_steps": 40, "optim": "vradam"}
    words = _words("image_classification", seeing, digits, tmp_path / "out", image_column="img", **fields)
    trainer = job.prepare(
        load_recipe(None, [*words, "--learning_rate=0.005", "--per_device_train_batch_size=16"])
    ).trainer
    trainer.train()
    trainer.save_model()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    found = evaluate(load_suite(str(path)), Settings(str(tmp_path / "out"), device="cpu")).values()
    assert set(found) == {"pictures", "faint_1", "faint_5"}
    for name, metrics in found.items():
        assert logged[f"eval_{name}_accuracy"] == pytest.approx(metrics["accuracy"])
        assert logged[f"eval_{name}_nll"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert found["faint_5"]["loss"] != pytest.approx(found["pictures"]["loss"], rel=1e-2)


def test_adapters_of_a_picture_model_bring_their_head(seeing, digits, tmp_path):
    words = _words("image_classification", seeing, digits, tmp_path, image_column="img", lora=True)
    recipe = load_recipe(None, [*words, "--lora_target_modules", "q_proj", "query"])
    prepared = job.prepare(recipe)
    prepared.trainer.train()
    prepared.trainer.save_model()
    loaded = load_evaluated(str(tmp_path), "image_classification", device="cpu")
    batch = prepared.splits[0].examples[:4]["pixel_values"]
    with torch.no_grad():
        expected = prepared.trainer.model.eval()(pixel_values=torch.stack(batch)).logits
        assert torch.allclose(loaded.model(pixel_values=torch.stack(batch)).logits, expected, atol=1e-6)
    assert expected.shape[1] == 10
    trained = [name for name, value in prepared.trainer.model.named_parameters() if value.requires_grad]
    assert any("classifier" in name for name in trained)
    assert all("lora_" in name or "classifier" in name for name in trained)


# ---- what is refused -------------------------------------------------------------------------------------------------


# TRL before its version 1 has no trust_remote_code, and 0.29.0 reads no dictionary on the command line.
OLD_TRL = "trust_remote_code" not in {field.name for field in dataclasses.fields(trl.SFTConfig)}
NO_CODE = "unknown argument '--trust_remote_code'" if OLD_TRL else "no code of a model's repository is run"
NO_KWARGS = "model_init_kwargs is not accepted; use model_dtype"
NO_KWARGS = f"invalid dict value|{NO_KWARGS}" if OLD_TRL else NO_KWARGS


@pytest.mark.parametrize(
    ("task", "more", "says"),
    [
        ("chat", ["--packin=true"], "did you mean 'packing'"),
        ("causal_lm", ["--packing=true"], "unknown argument '--packing'"),
        ("chat", ["--trust_remote_code=true"], NO_CODE),
        (
            "chat",
            ['--model_init_kwargs={"dtype": "float16"}'],
            NO_KWARGS,
        ),
        ("chat", ["--model_name_or_path=scratch"], "name a pretrained model"),
        ("chat", ["--evaluation_suite=stdlib"], "evaluation_suite is not for task chat"),
        ("preference", ["--aux_dataset=a=b.jsonl", "--surgery=replay"], "surgery replay is not for task preference"),
        ("chat", ["--load_in_4bit=true"], "set lora: true"),
        ("chat", ["--packing=perhaps"], "packing"),
        ("dpo", [], "'dpo' is not accepted"),
    ],
)
def test_what_a_task_cannot_have_is_one_line(task, more, says, tmp_path):
    words = [f"--task={task}", "--model_name_or_path=m", f"--output_dir={tmp_path}", "--use_cpu", *more]
    if task in ("chat", "preference"):
        words.append("--bf16=false")
    with pytest.raises(InputError, match=says.replace("(", r"\(")) as error:
        load_recipe(None, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("task", "says"), [("chat", "messages or"), ("preference", "chosen with rejected")])
def test_data_without_the_columns_of_its_task_are_refused(chatty, tmp_path, task, says):
    data = _write(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}] * 20)
    with pytest.raises(InputError, match=f"{says}.*it has question, answer"):
        job.prepare(load_recipe(None, _words(task, chatty, data, tmp_path)))


TURN, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("which", ["train_dataset", "in_distribution"])
@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("chat", {"messages": "hello"}, "column 'messages' has to hold a list of {role, content}, got 'hello'"),
        ("chat", {"messages": [TURN]}, "at least one example has no assistant tokens"),
        ("preference", {"prompt": "q", "chosen": ["x"], "rejected": ["y"]}, "'chosen' has to hold a text or a list"),
        ("preference", {"prompt": "q", "chosen": [ANSWER], "rejected": [ANSWER]}, "write the prompt as a list of"),
    ],
)
def test_rows_that_trl_cannot_take_are_one_line(chatty, chats, pairs, tmp_path, which, task, row, says):
    data = _write(tmp_path / "rows.jsonl", [row] * 4)
    more = {"assistant_only_loss": True} if task == "chat" else {}
    words = _words(task, chatty, chats if task == "chat" else pairs, tmp_path, **more)
    with pytest.raises(InputError, match=says.replace("(", r"\(")) as error:
        job.prepare(load_recipe(None, [*words, f"--{which}={'rows=' if which == 'in_distribution' else ''}{data}"]))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(OLD_TRL, reason="TRL before its version 1 cuts pairs when it batches them, and drops none")
@pytest.mark.parametrize("which", ["train_dataset", "in_distribution"])
def test_a_length_that_leaves_no_answer_is_refused(chatty, pairs, tmp_path, which):
    long = json.loads(Path(pairs).read_text().splitlines()[0])
    long["prompt"][0]["content"] *= 40
    data = _write(tmp_path / "long.jsonl", [long] * 4)
    words = _words("preference", chatty, pairs, tmp_path, max_length=60)
    changed = f"--{which}={'long=' if which == 'in_distribution' else ''}{data}"
    with pytest.raises(InputError, match=r"long.jsonl': of no example is there an answer within max_length 60"):
        job.prepare(load_recipe(None, [*words, changed]))


def test_what_trl_refuses_is_one_line(chatty, chats, tmp_path):
    with pytest.raises(InputError, match="<nowhere>") as error:
        job.prepare(load_recipe(None, _words("chat", chatty, chats, tmp_path, eos_token="<nowhere>")))
    assert "\n" not in str(error.value)


def test_four_bits_without_the_package_is_one_line(chatty, chats, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(InputError, match=r"pip install 'hf-momentum\[qlora\]'"):
        job.prepare(load_recipe(None, _words("chat", chatty, chats, tmp_path, lora=True, load_in_4bit=True)))


def test_the_mixin_gives_any_trainer_our_names(tmp_path):
    class Mine(MomentumMixin, Seq2SeqTrainer):
        pass

    arguments = MomentumTrainingArguments(output_dir=str(tmp_path), optim="tam", use_cpu=True)
    assert Mine.get_optimizer_cls_and_kwargs(arguments)[0] is TAM
