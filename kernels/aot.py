"""Compile recorded launches for GPUs that are not in this machine, and read registers, spills and access widths.

Triton's own dispatch compiles, with a driver that only reports a GPU's capability. So the cache keys are those of a run
on such a GPU, which finds the compiled code in Triton's cache.

This needs no GPU, but Triton's NVIDIA tools (ptxas, cuobjdump, nvdisasm), which its wheel contains. It must run without
TRITON_INTERPRET, which replaces kernels when they are defined.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastdiff.kernels.launch import Launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have, by compute capability."""
MATMUL = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The tensor-core instruction that a bf16 dot should become, by compute capability."""


@dataclass(frozen=True)
class Compiled:
    """The machine code of one launch for one GPU in numbers."""

    kernel: str
    variant: str
    arch: int
    registers: int
    spills: int  # local loads and stores in the machine code
    shared: int  # bytes
    warps: int
    loads: dict[int, int]  # bits of a global load → how often, in the machine code
    stores: dict[int, int]
    matmuls: dict[str, int]  # tensor-core instruction → how often
    others: dict[str, int]  # asynchronous copies to shared memory, by width → how often

    def wide_loads(self) -> bool:
        """Whether bulk loads, asynchronous copies included, take 128 bits at once."""
        return 128 in self.loads or "LDGSTS.128" in self.others

    def wide_stores(self) -> bool:
        """Whether bulk stores put 128 bits at once."""
        return 128 in self.stores


class _NamedGPU:
    """A Triton driver that only reports a GPU of compute capability arch / 10.

    Triton keeps a table of compiled kernels for each device number; the capability serves as that number.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for compute capability arch / 10 (80, 90, 100); it is in Triton's cache afterwards."""
    driver.set_active(_NamedGPU(arch))
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options())


def specialisation(launch: Launch) -> list[tuple[str, Any]]:
    """Each parameter's type and specialisation: "D" if divisible by 16, or a constant's value."""
    driver.set_active(_NamedGPU(90))  # the result is the same for all GPUs
    *_, bind = launch.kernel.device_caches[90]
    values, found, _ = bind(*launch.args, **launch.options())
    return [
        (kind, value if kind == "constexpr" else special)
        for value, (kind, special) in zip(values.values(), found, strict=False)
    ]


def variant(launch: Launch) -> str:
    """A short name that distinguishes the compilations of a kernel."""
    parameters = list(zip(launch.kernel.params, specialisation(launch), strict=True))
    dtypes = ",".join(dict.fromkeys(kind[1:] for _, (kind, _) in parameters if kind.startswith("*")))
    constants = {parameter.name: value for parameter, (kind, value) in parameters if kind == "constexpr"}
    numbers = " ".join(f"{name}={value}" for name, value in constants.items() if value not in (None, False))
    odd = [
        parameter.name
        for parameter, (kind, special) in parameters
        if kind[0] in "*i" and special != "D" and not parameter.do_not_specialize
    ]
    absent = [name.removesuffix("_ptr") for name, value in constants.items() if value is None]
    notes = [f" {what}:{','.join(names)}" for what, names in (("odd", odd), ("without", absent)) if names]
    return f"{dtypes} {numbers}{''.join(notes)}"


