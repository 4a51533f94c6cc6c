"""What ranks tell each other while they work: signs of life, and why one has ended.

Goes through the TCPStore at MASTER_ADDR:MASTER_PORT, which torchrun's agent hosts, or rank 0, over a connection and in
a thread of its own: collectives that hang don't hold it up.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from fastdiff.runtime.processes import agent_hosts_store

_PREFIX = "fastdiff"
_PATIENCE = timedelta(seconds=20)


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life."""

    rank: int
    host: str
    machine: str
    """Where the pid means something: see `this_machine`."""
    pid: int
    beat: int
    """Counts signs."""
    place: str
    """What the rank says it is doing: "step 17"."""
    code: str
    """Where its main thread is: "reader.py:88"."""
    idle: float
    """Seconds since it last made progress."""
    allowed: float
    """Seconds that it may take for what it is doing."""
    collectives: int
    """How many it has entered."""
    waits: bool
    """Its main thread is inside torch.distributed."""
    done: bool
    """It has nothing more to do, and may go away."""

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class End:
    """That a rank has ended, or has found another one lost."""

    rank: int
    """Who tells."""
    pid: int
    code: int
    """Its exit code."""
    reason: str
    line: str
    """The sentence that other ranks print."""
    about: Literal["itself", "lost", "late"]
    """Whose end it is: the teller's own, or that of the teller who found another rank lost, or late."""


@dataclass
class Seen:
    """The newest sign of a rank, and when (time.monotonic) the exchange began that brought it."""

    sign: Sign
    at: float


def this_machine() -> str:
    """Name of the space of pids that this process is in: the boot and, of containers, which one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:  # no Linux
        return socket.gethostname()


def gone(pid: int) -> bool:
    """Whether a process of this machine has ended, as far as the system tells (Linux)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return Path("/proc/self/stat").exists()
    except OSError:
        return False
    return state in "ZX"


def _may_hold_an_earlier_start() -> bool:
    """Whether the store is torchrun's, which keeps what ranks said before they were started anew."""
    return agent_hosts_store() and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"


