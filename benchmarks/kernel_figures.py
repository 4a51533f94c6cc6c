"""Times single kernels at the shapes of whole networks: norms, convolutions and attention.

    python benchmarks/kernel_figures.py --json figures.jsonl                          all sections
    python benchmarks/kernel_figures.py --sections norms --most 4 --seconds 60
    python benchmarks/kernel_figures.py --tiny                                        a small network, in seconds

Shapes and counts per step are recorded from a training step on tensors without memory. The costliest come first, and a
sum per step ends each section. A row is printed and appended to --json as soon as it is known; the row of a call that
fails gives the reason.

norms         forward and backward of group_norm_silu by each way that it can run: "whole" gives a slab of an image to
              one program, the others spread it over programs in parts of so many rows (pixels). Beside it a plain copy
              of the same bytes, and the definition compiled by torch.compile, for the --compiled costliest.
convolutions  forward, dgrad and wgrad through cuDNN, and the matrix products that 1x1 convolutions are here.
attention     ours against torch's own choice ("sdpa") and its backends, for the shapes of every configuration, forward
              and backward; choose_attention.py makes fastdiff's choice of them.

GB/s count the least traffic and TFLOP/s the products. Shares are of the rates of a large copy and of a large matrix
product on the same GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._functorch.config

from benchmarks import bench_attention
from benchmarks.bench_train import QUICK, chosen, config_names, load
from benchmarks.figure_rows import Bench, Emit, OutOfTime, Row, Sums, dtype_name
from benchmarks.flag_types import at_least
from benchmarks.gpu_timing import own_stream
from benchmarks.norm_figures import norms
from benchmarks.roofline import usual_batch
from benchmarks.step_calls import realised, training_calls
from fastdiff.attention_choices import WAYS
from fastdiff.config.sections import Config
from fastdiff.errors import UserError
from fastdiff.models.cost import operations
from fastdiff.precompile import Call
from fastdiff.runtime import machine
from fastdiff.runtime.machine import device_name, measure_rates
from fastdiff.runtime.script import run_script

# --- convolutions ---


def convolutions(bench: Bench, cases: Sequence[tuple[str, Config, int]]) -> None:
    """Emit the rows of the section "convolutions", and their sums per step."""
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
    """Yield (direction, call). A backward call gives dgrad and wgrad. Products not in the body's dtype are left out."""
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


def attention(bench: Bench, cases: Sequence[tuple[str, Config, int]]) -> None:
    """Emit the rows of the section "attention". A shape that several configurations have is timed once."""
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
            for backend in WAYS if bench.runs_kernels else WAYS[1:]:
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
    parser.add_argument("--most", type=at_least(0), default=0, help="shapes of each kind, the costliest; 0: all")
    parser.add_argument("--compiled", type=at_least(0), default=6, help="shapes of norms that are timed compiled, too")
    parser.add_argument("--rounds", type=at_least(1), default=15, help="that the median is taken of")
    parser.add_argument("--seconds", type=float, default=0, help="no row of a section begins later than that; 0: ever")
    parser.add_argument("--tiny", action="store_true", help="a small network, few shapes, one round")
    parser.add_argument("--json", type=Path, help="append rows here, one JSON object a line")
    return parser.parse_args(argv)


def cases_of(args: argparse.Namespace) -> list[tuple[str, Config, int]]:
    """(name, configuration, batch) of each case that the flags select."""
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
    others = [name for name in config_names() if name not in named]
    return [*cases, *((name, load(name), usual_batch(load(name))) for name in others)]


def line_of(row: Row) -> str:
    """The printed line of a row."""
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
    """Emit the rows of the sections, each in at most `seconds` (0: no limit). Settings are those of `Bench`."""
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
    machine.keep_compiled_code()
    machine.prepare_cudnn()
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
