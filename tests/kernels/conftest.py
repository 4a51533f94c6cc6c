"""Fixtures for kernels, and the option `--launches FILE`.

The option writes the launches that the tests make, one of each kind per line, for `benchmarks/aot.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_seen: dict[str, None] = {}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill new memory with NaN, so that a test notices an element that a kernel does not write."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", metavar="FILE", help="write the launches of Triton kernels that the tests make here")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--launches"):
        from fastdiff.kernels import aot, launch

        launch.listener = lambda made: _seen.setdefault(aot.to_json(made))
        if not hasattr(config, "workerinput"):
            Path(file).write_text("")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Append this process's launches; processes of pytest-xdist may write the same ones, which aot.py counts once."""
    if (file := session.config.getoption("--launches")) and _seen:
        with Path(file).open("a") as lines:
            lines.writelines(f"{each}\n" for each in _seen)
