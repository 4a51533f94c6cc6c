"""A run that gives up because of unreadable images lists all of them, in a file that they can be deleted by."""

from __future__ import annotations

import csv
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.images import unreadable
from fastdiff.images.cache.sharing import default_place
from fastdiff.images.labels import index_images
from fastdiff.images.listing import list_images
from fastdiff.images.open import open_images
from fastdiff.images.reader import Reader
from fastdiff.images.settings import DataSettings
from fastdiff.images.unreadable import STEM, GaveUp, naming_all

BAD = ("a b.png", "deep/it's.jpg", "-rf.png", "$HOME.gif", 'q"uote.png', "ünïcode.webp")
"""Names that a shell would misread."""


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder of 30 pictures and of six files that are none, or damaged."""
    root = tmp_path / "all pictures"
    (root / "deep").mkdir(parents=True)
    for i in range(30):
        Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(root / f"c_{i:02d}.png")
    whole = (root / "c_00.png").read_bytes()
    for name, content in zip(BAD, (b"", b"no picture", whole[:40], b"II*\0", b"<html>", b"RIFF"), strict=True):
        (root / name).write_bytes(content)
    return root


def all_bad(root: Path) -> set[str]:
    return {str(root / name) for name in BAD}


def rows(file: Path) -> dict[str, tuple[str, str]]:
    with file.open(newline="") as text:
        _, *found = csv.reader(text)
    return {name: (reason, listed) for name, reason, listed in found}


def read_all(root: Path, **given: object) -> None:
    settings = DataSettings(data_dir=str(root), loader=str(given.pop("loader", "pillow")), shuffle=False)
    with open_images(settings, size_hw=(8, 8), channels=3, batch_size=4, **given) as loader:  # type: ignore[arg-type]
        for _ in loader.once():
            pass


def test_every_image_is_tried_and_the_list_deletes_them(spoilt: Path, tmp_path: Path, loader_name: str) -> None:
    stem = tmp_path / "run" / STEM
    with pytest.raises(UserError, match="--data_dir: 6 of 36 images can't be read, which is too many") as found, \
            naming_all(stem):  # fmt: skip
        read_all(spoilt, loader=loader_name)
    assert set((tmp_path / "run" / f"{STEM}.txt").read_text().splitlines()) == all_bad(spoilt)
    reasons = rows(tmp_path / "run" / f"{STEM}.csv")
    assert reasons.keys() == all_bad(spoilt)
    assert reasons[str(spoilt / BAD[3])] == ("its content is TIFF; JPEG, PNG, GIF and WebP are read", "yes")
    command = str(found.value).partition("delete them: ")[2]
    assert command == f"xargs -d '\\n' rm < {tmp_path}/run/{STEM}.txt"
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(list_images(spoilt)) == 30
    read_all(spoilt, loader=loader_name)


def test_a_limit_does_not_hide_the_others(spoilt: Path, tmp_path: Path) -> None:
    """Once the first ones are deleted, later images move up into a limit's range."""
    with pytest.raises(UserError, match="6 of 36"), naming_all(tmp_path / STEM):
        read_all(spoilt, limit=5)


def test_relative_paths_are_made_absolute(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError), naming_all(Path(STEM)):
        read_all(Path(spoilt.name))
    assert set((tmp_path / f"{STEM}.txt").read_text().splitlines()) == all_bad(spoilt)


