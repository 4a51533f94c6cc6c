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

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # not on Windows
CTRL_C = "Ctrl-C"
"""What messages and `StopSignals.requested` call SIGINT."""
SAME = 1.0
"""Seconds within which signals count as one, because Slurm and torchrun may both deliver the same one."""
FORWARDED = 3.0
"""Seconds within which SIGINTs count as one in a rank that a launcher started, because the launcher sends its own after
the terminal's."""
_ABORT = 2.0
"""Seconds that a process which a second signal ends may take to record that."""
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
    Ctrl-C raises KeyboardInterrupt in `main` once; a second one, later than `SAME`, ends the process at once.
    """
    global _script
    _script = name
    with tolerate_closed_output(), StopSignals(()) as signals:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        code = _code_of(main)
        signals.finish()
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
        _say_once("stopped by Ctrl-C; the same command starts again", errors.INTERRUPTED)
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
        if not _peers and code == INTERRUPTED:  # the terminal sends Ctrl-C to every rank
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
    """A context in which signals that ask to stop are recorded instead of ending the process.

        with StopSignals() as signals:
            prepare()
            signals.defer_ctrl_c()
            for step in steps:
                if signals.requested:
                    save()
                    signals.finish()

    recorded  The signals besides SIGINT (Ctrl-C), which is treated in any context.

    Ctrl-C raises KeyboardInterrupt, once, until `defer_ctrl_c` is called; from then on it is recorded, too, and a line
    says so. It stays ignored where the process was started with SIGINT ignored, as a shell's background job.

    A second signal, more than a second after the first, ends the process at once with a line on stderr and exit code
    130, even while the main thread is inside a collective, where Python runs no handlers. The signals that launchers
    send after a Ctrl-C don't count as a second one. Opened in another thread than the main one, where Python allows no
    handlers, the context does nothing.
    """

    def __init__(self, recorded: tuple[signal.Signals, ...] = SIGNALS) -> None:
        self.on_abort: Callable[[str], None] | None = None
        """Called with the reason, in another thread, before a second signal ends the process."""
        self._recorded = recorded
        self._requested: str | None = None
        self._first_at: float | None = None
        self._entered = self._deferred = self._raised = self._finished = False
        self._old: dict[signal.Signals, Any] = {}
        self._old_wakeup = -1

    @property
    def requested(self) -> str | None:
        """Name of the first signal received, `CTRL_C` for SIGINT; None before."""
        return self._requested

    def defer_ctrl_c(self) -> None:
        """Record Ctrl-C from here on instead of raising KeyboardInterrupt."""
        self._deferred = True

    def finish(self) -> None:
        """Ignore signals from here on, because everything is saved.

        Launchers send SIGTERM to the other ranks when one has ended.
        """
        self._finished = True

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._entered = True
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
            self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            numbers = self._recorded if ignored else (*self._recorded, signal.SIGINT)
            self._old = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._entered:
            return
        # A script that has saved, or is about to print why it failed, goes on ignoring signals, since launchers send
        # SIGTERM as soon as one rank is gone. Where the package is a library the old handlers come back.
        ignored = script_name() and (self._finished or kind)
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.send(b"\0")

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Record a signal. This runs in the main thread, possibly late, so `_listen` counts the signals."""
        if self._finished:
            return
        self._requested = self._requested or _name(number)
        if number == signal.SIGINT and not self._deferred and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Count signals as they arrive: Python's C handler writes each one's number to the socket at once."""
        with self._reader, self._writer:
            while number := self._reader.recv(1)[0]:
                ends_alike = number == signal.SIGINT and self._requested == CTRL_C  # the exit code is 130 in any case
                if number in self._old and (ends_alike or not self._finished):
                    self._count(_name(number))

    def _count(self, name: str) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self._requested = self._requested or name
            if name == CTRL_C and self._deferred and os.environ.get("RANK", "0") == "0":
                _print(
                    f"{CTRL_C}: the step is finished and everything is saved; a second {CTRL_C} ends the run at once, "
                    "without the steps since the last checkpoint"
                )
        elif now - self._first_at > SAME and not self._is_forwarded(name, now - self._first_at):
            reason = f"ended at once by a second {name if name == self._requested else f'signal, {name}'}"
            if self.on_abort:
                record = threading.Thread(target=self.on_abort, args=(reason,), daemon=True)
                record.start()
                record.join(_ABORT)
            _print(reason)
            os._exit(INTERRUPTED)

    def _is_forwarded(self, name: str, seconds: float) -> bool:
        """Whether a signal, so many seconds after Ctrl-C, is the launcher's: torchrun's SIGINT, deepspeed's SIGTERM."""
        if self._requested != CTRL_C or "RANK" not in os.environ:
            return False
        return name == signal.SIGTERM.name or (name == CTRL_C and seconds < FORWARDED)


def _name(number: int) -> str:
    return CTRL_C if number == signal.SIGINT else signal.Signals(number).name


def _print(line: str) -> None:
    print(f"{script_name() or 'fastdiff'}: {line}", file=sys.stderr, flush=True)
