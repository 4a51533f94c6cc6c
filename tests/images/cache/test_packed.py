"""Packed images give the same batches as Pillow to the bit, and a cache is complete or absent."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import StopWith, UserError
from fastdiff.images.cache import build, sharing
from fastdiff.images.cache import loader as packed_loader
from fastdiff.images.cache.build import Decoder, pack, partial_of, read_state
from fastdiff.images.cache.format import is_packed, replacements
from fastdiff.images.cache.loader import PackedLoader, mirror
from fastdiff.images.cache.sharing import default_place, open_or_pack, together
from fastdiff.images.labels import index_images
from fastdiff.images.open import open_images
from fastdiff.images.pixels import load_image
from fastdiff.images.settings import DataSettings
from fastdiff.runtime.files import FileLock

FIELDS = ("images", "labels", "positions")


def joined(batches):
    batches = list(batches)
    return tuple(torch.cat([getattr(b, name) for b in batches]) for name in FIELDS)


def take(loader, count):
    return joined(itertools.islice(loader, count))


def once(loader):
    return joined(loader.once())


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.fixture
def pair(open_loader):
    """A function that opens a packed loader, and Pillow's with the same arguments."""

    def open_both(folder, *, cache="disk", **given):
        return open_loader(folder, "auto", cache=cache, **given), open_loader(folder, "pillow", **given)

    return open_both


def pack_folder(folder, size_hw=(32, 32), channels=3, target=None, workers=2):
    target = target or default_place(folder, size_hw, channels)
    pack(index_images(folder), size_hw, channels, target, workers=workers)
    return target


# --- batches ---


@pytest.mark.parametrize("cache", ["disk", "gpu"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_batches_are_pillows(folder, pair, cache, channels):
    given = {"size_hw": (24, 32), "channels": channels, "batch_size": 5, "seed": 3, "random_flip": True}
    packed, pillow = pair(folder, cache=cache, **given)
    assert isinstance(packed, PackedLoader)
    assert packed.loader_name == {"disk": "packed", "gpu": "packed on cpu"}[cache]
    assert packed.class_names == pillow.class_names
    assert packed.labels.tolist() == pillow.labels.tolist()
    assert_same(take(packed, 9), take(pillow, 9))
    assert packed.state_dict() == pillow.state_dict()
    assert_same(take(packed, 2), take(pillow, 2))
    assert next(packed).images.is_contiguous()


@pytest.mark.parametrize("options", [{"drop_last": True}, {"shuffle": False}, {"labels": "folder"}, {"num_workers": 5}])
def test_settings_mean_the_same(folder, pair, options):
    packed, pillow = pair(folder, batch_size=5, seed=1, **options)
    assert_same(take(packed, 7), take(pillow, 7))


def test_gathers_on_a_device(folder, pair):
    """What a GPU does with --cache gpu, done on the CPU."""
    packed, pillow = pair(folder, cache="gpu", batch_size=5, random_flip=True)
    packed._on_device, packed._rows = torch.from_numpy(packed._rows), None
    assert_same(take(packed, 6), take(pillow, 6))
    assert_same(once(packed), once(pillow))


def test_large_batches_are_gathered_in_parts(folder, pair, monkeypatch):
    monkeypatch.setattr(packed_loader, "TASK_BYTES", 7 * 32 * 32 * 3)
    packed, pillow = pair(folder, batch_size=40, random_flip=True)
    assert_same(take(packed, 3), take(pillow, 3))


def test_rows_of_a_file_larger_than_memory_are_announced(folder, pair, monkeypatch):
    asked = []
    monkeypatch.setattr(packed_loader, "free_memory", lambda device: 1000)
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: asked.append(given[1:3]), raising=False)
    packed, pillow = pair(folder, batch_size=6, shuffle=False)
    assert_same(take(packed, 2), take(pillow, 2))
    starts = (default_place(folder, (32, 32), 3) / "pixels.npy").stat().st_size - 12 * 3072
    assert asked[:12] == [(starts + 3072 * i, 3072) for i in range(12)]


def test_ranks_resumption_and_once(folder, pair):
    given = {"batch_size": 6, "seed": 2, "random_flip": True}
    whole, pillow = pair(folder, **given)
    next(whole)
    state = whole.state_dict()
    expected = take(whole, 6)
    for rank in range(2):
        packed, pillow = pair(folder, rank=rank, world_size=2, **given)
        assert_same(once(packed), once(pillow))
        next(packed)
        packed.load_state_dict(state)
        pillow.load_state_dict(state)
        mine = take(packed, 6)
        assert_same(mine, take(pillow, 6))
        assert_same(mine, [values[rank::2] for values in expected])


def test_a_limit_and_known_classes(folder, pair, open_loader):
    names = ["c", "b", "a", "more"]
    packed, pillow = pair(folder, batch_size=4, class_names=names)
    assert_same(take(packed, 4), take(pillow, 4))
    packed, pillow = pair(folder, batch_size=4, class_names=names, limit=7)
    assert isinstance(packed, PackedLoader)
    assert packed.num_images == 7
    assert_same(take(packed, 4), take(pillow, 4))
    assert_same(once(packed), once(pillow))


@pytest.fixture
def damaged(tmp_path):
    """A folder of 150 tiny pictures, of which the seventh cannot be read."""
    root = tmp_path / "damaged"
    root.mkdir()
    for i in range(150):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"c{i % 7}_{i:03d}.png")
    names = index_images(root).names
    (root / names[6]).write_bytes(b"no picture")
    return root


