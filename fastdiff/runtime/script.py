"""Run a script: its exit code, its error message, and output streams that may be closed."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

import torch.distributed as dist

from fastdiff import errors
from fastdiff.errors import StopWith, UserError
from fastdiff.runtime.processes import has_joined


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


_script = ""
_peers: Peers | None = None
_SAME_ERROR = 2.0
"""Seconds in which rank 0 reports the same error as this rank, or the launcher notices and ends this rank."""


class Peers(Protocol):
    """The methods of `fastdiff.runtime.watchdog.Watchdog` that a script calls when it ends."""

    def report_end(self, reason: str, code: int) -> None:
        """Tell the other ranks why this one ends."""

    def is_said(self, reason: str, code: int, patience: float) -> bool:
        """Whether rank 0 reports the same end within `patience` seconds."""

    def explain(self) -> str | None:
        """One sentence on the rank whose end made a collective fail; None where none is known. Takes seconds."""

    def speaks(self) -> bool:
        """Whether this rank is the one on its machine that prints it."""


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
    rank = int(os.environ.get("RANK", "0"))
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
        peers.report_end(_first_line(error), 1)
        return 1
    line = peers.explain()
    if line is None:
        traceback.print_exception(error)
        line = f"a collective failed, and no rank is known to have ended: {_first_line(error)}"
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
