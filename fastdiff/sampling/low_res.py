"""The small images of a super-resolution job: an .npz, a folder of pictures, a sampling job's folder, or a picture.

`BaseImages` returns the network's arguments for image numbers.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError, one_line, quoted, shortened
from fastdiff.images.label_files import DATASET_JSON
from fastdiff.images.labels import NAMED, counted, label_images
from fastdiff.images.listing import is_image, list_images
from fastdiff.images.other_data import describe_file, kind_of_file
from fastdiff.images.pixels import MODES, load_image
from fastdiff.images.unreadable import GaveUp, ImageFiles, what_is_wrong
from fastdiff.models import SuperResSettings
from fastdiff.runtime.untrusted import npz_header, read_npz_array
from fastdiff.sampling.job.results import images_of_job, is_job
from fastdiff.sampling.labels import renumbered

LARGE = 256 << 20
"""Bytes that any array in an npz may take when unpacked."""
EXPANSION = 100
"""A larger array may take this many times its file's bytes: images rarely compress to less than a tenth."""


def _place(source: str) -> Path:
    """The npz, folder of pictures or picture that `source` names; of a job's folder its npz or its pictures."""
    if not source:
        raise UserError("--base_samples is missing: give an .npz or a folder of small images, or one image")
    path = Path(source)
    try:
        exists = path.exists()
        if not is_job(path):
            if not exists:
                raise UserError(f"{path} does not exist; give an .npz or a folder of small images, or one image")
            return path
    except OSError as error:
        raise UserError(f"{quoted(source)} can't be opened ({error.strerror})") from error
    if found := images_of_job(path, ".npz"):
        return found
    raise UserError(f"{path} is the folder of a sampling job that has no npz; give --save_as npz to sample.py")


class BaseImages:
    """Small images [N, h, w, C] uint8 and labels [N] int64 or None; pictures are read lazily."""

    def __init__(
        self, source: str, settings: SuperResSettings, class_names: list[str], with_labels: bool | None = None
    ) -> None:
        """with_labels says whether the images' classes are needed; by default where the model has classes.

        class_names are the model's. Raises UserError for images or labels that the model can't take.
        """
        self.settings, self.path = settings, _place(source)
        self._files: list[Path] | None = None
        self.labels: np.ndarray | None = None
        self._listed = False  # whether other labels may come with the same images and names
        self.notes: list[str] = []
        """The line that says which classes the pictures are of, and by which rule; empty for an npz."""
        self.names: list[str] = []
        """The pictures' paths below the folder without their endings; empty for an npz."""
        needs_labels = settings.class_cond if with_labels is None else with_labels
        if self.path.is_dir() or is_image(self.path.name):
            self._list(class_names, needs_labels)
            return
        content = read_npz(self.path, settings)
        self._images = content.images
        if needs_labels:
            self.labels = self._checked(content, class_names)
            self._listed = bool(content.class_names)

    def _list(self, class_names: list[str], needs_labels: bool) -> None:
        """List a folder's pictures, or the only one, and find their classes if they are needed."""
        root = self.path if self.path.is_dir() else self.path.parent
        self._files = list_images(self.path) if self.path.is_dir() else [self.path]
        paths = [file.relative_to(root).as_posix() for file in self._files]
        self.names = [path.rpartition(".")[0] for path in paths]
        if not needs_labels:
            return
        known = class_names or [str(number) for number in range(self.settings.num_classes)]
        try:
            classes = label_images(paths, root, "auto", known)
            self.labels, self._listed = classes.labels, classes.found_in == str(root / DATASET_JSON)
            counts = enumerate(np.bincount(classes.labels).tolist())
            found = counted((classes.names[label], count) for label, count in counts if count)
            self.notes = [f"labels: from {classes.found_in}: {found}"]
        except UserError as error:
            reason = str(error).partition("; ")[0]  # the remedies are the trainer's
            remedy = f"{', '.join(class_names[:NAMED])} by name or number" if class_names else "numbers such as 0,5"
            raise UserError(
                f"{self.path} doesn't say which of the model's classes its pictures are of ({reason}); give --classes: "
                f"{remedy}"
            ) from None

    def _checked(self, content: SmallImages, class_names: list[str]) -> np.ndarray:
        """The labels [N] of an npz by the model's numbers. UserError for classes that the model doesn't have."""
        if content.labels is None:
            raise UserError(f"{self.path} has no labels (arr_1), which a class-conditional model needs; give --classes")
        labels, count = content.labels, self.settings.num_classes
        if content.class_names and class_names:
            numbers = renumbered(class_names, content.class_names)
            if len(labels) and labels.min() >= 0 and labels.max() < len(numbers):
                labels = numbers[labels]
                if (labels < 0).any():
                    name = content.class_names[int(content.labels[labels < 0][0])]
                    raise UserError(f"{self.path} has images of class {name!r}, which the model doesn't know")
        strange = labels[(labels < 0) | (labels >= count)]
        if len(strange):
            raise UserError(f"{self.path} has label {strange[0]}, the model classes 0 to {count - 1}")
        return labels

    @property
    def digest(self) -> str:
        """A hash of the small images, or of the names and sizes of a folder's files, and of labels that could change
        while these stay the same: a dataset.json's, and those of an npz with class_names."""
        found = hashlib.sha256()
        if self._files is None:
            found.update(self._images.tobytes())
        for file in self._files or ():
            name = file.relative_to(self.path) if file != self.path else file.name
            size = file.stat().st_size if file.exists() else -1  # reading tells of a link to nowhere, in a sentence
            found.update(f"{name} {size}\n".encode())
        if self._listed and self.labels is not None:
            found.update(self.labels.tobytes())
        return f"sha256:{found.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._images) if self._files is None else len(self._files)

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The network's arguments for images `index` [B] of a job, whose image i enlarges small image i modulo N."""
        rows = index.cpu().numpy() % len(self)
        if self._files is None:
            images = self._images[rows]
        else:
            mode = MODES[self.settings.in_channels]
            images = np.stack([self._load(self._files[row], mode) for row in rows])
        arguments = {"low_res": as_low_res(images, index.device)}
        if self.labels is not None:
            arguments["y"] = torch.from_numpy(self.labels[rows]).to(index.device)
        return arguments

    def _load(self, file: Path, mode: str) -> np.ndarray:
        try:
            return load_image(file, self.settings.small_size, mode)
        except Exception as error:  # Pillow's decoders raise many types
            assert self._files is not None
            # The flag is named here because callers can't tell it from other errors while the job draws.
            raise GaveUp(
                f"{file} can't be read ({what_is_wrong(error)}); repair it or remove it from the folder",
                "--base_samples",
                ImageFiles(len(self._files), self._files.__getitem__, self.settings.small_size, mode),
            ) from error


