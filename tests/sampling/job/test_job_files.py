"""Sampling jobs write the right files, and no interruption loses, duplicates or changes an image."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_jobs import CLASSES, check_npz, drawing, images, job, labels, names, place, run, start, tracing
from helpers.tiny import files, nothing_written
from PIL import Image

from fastdiff.errors import StopWith, UserError
from fastdiff.images.labels import index_images
from fastdiff.sampling.job import outputs, progress
from fastdiff.sampling.job.chunks import Piece, Range, Store, cover, split
from fastdiff.sampling.job.claims import Claims
from fastdiff.sampling.job.job import run_job
from fastdiff.sampling.job.manifest import Job, digest, manifest_of
from fastdiff.sampling.pictures import FileNames, Images, index_in

ALL = ("npz", "png", "zip", "tar")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refused(folder: Path, job: Job) -> str:
    """Return the sentence with which the job is refused, and assert that no file changes."""
    with nothing_written(folder), pytest.raises(UserError) as caught:
        run(folder, job)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "FOLDER")


# --- what is written ---


@pytest.mark.parametrize("count", [1, 4, 5, 6, 23])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_npz(count: int, labelled: bool, folder: Path) -> None:
    assert run(folder, job(count, labelled=labelled)) == split([Range(0, count)], 5)
    check_npz(folder, count, labelled)
    assert names(folder) == ["job.json", f"samples_{count}x4x6x3.npz"]


def test_chunks_larger_than_the_job(folder: Path) -> None:
    assert run(folder, job(23, chunk_size=1000)) == [Range(0, 23)]
    check_npz(folder, 23)


def test_npz_is_not_compressed(folder: Path) -> None:
    """Arrays are stored uncompressed, each with its checksum."""
    run(folder, job(23))
    path = folder / "samples_23x4x6x3.npz"
    raw = path.read_bytes()
    assert images(np.arange(23)).tobytes() in raw
    assert labels(np.arange(23)).tobytes() in raw
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy", "class_names.npy", "seed.npy", "index.npy"]


def test_messages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, job(23, grid_images=100, note=", enlarged from 5"))
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert first.startswith(f"23 images in {folder / 'samples_23x4x6x3.npz'}, ")
    assert first.endswith(" images/s, enlarged from 5")
    assert second == f"a grid of the first 23 images in {folder / 'samples_23x4x6x3.png'}"
    before = files(folder)
    assert run(folder, job(23, grid_images=100)) == []
    assert files(folder) == before
    shown = capsys.readouterr()
    assert shown.out == f"23 images in {folder / 'samples_23x4x6x3.npz'}: complete already\n"
    assert shown.err == ""


@pytest.mark.parametrize(("chunk", "kept"), [(0, 0), (2, 10), (4, 20)])
def test_ctrl_c(chunk: int, kept: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chunks that are drawn are kept, and the same command draws the others."""

    def interrupt(index: np.ndarray) -> None:
        if index[0] == chunk * 5:
            raise KeyboardInterrupt

    with pytest.raises(StopWith) as stop:
        run_job(drawing(told=interrupt), job(), place(), folder)
    assert stop.value.code == 130
    goes_on = f"{kept} of 23 images are kept in {folder}, and the same command goes on from there"
    assert (
        str(stop.value)
        == f"stopped by Ctrl-C; {goes_on if kept else 'no images were drawn yet, and the same command starts again'}"
    )
    assert [drawn.start for drawn in run(folder, job())] == [5 * i for i in range(chunk, 5)]
    check_npz(folder, 23)


def test_ctrl_c_while_files_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_npz", interrupt)
        with pytest.raises(StopWith, match="stopped by Ctrl-C; 23 of 23 images are kept"):
            run_job(drawing(), job(), place(), folder)
    assert run(folder, job()) == []
    check_npz(folder, 23)


def test_returned_files(folder: Path) -> None:
    made = run_job(drawing(), job(23, save_as=ALL, grid_images=3, trajectory=2), place(), folder, trace=tracing)
    ends = (".npz", ".zip", "-000000.tar", ".png", "_steps.png", "_steps.gif")
    assert sorted(made) == sorted([folder / "images", *(folder / f"samples_23x4x6x3{end}" for end in ends)])
    assert all(path.exists() for path in made)


