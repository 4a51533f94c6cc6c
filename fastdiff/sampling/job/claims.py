"""Claims of processes on pieces of a job: files that only one process can create, with its name in them.

A claim never makes anybody wait. It only says what others may leave to its owner while there is something else to do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastdiff.runtime.files import files_in
from fastdiff.runtime.processes import ProcessId

SILENT = 60.0
"""Seconds without a heartbeat after which nobody counts on a process of another host."""
_BEAT = 5.0
_NAMELESS = 5.0  # seconds that a claim may be without its owner's name


class Held(NamedTuple):
    """The claims on one piece: their highest generation, and whether all their owners are known to have ended."""

    generation: int
    gone: bool


class Claim(NamedTuple):
    """A claim of this process."""

    path: Path

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


class Claims:
    """The claims in a folder, in files NAME.GENERATION. Further generations are further processes at the same piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owners: dict[str, ProcessId] = {}  # what a claim says never changes

    def held(self) -> dict[str, Held]:
        """All claims there are, by piece."""
        found: dict[str, Held] = {}
        for name, generation, gone in self._all():
            before = found.get(name, Held(-1, True))
            found[name] = Held(max(before.generation, generation), before.gone and gone)
        return found

    def take(self, name: str, generation: int) -> Claim | None:
        """Claim a piece; None when somebody else was quicker."""
        claim = Claim(self.folder / f"{name}.{generation}")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            try:
                descriptor = os.open(claim.path, flags, 0o644)
            except FileNotFoundError:
                self.folder.mkdir(exist_ok=True)
                descriptor = os.open(claim.path, flags, 0o644)
        except FileExistsError:
            return None
        try:
            os.write(descriptor, ProcessId.own().tag.encode())
        finally:
            os.close(descriptor)
        self._owners[claim.path.name] = ProcessId.own()
        return claim

    def take_alone(self, name: str) -> Claim | None:
        """Claim a piece that only one process should be at; None while another is, as far as can be told."""
        claims = [(generation, gone) for piece, generation, gone in self._all() if piece == name]
        if any(not gone and not self._silent(f"{name}.{generation}") for generation, gone in claims):
            return None
        return self.take(name, max((generation for generation, _ in claims), default=-1) + 1)

    def tidy(self, needless: Callable[[str], bool]) -> None:
        """Remove the claims of processes that have ended, and all claims on needless pieces."""
        for name, generation, gone in self._all():
            if gone or needless(name):
                (self.folder / f"{name}.{generation}").unlink(missing_ok=True)

    def _all(self) -> list[tuple[str, int, bool]]:
        """(piece, generation, whether the owner is known to have ended) of every claim."""
        found = []
        gone: dict[ProcessId, bool] = {}
        for file in files_in(self.folder):
            name, _, generation = file.rpartition(".")
            if not name or not generation.isdecimal() or file.startswith("."):
                continue
            owner = self._owner(file)
            if owner is None:  # its name is about to be written, unless it ended just before
                found.append((name, int(generation), self._silent(file, _NAMELESS)))
                continue
            if owner not in gone:
                gone[owner] = owner.is_gone()
            found.append((name, int(generation), gone[owner]))
        return found

    def _silent(self, file: str, seconds: float = SILENT) -> bool:
        """Whether nothing has been written to a claim for so long."""
        probe = self.folder / f".{ProcessId.own().tag}.now"  # the clock that counts is that of the file system
        try:
            probe.touch()
            age = probe.stat().st_mtime - (self.folder / file).stat().st_mtime
            probe.unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        return age > seconds

    def _owner(self, file: str) -> ProcessId | None:
        if file not in self._owners:
            try:
                owner = ProcessId.parse((self.folder / file).read_text())
            except (OSError, UnicodeDecodeError):
                return None
            if owner is None:
                return None
            self._owners[file] = owner
        return self._owners[file]


@contextmanager
def kept_alive(claim: Claim) -> Iterator[None]:
    """A claim that is given signs of life while the block runs, and is released then."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT):
            try:
                os.utime(claim.path)
            except OSError:
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        claim.release()
