"""What somebody's data are: their splits and columns, the task that they are for, and how long their texts are."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_momentum.errors import InputError, nearest
from hf_momentum.training.sources import NETWORK_ERRORS, READERS, TRL_COLUMNS, Source

# Names that people give to columns, the surest first.
_TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "document",
    "body",
    "comment",
    "tweet",
    "message",
    "question",
    "prompt",
)
_LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "rating", "stars", "y")
_IMAGES = ("image", "img", "picture", "photo")

# More values than this are hardly classes, whatever the column is called; nor are more numbers with decimals than this,
# or values most of which come once only.
MOST_CLASSES, _MOST_DECIMALS = 200, 10
_SAMPLE = 1000

# Fewer rows to train on cannot be parted.
LEAST_ROWS = 20

# A word is about so many tokens in English, where no tokenizer can be asked.
TOKENS_PER_WORD = 1.4

# What is asked where the data leave more than one answer: (flag, candidates) -> the chosen one.
Choose = Callable[[str, Sequence[str]], str]


@dataclass(frozen=True)
class Look:
    """What a dataset is for.

    Attributes:
        task: a task of recipes.
        text: column with the text; empty where the task has none.
        label: column with the class; empty where the task has none.
        image: column with the picture; empty where the task has none.
        why: how the task was found, in words.
    """

    task: str
    text: str = ""
    label: str = ""
    image: str = ""
    why: str = ""

    def inputs(self, rows: datasets.Dataset) -> list[str]:
        """What of each row the model is shown, as text; pictures are not read, so there are none for them.

        Example:
            >>> rows = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
            >>> Look("sequence_classification", text="text", label="label").inputs(rows)
            ['a']
        """
        if self.task == "image_classification":
            return []
        if self.text:
            return [str(text) for text in rows[self.text]]
        kept = rows.select_columns([name for name in _SPOKEN if name in rows.features])
        return ["\n".join(_spoken(value) for value in row.values()) for row in kept]

    def sequences(self, rows: datasets.Dataset, tokenizer: Any = None) -> list[str]:
        """What the model reads at once of each of a sample of rows: of a pair the longer side, of a conversation all
        that the tokenizer's chat template writes.

        Example:
            >>> rows = datasets.Dataset.from_dict({"prompt": ["why? "], "chosen": ["because"], "rejected": ["no"]})
            >>> Look("preference").sequences(rows)
            ['why? because']
        """
        sample = rows.select(range(0, len(rows), max(1, len(rows) // _SAMPLE)))
        if self.task not in TRL_COLUMNS:
            return self.inputs(sample)
        return [max((_written(said, tokenizer) for said in _conversations(row)), key=len) for row in sample]


def open_data(place: str) -> dict[str, datasets.Dataset]:
    """Every split of a file, a folder, a Hub dataset or `stdlib:NAME`; a file is one split, train.

    Raises:
        InputError: it does not exist, cannot be read or reached, or has no train split.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     print("text\\nsome words", file=file, flush=True)
        ...     sorted(open_data(file.name))
        ['train']
    """
    if place.startswith("stdlib:"):
        return {split: Source(place, split).load() for split in ("train", "validation", "test")}
    name, _, config = place.partition(":")
    path = Path(place).expanduser()
    names = ["train"]
    if path.suffix == ".csv" and path.is_file():
        _check_separator(place, path)
    if path.is_dir() or path.suffix not in READERS:
        try:
            names = datasets.get_dataset_split_names(*([str(path)] if path.is_dir() else [name, config or None]))
        except (*NETWORK_ERRORS, ValueError, FileNotFoundError):
            names = ["train"]  # loading it says what is wrong
        if "train" not in names:
            raise InputError(f"{place!r} has no train split; it has {', '.join(names)}. Name a file with --data")
    data = {split: Source(place, split).load() for split in names}
    for split, rows in data.items():
        if len(rows) == 0:
            raise InputError(f"{place!r} has no rows in its split {split}")
    return data


def look_at(
    rows: datasets.Dataset,
    choose: Choose,
    task: str | None = None,
    text: str | None = None,
    label: str | None = None,
    image: str | None = None,
) -> Look:
    """The task that rows are for, and the columns that it takes.

    Args:
        rows: of the train split.
        choose: asked where several columns would do.
        task: known already.
        text: known already.
        label: known already.
        image: known already.

    Raises:
        InputError: a column that does not exist, or no column that the task could take.

    Example:
        >>> rows = datasets.Dataset.from_dict({"review": ["good film", "bad film"] * 9, "stars": [1, 0] * 9})
        >>> look = look_at(rows, choose=refuse)
        >>> look.task, look.text, look.label
        ('sequence_classification', 'review', 'stars')
    """
    for flag, column in (("text_column", text), ("label_column", label), ("image_column", image)):
        if column is not None and column not in rows.features:
            hint = nearest(column, rows.features)
            raise InputError(f"--{flag} {column!r} does not exist{hint}; the columns are {', '.join(rows.features)}")
    why = f"task {task} was asked for"
    if task is None:
        task, why = _task_of(rows, text, label, image)
    if task in TRL_COLUMNS:
        if not any(set(columns) <= set(rows.features) for columns in TRL_COLUMNS[task]):
            ways = " or ".join(" with ".join(columns) for columns in TRL_COLUMNS[task])
            raise InputError(f"task {task} takes the columns {ways}; these data have {', '.join(rows.features)}")
        return Look(task, why=why)
    if task == "image_classification":
        image = image or _one("image_column", _named_first(_images(rows), _IMAGES), choose, rows)
        label = label or _one("label_column", _labels(rows, {image}), choose, rows)
        return Look(task, label=label, image=image, why=why)
    if task == "sequence_classification":
        label = label or _one("label_column", _labels(rows, {text or ""}), choose, rows)
        return Look(task, text=text or _text(rows, {label}, choose), label=label, why=why)
    return Look(task, text=text or _text(rows, set(), choose), why=why)


def refuse(flag: str, candidates: Sequence[str]) -> str:
    """The answer where nobody can be asked.

    Raises:
        InputError: always; it names the flag and the candidates.

    Example:
        >>> refuse("label_column", ["stars", "topic"])
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: several columns would do: stars, topic; choose one with --label_column NAME
    """
    raise InputError(f"several columns would do: {', '.join(candidates)}; choose one with --{flag} NAME")


def check_labels(rows: datasets.Dataset, label: str, split: str) -> list[Any]:
    """The label of each row.

    Raises:
        InputError: a row without one or with several, a single class, far too many, or numbers that measure something.

    Example:
        >>> check_labels(datasets.Dataset.from_dict({"label": [0, 1, 1]}), "label", "train")
        [0, 1, 1]
    """
    labels = list(rows[label])
    if any(isinstance(value, list | dict) for value in labels):
        raise InputError(
            f"column {label!r} holds several values in a row, and a class is one; keep one of them, or {_ELSE}"
        )
    _refuse_missing(labels, label, split)
    classes = len(set(labels))
    if split == "train" and classes < 2:
        raise InputError(
            f"column {label!r} holds a single class, {labels[0]!r}; there is nothing to tell apart: {_ELSE}"
        )
    if classes > _MOST_DECIMALS and any(isinstance(value, float) and not value.is_integer() for value in labels):
        raise InputError(
            f"column {label!r} holds {classes} different numbers: a quantity, which no task here predicts; make a few "
            f"classes of it, or {_ELSE}"
        )
    rare = split == "train" and len(labels) >= LEAST_ROWS and classes * 2 > len(labels)
    if classes > MOST_CLASSES or rare:
        raise InputError(
            f"column {label!r} holds {classes} different values in {len(labels)} rows: hardly classes; {_ELSE}"
        )
    return labels


_ELSE = "name another with --label_column, or train on the text alone with --task causal_lm"


def check_texts(rows: datasets.Dataset, text: str, split: str) -> None:
    """Look for rows without a text, which would be read as the word None.

    Raises:
        InputError: there are some.

    Example:
        >>> check_texts(datasets.Dataset.from_dict({"text": ["one", ""]}), "text", "train")
    """
    _refuse_missing([0 if value is not None else None for value in rows[text]], text, split)


def _refuse_missing(values: Sequence[Any], column: str, split: str) -> None:
    missing = sum(map(_is_missing, values))
    if missing:
        raise InputError(
            f"column {column!r} is empty in {missing} of {len(values)} rows of {split}; fill them in, or remove them "
            "(in a .csv or .tsv file NA, None and null are read as empty)"
        )


def lengths(inputs: Sequence[str], tokenizer: Any = None) -> list[int]:
    """Tokens of a sample of the inputs, shortest first; without a tokenizer guessed from their words.

    Example:
        >>> lengths(["one two three four five", "one"])
        [2, 7]
    """
    step = max(1, len(inputs) // _SAMPLE)
    sample = [text[:100_000] for text in inputs[::step][:_SAMPLE]]
    if tokenizer is None:
        return sorted(math.ceil(len(text.split()) * TOKENS_PER_WORD) for text in sample)
    return sorted(len(ids) for ids in tokenizer(sample, verbose=False)["input_ids"]) if sample else []


def percentile(ordered: Sequence[int], share: float) -> int:
    """The value below which that share of them lies.

    Example:
        >>> percentile([1, 2, 3, 4], 0.5)
        2
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# ---- which column is what -------------------------------------------------------------------------------------------


