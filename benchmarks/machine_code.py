"""Reads a kernel's machine code: which instructions a launch executes, and how often.

The text is what nvdisasm prints of a cubin with line numbers and inlining. Blocks that the entry does not reach, such
as the slow paths of divisions, which are called, count as never executed. Straight code is executed once by every warp
of every program, both sides of an `if` included. A loop of the machine code belongs to the Python loop that contains
the line of its backward branch. The passes of a `for` follow from its range, evaluated with the launch's arguments and
constants through the chain of inlined calls; those of a `while`, and whatever depends on data, from the kernel's
`Work` (`kernels/launch.py`). Where the assembler has unrolled a loop, its counter tells how often.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdiff.kernels.launch import Launch, Work

from benchmarks.python_source import (
    Frame,
    Place,
    Unknown,
    chains,
    function_at,
    in_this_checkout,
    likeliest,
    python_loop,
    settled,
)

_LINE = re.compile(r'//## File "(.*?)", line (\d+)')
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"(\.L_x_\d+)")
RETURNING = ("LDG", "LD", "ATOMG", "ATOM")
"""Instructions that read global memory into registers."""
_WIDTH = {"128": 16, "64": 8, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """One instruction and where it comes from: a line, then the call that inlined it, up to the kernel."""

    predicate: str
    opcode: str
    operands: str
    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes that an access to memory moves for each thread; 0 for other instructions."""
        if self.name not in (*RETURNING, "STG", "LDS", "STS", "LDGSTS") or self.predicate == "@!PT":
            return 0
        return next((_WIDTH[part] for part in self.opcode.split(".") if part in _WIDTH), 4)


@dataclass(frozen=True)
class Loop:
    """Blocks of a loop, the first of them its header, and the branch back to that."""

    header: int
    blocks: frozenset[int]
    branch: Instruction

    @property
    def python(self) -> tuple[tuple[Place, ...], ast.For | ast.While] | None:
        """The Python loop, see `python_loop`."""
        return python_loop(self.branch.places)


