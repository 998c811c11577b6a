"""A model to be evaluated: any Hub name, folder, adapter or checkpoint of a run, with its tokenizer or processor."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_momentum.errors import InputError, nearest
from hf_momentum.training.export import export, read_weights
from hf_momentum.training.recipe import OFFLINE_RECIPE
from hf_momentum.training.sources import NETWORK_ERRORS

DTYPES = ("auto", "float32", "bfloat16", "float16")

_CLASSES: Mapping[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "generation": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
_ARCHITECTURES: Mapping[str, str] = {
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "image_classification",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}
_ADAPTED: Mapping[str, str] = {"SEQ_CLS": "sequence_classification", "CAUSAL_LM": "causal_lm"}
# The last layer of a classifier, as models of the Hub call it.
_HEADS = ("score", "classifier", "classification_head", "pre_classifier", "fc", "head")


@dataclass(frozen=True)
class Evaluated:
    """A model in evaluation mode on its device.

    Attributes:
        place: as it was asked for.
        model: with its adapters, if it has any.
        processor: the tokenizer, or for pictures the image processor.
    """

    place: str
    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def context(self) -> int | None:
        """The most tokens that the model takes at once; None where neither model nor tokenizer says."""
        config = self.model.config.get_text_config()
        stated = [getattr(config, name, None) for name in ("n_positions", "max_position_embeddings")]
        # Of a tokenizer whose limit was never set it is 10^30. RoBERTa's has two less than its embeddings.
        stated.append(getattr(self.processor, "model_max_length", None))
        return min((int(limit) for limit in stated if limit is not None and 0 < limit < 10**9), default=None)


def load_evaluated(
    place: str,
    task: str,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    for_gradients: bool = False,
) -> Evaluated:
    """A model for a task.

    Args:
        place: a Hub name, a folder that `from_pretrained` reads, one of PEFT adapters, or a `checkpoint-N` of a run
            under any launch (one that holds shards is put together first).
        task: "causal_lm", "generation", "sequence_classification" or "image_classification".
        device: such as "cpu" or "cuda:1"; the accelerator, where there is one, unless given.
        dtype: of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        revision: branch, tag or commit of a Hub model.
        for_gradients: whether gradients of its weights are wanted, which quantised ones do not have.

    Raises:
        InputError: there is no such model, it has no weights for the task, or device or dtype are not accepted; or it
            is quantised, and gradients are wanted.

    Example:
        >>> load_evaluated("no/such/folder", "causal_lm", device="cpu")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: model 'no/such/folder' is neither a folder here nor reachable on the Hub...
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not accepted{nearest(dtype, DTYPES)}; one of {', '.join(DTYPES)}")
    on = find_device(device)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return _load(place, place, task, on, dtype, revision, for_gradients)
    if _readable(folder):
        return _load(place, str(folder), task, on, dtype, None, for_gradients)
    with tempfile.TemporaryDirectory() as temporary:
        return _load(place, str(export(folder, Path(temporary) / "model")), task, on, dtype, None, for_gradients)


def task_of(place: str, revision: str | None = None) -> str:
    """The task that a model was trained for, by its configuration or that of its adapters.

    Raises:
        InputError: there is no such model, or it does not say.

    Example:
        >>> task_of("no/such/folder")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: the task of model 'no/such/folder' cannot be told...
    """
    folder = Path(place).expanduser()
    source = str(folder) if folder.is_dir() else place
    try:
        adapter = _adapter(source, revision)
        if adapter is not None and adapter.task_type is not None:
            return _ADAPTED[str(getattr(adapter.task_type, "value", adapter.task_type))]
        config = AutoConfig.from_pretrained(
            source if adapter is None else str(adapter.base_model_name_or_path), revision=revision
        )
        words = (config.architectures or [""])[0]
        return next(task for ending, task in _ARCHITECTURES.items() if words.endswith(ending))
    except (OSError, ValueError, KeyError, StopIteration, *NETWORK_ERRORS) as error:
        raise InputError(
            f"the task of model {place!r} cannot be told ({type(error).__name__}); give it with --task: "
            f"{', '.join(_CLASSES)}"
        ) from error


