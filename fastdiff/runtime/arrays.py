"""Arrays out of an npz that may be damaged or forged: the header is read before the array, and nothing is unpickled."""

from __future__ import annotations

import math
import zipfile

import numpy as np


def header(archive: zipfile.ZipFile, name: str, most_bytes: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array of an npz.

    ValueError for one that would unpack to more than most_bytes, holds Python objects, or is shorter than its header
    says; KeyError where there is none of that name.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > most_bytes:
        raise ValueError(f"{name} would unpack to {entry.file_size} bytes")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)  # type: ignore[arg-type]
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"{name} is shorter than its header says")
    return shape, dtype


def read(archive: zipfile.ZipFile, name: str, most_bytes: int) -> np.ndarray:
    """An array of an npz, under the same conditions."""
    header(archive, name, most_bytes)
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
