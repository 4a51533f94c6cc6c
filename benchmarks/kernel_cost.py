"""Predicts how long a launch takes on an H100 or H200 from its machine code, and writes the predictions as a table.

    python benchmarks/aot.py --archs 90 --training --cost benchmarks/results/aot_cost_sm90.json
    python benchmarks/kernel_cost.py benchmarks/results/aot_cost_sm90.json --step 'cifar10_uncond 256 bf16'

The first command compiles and predicts; the second prints its file as Markdown. `predict` states the model. No time in
it was measured on a kernel of ours.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.kernels.launch import Launch, Work
from torch import Tensor

from benchmarks.load_waits import Wait, stalls, waits
from benchmarks.machine_code import RETURNING, Code, Instruction, executions, started_early
from fastdiff.errors import UserError
from fastdiff.runtime.files import read_json
from fastdiff.runtime.machine import GPUS
from fastdiff.runtime.script import run_script

ARCH = 90
"""The compute capability, times ten, whose limits this file has."""
PROCESSORS, CLOCK = 132, 1.755e9
WARPS, BLOCKS, REGISTERS = 64, 32, 65536  # of one multiprocessor
SHARED, RESERVED = 228 * 1024, 1024
"""Bytes of shared memory of a multiprocessor, of which each block takes some that no program sees."""
ISSUED = 4 * 0.85
"""Warp instructions that a multiprocessor issues per cycle: its four schedulers find a ready warp 85% of the time."""
ALONE = 2.0
"""Cycles per instruction of a warp that runs alone: latencies of 4 cycles, with two independent instructions each."""
L2_RATE = 5.5e12
DRAM_LATENCY, L2_LATENCY = 800e-9, 300e-9  # under load
RAMP = 1e-6
"""Seconds of a launch in which memory is not busy: the first loads are under way, or the last stores."""

# Lanes per cycle and multiprocessor, where that is less than 128; the first match counts.
PIPES: dict[str, tuple[str, float]] = {
    "special functions": (r"MUFU|POPC|FLO|BREV", 16),
    "float64": (r"DFMA|DADD|DMUL|DSETP|DMNMX|(F2F|F2I|I2F).*64", 64),
    "shuffles": (r"SHFL|REDUX", 32),
    "integer products": (r"U?IMAD(?!\.MOV)", 64),
    "integers": (
        r"U?(IADD3|ISETP|LOP3|SHF|LEA|PRMT|SEL|SGXT|IABS|PLOP3|IMNMX)\b|V?IADD|VIMNMX|FSETP|FMNMX|FSEL"
        r"|F2FP|F2F|F2I|I2F|I2I",
        64,
    ),
}
MEMORY_PIPE = 128  # bytes per cycle and multiprocessor of loads and stores, shared memory's included
TENSOR = {"HGMMA": 4096.0, "HMMA": 0.63 * 4096.0}  # FLOPs per cycle and multiprocessor


@dataclass(frozen=True)
class Counts:
    """What the launch executes and moves, and what a program of it occupies."""

    programs: int
    warps: int  # of a program
    registers: int  # of a thread
    shared: int  # bytes of a program
    instructions: float  # of a warp of an average program, as all that follow
    pipes: dict[str, float]  # cycles of a multiprocessor, by pipe
    accessed: float  # bytes of global loads and stores, all lanes
    waits: list[Wait]
    elements: float  # of the launch, as all that follow
    least_bytes: float
    dram_bytes: float
    l2_bytes: float


@dataclass(frozen=True)
class Cost:
    """The prediction for a launch; the module's table has these columns."""

    instructions: float  # of a thread, per valid element
    registers: int
    resident_warps: int  # on the multiprocessor with the most
    in_flight: float
    """Bytes per multiprocessor: of the global loads that a warp has issued and not waited for when it waits for one, in
    the mean over its waits weighted by the bytes waited for, times the resident warps."""
    least_bytes: float
    dram_bytes: float
    busy_us: float  # the time that it takes however fast memory is, without RAMP
    limit: str  # what busy_us is spent on

    def seconds(self, copy_bytes: float) -> float:
        """The time with a memory that copies so many bytes per second."""
        return RAMP + max(self.dram_bytes / copy_bytes, 1e-6 * self.busy_us)

    def scaled(self, factor: float) -> Cost:
        """The cost of a launch with so many times the work, as if all times grew in proportion."""
        grown = {name: factor * getattr(self, name) for name in ("least_bytes", "dram_bytes", "busy_us")}
        return replace(self, **grown)

    def limit_at(self, copy_bytes: float) -> str:
        """What takes longest, with a memory that copies so many bytes per second."""
        return "memory" if self.dram_bytes / copy_bytes >= 1e-6 * self.busy_us else self.limit

    def share(self, copy_bytes: float) -> float:
        """The least bytes over those that a copy would move in this time."""
        return self.least_bytes / copy_bytes / self.seconds(copy_bytes)


