"""From a split of a suite to one row of numbers for each of its examples: load, tokenize, run the model, count."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hf_momentum.errors import InputError
from hf_momentum.evaluation.corruptions import corrupt
from hf_momentum.evaluation.metrics import token_statistics
from hf_momentum.evaluation.scores import classification_rows, generation_rows
from hf_momentum.evaluation.suite import CLASSIFIERS, Suite, SuiteSplit, overridden_sources, read_suite
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.recipe import find_shipped
from hf_momentum.training.sources import Source

IGNORED = -100  # what torch calls a target that is not predicted
_GENERIC = re.compile(r"(LABEL_)?\d+", re.IGNORECASE)


# ---- the suite, and the rows of its data ----------------------------------------------------------------------------


def load_suite(name: str, sources: Sequence[str] = (), max_examples: int | None = None) -> Suite:
    """A suite from a YAML file, or one that is shipped.

    Args:
        name: a path, or a name such as "stdlib".
        sources: entries NAME=SOURCE@SPLIT that replace the source of a split.
        max_examples: of every split at most.

    Raises:
        InputError: there is no such suite, or it cannot be used.

    Example:
        >>> [split.name for split in load_suite("reviews").splits]
        ['movies', 'products', 'news', 'typos_1', 'typos_3', 'typos_5']
    """
    path = find_shipped(name, "suites", "suite")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not a text file in UTF-8, so it is no suite") from error
    suite = read_suite(text, path.stem, overridden_sources(sources))
    return suite if max_examples is None else suite.limited(max_examples)


def load_rows(split: SuiteSplit) -> datasets.Dataset:
    """The examples of a split, drawn and corrupted as the suite says.

    Raises:
        InputError: the source cannot be read or is empty, or lacks a column or a label.

    Example:
        >>> split = SuiteSplit("code", "in distribution", source="stdlib:code@test", max_examples=3)
        >>> len(load_rows(split))
        3
    """
    rows = Source.parse(split.source).load()
    for column in _columns(split):
        if column not in rows.column_names:
            raise InputError(
                f"split {split.name!r}: {split.source} has no column {column!r}; it has "
                f"{', '.join(rows.column_names) or 'none'}. Name the split's in the suite, such as text_column"
            )
    if len(rows) == 0:
        raise InputError(f"split {split.name!r}: {split.source} is empty")
    if split.max_examples is not None and split.max_examples < len(rows):
        rows = rows.shuffle(seed=split.seed).select(range(split.max_examples))
    if split.task in CLASSIFIERS:
        _check_labelled(rows, split)
    if split.max_characters is not None and split.task in ("causal_lm", "sequence_classification"):
        column, most = split.text_column, split.max_characters
        rows = rows.map(lambda row: {column: str(row[column])[:most]}, desc=f"cutting {split.name}")
    if split.corruption is not None:
        column = split.image_column if split.task == "image_classification" else split.text_column
        rows = corrupt(rows, split.corruption, split.severity, split.corruption_seed, column)
    return rows


def _columns(split: SuiteSplit) -> list[str]:
    columns = {
        "causal_lm": [split.text_column],
        "sequence_classification": [split.text_column, split.label_column],
        "image_classification": [split.image_column, split.label_column],
        "generation": [split.prompt_column, split.reference_column],
    }[split.task]
    return [*columns, *([] if split.group_column is None else [split.group_column])]


def _check_labelled(rows: datasets.Dataset, split: SuiteSplit) -> None:
    for number, label in enumerate(rows[split.label_column]):
        # The Hub's benchmarks write -1 where they keep the labels of a test set to themselves.
        if label is None or label == -1:
            raise InputError(
                f"split {split.name!r} has no labels: row {number} of {split.source} holds {label} in column "
                f"{split.label_column!r}. Choose a split of it that has them"
            )


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


def language_rows(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit, batch_size: int) -> np.ndarray:
    """`[documents, 4]`: summed negative log-likelihood (nats), tokens, tokens predicted right, UTF-8 bytes."""
    tokenizer, model, device = evaluated.processor, evaluated.model, evaluated.device
    texts = [str(text) for text in rows[split.text_column]]
    length = min((limit for limit in (split.block_size, evaluated.context) if limit), default=2048)
    prefix = prefix_of(tokenizer)
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    parts = [(number, window) for number, ids in enumerate(documents) for window in windows(ids, prefix, length)]
    if not parts:
        raise InputError(f"split {split.name!r}: no text of {split.source} holds a token")
    found = np.zeros((len(texts), 4))
    found[:, 3] = [len(text.encode()) for text in texts]
    sizes = [len(window.context) + len(window.predicted) - 1 for _, window in parts]
    for batch in batches(sizes, batch_size, split.name):
        inputs = torch.zeros(len(batch), max(sizes[index] for index in batch), dtype=torch.long)
        targets, mask = torch.full_like(inputs, IGNORED), torch.zeros_like(inputs)
        for place, index in enumerate(batch):
            window, size = parts[index][1], sizes[index]
            inputs[place, :size] = torch.tensor([*window.context, *window.predicted][:-1])
            targets[place, size - len(window.predicted) : size] = torch.tensor(window.predicted)
            mask[place, :size] = 1
        logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device)).logits
        for place, index in enumerate(batch):
            # One at a time: float32 logits of a whole batch may not fit beside the model.
            counted = token_statistics(logits[place : place + 1], targets[place : place + 1].to(device))
            found[parts[index][0], :3] += counted[0].cpu().numpy()
    return found


def written_rows(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit, batch_size: int) -> np.ndarray:
    """`[prompts, 2]`: one, and whether what the model writes after the prompt, most likely token first, is the
    reference."""
    tokenizer, device = evaluated.processor, evaluated.device
    room = min((limit for limit in (split.block_size, evaluated.context) if limit), default=2048) - split.max_new_tokens
    if room < 1:
        raise InputError(
            f"split {split.name!r}: max_new_tokens {split.max_new_tokens} leaves no room for a prompt in the model's "
            "context; lower it"
        )
    prompts = [tokenizer(str(text), verbose=False)["input_ids"][-room:] for text in rows[split.prompt_column]]
    config = GenerationConfig(
        max_new_tokens=split.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=evaluated.model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    written = [""] * len(prompts)
    for batch in batches([len(prompt) for prompt in prompts], batch_size, split.name):
        # At the left, so that what is written follows the prompt.
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        output = evaluated.model.generate(**padded.to(device), generation_config=config)
        texts = tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            written[index] = extracted(text, split.extract)
    return generation_rows(written, [str(text) for text in rows[split.reference_column]])


def extracted(text: str, pattern: str | None) -> str:
    """The part of a text that is compared: the pattern's first group or whole match; nothing where it does not match.

    Example:
        >>> extracted("The answer is 42.", r"(\\d+)"), extracted("none", r"(\\d+)"), extracted(" as it is ", None)
        ('42', '', ' as it is ')
    """
    if pattern is None:
        return text
    match = re.search(pattern, text)
    return "" if match is None else match.group(1 if match.re.groups else 0) or ""


# ---- classifiers -----------------------------------------------------------------------------------------------------


def classified_rows(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit, batch_size: int) -> np.ndarray:
    """`[examples, 6]` of `classification_rows` for texts."""
    tokenizer = evaluated.processor
    labels = class_numbers(rows, split, outputs_of(evaluated.model))
    length = min((limit for limit in (split.block_size, evaluated.context) if limit), default=None)
    texts = [str(text) for text in rows[split.text_column]]
    encoded = tokenizer(texts, truncation=length is not None, max_length=length)
    sizes = [len(ids) for ids in encoded["input_ids"]]

    def inputs(batch: Sequence[int]) -> Mapping[str, torch.Tensor]:
        return tokenizer.pad({key: [value[i] for i in batch] for key, value in encoded.items()}, return_tensors="pt")

    return _classified(evaluated, inputs, labels, batches(sizes, batch_size, split.name))


def pictured_rows(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit, batch_size: int) -> np.ndarray:
    """`[examples, 6]` of `classification_rows` for pictures."""
    labels = class_numbers(rows, split, outputs_of(evaluated.model))
    mode = "L" if getattr(evaluated.model.config, "num_channels", 3) == 1 else "RGB"

    def inputs(batch: Sequence[int]) -> Mapping[str, torch.Tensor]:
        pictures = [picture.convert(mode) for picture in rows[list(batch)][split.image_column]]
        return evaluated.processor(images=pictures, return_tensors="pt")

    return _classified(evaluated, inputs, labels, batches([1] * len(rows), batch_size, split.name))


def outputs_of(model: Any) -> list[str]:
    """What a classifier calls its outputs, in their order."""
    return [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]


def _classified(
    evaluated: Evaluated,
    inputs: Callable[[Sequence[int]], Mapping[str, torch.Tensor]],
    labels: Sequence[int],
    parts: Iterator[Sequence[int]],
) -> np.ndarray:
    found = np.zeros((len(labels), 6))
    for batch in parts:
        given = {name: value.to(evaluated.device) for name, value in inputs(batch).items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(evaluated.model.dtype)
        logits = evaluated.model(**given).logits
        found[batch] = classification_rows(logits, torch.tensor([labels[i] for i in batch]).to(logits.device)).cpu()
    return found


def batches(sizes: Sequence[int], batch_size: int, name: str) -> Iterator[list[int]]:
    """Indices of examples of like size, the longest first: what does not fit into memory is known at once.

    Example:
        >>> list(batches([1, 9, 2, 8, 3], 2, "split"))
        [[1, 3], [4, 2], [0]]
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    for start in tqdm(range(0, len(order), batch_size), desc=f"evaluating {name}", unit="batch", leave=False):
        yield order[start : start + batch_size]


ROWS: Mapping[str, Callable[[Evaluated, datasets.Dataset, SuiteSplit, int], np.ndarray]] = {
    "causal_lm": language_rows,
    "generation": written_rows,
    "sequence_classification": classified_rows,
    "image_classification": pictured_rows,
}
