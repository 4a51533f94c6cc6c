"""A run that is killed ten times loses nothing; `make chaos` does it a hundred times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_ten_kills() -> None:
    script = Path(__file__).with_name("chaos.py")
    done = subprocess.run([sys.executable, script, "--kills", "10"], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verdict after 10 kills: nothing was lost"
