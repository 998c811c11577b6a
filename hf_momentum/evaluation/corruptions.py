"""Corruptions of texts and images in five severities: the same example, made harder to read by a known amount.

What happens to an example depends on the seed, the corruption and its own content: not on its place, its batch or the
other rows. All severities of one example draw the same random numbers, so a higher one does what the lower did and more
of it. The strengths are ours; they are chosen so that people still read severity 1 with ease, and 5 with effort.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_momentum.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

SEVERITIES = (1, 2, 3, 4, 5)

Random = np.random.Generator


# ---- texts -----------------------------------------------------------------------------------------------------------

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """The keys that touch each letter on a QWERTY keyboard, whose rows stand half a key apart."""
    found = {}
    for row, keys in enumerate(_KEYS):
        for place, key in enumerate(keys):
            touching = [(row, place - 1), (row, place + 1), (row - 1, place), (row - 1, place + 1)]
            touching += [(row + 1, place - 1), (row + 1, place)]
            found[key] = "".join(_KEYS[r][p] for r, p in touching if 0 <= r < 3 and 0 <= p < len(_KEYS[r]))
    return found


_NEIGHBOURS = _neighbours()


def typos(text: str, share: float, random: Random) -> str:
    """Each letter, with probability `share`: hit beside its key, swapped with the next, left out, or with one more key.

    Example:
        >>> typos("The river runs down to the sea.", 0.15, np.random.default_rng(2))
        'The rivr runs down to the saz.'
    """
    hit, kinds, keys = random.random(len(text)) < share, random.integers(4, size=len(text)), random.random(len(text))
    made, place = [], 0
    while place < len(text):
        letter = text[place]
        if not (hit[place] and letter.isalpha()):
            made.append(letter)
        else:
            around = _NEIGHBOURS.get(letter.lower(), letter.lower())
            beside = around[int(keys[place] * len(around))]
            beside = beside.upper() if letter.isupper() else beside
            following = text[place + 1 : place + 2]
            if kinds[place] == 0 and following.isalpha():
                made += [following, letter]
                place += 1
            elif kinds[place] == 1:
                made += [letter, beside]
            elif kinds[place] == 2:
                pass
            else:
                made.append(beside)
        place += 1
    return "".join(made)


def case(text: str, share: float, random: Random) -> str:
    """Each word, with probability `share`, in capitals, in small letters, or with each letter in either.

    Example:
        >>> case("The river runs down to the sea.", 0.5, np.random.default_rng(1))
        'The river runs down TO THE sea.'
    """
    words = _words(text)
    hit, kinds, letters = (
        random.random(len(words)) < share,
        random.integers(3, size=len(words)),
        random.random(len(text)),
    )
    made, start = [], 0
    for word, changed, kind in zip(words, hit, kinds, strict=True):
        capitals = letters[start : start + len(word)] < (1.0, 0.0, 0.5)[kind]
        made.append("".join(map(_cased, word, capitals)) if changed else word)
        start += len(word)
    return "".join(made)


def _cased(letter: str, capital: bool) -> str:
    return letter.upper() if capital else letter.lower()


def word_drop(text: str, share: float, random: Random) -> str:
    """Each word is left out with probability `share`; the luckiest stays, so that no text ends up empty.

    Example:
        >>> word_drop("The river runs down to the sea.", 0.3, np.random.default_rng(0))
        'The to the sea.'
    """
    words = _words(text)
    luck = random.random(len(words))
    kept = (luck >= share) | (luck == luck.max(initial=0.0))
    return "".join(word for word, stays in zip(words, kept, strict=True) if stays)


def word_swap(text: str, share: float, random: Random) -> str:
    """Each word changes places with the next one with probability `share`.

    Example:
        >>> word_swap("The river runs down to the sea.", 0.3, np.random.default_rng(0))
        'The runs river to down the sea.'
    """
    words = _words(text)
    hit, place = random.random(len(words)) < share, 0
    while place + 1 < len(words):
        if hit[place]:
            first, second = (re.fullmatch(r"(\s*\S*)(\s*)", word, re.DOTALL) for word in words[place : place + 2])
            assert first is not None and second is not None
            words[place], words[place + 1] = second[1] + first[2], first[1] + second[2]
            place += 1
        place += 1
    return "".join(words)


def _words(text: str) -> list[str]:
    """The words, each with the white space behind it; the first one with what stands before it too.

    Example:
        >>> _words(" a  b c ")
        [' a  ', 'b ', 'c ']
    """
    return re.findall(r"^\s*\S*\s*|\S+\s*", text) if text else []


# ---- images: arrays [height, width] or [height, width, channels] of 0 to 1 -----------------------------------------


def gaussian_noise(image: np.ndarray, deviation: float, random: Random) -> np.ndarray:
    """Every value with normal noise of this standard deviation."""
    return image + deviation * random.standard_normal(image.shape)


def blur(image: np.ndarray, share: float, random: Random) -> np.ndarray:
    """A Gaussian blur whose standard deviation is half a pixel and this share of the shorter side."""
    from PIL import ImageFilter

    radius = 0.5 + share * min(image.shape[:2])
    return _array(_image(image).filter(ImageFilter.GaussianBlur(radius)))


def brightness(image: np.ndarray, amount: float, random: Random) -> np.ndarray:
    """All values higher, or all lower, by this amount."""
    return image + (amount if random.random() < 0.5 else -amount)


def contrast(image: np.ndarray, factor: float, random: Random) -> np.ndarray:
    """Distances to the mean of the image times this factor."""
    return image.mean() + factor * (image - image.mean())


def pixelate(image: np.ndarray, share: float, random: Random) -> np.ndarray:
    """Squares of one colour: as many along each side as this share of its pixels."""
    from PIL.Image import Resampling

    height, width = image.shape[:2]
    small = (max(1, round(share * width)), max(1, round(share * height)))
    return _array(_image(image).resize(small, Resampling.BOX).resize((width, height), Resampling.NEAREST))


def occlusion(image: np.ndarray, share: float, random: Random) -> np.ndarray:
    """A grey rectangle of the image's shape over this share of its area, anywhere within it."""
    height, width = image.shape[:2]
    tall, wide = round(height * share**0.5), round(width * share**0.5)
    top, left = (int(random.random() * (room + 1)) for room in (height - tall, width - wide))
    covered = image.copy()
    covered[top : top + tall, left : left + wide] = 0.5
    return covered


