"""Kernels of shipped configurations, compiled ahead, keep the rules of aot.py: spills, wide accesses, tensor cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastdiff.kernels import aot, launch
from helpers import ROOT, tritons
from helpers.kernel_checks import channels_last, normal

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("triton", "arch", "configs", "each"),
    [
        ("", 80, "demo", 0),
        ("", 90, "cifar10_uncond,imagenet64_270M,upsample_256", 3),
        ("", 100, "demo", 0),
        # Losses of 64x64 and 256x256 pixels are among these.
        (tritons.OLDEST, 90, "imagenet64_270M,upsample_256", 2),
    ],
)
def test_machine_code(triton: str, arch: int, configs: str, each: int, tmp_path: Path) -> None:
    """The machine code passes the checks; `make aot` checks all configurations for all GPUs with either Triton."""
    table = tmp_path / "table.json"
    given = ("--configs", configs, "--archs", str(arch), "--each", str(each), "--json", table)
    done = tritons.run(triton, ROOT / "benchmarks" / "aot.py", *given)
    assert table.is_file(), done.stderr
    assert f"Triton {triton}" in done.stdout
    rows = json.loads(table.read_text())
    wrong = [f"{row['kernel']} [{row['variant']}]: {'; '.join(row['wrong'])}" for row in rows if row["wrong"]]
    assert not wrong, "\n".join(wrong)
    assert all(bool(row["costs"]) == (arch == 90) for row in rows)
    assert {"norm_forward", "norm_backward", "q_sample", "diffusion_loss", "sampler_step"} <= {
        r["kernel"] for r in rows
    }
    if "imagenet64" in configs:
        assert any(row["kernel"] == "combine" and "BLOCK_S=8" in row["variant"] for row in rows)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--archs", "sm_90"], "--archs: 'sm_90' is not one of 80, 90, 100"),
        (["--configs", "demo", "--kernels", "nonsense"], "--kernels: 'nonsense' is not one of adamw_ema, "),
        (["--configs", "demo", "--each", "1", "--cost", "x.json"], "--cost needs all kernels for sm_90"),
        (["--processes", "0"], "argument --processes: must be a whole number of at least 1, but is 0"),
        (["--launches", "/no/file"], "argument --launches: there is no file /no/file"),
    ],
)
def test_wrong_flags(flags: list[str], words: str) -> None:
    done = tritons.run("", ROOT / "benchmarks" / "aot.py", *flags)
    assert done.returncode == 2
    assert words in done.stderr.replace("\n", " ")


KEYS = """
import importlib, json, pathlib, sys
import fastdiff.kernels
from triton.runtime.jit import JITFunction

names = [path.stem for path in sorted(pathlib.Path(fastdiff.kernels.__path__[0]).glob("*.py"))]
modules = [importlib.import_module(f"fastdiff.kernels.{name}") for name in names if name not in ("__init__", "aot")]
kernels = {str(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
order = sorted(kernels, reverse=sys.argv[1] == "reversed")
print(json.dumps({name: kernels[name].cache_key for name in order}))
"""


@tritons.TRITONS
def test_keys_are_the_same_in_any_order(triton: str) -> None:
    """A kernel has the same key in Triton's cache whichever kernels its process compiled before it.

    A key covers the module's constants that a function and those it calls read. Triton 3.6 finds the latter only if the
    called function's own key was asked for before. So functions that kernels call read no constant of a module.
    """
    forwards, backwards = (tritons.run(triton, "-c", KEYS, order) for order in ("forwards", "reversed"))
    assert not forwards.returncode, forwards.stderr
    assert json.loads(forwards.stdout) == json.loads(backwards.stdout)


def test_launches_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's text is the same for equal compilations, differs otherwise, and can be read back."""
    from fastdiff.kernels.q_sample import q_sample

    heard: list[launch.Launch] = []
    monkeypatch.setattr(launch, "listener", heard.append)
    for height, shift in ((8, 0), (16, 0), (9, 0), (8, 1)):
        x, noise = channels_last(normal(2, 3, height, 8)), normal(2, 3, height, 8)
        q_sample(x, normal(4, 2)[shift : shift + 2], noise, channels=8)
    texts = [aot.to_json(made) for made in heard]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert json.loads(texts[3])["args"][5] == {"tensor": "float32", "address": 8}
    assert [aot.to_json(aot.from_json(text)) for text in texts] == texts