def code_key(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that compile to the same code."""
    kernel = launch.kernel
    return (kernel.module, kernel.__name__, repr(specialisation(launch)), launch.num_warps, launch.num_stages)


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """Launches that compile to different code, each once."""
    found: dict[tuple[Any, ...], Launch] = {}
    for launch in launches:
        found.setdefault(code_key(launch), launch)
    return list(found.values())


# --- launches as text ---


def to_json(launch: Launch) -> str:
    """Everything that determines a launch's compilation, on one line: equal for launches that compile to the same code.

    `from_json` makes a launch of it again.
    """
    fn = launch.kernel.fn
    params = getattr(launch.kernel, "params", [])  # the interpreter's kernels have none
    free = {param.num for param in params if param.do_not_specialize}
    return json.dumps(
        {
            "module": fn.__module__,
            "kernel": fn.__name__,
            "args": [_kind_of(arg, i in free) for i, arg in enumerate(launch.args)],
            "constexprs": {name: _described(value) for name, value in launch.constexprs.items()},
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }
    )


def from_json(text: str) -> Launch:
    """The launch that `to_json` described, on tensors without memory."""
    made = json.loads(text)
    return Launch(
        getattr(importlib.import_module(made["module"]), made["kernel"]),
        (1,),
        tuple(_undescribed(arg) for arg in made["args"]),
        {name: _undescribed(value) for name, value in made["constexprs"].items()},
        made["num_warps"],
        made["num_stages"],
    )


def _kind_of(value: Any, free: bool) -> Any:
    """An argument; a number is replaced by one for which Triton compiles the same code.

    It looks at an integer's width and, unless the parameter is free, at 1 and at multiples of 16.
    """
    if isinstance(value, float):
        return 0.5
    if not isinstance(value, int) or isinstance(value, bool):
        return _described(value)
    if not free and value == 1:
        return 1
    return (17 if free or value % 16 else 16) + (0 if -(2**31) <= value < 2**31 else 2**40)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "address": value.data_ptr() % 16}
    if isinstance(value, triton.language.dtype):
        return {"type": value.name}
    return value


def _undescribed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "type" in value:
        return triton.language.dtype(value["type"])
    made = torch.empty(16, dtype=getattr(torch, value["tensor"]), device="meta")
    return made[value["address"] // made.itemsize :]


# --- machine code ---


def inspect_launch(launch: Launch, arch: int) -> tuple[Compiled, str]:
    """Compile for compute capability arch / 10 and read the machine code, which is the second result.

    Each instruction follows the lines of the source that it comes from, as nvdisasm's -gi prints them.
    """
    built = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        code = _tool("nvdisasm", "-c", "-gi", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    made = Compiled(
        kernel=launch.kernel.__name__.lstrip("_"),
        variant=variant(launch),
        arch=arch,
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=built.metadata.shared,
        warps=launch.num_warps,
        loads=_widths(code, "LDG"),
        stores=_widths(code, "STG"),
        matmuls=_count(code, r"\b(HMMA|HGMMA|UTCHMMA|QGMMA|DMMA)\b"),
        others={f"LDGSTS.{bits}": n for bits, n in _widths(code, "LDGSTS").items()},
    )
    return made, code


def _tool(name: str, *args: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, args)], capture_output=True, text=True, check=True).stdout


def _widths(code: str, instruction: str) -> dict[int, int]:
    """Bits per access → count, from suffixes such as LDG.E.128 (none: 32 bits)."""
    widths: dict[int, int] = {}
    for suffix in re.findall(rf"\b{instruction}\b((?:\.\w+)*)", code):
        parts = suffix.split(".")
        bits = next((int(p) for p in parts if p in ("64", "128", "256")), 0)
        bits = bits or next((int(p[1:]) for p in parts if p in ("U8", "S8", "U16", "S16")), 32)
        widths[bits] = widths.get(bits, 0) + 1
    return dict(sorted(widths.items()))


def _count(code: str, pattern: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in re.findall(pattern, code):
        counts[name] = counts.get(name, 0) + 1
    return counts


# --- compiling for a run that is about to begin ---


def missing(lines: Iterable[str], arch: int) -> list[str]:
    """The launches, each a line of `to_json`, that `compile_all` has not put into Triton's cache yet."""
    with contextlib.suppress(OSError):
        done = set(_list_of_done().read_text(errors="replace").split())
        return [line for line in lines if _digest(line, arch) not in done]
    return list(lines)


def compile_all(lines: Iterable[str], arch: int, parent: int) -> None:
    """Compile launches into Triton's cache as long as this process's parent lives.

    A launch that fails to compile is left to the run.
    """
    for line in lines:
        if os.getppid() != parent:
            return
        with contextlib.suppress(Exception):
            built = compile_launch(from_json(line), arch)
            with contextlib.suppress(Exception):
                _build_launcher(built)
            with _list_of_done().open("a") as done:
                done.write(f"{_digest(line, arch)}\n")


def _build_launcher(built: Any) -> None:
    """Compile into the cache the C code that older versions of Triton need for each signature, if there is a driver."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(built.src, built.metadata)


def _list_of_done() -> Path:
    return Path(triton.knobs.cache.dir) / "fastdiff"


def _digest(line: str, arch: int) -> str:
    return hashlib.sha256(f"{triton.__version__} {arch} {_sources()} {line}".encode()).hexdigest()[:16]


@functools.cache
def _sources() -> str:
    """A digest of all kernels' code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":  # python -m fastdiff.kernels.aot ARCH PARENT, with launches as standard input
    os.nice(10)
    compile_all(sys.stdin.read().splitlines(), *map(int, sys.argv[1:]))
