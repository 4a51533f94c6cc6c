"""Reads pickles that contain only dictionaries, lists, strings, numbers and uint8 arrays.

A pickle can name and call any function of any module. This reader admits only the names that a pickled array needs,
and replaces even those by the harmless classes below, so that a file never calls a function of numpy.

Memory is bounded by the file's size: Python's unpickler is used instead of the one in C, in which ten bytes can
allocate a memo of 64 GB; and the bytes that a file has encoded repeatedly are counted.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from fastdiff.errors import UserError


class _Dtype:
    """Replaces numpy.dtype."""

    def __init__(self, name: str | bytes, align: bool = False, copy: bool = False) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and the like, which have no meaning for numbers of one byte."""


class _Array:
    """Replaces numpy.ndarray."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _version, shape, dtype, column_major, data = state
        if dtype.name not in ("u1", "uint8") or column_major or math.prod(shape) != len(data):
            raise ValueError("an array that is not uint8 in row-major order")
        self.values = np.frombuffer(data, np.uint8).reshape(shape)


def _reconstruct(*_ignored: object) -> _Array:
    return _Array()


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Reader(pickle._Unpickler):
    # No bytearrays: they are allocated at the length that the file states before their bytes are read.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._bytes_left = 2 * len(data)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Replaces _codecs.encode, with which Python 3 pickles bytes for Python 2."""
        if encoding not in ("latin1", b"latin1"):
            raise ValueError("bytes in another encoding than latin1")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise ValueError("more bytes than the file has")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _ADMITTED:
            raise UserError(f"it asks for {module}.{name}, which such a file never needs")
        return _ADMITTED[module, name]


def read(data: bytes, origin: str) -> dict[str, Any]:
    """Read a pickled dictionary; keys that are byte strings are decoded. UserError where it is something else."""
    try:
        content = _Reader(data).load()
        pairs = [(key.decode("ascii") if isinstance(key, bytes) else key, value) for key, value in content.items()]
    except UserError as error:
        raise UserError(f"{origin} is not safe to read: {error}") from None
    except Exception as error:  # a damaged pickle raises many kinds of errors
        raise UserError(f"{origin} is damaged or of another kind: {' '.join(str(error).split())}") from None
    return {key: value.values if isinstance(value, _Array) else value for key, value in pairs}
