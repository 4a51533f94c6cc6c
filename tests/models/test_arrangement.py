"""Weights arranged for training: which have copies, and how many bytes a step moves for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from fastdiff.kernels import launch
from helpers import ROOT
from helpers.tiny import unet
from helpers.weight_traffic import WeightTraffic
from torch import nn

from fastdiff.config.sections import Config
from fastdiff.models import UNet
from fastdiff.models.arrangement import arrange_weights
from fastdiff.training import step_plan
from fastdiff.training.step_plan import training_launches

BOUND = 40.0
"""Bytes that a step with one average moves for a parameter, beside what products themselves read and write."""


def test_what_is_arranged() -> None:
    """The body's convolutions and attention products, but for upsampling, in the order and layout of their masters."""
    model = unet().set_precision(torch.float16)
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    masters = dict(zip(before, arrange_weights(model), strict=True))
    copied = set()
    for name, p in model.named_parameters():
        assert masters[name] is before[name]
        assert torch.equal(masters[name], values[name])
        if p is masters[name]:
            assert p.dtype == torch.float32
            continue
        copied.add(name)
        assert p.dtype == torch.float16
        assert p.requires_grad
        assert torch.equal(p, values[name].half())
        assert p.stride() == masters[name].stride()
        assert p.dim() == 3 or p.is_contiguous(memory_format=torch.channels_last)
    assert copied == {
        name
        for name in before
        if name.endswith("weight")
        and (".op." in name or name.endswith(("layers.2.weight", "layers.3.weight")) or "skip_connection" in name
             or "qkv" in name or "proj_out" in name)
    }  # fmt: skip
    again = list(model.parameters())
    assert arrange_weights(model) == again, "nothing is left to convert"
    assert all(a is b for a, b in zip(model.parameters(), again, strict=True))


def test_float32_weights_are_their_own_masters() -> None:
    model = unet()
    before = list(model.parameters())
    assert all(a is b for a, b in zip(arrange_weights(model), before, strict=True))
    assert model.input_blocks[1][0].in_layers[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_embedding_layers_are_views() -> None:
    """Of one matrix, whose gradients they share, over two backward passes as over one."""
    plain, arranged = unet(), unet()
    arrange_weights(arranged)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 5.0])
    for model in (plain, arranged):
        for _ in range(2):
            model(x, t).square().sum().backward()
    assert arranged.projection is not None
    for block, same in zip(plain.res_blocks, arranged.res_blocks, strict=True):
        for expected, p in zip(block.emb_layers.parameters(), same.emb_layers.parameters(), strict=True):
            assert torch.equal(p, expected)
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-4)
            joined = arranged.projection[p.dim() == 1]
            assert p.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    with torch.no_grad():
        for p in arranged.res_blocks[-1].emb_layers.parameters():
            p.zero_()
    assert not arranged.project(torch.ones(1, 128))[-1].any()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[UNet, WeightTraffic]]]:
    """Count the traffic of the networks that `training_launches` makes, from when their weights are arranged."""
    seen: list[tuple[UNet, WeightTraffic]] = []

    def arrange(model: UNet) -> list[nn.Parameter]:
        masters = arrange_weights(model)
        traffic = WeightTraffic(model)
        traffic.__enter__()
        seen.append((model, traffic))
        return masters

    original = step_plan.forward_and_backward

    def computed(*args: object) -> UNet:
        model = original(*args)  # type: ignore[arg-type]
        seen[-1][1].__exit__(None, None, None)
        seen[-1][1].finish(model)
        return model

    monkeypatch.setattr(step_plan, "arrange_weights", arrange)
    monkeypatch.setattr(step_plan, "forward_and_backward", computed)
    return seen


def launched_bytes(made: launch.Launch, plain: int, copied: int) -> int:
    """Bytes that a recorded launch of the optimiser's kernels moves, by the dtypes that it was compiled for."""
    types = {key: value for key, value in made.constexprs.items() if key in ("GRAD", "HALF") and value is not None}
    gradient, half = (types[key].primitive_bitwidth // 8 if key in types else 0 for key in ("GRAD", "HALF"))
    if made.kernel.fn.__name__ == "_squares":
        return gradient * (plain if gradient == 4 else copied)
    if made.kernel.fn.__name__ == "_adamw_ema":
        return (3 * 4 + gradient + 3 * 4 + 8 * made.constexprs["K"] + half) * (copied if half else plain)
    return 0


@pytest.mark.parametrize("name", ["cifar10_uncond", "imagenet64_270M"])
def test_bytes_of_a_parameter(name: str, network: list[tuple[UNet, WeightTraffic]]) -> None:
    """A step reads and writes at most BOUND bytes for a parameter, where a compiler fuses what lies between products.

    Eagerly computed, the 4x4 taps of upsampling convolutions take more.
    """
    config = Config.model_validate_json((ROOT / "configs" / f"{name}.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without memory there is no layout to keep
        launches = training_launches(config.model, config.diffusion, 3, torch.bfloat16, rates=[0.9999])
    ((model, traffic),) = network
    count = sum(p.numel() for p in model.parameters())
    copied = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    moved = sum(launched_bytes(made, count - copied, copied) for made in launches)
    assert moved == 38 * copied + 40 * (count - copied)
    assert (traffic.fused + moved) / count <= BOUND
    assert (sum(traffic.eager.values()) + moved) / count <= 1.25 * BOUND
