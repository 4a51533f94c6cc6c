"""Runs Python with compiled, not interpreted, kernels, by the Triton of .venv or the oldest supported one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from helpers import ROOT, TESTS

OLDEST = "3.6.0"  # the oldest one that setup.py allows; the Makefile installs it separately
TRITONS = pytest.mark.parametrize("triton", ["", OLDEST], ids=["Triton", f"Triton {OLDEST}"])


def run(triton: str, *command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with compiled kernels; skips the test if that Triton is not installed."""
    pytest.importorskip("triton")
    aside = ROOT / f".triton-{triton}"
    if triton and not (aside / "triton").is_dir():
        pytest.skip(f"Triton {triton} is not installed; make setup does that")
    path = [*([str(aside)] if triton else []), str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]
    given = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=given)
