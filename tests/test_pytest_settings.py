"""The settings of pytest in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TF32 = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled."


@pytest.mark.parametrize(
    ("message", "module"),
    [
        (TF32, "torch._inductor.compile_fx"),
        (TF32, "torch._inductor.fx_passes.fuse_attention"),
        ("Synchronization debug mode is a prototype feature and does not yet detect all operations", "torch.cuda"),
        ("Warning: Profiler clears events at the end of each cycle.Only", "torch.profiler.profiler"),
    ],
)
def test_torchs_words_on_a_gpu_are_no_errors(message: str, module: str) -> None:
    warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)


@pytest.mark.parametrize(("message", "module"), [(TF32, "fastdiff.ops"), ("anything", "torch._inductor.compile_fx")])
def test_other_warnings_are_errors(message: str, module: str) -> None:
    with pytest.raises(UserWarning):
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)


def test_quiet_still_says_how_many_passed() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_module_names.py")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
