"""A pytest plugin for the rehearsal GPU, which computes nothing: no comparison of numbers ends a test.

What follows a comparison runs as well then, so that its exceptions are found. Plain asserts are left out by Python:

    python -O -m pytest --assert=plain -p benchmarks.rehearsal.no_comparisons
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def pytest_configure() -> None:
    def nothing(*_: Any, **__: Any) -> None:
        """Takes what a comparison takes."""

    torch.testing.assert_close = nothing
    np.testing.assert_array_equal = np.testing.assert_allclose = nothing