def test_pngs_are_a_folder_to_train_on(folder: Path) -> None:
    run(folder, job(23, save_as=("png",)))
    found = index_images(folder / "images", "auto")
    assert len(found.names) == 23
    classes = found.class_names
    assert sorted(classes) == sorted(["ape", "big-bee", "cat-2", "dog", "ünd"])
    for path, number in zip(map(found.path, range(23)), found.labels, strict=True):
        index = index_in(path.name)
        assert index is not None
        assert path.name == FileNames(CLASSES)(index, int(labels(np.array([index]))[0]))
        assert classes[number] == path.name.split("_")[0]
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), images(np.array([index]))[0])


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_zip(labelled: bool, folder: Path) -> None:
    run(folder, job(23, labelled=labelled, save_as=("zip",)))
    with zipfile.ZipFile(folder / "samples_23x4x6x3.zip") as archive:
        assert archive.testzip() is None
        listing = json.loads(archive.read("dataset.json"))
        want = [FileNames(CLASSES)(i, i * 7 // 3 % 5 if labelled else None) for i in range(23)]
        entries = [[name, i * 7 // 3 % 5] for i, name in enumerate(want)]
        assert listing == ({"class_names": CLASSES, "labels": entries} if labelled else {"labels": None})
        assert sorted(archive.namelist()) == sorted([*want, "dataset.json"])
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        for i, name in enumerate(want):
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))))
            np.testing.assert_array_equal(pixels, images(np.array([i]))[0])


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_tar(labelled: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SHARD", 10)
    run(folder, job(23, labelled=labelled, save_as=("tar",)))
    seen = 0
    for shard in range(3):
        with tarfile.open(folder / f"samples_23x4x6x3-{shard:06d}.tar") as archive:
            members = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        for index in range(10 * shard, min(10 * shard + 10, 23)):
            label = index * 7 // 3 % 5 if labelled else None
            pixels = np.asarray(Image.open(io.BytesIO(members.pop(f"{index:06d}.png"))))
            np.testing.assert_array_equal(pixels, images(np.array([index]))[0])
            about = {"seed": 0, "index": index, "label": label}
            about |= {"class_name": CLASSES[label]} if label is not None else {}
            assert json.loads(members.pop(f"{index:06d}.json")) == about
            if labelled:
                assert members.pop(f"{index:06d}.cls") == str(label).encode()
            seen += 1
        assert not members
    assert seen == 23
    assert {path.name for path in folder.glob("*.tar")} == {f"samples_23x4x6x3-00000{shard}.tar" for shard in range(3)}


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_transparent(channels: int, folder: Path) -> None:
    shape = (4, 6, channels)
    one = job(3, shape=shape, labelled=False, save_as=ALL, grid_images=3)
    run(folder, one)
    with Image.open(folder / "images" / "000002.png") as image:
        assert image.mode == {1: "L", 4: "RGBA"}[channels]
        np.testing.assert_array_equal(np.asarray(image).reshape(shape), images(np.array([2]), shape)[0])


def test_channels_that_make_no_picture(folder: Path) -> None:
    folder.mkdir()
    message = refused(folder, job(3, shape=(4, 6, 2), save_as=("npz", "png")))
    assert message == "--save_as: no png can be made of 2 channels; npz takes any number"
    run(folder, job(3, shape=(4, 6, 2), grid_images=3, trajectory=1))
    assert names(folder) == ["job.json", "samples_3x4x6x2.npz"]


def test_names_of_classes_travel_with_the_images(folder: Path) -> None:
    run(folder, job(23))
    assert json.loads((folder / "job.json").read_text())["class_names"] == CLASSES
    with np.load(folder / "samples_23x4x6x3.npz", allow_pickle=False) as content:
        assert content["class_names"].tolist() == CLASSES
    run(folder.with_name("bare"), job(23, class_names=()))
    assert "class_names" not in json.loads((folder.with_name("bare") / "job.json").read_text())
    with np.load(folder.with_name("bare") / "samples_23x4x6x3.npz") as content:
        assert "class_names" not in content


def test_pictures_keep_the_names_of_their_sources(folder: Path) -> None:
    """So do those of a larger job; --overwrite removes them, and nothing else."""
    sources = ("alps", "trip/beach", "x_000009")
    run(folder, job(2, names=sources, save_as=("png",)))
    run(folder, job(4, names=sources, save_as=("png",)))
    pictures = ["alps.png", "alps_000003.png", "trip-beach.png", "x_000009.png"]
    assert names(folder / "images") == pictures
    for index, name in enumerate(("alps.png", "trip-beach.png", "x_000009.png", "alps_000003.png")):
        with Image.open(folder / "images" / name) as image:
            np.testing.assert_array_equal(np.asarray(image), images(np.array([index]))[0])
    (folder / "images" / "mine.png").touch()
    run(folder, job(1, identity={"seed": 1}, save_as=("png",)), overwrite=True)
    assert names(folder / "images") == ["ape_000000.png", "mine.png"]


def test_grid_and_its_change(folder: Path) -> None:
    """The grid shows images in the order of their labels, in rows by class; other settings make it again."""
    run(folder, job(20, grid_images=15, grid_classes=5))
    path = folder / "samples_20x4x6x3.png"
    with Image.open(path) as grid:
        enlarged = 768 // (5 * 6 + 2)
        assert grid.size == ((3 * 8 + 2) * enlarged, (5 * 6 + 2) * enlarged)
        small = np.asarray(grid)[::enlarged, ::enlarged]
    for at, index in enumerate(np.argsort(labels(np.arange(15)), kind="stable")):
        top, left = 2 + at // 3 * 6, 2 + at % 3 * 8
        np.testing.assert_array_equal(small[top : top + 4, left : left + 6], images(np.array([index]))[0])
    assert run(folder, job(20, grid_images=4)) == []
    with Image.open(path) as grid:
        assert grid.width * (2 * 6 + 2) == grid.height * (2 * 8 + 2)


def test_trajectory(folder: Path) -> None:
    run(folder, job(6, trajectory=4))
    with Image.open(folder / "samples_6x4x6x3_steps.png") as picture:
        enlarged = 768 // (4 * 8 + 2)
        assert picture.size == ((4 * 8 + 2) * enlarged, (4 * 6 + 2) * enlarged)  # three steps and the image
        small = np.asarray(picture)[::enlarged, ::enlarged]
    for row in range(4):
        top = 2 + 6 * row
        assert [small[top, 2 + 8 * step, 0] for step in range(3)] == [0, 40, 80]
        np.testing.assert_array_equal(small[top : top + 4, 26:32], images(np.array([row]))[0])
    with Image.open(folder / "samples_6x4x6x3_steps.gif") as gif:
        assert gif.n_frames == 4
        gif.seek(3)
        assert gif.info["duration"] == 2000


# --- continuing ---


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(5))
def test_stopped_at_any_chunk(at: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images that were drawn are kept, also those that were not yet written."""
    drawn = 0

    def told(index: np.ndarray) -> None:
        nonlocal drawn
        if drawn == at:
            raise Stop
        drawn += 1

    with pytest.raises(Stop):
        run_job(drawing(told=told), job(), place(), folder)
    assert not list(folder.glob("claims/*"))
    assert len(run(folder, job())) == 5 - at
    check_npz(folder, 23)
    assert names(folder) == ["job.json", "samples_23x4x6x3.npz"]
    if at:
        assert capsys.readouterr().out.startswith(f"{5 * at} of 23 images are there already, in {folder}\n")


def test_killed_at_every_file(tmp_path: Path) -> None:
    """After SIGKILL before any file that a job opens, renames or removes, the same command completes the job."""
    wanted = job(7, chunk_size=3, save_as=ALL, grid_images=4, trajectory=2)
    run(tmp_path / "whole", wanted)
    want = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    for at in range(1, 400, 5):
        folder = tmp_path / f"killed{at}"
        process = start(folder, wanted, killed_at=at)
        process.join(30)
        assert process.exitcode in (0, -9)
        run(folder, wanted)
        got = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {path.relative_to(folder) for path in got} == {path.relative_to(tmp_path / "whole") for path in want}
        assert [got[folder / path.relative_to(tmp_path / "whole")] for path in want] == list(want.values()), at
        assert names(folder) == names(tmp_path / "whole")
        if process.exitcode == 0:
            break
    else:
        raise AssertionError("the job never ran to its end")
    assert at > 60


def test_killed_again_and_again(folder: Path) -> None:
    """Two processes are killed at random times, and each start finds more images than the one before."""
    random = np.random.default_rng(0)
    there = 0
    for _ in range(6):
        processes = [start(folder, job(120, save_as=("npz", "png")), pause=0.002, rank=i, world_size=2) for i in (0, 1)]
        time.sleep(random.uniform(0.03, 0.2))
        for process in processes:
            process.kill()
            process.join()
        if (folder / "parts").exists():
            now = len([name for name in names(folder / "parts") if not name.startswith(".")])
            assert now >= there or there == 24, "fewer only where all were there, and are being merged"
            there = now
    run(folder, job(120, save_as=("npz", "png")))
    check_npz(folder, 120)
    assert names(folder) == ["images", "job.json", "samples_120x4x6x3.npz"]
    assert sorted(index_in(name) or 0 for name in names(folder / "images")) == list(range(120))


def test_more_and_fewer(folder: Path) -> None:
    """No image is drawn twice, also after a short last chunk and after chunks were merged."""
    run(folder, job(12))
    assert run(folder, job(23)) == [Range(12, 15), Range(15, 20), Range(20, 23)]
    assert run(folder, job(7)) == []
    for count in (7, 12, 23):
        check_npz(folder, count)
    assert names(folder) == ["job.json", *(f"samples_{count}x4x6x3.npz" for count in (12, 23, 7))]


def test_more_chunks_without_an_npz(folder: Path) -> None:
    """Chunks are kept until an npz contains their images; after a short one the rest of its range is drawn."""
    run(folder, job(12, save_as=("png",)))
    assert run(folder, job(23, save_as=("png",), chunk_size=7)) == [Range(12, 15), Range(15, 20), Range(20, 23)]
    assert len(names(folder / "images")) == 23
    assert len(names(folder / "parts")) == 6
    assert run(folder, job(23, save_as=("npz", "zip"))) == []
    check_npz(folder, 23)
    assert names(folder) == ["images", "job.json", "samples_23x4x6x3.npz", "samples_23x4x6x3.zip"]


def test_chunks_that_overlap() -> None:
    def piece(start: int, stop: int) -> Piece:
        return Piece(Path(f"{start}-{stop}"), Range(start, stop), Range(start, stop))

    def used(ranges: list[tuple[int, int]], count: int) -> tuple[list[str], list[Range]]:
        chosen, missing = cover([piece(*r) for r in ranges], count)
        return [f"{p.path}[{p.used.start}:{p.used.stop}]" for p in chosen], missing

    assert used([], 5) == ([], [Range(0, 5)])
    assert used([(5, 10), (0, 5)], 10) == (["0-5[0:5]", "5-10[5:10]"], [])
    assert used([(0, 5), (0, 3), (4, 8)], 8) == (["0-5[0:5]", "4-8[5:8]"], [])
    assert used([(2, 4), (6, 20)], 10) == (["2-4[2:4]", "6-20[6:10]"], [Range(0, 2), Range(4, 6)])
    assert used([(0, 9), (1, 2), (3, 4)], 7) == (["0-9[0:7]"], [])
    assert used([(8, 9)], 8) == ([], [Range(0, 8)])
    assert split([Range(3, 11), Range(14, 15)], 5) == [Range(3, 5), Range(5, 10), Range(10, 11), Range(14, 15)]


def test_an_npz_that_another_process_removes_counts_as_missing(tmp_path: Path) -> None:
    store = Store(tmp_path, manifest_of(job(23)), 23)
    # A dangling link is listed but can't be opened, like a file that is removed after the folder was listed.
    (tmp_path / f"samples_10x{'x'.join(map(str, store.shape))}.npz").symlink_to("removed")
    assert store.missing() == [Range(0, 23)]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut short":
        content = content[: len(content) // 2]
    elif how == "a pixel":
        content[content.index(images(np.array([7]))[0].tobytes()) + 3] ^= 1
    elif how == "empty":
        content.clear()
    elif how == "of another job":
        held = Images(images(np.arange(5)), labels(np.arange(5)))
        other = manifest_of(job(23, identity={"seed": 1}))
        Store(path.parents[1], other, 23).write(Range(5, 10), held)
        return
    elif how == "in another order":
        held = np.asfortranarray(images(np.arange(5, 10)))
        identity = np.array(digest(job().identity))
        np.savez(path, images=held, labels=labels(np.arange(5, 10)), job=identity)
        return
    else:
        np.savez(path, images=images(np.arange(4)), labels=labels(np.arange(4)), job=np.array("x"))
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["cut short", "a pixel", "empty", "of another job", "of another shape", "in another order"]
)
def test_damaged_chunk(how: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, job(23, save_as=("png",)))
    damage(folder / "parts" / "000000005-000000010.npz", how)
    capsys.readouterr()
    assert run(folder, job(23)) == [Range(5, 10)]
    assert "000000005-000000010.npz is damaged (" in capsys.readouterr().out
    check_npz(folder, 23)
    assert names(folder) == ["images", "job.json", "samples_23x4x6x3.npz"]


@pytest.mark.parametrize("how", ["cut short", "a pixel", "empty"])
def test_damaged_npz(how: str, folder: Path) -> None:
    """For a larger job its images are drawn again; the same job notices that the file is truncated."""
    run(folder, job(12))
    damage(folder / "samples_12x4x6x3.npz", how)
    run(folder, job(23))
    check_npz(folder, 23)
    if how != "a pixel":
        assert run(folder, job(12)) == []
        check_npz(folder, 12)


# --- other jobs ---


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "its seed is 0, now it is 1"),
        ({"solver": "ddpm", "eta": 0.5}, "its eta is not given, now it is 0.5; its solver is ddim, now it is ddpm"),
        ({"model_path": ""}, 'its model_path is sha256:abc, now it is ""'),
    ],
    ids=["one", "several", "empty"],
)
def test_another_job_is_refused(changes: dict[str, Any], difference: str, folder: Path) -> None:
    run(folder, job(12, save_as=("png",)))
    other = job(12, identity={**job().identity, **changes})
    remedy = "name another folder, or give --overwrite True"
    assert refused(folder, other) == f"--out_dir: FOLDER holds another job: {difference}; {remedy}"


def test_other_images_under_the_same_settings_are_refused(folder: Path) -> None:
    run(folder, job(12))
    assert "its shape is [4, 6, 3], now it is [4, 4, 3];" in refused(folder, job(12, shape=(4, 4, 3)))
    assert "its labelled is true, now it is false;" in refused(folder, job(12, labelled=False))


@pytest.mark.parametrize("left", ["samples_9x4x6x3.npz", "samples_9x4x6x3.png", "parts"])
def test_images_of_an_unknown_job_are_refused(left: str, folder: Path) -> None:
    (folder / left).mkdir(parents=True)
    assert refused(folder, job(12)) == (
        f"--out_dir: FOLDER has {left}, but no job.json to say what job made it; name another folder, or give "
        "--overwrite True"
    )


def test_damaged_manifest_is_refused(folder: Path) -> None:
    run(folder, job(12))
    (folder / "job.json").write_text("{")
    os.utime(folder / "job.json", (0, 0))
    assert refused(folder, job(12)).startswith("--out_dir: FOLDER/job.json is damaged; ")
    run(folder, job(12), overwrite=True)
    check_npz(folder, 12)


def test_overwrite(folder: Path) -> None:
    """Another job's files are removed and other files stay; the same job continues."""
    run(folder, job(12, save_as=ALL, grid_images=4, trajectory=2))
    (folder / "claims").mkdir()
    (folder / "claims" / "000000000-000000005.0").touch()
    (folder / "notes.txt").write_text("mine")
    (folder / "images" / "mine.png").touch()
    other = job(3, identity={"seed": 7}, seed=7)
    assert run(folder, other, overwrite=True) == [Range(0, 3)]
    assert names(folder) == ["images", "job.json", "notes.txt", "samples_3x4x6x3.npz"]
    assert names(folder / "images") == ["mine.png"]
    check_npz(folder, 3, seed=7)
    assert run(folder, replace(other, count=8), overwrite=True) == [Range(3, 5), Range(5, 8)]
    assert json.loads((folder / "job.json").read_text())["identity"] == {"seed": 7}


def test_another_job_begun_meanwhile(folder: Path) -> None:
    """The process of the old job ends with an error, and its images don't become part of the new job."""
    other = job(23, identity={"seed": 7}, seed=7)

    def told(index: np.ndarray) -> None:
        if index[0] == 10:
            run(folder, other, overwrite=True)

    with pytest.raises(UserError, match="another job was begun in"):
        run_job(drawing(told=told), job(23), place(), folder)
    run(folder, replace(other, count=40))
    check_npz(folder, 40, seed=7)


# --- memory and errors ---


def test_memory(folder: Path) -> None:
    """Drawing and merging keep a few chunks in memory, never all images.

    The minimum of three jobs counts, because the memory of other threads and of first imports is traced as well.
    """
    shape = (32, 32, 3)
    chunk = 16 * 32 * 32 * 3
    index = np.arange(640)
    blank = Images(np.zeros((16, *shape), np.uint8), labels(index[:16]))
    wanted = job(640, shape=shape, chunk_size=16)
    peaks = []
    for name in "abc":
        tracemalloc.start()
        run_job(lambda index, on_progress: blank, wanted, place(), folder / name)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 10 * chunk < 640 * 32 * 32 * 3 / 2


@pytest.mark.parametrize("where", ["chunks", "npz", "claims"])
def test_disk_full(where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one sentence, images on the disk are kept, and the same command continues."""
    full = OSError(28, "No space left on device")

    def failing(function: Callable[..., Any], times: int) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal times
            times -= 1
            if times < 0:
                raise full
            return function(*words, **named)

        return call

    with monkeypatch.context() as patch:
        if where == "chunks":
            patch.setattr(np, "savez", failing(np.savez, 2))
        elif where == "npz":
            header = np.lib.format.write_array_header_1_0
            patch.setattr(np.lib.format, "write_array_header_1_0", failing(header, 1))
        else:
            patch.setattr(Claims, "take", failing(Claims.take, 0))
        with pytest.raises(UserError) as caught:
            run(folder, job(23))
    assert str(caught.value) == (
        f"--out_dir: {folder} can't be written to or read (No space left on device); the images that are in it are "
        "kept, and the same command continues with them"
    )
    assert not list(folder.rglob("*.partial"))
    assert len(run(folder, job(23))) == {"chunks": 3, "npz": 0, "claims": 5}[where]
    check_npz(folder, 23)
    assert names(folder) == ["job.json", "samples_23x4x6x3.npz"]


def test_progress_counts_all_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOOK", 0.0)
    monkeypatch.setattr(progress, "LINE", 0.0)
    run(folder, job(5))
    (folder / "claims").mkdir()
    told = {"rank": 3, "rate": 2.5, "unfinished": 1.5}
    (folder / "claims" / "node.1.2.status").write_text(json.dumps(told))
    run(folder, job(10))
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if " images/s, " in line and " of 10 " in line]
    assert shown[0].startswith("7.5 of 10 images, ")
    assert shown[0].endswith(" 3: 2.5/s)")
    assert "(process 0: " in shown[0]
    assert names(folder) == ["job.json", "samples_10x4x6x3.npz", "samples_5x4x6x3.npz"]
