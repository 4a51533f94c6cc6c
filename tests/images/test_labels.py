"""The classes of a data set: by which rule, in what order, and what is refused instead of guessed."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from fastdiff.errors import UserError
from fastdiff.images.labels import Classes, NoClasses, class_order, describe_classes, index_images, label_images
from fastdiff.images.listing import Listing

ROOT = Path("data")


def numbered(folder: str, count: int, ending: str = ".jpg") -> list[str]:
    return [f"{folder}{i}{ending}" for i in range(count)]


def counts(classes: Classes) -> dict[str, int]:
    return dict(zip(classes.names, np.bincount(classes.labels, minlength=len(classes.names)).tolist(), strict=True))


def test_prefix_labels_end_at_the_first_underscore():
    names = ["Zebra_1.png", "_odd.png", "bird_x.jpg", "cat_1_2.png", "plain.png", "sub_dir/cat_9.png"]
    found = label_images(names, ROOT, "prefix")
    assert found.names == ["", "Zebra", "bird", "cat", "plain.png"]
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [1, 0, 2, 3, 4, 3]


def test_folder_labels_are_the_relative_folder():
    found = label_images(["cats/2.png", "cats/big/1.png", "dogs/1.png"], ROOT, "folder")
    assert found.names == ["cats", "cats/big", "dogs"]
    assert found.labels.tolist() == [0, 1, 2]


def test_without_labels_all_are_zero():
    found = label_images(["cats/2.png", "1.png"], ROOT, "none")
    assert (found.names, found.labels.tolist()) == ([], [0, 0])


@pytest.mark.parametrize(
    ("names", "expected", "found_in"),
    [
        ([*numbered("cat/", 3), *numbered("dog/", 2)], {"cat": 3, "dog": 2}, "folders"),
        ([*numbered("cat_", 3), *numbered("dog_", 2)], {"cat": 3, "dog": 2}, "prefixes"),
        # Names with an underscore here and there say nothing.
        ([*numbered("cat/", 3), "dog/my_dog.jpg", "dog/2.jpg"], {"cat": 3, "dog": 2}, "folders"),
        # Neither does a camera's prefix, which all names have.
        ([*numbered("cat/IMG_", 3), *numbered("dog/IMG_", 2)], {"cat": 3, "dog": 2}, "folders"),
        # Underscores of folders don't count.
        (["my_cats/1.png", "my_dogs/1.png"], {"my_cats": 1, "my_dogs": 1}, "folders"),
        # Folders and prefixes agree, as in ImageNet.
        ([*numbered("n01/n01_", 2), *numbered("n02/n02_", 2)], {"n01": 2, "n02": 2}, "prefixes"),
        ([*numbered("train/a/a_", 2), *numbered("train/b/b_", 2)], {"a": 2, "b": 2}, "prefixes"),
        # They agree on which images belong together, and the folders have the words.
        ([*numbered("cat/A_", 2), *numbered("dog/B_", 2)], {"cat": 2, "dog": 2}, "folders"),
        # Neither do numbers before the underscore, one for each image.
        ([f"{'cat' if i % 2 else 'dog'}/{i}_photo.jpg" for i in range(12)], {"cat": 6, "dog": 6}, "folders"),
        # A single folder says nothing.
        ([*numbered("all/cat_", 2), *numbered("all/dog_", 2)], {"cat": 2, "dog": 2}, "prefixes"),
        (numbered("all/cat_", 2), {"cat": 2}, "prefixes"),
    ],
)
def test_auto_takes_what_distinguishes_classes(names, expected, found_in):
    found = label_images(sorted(names), ROOT)
    assert counts(found) == expected
    assert found.found_in == found_in


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        (
            [*numbered("cat/", 20), *numbered("dog/", 20), "preview.jpg"],
            UserError,
            r"class folders \(cat 20, dog 20\) and 1 beside them \(preview.jpg\).*--labels prefix or none, or a file",
        ),
        (
            [*numbered("cat/cat_", 3), *numbered("dog/dog_", 3), "all_preview.jpg"],
            UserError,
            r"1 beside them \(all_preview.jpg\)",
        ),
        (
            [*numbered("cat/", 3), *numbered("cat/raw/", 2), *numbered("dog/", 3)],
            UserError,
            r"images in cat and in cat/raw below it.*or give --labels folder, by which each folder is a class",
        ),
        (
            [*numbered("train/cat_", 3), *numbered("train/dog_", 2), *numbered("val/cat_", 1)],
            UserError,
            r"by folder train 5, val 1; by prefix cat 4, dog 2; give --labels folder, prefix or none, or a file",
        ),
        # The same images belong together, but the numbers would differ.
        ([*numbered("cat/B_", 2), *numbered("dog/A_", 2)], UserError, "by folder cat 2, dog 2; by prefix A 2, B 2"),
        # One image in a wrong place.
        (
            [*numbered("cat/cat_", 3), *numbered("dog/dog_", 3), "dog/cat_9.jpg"],
            UserError,
            r"by folder cat 3, dog 4; by prefix cat 4, dog 3",
        ),
        (
            [*numbered("cat_", 3), *numbered("dog_", 3), "preview.jpg"],
            UserError,
            r"1 of the 7 images in data have no class before an underscore in their names \(preview.jpg\)",
        ),
        (["_a.jpg", "_b.jpg", "dog_1.jpg"], UserError, r"2 of the 3 images in data have no class before an underscore"),
        (numbered("", 30), NoClasses, "nothing in data says what class an image is of.*--labels FILE"),
        (numbered("photos/", 3), NoClasses, "nothing in data says"),
        (numbered("", 30, "_photo.jpg"), NoClasses, r"each of the 30 images in data would be a class of its own"),
    ],
)
def test_auto_refuses_to_guess(names, kind, words):
    with pytest.raises(kind, match=words):
        label_images(sorted(names), ROOT)


def test_auto_takes_folders_at_any_depth():
    names = [*numbered("animals/cat/", 2), *numbered("animals/dog/", 2), *numbered("car/", 2)]
    assert counts(label_images(names, ROOT)) == {"animals/cat": 2, "animals/dog": 2, "car": 2}


def test_images_beside_class_folders_are_refused_by_folder_too_except_in_a_run_that_has_that_class():
    names = ["3.png", "cats/2.png", "dogs/1.png"]
    with pytest.raises(UserError, match=r"1 beside them \(3.png\)"):
        label_images(names, ROOT, "folder")
    for rule in ("folder", "auto"):
        assert label_images(names, ROOT, rule, [".", "cats", "dogs"]).labels.tolist() == [0, 1, 2]
    assert label_images(["3.png"], ROOT, "folder").names == ["."]


def test_given_classes_fix_the_numbers():
    found = label_images(["b_1.png", "d_1.png"], ROOT, "prefix", ["a", "b", "c", "d"])
    assert found.labels.tolist() == [1, 3]
    assert found.names == ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="d_1.png is of class 'd'.*none of the 2 classes.*a, b"):
        label_images(["b_1.png", "d_1.png"], ROOT, "prefix", ["a", "b"])


def test_auto_keeps_to_the_rule_of_an_earlier_run():
    names = ["train/cat_1.jpg", "train/dog_1.jpg", "val/cat_2.jpg", "val/plain.jpg"]
    assert label_images(names[:3], ROOT, "auto", ["cat", "dog"]).labels.tolist() == [0, 1, 0]
    assert label_images(names[:3], ROOT, "auto", ["train", "val"]).labels.tolist() == [0, 0, 1]
    assert label_images(names, ROOT, "auto", ["cat", "dog", "plain.jpg"]).labels.tolist() == [0, 1, 0, 2]
    with pytest.raises(UserError, match="by folder train 2, val 1; by prefix cat 2, dog 1"):
        label_images(names[:3], ROOT, "auto", ["cat", "dog", "train", "val"])
    with pytest.raises(UserError, match="plain.jpg is of class 'plain.jpg'.*knows: cat, dog; "):
        label_images(names, ROOT, "auto", ["cat", "dog"])
    with pytest.raises(UserError, match=r"1 beside them \(preview.jpg\)"):
        label_images(["cat/1.jpg", "dog/1.jpg", "preview.jpg"], ROOT, "auto", ["cat", "dog"])


def test_digits_sort_by_value_before_words():
    assert class_order(["10", "9", "2", "a", "007", "B", "²", "1"]) == ["1", "2", "007", "9", "10", "B", "a", "²"]
    found = label_images([f"{i}/{j}.png" for i in (0, 1, 10, 11, 2, 9) for j in range(2)], ROOT)
    assert found.names == ["0", "1", "2", "9", "10", "11"]
    assert found.labels.tolist() == [0, 0, 1, 1, 4, 4, 5, 5, 2, 2, 3, 3]


def test_names_equal_to_a_reader_are_one_class():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    found = label_images([f"{composed}/1.png", f"{decomposed}/2.png", "thé/1.png"], ROOT)
    assert counts(found) == {composed: 2, "thé": 1}
    assert label_images([f"{composed}_1.png", "the_1.png"], ROOT, "auto", ["the", decomposed]).labels.tolist() == [1, 0]


def test_the_line_lists_classes_and_counts():
    found = label_images([*numbered("cat/", 2), *numbered("dog/", 3)], ROOT)
    assert (
        describe_classes(Listing(ROOT, [], found.labels, found.names, "folders"))
        == "labels: from folders: cat 2, dog 3"
    )
    many = np.repeat(np.arange(1000), 2)[1:]
    line = describe_classes(Listing(ROOT, [], many, [f"n{i}" for i in range(1000)], "prefixes"))
    assert line.startswith("labels: from prefixes: n0 1, n1 2, n2 2,")
    assert line.endswith("n19 2 and 980 more (1,000 classes of 1 to 2 images)")


# --- files that list the classes ---

NAMES = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    return tmp_path / "data"


def test_dataset_json_in_the_folder_is_the_rule(folder: Path):
    file = folder / "dataset.json"
    file.write_text(json.dumps({"labels": [[name, label] for name, label in zip(NAMES, (3, 0, 3), strict=True)]}))
    found = index_images(folder, "auto")
    assert found.labels.tolist() == [3, 0, 3]
    assert found.class_names == ["0", "1", "2", "3"]
    assert found.labels_from == str(file)
    assert index_images(folder, "folder").class_names == ["00000", "00001"]
    file.write_text('{"labels": null}')
    with pytest.raises(NoClasses, match="says that the images have no labels"):
        index_images(folder, "auto")


def test_numbers_in_dataset_json_are_the_labels_of_known_classes(folder: Path):
    """Also where names of classes are other numbers."""
    file = folder / "dataset.json"
    file.write_text(json.dumps({"labels": [[name, label] for name, label in zip(NAMES, (2, 0, 1), strict=True)]}))
    for known in (["ape", "cat", "dog"], ["1", "2", "10"], ["0", "1", "2", "3"]):
        found = index_images(folder, "auto", known)
        assert (found.labels.tolist(), found.class_names) == ([2, 0, 1], known)
        assert found.labels.dtype == np.int64
    with pytest.raises(UserError, match="has the class number 2, the model 2"):
        index_images(folder, "auto", ["ape", "cat"])


def test_names_of_numbers_and_names_instead_of_numbers(folder: Path):
    file = folder / "dataset.json"
    numbers = dict(zip(NAMES, (1, 0, 1), strict=True))
    file.write_text(json.dumps({"labels": numbers, "class_names": ["dog", "cat"]}))
    assert index_images(folder, "auto").class_names == ["dog", "cat"]
    assert index_images(folder, "auto").labels.tolist() == [1, 0, 1]
    assert index_images(folder, "auto", class_names=["ape", "cat", "dog"]).labels.tolist() == [1, 2, 1]
    file.write_text(json.dumps({"labels": {name: "cat" if number else "ant" for name, number in numbers.items()}}))
    assert index_images(folder, "auto").class_names == ["ant", "cat"]


@pytest.mark.parametrize(
    "text",
    [
        "00000/img0.png,cat\n00000/img1.png,dog\n00001/img2.png,cat\n",
        "\ufeffFile;Class\r\n00000/img0.png;cat\r\n00000/img1.png;dog\r\n00001/img2.png;cat\r\n",
        "split\tlabel\tid\na\tcat\timg0\na\tdog\timg1\nb\tcat\timg2\n",
        "./00000/img0.png,cat\n00000\\img1.png,dog\nimg2.png,cat\nelsewhere.png,ape\n",
        "data/00000/img0.png,cat\ndata/00000/img1.png,dog\ndata/00001/img2.png,cat\n",
        '00000/img0.png,"cat"\n\n00000/img1.png, dog\n00001/img2.png,cat',
    ],
)
def test_csv(folder: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "classes.csv"
    file.write_text(text, encoding="utf-8", newline="")
    found = index_images(folder, str(file))
    assert found.class_names == ["cat", "dog"]
    assert found.labels.tolist() == [0, 1, 0]
    assert ("also lists images" in caplog.text) == ("elsewhere" in text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "00000/img0.png,cat\n", r"no class for 2 of the 3 images.*\(00000/img1.png, 00001/img2.png\)"),
        ("a.csv", "", "is empty"),
        ("a.csv", "a,b,c\n1,2,3\n", "have 3 columns; give two, file and class"),
        ("a.csv", "img0.png,cat\nimg1.png\n", "row 2 of .*a.csv is 'img1.png', not a file and a class"),
        ("a.csv", "img0.png,cat\nimg0.png,dog\n", "lists img0.png twice, as cat and as dog"),
        ("a.json", "[]", 'has no "labels"'),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"labels": [["a.png", 0.5]]}', "a whole number from 0 or a name"),
        ("a.json", '{"labels": [["a.png", -1]]}', "a whole number from 0 or a name"),
        ("a.json", '{"labels": [["a.png", [0, 1]]]}', "a whole number from 0 or a name"),
        ("a.json", '{"labels": [["a.png", true]]}', "a whole number from 0 or a name"),
        ("a.json", '{"labels": [["a.png", 0], ["b.png", "cat"]]}', "both numbers and names"),
        ("a.json", '{"labels": [["a.png", 1]], "class_names": ["cat", "cat"]}', "class_names in .* has 'cat' twice"),
        ("a.json", '{"labels": {"a.png": 0, "a.png": 1}}', "'a.png' has two values"),
        ("a.json", '{"labels": [["a.png", 2]], "class_names": ["cat"]}', "class number 2, but only 1 class_names"),
        ("a.json", '{"labels": [["a.png", 1000000000]]}', "class number 1000000000"),
        ("a.json", '{"labels": []}', "must be a list of"),
    ],
)
def test_files_that_list_no_classes(folder: Path, tmp_path: Path, name: str, text: str, words: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        index_images(folder, str(tmp_path / name))


def test_a_rule_that_is_none(folder: Path):
    with pytest.raises(UserError, match="--labels folders is none of auto, prefix, folder, none; did you mean folder?"):
        index_images(folder, "folders")
    (folder / "same").mkdir()
    (folder / "same" / "img0.png").touch()
    (folder.parent / "a.csv").write_text("img0.png,cat\nimg1.png,dog\nimg2.png,cat\n")
    with pytest.raises(UserError, match="no class for 2 of the 4 images"):  # the name alone means either
        index_images(folder, str(folder.parent / "a.csv"))
