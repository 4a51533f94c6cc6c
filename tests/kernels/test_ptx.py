"""The sigmoid by a GPU's approximations is as exact as it says, whatever these err by within their bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EX2, RCP = 2.0**-22, 2.0**-23
"""The greatest relative errors of ex2.approx and rcp.approx (PTX ISA, floating-point instructions)."""


def sigmoid(x: Tensor, ex2: float, rcp: float) -> Tensor:
    """Return what the four instructions of `ptx.sigmoid` give if the approximations err by these shares."""
    log2_e = torch.tensor(-1.4426950216293335)  # the bits BFB8AA3B
    e = (torch.exp2((x * log2_e).double()) * (1 + ex2)).float()
    return ((1 / (1 + e).double()) * (1 + rcp)).float()


@pytest.mark.parametrize(("ex2", "rcp"), list(itertools.product((-EX2, 0, EX2), (-RCP, 0, RCP))))
def test_sigmoid(ex2: float, rcp: float) -> None:
    x = torch.linspace(-30, 30, 600_001)
    got, exact = sigmoid(x, ex2, rcp), x.double().sigmoid()
    relative = (got.double() / exact - 1).abs()
    near = x.abs() <= 8
    assert relative[near].max() < 2**-20
    assert relative.max() < 2**-18
    silu = (x * got).double()[near]
    theirs = F.silu(x).double()[near]
    wanted = (x.double() * exact)[near]
    assert (silu - wanted).abs().max() < 3 * (theirs - wanted).abs().max(), "PyTorch's float32 errs by 7e-7"
