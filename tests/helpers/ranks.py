"""Runs a script as two ranks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import ROOT, TESTS


def run_two(command: list[str], expect: int = 0) -> str:
    """Run a script with two processes under torchrun, and return its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=900, cwd=ROOT, env=env)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout
