"""Recognises files that are given as checkpoints and are something else, by their first bytes or the names in a zip.

Nothing is unpacked or executed.
"""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

HEAD = 512
"""Bytes from which a kind is recognised; a tar archive's signature ends at byte 262."""
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl")
OTHER_PROGRAM = "fastdiff reads weights of improved-diffusion's network, from .pt and .safetensors files"
AGAIN = "copy or download it again"
# Offset, signature, kind.
_SIGNATURES = (
    (0, b"PK\3\4", "zip"),
    (0, b"version https://git-lfs", "Git LFS"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"GGUF", "GGUF"),
    (0, b"\x93NUMPY", "npy"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!", "rar"),
    (257, b"ustar", "tar"),
    (0, b"\x89PNG", "picture"),
    (0, b"\xff\xd8\xff", "picture"),
    (0, b"GIF8", "picture"),
    (8, b"WEBP", "picture"),
    (0, b"SQLite format 3", "sqlite"),
)
# Kind → what a checkpoint of that kind is, and what to do; {} is its path, quoted for a shell.
_ADVICE = {
    "Git LFS": "a pointer of Git LFS to the file; fetch the file itself: git lfs pull",
    "HDF5": f"an HDF5 file, as Keras writes; {OTHER_PROGRAM}",
    "npy": f"an array of NumPy's; {OTHER_PROGRAM}",
    "gzip": "compressed by gzip; unpack it (gunzip {}, or tar -xf {} for a .tar.gz) and name what is inside",
    "tar": "a tar archive; unpack it (tar -xf {}) and name the checkpoint in it",
    "picture": "a picture; name a checkpoint",
    "GGUF": f"a GGUF file; {OTHER_PROGRAM}",
    "sqlite": f"an SQLite database; {OTHER_PROGRAM}",
    **{
        kind: f"compressed by {kind}; unpack it (tar -xf {{}}) and name what is inside"
        for kind in ("bzip2", "xz", "zstd")
    },
    **{kind: f"a {kind} archive; unpack it and name the checkpoint in it" for kind in ("7z", "rar")},
}
_SUFFIXES = {
    ".onnx": "an ONNX graph",
    ".pb": "a TensorFlow graph",
    ".index": "the index of a TensorFlow checkpoint",
    ".tflite": "a TensorFlow Lite model",
    ".msgpack": "a checkpoint of Flax",
}


def other_kind(file: BinaryIO, path: Path) -> str:
    """What an open file is, and what to do with it, if it is surely no checkpoint that PyTorch or safetensors wrote.

    Empty if it may be one. The position in the file changes.
    """
    file.seek(0)
    head = file.read(HEAD)
    name = shlex.quote(str(path))
    kind = signature(head)
    if kind == "zip":
        return _kind_of_zip(file, name)
    if kind == "text":
        text = _text(head)
        what = "a web page or XML" if text.startswith("<") else "text"
        return f"{what} ({text.splitlines()[0][:60]!r}), perhaps a server's message in place of the file; {AGAIN}"
    if kind:
        return _ADVICE[kind].format(*[name] * _ADVICE[kind].count("{}"))
    onnx = head[0] == 8 and head[1:2] < b"\x20" and any(word in head for word in (b"pytorch", b"onnx", b"tf2onnx"))
    if onnx or (path.suffix in _SUFFIXES and head[0] != 0x80):
        return f"{'an ONNX graph' if onnx else _SUFFIXES[path.suffix]}; {OTHER_PROGRAM}"
    return ""


def signature(head: bytes) -> str:
    """The kind of a file by its first HEAD bytes: a kind of _SIGNATURES, "text", or "" where that is unknown."""
    for at, start, kind in _SIGNATURES:
        if head[at : at + len(start)] == start:
            return kind
    return "text" if _text(head) else ""


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins as safetensors writes it: the length of a JSON object (8 bytes), and that object."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _kind_of_zip(file: BinaryIO, name: str) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [PurePosixPath(entry) for entry in archive.namelist()]
    except Exception:  # it is damaged, which reading it will show
        return ""
    if any(entry.name == "data.pkl" for entry in names):  # of torch.save, or of torch.jit.save
        if not any(entry.name == "constants.pkl" for entry in names):
            return ""
        save = f"torch.save(torch.jit.load({name!r}).state_dict(), 'weights.pt')"
        return f"a TorchScript archive, which holds a program; where you trust it, save its weights alone: {save}"
    if any(entry.name.endswith(".weights.h5") for entry in names):
        return f"a Keras model; {OTHER_PROGRAM}"
    if names and all(entry.suffix == ".npy" for entry in names):
        return f"an .npz of arrays; {OTHER_PROGRAM}"
    inside = next((f" of {entry.name}" for entry in names if entry.suffix in WEIGHTS), "")
    return f"a zip archive{inside}; unpack it (unzip {name} -d FOLDER) and name the checkpoint in it"


def _text(head: bytes) -> str:
    """The first HEAD bytes of a file as text; empty if they are none."""
    try:
        text = head.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if error.end < len(head) or len(head) < HEAD:  # else a character was cut at the end
            return ""
        text = head[: error.start].decode("utf-8-sig").strip()
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else ""
