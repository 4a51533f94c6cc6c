"""The last layer as one op: its result and gradients are as exact as those of float32 products, not of TF32 or bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastdiff.kernels import output_layer, reference
from helpers.kernel_checks import LOW, assert_no_worse, channels_last, error, normal
from torch import Tensor

from fastdiff.precompile import launches_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

Inputs = dict[str, Any]


def inputs(
    B: int, C: int, out: int, H: int, W: int, dtype: torch.dtype, *, summed: bool = True, mean: float = 3.0
) -> Inputs:
    made: Inputs = {
        "x": channels_last(normal(B, C, H, W, mean=mean, dtype=dtype)),
        "weight": normal(C, seed=1, mean=1.0, std=0.3),
        "bias": normal(C, seed=2, std=0.3),
        "conv_weight": normal(out, C, 3, 3, seed=3, std=0.05),
        "conv_bias": normal(out, seed=4),
    }
    if summed:
        made["second"] = channels_last(normal(B, C, H, W, seed=5, mean=-1.0, dtype=dtype))
        made["second_bias"] = normal(C, seed=6)
    return made


def run(function: Any, given: Inputs, upstream: Tensor, dtype: torch.dtype | None = None) -> Inputs:
    """Return the result and the gradients by name."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in given.items()}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def split_sum(given: Inputs) -> tuple[Tensor, Inputs]:
    """Return the sum that the op makes, which is rounded as torch's or, in the interpreter, truncated; and the inputs
    with it in place of its parts.
    """
    order = ("x", "second", "second_bias", "weight", "bias", "conv_weight", "conv_bias")
    total = torch.ops.fastdiff.output_layer(*(given[name] for name in order), 1e-5)[1]
    return total, {**{name: value for name, value in given.items() if not name.startswith("second")}, "x": total}


def check(given: Inputs, scale: float = 1.0) -> None:
    """Assert that result and gradients err by 2^-14 of their largest value at most, beside the rounding of 16-bit maps.

    Two bf16 parts leave 2^-16 of a factor, in the interpreter, which truncates, 2^-15. TF32 would leave 2^-11.
    """
    B, _, H, W = given["x"].shape
    upstream = scale * channels_last(normal(B, len(given["conv_bias"]), H, W, seed=7, mean=0.5))
    ours = run(output_layer.output_layer, given, upstream)
    summed = given
    if "second" in given:
        total, summed = split_sum(given)
        parts = [given[name] for name in ("x", "second", "second_bias")]
        exact_sum = reference.residual_sum(*(each.double() for each in parts))
        assert_no_worse(total, reference.residual_sum(*parts), exact_sum, "sum")
    exact = run(reference.output_layer, summed, upstream, torch.float64)
    assert ours["y"].dtype == torch.float32
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    if "second" in given:
        assert torch.equal(ours["x"], ours["second"])
        exact["second_bias"] = exact["x"].sum((0, 2, 3))
    for name, value in exact.items():
        most = value.abs().max().item()
        if name == "second_bias":  # of which the norm's own gradient leaves the rest of a cancellation
            most = exact["x"].abs().sum((0, 2, 3)).max().item()
        rounding = torch.finfo(ours[name].dtype).eps if ours[name].dtype in LOW else 0.0  # the interpreter truncates
        assert error(ours[name], value) <= (2**-14 + rounding) * most, name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("summed", [True, False], ids=["sum", "map"])
def test_result_and_gradients(dtype: torch.dtype, summed: bool) -> None:
    check(inputs(2, 64, 6, 5, 3, dtype, summed=summed))


