"""Whole training steps: ours, each lever of ours off, the reference, and what others would run, in one process.

    python benchmarks/bench_train.py --quick --json quick.json                    two CPU cores, minutes
    python benchmarks/bench_train.py --configs imagenet64_270M,cifar10_uncond --batches 128,256 --precisions bf16,fp16
    python benchmarks/bench_train.py --configs cifar10_uncond --levers all --seed_checkout improved-diffusion

Steps of all variants take turns, and a ratio is made within each round: the reference's time over ours, so that above
1 ours is faster. `reference` is improved-diffusion's way (eager, channels-first; fp16 on a GPU, fp32 on a CPU);
`reference+compile` the same network compiled, channels-last, with a loop written well; `diffusers` its UNet2DModel of
the same shape, run likewise (pip install -e '.[peers]'); `ours -X` ours without lever X, timed beside ours. Results are
written after every configuration, and with --resume those already there are kept. The last line is the ratios.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastdiff import compilation, ops
from fastdiff.config import Config, SuperResConfig
from fastdiff.hardware import device_name, find, measure_rates
from fastdiff.models.precision import body_dtype
from fastdiff.models.work import train_flops
from fastdiff.processes import run_script
from fastdiff.settings import UserError
from fastdiff.threads import use_free_cores
from fastdiff.training.engine import start_processes

try:  # run as a script, or imported beside its neighbours
    from train_variants import LEVERS, Case, Step, compiled_seed, diffusers, ours, seed, without
except ImportError:
    from benchmarks.train_variants import LEVERS, Case, Step, compiled_seed, diffusers, ours, seed, without

CONFIGS = Path(__file__).parent.parent / "configs"
QUICK: dict[str, Any] = {
    "model": {
        "image_size": 32,
        "num_channels": 64,
        "num_res_blocks": 1,
        "channel_mult": "1,2",
        "attention_resolutions": "16",
        "learn_sigma": True,
    },
    "diffusion": {"diffusion_steps": 4000, "noise_schedule": "cosine"},
}
VARIANTS: dict[str, Callable[[Case], Step]] = {
    "reference": seed,
    "reference+compile": compiled_seed,
    "diffusers": diffusers,
    "ours": ours,
    "ours eager": lambda case: ours(case, compile=False),
    "ours +cuda_graph": lambda case: ours(case, cuda_graph=True),
}


@dataclass
class Built:
    """A variant that has taken its first step."""

    step: Step
    start_seconds: float
    peak_memory: float
    """Bytes that it and one step of it take."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="cifar10_uncond", help="names in configs/, JSON files, or quick")
    parser.add_argument("--batches", default="", help="images per step, one number or one per configuration")
    parser.add_argument(
        "--precisions",
        default="",
        help="of fp32, bf16, fp16 (default: bf16 on a GPU, else fp32, and bf16 if the CPU has it)",
    )
    parser.add_argument("--variants", default="", help=f"of {', '.join(VARIANTS)} (default: what runs here)")
    parser.add_argument("--levers", default="", help=f"all, or of {', '.join(LEVERS)}: each is timed off")
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds that count")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a variant's turn in a round, at least")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; 0: the cores that are free")
    parser.add_argument("--seed_checkout", type=Path, help="improved-diffusion's own code as the reference")
    parser.add_argument("--quick", action="store_true", help="a small network and few rounds")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json already holds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    if args.quick:
        args.configs, args.rounds, args.seconds = "quick", min(args.rounds, 6), min(args.seconds, 0.7)
        args.variants = args.variants or "reference,diffusers,ours,ours eager"
    return args


def load(name: str, flag: str = "--configs") -> Config:
    """A configuration by its name in configs/ or its file."""
    if name == "quick":
        return Config.model_validate(QUICK)
    file = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
        raise UserError(f"{flag}: {name} is neither a file nor one of quick, {known}")
    content = json.loads(file.read_text())
    kind = SuperResConfig if "large_size" in content.get("model", {}) else Config
    return kind.model_validate(content)


def chosen(given: str, known: list[str], default: list[str], flag: str) -> list[str]:
    """Names in a comma-separated flag; UserError for one that isn't known."""
    names = known if given == "all" else [name.strip() for name in given.split(",") if name.strip()] or default
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not one of {', '.join(known)}")
    return names


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(make: Callable[[], Step], device: torch.device) -> Built:
    """Make a variant and take its first steps, off the clock but for the start."""
    torch._dynamo.config.recompile_limit = 64  # variants share their code, and each compiles it for itself
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    start = time.perf_counter()
    step = make()
    step()
    synchronize()
    seconds = time.perf_counter() - start
    for _ in range(4 if device.type == "cuda" else 1):  # until CUDA graphs are captured, too
        step()
    return Built(step, seconds, peak_memory(step, device, before))


