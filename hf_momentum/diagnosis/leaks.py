"""Examples that stand in two splits at once, and cuts of one dataset that have none.

Two examples are equal if their fingerprints are: for texts that of their words, whatever their case, punctuation and
spaces. A text of at least 13 words is contained in another split if at least 80 % of its runs of 13 words stand in
texts of that split, in one or in several. (13 words is the length that GPT-3's authors looked for in their test sets,
arXiv 2005.14165.) Both need words between spaces: of a language without them, only equal texts are found.

Everything is linear in the text: of each text a digest, its first 80 characters and 8 bytes for each word are kept.
"""

import hashlib
import math
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from hf_momentum.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Example: TypeAlias = "str | np.ndarray | Image"

_RUN = 13  # words
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a run is lost modulo 2^64
_SHOWN = 80  # characters


# ---- what is equal ---------------------------------------------------------------------------------------------------


class _Letters(dict[int, str]):
    """For `str.translate`: letters, digits and the marks on letters as they are, anything else a space.

    Without the marks, Hindi words that differ in a vowel would be equal. Variation selectors are marks by category,
    but on emojis.
    """

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        category = unicodedata.category(letter)
        selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
        kept = category[0] in "LN" or (category in ("Mn", "Mc") and not selector)
        self[code] = letter if kept else " "
        return self[code]


_LETTERS = _Letters()


def words_of(text: str) -> list[str]:
    """What a text is compared by: its words in small letters, without punctuation, in Unicode's form NFKC.

    Of a text without letters and digits, such as ":-)", the signs are its words; an empty text has none.

    Example:
        >>> words_of("  The river's  ROARING!"), words_of(":-) !"), words_of(" ")
        (['the', 'river', 's', 'roaring'], [':-)', '!'], [])
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_LETTERS).split() or folded.split()


def fingerprint(example: Example) -> bytes:
    """A digest that equal examples share.

    Of a text it is the digest of its words (see `words_of`). Of an image it is that of the type, the shape and the
    pixels of its array, so that an array and a PIL image of the same pixels are equal; palettes are looked up first.

    Raises:
        InputError: the example is neither a text nor an image.

    Example:
        >>> fingerprint("Hello, World!") == fingerprint("hello world"), fingerprint("Hello") == fingerprint("Hell o")
        (True, False)
        >>> fingerprint(np.zeros((2, 3))) == fingerprint(np.zeros((3, 2)))
        False
    """
    return _text_digest(words_of(example)) if isinstance(example, str) else _image_digest(_pixels(example))


def _text_digest(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(b"text " + " ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _image_digest(pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(f"image {pixels.dtype} {pixels.shape} ".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.digest()


def _pixels(example: object) -> np.ndarray:
    if isinstance(example, np.ndarray):
        if example.dtype.kind not in "biuf":
            raise InputError(f"an image must be an array of numbers, got {example.dtype}")
        return example
    from PIL.Image import Image

    if not isinstance(example, Image):
        raise InputError(f"leaks are looked for in texts and images (arrays or PIL), got {type(example).__name__}")
    return np.asarray(example.convert("RGBA") if example.mode == "P" else example)


# ---- what a split holds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A split as it is compared.

    Attributes:
        digests: of each row; None for an empty text, which is no example of anything.
        shown: of each row, what an error shows of it.
        runs: a hash of every run of 13 words, in the order of the rows.
        rows: the row of each run.
    """

    digests: list[bytes | None]
    shown: list[str]
    runs: np.ndarray
    rows: np.ndarray

    def totals(self, counted: np.ndarray) -> np.ndarray:
        """[rows]: how many runs of each are counted."""
        return np.bincount(self.rows[counted], minlength=len(self.digests))

    def mostly(self, counted: np.ndarray) -> np.ndarray:
        """[rows]: whether at least 80 % of its runs, and there are any, are counted."""
        every = self.totals(np.ones(len(self.rows), dtype=bool))
        mostly: np.ndarray = (every > 0) & (5 * self.totals(counted) >= 4 * every)
        return mostly


