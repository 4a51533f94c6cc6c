"""Finds the Python source of machine code: the function and the loop of a line, its callers, the passes of a loop.

A chain of places is a line, then the line of the call that inlined its function, and so on up to the kernel.
"""

from __future__ import annotations

import ast
import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton.language
from fastdiff.kernels.launch import Launch, Work


class Unknown(Exception):
    """The passes of a loop can't be told from the launch."""


Place = tuple[str, int]
"""File and line."""


@functools.cache
def in_this_checkout(file: str, kernel_file: str) -> str:
    """The file of that name beside the kernel's, or in Triton's language, if there is one.

    Triton's cache may hold equal code that was compiled in another folder, which is gone by now.
    """
    folders = (Path(kernel_file).parent, Path(str(triton.language.__file__)).parent)
    return next((str(folder / Path(file).name) for folder in folders if (folder / Path(file).name).is_file()), file)


@functools.cache
def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


@functools.cache
def _functions(file: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse("\n".join(_lines(file)))) if isinstance(node, ast.FunctionDef)]


@functools.cache
def function_at(place: Place) -> ast.FunctionDef | None:
    """The innermost function that contains a line."""
    file, line = place
    around = [node for node in _functions(file) if node.lineno <= line <= (node.end_lineno or 0)]
    return max(around, key=lambda node: node.lineno, default=None)


@functools.cache
def calls_of(file: str, kernel: str) -> dict[str, tuple[Place, ...]]:
    """The lines that call each function which a kernel calls, directly or not, by the function's name."""
    functions = {node.name: (file, node) for node in _functions(file)}
    names = {alias.asname or alias.name: node for node in _imports(file) for alias in node.names}
    found: dict[str, tuple[Place, ...]] = {}
    todo = [kernel]
    while todo:
        known = functions.get(todo.pop())
        for node in ast.walk(known[1]) if known else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert known is not None
                name = node.func.id
                if name not in found:
                    todo.append(name)
                    if name in names:
                        other = str(getattr(sys.modules.get(names[name].module or ""), "__file__", ""))
                        functions.update(
                            {each.name: (other, each) for each in _functions(other) if each.name not in functions}
                        )
                found[name] = tuple(dict.fromkeys((*found.get(name, ()), (known[0], node.lineno))))
    return found


def _imports(file: str) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse("\n".join(_lines(file)))) if isinstance(node, ast.ImportFrom)]


@functools.cache
def settled(places: tuple[Place, ...], kernel: str, words: int) -> tuple[Place, ...]:
    """The places with corrected lines.

    Newer versions of LLVM count a line of the source for each line in a piece of assembly. That of a load sets each of
    its words to zero before it loads, so that the load's line may be one of the next function's.

    kernel  the function of the last place; empty with older versions, which tell only the first place
    words   that a load fills; 0 for other instructions
    """
    found: list[Place] = []
    for file, line in reversed(places):
        allowed = set(_called(found[-1])) if found else {kernel} - {""}
        function = function_at((file, line))
        if allowed and (function is None or function.name not in allowed):
            ends = [node.end_lineno or 0 for node in _functions(file) if node.name in allowed]
            line = max((end for end in ends if end < line), default=line)
        found.append((file, line))
    if words and found and (function := function_at(found[-1])):
        file, line = found[-1]
        above = [line - words if kernel else line, *range(line, line - 8, -1)]
        loads = [each for each in above if each > function.lineno and "load(" in _lines(file)[each - 1]]
        found[-1] = (file, loads[0] if loads else line)
    return tuple(reversed(found))


