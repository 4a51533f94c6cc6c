"""What single kernels reach at the shapes of whole networks: norms, convolutions and attention, row by row.

    python benchmarks/kernel_figures.py --json figures.jsonl                          all sections
    python benchmarks/kernel_figures.py --sections norms --most 4 --seconds 60
    python benchmarks/kernel_figures.py --tiny                                        the same on a CPU, in seconds

Shapes and counts per step are recorded from a training step without memory, the costliest come first, and a sum per
step ends each section. A row is printed and appended to --json as soon as it is known; one that fails says why.

norms         forward and backward of group_norm_silu by each way that it can run: "registers" and "loop" keep a slab
              of an image in one program, "split" spreads an image over programs. Beside it a plain copy of the same
              bytes, and the definition compiled by torch.compile, for the --compiled costliest.
convolutions  forward, dgrad and wgrad through cuDNN, and the matrix products that 1x1 convolutions are here.
attention     ours against torch's backends, for the shapes of every configuration, forward and backward.

GB/s count the least bytes that must be moved, TFLOP/s the products, and shares are of a large copy and of a large
matrix product on the same GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._functorch.config
from fastdiff.kernels import reference
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff import compilation
from fastdiff.config import Config
from fastdiff.hardware import Rates, device_name, measure_rates
from fastdiff.models.work import operations
from fastdiff.op_calls import Call
from fastdiff.processes import run_script
from fastdiff.settings import UserError, shortened

try:  # run as a script, or imported beside its neighbours
    import bench_attention
    from bench_train import CONFIGS, QUICK, chosen, load
    from gpu_timing import Figure, own_stream, rotated, time_calls
    from op_calls import realised, training_calls
    from roofline import usual_batch
except ImportError:
    from benchmarks import bench_attention
    from benchmarks.bench_train import CONFIGS, QUICK, chosen, load
    from benchmarks.gpu_timing import Figure, own_stream, rotated, time_calls
    from benchmarks.op_calls import realised, training_calls
    from benchmarks.roofline import usual_batch

Row = dict[str, Any]
Emit = Callable[[Row], None]
WAYS = ("registers", "loop", "split")


class OutOfTime(Exception):
    """The section's seconds are used up."""


class NoSuchWay(Exception):
    """A norm of this shape can't run the way that is forced."""


@dataclasses.dataclass
class Bench:
    """Where figures are made and where rows go."""

    device: torch.device
    rates: Rates
    emit: Emit
    rounds: int = 15
    most: int = 0
    """Only so many shapes of each kind, the costliest; 0 for all."""
    compiled: int = 6
    """For so many shapes of norms, forward and backward, torch.compile is timed as well; each compiles for seconds."""
    until: float = float("inf")
    """On time.monotonic(): no row begins later."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def runs_kernels(self) -> bool:
        return self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

    def row(
        self,
        label: Row,
        make: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]],
        moved: float = 0,
        flops: float = 0,
        **more: Any,
    ) -> Figure | None:
        """Emit one row. make(i) → (function, the i-th set of arguments). An exception gives a row without figures."""
        if time.monotonic() > self.until:
            raise OutOfTime
        try:
            function, first_given = make(0)
            inputs = rotated(lambda i: make(i)[1] if i else first_given)
            figure = time_calls(function, inputs, self.device, self.rounds)
        except Exception as error:  # what one kernel refuses costs its row only
            self.leave_out(label, error)
            return None
        self.emit({**label, **self._figures(figure, moved, flops), **more})
        return figure

    def leave_out(self, label: Row, error: Exception) -> None:
        """Emit a row without figures, with the reason."""
        first = next(iter(str(error).splitlines()), "")
        self.emit({**label, "left_out": shortened(f"{type(error).__name__}: {first}", 300)})

    def _figures(self, figure: Figure, moved: float, flops: float) -> Row:
        seconds = figure.microseconds / 1e6
        row: Row = {
            "microseconds": round(figure.microseconds, 2),
            "quartiles": [round(figure.low, 2), round(figure.high, 2)],
            "launched": figure.launched,
        }
        if moved:
            rate = moved / seconds
            share = rate / self.rates.copy_bytes
            row |= {"bytes": moved, "GB/s": round(rate / 1e9, 1), "share of copy": round(share, 3)}
        if flops:
            rate = flops / seconds
            share = rate / self.rates.matmul_flops
            row |= {"flops": flops, "TFLOP/s": round(rate / 1e12, 2), "share of matmul": round(share, 3)}
        return row

    def costliest(
        self, calls: Sequence[tuple[str, Call]], cost: Callable[[Call], float]
    ) -> Iterator[tuple[str, Call, int]]:
        """(direction, call, its rank in its direction) by what calls cost in a step, the most first; `most` of each."""
        ranks: Counter[str] = Counter()
        for direction, call in sorted(calls, key=lambda given: -cost(given[1]) * given[1].count):
            if not self.most or ranks[direction] < self.most:
                yield direction, call, ranks[direction]
                ranks[direction] += 1


class Sums:
    """Milliseconds per step of each direction and way, and how many of a step's calls they cover."""

    def __init__(self, calls: Sequence[tuple[str, Call]]) -> None:
        self.ms: dict[tuple[str, str], float] = defaultdict(float)
        self.covered: Counter[tuple[str, str]] = Counter()
        self.all: Counter[str] = Counter()
        for direction, call in calls:
            self.all[direction] += call.count

    def add(self, direction: str, way: str, figure: Figure | None, count: int) -> None:
        if figure is not None:
            self.ms[direction, way] += figure.microseconds * count / 1e3
            self.covered[direction, way] += count

    def emit(self, emit: Emit, label: Row) -> None:
        for (direction, way), ms in self.ms.items():
            covered = {"calls": self.covered[direction, way], "of": self.all[direction]}
            emit({**label, "direction": direction, "way": way, "ms_per_step": round(ms, 3), **covered})


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def map_bytes(call: Call) -> int:
    """Bytes of all maps [B, C, H, W] among the arguments and results of a call: the least that it must move."""
    return sum(x.nbytes for x in tree_leaves((call.args, call.results())) if isinstance(x, Tensor) and x.dim() == 4)