def test_unreadable_images_are_replaced_as_pillow_does(damaged, pair, caplog):
    names = index_images(damaged).names
    with caplog.at_level(logging.WARNING):
        packed, pillow = pair(damaged, size_hw=(8, 8), batch_size=25, random_flip=True)
        assert_same(take(packed, 12), take(pillow, 12))
        assert_same(once(packed), once(pillow))
    assert packed.unreadable == pillow.unreadable == [damaged / names[6]]
    assert all(names[6] in record.getMessage() for record in caplog.records)
    for limit in (7, 8):  # its replacement is the first image or the next one
        packed, pillow = pair(damaged, size_hw=(8, 8), batch_size=4, limit=limit, shuffle=False)
        assert_same(take(packed, 5), take(pillow, 5))
    place = default_place(damaged, (8, 8), 3)
    pixels, labels = np.load(place / "pixels.npy"), np.load(place / "labels.npy")
    assert (pixels[6] == pixels[7]).all()
    assert labels[6] == labels[7]
    record = json.loads((place / "packed.json").read_text())
    assert record["unreadable"] == [{"index": 6, "name": names[6], "reason": "no picture"}]


def test_too_many_unreadable_images_stop_the_packing_until_they_are_put_right(damaged, pair):
    names = index_images(damaged).names
    good = (damaged / names[5]).read_bytes()
    (damaged / names[100]).write_bytes(b"")
    with pytest.raises(UserError, match="--data_dir: 2 of 150 images can't be read"):
        pair(damaged, size_hw=(8, 8), batch_size=4)
    assert not is_packed(default_place(damaged, (8, 8), 3))
    (damaged / names[6]).write_bytes(good)
    packed, pillow = pair(damaged, size_hw=(8, 8), batch_size=25)
    assert_same(take(packed, 6), take(pillow, 6))
    assert [path.name for path in packed.unreadable] == [names[100]]


def test_a_disk_that_failed_once_leaves_no_mark(damaged, monkeypatch):
    names = index_images(damaged).names
    good = (damaged / names[5]).read_bytes()
    attempt = build.Reader.attempt

    def mend_after_failure(self, index, decode):
        found = attempt(self, index, decode)
        if index == 6:
            (damaged / names[6]).write_bytes(good)
        return found

    monkeypatch.setattr(build.Reader, "attempt", mend_after_failure)
    place = pack_folder(damaged, (8, 8))
    assert json.loads((place / "packed.json").read_text())["unreadable"] == []
    assert np.load(place / "pixels.npy")[6, 0, 0, 0] == np.load(place / "pixels.npy")[5, 0, 0, 0]


