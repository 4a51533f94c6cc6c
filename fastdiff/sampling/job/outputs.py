"""Makes the output files of a job once all images are drawn: npz, PNGs, zip, WebDataset shards, a grid, a trajectory.

Every format reads the images a chunk at a time, so that memory doesn't grow with their number.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, PngImagePlugin

from fastdiff.runtime.files import atomic_write, files_in, remove_partial_files
from fastdiff.sampling.job.chunks import Store
from fastdiff.sampling.job.manifest import Job
from fastdiff.sampling.pictures import CHANNELS, FileNames, encode, grid, save_animation, strip

Trace: TypeAlias = Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray]]
"""trace(index [n] int64) → (predictions of x_0 over the steps, noisy first, final images); each [n, H, W, C] uint8."""
SHARD = 10_000
"""Images in a shard of a tar."""
_THREADS = 4
_ROWS = 1 << 16  # entries of `index` that are written at a time


class Outputs:
    """The output files of a job. A file that exists under its name is complete and is not made again.

    trace draws the trajectory; None leaves it out.
    """

    def __init__(self, store: Store, job: Job, trace: Trace | None) -> None:
        self.store, self.job, self.trace = store, job, trace
        self.base = store.folder / (f"samples_{job.count}x" + "x".join(map(str, job.shape)))
        self.images = store.folder / "images"
        self.names = FileNames(job.class_names, job.names)
        pictures = job.shape[2] in CHANNELS
        self.grid = min(job.grid_images, job.count) if pictures else 0
        self.trajectory = min(job.trajectory, job.count) if pictures and trace is not None else 0

    @property
    def key(self) -> str:
        """A part of a file name that distinguishes these outputs from others of the same job."""
        return "-".join([str(self.job.count), *self.job.save_as, str(self.grid), str(self.trajectory)])

    def path(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    def paths(self) -> list[Path]:
        """All files, those of the formats first; for png the folder."""
        found = [path for kind in self.job.save_as for path in self._paths_of(kind)]
        if self.grid:
            found.append(self.path(".png"))
        if self.trajectory:
            found += [self.path("_steps.png"), self.path("_steps.gif")]
        return found

    def places(self) -> str:
        """Where the images are, for a message."""
        files = [self._paths_of(kind) for kind in self.job.save_as]
        *others, last = [f"{first} to {rest[-1].name}" if rest else str(first) for first, *rest in files]
        return f"{', '.join(others)} and {last}" if others else last

    def missing(self) -> list[str]:
        """The outputs that are still to be made: formats, "grid", "trajectory"."""
        missing = [kind for kind in self.job.save_as if not self._is_made(kind)]
        if self.grid and _label(self.path(".png")) != self._grid_label():
            missing.append("grid")
        steps = self.path("_steps.png")
        if self.trajectory and not (self.path("_steps.gif").exists() and _label(steps) == self._steps_label()):
            missing.append("trajectory")
        return missing

    def make(self, missing: list[str]) -> list[str]:
        """Make the missing outputs. Returns lines to print about the pictures."""
        lines = []
        if "npz" in missing:
            write_npz(self.path(".npz"), self.store, self.job.class_names)
        if "png" in missing:
            write_pngs(self.images, self.store, self.names, self._written())
        if "zip" in missing:
            write_zip(self.path(".zip"), self.store, self.names, self.job.class_names)
        if "tar" in missing:
            write_tars(self.base, self.store, self.job.class_names)
        if "grid" in missing:
            self._save_grid()
            first = f"first {self.grid} images" if self.grid > 1 else "first image"
            lines.append(f"a grid of the {first} in {self.path('.png')}")
        if "trajectory" in missing:
            self._save_trajectory()
            lines.append(f"trajectories of the first {self.trajectory} images in {self.path('_steps.png')} and .gif")
        return lines

    def tidy(self) -> None:
        """Remove unfinished files."""
        remove_partial_files(self.store.folder)
        remove_partial_files(self.images)

    def _paths_of(self, kind: str) -> list[Path]:
        if kind == "tar":
            return shard_paths(self.base, self.job.count)
        return [self.images if kind == "png" else self.path(f".{kind}")]

    def _is_made(self, kind: str) -> bool:
        if kind == "npz":
            return any(piece.path == self.path(".npz") for piece in self.store.merged())
        if kind == "png":
            return self._written().issuperset(range(self.job.count))
        return all(path.exists() for path in self._paths_of(kind))

    def _written(self) -> set[int]:
        """Numbers of the images that have a PNG file."""
        return {index for name in files_in(self.images) if (index := self.names.index_of(name)) is not None}

    def _save_grid(self) -> None:
        """Save the first images, sorted by class; each class has rows of its own if they come out even."""
        images, labels = [], []
        for start, drawn in self.store.images():
            images.append(drawn.images)
            labels.append(np.zeros(len(drawn.images)) if drawn.labels is None else drawn.labels)
            if start + len(drawn.images) >= self.grid:
                break
        order = np.argsort(np.concatenate(labels)[: self.grid], kind="stable")
        classes = self.job.grid_classes
        per_class = self.grid // classes if classes and self.grid % classes == 0 else None
        self._save_png(".png", grid(np.concatenate(images)[order], columns=per_class), self._grid_label())

    def _save_trajectory(self) -> None:
        assert self.trace is not None
        frames, final = self.trace(np.arange(self.trajectory))
        with atomic_write(self.path("_steps.gif"), sync=False) as file:
            save_animation(file, frames, final)
        # The strip comes last, because its label says that both files are complete.
        self._save_png("_steps.png", strip(frames, final), self._steps_label())

    def _save_png(self, ending: str, image: Image.Image, label: str) -> None:
        about = PngImagePlugin.PngInfo()
        about.add_text("shows", label)
        with atomic_write(self.path(ending), sync=False) as file:
            image.save(file, format="PNG", pnginfo=about)

    def _grid_label(self) -> str:
        return f"{self.grid} images, {self.job.grid_classes} classes"

    def _steps_label(self) -> str:
        return f"{self.trajectory} images over the steps"


def _label(path: Path) -> str | None:
    """The label that _save_png wrote into a picture; None if there is no picture."""
    try:
        with Image.open(path) as image:
            return image.info.get("shows")
    except OSError:
        return None


# --- formats ---


def write_npz(path: Path, store: Store, class_names: Sequence[str] = ()) -> None:
    """Write improved-diffusion's arrays, arr_0 [N, H, W, C] uint8 and, with classes, arr_1 [N] int64, and seed [] int64
    and index [N] int64, from which the images can be drawn again. class_names [K] are texts, where classes have names.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        pixels = (drawn.images for _, drawn in store.images())
        _write_array(archive, "arr_0", np.uint8, (store.count, *store.shape), pixels)
        if store.labelled:
            _write_array(archive, "arr_1", np.int64, (store.count,), store.labels())
            if class_names:
                names = np.array(class_names, dtype=np.str_)
                _write_array(archive, "class_names", names.dtype, names.shape, [names])
        _write_array(archive, "seed", np.int64, (), [np.array(store.seed)])
        starts = range(0, store.count, _ROWS)
        index = (np.arange(start, min(start + _ROWS, store.count)) for start in starts)
        _write_array(archive, "index", np.int64, (store.count,), index)


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: type | np.dtype, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())