def untrained(evaluated: Evaluated, task: str, seed: int) -> Evaluated:
    """A model of the same architecture with random weights: what scores say of it, they say of no training.

    Where adapters come with an output layer of their own, it has one, too, that is not the embeddings'.

    Example:
        >>> load_evaluated  # then: untrained(load_evaluated("my-model", "causal_lm"), "causal_lm", seed=0)
        <function load_evaluated ...
    """
    model, config = evaluated.model, evaluated.model.config
    if isinstance(model, PeftModel):
        model, config = model.get_base_model(), copy.deepcopy(config)
        output = model.get_output_embeddings()
        if output is not None and output.weight is not model.get_input_embeddings().weight:
            config.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = _CLASSES[task].from_config(config, dtype=model.dtype)
    return Evaluated(f"{evaluated.place} (random weights)", random.to(evaluated.device).eval(), evaluated.processor)


def find_device(name: str | None) -> torch.device:
    """The device of that name; the accelerator, or else the CPU, for None.

    Raises:
        InputError: there is no such device here.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        here = f"{accelerator.type}, cpu" if accelerator else "cpu"
        raise InputError(f"device {name!r} cannot be used here; there is {here}") from error
    return device


def _readable(folder: Path) -> bool:
    """Whether `from_pretrained` finds all it needs there."""
    described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    endings = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
    names = (*endings, "adapter_model.safetensors", "adapter_model.bin")
    return described and any(path for name in names for path in folder.glob(name))


def _load(
    place: str,
    folder: str,
    task: str,
    device: torch.device,
    dtype: str,
    revision: str | None,
    for_gradients: bool,
) -> Evaluated:
    try:
        adapter = _adapter(folder, revision)
        source = folder if adapter is None else str(adapter.base_model_name_or_path)
        options: dict[str, Any] = {"dtype": dtype, "revision": revision if adapter is None else adapter.revision}
        if for_gradients:
            _check_not_quantised(place, source, options["revision"])
        classifies = task.endswith("classification")
        if adapter is not None and classifies:
            options |= _classes_of_adapter(place, folder)
        if "num_labels" in options:
            options["ignore_mismatched_sizes"] = True  # the adapters bring the head
        model, loaded = _CLASSES[task].from_pretrained(source, output_loading_info=True, **options)
        if adapter is None or (classifies and "num_labels" not in options):
            _check_head(place, task, loaded)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, folder, revision=revision)
        processor = _processor(task, folder, source, revision)
    except (OSError, ValueError, *NETWORK_ERRORS) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model {place!r} is neither a folder here nor reachable on the Hub, or no model for {task} "
            f"({' '.join(str(error).split())[:200]}). Without a network, {OFFLINE_RECIPE} trains its own small model"
        ) from error
    except ImportError as error:  # how transformers says that a quantised model's package is not there
        raise InputError(f"model {place!r} cannot be read here: {' '.join(str(error).split())}") from error
    if task != "image_classification" and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    if task == "sequence_classification":
        model.config.pad_token_id = processor.pad_token_id
    return Evaluated(place, model.to(device).eval(), processor)


def _adapter(folder: str, revision: str | None) -> PeftConfig | None:
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        return None
    try:
        return PeftConfig.from_pretrained(folder, revision=revision)
    except ValueError:  # how PEFT says that a repository of the Hub has no adapter
        return None


def _classes_of_adapter(place: str, folder: str) -> dict[str, Any]:
    """How many outputs the classifier has whose head was saved with the adapters; they do not name its classes.

    Nothing, where the head is that of the base model.
    """
    if not Path(folder).is_dir():
        raise InputError(f"model {place!r} is an adapter on the Hub; a classifier's has to be downloaded to a folder")
    heads = [
        value
        for name, value in read_weights(folder).items()
        if value.dim() == 2 and "lora_" not in name and name.split(".")[-2] in (*_HEADS, "out_proj")
    ]
    return {"num_labels": heads[-1].shape[0]} if heads else {}


def _check_not_quantised(place: str, source: str, revision: str | None) -> None:
    if AutoConfig.from_pretrained(source, revision=revision).to_dict().get("quantization_config"):
        raise InputError(
            f"model {place!r} holds quantised weights, which have no gradients; name the model that was quantised, or "
            "adapters on it"
        )


def _check_head(place: str, task: str, loaded: Mapping[str, Any]) -> None:
    missing = sorted(loaded["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"model {place!r} has no weights for {task}: {shown} would be random. Fine-tune it first, or set the "
            "suite's task to what it was trained for"
        )


def _processor(task: str, folder: str, source: str, revision: str | None) -> Any:
    """The tokenizer or image processor, as saved with the model; else as the adapters' base has it."""
    loader: Any = AutoImageProcessor if task == "image_classification" else AutoTokenizer
    try:
        return loader.from_pretrained(folder, revision=revision)
    except (OSError, ValueError):
        if source == folder:
            raise
        return loader.from_pretrained(source)