def _held(examples: Iterable[Example], hashes: dict[str, int]) -> _Held:
    """Reads a split once. `hashes` are those of single words, which all splits share."""
    digests: list[bytes | None] = []
    shown, lengths, numbers = [], [], array("Q")
    for example in examples:
        words: list[str] = []
        if isinstance(example, str):
            words = words_of(example)
            digests.append(_text_digest(words) if words else None)
            line = " ".join(example[: 5 * _SHOWN].split())
            shown.append(repr(line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"))
        else:
            pixels = _pixels(example)
            digests.append(_image_digest(pixels))
            shown.append(f"an image of {pixels.shape}")
        lengths.append(len(words))
        for word in words:
            if word not in hashes:
                data = word.encode("utf-8", "surrogatepass")
                hashes[word] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            numbers.append(hashes[word])
    return _Held(digests, shown, *_runs(np.array(numbers, dtype=np.uint64), np.array(lengths, dtype=np.int64)))


def _runs(numbers: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of 13 words inside one row, and the row of each; by Horner's rule modulo 2^64."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    count = max(0, len(numbers) - _RUN + 1)
    runs = np.zeros(count, dtype=np.uint64)
    for place in range(_RUN if count else 0):
        runs = runs * _BASE + numbers[place : place + count]
    inside = rows[:count] == rows[_RUN - 1 : _RUN - 1 + count]
    return runs[inside], rows[:count][inside]


# ---- leaks between splits --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leak:
    """Examples of one split that stand in another.

    Attributes:
        first, second: names of the splits.
        kind: "equal", or "contained": texts of `first` that are not equal to one of `second`, but mostly made of it.
        count: how many rows of `first`.
        rows: one of them, and the row of `second` that has the most of it; counted from 0.
        text: the beginning of that row of `first`, in quotes, or the shape of an image.
    """

    first: str
    second: str
    kind: Literal["equal", "contained"]
    count: int
    rows: tuple[int, int]
    text: str

    def __str__(self) -> str:
        be = "is" if self.count == 1 else "are"
        what = f"{be} also in" if self.kind == "equal" else f"{be} contained in"
        return f"{self.count} example{'s' if self.count > 1 else ''} of {self.first!r} {what} {self.second!r}"


def find_leaks(splits: Mapping[str, Iterable[Example]]) -> list[Leak]:
    """What any two splits have in common: equal examples once for each pair, contained texts in either direction.

    Empty texts are passed over; repetitions inside one split are no leaks.

    Args:
        splits: examples by the name of their split: texts, arrays or PIL images. Each is read once.

    Raises:
        InputError: an example is neither a text nor an image.

    Example:
        >>> leaks = find_leaks({"train": ["A river.", "The sea."], "check": ["A hill.", "a  river"]})
        >>> leaks[0]
        Leak(first='train', second='check', kind='equal', count=1, rows=(0, 1), text="'A river.'")
        >>> print(leaks[0])
        1 example of 'train' is also in 'check'
        >>> find_leaks({"train": ["A river."], "check": ["A hill."]})
        []
    """
    hashes: dict[str, int] = {}
    held = {name: _held(examples, hashes) for name, examples in splits.items()}
    leaks = []
    for first, second in combinations(held, 2):
        shared = _equal(held[first], held[second])
        if shared:
            rows = next(iter(shared.items()))
            leaks.append(Leak(first, second, "equal", len(shared), rows, held[first].shown[rows[0]]))
        for inner, outer in ((first, second), (second, first)):
            found = _contained(held[inner], held[outer])
            if len(found):
                row = int(found[0])
                rows = (row, _most_alike(held[inner], row, held[outer]))
                leaks.append(Leak(inner, outer, "contained", len(found), rows, held[inner].shown[row]))
    return leaks


def refuse_leaks(splits: Mapping[str, Iterable[Example]]) -> None:
    """Refuses splits that have examples in common (see `find_leaks`).

    Raises:
        InputError: there are any; the message names the splits, how many, one example, and what to do.

    Example:
        >>> refuse_leaks({"train": ["A river."], "check": ["A hill."]})
        >>> refuse_leaks({"train": ["A river."], "check": ["A hill.", "a  river"]})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: 1 example of 'train' is also in 'check': row 0 of 'train' ...
    """
    leaks = find_leaks(splits)
    if not leaks:
        return
    shown = leaks[0]
    more = "".join(f"; {leak}" for leak in leaks[1:])
    raise InputError(
        f"{shown}: row {shown.rows[0]} of {shown.first!r} (rows count from 0) and row {shown.rows[1]} of "
        f"{shown.second!r}, {shown.text}{more}. Remove such examples from one of the two, or let --cut make "
        "three parts of one file, which keeps equal texts together"
    )


def _equal(first: _Held, second: _Held) -> dict[int, int]:
    """The rows of `first` that are in `second`, and where."""
    places: dict[bytes, int] = {}
    for row, digest in enumerate(second.digests):
        if digest is not None:
            places.setdefault(digest, row)
    return {row: places[digest] for row, digest in enumerate(first.digests) if digest is not None and digest in places}


def _contained(inner: _Held, outer: _Held) -> np.ndarray:
    """The rows of `inner` that are mostly made of runs of `outer`, without those that are equal to one of its rows."""
    mostly = inner.mostly(np.isin(inner.runs, outer.runs))
    mostly[list(_equal(inner, outer))] = False
    return np.flatnonzero(mostly)


def _most_alike(inner: _Held, row: int, outer: _Held) -> int:
    """The row of `outer` with the most runs of a row of `inner`."""
    shared = np.isin(outer.runs, inner.runs[inner.rows == row])
    return int(outer.totals(shared).argmax())


# ---- cutting one dataset ---------------------------------------------------------------------------------------------


def cut(
    examples: Iterable[Example], labels: Sequence[Hashable] | None, shares: Sequence[float], seed: int
) -> list[list[int]]:
    """Cuts one dataset into parts between which `find_leaks` finds nothing, with the labels of the whole in each.

    Examples that are equal, or of which one is mostly made of runs of the others, hang together and go to one part.
    Sets of them are dealt out label by label, each to the part that lacks most. Where every example stands for itself,
    a part has its share of all of them to about one example, and of each label to two; a large set of texts that hang
    together can make it differ by as much as its size.

    Args:
        examples: texts, arrays or PIL images; read once.
        labels: one for each example, any that can be a key; None for examples without.
        shares: of the parts; positive, with sum 1.
        seed: the same seed cuts the same examples in the same way.

    Returns:
        For each part its row numbers, from 0, in order. Every row is in exactly one.

    Raises:
        InputError: shares that are not positive or do not sum to 1, labels that are not one for each example, or a
            part that would be empty.

    Example:
        >>> cut(["A river.", "a river", "The sea.", "A hill."], None, [0.5, 0.5], seed=0)
        [[0, 1], [2, 3]]
    """
    if not shares or not all(share > 0 for share in shares) or not math.isclose(math.fsum(shares), 1, abs_tol=1e-9):
        raise InputError(f"shares must be positive and sum to 1, got {', '.join(map(str, shares)) or 'none'}")
    held = _held(examples, {})
    count = len(held.digests)
    if labels is not None and len(labels) != count:
        raise InputError(f"labels must be one for each example, got {len(labels)} for {count}")
    together = _hanging_together(held)
    parts: list[list[int]] = [[] for _ in shares]
    seen = 0
    for rows in _dealing_order(together, labels, seed):
        seen += len(rows)
        lacking = [share * seen - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[lacking.index(max(lacking))] += rows
    for share, part in zip(shares, parts, strict=True):
        if not part:
            largest = max(map(len, together), default=0)
            raise InputError(
                f"the part of share {share} would be empty: {count} examples, of which the largest set of equal or "
                f"nearly equal ones has {largest}, cannot be cut into {len(shares)} parts; give more examples, fewer "
                "parts or a larger share"
            )
    return [sorted(part) for part in parts]


def _dealing_order(together: list[list[int]], labels: Sequence[Hashable] | None, seed: int) -> list[list[int]]:
    """By label, so that each is spread over the parts; the largest sets first, for small ones can make up for them.

    Labels with the largest sets come first for the same reason. A set of several labels counts to the most frequent.
    Equal ones are in random order.
    """
    drawn = [together[place] for place in np.random.default_rng(seed).permutation(len(together))]
    if labels is None:
        return sorted(drawn, key=lambda rows: -len(rows))
    ranks = {label: rank for rank, label in enumerate(dict.fromkeys(labels))}
    label_of = [ranks[Counter(labels[row] for row in rows).most_common(1)[0][0]] for rows in drawn]
    largest: defaultdict[int, int] = defaultdict(int)
    for label, rows in zip(label_of, drawn, strict=True):
        largest[label] = max(largest[label], len(rows))
    keys = [(-largest[label], label, -len(rows)) for label, rows in zip(label_of, drawn, strict=True)]
    return [drawn[place] for place in sorted(range(len(drawn)), key=keys.__getitem__)]


def _hanging_together(held: _Held) -> list[list[int]]:
    """All rows in sets, such that no row is equal to one of another set, nor mostly made of runs of other sets.

    A row may be made of pieces of several others, none of which has most of it, and they may all end in one part. So
    a run counts as soon as any other set has it, and a row of which too many runs count is joined with those that
    have most of them, until few enough are left. That may take several rounds, in each of which sets are joined.
    """
    sets = _Sets(len(held.digests))
    first: dict[bytes, int] = {}
    for row, digest in enumerate(held.digests):
        if digest is not None:
            sets.join(first.setdefault(digest, row), row)
    _, inverse = np.unique(held.runs, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    while len(held.runs):
        own = sets.roots()[held.rows]
        # The least and the greatest set that have a run; they differ if more than one has it.
        least = np.minimum.reduceat(own[order], starts)[inverse]
        greatest = np.maximum.reduceat(own[order], starts)[inverse]
        elsewhere = least != greatest
        other = np.where(own == least, greatest, least)
        mostly = held.mostly(elsewhere)
        if not mostly.any():
            break
        for row in np.flatnonzero(mostly).tolist():
            begin, end = np.searchsorted(held.rows, [row, row + 1]).tolist()
            holders, runs = np.unique(other[begin:end][elsewhere[begin:end]], return_counts=True)
            left = int(runs.sum())
            for place in np.argsort(-runs, kind="stable").tolist():
                if 5 * left < 4 * (end - begin):
                    break
                sets.join(int(holders[place]), row)
                left -= int(runs[place])
    members: defaultdict[int, list[int]] = defaultdict(list)
    for row, root in enumerate(sets.roots().tolist()):
        members[root].append(row)
    return list(members.values())


class _Sets:
    """Disjoint sets of rows, each known by its least row."""

    def __init__(self, count: int) -> None:
        self.above = list(range(count))

    def root(self, row: int) -> int:
        while self.above[row] != row:
            self.above[row] = self.above[self.above[row]]
            row = self.above[row]
        return row

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.root(first), self.root(second)))
        self.above[high] = low

    def roots(self) -> np.ndarray:
        return np.array([self.root(row) for row in range(len(self.above))], dtype=np.int64)
