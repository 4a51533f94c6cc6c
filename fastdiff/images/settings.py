"""Settings of the image data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fastdiff.errors import did_you_mean
from fastdiff.settings import Affects, FilePath, Settings

RUN = Affects("run")
"""Marks settings that say how images are read, not which pixels a step sees."""

LABEL_RULES = ("auto", "prefix", "folder", "none")
"""Values of `labels` that name no file."""


class DataSettings(Settings):
    """Where the images are and how they become batches."""

    data_dir: FilePath = ""
    """Folder with images (jpg, jpeg, png, gif, webp, in any depth), or one that datasets/pack.py made of such a
    folder."""
    loader: Literal["auto", "dali", "pillow"] = "auto"
    """auto: DALI where it is installed, else Pillow, which random_crop needs. pillow: the reference pixels."""
    cache: Literal["none", "disk", "gpu"] = "none"
    """Decode all images once, to the reference pixels at the model's size. disk: into one file, made at the first start
    and read at memory speed from then on. gpu: that file's content lies on the GPU (without one, in memory)."""
    cache_dir: Annotated[FilePath, RUN] = ""
    """Folder for the cache of decoded images; empty for the one that holds data_dir."""
    labels: FilePath = "auto"
    """Class of an image: prefix (of the file name, before the first underscore), folder (that holds it), none, or a
    file that lists the classes (dataset.json as EDM has it, or a CSV of file and class); auto: the folder's
    dataset.json, else folder or prefix, whichever tells classes apart; where both do differently, it refuses."""
    random_flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    random_crop: bool = False
    """Cut each image out at a random place, after its shorter side was resized to a random length up to 1.25 times the
    model's size; otherwise the centre is taken. Needs images that Pillow decodes anew at each sight."""
    shuffle: bool = True
    """A new random order every epoch; False keeps the listing's order."""
    drop_last: bool = False
    """Leave out the last images of an epoch that don't fill a batch (improved-diffusion always did)."""
    num_workers: Annotated[int, RUN] = Field(2, ge=1)
    """Threads per process that read and decode images."""

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: str) -> str:
        if value not in LABEL_RULES and not Path(value).is_file():
            near = did_you_mean(value, LABEL_RULES)
            raise ValueError(f"must be {', '.join(LABEL_RULES)} or a file that lists classes, not {value!r}{near}")
        return value


class ClassifierDataSettings(DataSettings):
    """Where the images are and how they become batches."""

    random_flip: bool = True
    """Mirror each image left to right with probability 1/2."""
    random_crop: bool = True
    """Cut each image out at a random place, after its shorter side was resized to a random length up to 1.25 times the
    model's size; otherwise the centre is taken. Needs images that Pillow decodes anew at each sight."""