# --- norms ---


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Let group_norm_silu run one way; the op raises NoSuchWay where its shape does not allow it. "" forces nothing."""
    from fastdiff.kernels import group_norm_silu as norm

    chosen_by = norm.plan
    if not way:
        yield
        return

    def plan(
        B: int, L: int, C1: int, C2: int, group: int, itemsize: int, backward: bool, units: int, *rest: bool
    ) -> Any:
        usual = chosen_by(B, L, C1, C2, group, itemsize, backward, units, *rest)
        if way_of(usual) == way:
            return usual
        if way == "split":
            rows = min(usual.rows, 2048 // usual.block_c)
            return dataclasses.replace(usual, slab=False, one_block=False, block_l=rows, num_warps=4)
        tile = norm.Tile.of(C1 + C2, group, 8, 32 // itemsize, 64)
        if way != "loop" or tile.padded > 128:
            raise NoSuchWay(f"{way} on {L} pixels of {C1 + C2} channels")
        slabs = B * ((C1 + C2) // tile.channels)
        summed = len(rest) > 1 and rest[1]
        few = backward or (summed and tile.padded > 64)
        length = min((4096 if few else 8192) // tile.padded, 1 << (L - 1).bit_length())
        return dataclasses.replace(
            usual,
            slab=True,
            one_block=False,
            tile=tile,
            block_l=length,
            num_warps=16,
            programs=min(slabs, units),
        )

    with mock.patch.object(norm, "plan", plan):
        yield


def way_of(plan: Any) -> str:
    """The way that a plan of group_norm_silu goes, one of WAYS."""
    return "split" if not plan.slab else "registers" if plan.one_block else "loop"


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
    "fastdiff::group_norm_silu_backward": f"dy dtotal x b_bias {_AFTER} seed stats num_groups silu dropout".split(),
}


@dataclasses.dataclass
class Norm:
    """A call of one of the three ops, its arguments by their names."""

    call: Call

    def __post_init__(self) -> None:
        self.given = self.named(self.call.args)
        self.direction = "backward" if "dy" in self.given else "forward"
        self.summed = self.given.get("b") is not None or self.given.get("dtotal") is not None

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
        """What the definition in PyTorch takes of the op's arguments; the second summand of a backward is made up."""
        named = self.named(args)
        if self.summed and "b" not in named:
            named["b"] = torch.randn_like(named["x"])
        names = ["x", "weight", "bias", "scale", "shift", "skip", "offset", *(["b", "b_bias"] if self.summed else [])]
        return {name: named[name] for name in names if named.get(name) is not None}

    def definition(self) -> Callable[..., Any]:
        """The op in PyTorch, of the values of `tensors`."""
        names = list(self.tensors(self.call.args))
        settings = {name: self.given[name] for name in ("num_groups", "silu", "dropout")}

        def function(*values: Tensor) -> Any:
            named = dict(zip(names, values, strict=True))
            x, weight, bias = named.pop("x"), named.pop("weight"), named.pop("bias")
            if "b" in named:
                return reference.add_group_norm_silu(x, named.pop("b"), weight, bias, **named, **settings)
            return reference.group_norm_silu(x, weight, bias, **named, **settings)

        return function


