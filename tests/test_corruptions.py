"""Corruptions are graded and seeded, depend on the example alone, and leave everything else as it was."""

import random
from itertools import pairwise

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_momentum import InputError
from hf_momentum.evaluation.corruptions import (
    _NEIGHBOURS,
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    corrupt_image,
    corrupt_text,
    corruption_of,
)

TEXTS = [name for name, corruption in CORRUPTIONS.items() if corruption.kind == "text"]
IMAGES = [name for name, corruption in CORRUPTIONS.items() if corruption.kind == "image"]
PROSE = [
    f"The {adjective} river {number} runs {way} to the sea, and nobody asks why it does so year after year."
    for number, adjective in enumerate(["long", "old", "quiet", "brown"])
    for way in ("down", "on", "round")
]


def edits(before: str, after: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(after) + 1))
    for i, a in enumerate(before, 1):
        left, row[0] = row[0], i
        for j, b in enumerate(after, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (a != b))
    return row[-1]


def picture(seed: int = 0, size: tuple[int, int] = (48, 36), mode: str = "RGB") -> Image.Image:
    """Smooth patches of colour with the detail of single pixels on them."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(40, 216, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float)
    detailed = smooth + generator.normal(0, 12, smooth.shape)
    return Image.fromarray(detailed.clip(0, 255).astype(np.uint8)).convert(mode)


def error(before: Image.Image, after: Image.Image) -> float:
    """Mean squared error; the signal-to-noise ratio falls as it rises."""
    return float(np.mean((np.asarray(before, dtype=float) - np.asarray(after, dtype=float)) ** 2))


# ---- strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_further_from_the_original_with_every_severity(name):
    distances = [np.mean([edits(text, corrupt_text(text, name, s)) for text in PROSE]) for s in SEVERITIES]
    assert distances[0] > 0
    assert all(after > 1.15 * before for before, after in pairwise(distances)), distances


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_less_signal_to_noise_with_every_severity(name):
    errors = [np.mean([error(picture(k), corrupt_image(picture(k), name, s)) for k in range(6)]) for s in SEVERITIES]
    ratios = 10 * np.log10(255**2 / np.array(errors))
    assert ratios[0] < 45, "severity 1 can be seen"
    assert all(np.diff(ratios) < -0.5), ratios


def test_the_shares_are_those_of_the_table():
    long = " ".join(PROSE * 20)
    words = long.split()
    for severity in SEVERITIES:
        kept = len(corrupt_text(long, "word_drop", severity).split())
        assert 1 - kept / len(words) == pytest.approx(CORRUPTIONS["word_drop"].strengths[severity - 1], abs=0.02)
        covered = np.asarray(corrupt_image(Image.new("L", (100, 80), 0), "occlusion", severity)) > 0
        assert covered.mean() == pytest.approx(CORRUPTIONS["occlusion"].strengths[severity - 1], abs=0.01)
        noise = np.asarray(corrupt_image(Image.new("L", (90, 90), 128), "gaussian_noise", 2), dtype=float) - 128
        assert noise.std() / 255 == pytest.approx(0.08, rel=0.05)


def test_a_higher_severity_does_what_the_lower_did_and_more():
    left = [set(corrupt_text(" ".join(map(str, range(200))), "word_drop", s).split()) for s in SEVERITIES]
    assert all(more < less for less, more in pairwise(left))
    covered = [np.asarray(corrupt_image(Image.new("L", (60, 40), 0), "occlusion", s)) > 0 for s in SEVERITIES]
    assert all((more[less]).all() for less, more in pairwise(covered))


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_case_keeps_the_letters_and_word_swap_keeps_the_words():
    for text in PROSE:
        changed = corrupt_text(text, "case", 5)
        assert changed.lower() == text.lower() and changed != text
        swapped = corrupt_text(text, "word_swap", 5)
        assert sorted(swapped.split()) == sorted(text.split()) and len(swapped) == len(text) and swapped != text
        dropped = iter(text.split())
        assert all(word in dropped for word in corrupt_text(text, "word_drop", 5).split()), "in their order"


def test_typos_touch_letters_only_and_hit_keys_beside():
    assert corrupt_text("1234 5678, (90)!" * 20, "typos", 5) == "1234 5678, (90)!" * 20
    assert set(_NEIGHBOURS["g"]) == set("fhtyvb") and set(_NEIGHBOURS["q"]) == set("wa")
    assert all(key in _NEIGHBOURS[other] for key, keys in _NEIGHBOURS.items() for other in keys), "touching is mutual"
    found = corrupt_text("g " * 400, "typos", 5).split()
    assert set("".join(found)) == set("gfhtyvb"), "all of the keys beside, and no other"
    assert corrupt_text("G " * 400, "typos", 5).isupper()


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "text", ["", " ", "\n", "a", "one", "  lead and trail  ", "два слова и ещё", "日本語の文", "a\n\nb\tc", "ß İ ﬃ"]
)
def test_odd_texts_survive(name, text):
    for severity in SEVERITIES:
        found = corrupt_text(text, name, severity)
        if name in ("word_drop", "word_swap", "case"):
            assert bool(found.strip()) == bool(text.strip())


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(
    ("mode", "expected"), [("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("P", "RGB"), ("1", "RGB")]
)
def test_images_of_every_mode_and_of_one_pixel_keep_their_size(name, mode, expected):
    for size in ((48, 36), (1, 1), (3, 7)):
        found = corrupt_image(picture(size=size, mode=mode), name, 5)
        assert (found.size, found.mode) == (size, expected)


# ---- what it depends on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_corrupted_the_same_whatever_stands_around_it(name):
    rows = datasets.Dataset.from_dict({"text": PROSE, "label": list(range(len(PROSE))), "other": PROSE})
    found = corrupt(rows, name, 4, seed=3)
    assert found["label"][:] == rows["label"][:] and found["other"][:] == PROSE, "only the column that was named"
    assert found.features == rows.features
    order = list(range(len(PROSE)))
    random.Random(0).shuffle(order)
    assert corrupt(rows.select(order), name, 4, seed=3)["text"][:] == [found[i]["text"] for i in order]
    assert corrupt(rows.select([5]), name, 4, seed=3)["text"][:] == [found[5]["text"]]
    assert corrupt(rows, name, 4, seed=4)["text"][:] != found["text"][:]
    assert corrupt(rows, name, 4, seed=3, column="other")["text"][:] == PROSE


def test_a_picture_is_corrupted_the_same_whatever_stands_around_it():
    rows = datasets.Dataset.from_dict(
        {"image": [picture(k) for k in range(3)], "label": [0, 1, 0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    found = corrupt(rows, "gaussian_noise", 3, seed=1, column="image")
    assert found["label"][:] == [0, 1, 0] and found.features == rows.features
    for k in range(3):
        alone = corrupt_image(picture(k), "gaussian_noise", 3, seed=1)
        assert np.array_equal(np.asarray(found[k]["image"]), np.asarray(alone)), "and it is kept without loss"
    assert error(corrupt_image(picture(), "gaussian_noise", 3, seed=2), found[0]["image"]) > 1


# ---- what is refused -------------------------------------------------------------------------------------------------

ROWS = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(ROWS, "typo", 1), r"unknown corruption 'typo' \(did you mean 'typos'.*accepted: typos, case"),
        (lambda: corrupt(ROWS, "typos", 0), "severity must be a whole number from 1 to 5, got 0"),
        (lambda: corrupt(ROWS, "typos", 6), "from 1 to 5, got 6"),
        (lambda: corruption_of("typos", True), "from 1 to 5, got True"),
        (lambda: corrupt(ROWS, "typos", 1, column="txt"), "no column 'txt' to corrupt; there is text, label"),
        (lambda: corrupt(ROWS, "typos", 1, column="label"), "typos is for texts, and column 'label' holds int"),
        (lambda: corrupt(ROWS, "blur", 1), "blur is for images, and column 'text' holds str"),
        (lambda: corrupt_text("a", "blur", 1), "blur is for images, not for a text; accepted: typos, case, word_drop"),
    ],
)
def test_input_that_cannot_be_used_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