def peak_memory(step: Step, device: torch.device, before: int) -> float:
    """Most bytes alive in a step, less what was there before the variant; on a CPU those that the step itself takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)


def measure(built: dict[str, Built], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each variant in each round; their order rotates."""
    times: dict[str, list[float]] = {name: [] for name in built}
    counts = dict.fromkeys(built, 1)
    names = list(built)
    for i in range(rounds + 1):  # the first round finds out how many steps fill a turn
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize()
            start = time.perf_counter()
            for _ in range(counts[name]):
                built[name].step()
            synchronize()
            each = (time.perf_counter() - start) / counts[name]
            if i:
                times[name].append(each)
            else:
                counts[name] = max(1, round(seconds / each))
    return times


def quartiles(values: list[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()


def rows_of(
    label: tuple[str, str, int],
    built: dict[str, Built],
    times: dict[str, list[float]],
    base: str,
    flops: float,
    args: Any,
) -> list[dict[str, Any]]:
    """The table's rows for one configuration, precision and batch; ratios are base's time over each one's."""
    config, precision, batch = label
    rows = []
    for name, seconds in times.items():
        ms = [1e3 * value for value in quartiles(seconds)]
        ratio = quartiles([b / s for b, s in zip(times[base], seconds, strict=True)]) if base in times else None
        achieved = flops * batch / (ms[1] / 1e3)
        rows.append(
            {
                "config": config,
                "variant": name,
                "precision": precision,
                "batch": batch,
                "ms": ms,
                "images_per_second": [1e3 * batch / value for value in reversed(ms)],
                "ratio": ratio,
                "ratio_to": base,
                "mfu": achieved / args.peak_flops if args.peak_flops else None,
                "mfu_measured": achieved / args.matmul_flops,
                "peak_memory_gb": built[name].peak_memory / 1e9,
                "start_seconds": built[name].start_seconds,
            }
        )
    return rows


def run_case(name: str, case: Case, variants: list[str], levers: list[str], args: Any) -> list[dict[str, Any]]:
    """One configuration, precision and batch: first all variants in turns, then each lever beside ours."""
    flops, label = train_flops(case.config.model), (name, case.precision, case.batch)
    makers = {variant: functools.partial(VARIANTS[variant], case) for variant in variants}
    if "reference" in makers and args.seed_checkout:
        makers["reference"] = lambda: seed(case, args.seed_checkout)
    without_each = {lever: functools.partial(without, case, lever) for lever in levers}
    rows_from = lambda built, times, base: rows_of(label, built, times, base, flops, args)
    return time_variants(makers, without_each, lambda: ours(case), rows_from, line_of, case.device, args)


def time_variants(
    makers: dict[str, Callable[[], Step]],
    without: dict[str, Callable[[], Step]],
    ours: Callable[[], Step],
    rows_from: Callable[[dict[str, Built], dict[str, list[float]], str], list[dict[str, Any]]],
    line_of: Callable[[dict[str, Any]], str],
    device: torch.device,
    args: Any,
) -> list[dict[str, Any]]:
    """Rows of all variants, timed in turns, and of ours without each lever, beside ours. Prints them as they come.

    rows_from(what was built, its times, the name of the base) makes rows. A variant that can't be built is left out.
    """
    built = {}
    for variant, make in makers.items():
        try:
            built[variant] = build(make, device)
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"  {variant} left out: {str(error).splitlines()[0]}", flush=True)
        else:
            print(f"  {variant}: begun after {built[variant].start_seconds:.1f} s", flush=True)
    rows = rows_from(built, measure(built, args.rounds, args.seconds), "reference")
    for row in rows:
        print(line_of(row), flush=True)
    free(built)
    for lever, make in without.items():
        pair = {"ours": build(ours, device), f"ours -{lever}": build(make, device)}
        row = rows_from(pair, measure(pair, args.rounds, args.seconds), "ours")[1]
        print(line_of(row), flush=True)
        rows.append(row)
        free(pair)
    return rows


def free(built: dict[str, Built]) -> None:
    built.clear()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line_of(row: dict[str, Any]) -> str:
    low, ratio, high = row["ratio"] or [float("nan")] * 3
    mfu = f"{row['mfu']:6.1%}" if row["mfu"] else f"{row['mfu_measured']:6.1%}"
    return (
        f"  {row['config']:22}{row['precision']:6}{row['batch']:5}  {row['variant']:30}{row['ms'][1]:9.1f} ms"
        f"{row['images_per_second'][1]:10.4g} img/s  {mfu}  {row['peak_memory_gb']:6.2f} GB"
        f"  {ratio:5.2f} ({low:.2f} .. {high:.2f}) x {row['ratio_to']}"
    )


def place(args: Any, device: torch.device, rates: Any) -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    given = {key: value for key, value in vars(args).items() if key in ("configs", "batches", "precisions", "rounds")}
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
        "command": "python benchmarks/bench_train.py "
        + ("--quick" if args.quick else " ".join(f"--{key} {value}" for key, value in given.items() if value)),
        "threads": torch.get_num_threads(),
        "matmul_tflops": rates.matmul_flops / 1e12,
        "copy_gbs": rates.copy_bytes / 1e9,
    }


