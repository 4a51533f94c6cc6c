"""Lists the Triton kernels that torch.compile launches for a function, without running them.

It needs the simulated GPU (`rehearsal/run.py`): Inductor writes its code for a GPU only where PyTorch finds one. Each
launch is given in all configurations among which Inductor would choose by timing them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from fastdiff.kernels.launch import Launch, Work
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass
class Traced:
    """What a function launches in one direction."""

    launches: list[list[Launch]] = field(default_factory=list)
    """Triton kernels in their order, each in the configurations among which its maker would choose."""
    others: list[str] = field(default_factory=list)
    """Names of what libraries and PyTorch compute beside them: a convolution, seeds of random numbers."""
    other_bytes: list[float] = field(default_factory=list)
    """Bytes that each of `others` reads and writes; empty where they aren't counted."""


def kernels_of(function: Callable[..., Any], tensors: Sequence[Tensor], **options: Any) -> dict[str, Traced]:
    """The graphs "forward" and "backward" of the compiled function of tensors on the simulated GPU.

    Gradients are those of all tensors that require one; without any there is no backward graph. All maps that enter or
    leave are channels-last, also the gradients, as between convolutions of a compiled network. The options are those
    of torch._inductor.config.
    """
    torch.compiler.reset()
    entering = lambda x: _Entering.apply(x) if x.requires_grad else x
    whole = lambda *given: _to_channels_last(function(*map(entering, given)))
    compiled = torch.compile(whole, fullgraph=True, dynamic=False)
    found = {}
    with _recorded(**options) as found["forward"]:
        results = compiled(*tensors)
    if any(x.requires_grad for x in tensors):
        with _recorded(**options) as found["backward"]:
            gradients(results, tensors)
    return found


def gradients(results: Any, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of results for the tensors that require them, with any upstream gradients."""
    made = [x for x in tree_leaves(results) if x.requires_grad]
    wanted = [x for x in tensors if x.requires_grad]
    return torch.autograd.grad(made, wanted, [torch.empty_like(x) for x in made], allow_unused=True)


def _to_channels_last(values: Any) -> Any:
    as_map = lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    return tree_map_only(Tensor, as_map, values)


class _Entering(torch.autograd.Function):
    """A tensor that the graph before computed: its gradient leaves as a channels-last map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _to_channels_last(gradient)


@contextmanager
def _recorded(**options: Any) -> Iterator[Traced]:
    """Record the launches of what Inductor compiles and calls in here, instead of compiling and making them."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.graph import GraphLowering

    traced = Traced()

    class Kernel:
        def __init__(self, _: AsyncCompile, name: str, source: str, device_str: str = "") -> None:
            module = PyCodeCache.load(source)
            module.WORK = {name: work}
            self.tuner = getattr(module, name)

        def run(self, *args: Any, stream: int) -> None:
            traced.launches.append(list(candidates(self.tuner, args)))

    def read(code: str) -> None:
        traced.others += re.findall(r"(?:extern_kernels|aten|torch\.ops\.\w+)\.([\w.]+)\(", code)

    triton = lambda *args, **options: Kernel(*args, **options)
    with (
        config.patch(fx_graph_cache=False, compile_threads=1, **options),
        mock.patch.object(AsyncCompile, "triton", triton),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(read)),
    ):
        yield traced


def candidates(tuner: Any, args: tuple[Any, ...]) -> Iterator[Launch]:
    """The launches of Inductor's kernel (a CachingAutotuner) in its configurations, on tensors without memory.

    Inductor also tries a loop's block of half the size where registers are scarce; here it is always one of them.
    """
    from torch._inductor.runtime.triton_heuristics import GridExpr, HeuristicType

    args = tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), args)
    numbers = dict(zip(tuner.fn.arg_names, args, strict=False))
    configs = list(tuner.configs)
    if tuner.heuristic_type == HeuristicType.REDUCTION:
        for halved in deepcopy(configs):
            largest = max((name for name in halved.kwargs if name.startswith("R")), key=halved.kwargs.__getitem__)
            halved.kwargs[largest] //= 2
            configs += [halved] if halved.kwargs[largest] >= 64 else []
    for each in configs:
        grid = GridExpr.from_meta(tuner.inductor_meta, each).eval_slow(numbers)
        yield Launch(tuner.fn, grid, args, dict(each.kwargs), each.num_warps, each.num_stages)


def work(launch: Launch) -> Work:
    """The least bytes of a launch of Inductor's kernel: its tensors, twice those that it both reads and writes.

    What it reads again, as in a second loop, is taken to come from a cache, however large the tensor is.
    """
    source = launch.kernel.src
    used = lambda name, call: bool(re.search(rf"\btl\.({call})\({name}\b", source))
    least = 0.0
    for name, value in launch.named().items():
        if isinstance(value, Tensor):
            least += value.nbytes * (used(name, "load|atomic_add") + used(name, "store|atomic_add"))
    digits = max((value.numel() for value in launch.args if isinstance(value, Tensor)), default=1).bit_length()
    return Work(turns={"bucketize_binary_search": digits}, least_bytes=least, l2_bytes=least)
