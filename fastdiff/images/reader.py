"""Reads single images by their index, and replaces those that can't be read.

An unreadable image is logged once and replaced by the next readable one of the listing, together with its label, so
every loader and every resumed run sees the same samples. If more than 1% of a data set or all of it is unreadable, the
cause is probably not the individual images, and the run stops; `unreadable.naming_all` then lists all of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastdiff.errors import one_line
from fastdiff.images.image_files import read_file
from fastdiff.images.listing import Listing
from fastdiff.images.pixels import MODES, load_image
from fastdiff.images.unreadable import GaveUp, ImageFiles, what_is_wrong

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOLERATED = 0.01
"""Fraction of the data set that may be unreadable. A single unreadable image is always tolerated."""


class Reader:
    """Reads images of a listing at one size. Threads may share it.

    whole  the images to try when too many can't be read, where `listing` is only the first of them; None: don't try
           any, because their files aren't there.
    """

    def __init__(self, listing: Listing, size_hw: tuple[int, int], channels: int, whole: Listing | None = None) -> None:
        self.listing, self.size_hw, self.channels = listing, size_hw, channels
        self._whole = whole
        self._unreadable: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def reasons(self) -> dict[int, str]:
        """Index of each image found unreadable so far, and the reason."""
        with self._lock:
            return dict(self._unreadable)

    @property
    def unreadable(self) -> list[Path]:
        """The images found unreadable so far, in the listing's order."""
        return [self.listing.path(index) for index in sorted(self.reasons)]

    def reference(self, index: int, data: bytes, crop: Sequence[float] | None = None) -> np.ndarray:
        """Decode a file's bytes to reference pixels, uint8 [H, W, C]. This is a `decode` function for `read`."""
        return load_image(data, self.size_hw, MODES[self.channels], crop)

    def read(self, index: int, decode: Callable[[int, bytes], T]) -> tuple[int, T]:
        """Call decode(index, bytes of the file) for image `index`, or for the first readable one after it.

        Returns the index of the image that was read, and the result of `decode`. GaveUp, which is a UserError, if too
        many images are unreadable.
        """
        self.stop_if_too_many()
        count = len(self.listing.names)
        for step in range(count):
            candidate = (index + step) % count
            if candidate in self._unreadable:
                continue
            found = self.attempt(candidate, decode)
            if found is not None:
                return candidate, found
            self.stop_if_too_many()
        raise self._give_up(f"none of the {count} images below {self.listing.root} can be read")

    def attempt(self, index: int, decode: Callable[[int, bytes], T]) -> T | None:
        """Call decode(index, bytes of the file). If the image can't be read, it is rejected and None is returned."""
        try:
            return decode(index, self._data(index))
        except Exception as error:  # Pillow's decoders raise many types, all about this one file
            self.reject(index, what_is_wrong(error))
            return None

    def _data(self, index: int) -> bytes:
        """The bytes of an image's file."""
        return read_file(self.listing.path(index))

    def reject(self, index: int, reason: str) -> None:
        """Count an image as unreadable, and log it the first time."""
        with self._lock:
            if index in self._unreadable:
                return
            self._unreadable[index] = reason
        name = one_line(str(self.listing.path(index)))
        logger.warning("unreadable image, replaced by the next one: %s (%s)", name, reason)

    def accept(self, index: int) -> None:
        """Count an image as readable again."""
        with self._lock:
            self._unreadable.pop(index, None)

    def stop_if_too_many(self) -> None:
        """Raise GaveUp, with the first three images, if more are unreadable than tolerated."""
        reasons, count = self.reasons, len(self.listing.names)
        if len(reasons) > max(1, TOLERATED * count) or len(reasons) == count:
            named = "; ".join(f"{self.listing.path(i)} ({why})" for i, why in sorted(reasons.items())[:3])
            more = "; ..." if len(reasons) > 3 else ""
            raise self._give_up(
                f"{len(reasons)} of {count} images can't be read, which is too many to go on: {named}{more}"
            )

    def _give_up(self, message: str) -> GaveUp:
        whole = self._whole
        files = ImageFiles(len(whole.names), whole.path, self.size_hw, MODES[self.channels]) if whole else None
        return GaveUp(message, "--data_dir", files)
