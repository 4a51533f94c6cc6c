"""Compiles kernels whose loops are known for compute capability 9.0, and prints what their machine code executes.

    python tests/helpers/counted_kernels.py

It needs a Triton that compiles (see `tritons.run`). The result is a JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
import triton.language as tl
from fastdiff.kernels import aot, attention  # noqa: F401  (attention registers its ops)
from fastdiff.kernels.launch import IMPLEMENTATIONS, Launch, Work, record

from benchmarks import kernel_cost
from benchmarks.machine_code import RETURNING, Code, executions, started_early
from benchmarks.python_source import Unknown

PROGRAMS, PARTS, PER, LAG = 264, 4096, 32, 528
ROWS, WIDTH = 128, 64


@triton.jit
def _copy_chunk(x_ptr, y_ptr, start, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    for i in range(0, LENGTH, BLOCK):
        o = start + i + tl.arange(0, BLOCK)
        tl.store(y_ptr + o, tl.load(x_ptr + o) + 1.0)


@triton.jit
def _copy(x_ptr, y_ptr, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Every program copies `count` chunks, by a loop within a loop."""
    for i in range(0, count):
        start = (tl.program_id(0) * count + i) * CHUNK
        _copy_chunk(x_ptr, y_ptr, start, LENGTH=CHUNK, BLOCK=BLOCK)


@triton.jit
def _sum_short(x_ptr, y_ptr, count):
    """A loop so short that the assembler unrolls it."""
    b_sum = tl.zeros([128], tl.float32)
    for i in range(0, count):
        b_sum += tl.load(x_ptr + i * 128 + tl.arange(0, 128))
    tl.store(y_ptr + tl.arange(0, 128), b_sum)


@triton.jit
def _sum_groups(x_ptr, y_ptr, groups, count):
    """The same within another loop."""
    b_sum = tl.zeros([128], tl.float32)
    for i_group in range(0, groups, 8):
        for i in range(0, count):
            b_sum += tl.load(x_ptr + (i_group * count + i) * 128 + tl.arange(0, 128))
    tl.store(y_ptr + tl.arange(0, 128), b_sum)


