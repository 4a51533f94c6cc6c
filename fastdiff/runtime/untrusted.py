"""Reading files from unknown sources: those of torch.save and safetensors, and npz.

Nothing in a file is executed, its checksums are compared, and reading a checkpoint takes at most about twice its size
in memory: it is memory-mapped, and tensors that claim more bytes than the file has are refused.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fastdiff.errors import UserError, quoted, shortened
from fastdiff.runtime.file_kinds import AGAIN, HEAD, OTHER_PROGRAM, is_safetensors, other_kind, signature

METADATA = "fastdiff"
"""The entry of a state_dict's metadata, or of a safetensors file's, with fastdiff's settings as JSON."""
_EDM = ("torch_utils.", "dnnlib.")
_OF_EDM = f"EDM's program wrote it, as network-snapshot-*.pkl; {OTHER_PROGRAM}"
_SAVE = "if you trust it, save its weights alone: torch.save(model.state_dict(), 'weights.pt')"
_PICKLES = 5
_MAX_DEPTH = 50
_NEEDED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch._utils", f"_rebuild_{what}") for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
}


def read(path: Path) -> Any:
    """Read a file of torch.save or safetensors without running code from it: tensors on the CPU, in plain containers.

    Raises UserError for a file that is missing or damaged, would run code, or would take far more memory than it has
    bytes.
    """
    if not is_there(path, "file"):
        raise UserError(f"{path} does not exist; give a .pt file or a run's folder")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and the like; unreadable files raise
            head = file.read(HEAD)
            if not head:
                raise UserError(f"{path} is not a checkpoint, or is damaged: it is empty; {AGAIN}")
            if is_safetensors(head, os.fstat(file.fileno()).st_size):
                return _read_safetensors(path)
            if kind := other_kind(file, path):
                raise UserError(f"{path} is not a checkpoint but {kind}")
            is_zip = signature(head) == "zip"
            (_check_archive if is_zip else _check_pickles)(file)
            # A mapped storage ends where the file does; otherwise torch allocates the length that the pickle states.
            file.seek(0)
            source = str(path) if is_zip else file  # torch maps files only by name
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
            return _PlainCopy(2 * os.fstat(file.fileno()).st_size + (1 << 20)).copy(content)
    except UserError:
        raise
    except _Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except _NamesObjects as error:
        advice = _OF_EDM if str(error).startswith(_EDM) else _SAVE
        raise UserError(
            f"{path} holds Python objects ({error}) that would run code when loaded, or take any amount of "
            f"memory; it is refused, a checkpoint holds tensors only; {advice}"
        ) from None
    except PermissionError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give a file that can") from None
    except zipfile.BadZipFile:
        raise UserError(f"{path} is not a checkpoint, or is damaged: the zip is incomplete; {AGAIN}") from None
    except Exception:  # zipfile, pickle and torch raise many kinds of errors for a damaged file
        raise UserError(f"{path} is not a checkpoint, or is damaged") from None


def _read_safetensors(path: Path) -> OrderedDict[str, Tensor]:
    """The tensors of a safetensors file. Its entry METADATA is kept where torch.save keeps that of a state_dict."""
    state = OrderedDict(safetensors.torch.load_file(path))
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is not None:
        state._metadata = {METADATA: text}  # type: ignore[attr-defined]
    return state


class _NamesObjects(Exception):
    """The file names Python objects other than tensors and containers of them."""


class _Refused(Exception):
    """The file is complete, but contains something that no checkpoint contains."""


def _check_archive(file: BinaryIO) -> None:
    """Check the compression (torch.save uses none), checksums and pickles of a zip file."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Refused("its parts are compressed, which a checkpoint's are not")
        if (damaged := archive.testzip()) is not None:
            raise _Refused(f"the checksum of {damaged} in it is wrong, so it is damaged")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_names(io.BytesIO(archive.read(entry)))


def _check_pickles(file: BinaryIO) -> None:
    """Check a file of torch before 1.6, which begins with several pickles: its header, its content, its keys."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(_PICKLES):
            _check_names(data)


