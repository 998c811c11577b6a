"""Computes what each recipe of a real model needs, and writes it into its header and into docs/recipes.md.

python scripts/recipe_memory.py          rewrite the headers and the table
python scripts/recipe_memory.py --check  only say whether they are up to date (exit status 1 if not)

The models are built on the meta device from the numbers below, which take no memory and no network. They were written
down from the models' published configurations; that their parameters add up to the published counts is tested.
"""

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    ResNetConfig,
    ViTConfig,
)

from hf_momentum.training import Recipe, load_recipe
from hf_momentum.training.memory import Memory, Size, estimate, minutes, saved_bytes, state_bytes

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"

_SMOL = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 32768}

# By `short` name: the architecture, and the published number of parameters.
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, float]] = {
    "SmolLM2-135M": (
        LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, **_SMOL,
        ),
        134.5e6,
    ),
    "SmolLM2-1.7B": (
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
            num_key_value_heads=32, **_SMOL,
        ),
        1.71e9,
    ),
    "Qwen3-0.6B": (
        Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            tie_word_embeddings=True, **_QWEN3,
        ),
        0.596e9,
    ),
    "Qwen3-8B": (
        Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            tie_word_embeddings=False, **_QWEN3,
        ),
        8.19e9,
    ),
    "Llama-3.2-1B": (
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
        ),
        1.236e9,
    ),
    "ModernBERT-base": (
        ModernBertConfig(
            hidden_size=768, intermediate_size=1152, num_hidden_layers=22, num_attention_heads=12, vocab_size=50368,
        ),
        149e6,
    ),
    "all-MiniLM-L6-v2": (
        BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, vocab_size=30522
        ),
        22.7e6,
    ),
    "vit-base-patch16-224-in21k": (ViTConfig(num_labels=10), 85.8e6),
    "resnet-18": (
        ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
        ),
        11.2e6,
    ),
}  # fmt: skip

