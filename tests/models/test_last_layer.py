"""The network's last layer is one op for 16-bit maps where kernels run, and two ops in float32 elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_checks import DEVICE, LOW, channels_last, normal
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.blocks import OutputLayer, Sum, value


def layer(channels: int = 32, out_channels: int = 6) -> OutputLayer:
    made = OutputLayer(channels, out_channels).to(DEVICE)
    nn.init.normal_(made[2].weight, std=0.1)
    return made


def input_sum(dtype: torch.dtype) -> Sum:
    a, b = (channels_last(normal(1, 32, 4, 4, seed=seed, dtype=dtype)) for seed in (1, 2))
    return Sum(a, b, normal(32, seed=3))


def in_float32(made: OutputLayer, total: Tensor) -> Tensor:
    with ops.using("reference"):
        return made(total)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel(dtype: torch.dtype) -> None:
    """A sum and its total give the same, which is what float32 gives; frozen weights are taken, too."""
    made, given = layer(), input_sum(dtype)
    with ops.using("triton"), torch.no_grad():
        total = torch.ops.fastdiff.output_layer(
            *given.parts, made[0].weight, made[0].bias, made[2].weight, made[2].bias, 1e-5
        )[1]
        got, of_total = made(given), made(total)
        made[2].weight.data = made[2].weight.contiguous(memory_format=torch.channels_last)
        frozen = made(total)
    assert got.dtype == torch.float32
    assert torch.equal(got, of_total)
    assert torch.equal(got, frozen)
    exact = in_float32(made, total)
    assert (got - exact).abs().max() < 2**-14 * exact.abs().max()


@pytest.mark.parametrize("why", ["float32", "ZeRO-3", "eight channels", "PyTorch"])
def test_two_ops(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's norm and convolution run as modules, as ZeRO-3's hooks need it."""
    monkeypatch.setattr(ops, "output_layer", None)
    made, called = layer(out_channels=8 if why == "eight channels" else 6), []
    made[2].register_forward_hook(lambda *_: called.append(True))
    if why == "ZeRO-3":
        made[2].weight.ds_id = 0
    mode = "reference" if why == "PyTorch" else "triton"
    with ops.using(mode), torch.no_grad():
        y = made(value(input_sum(torch.float32 if why == "float32" else torch.bfloat16)))
    assert y.dtype == torch.float32
    assert called
