"""Training, validation and test rows out of one split, so that no row that is tested on is trained on."""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from hf_momentum.errors import InputError
from hf_momentum.training.look import LEAST_ROWS, Look, check_labels

# Out of a hundred rows; the rest is trained on.
VALIDATION, TEST = 10, 10

# A text shorter than this may well come twice by chance: a blank line, "ok".
_TELLING = 30


@dataclass(frozen=True)
class Parts:
    """SOURCE@SPLIT for training, validation and test.

    Attributes:
        train: what is trained on.
        validation: what is looked at during training.
        test: what is reported.
        files: rows that have to be written for that, by path.
        notes: what the user should know of it.
    """

    train: str
    validation: str
    test: str
    files: Mapping[Path, datasets.Dataset] = field(default_factory=dict)
    notes: Sequence[str] = ()


def parts_of(place: str, data: Mapping[str, datasets.Dataset], look: Look, folder: Path) -> Parts:
    """Use the splits that are there, and cut what is missing off the end of train.

    Where the end of train is not like the rest of it, or a cut would leave the same text on both sides, train is
    shuffled into files of its own.

    Args:
        place: as the user named the data.
        data: its splits, with train.
        look: what they are for.
        folder: for those files.

    Raises:
        InputError: too few rows, or labels that cannot be used.

    Example:
        >>> rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(40)]})
        >>> parts = parts_of("mine.jsonl", {"train": rows}, Look("causal_lm", text="text"), Path("mine_data"))
        >>> parts.train, parts.validation, parts.test
        ('mine.jsonl@train[:80%]', 'mine.jsonl@train[80%:90%]', 'mine.jsonl@train[90%:]')
    """
    test = _usable(data, look, ("test", "validation", "dev"))
    validation = _usable(data, look, tuple(name for name in ("validation", "dev", "valid") if name != test))
    cut = [size for size, there in ((VALIDATION, validation), (TEST, test)) if there is None]
    notes = _shared(data["train"], {name: data[name] for name in (validation, test) if name}, look)
    if not cut:
        return Parts(f"{place}@train", f"{place}@{validation}", f"{place}@{test}", notes=notes)
    rows = data["train"]
    if len(rows) < LEAST_ROWS:
        raise InputError(
            f"{place!r} has {len(rows)} rows to train on, and at least {LEAST_ROWS} are needed to set some apart for "
            "validation and test; give more rows, or shorter documents"
        )
    bounds = [100 - sum(cut), *([100 - cut[-1]] if len(cut) == 2 else []), 100]
    reasons = obstacles(rows, look, bounds)
    if not reasons:
        pieces = [f"{place}@train[:{bounds[0]}%]"]
        pieces += [
            f"{place}@train[{low}%:{'' if high == 100 else f'{high}%'}]" for low, high in itertools.pairwise(bounds)
        ]
        return _assembled(place, pieces, validation, test, {}, notes)
    files: dict[Path, datasets.Dataset] = {}
    names = ["train", *(name for name, there in (("validation", validation), ("test", test)) if there is None)]
    ending = "parquet" if look.task == "image_classification" else "jsonl"
    for name, indices in zip(names, shuffled(rows, look, [size / 100 for size in cut]), strict=True):
        if not indices:
            raise InputError(
                f"{place!r} has too few different rows to set some apart for {name}; give more rows, or fewer classes"
            )
        files[folder / f"{name}.{ending}"] = rows.select(indices)
    pieces = [f"{path}@{path.stem}" for path in files]
    why = f"{'; '.join(reasons)}: shuffled files were written to {folder}"
    return _assembled(place, pieces, validation, test, files, [*notes, why])


def obstacles(rows: datasets.Dataset, look: Look, bounds: Sequence[int]) -> list[str]:
    """Why cutting at these percentages would not give parts that are alike and apart; empty if it would.

    Example:
        >>> rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(40)], "label": [0] * 20 + [1] * 20})
        >>> obstacles(rows, Look("sequence_classification", text="text", label="label"), [80, 90, 100])
        ['the rows are ordered by label']
    """
    found = []
    ends = [round(len(rows) * bound / 100) for bound in bounds]
    if look.label:
        labels = check_labels(rows, look.label, "train")
        if is_ordered(labels):
            found.append(f"the rows are ordered by {look.label}")
        elif set(labels[: ends[0]]) != set(labels):
            found.append("some class is not among the first rows")
    keys = _keys(rows, look)
    sides: dict[str, set[int]] = defaultdict(set)
    for index, key in enumerate(keys):
        sides[key].add(next(side for side, end in enumerate(ends) if index < end))
    doubled = sum(len(where) > 1 for where in sides.values())
    if doubled:
        found.append(f"{doubled} texts occur more than once and would be on both sides of a cut")
    return found


