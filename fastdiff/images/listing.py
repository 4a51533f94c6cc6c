"""Lists the images of a folder in a fixed order."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fastdiff.errors import UserError
from fastdiff.images.other_data import describe_file, describe_folder
from fastdiff.images.outputs import IMAGES, check_root, is_grid, is_linked_previews, kind_of_output, say_what_is_read

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp")
NO_DATA = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
"""Folders that macOS (in archives), Synology's servers and Windows make beside a user's files."""


@dataclass(frozen=True)
class Listing:
    """The images of a data set and their classes."""

    root: Path
    names: list[str]
    """Path of each image relative to root, with forward slashes. Path objects for ImageNet would take 0.5 GB."""
    labels: np.ndarray
    """Class of each image, int64 [N]."""
    class_names: list[str]
    """Name of each class; empty where the images have none, whose labels are 0 then."""
    labels_from: str = ""
    """Where the classes were found, for messages: "folders", "prefixes", or the path of a file."""

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names in their composed form, 16 hex digits."""
        return hash_of_names(map(same_to_readers, self.names))

    @cached_property
    def hash_of_labels(self) -> str:
        """A hash of the labels, 16 hex digits."""
        return hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:16]

    def first(self, count: int) -> Listing:
        """The first `count` images, with the class names of all."""
        return replace(self, names=self.names[:count], labels=self.labels[:count])


def hash_of_names(names: Iterable[str]) -> str:
    """A hash of the names in their order, 16 hex digits."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()[:16]


def list_images(data_dir: str | os.PathLike[str]) -> list[Path]:
    """All images below data_dir, depth first, with the files and folders of a folder in code-point order together.

    Names are ordered in their composed form, so that a copy of the folder from another system has the same order. What
    runs and sampling jobs wrote is left out (`outputs`), which is logged.
    """
    root = Path(data_dir)
    if not str(data_dir):
        raise UserError("no image folder is given: name one with --data_dir")
    try:
        if not root.exists():
            raise UserError(f"the image folder {root} does not exist; give one that does (--data_dir)")
        if not root.is_dir():
            raise UserError(f"{root} is not a folder of images but {describe_file(root)}")
        kind = check_root(root)
        left_out: list[Path] = []
        paths = list(_walk(root, frozenset(), left_out))
        say_what_is_read(root, kind, len(paths), left_out)
        if not paths and (other := describe_folder(root)):
            raise UserError(f"the image folder {root} holds no images but {other}")
        if not paths:
            found = "holds no images" if any(root.iterdir()) else "is empty"
            raise UserError(
                f"the image folder {root} {found}; files that end in {', '.join(EXTENSIONS)} count, and no names that "
                f"begin with a dot and nothing in folders such as {NO_DATA[0]}"
            )
    except OSError as error:
        raise UserError(f"the image folder {error.filename or root} can't be listed: {error.strerror}") from error
    return paths


def is_data(name: str) -> bool:
    """Whether a file or folder of that name may be part of a data set: hidden ones and those of NO_DATA are not."""
    return not name.startswith(".") and name not in NO_DATA


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return is_data(name) and "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def same_to_readers(name: str) -> str:
    """The name in Unicode's composed form (NFC). macOS decomposes names (NFD), which then look the same."""
    return unicodedata.normalize("NFC", name)


def has_own_images(names: Collection[str]) -> bool:
    """Whether a folder with these files holds images besides grids of samples."""
    return any(is_image(name) and not is_grid(name, names) for name in names)


def _walk(folder: Path, above: frozenset[tuple[int, int]], left_out: list[Path]) -> Iterator[Path]:
    """Yield the images below a folder; adds what runs and sampling jobs wrote to left_out.

    A job's images are read if its folder is the root of the walk, unless it was drawn into a folder of images.
    """
    identity = (folder.stat().st_dev, folder.stat().st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        found = sorted((same_to_readers(entry.name), entry.name, entry.is_dir()) for entry in entries)
    names = {name for _, name, _ in found}
    kind = kind_of_output(folder, names)
    mixed = kind == "job" and has_own_images(names)
    if kind == "run" or (kind == "job" and above and not mixed) or (above and is_linked_previews(folder)):
        left_out.append(folder)
        return
    for _, name, is_folder in found:
        if (is_folder and mixed and name == IMAGES) or (not is_folder and is_grid(name, names)):
            left_out.append(folder / name)
        elif is_folder and is_data(name):
            yield from _walk(folder / name, above | {identity}, left_out)
        elif not is_folder and is_image(name):
            yield folder / name
