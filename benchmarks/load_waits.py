"""Finds where machine code waits for global loads, and how long: `kernel_cost.py` predicts a program's time from it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.machine_code import RETURNING, Code, Instruction


@dataclass(frozen=True)
class Wait:
    """An instruction at which a warp waits for global loads that it issued before."""

    at: int  # its index in the code
    executions: float  # by a warp of an average program
    bytes: int  # that it waits for, of 32 lanes
    in_flight: int  # bytes issued and not waited for, these included
    since: tuple[range, ...]  # instructions between the issue of the last of these loads and the wait


@dataclass(frozen=True)
class _Load:
    at: int  # of the last instruction that belongs to it
    bytes: int
    registers: frozenset[int]  # empty for a group of copies to shared memory


def waits(code: Code, times: list[float]) -> list[Wait]:
    """The waits for global loads, in the order of the code; `times` is the result of `executions`.

    A warp waits at the first instruction that names a register of a load, which then has all loads issued before it,
    and for asynchronous copies at DEPBAR.LE SB0, n, which leaves n groups of them under way. A load whose register the
    same loop loads again is one of the pass before: it overlaps with the rest of the loop.
    """
    found: list[Wait] = []
    pending: list[_Load] = []
    copied = 0
    for at, instruction in enumerate(code.instructions):
        if not times[at]:
            continue
        groups = [load for load in pending if not load.registers]
        if instruction.name == "DEPBAR" and (left := re.search(r"SB0, 0x(\w+)", instruction.operands)):
            done = groups[: len(groups) - int(left[1], 16)]
        else:
            named = _registers(instruction.operands)
            hit = max((i for i, load in enumerate(pending) if load.registers & named), default=-1)
            done = [load for load in pending[: hit + 1] if load.registers]
        if done:
            since = _since(code, done[-1], at, len(groups) - len(done))
            often = times[at] if len(since) > 1 else min(times[at], times[done[-1].at])
            flying = sum(load.bytes for load in pending)
            found.append(Wait(at, often, sum(load.bytes for load in done), flying, since))
            pending = [load for load in pending if load not in done]
        if instruction.name in RETURNING:
            first = _destination(instruction)
            registers = frozenset(range(first, first + max(1, instruction.bytes // 4)))
            pending.append(_Load(at, 32 * instruction.bytes, registers))
        elif instruction.name == "LDGSTS":
            copied += 32 * instruction.bytes
        elif instruction.name == "LDGDEPBAR":
            pending.append(_Load(at, copied, frozenset()))
            copied = 0
    return found


def _destination(load: Instruction) -> int:
    """The first register that a load fills; -1 where it fills none."""
    found = re.search(r"\bR(\d+)", load.operands.split("[")[0])
    return int(found[1]) if found else -1


def _registers(operands: str) -> set[int]:
    pairs = {int(number) + 1 for number in re.findall(r"\bR(\d+)\.64", operands)}
    return pairs | {int(number) for number in re.findall(r"\bR(\d+)", operands)}


def _since(code: Code, load: _Load, at: int, left: int) -> tuple[range, ...]:
    """The instructions between a load and the wait for it: where a loop around the wait issues the load again, the rest
    of that loop's pass, more passes where `left` groups of copies stay under way, and the pass up to the wait.
    """
    block = code.block_of[at]
    for loop in reversed(code.loops):
        if block in loop.blocks and code.block_of[load.at] not in loop.blocks:
            places = [i for i, each in enumerate(code.block_of) if each in loop.blocks]
            if load.registers:
                same = [
                    i
                    for i in places
                    if code.instructions[i].name in RETURNING and _destination(code.instructions[i]) in load.registers
                ]
            else:
                same = [i for i in places if code.instructions[i].name == "LDGDEPBAR"]
            if same:
                first, end = places[0], places[-1] + 1
                passes = 0 if load.registers else left // len(same)
                return range(same[-1] + 1, end), *[range(first, end)] * passes, range(first, at)
    return (range(load.at + 1, at),)


def stalls(found: list[Wait], latency: float, alone: float) -> float:
    """Cycles that a warp of an average program waits for loads, where it needs `alone` for each other instruction."""
    cycles: dict[int, float] = {}
    for _ in range(3):  # stalls of a loop's pass shorten those of the next one
        for wait in found:
            passed = alone * sum(map(len, wait.since))
            passed += sum(cycles.get(other.at, 0.0) for other in found for part in wait.since if other.at in part)
            cycles[wait.at] = max(0.0, latency - passed)
    return sum(wait.executions * cycles[wait.at] for wait in found)
