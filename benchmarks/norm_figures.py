"""Times group_norm_silu by each way that it can run, beside a copy and the compiled definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
from fastdiff.kernels import reference
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.figure_rows import Bench, Row, Sums, dtype_name, map_bytes
from benchmarks.step_calls import realised, training_calls
from fastdiff.config.sections import Config
from fastdiff.precompile import Call

WAYS = ("whole", "128 rows", "256 rows", "512 rows")
MOST_WHOLE = 1 << 20
"""Bytes of a slab beyond which no single program is timed on it."""


class NoSuchWay(Exception):
    """A norm of this shape can't run the way that is forced."""


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Make group_norm_silu run one way; the op raises NoSuchWay if its shape does not allow it. "" forces nothing."""
    from fastdiff.kernels import group_norm_silu as norm
    from fastdiff.kernels.group_norm_silu_plan import RESIDENT, arranged

    chosen_by = norm.plan
    if not way:
        yield
        return

    def plan(B: int, L: int, C1: int, C2: int, group: int, itemsize: int, backward: bool, units: int) -> Any:
        usual = chosen_by(B, L, C1, C2, group, itemsize, backward, units)
        if way_of(usual) == way:
            return usual
        whole = way == "whole"
        rows = -(-L // usual.block_l) * usual.block_l if whole else int(way.split()[0])
        slab = rows * usual.tiles * usual.block_c * itemsize
        if (slab > MOST_WHOLE) if whole else (rows >= L):
            raise NoSuchWay(f"{way} on {L} pixels of {C1 + C2} channels")
        blocks = {"block_c": usual.block_c, "block_l": usual.block_l, "rows": rows, "whole": whole}
        return arranged(B, L, C1 + C2, group, itemsize, RESIDENT * units, **blocks)

    with mock.patch.object(norm, "plan", plan):
        yield


def way_of(plan: Any) -> str:
    """The way that a plan of group_norm_silu goes: a whole slab for each program, or parts of so many pixels."""
    return "whole" if plan.whole else f"{plan.rows} rows"


@contextmanager
def ways_taken(taken: list[str]) -> Iterator[None]:
    """Collect the ways of the plans that are made."""
    from fastdiff.kernels import group_norm_silu as norm

    chosen_by = norm.plan

    def plan(*args: Any) -> Any:
        made = chosen_by(*args)
        taken.append(way_of(made))
        return made

    with mock.patch.object(norm, "plan", plan):
        yield


_AFTER = "skip weight bias scale shift"
NORM_ARGUMENTS = {
    "fastdiff::group_norm_silu": f"x {_AFTER} offset seed num_groups eps silu dropout".split(),
    "fastdiff::add_group_norm_silu": f"x b b_bias {_AFTER} offset seed num_groups eps silu dropout".split(),
    "fastdiff::group_norm_silu_backward": (
        f"dy dtotal dtotal_more dskip_other x b_bias {_AFTER} offset seed stats num_groups silu dropout".split()
    ),
}


@dataclasses.dataclass
class Norm:
    """A call of one of the three ops, with its arguments by name."""

    call: Call

    def __post_init__(self) -> None:
        self.given = self.named(self.call.args)
        self.direction = "backward" if "dy" in self.given else "forward"
        names = ("dtotal",) if self.direction == "backward" else ("b", "b_bias")
        self.summed = any(self.given.get(name) is not None for name in names)

    def named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(NORM_ARGUMENTS[self.call.op], args, strict=True))

    @property
    def shape(self) -> str:
        x, skip = self.given["x"], self.given["skip"]
        B, C, H, W = x.shape
        channels = f"{C}+{skip.shape[1]}" if skip is not None else f"{C}"
        has = {"sum": self.summed, "scale": self.given["scale"] is not None}
        has |= {name: bool(self.given[name]) for name in ("silu", "dropout")}
        return " ".join([f"{B}x{channels}x{H}x{W}", *(name for name, there in has.items() if there)])

    def tensors(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """The op's arguments as the definition in PyTorch takes them; a backward's second summand is random."""
        named = self.named(args)
        if self.summed and "b" not in named:
            named["b"] = torch.randn_like(named["x"])
        names = ["x", "weight", "bias", "scale", "shift", "skip", "offset", *(["b", "b_bias"] if self.summed else [])]
        return {name: named[name] for name in names if named.get(name) is not None}

    def definition(self, norms: Any = reference) -> Callable[..., Any]:
        """The op in PyTorch, or by another module's functions, of the values of `tensors`."""
        names = list(self.tensors(self.call.args))
        settings = {name: self.given[name] for name in ("num_groups", "silu", "dropout")}

        def function(*values: Tensor) -> Any:
            named = dict(zip(names, values, strict=True))
            x, weight, bias = named.pop("x"), named.pop("weight"), named.pop("bias")
            if self.summed:
                return norms.add_group_norm_silu(x, named.pop("b", None), weight, bias, **named, **settings)
            return norms.group_norm_silu(x, weight, bias, **named, **settings)

        return function


