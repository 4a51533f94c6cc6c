"""The first norm of a residual block and its shortcut's convolution, as one op, agree with float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastdiff.kernels import reference
from fastdiff.kernels.norm_and_shortcut import norm_and_shortcut
from helpers.kernel_checks import DEVICE, DTYPES, assert_no_worse, channels_last, normal
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Inputs = dict[str, Any]
KINDS = ("a", "a b b_bias", "a b_bias", "a skip", "a b b_bias skip", "a b_bias skip")
ALL = "a b b_bias skip"


def inputs(kind: str, dtype: torch.dtype, size: tuple[int, int] = (5, 3)) -> Inputs:
    """Make the parameters, and the maps and the bias that `kind` names."""
    make = lambda C, seed: channels_last(normal(2, C, *size, seed=seed, mean=0.5, dtype=dtype))
    C = 64 + (32 if "skip" in kind else 0)
    summands: Inputs = {"a": make(64, 0), "b": make(64, 1), "b_bias": normal(64, seed=5)}
    if dtype == torch.bfloat16 and DEVICE == "cpu" and kind not in ("a", "a skip"):  # the interpreter cuts bf16 off:
        summands = {name: (value * 16).round() / 16 for name, value in summands.items()}  # these sums are exact
    entering = {name: value for name, value in {**summands, "skip": make(32, 6)}.items() if name in kind.split()}
    conv_weight = (normal(40, C, seed=4) / 8).to(dtype)
    return {**entering, "weight": normal(C, seed=2, mean=1.0), "bias": normal(C, seed=3), "conv_weight": conv_weight}


def run(function: Any, given: Inputs, used: str, dtype: torch.dtype | None = None) -> Inputs:
    """Return results and gradients by name; `used` names the results whose gradients flow."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in given.items()}
    made = dict(zip(("x", "y", "shortcut"), function(**leaves), strict=True))
    upstream = {
        name: channels_last(normal(*z.shape, seed=i, mean=0.3).to(given["a"].dtype)).to(z.dtype)
        for i, (name, z) in enumerate(made.items())
    }
    names = used.split()
    gradients = torch.autograd.grad(
        [made[name] for name in names], list(leaves.values()), [upstream[name] for name in names], allow_unused=True
    )
    found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {name: z.detach() for name, z in made.items()} | found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(kind: str, dtype: torch.dtype) -> None:
    """Results and gradients err at most twice as much as PyTorch's, where x has a further reader if it is a sum."""
    given = inputs(kind, dtype)
    used = "x y shortcut" if "b_bias" in kind else "y shortcut"
    exact = run(reference.norm_and_shortcut, given, used, torch.float64)
    theirs = run(reference.norm_and_shortcut, given, used)
    ours = run(norm_and_shortcut, given, used)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_no_worse(ours[name], theirs[name], exact[name], name)
    assert all(ours[name].is_contiguous(memory_format=torch.channels_last) for name in ("y", "shortcut", "da"))


@pytest.mark.parametrize("used", ["y", "shortcut", "x y", "y shortcut"])
def test_results_without_readers(used: str) -> None:
    """A result that nothing reads contributes nothing to the gradients."""
    given = inputs(ALL, torch.float32)
    exact = run(reference.norm_and_shortcut, given, used, torch.float64)
    ours = run(norm_and_shortcut, given, used)
    for name, gradient in ours.items():
        if name in exact:
            assert torch.allclose(gradient.double(), exact[name], atol=1e-4), name
        else:
            assert not gradient.any(), name


@pytest.mark.filterwarnings("ignore:.*another layout")  # opcheck's own gradients are channels-first
@pytest.mark.parametrize("kind", ["a", "a b_bias", ALL])
def test_torch_checks(kind: str) -> None:
    given = inputs(kind, torch.float32, (2, 2))
    for value in given.values():
        value.requires_grad_()
    args = [given.get(name) for name in ("a", "b", "b_bias", "skip", "weight", "bias", "conv_weight")]
    torch.library.opcheck(torch.ops.fastdiff.norm_and_shortcut.default, (*args, 32, 1e-5))


def test_compiles_whole() -> None:
    given = inputs(ALL, torch.float32, (2, 2))
    function = lambda **kw: tuple(z * 2 for z in norm_and_shortcut(**kw))
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, plain = (run(f, given, "x y shortcut") for f in (whole, function))
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_empty_batch() -> None:
    given = {name: value[:0] if value.dim() == 4 else value for name, value in inputs(ALL, torch.float32).items()}
    ours = run(norm_and_shortcut, given, "y shortcut")
    assert ours["shortcut"].shape == (0, 40, 5, 3)
    assert not ours["dconv_weight"].any()


def test_bad_input() -> None:
    given: dict[str, Tensor] = inputs("a skip", torch.float32)
    with pytest.raises(ValueError, match="norm_and_shortcut needs skip in the dtype of x"):
        norm_and_shortcut(**{**given, "skip": given["skip"].half()})
