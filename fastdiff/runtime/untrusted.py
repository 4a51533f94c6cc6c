"""Reading files of torch.save that came from elsewhere.

Nothing in such a file is run; its checksums are compared; and reading it takes no more memory than twice its size, for
it is mapped, not unpacked, and what is larger than what lies in the file is refused.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError, quoted

_ZIP = b"PK\3\4"
_PICKLES = 5
_NEEDED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch._utils", f"_rebuild_{what}") for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
}


def read(path: Path) -> Any:
    """What a file of torch.save holds, without running code: tensors on the CPU, in plain containers.

    Raises UserError for a file that is missing, damaged, would run code, or would take far more memory than it has
    bytes.
    """
    if not is_there(path, "file"):
        raise UserError(f"{path} does not exist; give the path of a .pt checkpoint")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == _ZIP
        if is_zip:
            _check_archive(path)
        else:
            _check_pickles(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and the like; what can't be read raises
            # Mapped, a storage ends where the file does. Unmapped, torch believes the length that the pickle states.
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
            return _Plain(2 * path.stat().st_size + (1 << 20)).copy(content)
    except _Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except _NamesObjects as error:
        raise UserError(
            f"{path} holds Python objects ({error}) that would run code when loaded, or take any amount of "
            "memory; it is refused, a checkpoint holds tensors only"
        ) from None
    except PermissionError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give a file that can") from None
    except Exception:  # whatever a damaged file leads zipfile, pickle and torch to
        raise UserError(f"{path} is not a checkpoint, or is damaged") from None


class _NamesObjects(Exception):
    """A file that would make objects of Python which aren't tensors or containers of them."""


class _Refused(Exception):
    """A file that is whole, but not what a checkpoint may be."""


def _check_archive(path: Path) -> None:
    """_Refused for a zip that is compressed, which torch.save's never are, or whose checksums are wrong."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise _Refused("its parts are compressed, which a checkpoint's are not")
        if (damaged := archive.testzip()) is not None:
            raise _Refused(f"the checksum of {damaged} in it is wrong, so it is damaged")
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                _check_names(io.BytesIO(archive.read(entry)))


def _check_pickles(path: Path) -> None:
    """The same in a file from before zips, which begins with several pickles: about itself, its content, its keys."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(_PICKLES):
            _check_names(data)


def _check_names(file: Any) -> None:
    """_NamesObjects for a pickle that names anything but what tensors in plain containers need.

    torch admits more, among it what makes gigabytes of a number: bytearray, copies of a tensor to a device.
    """
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name not in ("GLOBAL", "INST", "STACK_GLOBAL"):
            continue
        module, _, name = str(argument).partition(" ")
        kind = getattr(torch, name, None) if module == "torch" else None
        if not (isinstance(kind, torch.dtype) or (module, name) in _NEEDED or _is_storage(module, name)):
            raise _NamesObjects(f"{module}.{name}" if argument else "by names that it makes")


def _is_storage(module: str, name: str) -> bool:
    return module in ("torch", "torch.storage") and name.endswith("Storage") and name.isidentifier()


class _Plain:
    """Copies what was loaded, so that nothing of the file's own making stays: attributes of tensors and dictionaries
    (which can hide their methods), loops, or tensors that repeat a few numbers endlessly."""

    def __init__(self, most_bytes: int) -> None:
        self._bytes_left = most_bytes
        self._copies: dict[int, Any] = {}
        self._inside: set[int] = set()
        self._alive: list[Any] = []  # an id is its object's for as long as that lives

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if not isinstance(value, (dict, list, tuple)) or isinstance(value, torch.Size):
            return value
        if id(value) in self._inside or len(self._inside) > 50:
            raise _Refused("its contents are nested without end")
        if id(value) not in self._copies:
            self._inside.add(id(value))
            self._copies[id(value)] = self._container(value)
            self._inside.remove(id(value))
            self._alive.append(value)
        return self._copies[id(value)]

    def _container(self, value: dict | list | tuple) -> Any:
        if not isinstance(value, dict):
            return (list if isinstance(value, list) else tuple)(self.copy(item) for item in value)
        items = ((key, self.copy(item)) for key, item in dict.items(value))
        if not isinstance(value, OrderedDict):
            return dict(items)
        copied = OrderedDict(items)
        if isinstance(metadata := value.__dict__.get("_metadata"), dict):
            copied._metadata = self.copy(metadata)  # type: ignore[attr-defined]
        return copied

    def _tensor(self, value: Tensor) -> Tensor:
        plain = value.detach()
        dense = plain.layout == torch.strided and plain.device.type == "cpu" and not plain.is_quantized
        if type(plain) is not Tensor or not dense or plain.is_nested:
            raise _Refused("it holds a tensor that is not a plain one of numbers")
        size = plain.numel() * plain.itemsize
        self._bytes_left -= size
        if size > plain.untyped_storage().nbytes() or self._bytes_left < 0:
            raise _Refused(f"its tensors, such as one of shape {list(plain.shape)}, claim more bytes than the file has")
        return plain.clone()


def is_there(place: Path, kind: Literal["file", "dir"]) -> bool:
    """Path.is_file or is_dir; UserError where the system refuses to tell, as for a name of thousands of letters."""
    try:
        return place.is_file() if kind == "file" else place.is_dir()
    except OSError as error:
        raise UserError(f"{quoted(str(place))} can't be opened ({error.strerror}); name a checkpoint") from None


def npz_header(archive: zipfile.ZipFile, name: str, most_bytes: int) -> tuple[tuple[int, ...], np.dtype]:
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


def read_npz_array(archive: zipfile.ZipFile, name: str, most_bytes: int) -> np.ndarray:
    """An array of an npz, under the same conditions."""
    npz_header(archive, name, most_bytes)
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