def settings_of(
    args: Any, device: torch.device
) -> tuple[list[tuple[str, Config, int]], list[str], list[str], list[str]]:
    """(configurations with their batches), precisions, variants and levers that the flags come to on a device."""
    gpu = device.type == "cuda"
    names = [name.strip() for name in args.configs.split(",")]
    batches = [int(batch) for batch in args.batches.split(",")] if args.batches else []
    if len(batches) not in (0, 1, len(names)):
        raise UserError(f"--batches: give one number or one per configuration ({len(names)}), not {len(batches)}")
    cases = []
    for i, name in enumerate(names):
        config = load(name)
        usual = min(config.train.batch_size, 128 if gpu else 8) if name != "quick" else 8
        cases.append((name, config, batches[i % len(batches)] if batches else usual))
    bf16 = gpu or body_dtype("bf16", device) == torch.bfloat16
    usual_precisions = ["bf16"] if gpu else ["fp32", "bf16"] if bf16 else ["fp32"]
    precisions = chosen(args.precisions, ["fp32", "bf16", "fp16"], usual_precisions, "--precisions")
    usual_variants = ["reference", "reference+compile", "diffusers", "ours", "ours eager"]
    if not gpu and not bf16:
        print(
            "this CPU has no bf16 instructions: in bf16 ours computes in fp32, others take ten times as long: left out"
        )
    variants = chosen(args.variants, list(VARIANTS), usual_variants, "--variants")
    possible = [name for name, lever in LEVERS.items() if gpu or not lever.gpu_only]
    levers = possible if args.levers == "all" else chosen(args.levers, list(LEVERS), [], "--levers")
    return cases, precisions, variants, levers


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = start_processes()
    device = processes.device
    if args.threads:
        torch.set_num_threads(args.threads)
    elif device.type == "cpu":
        use_free_cores()
    cases, precisions, variants, levers = settings_of(args, device)
    ops.use("auto")
    compilation.keep_compiled_code()
    compilation.prepare_cudnn()
    rates, gpu = measure_rates(device), find(device_name(device))
    args.matmul_flops, args.peak_flops = rates.matmul_flops, gpu.peak_flops if gpu else None
    report: dict[str, Any] = {**place(args, device, rates), "rows": []}
    if args.resume and args.json and args.json.is_file():
        report["rows"] = json.loads(args.json.read_text())["rows"]
    print(
        f"{report['device']}, torch {torch.__version__}, {report['threads']} threads, matrix product "
        f"{report['matmul_tflops']:.4g} TFLOP/s, copy {report['copy_gbs']:.4g} GB/s",
        flush=True,
    )
    for name, config, batch in cases:
        for precision in precisions:
            done = {(row["config"], row["precision"], row["batch"]) for row in report["rows"]}
            if (name, precision, batch) in done:
                continue
            print(f"{name}, {precision}, batch {batch}", flush=True)
            here = variants
            if device.type == "cpu" and precision != "fp32" and body_dtype(precision, device) == torch.float32:
                here = [v for v in variants if v == "reference" or v.startswith("ours")]
            report["rows"] += run_case(name, Case(config, batch, precision, processes), here, levers, args)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    print("ratios: " + ", ".join(summary(report["rows"])))


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Ours (eager, where that alone was timed) over every variant beside it, by configuration, precision and batch."""
    out = []
    for key in dict.fromkeys((row["config"], row["precision"], row["batch"]) for row in rows):
        here = {row["variant"]: row["ms"][1] for row in rows if (row["config"], row["precision"], row["batch"]) == key}
        mine = next((name for name in ("ours", "ours eager", "ours +cuda_graph") if name in here), None)
        others = [name for name in here if not name.startswith("ours")]
        if mine and others:
            against = ", ".join(f"{here[name] / here[mine]:.2f} x {name}" for name in others)
            out.append(f"{Path(key[0]).stem} {key[1]} {against}")
    return out


if __name__ == "__main__":
    run_script(main, "bench_train.py")