def as_low_res(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert images [N, h, w, C] uint8 to a super-resolution model's input [N, C, h, w] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


class SmallImages(NamedTuple):
    """The content of an npz."""

    images: np.ndarray
    """[N, h, w, C] uint8"""
    labels: np.ndarray | None
    """[N] int64"""
    class_names: list[str]
    """Names of the classes by number; empty where the npz has none."""


def read_npz(path: Path, settings: SuperResSettings) -> SmallImages:
    """Read arr_0, arr_1 and class_names of an npz of small images. Raises UserError if they don't fit the model.

    Each array's header is checked before the array is read, and an array that would unpack to more than LARGE bytes
    and EXPANSION times the file's is refused, so that a small file takes little memory.
    """
    wanted = (*settings.small_size, settings.in_channels)
    no_arr_0 = UserError(f"{path} has no arr_0; give an .npz as sample.py writes it")
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:  # an .npy file holds a single array
                raise no_arr_0
        if path.suffix != ".npz" and kind_of_file(path) in ("zip", "tar", "gzip"):
            raise UserError(f"{path} is {describe_file(path)}")
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise no_arr_0
            most = max(LARGE, EXPANSION * path.stat().st_size)
            shape, dtype = npz_header(archive, "arr_0", most)
            if dtype != np.uint8 or len(shape) != 4 or shape[1:] != wanted or not shape[0]:
                raise UserError(
                    f"arr_0 of {path} is {shortened(str(dtype))} {quoted(list(shape))}, the model takes uint8 "
                    f"[N, {', '.join(map(str, wanted))}]"
                )
            images = read_npz_array(archive, "arr_0", most)
            if "arr_1.npy" not in archive.namelist():
                return SmallImages(images, None, [])
            label_shape, label_dtype = npz_header(archive, "arr_1", most)
            if label_shape != shape[:1] or label_dtype.kind not in "iu":
                raise UserError(
                    f"arr_1 of {path} is {quoted(label_dtype)} {quoted(list(label_shape))}, the {shape[0]} images need "
                    "as many whole numbers"
                )
            labels = read_npz_array(archive, "arr_1", most).astype(np.int64)
            return SmallImages(images, labels, _class_names(archive, path, most))
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy and the operating system raise many types
        reason = one_line(str(error))[:200]
        raise UserError(f"{path} is not an .npz of arrays, or is damaged ({reason})") from error


def _class_names(archive: zipfile.ZipFile, path: Path, most: int) -> list[str]:
    if "class_names.npy" not in archive.namelist():
        return []
    shape, dtype = npz_header(archive, "class_names", most)
    if dtype.kind != "U" or len(shape) != 1:
        raise UserError(f"class_names of {path} is {shortened(str(dtype))} {quoted(list(shape))}, not a list of names")
    names: list[str] = read_npz_array(archive, "class_names", most).tolist()
    return names
