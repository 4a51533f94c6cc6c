"""Running a script: exit codes and error messages, signals that ask it to stop, and output that may be closed."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol, TextIO

import torch.distributed as dist

from fastdiff import errors
from fastdiff.errors import INTERRUPTED, StopWith, UserError, first_line
from fastdiff.runtime.machine import number_from_environment
from fastdiff.runtime.processes import has_joined

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 1.0
"""Seconds within which signals count as one, because Slurm and torchrun may both deliver the same one."""
_SAME_ERROR = 2.0
"""Seconds in which rank 0 reports the same error as this rank, or the launcher notices and ends this rank."""
_script = ""
_peers: Peers | None = None


class _Lossy:
    """A text stream that drops what can't be written because the reader has gone or the disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # permanent: redirect the descriptor, so that Python's own flush at exit succeeds
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """In this context writing to sys.stdout and sys.stderr never raises.

    Text that can't be written is dropped. File names that are not valid Unicode are written with escapes.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    try:
        for name, stream in streams.items():
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Lossy(stream))
        yield
    finally:
        for name, stream in streams.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


class Peers(Protocol):
    """The methods of `fastdiff.runtime.watchdog.Watchdog` that a script calls when it ends."""

    def report_end(self, reason: str, code: int) -> None:
        """Tell the other ranks why this one ends."""

    def is_said(self, reason: str, code: int, patience: float) -> bool:
        """Whether rank 0 reports the same end within `patience` seconds."""

    def explain(self) -> str | None:
        """One sentence on the rank whose end made a collective fail; None where it is unknown. Takes seconds."""

    def speaks(self) -> bool:
        """Whether this rank prints that sentence for its machine."""


def script_name() -> str:
    """Name of the script that `run_script` runs; empty where the package is used as a library."""
    return _script


def set_peers(peers: Peers | None) -> None:
    """Set the watchdog of the other ranks."""
    global _peers
    _peers = peers


def run_script(main: Callable[[], None], name: str) -> None:
    """Run a script's main function and end the process with an exit code of `fastdiff.errors`.

    For a UserError or StopWith one sentence is printed. Where the end of another rank made a collective fail, the last
    line names that rank and its reason instead of a traceback. Closed output streams don't change the exit code.
    """
    global _script
    _script = name
    with tolerate_closed_output():
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        code = _code_of(main)
        if dist.is_initialized() and not code:
            dist.destroy_process_group()
    if code:
        # Other ranks may be waiting in a collective, and Python's clean-up would wait for them.
        os._exit(code) if has_joined() or _peers else sys.exit(code)


def _code_of(main: Callable[[], None]) -> int:
    """Run `main`, print why it ended and tell the other ranks; returns the exit code."""
    try:
        main()
    except UserError as error:
        _say_once(str(error), errors.USER_ERROR, "error")
        return errors.USER_ERROR
    except StopWith as error:
        _say_once(str(error), error.code)
        return error.code
    except KeyboardInterrupt:
        if _peers:
            _peers.report_end("stopped by Ctrl-C", errors.INTERRUPTED)
        print(f"{_script}: stopped", file=sys.stderr, flush=True)
        return errors.INTERRUPTED
    except Exception as error:
        if _peers is None:
            raise
        return _failed(error, _peers)
    return errors.DONE


def _say_once(reason: str, code: int, what: str = "") -> None:
    """Tell the other ranks why this one ends, and print it unless rank 0 prints the same."""
    try:
        rank = number_from_environment("RANK", 0)
    except UserError:  # the reason says that it is no number
        rank = 0
    if _peers:
        _peers.report_end(reason, code)
    if rank:
        what = f"{what or 'ended'} on rank {rank}"
        if code == errors.USER_ERROR:  # a SIGTERM of the launcher then means that rank 0 has ended, by the same error
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _peers and _peers.is_said(reason, code, _SAME_ERROR):
            return
        if not _peers and not has_joined():
            time.sleep(_SAME_ERROR)
    start = f"{_script}: {what}: " if what else f"{_script}: "
    print(start + reason, file=sys.stderr, flush=True)


def _failed(error: Exception, peers: Peers) -> int:
    """Print whether an exception is this rank's own or due to another rank's end; returns the exit code."""
    if not is_broken_collective(error):
        traceback.print_exception(error)
        peers.report_end(first_line(error), 1)
        return 1
    line = peers.explain()
    if line is None:
        traceback.print_exception(error)
        line = f"a collective failed, and no rank is known to have ended: {first_line(error)}"
        peers.report_end(line, errors.PEER_LOST)
    if peers.speaks():
        print(f"{_script}: {line}", file=sys.stderr, flush=True)
    return errors.PEER_LOST


def is_broken_collective(error: BaseException) -> bool:
    """Whether an exception comes from a collective whose other side failed: messages of gloo and NCCL say so."""
    words = ("gloo", "nccl", "processgroup", "connection closed by peer", "connection reset by peer")
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


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
