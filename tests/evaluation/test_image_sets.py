"""Every kind of image set gives the pixels of NumPy and Pillow, each image once, and refuses what it can't read."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fake_jobs
from helpers.tiny import pictures
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.evaluation.image_sets import ImageSet, open_image_set
from fastdiff.images.cache.build import pack
from fastdiff.images.labels import index_images
from fastdiff.images.pixels import load_image

COUNT, SHAPE = 11, (5, 7, 3)
DATA = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
NAMES = [f"{chr(97 + i % 3)}/{i:03d}" for i in range(COUNT)]


def opened(source: Path, **how: Any) -> ImageSet:
    return open_image_set(str(source), device="cpu", **how)


def read(images: ImageSet, batch_size: int = 3, world_size: int = 1) -> np.ndarray:
    """Read the shares of all ranks; asserts that each image comes once, and each share in order."""
    pixels = np.zeros((images.count, *images.shape), np.uint8)
    seen = []
    for rank in range(world_size):
        mine = []
        for batch, positions in images.batches(batch_size, rank, world_size):
            assert batch.shape[1:] == images.shape
            assert 0 < len(batch) <= batch_size
            assert positions.dtype == np.int64
            assert len(positions) == len(batch)
            pixels[positions] = batch.numpy()
            mine += positions.tolist()
        assert mine == sorted(mine)
        assert abs(len(mine) - images.count / world_size) < 1
        seen += mine
    assert sorted(seen) == list(range(images.count))
    return pixels


def refused(source: Path | str, **how: Any) -> str:
    """The sentence with which a set is refused, when it is opened or when it is read."""
    with pytest.raises(UserError) as caught:
        read(open_image_set(str(source), device="cpu", **how))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root: Path, data: np.ndarray = DATA) -> Path:
    for name, image in zip(NAMES, data, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").write_bytes(png(image))
    return root


def make_packed(root: Path) -> Path:
    listing = index_images(str(make_folder(root / "of")), "none")
    pack(listing, SHAPE[:2], SHAPE[2], root / "packed", workers=1)
    return root / "packed"


def make_zip(path: Path) -> Path:
    """As EDM writes it, with entries that are no data."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, image in sorted(zip(NAMES, DATA, strict=True), reverse=True):
            archive.writestr(f"{name}.png", png(image))
        archive.writestr("a/.hidden.png", png(DATA[0]))
        archive.writestr("__MACOSX/a/._000.png", b"")
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    return path


def make_npz(path: Path, save: Callable[..., None] = np.savez, **more: Any) -> Path:
    save(path, arr_0=DATA, **more)
    return path


def make_job(folder: Path, kinds: tuple[str, ...], count: int = COUNT) -> Path:
    fake_jobs.run(folder, fake_jobs.job(count, save_as=kinds, grid_images=4))
    return folder