SHAPES = {
    "one pixel": (1, 64, 3, 1, 1),
    "gray": (1, 32, 1, 4, 4),
    "most channels": (1, 32, 7, 3, 4),
    "6 channels per group": (2, 192, 6, 4, 4),
    "channels that fill no block": (1, 96, 6, 3, 3),
    "several blocks of pixels": (1, 32, 6, 17, 16),
    "several parts": (1, 32, 3, 24, 24),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    check(inputs(*SHAPES[shape], torch.bfloat16))


def test_long_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several blocks, of which the last is not full."""
    monkeypatch.setattr(output_layer, "PARTS_PER_PROCESSOR", 1)
    monkeypatch.setattr(output_layer, "processors", lambda device: 1)
    check(inputs(1, 32, 3, 25, 24, torch.bfloat16))


@pytest.mark.parametrize("scale", [1e-7, 65536.0])
def test_gradients_of_any_size(scale: float) -> None:
    """Gradients of a mean loss are small, those with a loss scale large; fp16 would lose either."""
    check(inputs(1, 32, 3, 4, 4, torch.bfloat16), scale)


def test_far_off_centre() -> None:
    """With mean 200 and spread 1, E[x²] - E[x]² in float32 would leave three digits of the variance."""
    check(inputs(1, 32, 3, 8, 8, torch.float16, summed=False, mean=200.0))


def test_other_layouts() -> None:
    """A channels-first map is copied; vectors with gaps, frozen weights and a gradient in any layout are read."""
    given = inputs(2, 32, 3, 4, 3, torch.bfloat16, summed=False)
    upstream = normal(2, 3, 4, 3, seed=7)
    wanted = run(output_layer.output_layer, given, upstream)
    given["weight"] = torch.stack([given["weight"], given["bias"]], dim=1)[:, 0]
    given["conv_weight"] = given["conv_weight"].contiguous(memory_format=torch.channels_last)
    got = run(output_layer.output_layer, given, channels_last(upstream))
    torch.testing.assert_close(got.pop("conv_bias"), wanted.pop("conv_bias"))  # torch's sum, in another order
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
    with pytest.warns(UserWarning, match="another layout"):
        y = output_layer.output_layer(**{**given, "x": given["x"].contiguous()})
    assert torch.equal(y, wanted["y"])


def test_no_worse_than_torch_in_half_precision() -> None:
    """The map's gradient has one rounding to bf16, as a float32 layer has after which the map is cast."""
    given, upstream = inputs(1, 64, 3, 6, 6, torch.bfloat16, summed=False), channels_last(normal(1, 3, 6, 6, seed=7))
    exact = run(reference.output_layer, given, upstream, torch.float64)
    torchs = run(reference.output_layer, given, upstream)
    ours = run(output_layer.output_layer, given, upstream)
    assert_no_worse(ours["x"], torchs["x"], exact["x"])


def test_wrong_inputs() -> None:
    given = inputs(1, 32, 3, 2, 2, torch.bfloat16)
    for change, message in (
        ({"x": given["x"].float()}, "not a 16-bit map"),
        ({"x": given["x"][:, :24]}, "multiples of 32"),
        ({"conv_weight": given["conv_weight"].repeat(3, 1, 1, 1)}, "more than 7 output channels"),
        ({"conv_weight": given["conv_weight"][:, :16]}, "no 3x3 convolution of 32 channels"),
        ({"second": given["second"].half()}, "second is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            output_layer.output_layer(**{**given, **change})


def test_no_second_derivative() -> None:
    given = inputs(1, 32, 3, 2, 2, torch.bfloat16, summed=False)
    x = given.pop("x").requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.autograd.grad(output_layer.output_layer(x, **given).sum(), x, create_graph=True)


def test_compiler_sees_the_shapes() -> None:
    """torch.compile traces through the fakes of both ops, whose results have the real ones' layouts."""
    given = inputs(1, 32, 3, 4, 4, torch.bfloat16)
    args = [given[name] for name in ("x", "second", "second_bias", "weight", "bias", "conv_weight", "conv_bias")]
    torch.library.opcheck(torch.ops.fastdiff.output_layer.default, (*args, 1e-5), test_utils="test_faketensor")


def test_launches() -> None:
    """Forward has five kernels and backward four; nothing is allocated for maps on the meta device."""
    given = {name: value.to("meta").requires_grad_() for name, value in inputs(2, 64, 6, 8, 8, LOW[0]).items()}
    launches = launches_of(lambda: output_layer.output_layer(**given).sum().backward())
    assert [each.kernel.__name__ for each in launches] == [
        *("_output_weights", "_output_moments", "_output_statistics", "_output_products", "_output_sum"),
        *("_output_patches", "_output_backward_sums", "_output_finish", "_output_gradient"),
    ]