def norms(bench: Bench, cases: Sequence[tuple[str, Config, int]]) -> None:
    """Rows of the section "norms", and their sums per step."""
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
    """A row as planned, and one for each other way that the shape allows, with how far its results are off."""
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
    """For `Bench.row`: the definition in PyTorch, compiled on a GPU, or its backward pass, and arguments."""
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
        upstream = [given["dtotal"], given["dy"]] if norm.summed else [given["dy"]]
        return partial(torch.autograd.grad, retain_graph=True), (results, leaves, upstream)

    return forward if norm.direction == "forward" else backward


# --- convolutions ---


def convolutions(bench: Bench, cases: Sequence[tuple[str, Config, int]]) -> None:
    """Rows of the section "convolutions", and their sums per step."""
    for name, config, batch in cases:
        label: Row = {"section": "convolutions", "config": name, "batch": batch}
        recorded = training_calls(config, batch, bench.dtype, r"aten::(convolution|mm$|addmm$)")
        calls = [part for call in recorded for part in _parts(call, bench.dtype)]
        sums = Sums(calls)
        try:
            for direction, call, _ in bench.costliest(calls, flops_of):
                kind, shape = described(call)
                row = {**label, "layer": kind, "direction": direction, "shape": shape}
                row |= {"dtype": dtype_name(call.args[1].dtype), "count": call.count}
                make = lambda i, call=call: (torch.no_grad()(call.function()), realised(call, i, bench.device))
                figure = bench.row(row, make, flops=flops_of(call))
                sums.add(direction, "cuBLAS" if direction == "product" else "cuDNN", figure, call.count)
        finally:
            sums.emit(bench.emit, {**label, "what": "sum"})


