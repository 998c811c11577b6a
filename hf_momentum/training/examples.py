"""Rows of a split as a model takes them: token ids or pixels in batches, and what it should predict of each."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import ClassLabel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_momentum.errors import InputError
from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training.evaluated import Evaluated

IGNORED = -100  # what torch calls a target that is not predicted
_GENERIC = re.compile(r"(LABEL_)?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Examples:
    """Inputs of a model, one after another, of which any few can be made a batch.

    Attributes:
        sizes: the length of each, by which like ones are put together.
        inputs: a batch of so many of them, padded: the keyword arguments of the model.
        targets: what is right for such a batch: classes `[batch]`, or tokens `[batch, length]`, of which position i is
            predicted at position i and IGNORED is not predicted.
        rows: which row of the split each comes from; a long text makes several.
        classes: of each, for classifiers; empty otherwise.
    """

    sizes: Sequence[int]
    inputs: Callable[[Sequence[int]], Mapping[str, Tensor]]
    targets: Callable[[Sequence[int]], Tensor]
    rows: Sequence[int]
    classes: Sequence[int]

    def __len__(self) -> int:
        return len(self.sizes)


def examples_of(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit) -> Examples:
    """The examples of a split for its task; for generation, the reference after its prompt.

    Raises:
        InputError: the data do not fit the model.
    """
    return _MAKERS[split.task](evaluated, rows, split)


def on_device(evaluated: Evaluated, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs where the model is; pixels in its dtype."""
    device, dtype = evaluated.device, evaluated.model.dtype
    return {name: value.to(device, dtype if name == "pixel_values" else None) for name, value in given.items()}


# ---- classifiers -----------------------------------------------------------------------------------------------------


def text_examples(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit) -> Examples:
    """Texts to classify, cut to what the model takes."""
    tokenizer = evaluated.processor
    labels = class_numbers(rows, split, outputs_of(evaluated.model))
    length = min((limit for limit in (split.block_size, evaluated.context) if limit), default=None)
    texts = [str(text) for text in rows[split.text_column]]
    encoded = tokenizer(texts, truncation=length is not None, max_length=length)

    def inputs(batch: Sequence[int]) -> Mapping[str, Tensor]:
        return tokenizer.pad({key: [value[i] for i in batch] for key, value in encoded.items()}, return_tensors="pt")

    return _of_classes([len(ids) for ids in encoded["input_ids"]], inputs, labels)


def picture_examples(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit) -> Examples:
    """Pictures to classify, read when they are needed."""
    labels = class_numbers(rows, split, outputs_of(evaluated.model))
    mode = "L" if getattr(evaluated.model.config, "num_channels", 3) == 1 else "RGB"

    def inputs(batch: Sequence[int]) -> Mapping[str, Tensor]:
        pictures = [picture.convert(mode) for picture in rows[list(batch)][split.image_column]]
        return evaluated.processor(images=pictures, return_tensors="pt")

    return _of_classes([1] * len(rows), inputs, labels)


def _of_classes(
    sizes: Sequence[int], inputs: Callable[[Sequence[int]], Mapping[str, Tensor]], labels: Sequence[int]
) -> Examples:
    return Examples(sizes, inputs, lambda batch: torch.tensor([labels[i] for i in batch]), range(len(sizes)), labels)


def outputs_of(model: Any) -> list[str]:
    """What a classifier calls its outputs, in their order."""
    return [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]


def class_numbers(rows: datasets.Dataset, split: SuiteSplit, outputs: Sequence[str]) -> list[int]:
    """For each example the number of the model's output that stands for its class.

    Classes with names are found by name, whatever their case; numbers by name where the model's outputs are called
    that, and otherwise as they are.

    Args:
        rows: of the split.
        split: its `classes` go before `outputs`.
        outputs: what the model calls its outputs, in their order.

    Raises:
        InputError: a class that the model lacks.

    Example:
        >>> rows = datasets.Dataset.from_dict({"label": ["neg", "pos", "neg"]})
        >>> class_numbers(rows, SuiteSplit("a", "in distribution"), ["NEG", "POS"])
        [0, 1, 0]
        >>> rows = datasets.Dataset.from_dict({"label": [1, 0]})
        >>> class_numbers(rows, SuiteSplit("a", "in distribution"), ["LABEL_0", "LABEL_1"])
        [1, 0]
    """
    if split.classes and len(split.classes) != len(outputs):
        raise InputError(
            f"split {split.name!r} names {len(split.classes)} classes and the model has {len(outputs)} outputs"
        )
    outputs = split.classes or outputs
    values, words = _classes(rows, split)
    places = {name.casefold(): number for number, name in enumerate(outputs)}
    lacking = [word for word in words.values() if word.casefold() not in places]
    if not lacking:
        return [places[words[value].casefold()] for value in values]
    if taken_by_number(rows, split, outputs):
        lacking = [str(value) for value in words if not 0 <= value < len(outputs)]
        if not lacking:
            return values
    raise InputError(
        f"split {split.name!r} has class {lacking[0]!r}, which the model lacks: its outputs are "
        f"{', '.join(outputs[:20])}. If they are called otherwise in the data, name them in the suite, in the model's "
        f"order: classes: [{', '.join(words.values())}]"
    )