def test_processes_decode_the_same(damaged, monkeypatch, capfd):
    in_threads = pack_folder(damaged, (6, 8), target=damaged.parent / "threads")
    monkeypatch.setattr(build, "FEW", 3)
    attempt = build.Reader.attempt

    def read_only_the_unreadable(self, index, decode):  # this process tries it once more
        assert index == 6
        return attempt(self, index, decode)

    monkeypatch.setattr(build.Reader, "attempt", read_only_the_unreadable)
    in_processes = pack_folder(damaged, (6, 8), target=damaged.parent / "processes")
    for name in os.listdir(in_threads):
        assert (in_processes / name).read_bytes() == (in_threads / name).read_bytes(), name
    assert "Warning" not in capfd.readouterr().err


def test_the_processes_that_decode_need_no_pytorch(folder, tmp_path, monkeypatch):
    """Importing PyTorch would take each process seconds and 200 MB."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise AssertionError('torch is imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    decoder = Decoder(folder, (24, 32), 3)
    block, unreadable = decoder.decode(["a_0.jpg", "missing.png"])
    decoder.close()
    np.testing.assert_array_equal(block[0], load_image(folder / "a_0.jpg", (24, 32), "RGB"))
    assert unreadable == {1: "No such file or directory"}


def test_a_process_that_dies_stops_nothing(damaged, monkeypatch, caplog):
    in_threads = pack_folder(damaged, (8, 8), target=damaged.parent / "threads")
    monkeypatch.setattr(build, "FEW", 3)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    alone = pack_folder(damaged, (8, 8), target=damaged.parent / "alone")
    assert "continuing without it" in caplog.text
    assert (alone / "pixels.npy").read_bytes() == (in_threads / "pixels.npy").read_bytes()


def test_replacements():
    assert replacements(5, []).tolist() == [0, 1, 2, 3, 4]
    assert replacements(5, [4, 1, 2]).tolist() == [0, 3, 3, 3, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mirror(channels):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 7, channels), dtype=np.uint8)
    flips = np.array([True, False, True, True, False, False])
    expected = np.stack([image[:, ::-1] if flip else image for image, flip in zip(images, flips, strict=True)])
    mirror(images, flips)
    np.testing.assert_array_equal(images, expected)
    mirror(images, np.zeros(6, bool))
    np.testing.assert_array_equal(images, expected)


def test_memory_is_used_again_only_when_nobody_holds_it(folder, pair):
    packed, pillow = pair(folder, batch_size=5, random_flip=True)
    views = [next(packed).images.permute(0, 3, 1, 2)[1:, :, 2:] for _ in range(30)]
    for view in views:
        assert torch.equal(view, next(pillow).images.permute(0, 3, 1, 2)[1:, :, 2:])
    assert len({next(packed).images.data_ptr() for _ in range(30)}) <= packed_loader.BUFFERS


def test_close_ends_the_threads(folder, open_loader):
    pack_folder(folder)
    before = set(threading.enumerate())
    with open_loader(folder, cache="disk", loader="auto", batch_size=4) as loader:
        next(loader)
    assert not set(threading.enumerate()) - before


# --- the folder ---


def test_others_can_read_it(folder):
    place = pack_folder(folder, (16, 24))
    assert sorted(os.listdir(place)) == ["labels.npy", "names.json", "packed.json", "pixels.npy"]
    pixels = np.load(place / "pixels.npy", mmap_mode="r")
    assert pixels.flags.c_contiguous
    names = json.loads((place / "names.json").read_text())
    assert names == index_images(folder).names
    for name, row in zip(names, pixels, strict=True):
        np.testing.assert_array_equal(row, load_image(folder / name, (16, 24), "RGB"))
    assert np.load(place / "labels.npy").tolist() == index_images(folder, "auto").labels.tolist()
    record = json.loads((place / "packed.json").read_text())
    assert (record["num_images"], record["size"], record["channels"]) == (12, [16, 24], 3)
    assert record["class_names"] == ["a", "b", "c"]


def test_a_packed_folder_is_a_data_set(folder, open_loader):
    place = pack_folder(folder)
    pillow = take(open_loader(folder, "pillow", batch_size=5, random_flip=True), 6)
    state = open_loader(folder, "pillow", batch_size=5).state_dict()
    labelled = take(open_loader(folder, "pillow", batch_size=5, random_flip=True, class_cond=True), 6)
    moved = place.rename(folder.parent / "elsewhere")
    shutil.rmtree(folder)
    for cache in ("none", "disk", "gpu"):
        loader = open_loader(moved, "auto", cache=cache, batch_size=5, random_flip=True)
        assert loader.state_dict() == state
        assert_same(take(loader, 6), pillow)
        loader = open_loader(moved, "auto", cache=cache, batch_size=5, random_flip=True, class_cond=True)
        assert_same(take(loader, 6), labelled)
    by_folder = open_loader(moved, "auto", labels="folder", batch_size=5, class_cond=True)
    assert by_folder.class_names == [".", "deep"]


def test_a_packed_folder_keeps_the_classes_of_a_file(folder, open_loader):
    """The file is not needed any more, and neither are the images."""
    names = index_images(folder).names
    words = ["dog" if i % 3 else "ape" for i in range(len(names))]
    file = folder / "dataset.json"
    file.write_text(json.dumps({"labels": [list(pair) for pair in zip(names, words, strict=True)]}))
    place = pack_folder(folder)
    shutil.rmtree(folder)
    loader = open_loader(place, "auto", batch_size=5, class_cond=True)
    assert loader.listing.labels_from == str(file)
    assert loader.class_names == ["ape", "dog"]
    assert [loader.class_names[label] for label in loader.labels] == words
    known = open_loader(place, "auto", batch_size=5, class_cond=True, class_names=["dog", "eel", "ape"])
    assert [known.class_names[label] for label in known.labels] == words
    assert open_loader(place, "auto", labels="prefix", batch_size=5, class_cond=True).class_names == ["a", "b", "c"]
    np.save(place / "labels.npy", np.arange(12))
    with pytest.raises(UserError, match="labels.npy doesn't hold the classes of 12 images"):
        open_loader(place, "auto", batch_size=5, class_cond=True)
    record = json.loads((place / "packed.json").read_text())
    del record["labels_from"]  # as version 0.1 wrote it
    (place / "packed.json").write_text(json.dumps(record))
    assert open_loader(place, "auto", batch_size=5, class_cond=True).class_names == ["a", "b", "c"]


def test_the_second_start_packs_nothing(folder, open_loader, monkeypatch):
    open_loader(folder, "auto", cache="disk", batch_size=4)
    monkeypatch.setattr(sharing, "pack", None)
    open_loader(folder, "auto", cache="gpu", batch_size=4)


def test_only_a_whole_run_makes_a_cache(folder, open_loader):
    for given in ({"limit": 3}, {"build_cache": False}):
        loader = open_loader(folder, "pillow", cache="disk", batch_size=3, **given)
        assert loader.loader_name == "pillow"
    assert os.listdir(folder.parent) == [folder.name]


def test_cache_dir(folder, tmp_path):
    settings = DataSettings(data_dir=str(folder), cache="disk", cache_dir=str(tmp_path / "some" / "where"))
    with open_images(settings, size_hw=(32, 32), channels=3, batch_size=4) as loader:
        assert isinstance(loader, PackedLoader)
    assert os.listdir(tmp_path / "some" / "where") == ["pictures.packed_32x32x3"]
    assert sorted(os.listdir(tmp_path)) == ["pictures", "some"]


def test_an_interrupted_packing_goes_on(damaged, monkeypatch):
    place = default_place(damaged, (8, 8), 3)
    decoded = []
    reference = build.Reader.reference

    def stop_at_100(self, index, data):
        decoded.append(index)
        if len(decoded) > 100:
            raise KeyboardInterrupt
        return reference(self, index, data)

    monkeypatch.setattr(build.Reader, "reference", stop_at_100)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(damaged, (8, 8), workers=1)
    assert not is_packed(place)
    done = read_state(partial_of(place))["rows"]
    assert done == 64
    decoded.clear()
    monkeypatch.setattr(build.Reader, "reference", lambda *given: decoded.append(given[1]) or reference(*given))
    with open(partial_of(place) / "pixels.npy", "ab") as file:
        file.write(b"half a row")
    pack_folder(damaged, (8, 8))
    assert sorted(set(decoded)) == [6, *range(64, 150)]
    whole = pack_folder(damaged, (8, 8), target=damaged.parent / "whole")
    for name in os.listdir(whole):
        assert (place / name).read_bytes() == (whole / name).read_bytes(), name
    assert not partial_of(place).exists()


@pytest.mark.parametrize(("at", "kept"), [(3, 0), (100, 64)])
def test_ctrl_c_says_what_is_packed(damaged, monkeypatch, at, kept):
    reference, decoded = build.Reader.reference, []

    def interrupt(self, index, data):
        decoded.append(index)
        if len(decoded) == at:
            raise KeyboardInterrupt
        return reference(self, index, data)

    monkeypatch.setattr(build.Reader, "reference", interrupt)
    monkeypatch.setattr("fastdiff.images.open.allowed_cores", lambda: 1)  # in order
    settings = DataSettings(data_dir=str(damaged), cache="disk", num_workers=1)
    with pytest.raises(StopWith, match="stopped by Ctrl-C") as stop:
        open_images(settings, size_hw=(8, 8), channels=3, batch_size=4)
    assert stop.value.code == 130
    assert (f"{kept} of 150 images are packed, and the same command goes on" in str(stop.value)) == bool(kept)


def test_a_packing_of_other_images_starts_anew(damaged, monkeypatch):
    place = default_place(damaged, (8, 8), 3)

    def fail(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "label_images", fail)  # interrupts the build after its last row
        with pytest.raises(KeyboardInterrupt):
            pack_folder(damaged, (8, 8))
    assert read_state(partial_of(place))["rows"] == 150
    first = damaged / index_images(damaged).names[0]
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(first)
    pack_folder(damaged, (8, 8))
    assert (np.load(place / "pixels.npy")[0] == 200).all()


# --- several processes ---


def lock_of(place):
    return place.with_name(f".{place.name}.lock")


def test_one_builds_and_the_others_wait(folder, monkeypatch):
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)
    place, built = default_place(folder, (32, 32), 3), []

    def build():
        built.append(threading.current_thread().name)
        time.sleep(0.3)
        pack_folder(folder)

    ranks = [
        threading.Thread(target=together, args=(place, build), kwargs={"rank": r}, name=str(r)) for r in (3, 2, 1, 0)
    ]
    for rank in ranks:
        rank.start()
        time.sleep(0.05)
    for rank in ranks:
        rank.join()
    assert built == ["0"]
    assert is_packed(place)
    assert sorted(os.listdir(folder.parent)) == sorted([folder.name, place.name])


def test_a_rank_builds_where_rank_0_does_not(folder, monkeypatch):
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sharing, "GRACE_SECONDS", 0.1)
    place = default_place(folder, (32, 32), 3)
    together(place, lambda: pack_folder(folder), rank=5)
    assert is_packed(place)


def test_another_process_goes_on_when_the_builder_dies(damaged):
    """The builder is killed halfway, and the process that waits finishes its work."""
    place = default_place(damaged, (8, 8), 3)
    script = f"""
