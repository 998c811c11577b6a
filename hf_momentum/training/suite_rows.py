"""From a split of a suite to one row of numbers for each of its examples: load, tokenize, run the model, count."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import GenerationConfig

from hf_momentum.errors import InputError
from hf_momentum.evaluation.corruptions import corrupt
from hf_momentum.evaluation.metrics import token_statistics
from hf_momentum.evaluation.scores import classification_rows, generation_rows
from hf_momentum.evaluation.suite import CLASSIFIERS, Suite, SuiteSplit, overridden_sources, read_suite
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import Examples, on_device, picture_examples, text_examples, window_examples
from hf_momentum.training.recipe import find_shipped
from hf_momentum.training.sources import Source, as_texts

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
    if split.task != "image_classification":
        text = _columns(split)[0]
        as_texts(rows[text], text, f"split {split.name!r}: {split.source}")
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


# ---- language models -------------------------------------------------------------------------------------------------


def language_rows(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit, batch_size: int) -> np.ndarray:
    """`[documents, 4]`: summed negative log-likelihood (nats), tokens, tokens predicted right, UTF-8 bytes."""
    examples = window_examples(evaluated, rows, split)
    found = np.zeros((len(rows), 4))
    found[:, 3] = [len(str(text).encode()) for text in rows[split.text_column]]
    for batch in batches(examples.sizes, batch_size, split.name):
        given, targets = on_device(evaluated, examples.inputs(batch)), examples.targets(batch).to(evaluated.device)
        logits = evaluated.model(**given).logits
        for place, index in enumerate(batch):
            # One at a time: float32 logits of a whole batch may not fit beside the model.
            counted = token_statistics(logits[place : place + 1], targets[place : place + 1])
            found[examples.rows[index], :3] += counted[0].cpu().numpy()
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
    return _classified(evaluated, text_examples(evaluated, rows, split), split, batch_size)


def pictured_rows(evaluated: Evaluated, rows: datasets.Dataset, split: SuiteSplit, batch_size: int) -> np.ndarray:
    """`[examples, 6]` of `classification_rows` for pictures."""
    return _classified(evaluated, picture_examples(evaluated, rows, split), split, batch_size)


def _classified(evaluated: Evaluated, examples: Examples, split: SuiteSplit, batch_size: int) -> np.ndarray:
    found = np.zeros((len(examples), 6))
    for batch in batches(examples.sizes, batch_size, split.name):
        logits = evaluated.model(**on_device(evaluated, examples.inputs(batch))).logits
        found[batch] = classification_rows(logits, examples.targets(batch).to(logits.device)).cpu()
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
