"""The format of a packed folder: the images of a data set, decoded once at one size, to be read at memory speed.

    pixels.npy   uint8 [N, H, W, C]: np.load("pixels.npy", mmap_mode="r")
    labels.npy   int64 [N], where the images have classes
    names.json   path of each image below the folder that it came from
    packed.json  size, channels, recipe, class names and where they were found, unreadable images, and hashes that
                 identify the original folder

Row i is image i of the listing; an unreadable image has the row and the label of its replacement, the next readable
one. The folder is written under another name and renamed at the end, so a folder that holds packed.json is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from fastdiff.errors import UserError
from fastdiff.images.labels import label_images, number_classes
from fastdiff.images.listing import Listing, hash_of_names

PIXELS, LABELS, NAMES, RECORD = "pixels.npy", "labels.npy", "names.json", "packed.json"
FORMAT = 1
RECIPE = "box halvings while at least twice the size, a bicubic resize that just covers it, centre crop"
PROBES = 1000
"""Number of files whose lengths are compared to detect images that were replaced under the same names."""


def describe(listing: Listing, size_hw: tuple[int, int], channels: int) -> dict[str, Any]:
    """The part of packed.json that identifies the images, their size and the format."""
    count = len(listing.names)
    lengths = [_length(listing.path(int(i))) for i in np.linspace(0, count - 1, min(count, PROBES)).astype(int)]
    return {
        "format": FORMAT,
        "num_images": count,
        "size": list(size_hw),
        "channels": channels,
        "listing": listing.fingerprint,
        "file_lengths": hashlib.sha256(repr(lengths).encode()).hexdigest()[:16],
    }


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def is_packed(folder: str | Path) -> bool:
    """Whether the folder is a complete packed folder."""
    try:
        return bool(str(folder)) and (Path(folder) / RECORD).is_file()
    except OSError:  # it is not accessible, or its name is too long; listing its images will report that
        return False


def replacements(count: int, unreadable: Iterable[int]) -> np.ndarray:
    """int64 [count]: index of the image shown for each image, itself or the next readable one (cyclically)."""
    shown, bad = np.arange(count), np.array(sorted(unreadable), dtype=np.int64)
    readable = np.setdiff1d(shown, bad)
    shown[bad] = readable[np.searchsorted(readable, bad) % len(readable)]
    return shown


@dataclass(frozen=True)
class Packed:
    """A packed folder, open for reading."""

    folder: Path
    record: dict[str, Any]
    pixels: np.ndarray
    """[N, H, W, C] uint8, mapped into memory."""

    @property
    def unreadable(self) -> dict[int, str]:
        """Index of each image that couldn't be read, and the reason."""
        return {int(entry["index"]): str(entry["reason"]) for entry in self.record["unreadable"]}

    def listing(self, rule: str = "auto", class_names: Sequence[str] | None = None) -> Listing:
        """The listing that `index_images` returned for the original folder, with paths below this folder.

        The rule auto takes the classes with which the folder was packed, if it has any.
        """
        names = _read_json(self.folder, NAMES)
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_path(name) for name in names):
            raise _damaged(self.folder, f"{NAMES} is no list of names")
        unlabelled = Listing(self.folder, names, np.zeros(len(names), dtype=np.int64), [])
        # Version 0.1 hashed the names as they are.
        if self.record["listing"] not in (unlabelled.fingerprint, hash_of_names(names)):
            raise _damaged(self.folder, f"{NAMES} lists other images than {RECORD}")
        found_in = self.record.get("labels_from")  # in folders of version 0.1 there is none
        if rule == "auto" and found_in:
            order = self.record["class_names"]
            classes = number_classes(self._classes(), names, self.folder, str(found_in), class_names, order)
        else:
            classes = label_images(names, self.folder, rule, class_names)
        return replace(unlabelled, labels=classes.labels, class_names=classes.names, labels_from=classes.found_in)

    def _classes(self) -> list[str]:
        """The name of each image's class as it was packed."""
        names = self.record["class_names"]
        try:
            labels = np.load(self.folder / LABELS)
        except Exception as error:  # numpy and Python's tokenizer, which reads the header, raise many types
            raise _damaged(self.folder, f"{LABELS}: {error}") from None
        whole = labels.dtype == np.int64 and labels.shape == (len(self.pixels),)
        if not whole or not ((labels >= 0) & (labels < len(names))).all() or not all(isinstance(n, str) for n in names):
            raise _damaged(self.folder, f"{LABELS} doesn't hold the classes of {len(self.pixels)} images")
        return [names[label] for label in labels.tolist()]

    def check_same(self, listing: Listing) -> None:
        """Raise UserError unless the folder was packed from the listing's images."""
        now = describe(listing, (self.pixels.shape[1], self.pixels.shape[2]), self.pixels.shape[3])
        for key, what in (("num_images", "number"), ("listing", "names"), ("file_lengths", "contents")):
            if self.record.get(key) != now[key]:
                raise UserError(
                    f"{self.folder} was packed when {listing.root} held other images (their {what} differed); delete "
                    "that folder to have it made anew, or choose another"
                )


def open_packed(folder: Path, size_hw: tuple[int, int], channels: int) -> Packed:
    """Open a packed folder. Raises UserError if it is damaged or has images of another size."""
    packed = open_packed_at_its_size(folder)
    height, width, held = packed.pixels.shape[1:]
    if (height, width, held) != (*size_hw, channels):
        raise UserError(
            f"{folder} holds images of {_shape(height, width, held)}, {_shape(*size_hw, channels)} are wanted; give a "
            f"folder that datasets/pack.py made with --size {size_hw[0]}x{size_hw[1]} --channels {channels}"
        )
    return packed


def open_packed_at_its_size(folder: Path) -> Packed:
    """Open a packed folder. Raises UserError if it is damaged."""
    record = _read_json(folder, RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder} was packed by another version of fastdiff; delete it and run datasets/pack.py again")
    try:
        _check(record)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _damaged(folder, f"{RECORD} lacks an entry") from None
    shape = (record["num_images"], *record["size"], record["channels"])
    try:
        pixels = np.lib.format.open_memmap(folder / PIXELS, mode="r")
    except Exception as error:  # numpy, mmap and Python's tokenizer, which reads the header, raise many types
        raise _damaged(folder, f"{PIXELS}: {error}") from None
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise _damaged(folder, f"{PIXELS} holds {pixels.dtype} {list(pixels.shape)}, not uint8 {list(shape)}")
    return Packed(folder, record, pixels.view(np.ndarray))


def _is_path(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _check(record: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, ValueError or OverflowError for a wrong or missing entry of packed.json."""
    height, width = record["size"]
    numbers = (height, width, record["channels"], record["num_images"])
    if any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError("no size")
    if not isinstance(record["class_names"], list) or not isinstance(record["listing"], str):
        raise TypeError("no names")
    for entry in record["unreadable"]:
        if not 0 <= int(entry["index"]) < record["num_images"] or not isinstance(entry["reason"], str):
            raise ValueError("no image")


def whole_record(described: dict[str, Any], listing: Listing, unreadable: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of packed.json."""
    classes = {"class_names": listing.class_names, "labels_from": listing.labels_from}
    return {**described, "recipe": RECIPE, "pillow": PIL.__version__, **classes, "unreadable": unreadable}


def _shape(height: int, width: int, channels: int) -> str:
    return f"{height}x{width} pixels in {channels} channel{'s' * (channels != 1)}"


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{name}: {error}") from None


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the packed images in {folder} are damaged ({what}); delete that folder and pack them again")