def write_pngs(folder: Path, store: Store, names: FileNames, there: set[int]) -> None:
    """Write a PNG file for each image except those in `there`."""
    folder.mkdir(exist_ok=True)

    def write(item: tuple[int, int | None, np.ndarray]) -> None:
        index, label, pixels = item
        with atomic_write(folder / names(index, label), sync=False) as file:
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


def write_zip(path: Path, store: Store, names: FileNames, class_names: Sequence[str] = ()) -> None:
    """Write a zip of the PNGs and of dataset.json: {"class_names": […], "labels": [[name, label], …]}.

    Without classes labels is null; without their names class_names is left out.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for index, label, png in _encoded(store, 0):
            archive.writestr(zipfile.ZipInfo(names(index, label)), png)
        with archive.open(zipfile.ZipInfo("dataset.json"), "w", force_zip64=True) as listing:
            if not store.labelled:
                listing.write(b'{"labels": null}')
                return
            named = f'"class_names": {json.dumps(list(class_names))}, ' if class_names else ""
            index, between = 0, f'{{{named}"labels": ['
            for labels in store.labels():
                for label in labels.tolist():
                    entry = json.dumps([names(index, label), label])
                    listing.write(f"{between}{entry}".encode())
                    index, between = index + 1, ",\n"
            listing.write(b"]}")


def shard_paths(base: Path, count: int) -> list[Path]:
    """The paths base-000000.tar, base-000001.tar, … of the shards of `count` images."""
    return [base.with_name(f"{base.name}-{shard:06d}.tar") for shard in range(-(-count // SHARD))]


def write_tars(base: Path, store: Store, class_names: Sequence[str] = ()) -> None:
    """Write WebDataset shards of KEY.png, KEY.cls (with classes) and KEY.json, where KEY is the image's number.

    KEY.cls is the label, KEY.json has also the name of the class where it has one.

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
                    about: dict[str, Any] = {"seed": store.seed, "index": index, "label": label}
                    if label is not None and label < len(class_names):
                        about["class_name"] = class_names[label]
                    _add(archive, f"{index:06d}.png", png)
                    if label is not None:
                        _add(archive, f"{index:06d}.cls", str(label).encode())
                    _add(archive, f"{index:06d}.json", json.dumps(about).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