# The class of model for each task.
LOADERS = {
    "causal_lm": AutoModelForCausalLM,
    "chat": AutoModelForCausalLM,
    "preference": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
_TOKENS_OF_A_PICTURE = (224 // 16) ** 2 + 1


@dataclass(frozen=True)
class Figures:
    """What stands in a recipe's header.

    Attributes:
        processes: over how many GPUs the header's command shards the model.
        memory: of one device.
        minutes: on so many H100, at `utilisation` of their peak.
        utilisation: 0.4 for language models, half of it for small ones, whose kernels are short; 0.1 for classifiers.
    """

    processes: int
    memory: Memory
    minutes: float
    utilisation: float

    def lines(self) -> list[str]:
        """The header's two lines."""
        each = f" a GPU of {self.processes}" if self.processes > 1 else ""
        where = f"{self.processes} H100" if self.processes > 1 else "one H100"
        time = f"about {self.minutes:.0f} minutes" if self.minutes >= 1.5 else "about a minute"
        return [
            f"# Memory{each}: {self.memory}",
            f"# Time: {time} on {where} at {100 * self.utilisation:.0f} % utilisation (computed; loading and "
            "evaluation aside)",
        ]


def short(hub_name: str) -> str:
    """The last part of a model's name on the Hub, of whatever form of it: a key of `ARCHITECTURES`."""
    return hub_name.rpartition("/")[2].removesuffix("-Instruct").removesuffix("-Base")


def shipped() -> list[Path]:
    """The recipes of real models, in the order of their names."""
    return sorted(RECIPES.glob("*/*/*.yaml"))


def load(path: Path) -> Recipe:
    """A recipe as a machine without a GPU can read it."""
    return load_recipe(str(path), ["--use_cpu", "--bf16", "false"])


def figures(path: Path) -> Figures:
    """Compute what the recipe of a file needs."""
    recipe = load(path)
    args, task = recipe.training, recipe.model.task
    processes = int((re.search(r"--num_processes (\d+)", path.read_text()) or ["", "1"])[1])
    batch = args.per_device_train_batch_size
    examples = batch * args.gradient_accumulation_steps * args.max_steps * processes
    state = state_bytes(str(getattr(args.optim, "value", args.optim)), args.optim_args)
    if recipe.bloop.aux_dataset:
        state += 4 if recipe.bloop.ema_dtype == "float32" else 2  # Bloop's average of main gradients
    config = ARCHITECTURES[short(recipe.model.model_name_or_path)][0]
    options: dict[str, Any] = {
        "state": state,
        "dtype": recipe.model.model_dtype,
        "checkpointing": args.gradient_checkpointing,
        "processes": processes,
    }
    if isinstance(config, ResNetConfig):
        return _convolutional(config, batch, examples, options)
    length = {
        "causal_lm": recipe.data.block_size,
        "sequence_classification": recipe.data.block_size,
        "image_classification": _TOKENS_OF_A_PICTURE,
    }.get(task) or args.max_length
    sequences = 2 if task == "preference" else 1
    size = _size(recipe)
    memory = estimate(
        size,
        tokens=sequences * batch * length,
        four_bit=recipe.model.load_in_4bit,
        whole_logits=task != "chat",
        **options,
    )
    passes = 4 / 3 if task == "preference" else 2 if recipe.bloop.aux_dataset else 1  # the reference; the other batch
    utilisation = 0.1 if not size.vocabulary else 0.2 if size.parameters < 5e8 else 0.4
    tokens = passes * sequences * examples * length
    took = minutes(
        size, tokens=round(tokens), peak=processes * 989e12, utilisation=utilisation, again=args.gradient_checkpointing
    )
    return Figures(processes, memory, took, utilisation)


def _size(recipe: Recipe) -> Size:
    """The real model of a recipe, counted."""
    model, peft = _model(short(recipe.model.model_name_or_path), recipe.model.task), recipe.peft
    if not peft.lora:
        return Size.of(model)
    heads = ["classifier"] if recipe.model.task.endswith("classification") else []
    return Size.of(model, peft.lora_r, peft.lora_target_modules, [*peft.lora_modules_to_save, *heads])


@functools.cache
def _model(name: str, task: str) -> PreTrainedModel:
    with torch.device("meta"):
        return LOADERS[task].from_config(ARCHITECTURES[name][0])


def _convolutional(config: ResNetConfig, batch: int, examples: int, options: dict[str, Any]) -> Figures:
    """Activations are counted on the graph itself, and operations too: there is no rule of 6 for shared weights."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config).to(torch.bfloat16).train()
        pictures = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16)
        kept = saved_bytes(model, lambda: model(pixel_values=pictures).logits)
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=pictures)
    parameters = sum(param.numel() for param in model.parameters())
    size = Size(parameters, parameters, parameters, 0, 0, 1, 0)
    memory = estimate(size, tokens=batch, activations=kept, **options)
    return Figures(1, memory, 3 * counter.get_total_flops() / batch * examples / (989e12 * 0.1) / 60, 0.1)


def with_figures(text: str, found: Figures) -> str:
    """A recipe's text with the two lines of its header as they should be."""
    memory, time = found.lines()
    text, memories = re.subn(r"^# Memory.*$", memory.replace("\\", ""), text, count=1, flags=re.MULTILINE)
    text, times = re.subn(r"^# Time:.*$", time, text, count=1, flags=re.MULTILINE)
    if not memories or not times:
        raise ValueError("the header needs a line that begins with '# Memory' and one that begins with '# Time:'")
    return text


def table(found: dict[Path, Figures]) -> str:
    """The table of docs/recipes.md."""
    rows = [
        "| recipe | task | trains | optimizer, learning rate | GiB a device | minutes, H100 |",
        "|---|---|---|---|---:|---:|",
    ]
    for path, figure in found.items():
        recipe = load(path)
        name = path.relative_to(RECIPES).with_suffix("")
        optimizer = str(getattr(recipe.training.optim, "value", recipe.training.optim))
        surgery = f", {recipe.bloop.surgery}" if recipe.bloop.aux_dataset else ""
        trains = "QLoRA" if recipe.model.load_in_4bit else "LoRA" if recipe.peft.lora else "all"
        devices = f" x {figure.processes}" if figure.processes > 1 else ""
        rows.append(
            f"| [`{name}`](../recipes/{name}.yaml) | {recipe.model.task} | {trains} | `{optimizer}`{surgery}, "
            f"{recipe.training.learning_rate:g} | {figure.memory.total / 2**30:.1f}{devices} | "
            f"{max(figure.minutes, 1):.0f}{devices} |"
        )
    return "\n".join(rows)


def with_table(page: str, found: dict[Path, Figures]) -> str:
    """The page with its table as it should be."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{table(found)}\n\n{page[end:]}"


def main(check: bool) -> int:
    """Rewrite headers and table, or say which are out of date."""
    found = {path: figures(path) for path in shipped()}
    wanted = {path: with_figures(path.read_text(encoding="utf-8"), figure) for path, figure in found.items()}
    if PAGE.is_file():
        wanted[PAGE] = with_table(PAGE.read_text(encoding="utf-8"), found)
    stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'rewritten'}")
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
