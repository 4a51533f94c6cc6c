"""Ops can be defined again, and have no derivative unless they say so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fastdiff.kernels.adamw_ema import squared_norm
from fastdiff.kernels.attention import attention
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.launch import launcher, once_per_layout
from fastdiff.kernels.q_sample import q_sample
from helpers.kernel_checks import DEVICE, channels_last, normal

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore:.*another layout")  # that of a gradient of ones
def test_no_second_derivative() -> None:
    """It is an error, where PyTorch would take it for zero."""
    x, one = channels_last(normal(1, 32, 4, 4)).requires_grad_(), torch.ones(32, device=DEVICE)
    for y in (group_norm_silu(x, one, one), attention(x.flatten(2).transpose(1, 2).repeat(1, 1, 3), 2)):
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert dx.isfinite().all()
        with pytest.raises(RuntimeError, match=r"the backward pass of \w+ has no derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_no_derivative() -> None:
    x = channels_last(normal(2, 3, 4, 4)).requires_grad_()
    y = q_sample(x, normal(2, 2), normal(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="fastdiff::q_sample has no derivative"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="fastdiff::squared_norm has no derivative"):
        squared_norm([torch.ones(3, device=DEVICE, requires_grad=True)]).backward()


def test_numbers_of_another_type() -> None:
    """1, 1.0 and True are different arguments of a kernel."""
    made = [launcher(squared_norm, (1,), number) for number in (1, 1.0, True, 1)]
    assert len({id(each) for each in made}) == 3
    assert made[0] is made[3]


def test_defined_again() -> None:
    """A file of kernels can be reloaded, and so can the one that registers them."""
    program = """
        import importlib, torch
        from fastdiff.kernels import launch, noise
        index = torch.arange(3)
        expected = noise.image_uniform(1, index, 0)
        for modules in ([noise], [launch, noise]):
            for module in modules:
                importlib.reload(module)
            assert torch.equal(noise.image_uniform(1, index, 0), expected)
        importlib.reload(launch)
        assert torch.equal(noise.image_uniform(1, index, 0), expected)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_once_per_layout() -> None:
    """The function is called again for another shape, stride, dtype or number, and for None in a tensor's place."""
    calls = []
    prepared = once_per_layout(lambda *args: calls.append(args) or len(calls))
    x = torch.zeros(4, 6)
    given = [(x, 1), (x.T, 1), (x[:2], 1), (x.double(), 1), (x, 2), (None, 1)]
    assert [prepared(*args) for args in given] == [1, 2, 3, 4, 5, 6]
    assert [prepared(*args) for args in given] == [1, 2, 3, 4, 5, 6]
    assert prepared(torch.ones(4, 6), 1) == 1
