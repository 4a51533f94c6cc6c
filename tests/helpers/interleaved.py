"""Runs the programs of a launch at the same time in Triton's interpreter, which switches between them at atomics."""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl  # noqa: F401  the interpreter replaces the functions of this module where it finds it
from triton.runtime import interpreter

MOST_ATOMICS = 20_000
"""More than any launch of these tests needs if no program waits forever."""


class _Programs:
    """Programs in threads of which one runs at a time; at most `resident` have begun and not ended."""

    def __init__(self, seed: int, resident: int) -> None:
        self.random, self.resident, self.atomics = random.Random(seed), resident, 0
        self.waiting: list[tuple[Any, Any]] = []  # index in the grid, function to call
        self.running: dict[int, threading.Semaphore] = {}
        self.indices: dict[int, Any] = {}
        self.errors: list[BaseException] = []
        self.done = threading.Event()
        self.current = -1

    def run(self) -> None:
        self._begin_more()
        self._pass_on()
        self.done.wait()
        if self.errors:
            raise self.errors[0]

    def _begin_more(self) -> None:
        while self.waiting and len(self.running) < self.resident:
            index, call = self.waiting.pop(0)
            number = len(self.indices)
            self.indices[number], self.running[number] = index, threading.Semaphore(0)
            threading.Thread(target=self._thread, args=(number, call), daemon=True).start()

    def _thread(self, number: int, call: Any) -> None:
        self.running[number].acquire()
        try:
            self._resume(number)
            call()
        except BaseException as error:
            self.errors.append(error)
        del self.running[number]
        self._begin_more()
        self._pass_on()

    def _resume(self, number: int) -> None:
        if self.errors:
            raise self.errors[0]
        self.current = number
        interpreter.interpreter_builder.set_grid_idx(*self.indices[number])

    def _pass_on(self) -> None:
        if self.running:
            self.running[self.random.choice(list(self.running))].release()
        else:
            self.done.set()

    def switch(self) -> None:
        """Let another program run, or this one go on."""
        self.atomics += 1
        if self.atomics > MOST_ATOMICS:
            raise AssertionError("the programs wait for each other")
        number = self.current
        turn = self.running[number]
        self._pass_on()
        turn.acquire()
        self._resume(number)


@contextmanager
def interleaved(monkeypatch: pytest.MonkeyPatch, seed: int, resident: int) -> Iterator[None]:
    """Run the programs of all launches in this block in a random order, `resident` of them at a time."""
    builder = interpreter.interpreter_builder
    plain_call, plain_atomic = interpreter.GridExecutor.__call__, type(builder).create_atomic_rmw
    programs: list[_Programs] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        function, grid, mine = self.fn, (*self.grid, 1, 1)[:3], _Programs(seed, resident)

        def collect(**given: Any) -> None:
            mine.waiting.append((tuple(builder.grid_idx), lambda: function(**given)))
            if len(mine.waiting) == grid[0] * grid[1] * grid[2]:
                programs.append(mine)
                mine.run()
                programs.pop()

        collect.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        self.fn = collect
        plain_call(self, *args, **kwargs)

    def atomic(self: Any, *args: Any) -> Any:
        if programs:
            programs[-1].switch()
        return plain_atomic(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        patch.setattr(type(builder), "create_atomic_rmw", atomic)
        yield