@functools.cache
def _called(place: Place) -> dict[str, ast.Call]:
    """The calls in a line by the names of their functions."""
    function, line = function_at(place), place[1]
    nodes = ast.walk(function) if function else ()
    calls = [n for n in nodes if isinstance(n, ast.Call) and n.lineno <= line <= (n.end_lineno or 0)]
    return {n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", ""): n for n in calls}


@functools.cache
def chains(places: tuple[Place, ...], file: str, kernel: str) -> tuple[tuple[Place, ...], ...]:
    """All chains that begin with `places` and end in the kernel; none if no call is known that leads there."""
    function = function_at(places[-1]) if places else None
    if function is None:
        return ()
    if function.name == kernel:
        return (places,)
    sites = calls_of(file, kernel).get(function.name, ())
    return tuple(chain for site in sites if site not in places for chain in chains((*places, site), file, kernel))


def likeliest(found: tuple[tuple[Place, ...], ...], other: tuple[Place, ...]) -> tuple[Place, ...]:
    """The chain that shares the most calls with `other`, from the kernel down.

    Among those that share equally many it is the one whose next call is on the nearest line.
    """

    def likeness(chain: tuple[Place, ...]) -> tuple[int, float]:
        pairs = list(zip(reversed(chain), reversed(other), strict=False))
        shared = next((i for i, (one, two) in enumerate(pairs) if one != two), len(pairs))
        if shared == len(pairs):
            return shared, 0
        (file, line), (other_file, other_line) = pairs[shared]
        return shared, -abs(line - other_line) if file == other_file else -math.inf

    return max(found, key=likeness)


@functools.cache
def python_loop(places: tuple[Place, ...]) -> tuple[tuple[Place, ...], ast.For | ast.While] | None:
    """The innermost Python loop around an instruction, and the places from its first line on; None if there is none."""
    for i, (file, line) in enumerate(places):
        function = function_at((file, line))
        nodes = ast.walk(function) if function else ()
        around = [n for n in nodes if isinstance(n, ast.For | ast.While) and n.lineno <= line <= (n.end_lineno or 0)]
        if around:
            node = max(around, key=lambda node: node.lineno)
            return ((file, node.lineno), *places[i + 1 :]), node
    return None


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


_LANGUAGE = {"cdiv": _cdiv, "minimum": min, "maximum": max, "min": min, "max": max, "program_id": lambda axis: 0}
"""Functions of Triton's language that ranges use, on numbers; the passes are those of the first program."""


class Frame(dict[str, Any]):
    """The variables of a function that was inlined at `places`, each computed when it is asked for."""

    def __init__(self, places: tuple[Place, ...], launch: Launch, work: Work) -> None:
        language = SimpleNamespace(**_LANGUAGE, num_programs=lambda axis: launch.grid[axis])
        super().__init__(tl=language, min=min, max=max)
        self.places, self.launch, self.work = places, launch, work
        function = function_at(places[0])
        assert function is not None
        self.function = function

    def passes(self, node: ast.For) -> tuple[int, int]:
        """Passes of a `for` over a range, and the range's step."""
        try:
            assert isinstance(node.iter, ast.Call)
            bounds = range(*(int(self.value(each)) for each in node.iter.args))
            return len(bounds), bounds.step
        except Exception as error:  # of any kind: the expression may be anything
            what = f"{self.function.name}, line {node.lineno}: {ast.unparse(node.iter)}"
            raise Unknown(f"{what}: {type(error).__name__} {error}; Work.values may give the variables") from None

    def value(self, node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "", "eval"), {}, self)  # the kernels' own expressions

    def __missing__(self, name: str) -> Any:
        found = self._find(name)
        return getattr(found, "value", found)  # of a tl.constexpr

    def _find(self, name: str) -> Any:
        if name in self.work.values:
            return self.work.values[name]
        if len(self.places) == 1:
            given = self.launch.named()
            if name in given:
                return given[name]
        elif (argument := self._argument(name)) is not None:
            return Frame(self.places[1:], self.launch, self.work).value(argument)
        nodes = [node for node in ast.walk(self.function) if isinstance(node, ast.Assign | ast.AnnAssign)]
        assigned = [
            node.value
            for node in nodes
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and target.id == name
        ]
        if len(assigned) == 1 and assigned[0]:
            return self.value(assigned[0])
        module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", "") == self.places[0][0]), None)
        if module is None or not hasattr(module, name):
            raise KeyError(name)
        return getattr(module, name)

    def _argument(self, name: str) -> ast.expr | None:
        """The expression that the caller gives for a parameter, or its default."""
        parameters = [each.arg for each in self.function.args.args]
        if name not in parameters:
            return None
        at = parameters.index(name)
        if call := _called(self.places[1]).get(self.function.name):
            named = {each.arg: each.value for each in call.keywords}
            if name in named:
                return named[name]
            if at < len(call.args):
                return call.args[at]
        defaults = self.function.args.defaults
        return defaults[at - len(parameters)] if at >= len(parameters) - len(defaults) else None