def test_files_that_may_be_in_order_are_not_in_the_list(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that doesn't answer, a lack of memory or of permission says nothing about the image."""
    failing = {"c_01.png": OSError(5, "Input/output error"), "c_02.png": PermissionError(13, "Permission denied"),
               "c_03.png": MemoryError(), "c_04.png": FileNotFoundError(2, "No such file or directory")}  # fmt: skip
    load = unreadable.load_image

    def load_image(path: Path, *given: object) -> np.ndarray:
        if path.name == "c_04.png":
            path.unlink(missing_ok=True)
        if path.name in failing:
            raise failing[path.name]
        return load(path, *given)  # type: ignore[arg-type]

    (spoilt / "line\nbreak.png").write_bytes(b"")
    (spoilt / "nowhere.png").symlink_to(spoilt / "gone")
    monkeypatch.setattr(unreadable, "load_image", load_image)
    with pytest.raises(UserError, match=r"12 of 38 .*txt lists 7 that are damaged"), naming_all(tmp_path / STEM):
        read_all(spoilt)
    listed = set((tmp_path / f"{STEM}.txt").read_text().splitlines())
    assert listed == {*all_bad(spoilt), str(spoilt / "nowhere.png")}
    others = {str(spoilt / name) for name in (*failing, "line\nbreak.png")}
    assert {name for name, (_, in_list) in rows(tmp_path / f"{STEM}.csv").items() if in_list == "no"} == others


def test_nothing_is_offered_for_deletion_where_nothing_would_be_left(tmp_path: Path) -> None:
    """All of a camera's files are of an unknown format: that is no reason to delete them."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"II*\0")
    with pytest.raises(UserError, match="3 of 3 images can't be read.*TIFF") as found, naming_all(tmp_path / STEM):
        read_all(tmp_path)
    assert "rm <" not in str(found.value)
    assert len((tmp_path / f"{STEM}.txt").read_text().splitlines()) == 3


def test_a_storage_that_recovers(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreadable, "load_image", lambda *_: np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="when tried again, all 36 could be read"), naming_all(tmp_path / STEM):
        read_all(spoilt)


def test_one_of_several_processes_tries_the_images(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that give up together end with the same list, and every image is tried once."""
    tried, started, alive = [], threading.Event(), []
    load = unreadable.load_image

    def load_image(path: Path, *given: object) -> np.ndarray:
        started.set()
        tried.append(path)
        if len(tried) == 1:
            assert waiting.wait(60)
        return load(path, *given)  # type: ignore[arg-type]

    waiting = threading.Event()
    monkeypatch.setattr(unreadable, "load_image", load_image)
    monkeypatch.setattr(unreadable, "ALIVE_SECONDS", 0.05)
    listing = index_images(spoilt)
    messages: list[str] = []

    def give_up(alive: Callable[[], None]) -> None:
        with pytest.raises(UserError) as found, naming_all(tmp_path / STEM, alive):
            raise Reader(listing, (8, 8), 3, listing)._give_up("7 of 36 images can't be read")
        messages.append(str(found.value))

    first = threading.Thread(target=give_up, args=(lambda: None,))
    first.start()
    assert started.wait(60)
    second = threading.Thread(target=give_up, args=(lambda: (alive.append(1), waiting.set()),))
    second.start()
    for thread in (first, second):
        thread.join(60)
    assert len(tried) == 36
    assert alive
    assert sorted("another process has listed all of them" in message for message in messages) == [False, True]
    assert sorted(os.listdir(tmp_path)) == ["all pictures", f"{STEM}.csv", f"{STEM}.txt"]


def test_a_list_that_cannot_be_written(spoilt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="of 36 images can't be read.*the others can't be listed in"), \
            naming_all(tmp_path / "file" / STEM):  # fmt: skip
        read_all(spoilt)


def test_packing_lists_them_beside_its_folder(spoilt: Path) -> None:
    settings = DataSettings(data_dir=str(spoilt), cache="disk", loader="pillow")
    with pytest.raises(UserError, match="--data_dir: 6 of 36 images can't be read"):
        open_images(settings, size_hw=(8, 8), channels=3, batch_size=4)
    place = default_place(spoilt, (8, 8), 3)
    listed = place.with_name(f"{place.name}.{STEM}.txt").read_text().splitlines()
    assert set(listed) == all_bad(spoilt)
    for name in listed:
        os.unlink(name)
    with open_images(settings, size_hw=(8, 8), channels=3, batch_size=4) as loader:
        assert loader.num_images == 30


def test_a_packed_folder_is_not_searched_for_files(spoilt: Path, tmp_path: Path) -> None:
    """Its original images aren't there."""
    for name in BAD[1:]:
        (spoilt / name).unlink()
    settings = DataSettings(data_dir=str(spoilt), cache="disk", loader="pillow")
    open_images(settings, size_hw=(8, 8), channels=3, batch_size=4).close()
    packed = settings.model_copy(update={"data_dir": str(default_place(spoilt, (8, 8), 3)), "cache": "none"})
    with pytest.raises(GaveUp, match="1 of 1 images can't be read"), naming_all(tmp_path / STEM):
        open_images(packed, size_hw=(8, 8), channels=3, batch_size=1, limit=1)
    assert not (tmp_path / f"{STEM}.txt").exists()


def test_loaders_alone_raise_a_user_error(spoilt: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read_all(spoilt)
