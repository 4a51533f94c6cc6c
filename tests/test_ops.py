"""Ops choose between their definitions and kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.kernel_checks import DEVICE

from fastdiff import ops

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, create_diffusion, solver_table
from fastdiff.models import UNet, UNetSettings
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import GuidedNetwork
from fastdiff.training.optimizer import AdamWEMA

sizes = {"image_size": 8, "num_channels": 32, "channel_mult": "1", "attention_resolutions": "8", "num_res_blocks": 1}
model = UNet(UNetSettings(**sizes, learn_sigma=True))
diffusion = create_diffusion(DiffusionSettings(timestep_respacing="2"), learn_sigma=True)
images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
noise = ops.CounterNoise(0, torch.arange(2), (3, 8, 8))
diffusion.training_losses(model, images, torch.tensor([0, 1]), noise=noise)["loss"].mean().backward()
AdamWEMA(model.parameters(), lr=1e-3, fused_kernel=False).step()
network = GuidedNetwork(model.eval(), solver_table(diffusion, "ddpm"), diffusion)
print(Engine(network, batch_size=2, seed_and_key=0).draw(torch.arange(2)).shape, ops.choices(torch.device("cpu")))
try:
    ops.use("triton")
except ValueError as error:
    print(error)
"""


def test_without_triton() -> None:
    """Without Triton everything runs on PyTorch, and only `kernels triton` is refused."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 3, 8, 8])" in done.stdout
    assert "Triton is not installed" in done.stdout
    assert "kernels triton needs Triton, which is not installed; use auto or reference" in done.stdout


def test_modes() -> None:
    x = torch.zeros(1, device=DEVICE)
    with ops.using("triton"):
        assert ops.uses_kernels(x)
        assert ops.uses_kernels(x, "not this shape"), "kernels triton leaves no shape to PyTorch"
        assert "Triton" in ops.choices(x.device)[0].implementation
    with ops.using("reference"):
        assert not ops.uses_kernels(x)
        assert ops.choices(x.device) == [("all", "PyTorch", "kernels reference")]
    with ops.using("auto"):
        assert ops.uses_kernels(x) == x.is_cuda
        assert not ops.uses_kernels(x, "not this shape")
    with pytest.raises(ValueError, match="kernels must be one of auto, triton, reference, not 'fast'"):
        ops.use("fast")  # type: ignore[arg-type]


def test_kernels_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="kernels triton needs a GPU"):
        ops.use("triton")
    with ops.using("triton", anywhere=True):
        assert ops.uses_kernels(torch.zeros(1))


@pytest.mark.parametrize(
    ("L", "D", "way"), [(64, 64, "sdpa"), (256, 144, "ours"), (64, 512, "ours"), (1024, 192, "sdpa")]
)
def test_attention_by_size(L: int, D: int, way: str) -> None:
    assert ops.expected_way(L, D) == way
