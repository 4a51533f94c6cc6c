"""Compilation of a run's Triton kernels before the run needs them.

The launches of a training or sampling step are recorded on tensors without memory and compiled for a GPU that need not
be in this machine. Triton's cache keys are those of the run (see `kernels/aot.py`).
"""

from __future__ import annotations

import atexit
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastdiff
from fastdiff import ops
from fastdiff.kernels import launch
from fastdiff.kernels.launch import Launch as Launch
from fastdiff.runtime.machine import free_cores
from fastdiff.runtime.processes import current

META = torch.device("meta")
MOST = 8
"""Largest number of compiling processes. A published network has 60 to 120 kernels, half a second or more each."""
LEAST_EACH = 4
"""Number of kernels for which one more process is started."""


@dataclass
class Call:
    """Calls of one operation with arguments of the same shapes."""

    op: str
    """Its name in torch.ops: "aten::convolution", "fastdiff::group_norm_silu"."""
    args: tuple[Any, ...]
    """The first call's arguments, detached; its tensors share memory with those of the computation."""
    count: int = 0

    def function(self) -> Any:
        namespace, name = self.op.split("::")
        return getattr(getattr(torch.ops, namespace), name)

    def results(self) -> Any:
        """The operation's results, computed again."""
        return self.function()(*self.args)


class Recorder(TorchDispatchMode):
    """Counts the calls of operations whose names begin with a match of a regular expression."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names = re.compile(names)
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if self.names.match(name):
            key = f"{name} {signature(args)}"
            if key not in self.calls:
                self.calls[key] = Call(name, tree_map_only(Tensor, Tensor.detach, args))
            self.calls[key].count += 1
        return func(*args, **(kwargs or {}))


def signature(value: Any) -> str:
    """A string of every tensor's dtype, shape, strides and offset, and the repr of everything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.storage_offset()}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(signature, value)) + ")"
    return repr(value)


def launches_of(work: Callable[[], Any]) -> list[Launch]:
    """All launches of fastdiff's ops in `work`, a function of tensors on the meta device; equal ones come together."""
    with warnings.catch_warnings(), ops.using("triton", anywhere=True):
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        with launch.record() as direct, Recorder("fastdiff::") as seen:  # the optimiser launches without an op
            work()
        found: list[Launch] = []
        for call in seen.calls.values():
            with launch.record() as recorded:
                launch.IMPLEMENTATIONS[call.op.removeprefix("fastdiff::")](*call.args)
            found += recorded * call.count
    return found + direct


def start(launches: Callable[[], list[Launch]], device: torch.device) -> list[str]:
    """Compile launches in a few background processes; returns lines for the log.

    Does nothing, and returns no lines, without a GPU, without kernels, and on all ranks of a machine but the first.
    Errors are harmless: the run compiles every kernel that is not in Triton's cache. The processes end with this one.
    """
    if device.type != "cuda" or not ops.uses_kernels(torch.empty(0, device=device)) or current().local_rank:
        return []
    try:
        from fastdiff.kernels import aot

        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
        lines = list(dict.fromkeys(map(aot.to_json, launches())))
        left = aot.missing(lines, arch)[::-1]  # the run itself compiles from the front
        count = min(MOST, free_cores(), -(-len(left) // LEAST_EACH))
        for i in range(count):
            spawn(arch, left[i::count])
    except Exception as error:  # the run compiles them itself
        return [f"Triton kernels: not compiled beforehand ({type(error).__name__}: {error})"]
    if not left:
        return [f"Triton kernels: all {len(lines)} in the cache"]
    return [f"Triton kernels: compiling {len(left)} of {len(lines)} beforehand, processes: {count}"]


def spawn(arch: int, lines: list[str]) -> subprocess.Popen[bytes]:
    """Start a process that compiles launches, each a line of `kernels.aot.to_json`."""
    root = str(Path(fastdiff.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as given:  # writing to a pipe would wait for its reader
        given.write("\n".join(lines).encode())
        given.seek(0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.kernels.aot", str(arch), str(os.getpid())],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # With PYTHONSAFEPATH, since Python 3.11, modules in the current folder are not taken for Python's own.
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PYTHONSAFEPATH": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,  # signals to the run's process group must not reach it
        )
    atexit.register(worker.kill)
    threading.Thread(target=worker.wait, daemon=True).start()  # otherwise it stays a zombie after its end
    return worker
