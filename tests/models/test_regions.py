"""A network in regions computes what the whole network computes, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import super_res, unet
from torch import Tensor

from fastdiff import ops
from fastdiff.models import SuperResSettings, UNet
from fastdiff.models.regions import UNetRegions

MODELS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one level": {"channel_mult": "1", "learn_sigma": True},
    "three levels": {"channel_mult": "1,1,2", "num_res_blocks": 2},
    "gray": {"in_channels": 1},
    "nowhere": {"attention_resolutions": ""},
    "added embedding": {"use_scale_shift_norm": False},
    "classes": {"class_cond": True, "num_classes": 3, "learn_sigma": True},
    "recomputing": {"use_checkpoint": True, "attention_resolutions": "8,4"},
    "super-resolution": {"small_size": 8, "class_cond": True, "num_classes": 3, "learn_sigma": True},
}
BACKEND = "aot_eager"  # Inductor's C++ compiler would take minutes


def network(name: str) -> UNet:
    return (super_res if "small_size" in MODELS[name] else unet)(**MODELS[name]).train()


def inputs(model: UNet) -> dict[str, Tensor]:
    settings = model.settings
    generator = torch.Generator().manual_seed(1)
    given = {
        "x": torch.randn(2, settings.in_channels, *settings.size_hw, generator=generator),
        "timesteps": torch.tensor([3, 700]),
    }
    if settings.class_cond:
        given["y"] = torch.tensor([2, 0])
    if isinstance(settings, SuperResSettings):
        given["low_res"] = torch.randn(2, settings.in_channels, *settings.small_size, generator=generator)
    return given


def results(model: UNet, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and all gradients of a weighted sum of it."""
    model.zero_grad()
    out = model(**given)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"output": out.detach(), **gradients}


def assert_equal(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    # A bias before a norm of one channel per group has no gradient but rounding, so all share one scale.
    scale = max(float(value.abs().max()) for name, value in whole.items() if name != "output")
    for name, value in whole.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_uncompiled(name: str) -> None:
    model = network(name)
    given = inputs(model)
    whole = results(model, given)
    model.forward = UNetRegions(model)  # type: ignore[method-assign]
    assert_equal(results(model, given), whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo reads it, and hides it
@pytest.mark.parametrize("name", ["three levels", "classes", "recomputing", "super-resolution"])
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each region is one graph, which is compiled once."""
    monkeypatch.setattr(ops, "_channels_last", True)  # as in compiled code, so that both round alike
    torch._dynamo.reset()
    model = network(name)
    given = inputs(model)
    whole = results(model, given)
    model.forward = UNetRegions(model).compile(backend=BACKEND, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert_equal(results(model, given), whole)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as it is", "one level"])
def test_with_kernels(name: str) -> None:
    """Residual sums that a norm would have added up are added up at the borders."""
    model = network(name)
    given = inputs(model)
    with ops.using("triton"):
        whole = results(model, given)
        model.forward = UNetRegions(model)  # type: ignore[method-assign]
        assert_equal(results(model, given), whole)


def test_most_parameters_lie_below() -> None:
    """The lower levels have most parameters, and no block is left out or taken twice."""
    model = unet(channel_mult="1,2,2,4", image_size=16)
    regions = UNetRegions(model)
    assert [*regions.upper_inputs, *regions.lower_inputs] == list(model.input_blocks)
    assert [*regions.lower_outputs, *regions.upper_outputs] == list(model.output_blocks)
    assert len(regions.upper_inputs) == len(regions.upper_outputs) == 4
    lower = [*regions.lower_inputs, model.middle_block, *regions.lower_outputs]
    counts = [sum(p.numel() for stage in part for p in stage.parameters()) for part in (lower, regions.upper_inputs)]
    assert counts[0] > 0.8 * sum(p.numel() for p in model.parameters()) > 10 * counts[1]
