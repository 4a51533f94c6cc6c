"""`--launches FILE`: the launches that the tests of kernels make, one of each kind a line, for `benchmarks/aot.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

_seen: dict[str, None] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", metavar="FILE", help="write the launches of Triton kernels that the tests make here")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--launches"):
        from fastdiff.kernels import aot, launch

        launch.listener = lambda made: _seen.setdefault(aot.to_json(made))
        if not hasattr(config, "workerinput"):
            Path(file).write_text("")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Every process of pytest-xdist adds its own; the next line's reader takes each kind once."""
    if (file := session.config.getoption("--launches")) and _seen:
        with Path(file).open("a") as lines:
            lines.writelines(f"{each}\n" for each in _seen)
