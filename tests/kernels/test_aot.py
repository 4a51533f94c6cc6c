"""Kernels of shipped configurations, compiled for GPUs that are not here: no spills, wide accesses, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"  # of the Tritons that setup.py admits


def _aside(triton: str) -> Path:
    """The folder where the Makefile installs another Triton than .venv's."""
    return ROOT / f".triton-{triton}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("triton", "arch", "configs", "each"),
    [
        ("", 80, "demo", 0),
        ("", 90, "cifar10_uncond,imagenet64_270M,upsample_256", 3),
        ("", 100, "demo", 0),
        # Losses of 64x64 and 256x256 pixels are among these.
        (OLDEST, 90, "imagenet64_270M,upsample_256", 2),
    ],
)
def test_machine_code(triton: str, arch: int, configs: str, each: int, tmp_path: Path) -> None:
    """`make aot` does the same for all configurations on all three, by either Triton."""
    pytest.importorskip("triton")
    if triton and not (_aside(triton) / "triton").is_dir():
        pytest.skip(f"Triton {triton} is not installed aside; make setup does that")
    table = tmp_path / "table.json"
    path = [*([str(_aside(triton))] if triton else []), str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "aot.py", "--configs", configs, "--archs", str(arch)]
        + ["--each", str(each), "--json", table],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert table.is_file(), done.stderr
    assert f"Triton {triton}" in done.stdout
    rows = json.loads(table.read_text())
    wrong = [f"{row['kernel']} [{row['variant']}]: {'; '.join(row['wrong'])}" for row in rows if row["wrong"]]
    assert not wrong, "\n".join(wrong)
    assert {"slab_forward", "slab_backward", "q_sample", "diffusion_loss", "sampler_step"} <= {
        r["kernel"] for r in rows
    }
    if "imagenet64" in configs:
        assert any(row["kernel"] == "combine" and "BLOCK_S=8" in row["variant"] for row in rows)
