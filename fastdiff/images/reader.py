"""Reading single images by their index, and what happens when one can't be read.

Such an image is named once in the log and replaced by the next readable one of the listing, label and all, so that
every loader, and every resumption, sees the same samples. When more than 1% of a data set is unreadable, or the only
images there are, something else is wrong, and the run stops.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import UnidentifiedImageError

from fastdiff.errors import UserError, one_line
from fastdiff.images.image_files import read_file
from fastdiff.images.listing import Listing
from fastdiff.images.pixels import MODES, load_image

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOLERATED = 0.01
"""Share of the data set that may be unreadable (one image may be in any case)."""


def what_is_wrong(error: Exception) -> str:
    """Why an image can't be read, in few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the file is named already
    return one_line(str(error))[:200] or type(error).__name__


class Reader:
    """Reads images of a listing at one size. Threads may share it."""

    def __init__(self, listing: Listing, size_hw: tuple[int, int], channels: int) -> None:
        self.listing = listing
        self.size_hw = size_hw
        self.channels = channels
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def unreadable(self) -> list[Path]:
        """The images found unreadable so far."""
        with self._lock:
            return [self.listing.path(index) for index in sorted(self._bad)]

    def reference(self, index: int, data: bytes) -> np.ndarray:
        """A file's bytes → its reference pixels, uint8 [H, W, C]; to be given to `read`."""
        return load_image(data, self.size_hw, MODES[self.channels])

    @property
    def reasons(self) -> dict[int, str]:
        """Index of each image found unreadable so far, and what is wrong with it."""
        with self._lock:
            return dict(self._bad)

    def read(self, index: int, decode: Callable[[int, bytes], T]) -> tuple[int, T]:
        """decode(index, bytes of the file) for image `index`, or else for the first readable one after it.

        Returns the index of the image that was taken, and what `decode` made of it.
        """
        self.stop_if_too_many()
        count = len(self.listing.names)
        for step in range(count):
            candidate = (index + step) % count
            if candidate in self._bad:
                continue
            found = self.attempt(candidate, decode)
            if found is not None:
                return candidate, found
            self.stop_if_too_many()
        raise UserError(f"none of the {count} images below {self.listing.root} can be read")

    def attempt(self, index: int, decode: Callable[[int, bytes], T]) -> T | None:
        """decode(index, bytes of the file), or None for an image that can't be read, which is then named."""
        try:
            return decode(index, read_file(self.listing.path(index)))
        except Exception as error:  # Pillow's decoders raise many kinds; all are about this one file
            self.reject(index, what_is_wrong(error))
            return None

    def retry(self, index: int, decode: Callable[[int, bytes], T]) -> T | None:
        """The same for an image found unreadable before, which counts as readable if it now is."""
        try:
            found = decode(index, read_file(self.listing.path(index)))
        except Exception:  # named when it was first met
            return None
        with self._lock:
            self._bad.pop(index, None)
        return found

    def reject(self, index: int, reason: str) -> None:
        """Count an image as unreadable and name it in the log, once."""
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = reason
        logger.warning(
            "unreadable image, replaced by the next one: %s (%s)", one_line(str(self.listing.path(index))), reason
        )

    def stop_if_too_many(self) -> None:
        """UserError, which names some, when more images are unreadable than may be."""
        reasons, count = self.reasons, len(self.listing.names)
        if len(reasons) > max(1, TOLERATED * count) or len(reasons) == count:
            named = "; ".join(f"{self.listing.path(i)} ({why})" for i, why in list(reasons.items())[:3])
            named += "; ..." if len(reasons) > 3 else ""
            raise UserError(f"{len(reasons)} of {count} images can't be read, which is too many to go on: {named}")
