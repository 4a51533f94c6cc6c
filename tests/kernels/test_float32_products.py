"""Triton kernels multiply float32 numbers exactly: compiled for a GPU, they contain no instruction of TF32."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Prints each kernel that attention launches on float32, short and long, both ways, with TF32 after those whose code
# holds such an instruction.
SCRIPT = """
import torch
from fastdiff.kernels import attention, aot, launch

forward, backward = launch.IMPLEMENTATIONS["attention"], launch.IMPLEMENTATIONS["attention_backward"]
with launch.record() as launches:
    for L in (64, 2048):
        qkv = torch.empty(2, L, 3 * 64, device="meta")
        out, lse = forward(qkv, 1)
        backward(out, qkv, out, lse, 1)
for each in aot.unique(launches):
    code = aot.compile_launch(each, 90).asm["ptx"]
    print(each.kernel.__name__, "TF32" if ".tf32" in code else "")
"""


def test_no_tf32() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    kernels = {line.split()[0] for line in lines}
    assert {"_forward_short", "_backward_short", "_forward_long", "_backward_long"} <= kernels
    assert [line for line in lines if "TF32" in line] == []