def listens(port: int) -> bool:
    """Whether some process of this machine listens at a TCP port (Linux; elsewhere False)."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        if any(row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port for row in rows):
            return True
    return False


class Exchange:
    """Tells this rank's signs, and keeps the others'.

    tell gives this rank's sign; interval is the seconds between two.
    """

    def __init__(self, rank: int, world_size: int, tell: Callable[[int], Sign], interval: float) -> None:
        self.rank, self.world_size, self.tell, self.interval = rank, world_size, tell, interval
        self.address = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
        self.peers: dict[int, Seen] = {}
        self.ends: list[tuple[float, End]] = []  # when each came, in the order in which ranks ended
        self.at: float | None = None
        """When the last complete exchange began; None before the first."""
        self.dead: set[int] = set()
        """Ranks on this machine whose processes are gone."""
        self.broken: float | None = None
        """Since when the store refuses; None while it doesn't."""
        self._outbox: queue.Queue[tuple[End, threading.Event]] = queue.Queue()
        self._wake = threading.Event()
        self._open = True
        self._machine = this_machine()
        self._beat = self._read = 0
        self._stale: dict[int, tuple[int, int]] = {}  # (pid, beat) of an earlier start's ranks, by rank
        self._first = True
        self._old_ends: list[End] = []  # that were there at the first look: perhaps an earlier start's
        threading.Thread(target=self._run, name="signs of life", daemon=True).start()

    def send(self, end: End, patience: float) -> bool:
        """Tell an end; whether that was done within `patience` seconds."""
        sent, until = threading.Event(), time.monotonic() + patience
        self._outbox.put((end, sent))
        while not sent.is_set() and self.broken is None and time.monotonic() < until:
            self._wake.set()
            sent.wait(0.1)
        return sent.is_set()

    def others_ends(self) -> list[tuple[float, End]]:
        """When other ranks' ends came, and what they are, the first one first."""
        return [(at, end) for at, end in list(self.ends) if end.rank != self.rank]

    def exchange_now(self) -> None:
        """Don't wait for the interval."""
        self._wake.set()

    def close(self) -> None:
        self._open = False
        self._wake.set()

    def _run(self) -> None:
        store: dist.TCPStore | None = None
        while self._open:
            try:
                self._check_host()
                store = store or self._connect()
                if store:
                    start = time.monotonic()
                    self._exchange(store, start)
                    self.at, self.broken = start, None
            except (RuntimeError, OSError):  # torch's errors of connections and stores are RuntimeErrors
                store = None
                self.dead = self._gone()
                self.broken = self.broken or time.monotonic()
            self._wake.wait(self.interval)
            self._wake.clear()

    def _connect(self) -> dist.TCPStore | None:
        """A client of the store; None where there is none yet."""
        if not (self.at or self._is_up()):
            return None
        return dist.TCPStore(*self.address, is_master=False, wait_for_workers=False, timeout=_PATIENCE)

    def _is_up(self) -> bool:
        """Whether the store is there, by other means than a connection: a server that loses one looks up its name."""
        if agent_hosts_store() or dist.is_initialized():
            return True
        if self.rank == 0:  # on its way into the group, where it waits for ranks that may have failed before
            return listens(self.address[1])
        if self._outbox.empty():
            return False
        try:
            socket.create_connection(self.address, timeout=2).close()
        except OSError:
            return False
        return True

    def _check_host(self) -> None:
        """ConnectionError when the store went with rank 0: a TCPStore would print a C++ trace before it says so."""
        host = self.peers.get(0)
        if host and not agent_hosts_store() and host.sign.machine == self._machine and gone(host.sign.pid):
            raise ConnectionError("the store is gone")

    def _gone(self) -> set[int]:
        return {rank for rank, seen in self.peers.items() if seen.sign.machine == self._machine and gone(seen.sign.pid)}

    def _exchange(self, store: dist.TCPStore, now: float) -> None:
        dead = self._gone()
        self._beat += 1
        store.set(f"{_PREFIX}/sign/{self.rank}", json.dumps(asdict(self.tell(self._beat))))
        while not self._outbox.empty():
            end, sent = self._outbox.get()
            number = store.add(f"{_PREFIX}/ends", 1)
            store.set(f"{_PREFIX}/end/{number}", json.dumps(asdict(end)))
            sent.set()
        self._read_ends(store)
        known = [rank for rank in range(self.world_size) if rank != self.rank]
        known = [r for r in known if r in self.peers or r in self._stale or store.check([f"{_PREFIX}/sign/{r}"])]
        for value in store.multi_get([f"{_PREFIX}/sign/{r}" for r in known]):
            self._note(Sign(**json.loads(value)), now)
        for end in list(self._old_ends):
            if end.rank in self.peers and self.peers[end.rank].sign.pid == end.pid:
                self._old_ends.remove(end)
                self.ends.append((now, end))
        self._first = False
        self.dead = dead  # only now: one that told its end before it went has been heard

    def _note(self, sign: Sign, now: float) -> None:
        seen = self.peers.get(sign.rank)
        if seen is None:
            # torchrun's store may still hold what ranks of an earlier start said: only a sign that changes counts.
            if self._first and _may_hold_an_earlier_start():
                self._stale[sign.rank] = (sign.pid, sign.beat)
            if self._stale.get(sign.rank) != (sign.pid, sign.beat):
                self.peers[sign.rank] = Seen(sign, now)
        elif (sign.pid, sign.beat) != (seen.sign.pid, seen.sign.beat):
            self.peers[sign.rank] = Seen(sign, now)

    def _read_ends(self, store: dist.TCPStore) -> None:
        count = store.add(f"{_PREFIX}/ends", 0)
        while self._read < count and store.check([key := f"{_PREFIX}/end/{self._read + 1}"]):
            self._read += 1
            end = End(**json.loads(store.get(key)))
            if self._first and _may_hold_an_earlier_start():
                self._old_ends.append(end)
            else:
                self.ends.append((time.monotonic(), end))


_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = (sysconfig.get_paths()["stdlib"], f"{os.sep}site-packages{os.sep}", "<")


def behind(signs: list[Sign]) -> list[Sign]:
    """Those of the ranks that have not come to the collective in which the others wait; none where it can't be told.

    First by how many collectives each has entered: who waits has entered one more. Then by who isn't inside
    torch.distributed; also where the counts would name ranks that all wait and leave out one that doesn't, for gloo
    counts what one rank gathers from another too.
    """
    fewest = min(sign.collectives for sign in signs)
    late = [sign for sign in signs if sign.collectives == fewest]
    if len(late) == len(signs) or (all(sign.waits for sign in late) and not all(sign.waits for sign in signs)):
        late = [sign for sign in signs if not sign.waits]
    return late if len(late) < len(signs) else []


def collectives() -> int:
    """How many collectives this process has entered, over all process groups."""
    if not dist.is_initialized():
        return 0
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        except (RuntimeError, AttributeError):  # a group that doesn't count
            continue
    return count


def where(thread: int | None) -> tuple[str, bool]:
    """Where a thread is, "file.py:line" outside of libraries, and whether it is inside torch.distributed."""
    frame = sys._current_frames().get(thread or 0)
    code, waits, ours = "", False, False
    while frame and not ours:
        name = frame.f_code.co_filename
        waits = waits or f"torch{os.sep}distributed{os.sep}" in name or f"deepspeed{os.sep}comm{os.sep}" in name
        ours = name.startswith(_PACKAGE) or not any(part in name for part in _LIBRARIES)
        if ours or not code:
            code = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return code, waits
