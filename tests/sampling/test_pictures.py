"""Pixels, names and messages of drawn images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.fake_jobs import images

from fastdiff.sampling.pictures import FileNames, class_words, index_in, non_finite, steps_shown, strip, to_uint8


def test_to_uint8() -> None:
    """Fractions are cut off, and values outside [-1, 1] are clipped."""
    values = torch.tensor([-2.0, -1.0, -1 + 0.99 / 127.5, -1 + 1.01 / 127.5, 0.0, 1.0, 3.0])
    pixels = to_uint8(values[None, None, None, :])
    assert pixels.shape == (1, 1, 7, 1)
    assert pixels.flatten().tolist() == [0, 0, 0, 1, 127, 255, 255]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ((7, None, []), "000007.png"),
        ((7, 3, []), "3_000007.png"),
        ((7, 1, ["a", "b"]), "b_000007.png"),
        ((7, 2, ["a", "b"]), "2_000007.png"),
        ((12345678, 0, ["a"]), "a_12345678.png"),
    ],
    ids=str,
)
def test_file_names(name: tuple[int, int | None, list[str]], want: str) -> None:
    index, label, classes = name
    assert FileNames(classes)(index, label) == want
    assert FileNames(classes).index_of(want) == index_in(want) == index


def test_files_keep_the_names_of_their_sources() -> None:
    names = FileNames(["cat"], ["alps", "trip/beach", "alps", "x_000001", "alps_000005"])
    made = [names(index, 0) for index in range(10)]
    assert made[:5] == ["alps.png", "trip-beach.png", "alps-2.png", "x_000001.png", "alps_000005.png"]
    assert made[5:] == [
        "alps_000005_000005.png",
        "trip-beach_000006.png",
        "alps-2_000007.png",
        "x_000001_000008.png",
        "alps_000005_000009.png",
    ]
    assert [names.index_of(name) for name in made] == list(range(10))
    assert names.index_of("other.png") is None


def test_class_words() -> None:
    """Each class has its own word, without underscores, slashes and dots."""
    words = class_words(["a b", "a_b", "a-b", "", "../x", "a-b-1", "café"])
    assert words == ["a-b", "a-b-1", "a-b-2", "3", "---x", "a-b-1-5", "café"]
    for strange in ("000007.txt", "a.png", "00007.png", "grid.png", "a_b.png"):
        assert index_in(strange) is None


def test_steps_shown() -> None:
    assert steps_shown(1) == [0]
    assert steps_shown(11) == list(range(11))
    assert steps_shown(250) == [0, 25, 50, 75, 100, 124, 149, 174, 199, 224, 249]
    frames = [images(np.arange(2))] * 30
    assert strip(frames, frames[0]).width % (12 * 8 + 2) == 0


def test_non_finite() -> None:
    end = "came out with values that are not finite"
    assert non_finite([3]) == f"image 3 {end}"
    assert non_finite([3, 8]) == f"images 3 and 8 {end}"
    assert non_finite(list(range(9))) == f"images 0, 1, 2, 3, 4 and 4 others {end}"
