"""Types of command-line flags, for argparse's `type`: a wrong value gives one sentence and exit code 2."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number that is not below `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise ArgumentTypeError(f"must be a whole number of at least {least}, but is {text}")
        return number

    return read


def not_negative(text: str) -> float:
    """The type of a finite number that is not below 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"must be a number of at least 0, but is {text}")
    return number


def existing_folder(text: str) -> Path:
    """The type of a folder that exists."""
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def checkout_of_improved_diffusion(text: str) -> Path:
    """The type of a folder with improved-diffusion's own code."""
    if not (Path(text) / "improved_diffusion" / "script_util.py").is_file():
        raise ArgumentTypeError(f"{text} is no checkout of improved-diffusion: it has no script_util.py")
    return Path(text)


def existing_file(text: str) -> Path:
    """The type of a file that exists."""
    if not Path(text).is_file():
        raise ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def usable_folder(text: str) -> Path:
    """The type of a folder that exists or can be made."""
    path = Path(text)
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ArgumentTypeError(f"{nearest} is a file; give a folder")
    return path
