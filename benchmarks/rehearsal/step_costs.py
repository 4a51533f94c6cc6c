#!/usr/bin/env python3
"""Measures the host's cost of a training step or a drawing on the rehearsal GPU: one variant per process.

    python benchmarks/rehearsal/run.py python benchmarks/rehearsal/step_costs.py cifar10_uncond 256 "ours -cuda graph"
    ... step_costs.py imagenet64_270M 256 ours --draw

It prints one line of JSON: the milliseconds in which the host launches a step (host_ms), the processor time in that
(cpu_ms, which other programs of a busy machine change little), kernels and graphs launched per step, waits per step
(stderr gets their places), and the peak of the device's memory in gigabytes. Times are this machine's: they compare
variants, and a faster processor takes a fraction of them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import bench_sampling, bench_train, sampling_variants, train_variants  # noqa: E402
from benchmarks.flag_types import at_least  # noqa: E402
from benchmarks.rehearsal.device import counts, events  # noqa: E402
from benchmarks.variant_timing import build, few_objects_to_collect, start  # noqa: E402
from fastdiff.models.unet import DTYPES  # noqa: E402
from fastdiff.runtime.script import run_script  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a name in configs/, e.g. cifar10_uncond")
    parser.add_argument("batch", type=at_least(1))
    parser.add_argument("variant", help="a variant of bench_train.py, or of bench_sampling.py with --draw")
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--draw", action="store_true", help="draw images in ten steps instead of training")
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps to time")
    args = parser.parse_args()
    variants = bench_sampling.VARIANTS if args.draw else bench_train.MAKERS
    if args.variant not in variants:
        parser.error(f"argument variant: {args.variant} is not one of {', '.join(variants)}")
    if not hasattr(ctypes.CDLL(None), "rehearsal_counts"):
        parser.error("there is no rehearsal GPU here; start this by benchmarks/rehearsal/run.py")

    settings, processes = bench_train.load(args.config, "argument config"), start()
    if args.draw:
        case = sampling_variants.DrawCase(settings, args.batch, args.precision, processes, steps=10)
    else:
        case = train_variants.Case(settings, args.batch, args.precision, processes)
    built = build(functools.partial(variants[args.variant], case), processes.device)

    before, seen, times, cpu_times = counts(), len(events), [], []
    with few_objects_to_collect():
        for _ in range(args.steps):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            built.step()
            times.append(1e3 * (time.perf_counter() - begin))
            cpu_times.append(1e3 * (time.process_time() - cpu_begin))
    spent, waits = counts() - before, events[seen:]
    print(*dict.fromkeys(map(str, waits)), sep="\n", file=sys.stderr)
    row = {
        "config": args.config,
        "batch": args.batch,
        "variant": args.variant,
        "precision": args.precision,
        "draw": args.draw,
        "host_ms": round(statistics.median(times), 2),
        "cpu_ms": round(statistics.median(cpu_times), 2),
        "kernel_launches": spent.kernel_launches / args.steps,
        "graph_launches": spent.graph_launches / args.steps,
        "waits": spent.host_waits / args.steps,
        "peak_gb": round(built.peak_memory / 1e9, 2),
        "start_seconds": round(built.start_seconds, 1),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    run_script(main, "step_costs.py")
