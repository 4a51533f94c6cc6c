"""Small images for a super-resolution job: from an npz or a folder of pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.images import DataSettings, label_images, list_images, load_image
from fastdiff.images.pixels import MODES
from fastdiff.models import SuperResSettings
from fastdiff.settings import UserError


class BaseImages:
    """Images [N, h, w, C] uint8 with labels [N] int64 (or None), read as they are needed."""

    def __init__(self, source: str, settings: SuperResSettings, class_names: list[str]) -> None:
        self.settings = settings
        path = Path(source)
        if not source:
            raise UserError("--base_samples is missing: give an .npz of small images, or a folder of them")
        if not path.exists():
            raise UserError(f"--base_samples: {path} does not exist; give an .npz of small images, or a folder of them")
        self.path = path
        self._files: list[Path] | None = None
        self.labels: np.ndarray | None = None
        if path.is_dir():
            self._files = list_images(path)
            if settings.class_cond:
                self.labels, _ = label_images(self._files, path, DataSettings().labels, class_names or None)
        else:
            self._images, self.labels = read_npz(path, settings)
        if settings.class_cond and self.labels is None:
            raise UserError(f"--base_samples: {path} has no labels (arr_1), which a class-conditional model needs")
        if settings.class_cond and self.labels is not None:
            strange = self.labels[(self.labels < 0) | (self.labels >= settings.num_classes)]
            if len(strange):
                raise UserError(
                    f"--base_samples: {path} has label {strange[0]}, the model classes 0 to {settings.num_classes - 1}"
                )

    @property
    def digest(self) -> str:
        """Of the small images: two jobs with the same digest enlarge the same."""
        found = hashlib.sha256()
        if self._files is None:
            found.update(self._images.tobytes())
        for file in self._files or ():
            found.update(f"{file.relative_to(self.path)} {file.stat().st_size}\n".encode())
        return f"sha256:{found.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._images) if self._files is None else len(self._files)

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The network's arguments for images `index` [B] of a job: in order, from the start again after the last."""
        rows = index.cpu().numpy() % len(self)
        if self._files is None:
            images = self._images[rows]
        else:
            mode = MODES[self.settings.in_channels]
            images = np.stack([load_image(self._files[row], self.settings.small_size, mode) for row in rows])
        arguments = {"low_res": as_low_res(images, index.device)}
        if self.settings.class_cond and self.labels is not None:
            arguments["y"] = torch.from_numpy(self.labels[rows]).to(index.device)
        return arguments


def as_low_res(images: np.ndarray, device: torch.device) -> Tensor:
    """Images [N, h, w, C] uint8 as a super-resolution model sees them: [N, C, h, w] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_npz(path: Path, settings: SuperResSettings) -> tuple[np.ndarray, np.ndarray | None]:
    """arr_0 and arr_1 of an npz of small images; UserError when they aren't what the model takes."""
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray) or "arr_0" not in content:
                raise UserError(f"--base_samples: {path} has no arr_0; give an .npz as sample.py writes it")
            images = content["arr_0"]
            labels = content.get("arr_1")
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy and the operating system each have their own
        raise UserError(f"--base_samples: {path} is not an .npz of arrays, or is damaged") from error
    wanted = (*settings.small_size, settings.in_channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        raise UserError(
            f"--base_samples: arr_0 of {path} is {images.dtype} {list(images.shape)}, the model takes uint8 "
            f"[N, {', '.join(map(str, wanted))}]"
        )
    if labels is None:
        return images, None
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"--base_samples: arr_1 of {path} is {labels.dtype} {list(labels.shape)}, the {len(images)} images need as "
            "many whole numbers"
        )
    return images, labels.astype(np.int64)
