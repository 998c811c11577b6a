"""A suite inside a Trainer: its splits as `eval_dataset`, and metrics called eval_<split>_<metric>."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_momentum.errors import InputError
from hf_momentum.evaluation.metrics import causal_lm_statistics
from hf_momentum.evaluation.scores import classification_rows, scorer
from hf_momentum.evaluation.suite import Suite, SuiteSplit
from hf_momentum.training.examples import IGNORED, class_numbers, prefix_of, windows
from hf_momentum.training.sources import as_pixels
from hf_momentum.training.suite_rows import load_rows

TASKS = ("causal_lm", "sequence_classification", "image_classification")


def suite_datasets(
    suite: Suite,
    tokenizer: Any,
    outputs: Sequence[str] = (),
    block_size: int | None = None,
    picture_mode: str = "RGB",
) -> dict[str, datasets.Dataset]:
    """Every split of a suite as a Trainer takes it for `eval_dataset`.

    Texts of a language model are cut as `hf-momentum evaluate` cuts them, into windows that predict every token once,
    and filled up to the longest one of the split, so that any collator stacks them. Pictures become pixels when they
    are read, for which a Trainer needs `remove_unused_columns=False`.

    Args:
        suite: of one task: causal_lm, sequence_classification or image_classification.
        tokenizer: the model's; for pictures its image processor.
        outputs: what a classifier calls its outputs, in their order.
        block_size: the longest input; also bounded by a split's own block_size and the tokenizer's limit.
        picture_mode: what pictures are converted to; "L" for a model with one channel.

    Raises:
        InputError: a split that a Trainer cannot evaluate, or whose data cannot be used.

    Example:
        >>> from hf_momentum.training.suite_rows import load_suite
        >>> from hf_momentum.training.tokenizer import byte_tokenizer
        >>> found = suite_datasets(load_suite("stdlib", max_examples=2), byte_tokenizer(64))
        >>> len(found["prose"][0]["input_ids"]) <= 64, "typos_5" in found
        (True, True)
    """
    for split in suite.splits:
        if split.task not in TASKS or split.lm_eval is not None or split.task != suite.splits[0].task:
            what = f"the lm_eval task {split.lm_eval}" if split.lm_eval else f"of task {split.task}"
            raise InputError(
                f"suite {suite.name}: split {split.name!r} is {what}, which a Trainer does not evaluate beside the "
                "others; leave it out, and run `hf-momentum evaluate` on the trained model"
            )
    if suite.splits[0].task == "causal_lm":
        return {split.name: _windowed(split, tokenizer, block_size) for split in suite.splits}
    if suite.splits[0].task == "image_classification":
        return {split.name: _pictured(split, tokenizer, outputs, picture_mode) for split in suite.splits}
    return {split.name: _classified(split, tokenizer, outputs, block_size) for split in suite.splits}


def suite_metrics(
    suite: Suite, classes: int = 0
) -> tuple[Callable[[EvalPrediction], dict[str, float]], Callable[[Any, torch.Tensor], torch.Tensor]]:
    """`compute_metrics` and `preprocess_logits_for_metrics` of a Trainer for the splits of `suite_datasets`.

    The metrics are those of the suite's reference split. Its `loss` is called `nll`: a Trainer has a `loss` of its own,
    the mean over batches, in which short texts count for more. Bits per byte are left out: a Trainer sees no bytes.

    Example:
        >>> from hf_momentum.training.suite_rows import load_suite
        >>> compute, _ = suite_metrics(load_suite("stdlib"))
        >>> compute(EvalPrediction(np.array([[2.0, 2.0, 1.0]]), np.zeros((1, 3))))["nll"]
        1.0
    """
    split = suite.reference
    made = scorer(split.task, classes=classes, metrics=split.metrics or None)
    rows = causal_lm_statistics if split.task == "causal_lm" else classification_rows

    def compute(output: EvalPrediction) -> dict[str, float]:
        sums = made.columns(np.asarray(output.predictions, dtype=np.float64)).sum(0)
        return {
            "nll" if name == "loss" else name: float(metric(sums))
            for name, metric in made.metrics.items()
            if name != "bits_per_byte"
        }

    def counted(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return rows(logits[0] if isinstance(logits, tuple) else logits, labels)

    return compute, counted


def _length(split: SuiteSplit, tokenizer: PreTrainedTokenizerBase, block_size: int | None) -> int | None:
    # Of a tokenizer whose limit was never set it is 10^30.
    known = [limit for limit in (split.block_size, block_size, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(known, default=None)


def _windowed(split: SuiteSplit, tokenizer: PreTrainedTokenizerBase, block_size: int | None) -> datasets.Dataset:
    prefix, length = prefix_of(tokenizer), _length(split, tokenizer, block_size) or 2048
    texts = [str(text) for text in load_rows(split)[split.text_column]]
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # One less than the model takes: a Trainer feeds the last token, too.
    parts = [window for ids in documents for window in windows(ids, prefix, length - 1)]
    if not parts:
        raise InputError(f"split {split.name!r}: no text of {split.source} holds a token")
    longest = max(len(part.context) + len(part.predicted) for part in parts)
    examples: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for part in parts:
        rest = longest - len(part.context) - len(part.predicted)
        examples["input_ids"].append([*part.context, *part.predicted] + [prefix] * rest)
        examples["attention_mask"].append([1] * (longest - rest) + [0] * rest)
        examples["labels"].append([IGNORED] * len(part.context) + list(part.predicted) + [IGNORED] * rest)
    return datasets.Dataset.from_dict(examples)


def _classified(
    split: SuiteSplit, tokenizer: PreTrainedTokenizerBase, outputs: Sequence[str], block_size: int | None
) -> datasets.Dataset:
    rows, length = load_rows(split), _length(split, tokenizer, block_size)
    texts = [str(text) for text in rows[split.text_column]]
    encoded = tokenizer(texts, truncation=length is not None, max_length=length)
    return datasets.Dataset.from_dict({**encoded, "labels": class_numbers(rows, split, outputs)})


def _pictured(split: SuiteSplit, processor: Any, outputs: Sequence[str], mode: str) -> datasets.Dataset:
    rows = load_rows(split)
    index = dict(zip(rows[split.label_column], class_numbers(rows, split, outputs), strict=True))
    return as_pixels(rows, split.image_column, split.label_column, index, processor, mode)
