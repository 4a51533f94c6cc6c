"""The conditioning of a sampling job's images: class labels, and small images for super-resolution.

`parse_labels` reads --classes into `Labels`, which assigns a class to each image number. `BaseImages` holds the small
images of an .npz file or a folder, and returns the network's arguments for image numbers.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.noise_keys import CLASSES
from fastdiff.errors import UserError, one_line, quoted
from fastdiff.images.listing import label_images, list_images
from fastdiff.images.pixels import MODES, load_image
from fastdiff.images.reader import what_is_wrong
from fastdiff.images.settings import DataSettings
from fastdiff.models import SuperResSettings
from fastdiff.runtime.untrusted import npz_header, read_npz_array

LARGE = 256 << 20
"""Bytes that any array in an npz may take when unpacked."""
EXPANSION = 100
"""A larger array may take this many times its file's bytes: images rarely compress to less than a tenth."""


@dataclass(frozen=True)
class Labels:
    """Assigns classes to image numbers: in turn, or, if they have weights, at random by the seed."""

    chosen: tuple[int, ...]
    weights: tuple[float, ...] = ()

    @property
    def in_turn(self) -> bool:
        return not self.weights

    def __call__(self, index: Tensor, seed: int) -> Tensor:
        """Labels [B] int64 of images `index` [B] int64."""
        chosen = torch.tensor(self.chosen, device=index.device)
        if self.in_turn:
            return chosen[index % len(chosen)]
        uniform = ops.image_uniform(seed | CLASSES, index, 0)
        ends = torch.tensor(self.weights, dtype=torch.float64, device=index.device).cumsum(0)
        place = torch.searchsorted(ends / ends[-1], uniform.double(), right=True)
        return chosen[place.clamp(max=len(chosen) - 1)]


def parse_labels(classes: str, class_names: list[str], num_classes: int) -> Labels:
    """Read '0,5,cat' (in turn), 'cat:3,dog:1' (at random with weights), 'balanced' (all in turn) or '' (all at random).

    A class is a number below num_classes or one of class_names. Raises UserError for anything else.
    """
    if classes.strip() == "balanced" and "balanced" not in class_names:
        return Labels(tuple(range(num_classes)))
    words = [word.strip() for word in classes.split(",") if word.strip()]
    if not words:
        return Labels(tuple(range(num_classes)), (1.0,) * num_classes)
    chosen, weights = [], []
    for word in words:
        name, colon, weight = word.rpartition(":")
        if not colon or word in class_names:
            name, weight = word, ""
        chosen.append(_number(name.strip(), class_names, num_classes))
        weights.append(_weight(weight, word) if weight or colon and name != word else None)
    given = [weight for weight in weights if weight is not None]
    if not given:
        return Labels(tuple(chosen))
    if len(given) < len(weights):
        raise UserError(f"{classes} gives weights to some classes only; give every class one, as in 0:3,5:1")
    return Labels(tuple(chosen), tuple(given))


def _number(word: str, class_names: list[str], num_classes: int) -> int:
    if word in class_names:
        return class_names.index(word)
    if word.isdecimal() and int(word) < num_classes:
        return int(word)
    known = f" or one of {', '.join(class_names[:10])}" if class_names else ""
    raise UserError(f"{word} is not a class; give numbers from 0 to {num_classes - 1}{known}")


def _weight(text: str, word: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{word} has no weight above 0 after its colon; write CLASS:WEIGHT, as in 0:3")
    return weight


class BaseImages:
    """Small images [N, h, w, C] uint8 and labels [N] int64 or None; the files of a folder are read lazily."""

    def __init__(self, source: str, settings: SuperResSettings, class_names: list[str]) -> None:
        """Raises UserError for images or labels that the model can't take."""
        self.settings, self.path = settings, Path(source)
        if not source:
            raise UserError("--base_samples is missing: give an .npz of small images, or a folder of them")
        try:
            exists = self.path.exists()
        except OSError as error:
            raise UserError(f"{quoted(source)} can't be opened ({error.strerror})") from error
        if not exists:
            raise UserError(f"{self.path} does not exist; give an .npz of small images, or a folder of them")
        self._files: list[Path] | None = None
        self.labels: np.ndarray | None = None
        if self.path.is_dir():
            self._files = list_images(self.path)
            if settings.class_cond:
                self.labels, _ = label_images(self._files, self.path, DataSettings().labels, class_names or None)
        else:
            self._images, self.labels = read_npz(self.path, settings)
        if not settings.class_cond:
            return
        if self.labels is None:
            raise UserError(f"{self.path} has no labels (arr_1), which a class-conditional model needs")
        strange = self.labels[(self.labels < 0) | (self.labels >= settings.num_classes)]
        if len(strange):
            raise UserError(f"{self.path} has label {strange[0]}, the model classes 0 to {settings.num_classes - 1}")

    @property
    def digest(self) -> str:
        """A hash of the small images, or of the names and sizes of a folder's files."""
        found = hashlib.sha256()
        if self._files is None:
            found.update(self._images.tobytes())
        for file in self._files or ():
            found.update(f"{file.relative_to(self.path)} {file.stat().st_size}\n".encode())
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
        if self.settings.class_cond and self.labels is not None:
            arguments["y"] = torch.from_numpy(self.labels[rows]).to(index.device)
        return arguments

    def _load(self, file: Path, mode: str) -> np.ndarray:
        try:
            return load_image(file, self.settings.small_size, mode)
        except Exception as error:  # Pillow's decoders raise many types
            # The flag is named here because callers can't tell it from other errors while the job draws.
            raise UserError(
                f"--base_samples: {file} can't be read ({what_is_wrong(error)}); repair it or remove it from the folder"
            ) from error


def as_low_res(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert images [N, h, w, C] uint8 to a super-resolution model's input [N, C, h, w] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_npz(path: Path, settings: SuperResSettings) -> tuple[np.ndarray, np.ndarray | None]:
    """Read arr_0 and arr_1 (None if absent) of an npz of small images. Raises UserError if they don't fit the model.

    Each array's header is checked before the array is read, and an array that would unpack to more than LARGE bytes
    and EXPANSION times the file's is refused, so that a small file takes little memory.
    """
    wanted = (*settings.small_size, settings.in_channels)
    no_arr_0 = UserError(f"{path} has no arr_0; give an .npz as sample.py writes it")
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:  # an .npy file holds a single array
                raise no_arr_0
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise no_arr_0
            most = max(LARGE, EXPANSION * path.stat().st_size)
            shape, dtype = npz_header(archive, "arr_0", most)
            if dtype != np.uint8 or len(shape) != 4 or shape[1:] != wanted or not shape[0]:
                raise UserError(
                    f"arr_0 of {path} is {quoted(dtype)} {quoted(list(shape))}, the model takes uint8 "
                    f"[N, {', '.join(map(str, wanted))}]"
                )
            images = read_npz_array(archive, "arr_0", most)
            if "arr_1.npy" not in archive.namelist():
                return images, None
            label_shape, label_dtype = npz_header(archive, "arr_1", most)
            if label_shape != shape[:1] or label_dtype.kind not in "iu":
                raise UserError(
                    f"arr_1 of {path} is {quoted(label_dtype)} {quoted(list(label_shape))}, the {shape[0]} images need "
                    "as many whole numbers"
                )
            return images, read_npz_array(archive, "arr_1", most).astype(np.int64)
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy and the operating system raise many types
        reason = one_line(str(error))[:200]
        raise UserError(f"{path} is not an .npz of arrays, or is damaged ({reason})") from error