def predict(counts: Counts) -> Cost:
    """The time of a launch is RAMP plus the longest of these:

    memory      DRAM bytes / the rate of a copy (`fastdiff/runtime/machine.py`); applied by `Cost.seconds`
    L2          bytes that the multiprocessors load and store / 5.5 TB/s
    issue       warp instructions / (3.4 per cycle and multiprocessor)
    pipes       special functions 16, float64 64, shuffles 32, products of integers 64, their sums, comparisons and
                conversions 64 lanes, accesses to memory 128 bytes, tensor cores 4096 FLOPs (63% of it by HMMA) per
                cycle and multiprocessor
    program     rounds of programs * (instructions of a warp * 2 cycles, or its warps / 3.4 if that is more, + what the
                waits for global loads take: the latency less the time since the load was issued). That is Little's law,
                bytes loaded / bytes in flight * latency, and the time in which a program, whose warps are taken to be
                in step, issues no new loads.

    All but memory and L2 are those of the multiprocessor with the most programs, ceil(programs / 132), of which it
    runs as many at once as registers, shared memory, 64 warps and 32 blocks allow. The latency is 800 ns for the share
    of the loaded bytes that comes from DRAM, 300 ns for the rest. Left out: bank conflicts, uncoalesced accesses,
    atomics, barriers.

    Sources: CUDA C++ Programming Guide, throughput of arithmetic instructions at compute capability 9.0, and its table
    of limits; NVIDIA's H100 white paper; for HMMA Luo et al. 2024 (https://arxiv.org/abs/2402.13499). Assumptions that
    no measurement of ours supports yet: 85% and 2 cycles, 1 us, both latencies under load, 5.5 TB/s.
    """
    registers = math.ceil(counts.registers / 8) * 8 * 32 * counts.warps
    fitting = min(BLOCKS, WARPS // counts.warps, REGISTERS // registers, SHARED // (counts.shared + RESERVED))
    most = math.ceil(counts.programs / PROCESSORS)
    resident = max(1, min(fitting, most))
    rounds = math.ceil(most / resident)
    warps = most * counts.warps
    asked = counts.programs * counts.warps * counts.accessed
    from_dram = min(1.0, counts.dram_bytes / asked) if asked else 1.0
    latency = from_dram * DRAM_LATENCY + (1 - from_dram) * L2_LATENCY
    each = max(ALONE, counts.warps / ISSUED)
    stalled = stalls(counts.waits, latency * CLOCK, each)
    limits = {
        "L2": counts.l2_bytes / L2_RATE,
        "issue": warps * counts.instructions / ISSUED / CLOCK,
        **{name: warps * cycles / CLOCK for name, cycles in counts.pipes.items()},
        "program": rounds * (stalled + counts.instructions * each) / CLOCK,
    }
    limit = max(limits, key=limits.__getitem__)
    awaited = sum(wait.executions * wait.bytes for wait in counts.waits)
    flying = sum(wait.executions * wait.bytes * wait.in_flight for wait in counts.waits) / awaited if awaited else 0.0
    threads = 32 * counts.programs * counts.warps * counts.instructions
    return Cost(
        instructions=threads / counts.elements,
        registers=counts.registers,
        resident_warps=resident * counts.warps,
        in_flight=flying * resident * counts.warps,
        least_bytes=counts.least_bytes,
        dram_bytes=counts.dram_bytes,
        busy_us=1e6 * limits[limit],
        limit=limit,
    )


def counts_of(code: Code, launch: Launch, registers: int, shared: int) -> Counts:
    """What a launch executes and moves. Raises Unknown where neither the launch nor its kernel's WORK tells it."""
    work = work_of(launch)
    times = executions(code, launch, work)
    weighted = list(zip(code.instructions, times, strict=True))
    pipes: dict[str, float] = defaultdict(float)
    accessed = 0.0
    early = started_early(code)
    for (instruction, often), is_early in zip(weighted, early, strict=True):
        if pipe := pipe_of(instruction):
            pipes[pipe] += often * 32 / PIPES[pipe][1]
        if instruction.name in TENSOR:
            pipes["tensor cores"] += often * flops_of(instruction) / TENSOR[instruction.name]
        pipes["memory pipe"] += often * 32 * instruction.bytes / MEMORY_PIPE
        if instruction.name in (*RETURNING, "STG", "LDGSTS") and not is_early:
            accessed += often * 32 * instruction.bytes
    programs = math.prod(launch.grid)
    tensors = [value for value in launch.args if isinstance(value, Tensor)]
    least = sum(each.nbytes for each in tensors) if work.least_bytes is None else work.least_bytes
    return Counts(
        programs=programs,
        warps=launch.num_warps,
        registers=registers,
        shared=shared,
        instructions=sum(times),
        pipes=dict(pipes),
        accessed=accessed,
        waits=waits(code, times),
        elements=max(each.numel() for each in tensors) if work.elements is None else work.elements,
        least_bytes=least,
        dram_bytes=least if work.dram_bytes is None else work.dram_bytes,
        l2_bytes=programs * launch.num_warps * accessed if work.l2_bytes is None else work.l2_bytes,
    )


def work_of(launch: Launch) -> Work:
    """What the kernel's module says of the launch in its dict WORK."""
    fn = launch.kernel.fn
    known = getattr(sys.modules[fn.__module__], "WORK", {})
    return known[fn.__name__](launch) if fn.__name__ in known else Work()


def pipe_of(instruction: Instruction) -> str | None:
    """The pipe of PIPES that executes an instruction; None for one that takes 128 lanes per cycle."""
    return next((name for name, (pattern, _) in PIPES.items() if re.match(pattern, instruction.opcode)), None)


def flops_of(instruction: Instruction) -> float:
    """FLOPs of a warp's share of a tensor-core instruction, as HGMMA.64x128x16 of four warps or HMMA.16816 of one."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode):
        return 2.0 * math.prod(map(int, found.groups())) / 4
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)\b", instruction.opcode):
        return 2.0 * math.prod(map(int, found.groups()))
    return 0.0


# --- launches, steps and their file ---


class Row(NamedTuple):
    """Launches of a step that run the same code on the same shapes."""

    kernel: str
    shape: str
    count: int
    cost: Cost


def shape_of(launch: Launch) -> str:
    """The shape of the launch's largest tensor, as "128x256x32x32"."""
    tensors = [value for value in launch.args if isinstance(value, Tensor)]
    return "x".join(map(str, max(tensors, key=lambda each: each.nbytes).shape)) or "1"


def work_key(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches of the same code that do the same work."""
    return launch.grid, *((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in launch.args)


def line(shape: str, cost: Cost) -> str:
    """A line of the table below the code of a launch."""
    copy = GPUS["H100"].copy_bytes
    moved = cost.dram_bytes / cost.least_bytes if cost.least_bytes else 1.0
    return (
        f"       {shape:26}{cost.instructions:8.1f}/el{cost.resident_warps:4} warps"
        f"{cost.in_flight / 1024:7.1f} KB in flight"
        f"{moved:6.2f} x least{1e6 * cost.seconds(copy):9.1f} us{cost.share(copy):7.1%} of copy, {cost.limit_at(copy)}"
    )


def step_name(config: str, batch: int, precision: str) -> str:
    """The name of a training step in the file."""
    return f"{config} {batch} {precision}"


_COST = tuple(each.name for each in fields(Cost))


def write(path: Path, triton: str, steps: dict[str, list[Row]]) -> None:
    """Write the costs of the launches of training steps: {"steps": {name: rows}}, one row a line."""
    columns = ["kernel", "shape", "count", *_COST]
    lists = {
        step: [[row.kernel, row.shape, row.count, *map(_rounded, vars(row.cost).values())] for row in rows]
        for step, rows in steps.items()
    }
    head = {"predicted": True, "arch": ARCH, "triton": triton, "columns": columns}
    parts = [
        f"{json.dumps(step)}: [\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"
        for step, rows in lists.items()
    ]
    path.write_text(f'{json.dumps(head)[:-1]}, "steps": {{\n' + ",\n".join(parts) + "\n}}\n")


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(path: Path) -> dict[str, list[Row]]:
    """What `write` wrote. Raises UserError."""
    try:
        rows = read_json(path)["steps"]
        steps = {step: [Row(*row[:3], Cost(*row[3:])) for row in some] for step, some in rows.items()}
        for step, some in steps.items():
            _, batch, _ = step.split()
            if int(batch) < 1 or not some:
                raise ValueError(f"step {step!r} has no batch or no rows")
        return steps
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not what benchmarks/aot.py --cost writes: {type(error).__name__} {error}; write it again"
        ) from None


HEADS = (
    *("kernel", "largest tensor", "launches", "instructions per element", "registers", "warps", "KB in flight"),
    *("moved / least", "us each", "of copy", "limit"),
)


def markdown(steps: dict[str, list[Row]], gpu: str) -> Iterator[str]:
    """Tables in Markdown, one for each step: a line for each kernel and shape, those that take longest first.

    Those that take less than 1% of the time of all are added up in the last line.
    """
    copy = GPUS[gpu].copy_bytes
    for step, rows in steps.items():
        total = lambda some: sum(row.count * row.cost.seconds(copy) for row in some)
        alike: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            alike[row.kernel, row.shape].append(row)
        small = [key for key, some in alike.items() if total(some) < 0.01 * total(rows)]
        others = [row for key in small for row in alike.pop(key)]
        yield from (f"`{step}` on an {gpu}, predicted, {1e3 * total(rows):.2f} ms in all:", "")
        yield f"| {' | '.join(HEADS)} |"
        yield "|---" * len(HEADS) + "|"
        ordered = sorted(alike.items(), key=lambda item: -total(item[1]))
        for (kernel, shape), some in [*ordered, *([(("others", ""), others)] if others else [])]:
            yield f"| {' | '.join(_cells(kernel, shape, some, copy))} |"
        yield ""


def _cells(kernel: str, shape: str, rows: list[Row], copy: float) -> list[str]:
    costs = [row.cost for row in rows]
    count = sum(row.count for row in rows)
    seconds = sum(row.count * row.cost.seconds(copy) for row in rows)
    least, moved = (sum(row.count * getattr(row.cost, n) for row in rows) for n in ("least_bytes", "dram_bytes"))
    span = lambda values: "-".join(dict.fromkeys(f"{edge(values):.0f}" for edge in (min, max)))
    slowest = max(rows, key=lambda row: row.count * row.cost.seconds(copy))
    return [
        *(kernel, shape, str(count)),
        span([cost.instructions for cost in costs]),
        span([cost.registers for cost in costs]),
        span([cost.resident_warps for cost in costs]),
        span([cost.in_flight / 1024 for cost in costs]),
        f"{moved / least:.2f}",
        f"{1e6 * seconds / count:.0f}",
        f"{least / copy / seconds:.2f}",
        slowest.cost.limit_at(copy),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what benchmarks/aot.py --cost wrote")
    parser.add_argument("--step", help="one of its steps: CONFIGURATION BATCH PRECISION (default: all)")
    parser.add_argument("--gpu", default="H100", choices=("H100", "H200"))
    args = parser.parse_args(argv)
    steps = read(args.file)
    if args.step and args.step not in steps:
        raise UserError(f"--step {args.step!r} is not in {args.file}, which has {', '.join(map(repr, steps))}")
    print("\n".join(markdown({args.step: steps[args.step]} if args.step else steps, args.gpu)))


if __name__ == "__main__":
    run_script(main, "kernel_cost.py")
