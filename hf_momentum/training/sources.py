"""From `SOURCE@SPLIT` to examples that a Trainer takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.errors

from hf_momentum.errors import InputError
from hf_momentum.evaluation.results import Role
from hf_momentum.training import corpus
from hf_momentum.training.arguments import TRL_TASKS, DataArguments
from hf_momentum.training.recipe import OFFLINE_RECIPE, split_name

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}

# Any of these sets of columns will do.
TRL_COLUMNS = {
    "chat": (("messages",), ("conversations",), ("prompt", "completion"), ("text",)),
    "preference": (("chosen", "rejected"),),
}

# What an unreachable or unknown Hub dataset raises, depending on where it fails.
NETWORK_ERRORS = (
    huggingface_hub.errors.HfHubHTTPError,
    huggingface_hub.errors.LocalEntryNotFoundError,
    huggingface_hub.errors.OfflineModeIsEnabled,
    huggingface_hub.errors.HFValidationError,
    ConnectionError,
    datasets.exceptions.DatasetNotFoundError,
)


@dataclass(frozen=True)
class Source:
    """Where rows come from: `stdlib:code`, a file, a folder or a Hub dataset, and which split of it.

    Example:
        >>> Source.parse("stdlib:code@test")
        Source(place='stdlib:code', split='test')
        >>> Source.parse("owner/name:config@validation[:100]")
        Source(place='owner/name:config', split='validation[:100]')
    """

    place: str
    split: str

    @staticmethod
    def parse(text: str) -> "Source":
        """Part SOURCE from SPLIT, which is train unless given."""
        place, separator, split = text.rpartition("@")
        return Source(place, split) if separator else Source(text, "train")

    def load(self) -> datasets.Dataset:
        """The rows.

        Raises:
            InputError: the file does not exist or cannot be read, or the Hub cannot be reached.
        """
        if self.place.startswith("stdlib:"):
            return datasets.Dataset.from_dict(
                {"text": corpus.stdlib_texts(self.place.removeprefix("stdlib:"), self.split)}
            )
        path = Path(self.place).expanduser()
        if path.suffix in READERS:
            if not path.is_file():
                raise InputError(f"dataset file {self.place} does not exist")
            if path.stat().st_size == 0:
                raise InputError(f"dataset {self.place!r} is empty")
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            return self._read(READERS[path.suffix], data_files={self.split.split("[")[0]: str(path)}, **options)
        if path.is_dir():
            return self._read(str(path))
        if path.is_file():
            raise InputError(f"dataset file {self.place} has an ending that is not read; take {', '.join(READERS)}")
        name, _, config = self.place.partition(":")
        return self._read(name, *([config] if config else []))

    def _read(self, *args: str, **kwargs: Any) -> datasets.Dataset:
        try:
            return datasets.load_dataset(*args, split=self.split, **kwargs)
        except NETWORK_ERRORS as error:
            raise InputError(
                f"dataset {self.place!r} is neither a file here nor reachable on the Hub ({type(error).__name__}). "
                f"Without a network, {OFFLINE_RECIPE} runs on text that comes with Python"
            ) from error
        except (ValueError, datasets.exceptions.DatasetGenerationError, FileNotFoundError) as error:
            cause = error.__cause__ or error
            if "corresponds to no data" in str(error):  # how datasets says that a split has no row
                raise InputError(f"dataset {self.place!r} is empty") from error
            raise InputError(
                f"dataset {self.place!r} cannot be read: {' '.join(str(cause).split())}{_remedy(cause)}"
            ) from error


def _as_trl_calls_them(rows: datasets.Dataset) -> datasets.Dataset:
    """TRL takes `conversations` of {from, value} alone; those of {role, content} it knows as `messages`."""
    if "conversations" not in rows.column_names or "messages" in rows.column_names or len(rows) == 0:
        return rows
    roles = any("role" in turn for turn in rows[0]["conversations"])
    return rows.rename_column("conversations", "messages") if roles else rows


def _remedy(cause: BaseException) -> str:
    """The next step, for what is often wrong with a file."""
    if isinstance(cause, UnicodeDecodeError):
        return "; save it as UTF-8"
    return "; put texts that contain commas into quotes" if "Error tokenizing data" in str(cause) else ""


@dataclass(frozen=True)
class Split:
    """Examples ready for a model, and what they stand for.

    Attributes:
        name: how reports call it.
        role: "training", "auxiliary training", "validation", "in distribution", "shifted", "must not forget" or
            "auxiliary".
        source: as written in the recipe.
        examples: rows with `input_ids` and `labels`, or with `pixel_values` and `labels`; for TRL's trainers, rows as
            they were read, which those tokenize.
        bytes_per_token: UTF-8 bytes per token of the text, for figures that do not depend on the tokenizer; 1 where
            there is no text of its own.
    """

    name: str
    role: str
    source: str
    examples: datasets.Dataset
    bytes_per_token: float


def named_splits(data: DataArguments) -> list[tuple[Role, str, str]]:
    """Role, name and source of each evaluation split, in the recipe's order.

    Raises:
        InputError: an entry is not of the form NAME=SOURCE@SPLIT.

    Example:
        >>> named_splits(DataArguments(shifted=["prose=stdlib:prose@test"]))
        [('shifted', 'prose', 'stdlib:prose@test')]
    """
    roles: dict[Role, list[str]] = {
        "in distribution": data.in_distribution,
        "shifted": data.shifted,
        "must not forget": data.must_not_forget,
        "auxiliary": data.auxiliary,
    }
    return [(role, *split_name(entry)) for role, entries in roles.items() for entry in entries]


class Loader:
    """Loads splits for one task, with one tokenizer.

    Args:
        task: of a recipe.
        data: the recipe's data fields.
        processor: any fast tokenizer; for pictures an image processor.
        seed: which training examples are kept where their number is limited. Of evaluation splits the same ones are
            kept whatever the seed: else the choice would widen every interval over seeds.
        picture_mode: what pictures are converted to.

    Attributes:
        classes: of a classifier, as the training data's label column has them; empty before `training`.
        class_names: what they are called, in the same order.
    """

    def __init__(self, task: str, data: DataArguments, processor: Any, seed: int, picture_mode: str = "RGB") -> None:
        self.task, self.data, self.processor, self.seed = task, data, processor, seed
        self.picture_mode = picture_mode
        self.classes: list[Any] = []
        self.class_names: list[str] = []

    def training(self) -> Split:
        """The training split; for classification it also fixes the set of classes.

        Raises:
            InputError: the data lack a column, are empty, or hold a single class.
        """
        rows = self._rows(self.data.train_dataset)
        if self._classifies:
            self.classes = sorted(set(rows[self.data.label_column]))
            if len(self.classes) < 2:
                raise InputError(f"{self.data.train_dataset}: column {self.data.label_column!r} holds a single class")
            feature = rows.features[self.data.label_column]
            named = isinstance(feature, datasets.ClassLabel)
            self.class_names = [feature.names[value] if named else str(value) for value in self.classes]
        return self._split("train", "training", self.data.train_dataset, rows, self.data.max_train_examples)

    def auxiliaries(self, entries: Sequence[str], most: int | None) -> list[Split]:
        """The auxiliary training data, in order of priority; at most `most` examples of each."""
        named = [split_name(entry) for entry in entries]
        return [self._split(name, "auxiliary training", source, self._rows(source), most) for name, source in named]

    def validation(self) -> Split | None:
        """The validation split, if the recipe names one."""
        source = self.data.validation_dataset
        if source is None:
            return None
        return self._split("validation", "validation", source, self._rows(source), self.data.max_eval_examples)

    def evaluation(self) -> list[Split]:
        """All named splits, in the recipe's order."""
        splits: list[Split] = []
        for role, name, source in named_splits(self.data):
            if name in [split.name for split in splits]:
                raise InputError(f"two splits are called {name!r}")
            splits.append(self._split(name, role, source, self._rows(source), self.data.max_eval_examples))
        return splits

    def _rows(self, source: str) -> datasets.Dataset:
        rows = Source.parse(source).load()
        there = ", ".join(rows.column_names) or "none"
        if self.task in TRL_TASKS:
            if not any(set(columns) <= set(rows.column_names) for columns in TRL_COLUMNS[self.task]):
                ways = " or ".join(" with ".join(columns) for columns in TRL_COLUMNS[self.task])
                raise InputError(
                    f"dataset {source!r} has none of the columns that {self.task} takes: {ways}; it has {there}"
                )
            if len(rows) == 0:
                raise InputError(f"dataset {source!r} is empty")
            _check_turns(source, self.task, rows[0])
            rows = _as_trl_calls_them(rows)
            return _with_one_prompt(source, rows) if self.task == "preference" else rows
        which = "image_column" if self.task == "image_classification" else "text_column"
        wanted = [getattr(self.data, which), *([self.data.label_column] if self._classifies else [])]
        for column in wanted:
            if column not in rows.column_names:
                raise InputError(
                    f"dataset {source!r} has no column {column!r}; it has {there}. Set {which} or label_column"
                )
        if len(rows) == 0:
            raise InputError(f"dataset {source!r} is empty")
        return rows

    def _split(self, name: str, role: str, source: str, rows: datasets.Dataset, most: int | None) -> Split:
        seed = self.seed if role.endswith("training") else 0
        makers = {
            "causal_lm": self._blocks,
            "sequence_classification": self._classified,
            "image_classification": self._pictured,
        }
        examples = makers[self.task](rows, source) if self.task in makers else rows
        if most is not None and most < len(examples):
            examples = examples.shuffle(seed=seed).select(range(most))
        return Split(name, role, source, examples, self._bytes_per_token(rows) if self.task == "causal_lm" else 1.0)

    @property
    def _classifies(self) -> bool:
        return self.task.endswith("classification")

    def _bytes_per_token(self, rows: datasets.Dataset) -> float:
        sample = [str(text) for text in rows[:200][self.data.text_column]]
        tokens = sum(len(ids) for ids in self.processor(sample, add_special_tokens=False, verbose=False)["input_ids"])
        return sum(len(text.encode()) for text in sample) / max(tokens, 1)

    def _blocks(self, rows: datasets.Dataset, source: str) -> datasets.Dataset:
        """Documents end to end, parted by the end token, cut into blocks of equal length; a thousand at a time."""
        tokenizer, end = self.processor, self.processor.eos_token_id
        size, column = self.data.block_size, self.data.text_column

        def pack(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
            stream: list[int] = []
            texts = as_texts(batch[column], column, f"dataset {source!r}")
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                stream += ids
                if ids and end is not None:  # an empty row is no document
                    stream.append(end)
            blocks = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
            return {"input_ids": blocks, "labels": blocks}

        examples = self._mapped(rows, pack, source)
        if len(examples) == 0:
            raise InputError(f"dataset {source!r} holds less than one block of {size} tokens; lower block_size")
        return examples

    def _classified(self, rows: datasets.Dataset, source: str) -> datasets.Dataset:
        tokenizer, length = self.processor, self.data.block_size
        column, label, index = self.data.text_column, self.data.label_column, self._places(rows, source)

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            encoded = tokenizer(
                as_texts(batch[column], column, f"dataset {source!r}"), truncation=True, max_length=length
            )
            return {**encoded, "labels": [index[name] for name in batch[label]]}

        return self._mapped(rows, encode, source)

    def _pictured(self, rows: datasets.Dataset, source: str) -> datasets.Dataset:
        columns, index = (self.data.image_column, self.data.label_column), self._places(rows, source)
        return as_pixels(rows, *columns, index, self.processor, self.picture_mode)

    def _places(self, rows: datasets.Dataset, source: str) -> dict[Any, int]:
        """The number of the model's output for each class."""
        unknown = sorted(set(rows[self.data.label_column]) - set(self.classes), key=str)
        if unknown:
            raise InputError(f"dataset {source!r} has a class that the training data lacks: {unknown[0]!r}")
        return {name: position for position, name in enumerate(self.classes)}

    @staticmethod
    def _mapped(rows: datasets.Dataset, function: Any, source: str) -> datasets.Dataset:
        name = Path(source.partition("@")[0]).name
        return rows.map(function, batched=True, remove_columns=rows.column_names, desc=f"tokenizing {name}")


def as_texts(values: Sequence[Any], column: str, where: str) -> list[str]:
    """The texts of a column; numbers as they are written.

    Raises:
        InputError: there is none in a row, which would be read as the word None.

    Example:
        >>> as_texts(["one", 2], "text", "dataset 'a.csv@train'")
        ['one', '2']
    """
    if any(value is None for value in values):
        raise InputError(
            f"{where}: column {column!r} is empty in some rows; fill them in, or remove them (in a .csv or "
            ".tsv file NA, None and null are read as empty)"
        )
    return [str(value) for value in values]


def _check_turns(source: str, task: str, row: Mapping[str, Any]) -> None:
    """Refuse a first row that TRL would not understand, or would take for something else."""
    turns, texts = {
        "chat": (("messages", "conversations"), ("prompt", "completion")),
        "preference": ((), ("prompt", "chosen", "rejected")),
    }[task]
    for column in (*turns, *texts):
        value = row.get(column)
        listed = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
        if value is not None and not listed and not (isinstance(value, str) and column in texts):
            what = "a text or a list" if column in texts else "a list"
            raise InputError(
                f"dataset {source!r}: column {column!r} has to hold {what} of {{role, content}}, got {value!r:.60}"
            )


def _with_one_prompt(source: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Without the prompt as text where both conversations begin with it, as in the alignment handbook's data.

    TRL takes the prompt from what they have in common.
    """
    first = rows[0]
    if not (isinstance(first.get("prompt"), str) and isinstance(first["chosen"], list)):
        return rows
    if not first["chosen"] or first["chosen"][0].get("role") == "assistant":
        raise InputError(
            f"dataset {source!r}: column 'prompt' holds a text and 'chosen' a list that begins with an answer; write "
            "the prompt as a list of {role, content}, too"
        )
    return rows.remove_columns("prompt")


def as_pixels(
    rows: datasets.Dataset,
    image_column: str,
    label_column: str,
    index: Mapping[Any, int],
    processor: Any,
    mode: str = "RGB",
) -> datasets.Dataset:
    """Pictures and classes as a Trainer takes them: `pixel_values` and `labels`, made when they are read.

    Args:
        rows: with pictures, or their paths or bytes.
        image_column: what holds the picture.
        label_column: what holds the class.
        index: the number of the model's output for each class.
        processor: the image processor, which scales them.
        mode: what they are converted to before.
    """
    if not isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image())  # paths and bytes are pictures, too

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pictures = processor(images=[picture.convert(mode) for picture in batch[image_column]], return_tensors="pt")
        return {"pixel_values": list(pictures["pixel_values"]), "labels": [index[name] for name in batch[label_column]]}

    return rows.select_columns([image_column, label_column]).with_transform(encode)
