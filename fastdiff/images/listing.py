"""Lists the images of a folder in a fixed order, with their classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from fastdiff.errors import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp")


@dataclass(frozen=True)
class Listing:
    """The images of a data set and their classes."""

    root: Path
    names: list[str]
    """Path of each image relative to root, with forward slashes. Path objects for ImageNet would take 0.5 GB."""
    labels: np.ndarray
    """Class of each image, int64 [N]."""
    class_names: list[str]

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names, 16 hex digits."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:16]

    def first(self, count: int) -> Listing:
        """The first `count` images, with the class names of all."""
        return Listing(self.root, self.names[:count], self.labels[:count], self.class_names)


def list_images(data_dir: str | os.PathLike[str]) -> list[Path]:
    """All images below data_dir, depth first, with the files and folders of a folder in code-point order together."""
    root = Path(data_dir)
    if not str(data_dir):
        raise UserError("no image folder is given: name one with --data_dir")
    try:
        if not root.exists():
            raise UserError(f"the image folder {root} does not exist; give one that does (--data_dir)")
        if not root.is_dir():
            raise UserError(f"{root} is not a folder of images but a file; give the folder that holds it")
        paths = list(_walk(root, frozenset()))
        if not paths:
            found = "holds no images" if any(root.iterdir()) else "is empty"
            raise UserError(f"the image folder {root} {found}; files that end in {', '.join(EXTENSIONS)} count")
    except OSError as error:
        raise UserError(f"the image folder {error.filename or root} can't be listed: {error.strerror}") from error
    return paths


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    identity = (folder.stat().st_dev, folder.stat().st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in found:
        if is_folder:
            yield from _walk(folder / name, above | {identity})
        elif "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS:
            yield folder / name


def label_images(
    paths: Sequence[Path],
    data_dir: str | os.PathLike[str],
    labels_mode: Literal["auto", "prefix", "folder"] = "auto",
    class_names: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """The class of each image, int64 [N], and the names of the classes, which are numbered in sorted order.

    prefix: the file name up to its first underscore, or all of it if there is none.
    folder: the folder that holds the image, relative to data_dir.
    auto: folder if all images lie in at least two subfolders and no file name has an underscore, else prefix.
    class_names are the classes of an earlier run, whose numbers are kept. Raises UserError for images of other classes.
    """
    if labels_mode == "auto":
        folders = {path.parent for path in paths} if not any("_" in path.name for path in paths) else set()
        by_folder = len(folders) > 1 and Path(data_dir) not in folders
        labels_mode = "folder" if by_folder else "prefix"
    if labels_mode == "folder":
        parents = [path.parent for path in paths]
        folder_class = {parent: parent.relative_to(data_dir).as_posix() for parent in set(parents)}
        classes = [folder_class[parent] for parent in parents]
    else:
        classes = [path.name.split("_", 1)[0] for path in paths]
    names = sorted(set(classes)) if class_names is None else list(class_names)
    number = {name: i for i, name in enumerate(names)}
    for path, name in zip(paths, classes, strict=True):
        if name not in number:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"{path} is of class {name!r} (labels by {labels_mode}), which is none of the {len(names)} classes "
                f"that this run or checkpoint knows: {shown}"
            )
    return np.array([number[name] for name in classes], dtype=np.int64), names


def index_images(
    data_dir: str | os.PathLike[str],
    labels_mode: Literal["auto", "prefix", "folder"] = "auto",
    class_names: Sequence[str] | None = None,
) -> Listing:
    """List and label the images below data_dir."""
    paths = list_images(data_dir)
    labels, names = label_images(paths, data_dir, labels_mode, class_names)
    root = Path(data_dir)
    above = 0 if root == Path() else len(root.as_posix().rstrip("/")) + 1  # relative_to is slow for millions
    return Listing(root, [path.as_posix()[above:] for path in paths], labels, names)
