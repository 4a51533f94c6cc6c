"""The identity of a process, for files and heartbeats that name their writer. Imports no PyTorch."""

from __future__ import annotations

import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it belongs to another user
    return 0
