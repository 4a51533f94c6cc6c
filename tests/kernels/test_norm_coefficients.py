"""Norms inside convolutions: the moments, the affine map, and a whole residual block against the usual path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastdiff.kernels import norm_coefficients, reference
from helpers.kernel_checks import DEVICE, channels_last, error, normal

from fastdiff import ops
from fastdiff.models.blocks import ResBlock, value


@pytest.mark.parametrize("size", [(5, 3), (9, 16)], ids=["one part", "several parts"])
def test_moments(size: tuple[int, int]) -> None:
    """Mean 100, spread 0.1: the deviations keep their digits."""
    x, skip = (channels_last(normal(2, c, *size, mean=100.0, std=0.1, seed=c)) for c in (32, 16))
    both = torch.cat([x, skip], dim=1).double()
    mean, m2 = norm_coefficients.moments(x, skip).unbind(-1)
    assert error(mean, both.mean(dim=(2, 3))) < 2 * 100 * 2**-23
    exact = (both - both.mean(dim=(2, 3), keepdim=True)).square().sum(dim=(2, 3))
    assert ((m2.double() - exact).abs() < 1e-3 * exact).all()


def test_affine_map_is_the_norm() -> None:
    x, (weight, bias) = channels_last(normal(2, 64, 3, 5, mean=3.0)), (normal(64, seed=1), normal(64, seed=2))
    scale, shift, offset = (normal(2, 64, seed=3 + i) for i in range(3))
    given = {"scale": scale, "shift": shift, "offset": offset}
    mean, gain, constant = norm_coefficients.from_moments(norm_coefficients.moments(x), 15, weight, bias, **given)
    wide = lambda value: value[:, :, None, None]
    ours = F.silu((x - wide(mean)) * wide(gain) + wide(constant))
    exact = reference.group_norm_silu(x.double(), weight, bias, **given)
    assert error(ours, exact) < 3e-6 * exact.abs().max().item()


@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale and shift", "added embedding"])
@pytest.mark.parametrize("channels", [32, 64], ids=["same width", "with a skip"])
def test_residual_block(scale_shift: bool, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = ResBlock(channels, 16, 32, 0.1, scale_shift).to(DEVICE).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, emb = channels_last(normal(2, 32, 4, 4, mean=1.0)), normal(2, block.emb_width, seed=1)
    skip = channels_last(normal(2, channels - 32, 4, 4, seed=2)) if channels > 32 else None
    with ops.using("reference"), torch.no_grad():
        exact = value(block(x, emb, skip))
    with ops.using("triton"):
        monkeypatch.setattr(ops, "_fused_convolutions", True)
        with torch.no_grad():
            assert ops.fuses_convolutions(x, block.in_layers[2].weight, skip)
            ours = value(block(x, emb, skip))
        assert not ops.fuses_convolutions(x, block.in_layers[2].weight, skip), "it has no backward"
    assert error(ours, exact) < 2e-5 * exact.abs().max().item()
    before = block.in_layers[2].packed(torch.float32)
    assert block.in_layers[2].packed(torch.float32) is before
    with torch.no_grad():
        block.in_layers[2].weight.mul_(2)
    assert torch.equal(block.in_layers[2].packed(torch.float32), 2 * before)


def test_fused_convolutions_need_kernels() -> None:
    with ops.using("reference"), pytest.raises(ValueError, match="fused_convolutions needs Triton's kernels"):
        ops.use_fused_convolutions(True)