class Code:
    """The instructions of one kernel in their order, its blocks and its loops.

    text    what nvdisasm -c -gi prints
    kernel  the Python function
    """

    def __init__(self, text: str, kernel: Callable[..., Any]) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        places: list[Place] = []
        told = True  # whether an instruction has followed the last line numbers
        for line in text.splitlines():
            if found := _LINE.search(line):
                file = in_this_checkout(found[1], kernel.__code__.co_filename)
                places = [*([] if told else places), (file, int(found[2]))]
                told = False
            elif found := _LABEL.match(line):
                labels[found[1]] = len(self.instructions)
            elif found := _INSTRUCTION.search(line):
                made = Instruction((found[1] or "").strip(), found[2], found[3], ())
                words = max(1, made.bytes // 4) if made.name in ("LDG", "LDGSTS") else 0
                given = settled(tuple(places), kernel.__name__ if "inlined at" in text else "", words)
                self.instructions.append(replace(made, places=given))
                told = True
        self._split(labels)
        self._complete_places(kernel.__code__.co_filename, kernel.__name__)
        self.loops = self._find_loops()

    def _split(self, labels: dict[str, int]) -> None:
        """Divide the instructions into blocks: `starts`, and the successors of each block."""
        ends = ("BRA", "EXIT", "RET", "BRX", "JMP")
        last = len(self.instructions)
        after = {i + 1 for i, each in enumerate(self.instructions) if each.name in ends}
        self.starts = sorted({0, *labels.values(), *after} - {last})
        self.block_of = [0] * last
        for block, (start, end) in enumerate(zip(self.starts, [*self.starts[1:], last], strict=True)):
            self.block_of[start:end] = [block] * (end - start)
        self.successors: list[list[int]] = [[] for _ in self.starts]
        for block, end in enumerate([*self.starts[1:], last]):
            branch = self.instructions[end - 1]
            always = not branch.predicate and not branch.operands.startswith(("!", "P", "UP"))
            target = _TARGET.search(branch.operands)
            if branch.name == "BRA" and target:
                self.successors[block].append(self.block_of[labels[target[1]]])
            if not (branch.name in ends and always) and end < last:
                self.successors[block].append(block + 1)

    def _complete_places(self, file: str, kernel: str) -> None:
        """Lead each instruction's places up to the kernel; older versions of Triton tell only the first of them.

        Where several chains of calls lead to an instruction, it gets the likeliest beside the nearest instruction in
        its block that has only one.
        """
        found = [chains(each.places, file, kernel) for each in self.instructions]
        before: tuple[Place, ...] = ()
        for start, end in zip(self.starts, [*self.starts[1:], len(found)], strict=True):
            certain = [i for i in range(start, end) if len(found[i]) == 1]
            for i in range(start, end):
                nearest = min(certain, key=lambda other: abs(other - i), default=None)
                near = before if nearest is None else found[nearest][0]
                here = likeliest(found[i], near) if found[i] else ()
                before = here or near
                places = here or (*self.instructions[i].places[:1], *near)
                self.instructions[i] = replace(self.instructions[i], places=places)

    def _find_loops(self) -> list[Loop]:
        """Natural loops: a branch to a block that dominates it, and whatever reaches the branch from there."""
        reached, todo = {0}, [0]
        while todo:
            new = set(self.successors[todo.pop()]) - reached
            reached |= new
            todo += new
        self.reached = reached
        before: dict[int, list[int]] = defaultdict(list)
        for block in reached:
            for after in self.successors[block]:
                before[after].append(block)
        dominators = {block: set(reached) if block else {0} for block in reached}
        changed = True
        while changed:
            changed = False
            for block in sorted(reached - {0}):
                new = {block} | set.intersection(*(dominators[each] for each in before[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        loops: dict[int, Loop] = {}
        for block in sorted(reached):
            for header in set(self.successors[block]) & dominators[block]:
                inside, todo = {header, block}, [block] if block != header else []
                while todo:
                    todo += (new := set(before[todo.pop()]) - inside)
                    inside |= new
                inside |= loops[header].blocks if header in loops else set()
                end = self.starts[block + 1] if block + 1 < len(self.starts) else len(self.instructions)
                loops[header] = Loop(header, frozenset(inside), self.instructions[end - 1])
        return [loops[header] for header in sorted(loops)]

    def functions(self, instruction: Instruction) -> list[str]:
        """The functions that an instruction comes from, the kernel last."""
        return [function.name for function in map(function_at, instruction.places) if function]

    def inside(self, loop: Loop) -> list[Instruction]:
        return [each for each, block in zip(self.instructions, self.block_of, strict=True) if block in loop.blocks]

    def spills(self) -> int:
        """Loads and stores of local memory, without those that a kernel's `while` makes outside its other loops.

        There it takes one part of a map after another, so that they are rare. Those in a loop that belongs to no Python
        loop are counted.
        """
        rare = [loop for loop in self.loops if loop.python and isinstance(loop.python[1], ast.While)]
        frequent = [loop for loop in self.loops if loop not in rare]
        return sum(
            not rare or any(block in loop.blocks for loop in frequent)
            for each, block in zip(self.instructions, self.block_of, strict=True)
            if each.name in ("LDL", "STL")
        )


def executions(code: Code, launch: Launch, work: Work) -> list[float]:
    """How often a warp of an average program executes each instruction. Raises Unknown.

    An instruction of a device function that `work` counts is executed as often as that says, times the passes of the
    loops inside that function, but never more often than the loops around it allow.
    """
    programs = 1
    for size in launch.grid:
        programs *= size
    passes, left = _passes(code, launch, work)
    result = []
    for instruction, block in zip(code.instructions, code.block_of, strict=True):
        if block not in code.reached:
            result.append(0.0)
            continue
        around = [loop for loop in code.loops if block in loop.blocks]
        python = python_loop(instruction.places)
        if python and left.get(python[0]) == 0 and python[0] not in [loop.python and loop.python[0] for loop in around]:
            result.append(0.0)  # a copy of the body for passes that the unrolled loop leaves over, which are none
            continue
        most = 1.0
        for loop in around:
            most *= passes[loop.header][0]
        names = code.functions(instruction)
        counted = [depth for depth, name in enumerate(names) if name in work.executions]
        if counted:
            outer = len(names) - counted[0]  # frames from the kernel down to the innermost counted function
            times = work.executions[names[counted[0]]] / programs
            for loop in around:
                if passes[loop.header][1] >= outer:
                    times *= passes[loop.header][0]
            most = min(most, times)
        result.append(most)
    return result


def started_early(code: Code) -> list[bool]:
    """Whether each instruction stands in the body of a loop but before it in the machine code.

    There the compiler starts the accesses to memory of the first passes. Those of the last passes do nothing, so that
    the loop's passes alone count them all.
    """
    loops: dict[tuple[Place, ...], set[int]] = defaultdict(set)
    for loop in code.loops:
        if found := loop.python:
            loops[found[0]] |= loop.blocks
    result = []
    for instruction, block in zip(code.instructions, code.block_of, strict=True):
        found = python_loop(instruction.places)
        inside = loops.get(found[0], {block}) if found else {block}
        result.append(block not in inside and block < min(inside))
    return result


Passes = tuple[dict[int, tuple[float, int]], dict[tuple[Place, ...], float]]


def _passes(code: Code, launch: Launch, work: Work) -> Passes:
    """By a loop's header: its passes each time it is entered, and the frames from the kernel down to its function.

    The second result has, by the places of Python loops that are unrolled, the passes that are left over.
    """
    result = {}
    left: dict[tuple[Place, ...], float] = {}
    alike: dict[tuple[Place, ...], list[Loop]] = defaultdict(list)
    for loop in code.loops:
        if found := loop.python:
            alike[found[0]].append(loop)
    for loop in code.loops:
        if (found := loop.python) is None:
            where = " in ".join(f"{Path(file).name}:{line}" for file, line in loop.branch.places)
            raise Unknown(f"a loop at {where} is none of Python's")
        places, node = found
        frame = Frame(places, launch, work)
        if isinstance(node, ast.While):
            result[loop.header] = (work.turns.get(frame.function.name, 1.0), len(places))
            continue
        count, step = frame.passes(node)
        copies = _counted(code, loop, step) or _repeated(code, loop, alike[places])
        count = left.get(places, count)
        result[loop.header] = (count // copies, len(places))
        if copies > 1:
            left[places] = count % copies
    return result, left


_UNROLLED = (2, 4, 8, 16)


def _repeated(code: Code, loop: Loop, alike: list[Loop]) -> int:
    """How many passes of the Python loop one of this loop makes, if a smaller loop makes those left."""
    work = [sum(bool(re.match("[FHD][AMF]|LDG|STG", each.name)) for each in code.inside(one)) for one in alike]
    copies, rest = divmod(work[alike.index(loop)], max(1, min(work)))
    return copies if not rest and copies in _UNROLLED else 1


def _counted(code: Code, loop: Loop, step: int) -> int:
    """The same by the loop's counter, which grows by so many steps, or counts the passes left down; 0 if unknown."""
    predicate = loop.branch.predicate.strip("@!")
    inside = [each for each in code.inside(loop) if python_loop(each.places) == loop.python]  # not of a loop within it
    tests = [each.operands for each in inside if each.name in ("ISETP", "UISETP")]
    tested = {name for text in tests if predicate in text.split(", ")[:2] for name in re.findall(r"U?R\d+", text)}
    for each in inside:
        found = re.match(r"(U?R\d+), (?:U?P\d, )?\1(?:\.reuse)?, (-?0x[0-9a-f]+)", each.operands)
        if found and each.name in ("VIADD", "IADD3", "UIADD3") and found[1] in tested:
            added = int(found[2], 16)
            copies = -added if added < 0 and added % step else abs(added // step) if not added % step else 1
            if copies in _UNROLLED:
                return copies
    return 0