def _task_of(rows: datasets.Dataset, text: str | None, label: str | None, image: str | None) -> tuple[str, str]:
    names = set(rows.features)
    if {"chosen", "rejected"} <= names:
        return "preference", "it has the columns chosen and rejected"
    for name in ("messages", "conversations"):
        if name in names:
            return "chat", f"it has a column {name}"
    if {"prompt", "completion"} <= names:
        return "chat", "it has the columns prompt and completion"
    if image or _images(rows):
        return "image_classification", f"{image or _images(rows)[0]} holds pictures"
    found = [label] if label else _labels(rows, {text or ""}) if len(names) > 1 else []
    if len(found) > 1:
        return "sequence_classification", f"{', '.join(found)} look like classes"
    if found:
        return "sequence_classification", f"{found[0]} holds {len(set(check_labels(rows, found[0], 'train')))} classes"
    return "causal_lm", "it has text and no column that looks like a class"


def _images(rows: datasets.Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]


def _texts(rows: datasets.Dataset) -> list[str]:
    return [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.Value) and "string" in str(feature.dtype)
    ]


def _labels(rows: datasets.Dataset, taken: set[str]) -> list[str]:
    """Columns that look like classes, one with a telling name alone if there is any; even one that `check_labels` will
    refuse, since to leave out a column `label` in silence would be worse."""
    found, doubtful = [], []
    sample = rows.select(range(0, len(rows), max(1, len(rows) // 20_000)))
    for name, feature in rows.features.items():
        if name in taken:
            continue
        if isinstance(feature, datasets.ClassLabel):
            found.append(name)
            continue
        values = list(sample[name])
        if isinstance(feature, datasets.Value) and _is_countable(str(feature.dtype)) and not _is_long(values):
            distinct = len(set(values))
            if 2 <= distinct <= MOST_CLASSES and distinct * 5 <= len(values):
                found.append(name)
                continue
        if name.lower() in _LABELS and not _is_long(values):
            doubtful.append(name)
    named = _named_first(found, _LABELS)
    return _named_first(doubtful, _LABELS) if doubtful and not (named and named[0].lower() in _LABELS) else named


def _text(rows: datasets.Dataset, taken: set[str], choose: Choose) -> str:
    found = [name for name in _texts(rows) if name not in taken]
    named = _named_first(found, _TEXTS)
    if len(named) > 1:
        means = {name: _mean_length(rows, name) for name in named}
        longest = max(means, key=means.__getitem__)
        # A title beside a body is no doubt; two bodies are.
        if all(means[name] * 3 <= means[longest] for name in named if name != longest):
            return longest
    return _one("text_column", named, choose, rows)


def _one(flag: str, candidates: Sequence[str], choose: Choose, rows: datasets.Dataset) -> str:
    if not candidates:
        raise InputError(
            f"no column looks right for --{flag}; name one of {', '.join(rows.features)}, or another task with --task"
        )
    return candidates[0] if len(candidates) == 1 else choose(flag, candidates)


def _named_first(found: list[str], telling: Sequence[str]) -> list[str]:
    lowered = {name.lower(): name for name in found}
    return next(([lowered[name]] for name in telling if name in lowered), found)


def _mean_length(rows: datasets.Dataset, name: str) -> float:
    sample = [str(text) for text in rows[name][:200]]
    return sum(map(len, sample)) / max(len(sample), 1)


def _is_countable(dtype: str) -> bool:
    return "string" in dtype or dtype.startswith(("int", "uint", "bool"))


def _is_long(values: Sequence[Any]) -> bool:
    words = [len(value.split()) for value in values[:200] if isinstance(value, str)]
    return bool(words) and sum(words) / len(words) > 6


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _spoken(value: Any) -> str:
    """The text of a message, of a list of messages, or of a string."""
    if isinstance(value, Mapping):
        content, calls = value.get("content", value.get("value")), value.get("tool_calls")
        words = [] if content is None else [content if isinstance(content, str) else json.dumps(content, default=str)]
        return "\n".join([*words, json.dumps(calls, default=str)] if calls else words)
    return "\n".join(map(_spoken, value)) if isinstance(value, list) else str(value)


def _conversations(row: Mapping[str, Any]) -> list[Any]:
    """Each sequence that TRL makes of a row: a list of messages, or a string."""
    if "chosen" in row:
        return [_joined(row.get("prompt"), row["chosen"]), _joined(row.get("prompt"), row["rejected"])]
    whole = next((row[name] for name in ("messages", "conversations") if name in row), None)
    if whole is not None:
        return [whole]
    return [_joined(row["prompt"], row["completion"]) if "completion" in row else row["text"]]


def _joined(prompt: Any, answer: Any) -> Any:
    """Prompt and answer, two lists of messages or two strings."""
    if prompt is None:
        return answer
    if isinstance(prompt, list) and isinstance(answer, list):
        return [*prompt, *answer]
    return _spoken(prompt) + _spoken(answer)


def _written(said: Any, tokenizer: Any) -> str:
    """A conversation as a chat template writes it; its words alone where there is none, or it wants another form."""
    if isinstance(said, list) and getattr(tokenizer, "chat_template", None):
        messages = [
            {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
            if "from" in message
            else {key: value for key, value in message.items() if value is not None}
            for message in said
        ]
        with contextlib.suppress(Exception):  # a template raises what it likes
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return _spoken(said)


# Columns of conversations, and what other formats call their speakers.
_SPOKEN = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "text")
_ROLES = {"human": "user", "gpt": "assistant"}


def _check_separator(place: str, path: Path) -> None:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in header and "," not in header:
            raise InputError(
                f"{place} is separated by {name}; save it with commas"
                + (", or with the ending .tsv" if name == "tabs" else "")
            )
