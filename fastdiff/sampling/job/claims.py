"""Claims of processes on parts of a job's work, so that other processes do different parts first.

Drawing is deterministic, so claims only avoid duplicate work: they protect nothing, and no process waits for one. A
claim is a file with its owner's ProcessId. The owner updates the file's modification time as a heartbeat.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fastdiff.runtime.files import ProcessId, files_in

SILENT = 60.0
"""Seconds without a heartbeat after which a claim counts as abandoned."""
BEAT = 5.0
"""Seconds between heartbeats."""


class Held(NamedTuple):
    """The claims on one piece of work: the highest generation (-1 without claims), and whether all are abandoned."""

    generation: int = -1
    abandoned: bool = True


class Claim:
    """A claim of this process. A thread sends its heartbeats until it is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._released = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, daemon=True)
        self._heartbeat.start()

    def release(self) -> None:
        self._released.set()
        self._heartbeat.join()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        with suppress(OSError):  # another process has removed the file
            while not self._released.wait(BEAT):
                os.utime(self.path)


class Claims:
    """The claims in a folder: files NAME.GENERATION, with a different generation per process on the same work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def held(self) -> defaultdict[str, Held]:
        """All claims, by the name of the work."""
        found: defaultdict[str, Held] = defaultdict(Held)
        for name, generation, abandoned in self._all():
            found[name] = Held(max(found[name].generation, generation), found[name].abandoned and abandoned)
        return found

    def take(self, name: str, generation: int) -> Claim | None:
        """Claim a piece of work; None if another process has the claim of this generation."""
        path = self.folder / f"{name}.{generation}"
        while True:
            try:
                with path.open("x") as file:
                    file.write(ProcessId.own().tag)
                return Claim(path)
            except FileExistsError:
                return None
            except FileNotFoundError:  # a process that finishes removes the empty folder
                self.folder.mkdir(exist_ok=True)

    def take_alone(self, name: str) -> Claim | None:
        """Claim a piece of work that one process should do; None while another process has a claim on it."""
        held = self.held()[name]
        return self.take(name, held.generation + 1) if held.abandoned else None

    def tidy(self, is_done: Callable[[str], bool]) -> None:
        """Remove the abandoned claims, and all claims on work that is done."""
        for name, generation, abandoned in self._all():
            if abandoned or is_done(name):
                (self.folder / f"{name}.{generation}").unlink(missing_ok=True)

    def _all(self) -> Iterator[tuple[str, int, bool]]:
        """(name, generation, whether it is abandoned) of every claim."""
        for file in files_in(self.folder):
            name, _, generation = file.rpartition(".")
            if name and generation.isdecimal() and not file.startswith("."):
                yield name, int(generation), self._is_abandoned(self.folder / file)

    def _is_abandoned(self, path: Path) -> bool:
        try:
            owner = ProcessId.parse(path.read_text(errors="replace"))
            if owner is not None and owner.is_gone():
                return True
            os.utime(self.folder)  # the clock of the file system can differ from this host's
            return self.folder.stat().st_mtime - path.stat().st_mtime > SILENT
        except FileNotFoundError:  # it was released in the meantime
            return True
