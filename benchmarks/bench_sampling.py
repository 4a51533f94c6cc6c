"""Times drawing images: ours, ours with each lever off, the reference, and other libraries, in one process.

    python benchmarks/bench_sampling.py --quick --json quick.json                  two CPU cores, minutes
    python benchmarks/bench_sampling.py --configs imagenet64_270M --batches 256,16,1 --precisions bf16
    python benchmarks/bench_sampling.py --configs cifar10_uncond --levers all --seed_checkout improved-diffusion

All variants draw whole batches, from noise to pixels on the host, with equally many evaluations of a network. Their
batches take turns, and each round gives a ratio: the reference's time over ours, so that above 1 ours is faster.
`reference` is improved-diffusion's way (eager, channels-first, its p_sample loop; fp16 on a GPU, fp32 on a CPU).
`reference+channels-last`, `reference+compile`, `reference+max-autotune`, `diffusers` and `diffusers+max-autotune` are
networks in well-written loops (docs/benchmarks.md). They have DDPM and DDIM only, and take a DDPM step for each
evaluation of another solver. `ours -X` is ours without lever X, an optimisation, timed beside ours. --split adds how
our time is spent, and which share of a small job its files take. The last line has the ratios.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_train import batches_of, chosen, load, named, place, precisions_of
from benchmarks.contest import Contest, quartiles, speeds, times_as_fast
from benchmarks.flag_types import at_least, checkout_of_improved_diffusion, not_negative
from benchmarks.operations import executed_share, precision_of
from benchmarks.result_file import Label, ResultFile
from benchmarks.sampling_variants import (
    GPU_ONLY,
    LEVERS,
    Draw,
    DrawCase,
    diffusers,
    our_engine,
    ours,
    seed,
    strong_seed,
)
from benchmarks.variant_timing import seconds_of, start, synchronize
from fastdiff.config.sections import Config
from fastdiff.diffusion.solvers import SOLVERS
from fastdiff.models.cost import forward_flops
from fastdiff.models.unet import body_dtype
from fastdiff.runtime.machine import find, measure_rates
from fastdiff.runtime.script import run_script
from fastdiff.sampling.guided_network import GuidedNetwork
from fastdiff.sampling.job.job import run_job
from fastdiff.sampling.job.manifest import Job
from fastdiff.sampling.pictures import Images, to_uint8

VARIANTS: dict[str, Callable[[DrawCase], Draw]] = {
    "reference": seed,
    "reference+channels-last": functools.partial(strong_seed, compiled=False),
    "reference+compile": strong_seed,
    "reference+max-autotune": functools.partial(strong_seed, autotune=True),
    "diffusers": diffusers,
    "diffusers+max-autotune": functools.partial(diffusers, autotune=True),
    "ours": ours,
    "ours eager": lambda case: ours(case, compiled=False, cuda_graph=False),
}
Rows = list[dict[str, Any]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="cifar10_uncond", help="names in configs/, JSON files, or quick")
    parser.add_argument("--batches", default="", help="images at a time, each for every configuration")
    parser.add_argument("--precisions", default="", help="of fp32, bf16, fp16 (default: bf16 on a GPU, else fp32)")
    parser.add_argument("--solvers", default="ddpm", help=f"of {', '.join(SOLVERS)}")
    parser.add_argument("--steps", type=at_least(1), default=20, help="of the solver, in every batch drawn")
    parser.add_argument("--variants", default="", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--levers", default="", help=f"all, or of {', '.join(LEVERS)}: each is timed off")
    parser.add_argument("--split", action="store_true", help="also where our time goes, and what a job's files cost")
    parser.add_argument("--rounds", type=at_least(1), default=6, help="interleaved rounds that count")
    parser.add_argument("--seconds", type=not_negative, default=1.0, help="least length of a variant's turn in a round")
    parser.add_argument("--threads", type=at_least(0), default=0, help="on a CPU; 0: the cores that are free")
    parser.add_argument("--seed_checkout", type=checkout_of_improved_diffusion,
                        help="improved-diffusion's own code as the reference")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small network, few evaluations and rounds")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json already holds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    if args.quick:
        if args.configs != parser.get_default("configs"):
            parser.error("argument --quick: it has a network of its own; leave out --quick or --configs")
        args.configs, args.steps, args.split = "quick", 5, True
        args.rounds, args.seconds = min(args.rounds, 5), min(args.seconds, 0.7)
    return args


# --- throughput ---


def rows_of(
    case: DrawCase, config: str, built: dict[str, Any], times: dict[str, list[float]], base: str, args: Any
) -> Rows:
    """The table's rows of variants timed together; ratios are base's time over each one's."""
    evaluations, rows = case.evaluations, []
    for name, seconds in times.items():
        low, middle, high = quartiles(seconds)
        settings = case.config.model
        flops = forward_flops(settings) * case.batch * evaluations
        rows.append(
            {
                "config": config,
                "variant": name,
                "precision": case.precision,
                "computes": precision_of(name, case.precision, case.device),
                "batch": case.batch,
                "solver": case.solver,
                "steps": case.steps,
                "evaluations": evaluations,
                "ms": [1e3 * value / evaluations for value in (low, middle, high)],
                "images_per_second": [case.batch / value for value in (high, middle, low)],
                "evaluations_per_second": [case.batch * evaluations / value for value in (high, middle, low)],
                "ratio_to": base,
                **speeds(seconds, times.get(base), flops, executed_share(name, settings, training=False), args),
                "peak_memory_gb": built[name].peak_memory / 1e9,
                "start_seconds": built[name].start_seconds,
            }
        )
    return rows


