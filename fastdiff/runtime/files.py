"""Atomic writing of files, file locks, strict reading of JSON, and `ProcessId`, which identifies a process.

This module imports no PyTorch, so that small scripts start fast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from fastdiff.errors import UserError, shortened

PARTIAL = ".partial"
_FORGOTTEN = 600.0
"""Seconds without a write after which the unfinished file of another host's process counts as left behind."""
_LONG_NAME = 100  # bytes
_POLL = 0.2  # seconds
MAX_BYTES = 1 << 20
MAX_DEPTH = 50
"""Limits of a JSON file: its size, and the nesting of its values."""


# --- writing ---


def partial_path(path: Path) -> Path:
    """The hidden file that this process writes and then renames to `path`: .NAME.HOST.PID.STARTED.partial.

    NAME is a hash for a name of more than _LONG_NAME bytes, because file systems allow 255 for all of this.
    """
    name = os.fsencode(path.name)
    shown = path.name if len(name) <= _LONG_NAME else hashlib.sha256(name).hexdigest()
    return path.with_name(f".{shown}.{ProcessId.own().tag}{PARTIAL}")


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` when the block ends, in place of an older one, and only then.

    An exception in the block removes the unfinished file and keeps the older one. With `sync` the content and the
    name are on disk when this returns, so that a power cut leaves the old file or the new one.
    """
    partial = partial_path(path)
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
        sync_path(path.parent)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a text file with `atomic_write`."""
    with atomic_write(path, sync=sync) as file:
        file.write(text.encode(errors="surrogateescape"))


def write_json(path: Path, content: Any, *, sync: bool = True) -> None:
    """Write a JSON file with `atomic_write`."""
    write_text(path, json.dumps(content, indent=2) + "\n", sync=sync)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `final` when the block ends, in place of an older one.

    What is in it must be on disk by then. An exception in the block removes the folder. Where `final` is a link to a
    folder, that folder is replaced, and the link stays.
    """
    final = final.resolve() if final.is_symlink() else final
    partial, replaced = hidden(final, "partial"), hidden(final, "replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        sync_path(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def hidden(folder: Path, ending: str) -> Path:
    """The hidden name beside a folder that it has while it is written, replaced or removed: .NAME.ENDING."""
    return folder.with_name(f".{folder.name}.{ending}")


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Some file systems can't sync folders: no error then."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def remove_partial_files(folder: Path) -> None:
    """Remove what `atomic_write` left unfinished in a folder: files of processes that have ended, and of this one."""
    for name in files_in(folder):
        if not name.startswith(".") or not name.endswith(PARTIAL):
            continue
        owner = ProcessId.parse(".".join(name[1 : -len(PARTIAL)].rsplit(".", 3)[1:]))
        if owner is None:
            continue  # written by something else
        with suppress(OSError):  # it is gone, or belongs to another user
            age = time.time() - (folder / name).stat().st_mtime
            if owner == ProcessId.own() or owner.is_gone() or age > _FORGOTTEN:
                (folder / name).unlink()


def files_in(folder: Path) -> list[str]:
    """Names in a folder; none when it isn't there."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


# --- locking ---


class LocksUnsupported(OSError):
    """The file system has no locks."""


class FileLock:
    """An exclusive lock on a file (flock), which the system releases when the process ends, however it ends.

        with FileLock(path):            # waits for the lock
            ...
        lock = FileLock(path)
        if lock.acquire(timeout=30):    # False if another process still holds it then
            ...
            lock.release()

    The lock file stays when the lock is released, unless `remove` is set. Raises LocksUnsupported on a file system
    without locks, and other OSErrors where the file can't be opened.
    """

    def __init__(self, path: Path, *, remove: bool = False) -> None:
        self.path, self.remove = path, remove
        self._file: IO[str] | None = None

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the lock, at most `timeout` seconds; returns whether this process has it."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._try():
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(_POLL)
        return True

    def release(self) -> None:
        """Release the lock if this process has it."""
        if self._file is not None:
            if self.remove:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> bool:
        try:
            import fcntl
        except ImportError:  # Windows
            raise LocksUnsupported(errno.ENOTSUP, "this system has no flock", str(self.path)) from None
        with ExitStack() as closing:
            file = closing.enter_context(self.path.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                raise LocksUnsupported(error.errno, error.strerror, str(self.path)) from error
            with suppress(FileNotFoundError):
                # The last holder may have removed the file that was opened here, and another process made a new one.
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    closing.pop_all()
                    self._file = file
        return self._file is not None


# --- reading ---


def read_json(path: Path) -> Any:
    """Read a JSON file. UserError, which names the file, where it can't be read or isn't strict JSON.

    Also refused are files of more than MAX_BYTES, values nested deeper than MAX_DEPTH, numbers that aren't finite, and
    objects with a repeated key, of which some readers use the first and others the last.
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
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits, or a repeated key
        raise UserError(f"{path}: is not JSON ({shortened(str(error), 200)})") from error
    _check(content, path)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice} occurs twice in one object")
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


# --- the identity of a process ---


class ProcessId(NamedTuple):
    """A process, distinguished from all others on this and other hosts and from a later one with the same pid."""

    host: str
    """Host name and, on Linux, the pid namespace: containers with the same host name count pids separately."""
    pid: int
    started: int
    """Start time in the kernel's clock ticks since boot; 0 where the system doesn't tell."""

    @property
    def tag(self) -> str:
        """The process in a form for file names, such as node3-4026531836.4711.98765."""
        return f"{self.host}.{self.pid}.{self.started}"

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; always False for a process of another host."""
        return self.host == ProcessId.own().host and _start_time(self.pid) != self.started

    @staticmethod
    def parse(tag: str) -> ProcessId | None:
        """The process with this tag; None for any other text."""
        found = re.fullmatch(r"([\w-]+)\.(\d+)\.(\d+)", tag.strip())
        return ProcessId(found[1], int(found[2]), int(found[3])) if found else None

    @staticmethod
    def of(pid: int) -> ProcessId:
        """The process of this host that has this pid now."""
        return ProcessId(_host(), pid, _start_time(pid) or 0)

    @staticmethod
    def own() -> ProcessId:
        """This process."""
        return _own_id(os.getpid())


@lru_cache(maxsize=1)
def _own_id(pid: int) -> ProcessId:
    return ProcessId.of(pid)


def _host() -> str:
    try:
        namespace = "-" + re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = ""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) + namespace


def _start_time(pid: int) -> int | None:
    """Start time of a process of this host, in clock ticks (0 where the system doesn't tell); None if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if words[0] in "ZX" else int(words[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    if os.name == "nt":  # os.kill would send a Ctrl-C there
        return 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it belongs to another user
    return 0
