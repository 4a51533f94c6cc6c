"""Reads pickles that hold nothing but dictionaries, lists, strings, numbers and uint8 arrays.

A pickle can name any function of any module and have it called. This reader admits only the names that an array's
pickle needs, and even those stand for the harmless classes below: no function of numpy is ever called by a file.

Memory is bounded by the file's size too: the reader is Python's own, not the one in C, which lets ten bytes ask for
64 GB of places to remember things in; and texts that a file has encoded again and again are counted.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from fastdiff.errors import UserError


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, name: str | bytes, align: bool = False, copy: bool = False) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: nothing that one byte per number needs."""


class _Array:
    """Stands for numpy.ndarray."""

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
    # Without bytearrays, which are made as long as the file says before their bytes are read.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._bytes_left = 2 * len(data)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Stands for _codecs.encode, by which Python 3 writes bytes for readers of Python 2."""
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
    """The dictionary that a pickle holds, with its byte strings for keys turned into text."""
    try:
        content = _Reader(data).load()
        pairs = [(key.decode("ascii") if isinstance(key, bytes) else key, value) for key, value in content.items()]
    except UserError as error:
        raise UserError(f"{origin} is not safe to read: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(f"{origin} is damaged or of another kind: {' '.join(str(error).split())}") from None
    return {key: value.values if isinstance(value, _Array) else value for key, value in pairs}
