"""What ranks tell each other while they work: signs of life, and why one has ended.

Goes through the TCPStore at MASTER_ADDR:MASTER_PORT, which torchrun's agent hosts, or rank 0, over a connection and in
a thread of its own: collectives that hang don't hold it up.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_PREFIX = "fastdiff"


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
    code: int
    """Its exit code."""
    reason: str
    line: str
    """The sentence that other ranks print."""
    verdict: bool
    """It is about another rank than the one who tells."""


@dataclass
class Seen:
    """The newest sign of a rank, and when (time.monotonic) it came."""

    sign: Sign
    at: float


def this_machine() -> str:
    """Name of the space of pids that this process is in: the boot and, of containers, which one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:  # no Linux
        return socket.gethostname()


def agent_hosts_store() -> bool:
    """Whether the store is torchrun's, and outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def gone(pid: int) -> bool:
    """Whether a process of this machine has ended, as far as the system tells (Linux)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return Path("/proc/self/stat").exists()
    except OSError:
        return False
    return state in "ZX"


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
        """When the last complete exchange was; None before the first."""
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
        threading.Thread(target=self._run, name="signs of life", daemon=True).start()

    def send(self, end: End, patience: float) -> bool:
        """Tell an end; whether that was done within `patience` seconds."""
        sent = threading.Event()
        self._outbox.put((end, sent))
        self._wake.set()
        return sent.wait(patience)

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
                store = store or self._connect()
                if store:
                    self._exchange(store)
                    self.at, self.broken = time.monotonic(), None
            except (RuntimeError, OSError):  # torch's errors of connections and stores are RuntimeErrors
                store = None
                self.broken = self.broken or time.monotonic()
            self._wake.wait(self.interval)
            self._wake.clear()

    def _connect(self) -> dist.TCPStore | None:
        """A client of the store; None while nobody answers there yet."""
        try:  # a TCPStore would try on for its whole time-out, and say so on stderr
            socket.create_connection(self.address, timeout=2).close()
        except OSError:
            if self.at is not None:
                raise
            return None
        patience = timedelta(seconds=20)
        return dist.TCPStore(*self.address, is_master=False, wait_for_workers=False, timeout=patience)

    def _exchange(self, store: dist.TCPStore) -> None:
        dead = {rank for rank, seen in self.peers.items() if self.here(seen.sign) and gone(seen.sign.pid)}
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
        now = time.monotonic()
        for value in store.multi_get([f"{_PREFIX}/sign/{r}" for r in known]):
            self._note(Sign(**json.loads(value)), now)
        self._first = False
        self.dead = dead  # only now: one that told its end before it went has been heard

    def _note(self, sign: Sign, now: float) -> None:
        seen = self.peers.get(sign.rank)
        if seen is None:
            # torchrun's store may still hold what ranks of an earlier start said: only a sign that changes counts.
            if self._first and agent_hosts_store():
                self._stale[sign.rank] = (sign.pid, sign.beat)
            if self._stale.get(sign.rank) != (sign.pid, sign.beat):
                self.peers[sign.rank] = Seen(sign, now)
        elif (sign.pid, sign.beat) != (seen.sign.pid, seen.sign.beat):
            self.peers[sign.rank] = Seen(sign, now)

    def _read_ends(self, store: dist.TCPStore) -> None:
        count = store.add(f"{_PREFIX}/ends", 0)
        if self._first and agent_hosts_store():
            self._read = count
        while self._read < count and store.check([key := f"{_PREFIX}/end/{self._read + 1}"]):
            self._read += 1
            self.ends.append((time.monotonic(), End(**json.loads(store.get(key)))))

    def here(self, sign: Sign) -> bool:
        """Whether a rank runs on this machine."""
        return sign.machine == self._machine
