"""Times whole training steps: ours, ours with each lever off, the reference, and other libraries, in one process.

    python benchmarks/bench_train.py --quick --json quick.json                    two CPU cores, minutes
    python benchmarks/bench_train.py --configs imagenet64_270M,cifar10_uncond --batches 128,256 --precisions bf16,fp16
    python benchmarks/bench_train.py --configs cifar10_uncond --levers all --seed_checkout improved-diffusion

Steps of all variants take turns, and each round gives a ratio: the reference's time over ours, so that above 1 ours is
faster. `reference` is improved-diffusion's way (eager, channels-first; fp16 on a GPU, fp32 on a CPU).
`reference+compile` is the same network compiled, channels-last, with a well-written loop. `diffusers` is its
UNet2DModel of the same shape, run likewise (pip install -e '.[peers]'). `ours -X` is ours without lever X, an
optimisation, timed beside ours. Results are written with every row; with --resume those already there are kept. A
variant that fails is left out, with the reason in the results and the traceback on the error output; the exit code is
then 1. The last line has the ratios.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.result_file import Label, ResultFile, release_memory
from benchmarks.train_variants import LEVERS, Case, Step, compiled_seed, diffusers, ours, seed, without
from benchmarks.variant_timing import Built, build, few_objects_to_collect, seconds_of, start
from fastdiff.config.load import Config, SuperResConfig
from fastdiff.errors import UserError
from fastdiff.models.cost import train_flops
from fastdiff.models.unet import body_dtype
from fastdiff.runtime.machine import device_name, find, measure_rates
from fastdiff.runtime.script import run_script

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


def measure(
    built: dict[str, Built], rounds: int, seconds: float, guard: Callable[[str], AbstractContextManager[None]]
) -> dict[str, list[float]]:
    """Seconds per step of each variant in each round; their order rotates.

    A variant whose step raises, where guard(its name) takes the exception, is not in the result.
    """
    times: dict[str, list[float]] = {name: [] for name in built}
    counts = dict.fromkeys(built, 1)
    names = list(built)
    with few_objects_to_collect():
        for i in range(rounds + 1):  # the first round finds out how many steps fill a turn
            for name in names[i % len(names) :] + names[: i % len(names)] if names else []:
                each = None
                with guard(name):
                    each = seconds_of(built[name].step, counts[name])
                if each is None:
                    names.remove(name)
                    del built[name], times[name]
                elif i:
                    times[name].append(each)
                else:
                    counts[name] = max(1, round(seconds / each))
    return times


def quartiles(values: list[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()


def rows_of(
    label: Label,
    built: dict[str, Built],
    times: dict[str, list[float]],
    base: str,
    flops: float,
    args: Any,
) -> list[dict[str, Any]]:
    """The table's rows for one configuration, precision and batch; ratios are base's time over each one's."""
    rows, batch = [], label["batch"]
    for name, seconds in times.items():
        ms = [1e3 * value for value in quartiles(seconds)]
        ratio = quartiles([b / s for b, s in zip(times[base], seconds, strict=True)]) if base in times else None
        achieved = flops * batch / (ms[1] / 1e3)
        rows.append(
            {
                **label,
                "variant": name,
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


def run_case(label: Label, case: Case, variants: list[str], levers: list[str], results: ResultFile, args: Any) -> None:
    """Time one configuration, precision and batch: first all variants in turns, then each lever beside ours."""
    flops = train_flops(case.config.model)
    makers = {variant: functools.partial(VARIANTS[variant], case) for variant in variants}
    if "reference" in makers and args.seed_checkout:
        makers["reference"] = lambda: seed(case, args.seed_checkout)
    without_each = {lever: functools.partial(without, case, lever) for lever in levers}
    rows_from = lambda built, times, base: rows_of(label, built, times, base, flops, args)
    contest = Contest(label, case.device, rows_from, line_of, results, args.rounds, args.seconds)
    contest.time_variants(makers)
    contest.time_levers(without_each, lambda: ours(case))


@dataclass
class Contest:
    """Variants of one case, timed in turns; rows are printed and written as soon as they are known."""

    label: Label
    device: torch.device
    rows_from: Callable[[dict[str, Built], dict[str, list[float]], str], list[dict[str, Any]]]
    """(what was built, its times, the name of the base) → rows."""
    line_of: Callable[[dict[str, Any]], str]
    results: ResultFile
    rounds: int
    seconds: float

    def time_variants(self, makers: dict[str, Callable[[], Step]]) -> None:
        """Time all of them against the reference; nothing is measured if the results hold all of them already."""
        if not self.results.missing(self.label, list(makers)):
            return
        self.results.forget(self.label, list(makers))
        for row in self._rows(makers, "reference"):
            self._keep(row)

    def time_levers(self, without: dict[str, Callable[[], Step]], ours: Callable[[], Step]) -> None:
        """Time ours without each lever beside ours, except the levers that the results hold already."""
        makers = {f"ours -{lever}": make for lever, make in without.items()}
        for name in self.results.missing(self.label, list(makers)):
            for row in self._rows({"ours": ours, name: makers[name]}, "ours"):
                if row["variant"] == name:
                    self._keep(row)

    def _rows(self, makers: dict[str, Callable[[], Step]], base: str) -> list[dict[str, Any]]:
        guard = functools.partial(self.results.guard, self.label)
        built: dict[str, Built] = {}
        for name, make in makers.items():
            with guard(name):
                built[name] = build(make, self.device)
                print(f"  {name}: begun after {built[name].start_seconds:.1f} s", flush=True)
        rows = self.rows_from(built, measure(built, self.rounds, self.seconds, guard), base)
        built.clear()
        torch._dynamo.reset()
        release_memory()
        return rows

    def _keep(self, row: dict[str, Any]) -> None:
        print(self.line_of(row), flush=True)
        self.results.add(row)


def line_of(row: dict[str, Any]) -> str:
    low, ratio, high = row["ratio"] or [float("nan")] * 3
    mfu = f"{row['mfu']:6.1%}" if row["mfu"] else f"{row['mfu_measured']:6.1%}"
    return (
        f"  {row['config']:22}{row['precision']:6}{row['batch']:5}  {row['variant']:30}{row['ms'][1]:9.1f} ms"
        f"{row['images_per_second'][1]:10.4g} img/s  {mfu}  {row['peak_memory_gb']:6.2f} GB"
        f"  {ratio:5.2f} ({low:.2f} .. {high:.2f}) x {row['ratio_to']}"
    )


def place(args: Any, device: torch.device, rates: Any) -> dict[str, Any]:
    """Device, versions, commit and date of the figures."""
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
    """(configurations with their batches), precisions, variants and levers that the flags select on a device."""
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
    processes = start(args.threads)
    device = processes.device
    cases, precisions, variants, levers = settings_of(args, device)
    rates, gpu = measure_rates(device), find(device_name(device))
    args.matmul_flops, args.peak_flops = rates.matmul_flops, gpu.peak_flops if gpu else None
    results = ResultFile(args.json, place(args, device, rates), args.resume)
    report = results.content
    print(
        f"{report['device']}, torch {torch.__version__}, {report['threads']} threads, matrix product "
        f"{report['matmul_tflops']:.4g} TFLOP/s, copy {report['copy_gbs']:.4g} GB/s",
        flush=True,
    )
    for name, config, batch in cases:
        for precision in precisions:
            label = {"config": name, "precision": precision, "batch": batch}
            here = variants
            if device.type == "cpu" and precision != "fp32" and body_dtype(precision, device) == torch.float32:
                here = [v for v in variants if v == "reference" or v.startswith("ours")]
            if not results.missing(label, [*here, *(f"ours -{lever}" for lever in levers)]):
                continue
            print(f"{name}, {precision}, batch {batch}", flush=True)
            with results.guard(label, "the whole case"):
                run_case(label, Case(config, batch, precision, processes), here, levers, results, args)
    print("ratios: " + ", ".join(summary(results.rows)))
    results.end()


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
