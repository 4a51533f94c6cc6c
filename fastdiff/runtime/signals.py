"""Handle SIGTERM and SIGUSR1, with which batch systems and launchers ask a process to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from fastdiff.errors import INTERRUPTED
from fastdiff.runtime.script import script_name

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 1.0
"""Seconds within which signals count as one, because Slurm and torchrun may both deliver the same one."""


class StopSignals:
    """A context in which SIGTERM and SIGUSR1 are recorded instead of ending the process.

        with StopSignals() as signals:
            for step in steps:
                if signals.requested:
                    save()
                    signals.finish()

    A second signal, more than a second after the first, ends the process at once with a line on stderr and exit code
    130, even while the main thread is inside a collective, where Python runs no handlers. Opened in another thread
    than the main one, where Python allows no handlers, the context does nothing.
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._first_at: float | None = None
        self._finished = False
        self._old: dict[signal.Signals, Any] = {}
        self._old_wakeup = -1

    @property
    def requested(self) -> str | None:
        """Name of the first signal received; None before."""
        return self._requested

    def finish(self) -> None:
        """Ignore signals from here on, because everything is saved.

        Launchers send SIGTERM to the other ranks when one has ended.
        """
        self._finished = True

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
            self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._old:
            return
        # A script that has saved, or is about to print why it failed, goes on ignoring signals, since launchers send
        # SIGTERM as soon as one rank is gone. Where the package is a library the old handlers come back.
        ignored = script_name() and (self._finished or kind)
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        self._old = {}
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.send(b"\0")

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Record a signal. This runs in the main thread, possibly late, so `_listen` counts the signals."""
        if not self._finished:
            self._requested = self._requested or signal.Signals(number).name

    def _listen(self) -> None:
        """Count signals as they arrive: Python's C handler writes each one's number to the socket at once."""
        with self._reader, self._writer:
            while number := self._reader.recv(1)[0]:
                if number in SIGNALS and not self._finished:
                    self._count(signal.Signals(number).name)

    def _count(self, name: str) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self._requested = self._requested or name
        elif now - self._first_at > SAME:
            print(f"{script_name() or 'fastdiff'}: ended at once by a second {name}", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
