"""The images of a folder, their order and their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdiff.errors import UserError
from fastdiff.images.listing import index_images, label_images, list_images


def touch(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


def test_files_and_folders_are_listed_together_in_code_point_order(tmp_path):
    names = ["B.JPG", "Zoo/a.png", "Zoo/b.v2/x.jpeg", "Zoo/c.gif", "a.webp", "a10.jpg", "a2.jpg", "b.Png", "é.png"]
    touch(tmp_path, *reversed(names), "note.txt", "jpg", "a.jpg.bak", "Zoo/b.v2/y.tiff")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == names


def test_a_folder_with_an_image_name_is_descended_into(tmp_path):
    touch(tmp_path, "x.png/inner.jpg", "x.png/nothing.txt")
    assert list_images(str(tmp_path)) == [tmp_path / "x.png" / "inner.jpg"]


def test_linked_folders_are_followed_but_not_in_cycles(tmp_path):
    touch(tmp_path, "data/a.png", "elsewhere/b.png")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    found = [path.relative_to(tmp_path / "data").as_posix() for path in list_images(tmp_path / "data")]
    assert found == ["a.png", "more/b.png"]


def test_errors_name_the_folder_and_what_is_wrong(tmp_path):
    (file,) = touch(tmp_path, "texts/readme.txt")
    (tmp_path / "empty").mkdir()
    for given, words in [
        ("", "no image folder"),
        (tmp_path / "gone", "gone does not exist"),
        (file, "readme.txt is not a folder"),
        (tmp_path / "empty", "is empty; files that end in jpg, jpeg, png, gif, webp count"),
        (tmp_path / "texts", "holds no images; files that end in jpg, jpeg, png, gif, webp count"),
    ]:
        with pytest.raises(UserError, match=words):
            list_images(given)


def test_prefix_labels_end_at_the_first_underscore(tmp_path):
    paths = touch(tmp_path, "cat_1_2.png", "plain.png", "bird_x.jpg", "sub_dir/cat_9.png", "_odd.png", "Zebra_1.png")
    labels, names = label_images(paths, tmp_path, "prefix")
    assert names == ["", "Zebra", "bird", "cat", "plain.png"]
    assert labels.dtype == np.int64
    assert labels.tolist() == [3, 4, 2, 3, 0, 1]


def test_folder_labels_are_the_relative_folder(tmp_path):
    paths = touch(tmp_path, "dogs/1.png", "cats/big/1.png", "cats/2.png", "3.png")
    labels, names = label_images(paths, tmp_path, "folder")
    assert names == [".", "cats", "cats/big", "dogs"]
    assert labels.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("dogs/1.png", "cats/1.png"), ["cats", "dogs"]),
        (("dogs/1.png", "cats/1.png", "2.png"), ["1.png", "2.png"]),  # one lies in no subfolder
        (("dogs/1.png", "cats/a_1.png"), ["1.png", "a"]),  # a name with an underscore
        (("dogs/1.png", "dogs/2.png"), ["1.png", "2.png"]),  # a single folder
        (("my_dogs/1.png", "my_cats/1.png"), ["my_cats", "my_dogs"]),  # underscores of folders don't count
    ],
)
def test_auto_labels(tmp_path, files, expected):
    assert label_images(touch(tmp_path, *files), tmp_path, "auto")[1] == expected


def test_given_classes_fix_the_numbers(tmp_path):
    paths = touch(tmp_path, "b_1.png", "d_1.png")
    labels, names = label_images(paths, tmp_path, "prefix", ["a", "b", "c", "d"])
    assert labels.tolist() == [1, 3]
    assert names == ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="d_1.png is of class 'd'.*none of the 2 classes.*a, b"):
        label_images(paths, tmp_path, "prefix", ["a", "b"])


def test_names_are_relative_however_the_folder_is_given(tmp_path, monkeypatch):
    touch(tmp_path, "data/a.png", "data/x/b.png")
    monkeypatch.chdir(tmp_path / "data")
    for given in (".", "../data", "../data/", tmp_path / "data"):
        listing = index_images(given)
        assert listing.names == ["a.png", "x/b.png"]
        assert listing.path(1).samefile(tmp_path / "data/x/b.png")


def test_a_part_of_a_listing_keeps_the_classes_of_the_whole(tmp_path):
    touch(tmp_path, "a_1.png", "z_1.png", "zz_1.png")
    whole = index_images(tmp_path)
    part = whole.first(2)
    assert part.names == ["a_1.png", "z_1.png"]
    assert part.class_names == ["a", "z", "zz"]
    assert part.fingerprint != whole.fingerprint


def test_the_fingerprint_follows_the_names(tmp_path):
    touch(tmp_path / "one", "a_1.png", "b_1.png")
    touch(tmp_path / "two", "a_1.png", "b_1.png")
    first = index_images(tmp_path / "one").fingerprint
    assert first == index_images(tmp_path / "two").fingerprint
    touch(tmp_path / "two", "b_2.png")
    assert first != index_images(tmp_path / "two").fingerprint