import sys, time
from fastdiff.images.cache import build, sharing
from fastdiff.images.labels import index_images
reference = build.Reader.reference
def slow(self, index, data):
    if index >= 64: time.sleep(60)
    return reference(self, index, data)
build.Reader.reference = slow
build.SAVE_SECONDS = 0.0
place = sharing.default_place({str(damaged)!r}, (8, 8), 3)
sharing.open_or_pack(index_images({str(damaged)!r}), (8, 8), 3, place, workers=1)
"""
    builder = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while (read_state(partial_of(place)) or {}).get("rows") != 64 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not FileLock(lock_of(place)).acquire(timeout=0)
    finally:
        builder.kill()
        builder.wait()
    packed = open_or_pack(index_images(damaged), (8, 8), 3, place, workers=1)
    assert packed.pixels.shape == (150, 8, 8, 3)
    np.testing.assert_array_equal(
        packed.pixels, np.load(pack_folder(damaged, (8, 8), target=damaged.parent / "w") / "pixels.npy")
    )


def test_a_build_of_another_host_is_left_alone_while_it_gets_on(folder, monkeypatch):
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sharing, "FOREIGN_SECONDS", 0.5)
    place = default_place(folder, (32, 32), 3)
    partial = partial_of(place)
    partial.mkdir()
    (partial / "state.json").write_text('{"host": "elsewhere", "rows": 0}')
    stopped = threading.Event()

    def work():
        for i in range(8):
            (partial / "state.json").write_text(json.dumps({"host": "elsewhere", "rows": i}))
            time.sleep(0.1)
        stopped.set()

    def build():
        assert stopped.is_set()
        pack_folder(folder)

    elsewhere = threading.Thread(target=work)
    elsewhere.start()
    together(place, build, rank=0)
    elsewhere.join()
    assert is_packed(place)


def test_waiting_for_a_build_that_stands_still_ends(folder, monkeypatch):
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sharing, "STALLED_SECONDS", 0.2)
    place = default_place(folder, (32, 32), 3)
    with FileLock(lock_of(place), remove=True), pytest.raises(UserError, match="got no further for 0 minutes"):
        together(place, lambda: None, rank=1)


# --- refusals ---


def test_a_cache_of_other_images_is_refused(folder, photo, open_loader):
    given = {"cache": "disk", "batch_size": 4}
    open_loader(folder, "auto", **given)
    photo(100, 90, 77).save(folder / "a_0.jpg")
    with pytest.raises(UserError, match="--cache_dir: .*their contents differed.*delete that folder"):
        open_loader(folder, "auto", **given)
    (folder / "a_0.jpg").rename(folder / "a_00.jpg")
    with pytest.raises(UserError, match="their names differed"):
        open_loader(folder, "auto", **given)
    (folder / "a_00.jpg").unlink()
    with pytest.raises(UserError, match="their number differed"):
        open_loader(folder, "auto", **given)


@pytest.mark.parametrize("damage", ["pixels.npy", "names.json", "packed.json", "other names", "other shape", "version"])
def test_a_damaged_packed_folder_is_refused(folder, open_loader, damage):
    place = pack_folder(folder)
    file = place / damage
    if damage == "other names":
        (place / "names.json").write_text(json.dumps(["a.png"] * 12))
    elif damage == "other shape":
        np.save(place / "pixels.npy", np.zeros((12, 32, 31, 3), np.uint8))
    elif damage == "version":
        (place / "packed.json").write_text(json.dumps({"format": 0}))
    else:
        file.write_bytes(file.read_bytes()[:-100])
    words = "another version" if damage == "version" else "are damaged .*delete that folder and pack"
    with pytest.raises(UserError, match=words):
        open_loader(place, "auto", batch_size=4)


def test_a_full_disk_is_said_before(folder, monkeypatch, open_loader):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 30000))
    with pytest.raises(UserError, match=r"--cache_dir: the decoded images need 3.93e-05 GB.* has 3e-05 GB left"):
        open_loader(folder, "auto", cache="disk", batch_size=4)
    assert os.listdir(folder.parent) == [folder.name]


def test_a_disk_that_fills_up_is_one_sentence(folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_json", full)
    with pytest.raises(UserError, match="can't write .*: No space left on device"):
        pack_folder(folder)


def test_images_that_memory_can_not_hold_are_refused(folder, monkeypatch, open_loader):
    monkeypatch.setattr(packed_loader, "free_memory", lambda device: 40000)
    with pytest.raises(
        UserError, match=r"--cache gpu: .* take 3.69e-05 GB, and memory has 4e-05 GB free.*--cache disk"
    ):
        open_loader(folder, "auto", cache="gpu", batch_size=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", ["disk", "gpu"])
def test_batches_on_a_gpu_are_those_of_the_cpu(folder, open_loader, cache, monkeypatch):
    monkeypatch.setattr(packed_loader, "COPY_BYTES", 5 * 3072)
    given = {"batch_size": 10, "seed": 8, "random_flip": True}
    on_gpu = open_loader(folder, "auto", cache=cache, device="cuda", **given)
    assert next(on_gpu).images.device.type == "cuda"
    on_gpu.load_state_dict(on_gpu.state_dict() | {"position": 0})
    on_cpu = open_loader(folder, "pillow", **given)
    for ours, theirs in itertools.islice(zip(on_gpu, on_cpu, strict=False), 8):
        assert_same(
            [ours.images.cpu(), ours.labels.cpu(), ours.positions], [theirs.images, theirs.labels, theirs.positions]
        )
