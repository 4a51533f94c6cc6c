"""Reads the file that lists the classes of a data set's images.

dataset.json  {"labels": [["0/a.png", 3], …]}: a class for each path below the data set's folder, as EDM and StyleGAN
              have it. Whole numbers are the labels themselves, texts are names of classes. "labels": null says that
              there are none. "class_names", a list, gives names to numbers.
CSV           a row for each image: its path and the name of its class, separated by commas, semicolons or tabs.
              Where there are more columns, the first row names them (file and class, or words like these).
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError, quoted
from fastdiff.images.listing import same_to_readers

logger = logging.getLogger(__name__)

DATASET_JSON = "dataset.json"
_FILES = ("file", "file_name", "filename", "image", "image_id", "image_name", "img", "path", "filepath", "name", "id")
_CLASSES = ("class", "class_name", "classname", "label", "labels", "category", "target", "y")


@dataclass(frozen=True)
class LabelFile:
    """The class of each image of a data set, and the order of the classes if the file numbers them."""

    classes: list[str]
    order: list[str] | None
    numbered: bool = False
    """Whether the file gives numbers without names: `classes` are these numbers as texts."""


def read_label_file(file: Path, names: Sequence[str], root: Path) -> LabelFile | None:
    """Read the classes of the images `names`, paths below `root`; None if the file says that they have none.

    An image is found by its path below root, or by its file name alone, with or without the ending, if no other image
    has the same. Raises UserError for a file that can't be read and for images that it doesn't list.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--labels: {file} can't be read ({error.strerror}); give a dataset.json or a CSV") from error
    except ValueError:
        raise UserError(f"--labels: {file} is no text; give a dataset.json or a CSV of file and class") from None
    order, numbered = None, False
    if file.suffix.lower() == ".json":
        found = _read_json(text, file)
        if found is None:
            return None
        entries, order, numbered = found
    else:
        entries = _read_csv(text, file)
    return LabelFile(_of_images(entries, names, root, file), order, numbered)


def _of_images(entries: Mapping[str, str], names: Sequence[str], root: Path, file: Path) -> list[str]:
    """The class of each image."""
    paths = [same_to_readers(name) for name in names]
    if not all(path in entries for path in paths):
        paths = _as_listed(entries, paths, root)
    missing = [name for name, path in zip(names, paths, strict=True) if path not in entries]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"--labels: {file} has no class for {len(missing)} of the {len(names)} images in {root} ({shown}); list "
            "every image by its path below that folder, or remove those images"
        )
    if unused := len(entries) - len(set(paths)):
        logger.warning("%s also lists images that are not in %s: %d", file, root, unused)
    return [entries[path] for path in paths]


def _as_listed(entries: Mapping[str, str], paths: Sequence[str], root: Path) -> list[str]:
    """The key of each image in the file: its path, or another way to write it that means no other image."""

    def ways(path: str) -> list[str]:
        name = path.rpartition("/")[2]
        whole = (root / path).as_posix()
        return [path, f"./{path}", whole, path.rpartition(".")[0], f"{root.name}/{path}", name, name.rpartition(".")[0]]

    candidates = [ways(path) for path in paths]
    taken: dict[str, set[int]] = {}
    for i, each in enumerate(candidates):
        for way in each:
            taken.setdefault(way, set()).add(i)
    return [
        next((way for way in each if way in entries and len(taken[way]) == 1), path)
        for path, each in zip(paths, candidates, strict=True)
    ]


def _read_json(text: str, file: Path) -> tuple[dict[str, str], list[str] | None, bool] | None:
    """Path → class name, the classes in the order of their numbers (None if they have names only), and whether they
    are numbers without names."""
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--labels: {file} is not JSON ({error})") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'--labels: {file} has no "labels"; it is read as {{"labels": [["a.png", 3], ...]}}')
    labels = content["labels"]
    if labels is None:
        return None
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    named = content.get("class_names")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) and name for name in named)):
        raise UserError(f"--labels: class_names in {file} must be a list of names, not {quoted(named)}")
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"--labels: labels in {file} must be a list of [path, class], not {quoted(labels)}")
    for pair in pairs:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not isinstance(pair[0], str)
            or not _is_class(pair[1])
        ):
            raise UserError(
                f"--labels: {file} has the entry {quoted(pair)}; each must be a path and its class, a whole number "
                "from 0 or a name"
            )
    order = [same_to_readers(name) for name in named] if named else None
    if order and len(set(order)) < len(order):
        twice = next(name for i, name in enumerate(order) if name in order[:i])
        raise UserError(
            f"--labels: class_names in {file} has {quoted(twice)} twice; give every class a name of its own"
        )
    kinds = {type(label) for _, label in pairs}
    if len(kinds) > 1:
        raise UserError(f"--labels: {file} has both numbers and names for classes; give one of them")
    if kinds == {str}:
        entries = _entries(((path, label) for path, label in pairs), file)
        return entries, order, False
    count = max(label for _, label in pairs) + 1
    if count > len(pairs) + 100_000:
        raise UserError(f"--labels: {file} has the class number {count - 1}, which is no count of classes")
    if named is not None and len(named) < count:
        raise UserError(f"--labels: {file} has the class number {count - 1}, but only {len(named)} class_names")
    shown = order or [str(number) for number in range(count)]
    return _entries(((path, shown[label]) for path, label in pairs), file), shown, order is None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. ValueError for a key with two values, of which Python would take the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{quoted(key)} has two values")
    return found


def _is_class(label: Any) -> bool:
    return (type(label) is int and label >= 0) or (isinstance(label, str) and label != "")


def _read_csv(text: str, file: Path) -> dict[str, str]:
    """Path → class name."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--labels: {file} is empty; give a row of file and class for each image")
    separator = max("\t;,", key=lambda mark: sum(mark in line for line in lines[:100]))
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    except csv.Error as error:
        raise UserError(f"--labels: {file} is not CSV ({error})") from None
    header = [cell.lower() for cell in rows[0]]
    files, classes = (
        next((header.index(word) for word in words if word in header), -1) for words in (_FILES, _CLASSES)
    )
    if files >= 0 and classes >= 0:
        del rows[0]
    elif len(header) == 2:
        files, classes = 0, 1
    else:
        raise UserError(
            f"--labels: the rows of {file} have {len(header)} columns; give two, file and class, or a first row that "
            "names them file and class"
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(header) or not row[files] or not row[classes]:
            raise UserError(
                f"--labels: row {number} of {file} is {quoted(separator.join(row))}, not a file and a class"
            )
    return _entries(((row[files], row[classes]) for row in rows), file)


def _entries(pairs: Any, file: Path) -> dict[str, str]:
    """Path → class, both in their composed forms. UserError for an image that is listed with two classes."""
    entries: dict[str, str] = {}
    for path, label in pairs:
        key, name = same_to_readers(path.replace("\\", "/")), same_to_readers(label)
        if entries.setdefault(key, name) != name:
            raise UserError(f"--labels: {file} lists {path} twice, as {entries[key]} and as {name}")
    return entries