def _check_names(pickle: Any) -> None:
    """Raise _NamesObjects for a pickle with a name that tensors in plain containers don't need.

    torch's weights_only admits more, such as bytearray and copies to a device, which turn a number into gigabytes.
    """
    words: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name not in ("GLOBAL", "INST", "STACK_GLOBAL"):
            words = [*words[-1:], argument] if isinstance(argument, str) else words
            continue
        module, _, name = str(argument).partition(" ")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage") and name.isidentifier()
        if not (is_dtype or is_storage or (module, name) in _NEEDED):
            # STACK_GLOBAL takes its names from the stack, where the last strings are likely to be.
            raise _NamesObjects(f"{module}.{name}" if argument else shortened(".".join(words)) or "by computed names")


class _PlainCopy:
    """Copies loaded content into new tensors and containers, at most `bytes_left` bytes of tensors.

    The copy has nothing else that a file could have put there: attributes of tensors and dictionaries (which can hide
    their methods), reference cycles, or strides that repeat a few numbers endlessly.
    """

    def __init__(self, bytes_left: int) -> None:
        self._bytes_left = bytes_left
        self._copies: dict[int, tuple[Any, Any]] = {}  # id → the object, kept alive for its id to stay its own; copy
        self._open: set[int] = set()

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value)
        if not isinstance(value, (dict, list, tuple)) or isinstance(value, torch.Size):
            return value
        if id(value) in self._open or len(self._open) > _MAX_DEPTH:
            raise _Refused("its contents are nested without end")
        if id(value) not in self._copies:
            self._open.add(id(value))
            self._copies[id(value)] = value, self._copy_container(value)
            self._open.remove(id(value))
        return self._copies[id(value)][1]

    def _copy_container(self, value: dict | list | tuple) -> Any:
        if not isinstance(value, dict):
            return (list if isinstance(value, list) else tuple)(self.copy(item) for item in value)
        items = ((key, self.copy(item)) for key, item in dict.items(value))
        if not isinstance(value, OrderedDict):
            return dict(items)
        copied = OrderedDict(items)
        if isinstance(metadata := value.__dict__.get("_metadata"), dict):
            copied._metadata = self.copy(metadata)  # type: ignore[attr-defined]
        return copied

    def _copy_tensor(self, value: Tensor) -> Tensor:
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
    """Path.is_file or Path.is_dir; UserError where the system raises, as for a name of thousands of letters."""
    try:
        return place.is_file() if kind == "file" else place.is_dir()
    except OSError as error:
        raise UserError(f"{quoted(str(place))} can't be opened ({error.strerror}); name a checkpoint") from None


class ArrayHeader(NamedTuple):
    """The header of an array in an npz."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    length: int
    """Bytes before the array's values."""


def npz_array_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """Read the header of an array in an npz.

    ValueError for one that holds Python objects or is shorter than its header says; KeyError where there is no array of
    that name.
    """
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)  # type: ignore[arg-type]
        length = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > entry.file_size - length:
        raise ValueError(f"{name} is shorter than its header says")
    return ArrayHeader(shape, dtype, fortran_order, length)


def npz_header(archive: zipfile.ZipFile, name: str, most_bytes: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in an npz.

    ValueError for one that would unpack to more than most_bytes, and the errors of `npz_array_header`.
    """
    size = archive.getinfo(f"{name}.npy").file_size
    if size > most_bytes:
        raise ValueError(f"{name} would unpack to {size} bytes")
    return npz_array_header(archive, name)[:2]


def read_npz_array(archive: zipfile.ZipFile, name: str, most_bytes: int) -> np.ndarray:
    """Read an array of an npz, with the checks of `npz_header`."""
    npz_header(archive, name, most_bytes)
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