@triton.jit
def _by_data(x_ptr, n_ptr, BLOCK: tl.constexpr):
    length = tl.load(n_ptr)
    for i in range(0, length, BLOCK):
        tl.store(x_ptr + i + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def _load_rows(x_ptr, i_row, WIDTH: tl.constexpr):
    """Two functions call this one."""
    o = (i_row + tl.arange(0, 16))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return o, tl.load(x_ptr + o).to(tl.float32)


@triton.jit
def _sum_part(x_ptr, sums_ptr, i_part, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    b_sum = tl.zeros([16, WIDTH], tl.float32)
    for i in range(0, ROWS, 16):
        _, b_x = _load_rows(x_ptr, i_part * ROWS + i, WIDTH)
        b_sum += b_x
    tl.store(sums_ptr + i_part * WIDTH + tl.arange(0, WIDTH), tl.sum(b_sum, axis=0))


@triton.jit
def _merge_slab(sums_ptr, total_ptr, i_slab, per, WIDTH: tl.constexpr):
    b_sum = tl.zeros([WIDTH], tl.float32)
    for i in range(0, per):
        b_sum += tl.load(sums_ptr + (i_slab * per + i) * WIDTH + tl.arange(0, WIDTH), cache_modifier=".cg")
    tl.store(total_ptr + i_slab * WIDTH + tl.arange(0, WIDTH), b_sum)


@triton.jit
def _await(done_ptr, i_slab):
    while tl.atomic_add(done_ptr + i_slab, 0, sem="acquire") == 0:
        pass


@triton.jit
def _apply_part(x_ptr, y_ptr, total_ptr, i_part, i_slab, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    b_total = tl.load(total_ptr + i_slab * WIDTH + tl.arange(0, WIDTH), cache_modifier=".cg")
    for i in range(0, ROWS, 16):
        o, b_x = _load_rows(x_ptr, i_part * ROWS + i, WIDTH)
        b_x -= b_total[None, :]
        tl.store(y_ptr + o, (b_x * tl.sigmoid(b_x)).to(y_ptr.dtype.element_ty))


@triton.jit
def _tickets(
    x_ptr, y_ptr, sums_ptr, total_ptr, ticket_ptr, arrived_ptr, done_ptr, parts, per, lag,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums the parts of a slab, and normalises each part `lag` tickets later."""
    ticket = tl.atomic_add(ticket_ptr, 1)
    while ticket < parts + lag:
        if ticket < parts:
            _sum_part(x_ptr, sums_ptr, ticket, ROWS, WIDTH)
            if tl.atomic_add(arrived_ptr + ticket // per, 1, sem="acq_rel") == per - 1:
                _merge_slab(sums_ptr, total_ptr, ticket // per, per, WIDTH)
                tl.atomic_xchg(done_ptr + ticket // per, 1, sem="release")
        late = ticket - lag
        if late >= 0:
            _await(done_ptr, late // per)
            _apply_part(x_ptr, y_ptr, total_ptr, late, late // per, ROWS, WIDTH)
        ticket = tl.atomic_add(ticket_ptr, 1)


def _work(launch: Launch) -> Work:
    given = launch.named()
    programs, parts, slabs = launch.grid[0], given["parts"], given["parts"] // given["per"]
    elements = parts * given["ROWS"] * given["WIDTH"]
    return Work(
        executions={"_sum_part": parts, "_merge_slab": slabs, "_await": parts, "_apply_part": parts},
        turns={"_tickets": (parts + given["lag"] + programs) / programs},
        elements=elements,
        dram_bytes=4 * elements,
        l2_bytes=6 * elements,
    )


WORK = {"_tickets": _work}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


LAUNCHES = {
    "copy": Launch(_copy, (10,), (meta(10 * 7 * 8192), meta(10 * 7 * 8192), 7), {"CHUNK": 8192, "BLOCK": 1024}, 4, 3),
    "sum_short": Launch(_sum_short, (1,), (meta(1000 * 128), meta(128), 1000), {}, 4, 3),
    "sum_groups": Launch(_sum_groups, (1,), (meta(8 * 1000 * 128), meta(128), 8, 1000), {}, 4, 3),
    "tickets": Launch(
        _tickets,
        (PROGRAMS,),
        (
            *(meta(PARTS, ROWS, WIDTH, dtype=torch.bfloat16) for _ in range(2)),
            *(meta(PARTS, WIDTH), meta(PARTS // PER, WIDTH)),
            *(meta(PARTS // PER, dtype=torch.int32) for _ in range(3)),
            *(PARTS, PER, LAG),
        ),
        {"ROWS": ROWS, "WIDTH": WIDTH},
        4,
        3,
    ),
}


def moved(launch: Launch, code: Code) -> dict[str, float]:
    """Bytes that all lanes of the launch load and store, by the function that the kernel calls."""
    work = kernel_cost.work_of(launch)
    warps = math.prod(launch.grid) * launch.num_warps
    found: dict[str, float] = {}
    rows = zip(code.instructions, executions(code, launch, work), started_early(code), strict=True)
    for instruction, often, early in rows:
        if not early and instruction.name in (*RETURNING, "LDGSTS", "STG"):
            kind = "stored" if instruction.name == "STG" else "loaded"
            names = code.functions(instruction)
            name = f"{names[-2] if len(names) > 1 else names[-1]} {kind}"
            found[name] = found.get(name, 0.0) + warps * 32 * often * instruction.bytes
    return found


def tensor_flops() -> dict[str, float]:
    """FLOPs on tensor cores in attention over 1024 positions with heads of 64 channels, over B * N * L^2 * D."""
    qkv = meta(2, 1024, 3 * 4 * 64, dtype=torch.bfloat16)
    with record() as launches:
        out, lse = IMPLEMENTATIONS["attention"](qkv, 4)
        IMPLEMENTATIONS["attention_backward"](out, qkv, out, lse, 4)
    found = {}
    for launch in launches:
        made, text = aot.inspect_launch(launch, 90)
        counts = kernel_cost.counts_of(Code(text, launch.kernel.fn), launch, made.registers, made.shared)
        cycles = counts.programs * counts.warps * counts.pipes.get("tensor cores", 0.0)
        name = f"{launch.kernel.__name__} {launch.constexprs.get('KEYS', '')}".strip()
        found[name] = cycles * kernel_cost.TENSOR["HGMMA"] / (2 * 4 * 1024**2 * 64)
    return found


def main() -> None:
    result: dict[str, object] = {}
    for name, launch in LAUNCHES.items():
        made, text = aot.inspect_launch(launch, 90)
        code = Code(text, launch.kernel.fn)
        counts = kernel_cost.counts_of(code, launch, made.registers, made.shared)
        result[name] = {"moved": moved(launch, code), "cost": vars(kernel_cost.predict(counts))}
    result["tensor flops"] = tensor_flops()
    by_data = Launch(_by_data, (1,), (meta(4096), meta(1, dtype=torch.int32)), {"BLOCK": 128}, 4, 3)
    code = Code(aot.inspect_launch(by_data, 90)[1], by_data.kernel.fn)
    try:
        executions(code, by_data, Work())
    except Unknown as error:
        result["unknown"] = str(error)
    few, many = (sum(executions(code, by_data, Work(values={"length": n}))) for n in (128 * 16, 128 * 32))
    result["by data"] = [few, many]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