def _array(image: "Image") -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def _image(array: np.ndarray) -> "Image":
    from PIL import Image as images

    return images.fromarray(np.round(255 * array.clip(0, 1)).astype(np.uint8))


# ---- the registry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corruption:
    """A way to make examples harder.

    Attributes:
        name: as suites call it.
        kind: of what.
        summary: one line.
        strengths: what `apply` is given, for severities 1 to 5.
        apply: example, strength and random numbers to the corrupted example.
    """

    name: str
    kind: Literal["text", "image"]
    summary: str
    strengths: tuple[float, float, float, float, float]
    apply: Callable[[Any, float, Random], Any]


def _registry(*corruptions: Corruption) -> Mapping[str, Corruption]:
    return MappingProxyType({corruption.name: corruption for corruption in corruptions})


CORRUPTIONS: Mapping[str, Corruption] = _registry(
    Corruption("typos", "text", "share of letters mistyped", (0.02, 0.05, 0.10, 0.15, 0.25), typos),
    Corruption("case", "text", "share of words in another case", (0.10, 0.25, 0.50, 0.75, 1.00), case),
    Corruption("word_drop", "text", "share of words left out", (0.05, 0.10, 0.20, 0.30, 0.50), word_drop),
    Corruption("word_swap", "text", "share of words swapped with the next", (0.05, 0.10, 0.20, 0.30, 0.50), word_swap),
    Corruption("gaussian_noise", "image", "deviation of noise", (0.04, 0.08, 0.14, 0.22, 0.35), gaussian_noise),
    Corruption("blur", "image", "radius as a share of the side", (0.003, 0.008, 0.014, 0.020, 0.030), blur),
    Corruption("brightness", "image", "amount added or taken", (0.10, 0.20, 0.30, 0.40, 0.50), brightness),
    Corruption("contrast", "image", "factor of distances to the mean", (0.75, 0.50, 0.35, 0.20, 0.10), contrast),
    Corruption("pixelate", "image", "share of pixels along a side", (0.60, 0.40, 0.25, 0.15, 0.08), pixelate),
    Corruption("occlusion", "image", "share of the area covered", (0.05, 0.10, 0.20, 0.35, 0.50), occlusion),
)


