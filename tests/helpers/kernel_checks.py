"""Helpers for tests of kernels: the device, inputs, and error bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs kernels in Triton's interpreter
LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW]


def normal(
    *shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Make random numbers, rounded to dtype, that are the same on every device."""
    values = mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def channels_last(x: Tensor) -> Tensor:
    """Return the map in channels-last memory, whatever its size."""
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(B, H, W, C).contiguous().permute(0, 3, 1, 2)


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def assert_no_worse(got: Tensor, torchs: Tensor, exact: Tensor, what: str = "result", slack: float = 2.0) -> None:
    """Assert that the error of `got` against the float64 `exact` is at most `slack` times that of PyTorch in the same
    dtype, or one rounding: the machine epsilon of the dtype times the largest value.
    """
    assert got.dtype == torchs.dtype, f"{what}: {got.dtype}, PyTorch gives {torchs.dtype}"
    assert got.shape == torchs.shape == exact.shape, f"{what}: {tuple(got.shape)} for {tuple(exact.shape)}"
    budget = slack * error(torchs, exact) + torch.finfo(got.dtype).eps * exact.abs().max().item()
    off = error(got, exact)
    assert off <= budget, f"{what} is off by {off:.2e}, PyTorch by {error(torchs, exact):.2e}, allowed {budget:.2e}"


def results(
    function: Callable[..., Tensor], inputs: Sequence[Any], upstream: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return the output of function(*inputs), and the gradients of all float inputs for an upstream gradient.

    If dtype is given (float64 for exact results), tensors are converted to it first.
    """

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype or value.dtype).requires_grad_()

    leaves = [leaf(value) for value in inputs]
    y = function(*leaves)
    wanted = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream.to(y.dtype))]
