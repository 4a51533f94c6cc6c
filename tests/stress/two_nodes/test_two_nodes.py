"""Training on two nodes loses nothing when a node dies, the network is cut or a signal arrives; see two_nodes.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from network import why_impossible  # noqa: E402

pytestmark = pytest.mark.slow


def test_nothing_is_lost_on_two_nodes() -> None:
    if why := why_impossible():
        pytest.skip(why)
    done = subprocess.run([sys.executable, str(HERE / "two_nodes.py")], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "two nodes: nothing was lost"
    assert "gone without a word" in done.stdout