def taken_by_number(rows: datasets.Dataset, split: SuiteSplit, outputs: Sequence[str]) -> bool:
    """Whether classes are numbers that no output is called after, so that 0 stands for the first one, and so on.

    Names that only one side has are no reason to guess: such classes are found by name or not at all.

    Example:
        >>> rows = datasets.Dataset.from_dict({"label": [1, 0]})
        >>> taken_by_number(rows, SuiteSplit("a", "in distribution"), ["NEGATIVE", "POSITIVE"])
        True
    """
    outputs = split.classes or outputs
    values, words = _classes(rows, split)
    named = isinstance(rows.features[split.label_column], ClassLabel)
    generic = all(_GENERIC.fullmatch(name) for name in outputs)
    unknown = not {word.casefold() for word in words.values()} & {name.casefold() for name in outputs}
    return unknown and all(isinstance(value, int) for value in values) and (generic or not named)


def _classes(rows: datasets.Dataset, split: SuiteSplit) -> tuple[list[Any], dict[Any, str]]:
    """The class of every example, and what each class is called."""
    feature = rows.features[split.label_column]
    values = [_whole(value) for value in rows[split.label_column]]
    named = isinstance(feature, ClassLabel)
    return values, {value: feature.names[value] if named else str(value) for value in dict.fromkeys(values)}


def _whole(value: Any) -> Any:
    """Numbers as integers, as far as they are whole; True is 1."""
    return int(value) if isinstance(value, bool | float) and value == int(value) else value


# ---- language models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of a document: tokens that are predicted, and those before them."""

    context: Sequence[int]
    predicted: Sequence[int]


def windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[Window]:
    """Cut a document so that every token is predicted once, by a model that takes `length` tokens.

    The first token is predicted from `prefix`, the others from what stands before them in their window. The last window
    is as long as the others: its first tokens are context alone.

    Example:
        >>> [(w.context, w.predicted) for w in windows([1, 2, 3, 4, 5], prefix=0, length=3)]
        [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    if tokens:
        yield Window([prefix], tokens[:length])
    for start in range(length, len(tokens), length):
        stop = min(start + length, len(tokens))
        yield Window(tokens[stop - length - 1 : start], tokens[start:stop])


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a document's first token is predicted from: the beginning, or else the end of a text.

    Raises:
        InputError: the tokenizer has neither.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise InputError("the tokenizer has neither bos_token nor eos_token, so a text's first token has no context")
    return int(prefix)


def window_examples(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit) -> Examples:
    """The windows of all texts, in which every token is predicted once.

    Raises:
        InputError: no text holds a token.
    """
    tokenizer = evaluated.processor
    texts = [str(text) for text in rows[split.text_column]]
    length = min((limit for limit in (split.block_size, evaluated.context) if limit), default=2048)
    prefix = prefix_of(tokenizer)
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    parts = [(number, window) for number, ids in enumerate(documents) for window in windows(ids, prefix, length)]
    if not parts:
        raise InputError(f"split {split.name!r}: no text of {split.source} holds a token")
    return _of_windows([window for _, window in parts], [number for number, _ in parts])


def answer_examples(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit) -> Examples:
    """The references after their prompts, with the token that ends them; only those tokens are predicted.

    Prompts are cut at their beginning as they are for generation.

    Raises:
        InputError: a reference leaves no room for its prompt.
    """
    tokenizer = evaluated.processor
    most = min((limit for limit in (split.block_size, evaluated.context) if limit), default=2048)
    prompts = tokenizer([str(text) for text in rows[split.prompt_column]], verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    references = tokenizer([str(text) for text in rows[split.reference_column]], add_special_tokens=False)["input_ids"]
    parts = []
    for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        room = most - len(reference) - len(end) + 1
        if room < 1 or not prompt:
            raise InputError(
                f"split {split.name!r}: row {number} of {split.source} has an empty prompt, or a reference of "
                f"{len(reference)} tokens that leaves no room for one in {most}"
            )
        parts.append(Window(prompt[-room:], [*reference, *end]))
    return _of_windows(parts, range(len(parts)))


def _of_windows(parts: Sequence[Window], rows: Sequence[int]) -> Examples:
    sizes = [len(window.context) + len(window.predicted) - 1 for window in parts]

    def inputs(batch: Sequence[int]) -> Mapping[str, Tensor]:
        ids = torch.zeros(len(batch), max(sizes[index] for index in batch), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            size = sizes[index]
            ids[place, :size] = torch.tensor([*parts[index].context, *parts[index].predicted][:-1])
            mask[place, :size] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def targets(batch: Sequence[int]) -> Tensor:
        wanted = torch.full((len(batch), max(sizes[index] for index in batch)), IGNORED, dtype=torch.long)
        for place, index in enumerate(batch):
            predicted = parts[index].predicted
            wanted[place, sizes[index] - len(predicted) : sizes[index]] = torch.tensor(predicted)
        return wanted

    return Examples(sizes, inputs, targets, rows, ())


_MAKERS: Mapping[str, Callable[[Evaluated, datasets.Dataset, SuiteSplit], Examples]] = {
    "causal_lm": window_examples,
    "generation": answer_examples,
    "sequence_classification": text_examples,
    "image_classification": picture_examples,
}