def run_case(
    label: Label, case: DrawCase, variants: list[str], levers: list[str], results: ResultFile, args: Any
) -> None:
    """Time one configuration, precision, batch and solver: all variants in turns, then each lever beside ours."""
    makers = {variant: functools.partial(VARIANTS[variant], case) for variant in variants}
    if "reference" in makers and args.seed_checkout:
        makers["reference"] = lambda: seed(case, args.seed_checkout)
    without = {lever: functools.partial(ours, case, **LEVERS[lever]) for lever in levers}
    rows_from = lambda built, times, base: rows_of(case, label["config"], built, times, base, args)
    contest = Contest(label, case.device, rows_from, line_of, results, args.rounds, args.seconds)
    contest.time_variants(makers)
    contest.time_levers(without, lambda: ours(case))


def line_of(row: dict[str, Any]) -> str:
    low, ratio, high = row["ratio"] or [float("nan")] * 3
    mfu = row["mfu"] or row["mfu_measured"]
    return (
        f"  {row['config']:18}{row['precision']:6}{row['batch']:5} {row['solver']:10}{named(row):30}"
        f"{row['ms'][1]:9.2f} ms/evaluation{row['evaluations_per_second'][1]:10.4g} evaluations/s"
        f"{row['images_per_second'][1]:9.4g} images/s  {mfu:6.1%} model, {mfu * row['executed_share']:6.1%} executed"
        f"  {ratio:5.2f} ({low:.2f} .. {high:.2f}) x {row['ratio_to']}"
    )


def summary(rows: Rows) -> list[str]:
    """Ours (eager, where that alone was timed) over every variant beside it: medians of the rounds' ratios."""
    out = []
    keys = ("config", "precision", "batch", "solver")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        here = {row["variant"]: row for row in rows if tuple(row[name] for name in keys) == key}
        mine = next((name for name in ("ours", "ours eager") if name in here), None)
        others = [name for name in here if not name.startswith("ours")]
        if mine and others:
            against = ", ".join(
                f"{times_as_fast(here[mine], here[name]):.2f} x {named(here[name], here[mine])}" for name in others
            )
            out.append(f"{key[0]} {key[1]} batch {key[2]} {key[3]} {against}")
    return out


# --- where the time goes ---


