"""Writes the images of a job in the formats npz, PNG files, a zip of PNGs, and WebDataset shards.

Every format reads the images a chunk at a time, so that memory doesn't grow with their number.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import numpy as np

from fastdiff.runtime.files import atomic_write
from fastdiff.sampling.job.chunks import Store
from fastdiff.sampling.pictures import encode, file_name

SHARD = 10_000
"""Images in a shard of a tar."""
_THREADS = 4
_ROWS = 1 << 16  # entries of `index` that are written at a time


def write_npz(path: Path, store: Store) -> None:
    """Write improved-diffusion's arrays, arr_0 [N, H, W, C] uint8 and, with classes, arr_1 [N] int64, and seed [] int64
    and index [N] int64, from which the images can be drawn again."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        pixels = (drawn.images for _, drawn in store.images())
        _write_array(archive, "arr_0", np.uint8, (store.count, *store.shape), pixels)
        if store.labelled:
            _write_array(archive, "arr_1", np.int64, (store.count,), store.labels())
        _write_array(archive, "seed", np.int64, (), [np.array(store.seed)])
        starts = range(0, store.count, _ROWS)
        index = (np.arange(start, min(start + _ROWS, store.count)) for start in starts)
        _write_array(archive, "index", np.int64, (store.count,), index)


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: type, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())


def write_pngs(folder: Path, store: Store, words: list[str], there: set[int]) -> None:
    """Write a PNG file for each image except those in `there`."""
    folder.mkdir(exist_ok=True)

    def write(item: tuple[int, int | None, np.ndarray]) -> None:
        index, label, pixels = item
        with atomic_write(folder / file_name(index, label, words), sync=False) as file:
            file.write(encode(pixels))

    first = next((index for index in range(store.count) if index not in there), store.count)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start, drawn in store.images(first):
            labels = [None] * len(drawn.images) if drawn.labels is None else drawn.labels.tolist()
            items = zip(count(start), labels, drawn.images, strict=False)
            list(pool.map(write, (item for item in items if item[0] not in there)))


def _encoded(store: Store, first: int) -> Generator[tuple[int, int | None, bytes], None, None]:
    """Yield (number, label, PNG file's bytes) of each image from `first` on."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start, drawn in store.images(first):
            for row, png in enumerate(pool.map(encode, drawn.images)):
                yield start + row, None if drawn.labels is None else int(drawn.labels[row]), png


def write_zip(path: Path, store: Store, words: list[str]) -> None:
    """Write a zip of the PNGs and of dataset.json: {"labels": [[name, label], …]}, or null without classes."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for index, label, png in _encoded(store, 0):
            archive.writestr(zipfile.ZipInfo(file_name(index, label, words)), png)
        with archive.open(zipfile.ZipInfo("dataset.json"), "w", force_zip64=True) as listing:
            if not store.labelled:
                listing.write(b'{"labels": null}')
                return
            index, between = 0, '{"labels": ['
            for labels in store.labels():
                for label in labels.tolist():
                    entry = json.dumps([file_name(index, label, words), label])
                    listing.write(f"{between}{entry}".encode())
                    index, between = index + 1, ",\n"
            listing.write(b"]}")


def shard_paths(base: Path, count: int) -> list[Path]:
    """The paths base-000000.tar, base-000001.tar, … of the shards of `count` images."""
    return [base.with_name(f"{base.name}-{shard:06d}.tar") for shard in range(-(-count // SHARD))]


def write_tars(base: Path, store: Store) -> None:
    """Write WebDataset shards of KEY.png, KEY.cls (with classes) and KEY.json, where KEY is the image's number.

    Shards are written in order. Those before the first missing one are complete and stay unchanged.
    """
    paths = shard_paths(base, store.count)
    whole = next((shard for shard, path in enumerate(paths) if not path.exists()), len(paths))
    with closing(_encoded(store, whole * SHARD)) as images:
        for path in paths[whole:]:
            with (
                atomic_write(path) as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
            ):
                for index, label, png in islice(images, SHARD):
                    about = {"seed": store.seed, "index": index, "label": label}
                    _add(archive, f"{index:06d}.png", png)
                    if label is not None:
                        _add(archive, f"{index:06d}.cls", str(label).encode())
                    _add(archive, f"{index:06d}.json", json.dumps(about).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
