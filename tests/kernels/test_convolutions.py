"""Upsampling and skip convolutions with fewer operations agree with float64 and their definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastdiff.kernels import convolutions, reference
from helpers.kernel_checks import DTYPES, assert_no_worse, channels_last, error, normal, results
from torch import Tensor

from fastdiff import ops


def compare(ours: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    upstream = channels_last(normal(*definition(*inputs).shape, seed=9, dtype=inputs[0].dtype))
    names = ["result", *(f"gradient {i}" for i in range(len(inputs)))]
    got = results(ours, inputs, upstream)
    theirs, exact = results(definition, inputs, upstream), results(definition, inputs, upstream, torch.float64)
    for name, a, b, c in zip(names, got, theirs, exact, strict=True):
        assert_no_worse(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (1, 5)], ids=["3x4", "one pixel", "one row"])
def test_upsample_conv(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Results agree up to the border, beyond which both see zeros. The weight is float32, as in the module."""
    x = channels_last(normal(2, 16, *size, mean=1.0, dtype=dtype))
    compare(convolutions.upsample_conv, reference.upsample_conv, [x, normal(8, 16, 3, 3, seed=1), normal(8, seed=2)])


def test_box_weight_is_exact() -> None:
    """In float64 both forms agree to rounding, and the 4x4 taps of a weight of ones count how often each applies."""
    x, weight, bias = normal(2, 5, 3, 4).double(), normal(7, 5, 3, 3, seed=1).double(), normal(7, seed=2).double()
    difference = convolutions.upsample_conv(x, weight, bias) - reference.upsample_conv(x, weight, bias)
    assert difference.abs().max() < 1e-13
    taps = convolutions.box_weight(torch.ones(1, 1, 3, 3))[0, 0]
    assert taps.tolist() == [[a * b for b in (1, 2, 2, 1)] for a in (1, 2, 2, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skip_conv1x1(dtype: torch.dtype) -> None:
    x, skip = channels_last(normal(2, 24, 3, 5, dtype=dtype)), channels_last(normal(2, 8, 3, 5, seed=1, dtype=dtype))
    weight, bias = normal(16, 32, 1, 1, seed=2), normal(16, seed=3)
    compare(convolutions.skip_conv1x1, reference.skip_conv1x1, [x, skip, weight, bias])
    alone = lambda function: lambda x, w, b: function(x, None, w, b)
    compare(alone(convolutions.skip_conv1x1), alone(reference.skip_conv1x1), [x, weight[:, :24], bias])
    y = convolutions.skip_conv1x1(x, skip, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_ops_choose() -> None:
    """With `triton` the op is the rewritten convolution, and with `reference` its definition."""
    x, weight, bias = channels_last(normal(1, 8, 2, 2)), normal(8, 8, 3, 3, seed=1), normal(8, seed=2)
    with ops.using("triton"):
        assert torch.equal(ops.upsample_conv(x, weight, bias), convolutions.upsample_conv(x, weight, bias))
    with ops.using("reference"):
        assert torch.equal(ops.upsample_conv(x, weight, bias), reference.upsample_conv(x, weight, bias))
    assert error(convolutions.upsample_conv(x, weight, bias), reference.upsample_conv(x, weight, bias)) < 1e-5