# ---- examples --------------------------------------------------------------------------------------------------------


def corruption_of(name: str, severity: int) -> Corruption:
    """The corruption of a name, with its severity checked.

    Raises:
        InputError: there is no such corruption or severity.

    Example:
        >>> corruption_of("typos", 3).strengths[2]
        0.1
    """
    if name not in CORRUPTIONS:
        raise InputError(f"unknown corruption {name!r}{nearest(name, CORRUPTIONS)}; accepted: {', '.join(CORRUPTIONS)}")
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise InputError(f"severity must be a whole number from 1 to 5, got {severity!r}; leave clean rows as they are")
    return CORRUPTIONS[name]


def corrupt_text(text: str, name: str, severity: int, seed: int = 0) -> str:
    """One corrupted text.

    Raises:
        InputError: there is no such corruption of texts, or no such severity.

    Example:
        >>> corrupt_text("The river runs down to the sea.", "typos", 1) == corrupt_text(
        ...     "The river runs down to the sea.", "typos", 1)
        True
    """
    corruption = _of_kind("text", name, severity)
    found: str = corruption.apply(text, corruption.strengths[severity - 1], _random(name, seed, text.encode()))
    return found


def corrupt_image(image: "Image", name: str, severity: int, seed: int = 0) -> "Image":
    """One corrupted image, in grey ("L") if it was, else in RGB.

    Raises:
        InputError: there is no such corruption of images, or no such severity.

    Example:
        >>> from PIL import Image
        >>> corrupt_image(Image.new("L", (4, 2), 100), "occlusion", 5).size
        (4, 2)
    """
    corruption = _of_kind("image", name, severity)
    array = _array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    random = _random(name, seed, repr(array.shape).encode() + array.tobytes())
    return _image(corruption.apply(array, corruption.strengths[severity - 1], random))


def corrupt(
    rows: "datasets.Dataset", name: str, severity: int, seed: int = 0, column: str = "text"
) -> "datasets.Dataset":
    """The rows with one column corrupted; everything else, labels above all, stays.

    Args:
        rows: with texts, or images that `datasets` decodes, in `column`.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: other seeds corrupt otherwise.
        column: what is corrupted.

    Raises:
        InputError: there is no such corruption, severity or column, or the column holds something else.

    Example:
        >>> import datasets
        >>> rows = datasets.Dataset.from_dict({"text": ["down to the sea"] * 2, "label": [1, 0]})
        >>> corrupt(rows, "case", 5)["label"][:]
        [1, 0]
    """
    kind = corruption_of(name, severity).kind
    if column not in rows.column_names:
        raise InputError(f"no column {column!r} to corrupt; there is {', '.join(rows.column_names)}")
    from PIL.Image import Image as PILImage

    wanted = str if kind == "text" else PILImage
    apply: Callable[..., Any] = corrupt_text if kind == "text" else corrupt_image

    def one(value: Any) -> dict[str, Any]:
        if not isinstance(value, wanted):
            raise InputError(f"{name} is for {kind}s, and column {column!r} holds {type(value).__name__}")
        return {column: apply(value, name, severity, seed)}

    if len(rows):
        one(rows[0][column])  # a slip is told as it is, and not from inside of `map`
    return rows.map(one, input_columns=[column], features=rows.features, desc=f"{name} {severity}")


def _of_kind(kind: str, name: str, severity: int) -> Corruption:
    corruption = corruption_of(name, severity)
    if corruption.kind != kind:
        fit = ", ".join(each.name for each in CORRUPTIONS.values() if each.kind == kind)
        raise InputError(f"{name} is for {corruption.kind}s, not for a {kind}; accepted: {fit}")
    return corruption


def _random(name: str, seed: int, content: bytes) -> Random:
    """Random numbers that depend on the example itself and on nothing beside it."""
    digest = hashlib.blake2b(f"{name} {seed} ".encode() + content, digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
