"""The norm's backward kernel adds up two gradients of its sum, where a graph or eager code would add them before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastdiff.kernels import gradient_sums, reference
from fastdiff.kernels.gradient_sums import BACKWARD, EagerSums, SumsInNorms
from fastdiff.kernels.group_norm_silu import add_group_norm_silu
from functorch.compile import make_boxed_func
from helpers.kernel_checks import DTYPES, assert_no_worse, channels_last, normal
from helpers.norm_plans import WAYS, planned
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.utils._python_dispatch import TorchDispatchMode

Inputs = dict[str, Tensor]


class Summands(TorchDispatchMode):
    """Record for every call of the backward op how many gradients of the sum it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name() == BACKWARD:
            self.counts.append(sum(each is not None for each in args[1:3]))
        return op(*args, **kwargs or {})


def inputs(dtype: torch.dtype) -> Inputs:
    make = lambda C, seed: channels_last(normal(2, C, 5, 3, seed=seed, dtype=dtype))
    given = {"a": make(64, 1), "b": make(64, 2), "skip": make(32, 3), "b_bias": normal(64, seed=4)}
    given |= {name: (value * 16).round() / 16 for name, value in given.items()}  # sums that are exact in bf16
    return {**given, "weight": normal(96, seed=5, mean=1.0), "bias": normal(96, seed=6)}


def readers(norm: Any, more: bool = False) -> Any:
    """A function of the norm's inputs whose results have two readers of the sum, and with `more` a third."""

    def read(**given: Tensor) -> tuple[Tensor, ...]:
        total, y = norm(**given)
        return total * 2, total * 3, y, *([total * 5] if more else [])

    return read


def gradients(function: Any, given: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in given.items()}
    results = function(**leaves)
    upstream = [channels_last(normal(*z.shape, seed=i, dtype=given["a"].dtype)).to(z) for i, z in enumerate(results)]
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), upstream), strict=True))


def compiled(function: Any, counts: list[int]) -> Any:
    """The function by AOTAutograd, with the pass on its backward graph; `counts` is that of `Summands`."""

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        SumsInNorms()(graph.graph)
        graph.graph.lint()
        norms = [node for node in graph.graph.nodes if BACKWARD.split("::")[1] in str(node.target)]
        counts.extend(sum(each is not None for each in node.args[1:3]) for node in norms)
        graph.recompile()
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both summands are added before the only rounding of dx, also where another map is read as a skip."""
    planned(monkeypatch, **WAYS[way])
    given = inputs(dtype)
    exact = gradients(readers(reference.add_group_norm_silu), given, torch.float64)
    theirs = gradients(readers(reference.add_group_norm_silu), given)
    with Summands() as seen, EagerSums():
        ours = gradients(readers(add_group_norm_silu), given)
    assert seen.counts == [2]
    for name in exact:
        assert_no_worse(ours[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("more", [False, True], ids=["two readers", "three readers"])
def test_a_compiled_graph(more: bool) -> None:
    """In float32 the bits are those of eager code; of three gradients two are added before."""
    given, function = inputs(torch.float32), readers(add_group_norm_silu, more)
    plain = gradients(function, given)
    counts: list[int] = []
    ours = gradients(compiled(function, counts), given)
    assert counts == [2]
    for name, gradient in plain.items():
        if more:  # summed in another order
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(ours[name], gradient), name


def test_other_sums_stay() -> None:
    """A sum of which one summand is expanded is computed as before."""
    given, counts = inputs(torch.float32), list[int]()

    def function(**given: Tensor) -> tuple[Tensor, ...]:
        total, y = add_group_norm_silu(**given)
        return total * 2, total.sum(dim=(2, 3), keepdim=True), y

    plain, ours = gradients(function, given), gradients(compiled(function, counts), given)
    assert counts == [1]
    assert all(torch.allclose(ours[name], plain[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("factor", [1, 3])
def test_sums_with_other_readers_stay(factor: int) -> None:
    """A sum that is also y's gradient, or that this is made of, is computed as before, in eager code too."""
    given = {name: value for name, value in inputs(torch.float32).items() if name != "skip"}
    given |= {name: given[name][:64] for name in ("weight", "bias")}

    def function(**given: Tensor) -> tuple[Tensor, ...]:
        total, y = add_group_norm_silu(**given)
        added = total + (y if factor == 1 else y * factor)
        return added * 2, added * 3

    counts: list[int] = []
    ours = gradients(compiled(function, counts), given)
    with Summands() as seen, EagerSums():
        plain = gradients(function, given)
    assert counts == seen.counts == [1]
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_version_is_the_code() -> None:
    """Inductor keeps compiled code by it, so that a change of the pass compiles anew."""
    assert SumsInNorms().uuid() == get_hash_for_files((gradient_sums.__file__,))
