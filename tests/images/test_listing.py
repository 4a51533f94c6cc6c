"""The images of a folder and their order."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.images.labels import index_images
from fastdiff.images.listing import list_images


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


def test_hidden_files_and_folders_and_those_of_other_systems_are_no_data(tmp_path):
    touch(
        tmp_path, "cat/1.jpg", "cat/._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "cat/.cache/2.jpg", ".hidden.png"
    )
    touch(tmp_path, "__MACOSX/cat/._1.jpg", "__MACOSX/cat/1.jpg", "cat/@eaDir/1.jpg/THUMB_M.jpg", "dog/__MACOSX/2.jpg")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["cat/1.jpg"]
    with pytest.raises(UserError, match="holds no images.*begin with a dot.*__MACOSX"):
        list_images(tmp_path / "dog")
    assert list_images(tmp_path / ".ipynb_checkpoints")  # the folder that was asked for may have any name


def test_composed_and_decomposed_names_have_one_order_and_fingerprint(tmp_path):
    """macOS writes é as two characters, of which the first sorts before f."""
    listings = []
    for form in ("NFC", "NFD"):
        touch(tmp_path / form, *(unicodedata.normalize(form, name) for name in ("éa_1.png", "f_1.png", "zoé_2.png")))
        listings.append(index_images(tmp_path / form, "auto"))
    composed, decomposed = listings
    assert composed.names != decomposed.names
    assert composed.fingerprint == decomposed.fingerprint
    assert composed.class_names == decomposed.class_names == ["f", "zoé", "éa"]
    assert composed.labels.tolist() == decomposed.labels.tolist()


def test_names_are_relative_however_the_folder_is_given(tmp_path, monkeypatch):
    touch(tmp_path, "data/a_1.png", "data/x/b_1.png")
    monkeypatch.chdir(tmp_path / "data")
    for given in (".", "../data", "../data/", tmp_path / "data"):
        listing = index_images(given)
        assert listing.names == ["a_1.png", "x/b_1.png"]
        assert listing.path(1).samefile(tmp_path / "data/x/b_1.png")


def test_a_part_of_a_listing_keeps_the_classes_of_the_whole(tmp_path):
    touch(tmp_path, "a_1.png", "z_1.png", "zz_1.png")
    whole = index_images(tmp_path, "auto")
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
