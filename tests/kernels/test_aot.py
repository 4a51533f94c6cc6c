"""Kernels of shipped configurations, compiled for GPUs that are not here: no spills, wide accesses, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).parents[2] / "benchmarks" / "aot.py"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("arch", "config"), [(80, "demo"), (90, "cifar10_uncond"), (100, "demo")])
def test_machine_code(arch: int, config: str, tmp_path: Path) -> None:
    """`make aot` does the same for all configurations on all three."""
    pytest.importorskip("triton")
    table = tmp_path / "table.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, AOT, "--configs", config, "--archs", str(arch), "--json", table],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert table.is_file(), done.stderr
    rows = json.loads(table.read_text())
    wrong = [f"{row['kernel']} [{row['variant']}]: {'; '.join(row['wrong'])}" for row in rows if row["wrong"]]
    assert not wrong, "\n".join(wrong)
    assert {"slab_forward", "slab_backward", "q_sample", "diffusion_loss", "sampler_step"} <= {
        r["kernel"] for r in rows
    }
