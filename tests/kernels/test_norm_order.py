"""The programs of a group norm may run in any order, and as many at a time as there is room for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastdiff.kernels import group_norm_silu as norm
from fastdiff.kernels.group_norm_silu_plan import Plan, arranged, plan
from helpers.interleaved import interleaved
from helpers.kernel_checks import DEVICE, channels_last, normal
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has an order of its own"),
]


def results() -> list[Tensor]:
    """Return the sum, its norm and all gradients, for two images of 3x2 pixels and 64 + 32 channels."""
    a, b, skip = (channels_last(normal(2, C, 3, 2, seed=C)) for C in (64, 64, 32))
    leaves = [a, b, skip, normal(96, seed=1), normal(96, seed=2), normal(64, seed=3)]
    for leaf in leaves:
        leaf.requires_grad_()
    total, y = norm.add_group_norm_silu(*leaves[:2], *leaves[3:5], skip=skip, b_bias=leaves[5])
    upstream = [channels_last(normal(*z.shape, seed=4)) for z in (total, y)]
    return [total, y, *torch.autograd.grad([total, y], leaves, upstream)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize("most", [0, 2**20], ids=["least lag", "greatest lag"])
def test_any_order(most: int, resident: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results have equal bits, and no program waits forever, even for programs that have not begun."""

    def small(B: int, L: int, C1: int, C2: int, group: int, itemsize: int, *_: object) -> Plan:
        return arranged(B, L, C1 + C2, group, itemsize, most, block_c=32, block_l=4, rows=4, whole=False)

    def with_programs(*args: int) -> Plan:
        return dataclasses.replace(small(*args), programs=5)

    monkeypatch.setattr(norm, "plan", with_programs)
    in_turn = results()
    with interleaved(monkeypatch, seed, resident):
        mixed = results()
    assert plan(2, 6, 64, 32, 3, 4, False, 132).whole, "the real plan of this map has nothing to wait for"
    assert all(torch.equal(one, other) for one, other in zip(in_turn, mixed, strict=True))