def is_ordered(labels: Sequence[Any]) -> bool:
    """Whether equal labels stand together far more than by chance: less than half the runs of a random order.

    Example:
        >>> is_ordered([0, 0, 0, 0, 1, 1, 1, 1]), is_ordered([0, 1, 1, 0, 1, 0, 0, 1])
        (True, False)
    """
    runs = 1 + sum(first != second for first, second in itertools.pairwise(labels))
    size = len(labels)
    expected = 1 + size - sum(count * count for count in Counter(labels).values()) / size
    return runs < expected / 2


def shuffled(rows: datasets.Dataset, look: Look, shares: Sequence[float]) -> list[list[int]]:
    """Row numbers of train and of one part for each share, drawn within each class; equal texts stay together.

    Example:
        >>> rows = datasets.Dataset.from_dict({"text": list("aabbccddee"), "label": [0] * 6 + [1] * 4})
        >>> train, test = shuffled(rows, Look("sequence_classification", text="text", label="label"), [0.4])
        >>> len(train), len(test), sorted(train + test) == list(range(10))
        (6, 4, True)
    """
    keys = _keys(rows, look, telling=0) or [str(index) for index in range(len(rows))]
    labels = list(rows[look.label]) if look.label else [0] * len(rows)
    together: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        together[key].append(index)
    of_class: dict[Any, list[list[int]]] = defaultdict(list)
    for group in together.values():
        of_class[labels[group[0]]].append(group)
    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    given, seen = [0] * len(parts), 0
    draw = random.Random(0)
    for groups in of_class.values():
        draw.shuffle(groups)
        start, seen = 0, seen + len(groups)
        for part, share in enumerate(shares, start=1):
            # What is due of all classes so far: rounded for each, small classes would give nothing. One at least is
            # trained on.
            count = max(0, min(round(share * seen) - given[part], len(groups) - start - 1))
            parts[part] += [index for group in groups[start : start + count] for index in group]
            start, given[part] = start + count, given[part] + count
        parts[0] += [index for group in groups[start:] for index in group]
    for part in parts:
        draw.shuffle(part)
    return parts


def write_parts(files: Mapping[Path, datasets.Dataset]) -> None:
    """Write the rows of `Parts.files`, each file whole or not at all."""
    for path, rows in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        if path.suffix == ".parquet":
            rows.to_parquet(str(partial))
        else:
            rows.to_json(str(partial), force_ascii=False)
        partial.replace(path)


def _keys(rows: datasets.Dataset, look: Look, telling: int = _TELLING) -> list[str]:
    """What makes two rows the same; a short text counts as different from every other."""
    return [
        text if len(text) >= telling else f"\0{index}"
        for index, text in enumerate(text.strip() for text in look.inputs(rows))
    ]


def _usable(data: Mapping[str, datasets.Dataset], look: Look, names: Sequence[str]) -> str | None:
    """The first of these splits that is there and has labels that training has, too."""
    for name in names:
        if name in data and (not look.label or set(data[name][look.label]) <= set(data["train"][look.label])):
            return name
    return None


def _shared(train: datasets.Dataset, others: Mapping[str, datasets.Dataset], look: Look) -> list[str]:
    known = set(_keys(train, look))
    notes = []
    for name, rows in others.items():
        again = sum(key in known for key in _keys(rows, look) if not key.startswith("\0"))
        if again:
            notes.append(f"{again} texts of the split {name} are also in train, so its figures will flatter the model")
    return notes


def _assembled(
    place: str,
    pieces: Sequence[str],
    validation: str | None,
    test: str | None,
    files: Mapping[Path, datasets.Dataset],
    notes: Sequence[str],
) -> Parts:
    train, *rest = pieces
    first = rest.pop(0) if validation is None else f"{place}@{validation}"
    second = rest.pop(0) if test is None else f"{place}@{test}"
    return Parts(train, first, second, files, notes)
