"""Files that are there whole or not at all, whenever a process is killed."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastdiff.errors import UserError, shortened

PARTIAL = ".partial"
SILENT = 60.0  # seconds without a sign of life after which nobody counts on a process of another host any more
_FORGOTTEN = 10 * SILENT  # seconds that a process of another host writes nothing; clocks differ


def partial_of(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{me().tag}{PARTIAL}")


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends well and vanishes when it doesn't.

    sync makes sure that it is on disk before it has the name, so that not even a power cut leaves half of it.
    """
    partial = partial_of(path)
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe. Some file systems can't, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove unfinished files of processes that have ended, as far as can be told, and of this one."""
    for name in files_in(folder):
        if not name.startswith(".") or not name.endswith(PARTIAL):
            continue
        owner = parse(".".join(name[1 : -len(PARTIAL)].rsplit(".", 3)[1:]))
        if owner is None:
            continue  # not of this kind
        with suppress(FileNotFoundError):
            if owner == me() or owner.is_gone() or time.time() - (folder / name).stat().st_mtime > _FORGOTTEN:
                (folder / name).unlink()


MAX_BYTES = 1 << 20
MAX_DEPTH = 50


def read_json(path: Path) -> Any:
    """A JSON file's content. UserError, which names the file, for what can't be read or isn't strict JSON.

    Refused besides: files of more than MAX_BYTES, values nested deeper than MAX_DEPTH, numbers that aren't
    finite, and objects with a key twice, of which readers take now the first and now the last.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be read ({reason}); give the path of a JSON file") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; give a JSON file of settings")
    try:
        content = json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except ValueError as error:  # of JSON, of UTF-8, of a number of thousands of digits, or one of those below
        raise UserError(f"{path}: is not JSON ({shortened(str(error), 200)})") from error
    _check(content, path)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice} stands twice in one object")
    return found


def _check(content: Any, path: Path) -> None:
    """UserError for a number that isn't finite, or values nested too deeply."""
    level = [("", content)]
    for _ in range(MAX_DEPTH):
        for key, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path}: {shortened(key)} must be a finite number, not {value}")
        level = [(f"{key}.{name}".lstrip("."), inner) for key, value in level for name, inner in _inside(value)]
    if level:
        raise UserError(f"{path}: is nested too deeply; at most {MAX_DEPTH} levels are read")


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


class Owner(NamedTuple):
    """A process: its host, its number there, and when it was started, because numbers are given out again."""

    host: str
    pid: int
    started: int

    @property
    def tag(self) -> str:
        """As a part of a file's name, e.g. node3.4711.98765."""
        return f"{self.host}.{self.pid}.{self.started}"

    def is_gone(self) -> bool:
        """Whether the process is known to have ended, which only its own host can tell."""
        return self.host == me().host and _started(self.pid) != self.started


def parse(tag: str) -> Owner | None:
    """The owner with this tag; None for anything else."""
    found = re.fullmatch(r"([\w-]+)\.(\d+)\.(\d+)", tag.strip())
    return Owner(found[1], int(found[2]), int(found[3])) if found else None


def me() -> Owner:
    """This process."""
    return _owner(os.getpid())


@lru_cache(maxsize=1)
def _owner(pid: int) -> Owner:
    try:  # containers of one name each count their processes from 1
        space = "-" + re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        space = ""
    return Owner(re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) + space, pid, _started(pid) or 0)


def _started(pid: int) -> int | None:
    """When a process of this host started, in the kernel's ticks (0 where that is not told); None without it."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if words[0] in "ZX" else int(words[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # somebody else's
    return 0


def files_in(folder: Path) -> list[str]:
    """Names in a folder; none when it isn't there."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
