"""--classes: names, numbers, weights, and what is said about them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from helpers.tiny import flags, save, unet

from fastdiff import sample
from fastdiff.errors import UserError
from fastdiff.sampling.labels import Labels, describe_labels, labels_in_python, parse_labels, renumbered

NAMES = ["1", "2", "10", "café"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2", Labels((1,))),  # a name
        ("10, café", Labels((2, 3))),
        ("10:3,2:1", Labels((2, 1), (3.0, 1.0))),
        ("balanced", Labels((0, 1, 2, 3))),
        ("", Labels((0, 1, 2, 3), (1.0,) * 4)),
        (unicodedata.normalize("NFD", "café"), Labels((3,))),
    ],
)
def test_words_are_names_before_they_are_numbers(text: str, want: Labels) -> None:
    assert parse_labels(text, NAMES, 4) == want
    assert labels_in_python(text, [unicodedata.normalize("NFD", name) for name in NAMES], 4) == want


def test_words_are_numbers_where_no_name_is_one() -> None:
    assert parse_labels("0,dog,1:2", ["cat", "dog", "1:2"], 3) == Labels((0, 1, 2))
    assert parse_labels("cat, big", ["cat", "big", "cat, big"], 3) == Labels((2,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cafe", "1, 2, 10, café; did you mean café?"),
        ("7", "give names, some of which are numbers themselves: 1, 2, 10, café"),
        ("0,1,2", "0 is not a class; give names"),  # would be the classes 1, 1 and 2
    ],
)
def test_other_words_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_labels(text, NAMES, 4)
    with pytest.raises(UserError, match=words):
        labels_in_python(text.split(","), NAMES, 4)


def test_renumbering_is_by_name() -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    assert renumbered(["cat", "ape", "café"], ["ape", decomposed, "eel"]).tolist() == [1, 2, -1]


def test_numbers_of_chosen_classes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe_labels(Labels((1, 3, 1)), NAMES) == "classes, with their numbers: 2 1, café 3"
    assert describe_labels(Labels((0, 1, 2, 3)), NAMES) == describe_labels(Labels((1,)), []) == ""
    model = save(unet(class_cond=True, num_classes=4), tmp_path / "model.pt", NAMES)
    sample.main(flags({"model_path": model, "classes": "2", "num_samples": 1, "steps": 2, "out_dir": tmp_path / "out"}))
    assert "classes, with their numbers: 2 1\n" in capsys.readouterr().out
