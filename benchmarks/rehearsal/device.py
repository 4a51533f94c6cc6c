"""The rehearsal GPU as a Python program sees it: what was launched, where the host waited, what a capture forbade.

`attach` is called by `import torch` in every process that run.py starts. After that this module only records where each
wait happened.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Counts:
    """The device's counts in this process since its start."""

    kernel_launches: int
    """Kernels given to the device one by one, or captured; a product or a convolution of a library counts as one."""
    graph_launches: int
    host_waits: int
    """Calls in which the host waits for the device."""
    refusals: int
    """Calls that the capture of a CUDA graph forbids."""
    allocated: int
    """Bytes of the device's memory in use, by PyTorch's allocator and others."""
    peak_allocated: int

    def __sub__(self, before: Counts) -> Counts:
        """The differences to `before`, of the two numbers of bytes too."""
        return Counts(*(getattr(self, field.name) - getattr(before, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Event:
    """A call that the device took note of.

    kind    "wait", "refused" (forbidden by a capture) or "memory" (there is no more).
    call    the function of CUDA's runtime, and reason what it would have done.
    thread  the Python name of the thread; autograd's are called Dummy.
    where   the innermost lines outside installed packages, the innermost first.
    """

    kind: str
    call: str
    reason: str
    thread: str
    where: tuple[str, ...]

    def __str__(self) -> str:
        place = " < ".join(self.where) or "no Python code of ours"
        return f"[rehearsal] {self.kind}: {self.call} {self.reason}; {self.thread}: {place}"


events: list[Event] = []
"""All notes in order."""

_forbidden = 0  # how many blocks of `no_waits` are open
_kept: list[Any] = []  # objects that C code refers to and that must stay alive


def counts() -> Counts:
    """The device's counts up to now."""
    values = (ctypes.c_longlong * len(fields(Counts)))()
    ctypes.CDLL(LIBRARY).rehearsal_counts(values)
    return Counts(*values)


@contextmanager
def no_waits() -> Iterator[None]:
    """In here a wait of the main thread or of autograd's threads fails with CUDA's "operation not permitted".

    As torch.cuda.set_sync_debug_mode("error"), and more: it knows of waits for events, of copies to memory that isn't
    pinned and of freed memory. Other threads of Python may wait, as a loader's does for its own copies.
    """
    global _forbidden
    _forbidden += 1
    try:
        yield
    finally:
        _forbidden -= 1


def attach() -> None:
    """Let the device report to this module, and give the operations a result whose size the device would decide."""
    import torch

    library = ctypes.CDLL(LIBRARY)
    if not hasattr(library, "rehearsal_observe"):
        raise RuntimeError(f"{LIBRARY} is not the rehearsal GPU's; start the program with benchmarks/rehearsal/run.py")
    observer = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p)(_observe)
    library.rehearsal_observe(observer)
    overrides = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an operation of PyTorch's is replaced
        overrides.impl("nonzero", _nonzero, "CUDA")
    _kept.extend([observer, overrides])


def _observe(kind: bytes, call: bytes, reason: bytes) -> int:
    thread = threading.current_thread()
    event = Event(kind.decode(), call.decode(), reason.decode(), thread.name, _where())
    events.append(event)
    if os.environ.get("REHEARSAL_LOG"):
        print(event, file=sys.stderr, flush=True)
    in_the_way = thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
    return event.kind == "wait" and bool(_forbidden) and in_the_way


def _where(depth: int = 4) -> tuple[str, ...]:
    """File, line and function of the innermost frames that are neither this module's nor an installed package's."""
    found = []
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file != Path(__file__) and not {"site-packages", "dist-packages"} & set(file.parts) and file.is_absolute():
            found.append(f"{'/'.join(file.parts[-3:])}:{frame.lineno} {frame.name}")
    return tuple(found[:depth])


def _nonzero(x: Any) -> Any:
    """Return no elements: a real kernel would have counted them, but here that count is whatever lies in memory."""
    import torch

    return torch.empty((0, x.dim()), dtype=torch.int64, device=x.device)