SORTED = DATA[np.argsort(NAMES)]
KINDS: dict[str, tuple[Callable[[Path], Path], np.ndarray]] = {
    "npz": (lambda root: make_npz(root / "x.npz", arr_1=np.arange(COUNT)), DATA),
    "compressed": (lambda root: make_npz(root / "x.npz", np.savez_compressed, arr_1=np.arange(COUNT)), DATA),
    "folder": (lambda root: make_folder(root / "x"), SORTED),
    "zip": (lambda root: make_zip(root / "x.zip"), SORTED),
    "packed": (make_packed, SORTED),
}


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A set of each kind, and its pixels in order."""
    make, want = KINDS[request.param]
    return make(tmp_path), want


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
def test_shares_are_the_pixels(made: tuple[Path, np.ndarray], world_size: int) -> None:
    images = opened(made[0])
    assert (images.count, images.shape, images.lossy, images.resized) == (COUNT, SHAPE, "", "")
    assert images.path == made[0]
    for batch_size in (3, 20):
        np.testing.assert_array_equal(read(images, batch_size, world_size), made[1])


def test_a_limit_takes_the_first(made: tuple[Path, np.ndarray]) -> None:
    np.testing.assert_array_equal(read(opened(made[0], limit=4), 3, 2), made[1][:4])
    assert opened(made[0], limit=100).count == COUNT
    assert refused(made[0], limit=0) == "at least one image must be read, not 0"


def test_resizing_is_the_recipe_of_training(made: tuple[Path, np.ndarray]) -> None:
    for size in ((3, 2), (8, 6)):
        images = opened(made[0], resize=size)
        want = np.stack([load_image(png(image), size, "RGB") for image in made[1]])
        assert images.shape == (*size, 3)
        assert images.resized.startswith(f"resized to {size[0]}x{size[1]} pixels: box halvings")
        np.testing.assert_array_equal(read(images, 3, 2), want)
    assert opened(made[0], resize=SHAPE[:2]).resized == ""


def test_gray_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=DATA[..., :1])
    make_folder(tmp_path / "x", DATA[..., 0])
    (tmp_path / "x" / "z.png").write_bytes(png(DATA[0, ..., 0].astype(np.uint16) << 8))
    Image.fromarray(DATA[0, ..., 0] > 128).save(tmp_path / "x" / "zz.png")
    arrays, files = opened(tmp_path / "x.npz"), opened(tmp_path / "x")
    assert arrays.shape == files.shape == (5, 7, 1)
    np.testing.assert_array_equal(read(arrays), DATA[..., :1])
    want = [*SORTED[..., :1], DATA[0, ..., :1], np.uint8(255) * (DATA[0, ..., :1] > 128)]
    np.testing.assert_array_equal(read(files), want)
    small = [load_image(png(image[..., 0]), (3, 3), "L") for image in DATA]
    np.testing.assert_array_equal(read(opened(tmp_path / "x.npz", resize=(3, 3))), small)
    (tmp_path / "x" / "a.png").write_bytes(png(DATA[1]))  # one of colours makes all RGB
    files = opened(tmp_path / "x")
    assert files.shape == SHAPE
    np.testing.assert_array_equal(read(files)[0], np.repeat(want[0], 3, axis=2))


@pytest.mark.parametrize("loader", ["auto", "pillow", "dali"])
def test_every_format_is_pillows(loader: str, tmp_path: Path) -> None:
    """On a CPU also through DALI, which decodes some of these files itself."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    fields = Image.fromarray(DATA[0, :3, :3]).resize((33, 19), Image.Resampling.BICUBIC)
    alpha = fields.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(fields.size))
    saved = {
        "a.jpg": (fields, {"quality": 70}),
        "b.jpg": (fields, {"quality": 90, "subsampling": 0, "progressive": True}),
        "c.jpg": (fields.convert("L"), {}),
        "d.jpg": (fields.convert("CMYK"), {}),
        "e.gif": (fields.convert("P"), {}),
        "f.png": (alpha, {}),
        "g.webp": (fields, {"lossless": True}),
        "h.png": (fields, {}),
    }
    for name, (image, options) in saved.items():
        image.save(tmp_path / name, **options)
    images = opened(tmp_path, loader=loader)
    assert (images.shape, images.lossy) == ((19, 33, 3), "JPEG")
    want = []
    for name in saved:
        with Image.open(tmp_path / name) as image:
            want.append(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(read(images, world_size=2), want)
    fields.save(tmp_path / "i.webp")
    assert opened(tmp_path).lossy == "JPEG, WebP"


def test_dalis_resizing_is_named(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    make_folder(tmp_path)
    assert "by DALI" in opened(tmp_path, resize=(4, 4), loader="dali").resized
    assert "by DALI" not in opened(tmp_path, resize=(4, 4)).resized


def test_jobs(tmp_path: Path) -> None:
    """The grid is none of the images; the merged file with most images is read, of several."""
    folder = make_job(tmp_path / "job", ("npz", "zip", "png"), 9)
    make_job(folder, ("npz",), COUNT)
    index = np.arange(COUNT)
    images = opened(folder)
    assert images.path == folder
    np.testing.assert_array_equal(read(images), fake_jobs.images(index))
    for file in folder.glob("*.npz"):
        file.unlink()
    names = {path.name: number for number, path in enumerate(sorted((folder / "images").iterdir()))}
    with zipfile.ZipFile(next(folder.glob("*.zip"))) as archive:
        order = [names[name] for name in archive.namelist() if name in names]
    assert sorted(order) == list(range(9))
    by_name = np.empty_like(fake_jobs.images(np.arange(9)))
    by_name[order] = fake_jobs.images(np.arange(9))
    np.testing.assert_array_equal(read(opened(folder)), by_name)
    next(folder.glob("*.zip")).unlink()
    np.testing.assert_array_equal(read(opened(folder)), by_name)
    for file in (folder / "images").iterdir():
        file.unlink()
    (folder / "images").rmdir()
    assert refused(folder).endswith("has no npz, zip or pictures; give --save_as npz to sample.py")


def test_nothing_is_loaded_whole(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (400, 64, 64, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", arr_0=data)
        images = opened(tmp_path / "x.npz")
        tracemalloc.start()
        for batch, positions in images.batches(4):
            np.testing.assert_array_equal(batch.numpy(), data[positions])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < data.nbytes / 4


def test_a_share_reads_only_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is compressed."""
    images = opened(make_npz(tmp_path / "x.npz"))

    def fail(self: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
        raise AssertionError("zipfile reads an entry from its start")

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    rows = [batch.numpy() for batch, _ in images.batches(3, 1, 2)]
    np.testing.assert_array_equal(np.concatenate(rows), DATA[COUNT // 2 :])


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(save: Callable[..., None], tmp_path: Path) -> None:
    path = make_npz(tmp_path / "x.npz", save)
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        assert f"{path} is " in refused(path)
    path.write_bytes(whole)
    spoil(path, len(whole) // 2)
    assert refused(path).startswith(f"{path} is not an .npz of arrays, or is damaged (")


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def test_arrays_that_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for array, words in (
        (DATA.astype(np.float32), "is float32 [11, 5, 7, 3]; images are uint8 [N, H, W, C]"),
        (DATA.astype(np.float32), "which (255 * x).round().astype(np.uint8) makes of x from 0 to 1"),
        (DATA.transpose(0, 3, 1, 2), "have their channels first, [11, 3, 5, 7]; give them as [N, H, W, C]"),
        (DATA[..., 0], "is uint8 [11, 5, 7]; images are"),
        (np.asfortranarray(DATA), "is in Fortran's order"),
        (np.array([{}, 1]), "arr_0 holds Python objects"),
        (DATA[:0], "holds no images"),
        (DATA[:, :0], "is uint8 [11, 0, 7, 3]; images are"),
        (DATA[..., :2], "have 2 channels; give images with 1 (gray) or 3 (RGB)"),
    ):
        np.savez(path, arr_0=array)
        assert words in refused(path)
    np.savez(path, mu=DATA, sigma=DATA)
    assert "has no arr_0 but mu; give an .npz with" in refused(path)
    np.save(tmp_path / "x.npy", DATA)
    assert "is a single array; if it holds uint8 images, np.savez(FILE, np.load(" in refused(tmp_path / "x.npy")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"mu": 0}))
    assert "is a pickle, which is not read because it could run code; give an .npz" in refused(tmp_path / "x.pkl")
    for claimed in ((COUNT + 1, *SHAPE), (1 << 40, *SHAPE), (-1, *SHAPE)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", npy(claimed, DATA.tobytes()))
        assert "arr_0 is shorter than its header says" in refused(path)
    np.savez(path, arr_0=np.zeros((2, 1, 30_000, 3), np.uint8))
    assert "can't be resized (" in refused(path, resize=(30_000, 1))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_of_two_sizes(kind: str, tmp_path: Path) -> None:
    place = make_folder(tmp_path / "x")
    other = np.zeros((4, 6, 3), np.uint8)
    (place / "b" / "004.png").write_bytes(png(other))
    place = in_kind(place, kind)
    message = refused(place)
    assert "a/000.png has 5x7 pixels and b/004.png has 4x6 pixels; --resize 64 resizes all" in message
    small = read(opened(place, resize=(4, 4)))
    np.testing.assert_array_equal(small[sorted(NAMES).index("b/004")], np.zeros((4, 4, 3)))


def in_kind(folder: Path, kind: str) -> Path:
    """The folder itself, or a zip of it."""
    if kind == "zip":
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
            for file in folder.rglob("*.*"):
                archive.write(file, file.relative_to(folder).as_posix())
        return folder.with_suffix(".zip")
    return folder


@pytest.mark.parametrize("loader", ["auto", "pillow"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("damage", ["cut", "spoilt", "text", "empty"])
def test_an_unreadable_picture_is_refused(kind: str, loader: str, damage: str, tmp_path: Path) -> None:
    """Training replaces it by the next one, which would be another set."""
    place = make_folder(tmp_path / "x")
    bad = place / "c" / "005.png"
    if damage == "spoilt":
        spoil(bad, bad.stat().st_size // 2)
    else:
        bad.write_bytes({"cut": bad.read_bytes()[:-40], "text": b"<html>", "empty": b""}[damage])
    place = in_kind(place, kind)
    message = refused(place, loader=loader)
    assert message.startswith(f"{place / 'c' / '005.png'} can't be read (")
    assert message.endswith(f"); repair it or remove it from {place}")
    assert opened(place, limit=4).count == 4


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    place = make_folder(tmp_path / "x")
    (place / "link.png").symlink_to("nowhere.png")
    assert "link.png can't be read (No such file or directory)" in refused(place)


def test_damaged_zips(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "is no zip archive, or is damaged" in refused(path)
    path.write_bytes(whole)
    spoil(path, whole.index(b"IDAT") + 20)
    assert "can't be read (Bad CRC-32" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert f"the zip {path} holds no pictures; give" in refused(path)


def test_a_packed_folder_with_replaced_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "of")
    pictures(folder, [f"d/{i:03d}" for i in range(200)], 8)
    (folder / "b" / "001.png").write_bytes(b"no picture")
    pack(index_images(str(folder), "none"), (5, 7), 3, tmp_path / "packed", workers=1)
    message = refused(tmp_path / "packed")
    assert "was packed with 1 unreadable image, such as b/001.png (no picture), which others replace" in message
    assert opened(tmp_path / "packed", limit=4).count == 4


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    assert refused("").startswith("no images are given; give an .npz of images, a folder or a zip")
    assert refused(tmp_path / "no").startswith(f"{tmp_path / 'no'} does not exist; give an .npz")
    assert "can't be opened (File name too long)" in refused("x" * 5000)
    folder = make_folder(tmp_path / "x")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder, "x")
    assert "x.tar is a tar archive; unpack it" in refused(tmp_path / "x.tar")
    assert "is a single picture; give the folder" in refused(folder / "a" / "000.png")
    (tmp_path / "x.npz").write_text("hello")
    assert "x.npz is a text file" in refused(tmp_path / "x.npz")
    (tmp_path / "empty").mkdir()
    assert "empty is empty" in refused(tmp_path / "empty")
    np.savez(tmp_path / "empty" / "batch.npz", arr_0=DATA)
    assert f"holds no pictures but batch.npz; give {tmp_path / 'empty' / 'batch.npz'}" in refused(tmp_path / "empty")
    run = make_folder(tmp_path / "run" / "samples").parent
    (run / "config.json").write_text(json.dumps({"model": {}, "diffusion": {}, "train": {}}))
    assert "is the folder of a training run" in refused(run)
