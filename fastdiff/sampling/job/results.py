"""Finds the images of a sampling job's folder: a merged file, or its pictures.

A job's folder also holds a grid of its images, which is none of them. A job may also have been drawn into a folder of
pictures, which then counts as such a folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastdiff.images.listing import has_own_images
from fastdiff.images.outputs import IMAGES
from fastdiff.runtime.files import files_in
from fastdiff.sampling.job.manifest import NAME

_MERGED = re.compile(r"samples_([1-9][0-9]*)x\d+x\d+x\d+(\.npz|\.zip)")


def is_job(folder: Path) -> bool:
    """Whether a folder is a sampling job's, and holds no other pictures. OSError where it can't be opened."""
    return (folder / NAME).is_file() and not has_own_images(files_in(folder))


def images_of_job(folder: Path, *endings: str) -> Path | None:
    """The merged file with most images, of the first ending (.npz or .zip) that there is; else the folder of pictures.

    None if there are neither.
    """
    merged = [(int(found[1]), found[2], name) for name in files_in(folder) if (found := _MERGED.fullmatch(name))]
    for ending in endings:
        if of_kind := [(count, name) for count, kind, name in merged if kind == ending]:
            return folder / max(of_kind)[1]
    return folder / IMAGES if (folder / IMAGES).is_dir() else None