class _Constant:
    """Stands in for a network and always gives the same output, so that only the sampler's step remains."""

    def __init__(self, network: GuidedNetwork, output: Tensor) -> None:
        self.input_format, self.epsilon = network.input_format, network.epsilon
        self.guided, self.conditioning, self.output = network.guided, network.conditioning, output

    def __call__(self, *_: Any) -> Tensor:
        return self.output

    def gradient(self, *_: Any) -> None:
        """There is no classifier."""


def median_seconds(work: Callable[[], Any], seconds: float) -> float:
    """The median of some repetitions, after one that is not timed."""
    work()
    times: list[float] = []
    while not times or sum(times) < seconds or len(times) < 5:
        times.append(seconds_of(work))
    return float(np.median(times))


def kernel_seconds(work: Callable[[], Any]) -> float:
    """Seconds for which the kernels and copies of one repetition keep the GPU busy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def split(case: DrawCase, compiled: bool, seconds: float) -> dict[str, float | None]:
    """Seconds per evaluation of ours: all, the sampler's step with its noise, the copy to the host, and the network.

    The network's time is what the others leave of all. gaps is the time in which the GPU is idle; None on a CPU.
    """
    gpu = case.device.type == "cuda"
    engine = our_engine(case, compiled, gpu)
    index, y, low_res = torch.arange(case.batch, device=case.device), case.kwargs.get("y"), case.kwargs.get("low_res")
    last = engine.draw(index, y, low_res)
    draw = lambda: to_uint8(engine.draw(index, y, low_res)).cpu()
    whole = median_seconds(draw, seconds)
    host = median_seconds(lambda: to_uint8(last).cpu(), seconds / 10)
    for _ in range(3 if gpu else 0):
        draw()
    gaps = whole - kernel_seconds(draw) if gpu else None
    idle = our_engine(case, False, gpu)
    model = case.config.model
    shape = (case.batch, model.out_channels, *model.size_hw)
    output = torch.randn(shape, device=case.device).contiguous(memory_format=torch.channels_last)
    idle.network = _Constant(idle.network, output)  # type: ignore[assignment]
    step = median_seconds(lambda: idle.draw(index, y, low_res), seconds)
    found = {"all": whole, "step": step, "to_host": host, "network": max(0.0, whole - step - host), "gaps": gaps}
    return {name: None if value is None else value / case.evaluations for name, value in found.items()}


def job_overhead(case: DrawCase, compiled: bool, parts: int) -> dict[str, float]:
    """Images, wall seconds, and the share of them not spent on drawing, of a job of `parts` batches."""
    engine = our_engine(case, compiled, case.device.type == "cuda")
    spent = 0.0

    def draw(index: np.ndarray, on_progress: Callable[[float], None]) -> Images:
        nonlocal spent
        start = time.perf_counter()
        count = len(index)
        given = {name: value[:count] for name, value in case.kwargs.items()}
        images = to_uint8(engine.draw(torch.from_numpy(index).to(case.device), **given)).cpu().numpy()
        spent += time.perf_counter() - start
        on_progress(count)
        return Images(images, None)

    draw(np.arange(case.batch), lambda images: None)
    spent = 0.0
    model = case.config.model
    shape = (*model.size_hw, model.in_channels)
    job = Job({"benchmark": "sampling"}, parts * case.batch, shape, False, 0, case.batch)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_job(draw, job, case.processes, Path(folder) / "job")
        wall = time.perf_counter() - start
    return {"images": job.count, "wall_seconds": wall, "drawing_seconds": spent, "overhead": 1 - spent / wall}


def split_lines(entry: dict[str, Any]) -> list[str]:
    """The printed lines of a split and a job."""
    parts, job = entry["split"], entry["job"]
    gaps = "launch gaps do not apply to a CPU" if parts["gaps"] is None else f"GPU idle {1e3 * parts['gaps']:.3f} ms"
    ms = ", ".join(f"{name} {1e3 * parts[name]:.3f}" for name in ("network", "step", "to_host"))
    return [
        f"  ms of {1e3 * parts['all']:.3f} per evaluation: {ms}; {gaps}",
        f"  a job of {job['images']} images: {job['wall_seconds']:.2f} s, of which {job['overhead']:.2%} not drawing",
    ]


# --- settings and main ---


def settings_of(args: Any, device: torch.device) -> tuple[list[tuple[str, Config]], list[int], list[str], list[str]]:
    """(configurations, batches, precisions, solvers) that the flags select on a device."""
    gpu = device.type == "cuda"
    configs = [(Path(name.strip()).stem, load(name.strip())) for name in args.configs.split(",")]
    batches = batches_of(args.batches) or ([8, 1] if args.quick else [8])
    precisions = precisions_of(args.precisions, ["bf16"] if gpu else ["fp32"], gpu)
    for precision in precisions:
        if not gpu and precision != "fp32" and body_dtype(precision, device) == torch.float32:
            print(f"this CPU has no {precision} instructions: ours computes in fp32 there")
    solvers = chosen(args.solvers, list(SOLVERS), ["ddpm"], "--solvers")
    return configs, batches, precisions, solvers


def variants_of(args: Any, batch: int, device: torch.device) -> tuple[list[str], list[str]]:
    """Variants and levers for a batch. A quick run compiles for its first batch only, as that takes a minute."""
    usual = [name for name in VARIANTS if device.type == "cuda" or "max-autotune" not in name]
    if args.quick and batch == 1:
        usual = ["reference", "reference+channels-last", "ours eager"]
    variants = chosen(args.variants, list(VARIANTS), usual, "--variants")
    possible = [name for name in LEVERS if device.type == "cuda" or name not in GPU_ONLY]
    return variants, possible if args.levers == "all" else chosen(args.levers, list(LEVERS), [], "--levers")


def begin(args: Any, device: torch.device) -> ResultFile:
    """The results with their head and with what --resume keeps."""
    rates, gpu = measure_rates(device), find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    args.matmul_flops, args.peak_flops = rates.matmul_flops, gpu.peak_flops if gpu else None
    names = ("configs", "batches", "precisions", "solvers", "steps", "levers", "rounds")
    given = " ".join(f"--{name} {getattr(args, name)}" for name in names if getattr(args, name))
    threads = f" --threads {args.threads}" if args.threads else ""
    command = f"python benchmarks/bench_sampling.py {'--quick' if args.quick else given}{threads}"
    head = {**place(args, device, rates), "kind": "sampling", "command": command}
    return ResultFile(args.json, head, args.resume, lists=("splits",))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = start(args.threads)
    device = processes.device
    configs, batches, precisions, solvers = settings_of(args, device)
    for batch in batches:
        variants_of(args, batch, device)
    results = begin(args, device)
    report = results.content
    print(
        f"{report['device']}, torch {torch.__version__}, {report['threads']} threads, matrix product "
        f"{report['matmul_tflops']:.4g} TFLOP/s, copy {report['copy_gbs']:.4g} GB/s",
        flush=True,
    )
    cases = [(name, c, p, b, s) for name, c in configs for p in precisions for b in batches for s in solvers]
    for name, config, precision, batch, solver in cases:
        label = {"config": name, "precision": precision, "batch": batch, "solver": solver}
        variants, levers = variants_of(args, batch, device)
        splits = ["split"] if args.split and "ours" in variants else []
        if not results.missing(label, [*variants, *(f"ours -{lever}" for lever in levers), *splits]):
            continue
        print(f"{name}, {precision}, batch {batch}, {solver}", flush=True)
        with results.guard(label, "the whole case"):
            case = DrawCase(config, batch, precision, processes, solver, args.steps)
            run_case(label, case, variants, levers, results, args)
            for what in results.missing(label, splits):
                with results.guard(label, what):
                    # `split` and `job_overhead` compile the engine again, from code in the cache.
                    entry = {**label, "split": split(case, True, args.seconds), "job": job_overhead(case, True, 8)}
                    results.add({**entry, "variant": what}, "splits")
                    print("\n".join(split_lines(entry)), flush=True)
    print("ratios: " + "; ".join(summary(results.rows)))
    results.end()


if __name__ == "__main__":
    run_script(main, "bench_sampling.py")
