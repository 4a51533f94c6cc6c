"""Runs a program as several ranks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import ROOT, TESTS


def run_ranks(command: list[str], world_size: int = 2) -> str:
    """Run a Python program with several processes under torchrun, and return its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=900, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
