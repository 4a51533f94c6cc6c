"""The classes of images: by the folders that hold them, by the prefixes of their names, or by a file that lists them.

One rule holds for a whole data set. Where nothing says what class an image is of, or folders and prefixes say different
things, `label_images` refuses rather than guesses.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from fastdiff.errors import UserError, did_you_mean
from fastdiff.images.label_files import DATASET_JSON, read_label_file
from fastdiff.images.listing import Listing, list_images, same_to_readers
from fastdiff.images.settings import LABEL_RULES

NAMED = 20
"""The most classes that a message lists."""
TRIAL = 10
"""Most images that may each have a prefix of their own: a set for a trial can have one image per class, a data set of
more has numbers, not classes, before the first underscore."""
_HELP = "give --labels folder, prefix or none, or a file that lists the classes (dataset.json or CSV)"
_OTHER_CLASSES = "; give --labels if others are meant, or train on these classes in a new run, with --init_from"


class NoClasses(UserError):
    """Nothing in a data set says what class its images are of."""


@dataclass(frozen=True)
class Classes:
    """The classes of N images."""

    labels: np.ndarray
    """int64 [N]"""
    names: list[str]
    """Names of the classes by number; empty where the images have none."""
    found_in: str
    """"folders", "prefixes", the path of a file, or "" without classes."""


def label_images(
    names: Sequence[str],
    root: Path,
    rule: str = "auto",
    class_names: Sequence[str] | None = None,
) -> Classes:
    """Find the classes of the images `names`, paths below `root` with forward slashes.

    prefix: the file name up to its first underscore, or all of it if there is none, as improved-diffusion has it.
    folder: the folder that holds the image, relative to root.
    none: the images have no classes; all labels are 0.
    A path: the file's classes (see `label_files`).
    auto: root's dataset.json if it has labels, else folders or prefixes, whichever distinguishes classes.

    Classes are numbered by `class_order`, or as the file says; class_names are the classes of an earlier run, which
    keep their numbers. Names count as equal if their composed Unicode forms are. Raises UserError where auto finds no
    rule or two that disagree, and for images of other classes than class_names.
    """
    if rule == "none":
        return Classes(np.zeros(len(names), dtype=np.int64), [], "")
    known = [same_to_readers(name) for name in class_names] if class_names is not None else None
    if rule in ("prefix", "folder"):
        found = _by_folder(names) if rule == "folder" else _by_prefix(names)
        if rule == "folder":
            _check_beside(names, root, found, known or ())
        return number_classes(found, names, root, "folders" if rule == "folder" else "prefixes", known)
    file = root / DATASET_JSON if rule == "auto" else Path(rule)
    if rule != "auto" and not file.is_file():
        near = did_you_mean(rule, LABEL_RULES) or ", and no file of that name exists"
        raise UserError(f"--labels {rule} is none of {', '.join(LABEL_RULES)}{near}")
    if file.is_file():
        return _by_file(file, names, root, known)
    return _by_names(names, root, known)


def index_images(
    data_dir: str | os.PathLike[str], rule: str = "none", class_names: Sequence[str] | None = None
) -> Listing:
    """List the images below data_dir, with the classes that `label_images` finds by the rule."""
    paths = list_images(data_dir)
    root = Path(data_dir)
    above = 0 if root == Path() else len(root.as_posix().rstrip("/")) + 1  # relative_to is slow for millions
    names = [path.as_posix()[above:] for path in paths]
    classes = label_images(names, root, rule, class_names)
    return Listing(root, names, classes.labels, classes.names, classes.found_in)


def class_order(names: Iterable[str]) -> list[str]:
    """Sort class names: those of digits only by their value, before all others in code-point order."""

    def key(name: str) -> tuple[bool, int, str]:
        digits = name.isascii() and name.isdecimal() and len(name) < 100
        return not digits, int(name) if digits else 0, name

    return sorted(set(names), key=key)


def counted(classes: Iterable[tuple[str, int]]) -> str:
    """'cat 20, dog 20': classes with their numbers of images, of many classes the first ones and the extremes."""
    pairs = list(classes)
    listed = ", ".join(f"{name} {count}" for name, count in pairs[:NAMED])
    if len(pairs) <= NAMED:
        return listed
    counts = [count for _, count in pairs]
    sizes = f"{len(pairs):,} classes of {min(counts):,} to {max(counts):,} images"
    return f"{listed} and {len(pairs) - NAMED:,} more ({sizes})"


def describe_classes(listing: Listing) -> str:
    """The line that says what the classes of a data set are and where they were found."""
    if not listing.labels_from:
        return "labels: none"
    return f"labels: from {listing.labels_from}: {_counts(listing)}"


def _counts(listing: Listing) -> str:
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    return counted(zip(listing.class_names, counts.tolist(), strict=True))


def check_classes(listing: Listing, known: Sequence[str], num_classes: int) -> None:
    """UserError where the classes can't be those of a checkpoint with num_classes, whose names are `known`.

    Without names only the numbers count: those that a dataset.json gives, or names that are these numbers, or as many
    classes as the checkpoint has. Of any other number it is unknown which ones they are.
    """
    found, where = len(listing.class_names), listing.root
    numbers = [str(number) for number in range(num_classes)]
    if known or found == num_classes or listing.class_names == numbers[:found]:
        return
    raise UserError(
        f"--data_dir: {where} has {found} classes ({_counts(listing)}), the model "
        f"{num_classes} without names, so that it is unknown which ones they are; give --labels FILE, a dataset.json "
        "of the model's numbers"
    )


# --- the rules ---


def _by_folder(names: Sequence[str]) -> list[str]:
    return [same_to_readers(name.rpartition("/")[0]) or "." for name in names]


def _by_prefix(names: Sequence[str]) -> list[str]:
    return [same_to_readers(name.rpartition("/")[2].split("_", 1)[0]) for name in names]


def _by_file(file: Path, names: Sequence[str], root: Path, known: list[str] | None) -> Classes:
    given = read_label_file(file, names, root)
    if given is None:
        raise NoClasses(f"{file} says that the images have no labels; {_HELP}")
    if known is not None and given.numbered and given.order and known[: len(given.order)] != given.order:
        if len(given.order) > len(known):  # the numbers are labels, whatever the classes are called
            raise UserError(f"--labels: {file} has the class number {len(given.order) - 1}, the model {len(known)}")
        return Classes(np.array([int(number) for number in given.classes]), known, str(file))
    return number_classes(given.classes, names, root, str(file), known, given.order)


def _by_names(names: Sequence[str], root: Path, known: list[str] | None) -> Classes:
    """The rule auto where no file lists the classes."""
    folders, prefixes = _by_folder(names), _by_prefix(names)
    if known is not None:
        return _as_known(folders, prefixes, names, root, known)
    _check_beside(names, root, folders, ())
    plain = [name for name in names if name.rpartition("/")[2].find("_") < 1]
    each_its_own = len(names) > TRIAL and len(set(prefixes)) == len(names)
    by_folder = len(set(folders) - {"."}) > 1
    by_prefix = not plain and not each_its_own and len(set(prefixes)) > 1
    if by_folder and by_prefix:
        order = [class_order(found) for found in (folders, prefixes)]
        if len(set(zip(folders, prefixes, strict=True))) != len(order[0]) or len(order[0]) != len(order[1]):
            raise _disagree(root, folders, prefixes)
        if dict(zip(folders, prefixes, strict=True)) != dict(zip(*order, strict=True)):  # numbered differently
            raise _disagree(root, folders, prefixes)
        by_folder = any(folder.rpartition("/")[2] != prefix for folder, prefix in zip(*order, strict=True))
    if by_folder:
        _check_nested(root, folders)
        return number_classes(folders, names, root, "folders", None)
    if len(plain) == len(names):
        raise NoClasses(
            f"nothing in {root} says what class an image is of; sort the images into class folders, name them "
            "CLASS_anything, or give --labels FILE, which lists their classes (dataset.json or CSV)"
        )
    if plain:
        shown = ", ".join(plain[:3]) + (", ..." if len(plain) > 3 else "")
        raise UserError(
            f"{len(plain)} of the {len(names)} images in {root} have no class before an underscore in their names "
            f"({shown}), the others do; rename or remove them, or {_HELP}"
        )
    if each_its_own:
        raise NoClasses(
            f"by prefix each of the {len(names)} images in {root} would be a class of its own "
            f"({', '.join(prefixes[:3])}, ...); {_HELP}"
        )
    return number_classes(prefixes, names, root, "prefixes", None)


def _as_known(folders: list[str], prefixes: list[str], names: Sequence[str], root: Path, known: list[str]) -> Classes:
    """The rule auto with the classes of an earlier run: folders or prefixes, whichever are those classes."""
    rules = {"folders": folders, "prefixes": prefixes}
    fitting = [where for where, found in rules.items() if set(known).issuperset(found)]
    if not fitting:
        _check_beside(names, root, folders, ())
        near = {where: len(set(known).intersection(found)) for where, found in rules.items()}
        nearest = max(near, key=near.__getitem__)  # of whose images those of other classes are named
        fitting = [nearest if near[nearest] else _by_names(names, root, None).found_in]
    numbered = [number_classes(rules[where], names, root, where, known) for where in fitting]
    if not np.array_equal(numbered[0].labels, numbered[-1].labels):
        raise _disagree(root, folders, prefixes)
    return numbered[-1]


def _check_beside(names: Sequence[str], root: Path, folders: Sequence[str], known: Collection[str]) -> None:
    """UserError for images beside class folders, unless an earlier run took them for the class "."."""
    if "." not in folders or len(set(folders)) < 3 or "." in known:
        return
    beside = [name for name, folder in zip(names, folders, strict=True) if folder == "."]
    shown = ", ".join(beside[:3]) + (", ..." if len(beside) > 3 else "")
    inside = _counted(folder for folder in folders if folder != ".")
    raise UserError(
        f"{root} has images in class folders ({inside}) and {len(beside)} beside them ({shown}), whose class no "
        "folder says; move them into a folder or remove them, or give --labels prefix or none, or a file that lists "
        "the classes (dataset.json or CSV)"
    )


def _check_nested(root: Path, folders: Sequence[str]) -> None:
    """UserError where a folder with images lies in another one: it may be a class or a part of one."""
    holding = set(folders)
    for folder in sorted(holding):
        above = next((str(parent) for parent in PurePosixPath(folder).parents if str(parent) in holding), None)
        if above is not None:
            raise UserError(
                f"{root} has images in {above} and in {folder} below it, so that it is unknown whether these are "
                f"one class or two; move one of them, or give --labels folder, by which each folder is a class, or a "
                "file that lists the classes (dataset.json or CSV)"
            )


def _disagree(root: Path, folders: Sequence[str], prefixes: Sequence[str]) -> UserError:
    return UserError(
        f"the folders and the file names in {root} say different classes: by folder {_counted(folders)}; by prefix "
        f"{_counted(prefixes)}; {_HELP}"
    )


def _counted(classes: Iterable[str]) -> str:
    counts = Counter(classes)
    return counted((name, counts[name]) for name in class_order(counts))


def number_classes(
    classes: Sequence[str],
    names: Sequence[str],
    root: Path,
    found_in: str,
    known: Sequence[str] | None,
    order: Sequence[str] | None = None,
) -> Classes:
    """Number the class of each image of `names`: as in `known`, the classes of an earlier run, else as in `order`.

    Without either the number is the place in `class_order`. Raises UserError for an image of another class.
    """
    given = known if known is not None else order
    order = class_order(classes) if given is None else [same_to_readers(name) for name in given]
    number = {name: i for i, name in reversed(list(enumerate(order)))}
    if not number.keys() >= set(classes):
        at = next(i for i, name in enumerate(classes) if name not in number)
        shown = ", ".join(order[:NAMED]) + (", ..." if len(order) > NAMED else "")
        raise UserError(
            f"{root / names[at]} is of class {classes[at]!r} (labels from {found_in}), which is none of the "
            f"{len(order)} classes that this run or checkpoint knows: {shown}"
            f"{did_you_mean(classes[at], order) or _OTHER_CLASSES}"
        )
    labels = np.fromiter((number[name] for name in classes), dtype=np.int64, count=len(classes))
    return Classes(labels, order, found_in)
