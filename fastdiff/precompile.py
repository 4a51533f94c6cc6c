"""Triton kernels of a run, compiled before the run needs them.

What a training or sampling step would launch is found on tensors without memory, and compiled for a GPU that need not
be here. Triton's cache keys are those of the run (see `kernels/aot.py`).
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
"""Most processes: a published network has 60 to 120 kernels, of half a second to a few seconds each."""
LEAST_EACH = 4
"""Fewest kernels that are worth starting a process for."""


@dataclass
class Call:
    """Calls of one operation with arguments of the same shapes."""

    op: str
    """As torch.ops has it: "aten::convolution", "fastdiff::group_norm_silu"."""
    args: tuple[Any, ...]
    """Its tensors share memory with those of the computation, and have none on the meta device."""
    count: int = 0

    def function(self) -> Any:
        namespace, name = self.op.split("::")
        return getattr(getattr(torch.ops, namespace), name)

    def results(self) -> Any:
        """What it returns, computed anew."""
        return self.function()(*self.args)


class Recorder(TorchDispatchMode):
    """Counts the calls of operations whose names match a regular expression from their beginning on."""

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
    """What fastdiff's ops would launch for `work`, a function of tensors on the meta device."""
    with warnings.catch_warnings(), ops.using("triton", anywhere=True):
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        with launch.record() as direct, Recorder("fastdiff::") as seen:  # the optimiser launches without an op
            work()
        with launch.record() as recorded:
            for call in seen.calls.values():
                launch.IMPLEMENTATIONS[call.op.removeprefix("fastdiff::")](*call.args)
    return recorded + direct


def start(launches: Callable[[], list[Launch]], device: torch.device) -> list[str]:
    """Compile launches in a few processes of their own, which nothing waits for; returns lines that say so.

    Nothing happens, and nothing is said, where there is no GPU, no kernel is used, or another rank of this machine does
    it. Whatever goes wrong is left to the run, which compiles what it doesn't find in Triton's cache. The processes end
    with this one.
    """
    if device.type != "cuda" or not ops.uses_kernels(torch.empty(0, device=device)) or current().local_rank:
        return []
    try:
        from fastdiff.kernels import aot

        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
        lines = list(dict.fromkeys(map(aot.to_json, launches())))
        left = aot.missing(lines, arch)[::-1]  # the run itself begins at the front
        count = min(MOST, free_cores(), -(-len(left) // LEAST_EACH))
        for i in range(count):
            _spawn(arch, left[i::count])
    except Exception as error:  # of any kind: the run goes on without
        return [f"Triton kernels: not compiled beforehand ({type(error).__name__}: {error})"]
    if not left:
        return [f"Triton kernels: all {len(lines)} in the cache"]
    return [f"Triton kernels: compiling {len(left)} of {len(lines)} beforehand, processes: {count}"]


def _spawn(arch: int, lines: list[str]) -> subprocess.Popen[bytes]:
    """A process that compiles launches, each a line of `kernels.aot.to_json`."""
    root = str(Path(fastdiff.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as given:  # a pipe would make this process wait until the other one reads
        given.write("\n".join(lines).encode())
        given.seek(0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.kernels.aot", str(arch), str(os.getpid())],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a signal to the run's group is not for it
        )
    atexit.register(worker.kill)
    threading.Thread(target=worker.wait, daemon=True).start()  # an ended process that nobody waits for stays a zombie
    return worker
