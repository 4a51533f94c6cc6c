"""Compile recorded launches for GPUs that are not here, and read what became of them: registers, spills, widths.

Needs Triton's own NVIDIA tools (ptxas, cuobjdump, nvdisasm), which its wheel brings, and no GPU. Must run without
TRITON_INTERPRET, which replaces kernels when they are defined.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastdiff.kernels.launch import OPTIONS, Launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have, by compute capability."""
MATMUL = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The tensor-core instruction that a bf16 dot should become, by compute capability."""

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of one launch for one GPU."""

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
    others: dict[str, int]  # asynchronous and tensor-map copies

    def wide_loads(self) -> bool:
        """Whether bulk loads take 128 bits at once; asynchronous copies and tensor maps count."""
        return 128 in self.loads or any(name in ("LDGSTS.128", "UTMALDG") for name in self.others)

    def wide_stores(self) -> bool:
        """Whether bulk stores put 128 bits at once."""
        return 128 in self.stores or "UTMASTG" in self.others

    def widest(self) -> bool:
        """Both."""
        return self.wide_loads() and self.wide_stores()


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """(signature, constants, attributes) of a launch, as Triton's own dispatch would derive them."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | launch.constexprs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, parameter) in enumerate(zip(names, launch.kernel.params, strict=True)):
        value = values[name]
        if name in launch.constexprs or value is None or value is True or value is False:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def variant(launch: Launch) -> str:
    """A short name of what tells this compilation of a kernel from its others."""
    signature, constants, attributes = specialise(launch)
    dtypes = ",".join(dict.fromkeys(t[1:] for t in signature.values() if t.startswith("*")))
    numbers = " ".join(f"{name}={value}" for name, value in constants.items() if value not in (None, False))
    free = [parameter.do_not_specialize for parameter in launch.kernel.params]
    odd = [n for i, (n, t) in enumerate(signature.items()) if t[0] in "*i" and (i,) not in attributes and not free[i]]
    absent = [name.removesuffix("_ptr") for name, value in constants.items() if value is None]
    notes = [f" {what}:{','.join(names)}" for what, names in (("odd", odd), ("without", absent)) if names]
    return f"{dtypes} {numbers}{''.join(notes)}"


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """Launches that compile to different code, each once."""
    found = {}
    for launch in launches:
        found[launch.kernel.__name__, variant(launch), launch.num_warps, launch.num_stages] = launch
    return list(found.values())


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability arch / 10 (80, 90, 100) and read the machine code."""
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Compiled(
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
        others={
            **{f"LDGSTS.{bits}": n for bits, n in _widths(code, "LDGSTS").items()},
            **_count(code, r"\b(UTMALDG|UTMASTG)\b"),
        },
    )


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