def _parts(call: Call, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """(direction, call): a backward call as dgrad and wgrad; products in the body's dtype only: no embedding's."""
    if call.op == "aten::convolution":
        yield "forward", call
    elif call.op == "aten::convolution_backward":
        wanted = call.args[-1]
        for i, direction in enumerate(("dgrad", "wgrad")):
            if wanted[i]:
                mask = [i == 0, i == 1, False]
                yield direction, Call(call.op, (*call.args[:-1], mask), call.count)
    elif call.args[-1].dtype == dtype:
        yield "product", call


def described(call: Call) -> tuple[str, str]:
    """(kind, shape) of a convolution: the maps and the taps; of a product: rows, inner and columns."""
    if "conv" not in call.op:
        (M, K), N = call.args[-2].shape, call.args[-1].shape[1]
        return "product", f"{M}x{K}x{N}"
    backward = call.op.endswith("backward")
    x, weight = (call.args[1], call.args[2]) if backward else call.args[:2]
    stride, transposed = (call.args[4], call.args[7]) if backward else (call.args[3], call.args[6])
    taps = "x".join(map(str, weight.shape[2:]))
    kind = f"{taps} transposed" if transposed else taps if stride[0] == 1 else f"{taps} strided"
    C_out = weight.shape[1] if transposed else weight.shape[0]
    return kind, f"{'x'.join(map(str, x.shape))} to {C_out}"


def flops_of(call: Call) -> float:
    """2 * multiplications, of a product or of a convolution in any direction."""
    if "conv" not in call.op:
        return 2.0 * call.args[-2].numel() * call.args[-1].shape[1]
    backward = call.op.endswith("backward")
    x, weight = (call.args[1], call.args[2]) if backward else call.args[:2]
    transposed = call.args[7] if backward else call.args[6]
    y = call.args[0] if backward else call.results()
    return 2.0 * (x if transposed else y).numel() * weight[0].numel()


# --- attention ---

BACKENDS = ("ours", "cudnn", "flash", "efficient")


def attention(bench: Bench, cases: Sequence[tuple[str, Config, int]]) -> None:
    """Rows of the section "attention". A shape that several configurations have is timed once."""
    shapes: dict[bench_attention.Shape, Counter[str]] = defaultdict(Counter)
    for name, config, batch in cases:
        for op in operations(config.model):
            if op.kind == "attention":
                heads, L, D = op.shape
                shapes[bench_attention.Shape(batch, L, heads, D)][name] += 1
    cost = lambda item: -item[0].B * item[0].N * item[0].L ** 2 * item[0].D * max(item[1].values())
    ordered = sorted(shapes.items(), key=cost)
    for shape, counts in ordered[: bench.most] if bench.most else ordered:
        elements = shape.B * shape.L * shape.N * shape.D
        size = torch.empty((), dtype=bench.dtype).itemsize
        label: Row = {"section": "attention", "shape": str(shape), "dtype": dtype_name(bench.dtype)}
        for direction, maps, products in (("forward", 4, 4), ("backward", 7, 10)):
            for backend in BACKENDS if bench.runs_kernels else BACKENDS[1:]:
                row = {**label, "direction": direction, "way": backend, "count": dict(counts)}
                make = partial(_attention, bench, shape, backend, direction)
                bench.row(row, make, moved=maps * elements * size, flops=products * shape.L * elements)


def _attention(
    bench: Bench, shape: bench_attention.Shape, backend: str, direction: str, i: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    attend = bench_attention.ROWS[backend]()
    B, L, N, D = shape
    generator = torch.Generator(bench.device).manual_seed(i)
    options: dict[str, Any] = {"generator": generator, "device": bench.device, "dtype": bench.dtype}
    qkv = torch.randn(B, L, 3 * N * D, **options)
    if direction == "forward":
        return torch.no_grad()(attend), (qkv, N)
    return bench_attention.backward, (attend(qkv.requires_grad_(), N), qkv, torch.randn(B, L, N * D, **options))


# --- the command ---

SECTIONS: dict[str, Callable[[Bench, Sequence[tuple[str, Config, int]]], None]] = {
    "norms": norms,
    "convolutions": convolutions,
    "attention": attention,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="all", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--configs", default="imagenet64_270M,cifar10_uncond", help="names in configs/, or JSON files")
    parser.add_argument("--batches", default="128,256", help="images of each, in that order")
    parser.add_argument("--most", type=int, default=0, help="only so many shapes of each kind, the costliest; 0: all")
    parser.add_argument("--compiled", type=int, default=6, help="so many shapes of norms are timed compiled as well")
    parser.add_argument("--rounds", type=int, default=15, help="that the median is taken of")
    parser.add_argument("--seconds", type=float, default=0, help="no row of a section begins later than that; 0: ever")
    parser.add_argument("--tiny", action="store_true", help="a small network, few shapes, one round")
    parser.add_argument("--json", type=Path, help="append rows here, one JSON object a line")
    return parser.parse_args(argv)


def cases_of(args: argparse.Namespace) -> list[tuple[str, Config, int]]:
    """(name, configuration, batch) of the flags."""
    if args.tiny:
        model = {**QUICK["model"], "image_size": 8, "num_channels": 32, "attention_resolutions": "4"}
        return [("tiny", Config.model_validate({**QUICK, "model": model}), 2)]
    names = [name.strip() for name in args.configs.split(",")]
    try:
        batches = [int(batch) for batch in args.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches: {args.batches} must be whole numbers such as 128,256") from None
    if len(batches) != len(names) or min(batches) < 1:
        raise UserError(f"--batches: give a number of images for each of {', '.join(names)}, not {args.batches}")
    return [(name, load(name), batch) for name, batch in zip(names, batches, strict=True)]


def with_all_configs(cases: list[tuple[str, Config, int]]) -> list[tuple[str, Config, int]]:
    """The cases, and every other shipped configuration at its usual batch."""
    named = {name for name, _, _ in cases}
    others = [path.stem for path in sorted(CONFIGS.glob("*.json")) if path.stem not in named]
    return [*cases, *((name, load(name), usual_batch(load(name))) for name in others)]


def line_of(row: Row) -> str:
    """A row for people."""
    rest = {key: value for key, value in row.items() if key not in ("section", "microseconds")}
    time_taken = f"{row['microseconds']:10.2f} us" if "microseconds" in row else f"{'':13}"
    return f"{row['section']:13}{time_taken}  " + "  ".join(f"{key} {value}" for key, value in rest.items())


def measure(
    sections: Sequence[str],
    cases: list[tuple[str, Config, int]],
    device: torch.device,
    emit: Emit,
    seconds: float = 0,
    tiny: bool = False,
    **settings: Any,
) -> None:
    """Rows of the sections; `seconds` are each one's at most, 0 without a limit; settings are those of `Bench`."""
    sizes: dict[str, int] = {"size": 256, "copy_size": 1 << 20} if tiny else {}
    rates = measure_rates(device, **sizes)
    known = {"matmul_tflops": rates.matmul_flops / 1e12, "copy_gbs": rates.copy_bytes / 1e9}
    emit({"section": "machine", "device": device_name(device), "torch": torch.__version__, **known})
    for name in sections:
        until = time.monotonic() + seconds if seconds else float("inf")
        bench = Bench(device, rates, emit, until=until, **settings)
        shown = with_all_configs(cases) if name == "attention" and not tiny else cases
        try:
            with own_stream(device):
                SECTIONS[name](bench, shown)
        except OutOfTime:
            emit({"section": name, "left_out": f"what would begin after {seconds:g} s"})


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sections = chosen(args.sections, list(SECTIONS), list(SECTIONS), "--sections")
    cases = cases_of(args)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    compilation.keep_compiled_code()
    compilation.prepare_cudnn()
    if args.tiny:
        args.most, args.rounds = args.most or 2, 1

    def emit(row: Row) -> None:
        print(line_of(row), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")

    settings = {"rounds": args.rounds, "most": args.most, "compiled": args.compiled}
    measure(sections, cases, device, emit, args.seconds, args.tiny, **settings)


if __name__ == "__main__":
    run_script(main, "kernel_figures.py")
