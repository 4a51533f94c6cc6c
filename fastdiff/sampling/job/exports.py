"""Images of a job as files for others to read: npz, PNGs, a zip of PNGs, WebDataset shards.

Each takes the images from a source a part at a time, so that none ever holds more.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdiff.runtime.files import atomic_write
from fastdiff.sampling.pictures import Images, picture

SHARD = 10_000
"""Images in a shard of a tar."""
_THREADS = 4
_ROWS = 1 << 16  # numbers of images that are written at a time


@dataclass(frozen=True)
class Source:
    """Images 0 to count - 1 of a job.

    images(first)  yields (number of the first, images and labels) in order, a part at a time, from image `first` on.
    labels         yields the labels alone, a part's at a time.
    """

    count: int
    shape: tuple[int, int, int]
    labelled: bool
    seed: int
    images: Callable[[int], Iterator[tuple[int, Images]]]
    labels: Callable[[], Iterator[np.ndarray]]


def write_npz(path: Path, source: Source) -> None:
    """improved-diffusion's format, arr_0 [N, H, W, C] uint8 and with classes arr_1 [N] int64, and what draws an image
    again: seed [] int64 and index [N] int64."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        pixels = (drawn.images for _, drawn in source.images(0))
        _write_array(archive, "arr_0", np.uint8, (source.count, *source.shape), pixels)
        if source.labelled:
            _write_array(archive, "arr_1", np.int64, (source.count,), source.labels())
        _write_array(archive, "seed", np.int64, (), [np.array(source.seed)])
        starts = range(0, source.count, _ROWS)
        index = (np.arange(start, min(start + _ROWS, source.count)) for start in starts)
        _write_array(archive, "index", np.int64, (source.count,), index)


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: type, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())


def class_words(class_names: list[str]) -> list[str]:
    """Class names as file names can begin with them: letters, digits and '-', each different from the others.

    What comes before the first underscore of a file's name is its class for a training.
    """
    words: list[str] = []
    for label, name in enumerate(class_names):
        word = plain = "".join(c if c.isalnum() or c == "-" else "-" for c in name) or str(label)
        suffix = label
        while word in words:
            word, suffix = f"{plain}-{suffix}", suffix + 1
        words.append(word)
    return words


def file_name(index: int, label: int | None, words: list[str]) -> str:
    """cat_000012.png, 5_000012.png without class names, 000012.png without labels."""
    if label is None:
        return f"{index:06d}.png"
    return f"{words[label] if 0 <= label < len(words) else label}_{index:06d}.png"


def index_in(name: str) -> int | None:
    """The image's number in a file name as `file_name` gives it."""
    stem = name.removesuffix(".png").rpartition("_")[2]
    return int(stem) if name.endswith(".png") and len(stem) >= 6 and stem.isascii() and stem.isdecimal() else None


def encode(pixels: np.ndarray) -> bytes:
    """[H, W, C] uint8 → a PNG file's bytes."""
    buffer = io.BytesIO()
    picture(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_pngs(folder: Path, source: Source, words: list[str], there: set[int]) -> None:
    """A PNG per image, but for those that are `there`."""
    folder.mkdir(exist_ok=True)

    def write(index: int, label: int | None, pixels: np.ndarray) -> None:
        with atomic_write(folder / file_name(index, label, words), sync=False) as file:
            file.write(encode(pixels))

    first = next((index for index in range(source.count) if index not in there), source.count)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start, drawn in source.images(first):
            labels = [None] * len(drawn.images) if drawn.labels is None else drawn.labels.tolist()
            rows = [row for row in range(len(labels)) if start + row not in there]
            numbers, kinds = [start + row for row in rows], [labels[row] for row in rows]
            for _ in pool.map(write, numbers, kinds, [drawn.images[row] for row in rows]):
                pass


def _encoded(source: Source, first: int) -> Generator[tuple[int, int | None, bytes], None, None]:
    """(number, label, PNG) of each image from `first` on."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start, drawn in source.images(first):
            for row, png in enumerate(pool.map(encode, drawn.images)):
                yield start + row, None if drawn.labels is None else int(drawn.labels[row]), png


def write_zip(path: Path, source: Source, words: list[str]) -> None:
    """The PNGs, and dataset.json: {"labels": [[name, label], …]}, null without classes."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for index, label, png in _encoded(source, 0):
            archive.writestr(zipfile.ZipInfo(file_name(index, label, words)), png)
        with archive.open(zipfile.ZipInfo("dataset.json"), "w", force_zip64=True) as listing:
            if not source.labelled:
                listing.write(b'{"labels": null}')
                return
            index, between = 0, '{"labels": ['
            for labels in source.labels():
                for label in labels.tolist():
                    entry = json.dumps([file_name(index, label, words), label])
                    listing.write(f"{between}{entry}".encode())
                    index, between = index + 1, ",\n"
            listing.write(b"]}")


def shard_paths(base: Path, count: int) -> list[Path]:
    """base-000000.tar, base-000001.tar, … for `count` images."""
    return [base.with_name(f"{base.name}-{shard:06d}.tar") for shard in range(-(-count // SHARD))]


def write_tars(base: Path, source: Source) -> None:
    """WebDataset shards: KEY.png, with classes KEY.cls, and KEY.json, KEY the image's number. Whole shards stay."""
    paths = shard_paths(base, source.count)
    for shard, path in enumerate(paths):
        if path.exists():
            continue
        last = min((shard + 1) * SHARD, source.count) - 1
        with (
            closing(_encoded(source, shard * SHARD)) as images,
            atomic_write(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for index, label, png in images:
                about = {"seed": source.seed, "index": index, "label": label}
                _add(archive, f"{index:06d}.png", png)
                if label is not None:
                    _add(archive, f"{index:06d}.cls", str(label).encode())
                _add(archive, f"{index:06d}.json", json.dumps(about).encode())
                if index == last:
                    break


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