def norms(bench: Bench, cases: Sequence[tuple[str, Config, int]]) -> None:
    """Emit the rows of the section "norms", and their sums per step."""
    for name, config, batch in cases:
        recorded = training_calls(config, batch, bench.dtype, r"fastdiff::(add_)?group_norm_silu")
        calls = [(Norm(call).direction, call) for call in recorded]
        label: Row = {"section": "norms", "config": name, "batch": batch}
        sums = Sums(calls)
        try:
            for _, call, rank in bench.costliest(calls, map_bytes):
                _norm_rows(bench, label, Norm(call), rank < bench.compiled, sums)
        finally:
            sums.emit(bench.emit, {**label, "what": "sum"})


def _norm_rows(bench: Bench, label: Row, norm: Norm, compiled: bool, sums: Sums) -> None:
    call, direction, moved = norm.call, norm.direction, map_bytes(norm.call)
    label = {**label, "op": call.op.split("::")[1], "direction": direction, "shape": norm.shape}
    label |= {"dtype": dtype_name(norm.given["x"].dtype), "count": call.count}

    def copied(i: int) -> Any:
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=bench.device)
        return torch.Tensor.copy_, (torch.empty_like(source), source)

    sums.add(direction, "copy", bench.row({**label, "way": "copy"}, copied, moved=moved), call.count)
    if bench.runs_kernels:
        _rows_of_ways(bench, label, call, moved, sums)
    way = "compiled" if bench.device.type == "cuda" else "eager"
    if compiled:
        figure = bench.row({**label, "way": way}, _definition(bench, norm), moved=moved)
        sums.add(direction, way, figure, call.count)


def _rows_of_ways(bench: Bench, label: Row, call: Call, moved: int, sums: Sums) -> None:
    """Emit a row of the planned way and one of each other way that the shape allows, with the error of its results."""
    planned: list[str] = []
    function, best = call.function(), None
    try:
        with ways_taken(planned):
            usual = function(*realised(call, 0, bench.device))
    except Exception as error:
        bench.leave_out({**label, "way": "planned"}, error)
        return
    for way in dict.fromkeys([planned[0], *WAYS]):
        is_planned = way == planned[0]
        row = {**label, "way": way, "planned": is_planned}
        with forced("" if is_planned else way):
            try:
                off = difference(function(*realised(call, 0, bench.device)), usual)
            except NoSuchWay:
                continue
            except Exception as error:
                bench.leave_out(row, error)
                continue
            make = lambda i: (function, realised(call, i, bench.device))
            figure = bench.row(row, make, moved=moved, difference=off)
        if is_planned:
            sums.add(label["direction"], "planned", figure, call.count)
        if figure is not None and (best is None or figure.microseconds < best.microseconds):
            best = figure
    sums.add(label["direction"], "the fastest way", best, call.count)


def difference(got: Any, wanted: Any) -> float:
    """The greatest difference of any result, as a share of that result's greatest magnitude; NaN if one has a NaN."""
    shares = [0.0]
    for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        if b.numel():
            a, b = a.float(), b.float()
            shares.append(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return float(torch.tensor(shares).max())  # which is NaN where one is


def _definition(bench: Bench, norm: Norm) -> Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Function and arguments for `Bench.row`: the definition in PyTorch, compiled on a GPU, or its backward pass."""
    run, call = norm.definition(), norm.call
    if bench.device.type == "cuda":
        torch.compiler.reset()  # or torch.compile gives up after some shapes and runs eagerly
        run = torch.compile(run, fullgraph=True, dynamic=False)

    def forward(i: int) -> Any:
        return torch.no_grad()(run), tuple(norm.tensors(realised(call, i, bench.device)).values())

    def backward(i: int) -> Any:
        args = realised(call, i, bench.device)
        leaves = [x.requires_grad_() for x in norm.tensors(args).values()]
        with torch._functorch.config.patch(donated_buffer=False):  # the backward pass is timed again and again
            results = run(*leaves)
        given = norm.named(args)
        upstream = [given[name] for name in ("dtotal", "dtotal_more", "dy") if given[name] is not None]
        if len(upstream) == 3:  # the sum has two readers besides the norm
            results = (results[0], *results)
        return partial(torch.autograd.grad, retain_graph=True), (results, leaves, upstream)

    return forward if norm.direction == "forward" else backward
