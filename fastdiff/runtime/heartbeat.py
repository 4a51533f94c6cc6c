"""Heartbeats: each rank tells the others what it is doing and why it ends.

They go through a TCPStore, with a separate connection and thread, so that a collective that hangs doesn't delay them.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch.distributed as dist

from fastdiff.runtime.files import ProcessId
from fastdiff.runtime.processes import agent_hosts_store, open_store

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = (sysconfig.get_paths()["stdlib"], f"{os.sep}site-packages{os.sep}", "<")


class End(NamedTuple):
    """Why a rank ends: by itself, or because it found another rank lost or late."""

    line: str  # the sentence that other ranks print
    code: int  # exit code
    about: Literal["itself", "lost", "late"] = "itself"


@dataclass
class Beat:
    """A heartbeat of a rank. Two heartbeats of one rank never compare equal, because `idle` changes all the time."""

    rank: int
    name: str  # "rank 1 (node1, pid 4242)"
    machine: str  # see this_machine
    process: ProcessId
    place: str  # what the rank is doing: "step 17"
    code: str  # the line that its main thread executes: "reader.py:88"
    idle: float  # seconds since its last progress
    allowed: float  # seconds that it may be idle at this place
    collectives: int  # how many it has entered
    waits: bool  # whether its main thread is inside torch.distributed
    done: bool = False  # whether its work is finished
    end: End | None = None  # in its last heartbeat
    at: float = field(default=0.0, compare=False)  # when the exchange began that brought it (time.monotonic)

    @property
    def leaves(self) -> bool:
        """Whether the rank has announced that it will be gone."""
        return self.done or self.end is not None

    @staticmethod
    def parse(text: bytes, at: float) -> Beat:
        beat = Beat(**{**json.loads(text), "at": at})
        beat.process, beat.end = ProcessId(*beat.process), beat.end and End(*beat.end)
        return beat


def this_machine() -> str:
    """The host, pid namespace and boot of this process: several machines may have the same host name."""
    return ProcessId.own().host + (_BOOT.read_text().strip() if _BOOT.exists() else "")


class Heartbeat:
    """Sends a rank's heartbeats, made by `beat`, every `interval` seconds, and collects those of the other ranks.

    The first exchange takes place when all ranks have started.
    """

    def __init__(self, rank: int, world_size: int, beat: Callable[[], Beat], interval: float) -> None:
        self.rank, self.world_size, self.interval, self._beat = rank, world_size, interval, beat
        self.hosts = rank == 0 and not agent_hosts_store()  # the store ends with this process
        self.peers: dict[int, Beat] = {}  # the newest heartbeat of each other rank
        self.gone: set[int] = set()  # ranks whose processes had ended before the last exchange began
        self.at = 0.0  # when the last complete exchange began (time.monotonic); 0 before the first
        self.broken = False  # whether the store has been lost
        self._end: End | None = None
        self._notified = threading.Event()  # set when the end has been sent, or never will be
        self._wake = threading.Event()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def others(self) -> list[Beat]:
        """The other ranks' newest heartbeats, by rank."""
        return sorted(self.peers.values(), key=lambda beat: beat.rank)

    def ends(self) -> list[tuple[Beat, End]]:
        """The other ranks that end; first those that end by themselves, which are the causes."""
        ends = [(beat, beat.end) for beat in self.others() if beat.end]
        return sorted(ends, key=lambda pair: pair[1].about != "itself")

    def notify(self, end: End, patience: float) -> bool:
        """Send a last heartbeat, with the end; returns whether that succeeded within `patience` seconds."""
        self._end = end
        self._wake.set()
        return self._notified.wait(patience) and not self.broken

    def exchange_now(self) -> None:
        """Exchange heartbeats now, not at the end of the interval."""
        self._wake.set()

    def _run(self) -> None:
        try:
            store = open_store("heartbeat", self.rank, self.world_size, timedelta(days=1))
            while not self._closed:
                self._exchange(store)
                self._wake.wait(self.interval)
                self._wake.clear()
        except (RuntimeError, OSError):  # torch's errors of stores are RuntimeErrors
            self.gone |= set() if agent_hosts_store() else {0}
            self.broken = True
            self._notified.set()

    def _exchange(self, store: dist.Store) -> None:
        start, machine = time.monotonic(), this_machine()
        gone = {beat.rank for beat in self.others() if beat.machine == machine and beat.process.is_gone()}
        if 0 in gone and not agent_hosts_store():  # TCPStore would print a C++ stack trace before it raises this
            raise ConnectionError("the process that hosts the store has ended")
        if not self._notified.is_set():
            beat = self._beat()
            beat.end = self._end
            store.set(str(self.rank), json.dumps(asdict(beat)))
            if beat.end:
                self._notified.set()
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        known = [str(rank) for rank in others if rank in self.peers or store.check([str(rank)])]
        for beat in [Beat.parse(text, start) for text in store.multi_get(known)]:
            if beat != self.peers.get(beat.rank):
                self.peers[beat.rank] = beat
        self.gone, self.at = gone, start  # set last: the ends that ranks in `gone` announced have been read


def collectives() -> int:
    """How many collectives this process has entered, over all process groups that count them."""
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(RuntimeError, AttributeError):
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return count


def where_blocked() -> tuple[str, bool]:
    """The "file.py:line" outside of libraries that the main thread executes; whether it is inside torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    code, waits, ours = "", False, False
    while frame and not ours:
        name = frame.f_code.co_filename
        waits = waits or f"torch{os.sep}distributed{os.sep}" in name or f"deepspeed{os.sep}comm{os.sep}" in name
        ours = name.startswith(_PACKAGE) or not any(part in name for part in _LIBRARIES)
        if ours or not code:
            code = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return code, waits
