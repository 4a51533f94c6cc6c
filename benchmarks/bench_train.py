"""Times whole training steps: ours, ours with each lever off, the reference, and other libraries.

    python benchmarks/bench_train.py --quick --json quick.json                    two CPU cores, minutes
    python benchmarks/bench_train.py --configs imagenet64_270M,cifar10_uncond --batches 128,256 --precisions bf16,fp16
    python benchmarks/bench_train.py --configs cifar10_uncond --levers all --seed_checkout improved-diffusion

Steps of all variants take turns, and each round gives a ratio: the reference's time over ours, so that above 1 ours is
faster. Where memory is too short for all at once, each has a process of its own, and ratios are those of the medians.

reference                improved-diffusion's way: eager, channels-first; fp16 on a GPU, fp32 on a CPU
reference+channels-last  its network with PyTorch's fused operations, channels-last, autocast, a well-written loop
reference+compile        the same compiled from the image to the loss, and on a GPU the whole step as one CUDA graph
reference+max-autotune   the same with Inductor's max-autotune, which takes minutes to compile
diffusers                its UNet2DModel of the same shape, run like reference+compile (pip install -e '.[peers]')
diffusers+max-autotune   the same with max-autotune
ours                     a step of train.py, compiled, and on a GPU replayed as CUDA graphs
ours eager               the same without either
ours -X                  ours without lever X, an optimisation, timed beside ours

Results are written with every row; with --resume those already there are kept. A variant that fails is left out, with
the reason in the results and the traceback on the error output; the exit code is then 1. The last line has the ratios.
docs/benchmarks.md says how the figures are made.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import peers
from benchmarks.contest import Contest, quartiles, speeds, time_apart, times_as_fast
from benchmarks.flag_types import at_least, checkout_of_improved_diffusion, existing_folder, not_negative
from benchmarks.long_runs import pictures, sustained, with_loader
from benchmarks.operations import executed_share, memory_together, precision_of, recorded_launches
from benchmarks.result_file import Label, ResultFile, release_memory
from benchmarks.roofline import load_config
from benchmarks.train_variants import LEVERS, Case, Step, ours, seed, usual, without
from benchmarks.variant_timing import Built, start
from fastdiff.config.sections import Config
from fastdiff.errors import UserError
from fastdiff.models.cost import train_flops
from fastdiff.models.unet import body_dtype
from fastdiff.runtime.machine import device_name, find, free_memory, measure_rates
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
    **peers.VARIANTS,
    "ours": ours,
    "ours eager": lambda case: ours(case, compile=False, cuda_graph=False),
}
MAKERS = {**VARIANTS, **{f"ours -{lever}": functools.partial(without, lever=lever) for lever in LEVERS}}
"""The variants, and ours without each lever."""
LAUNCHES = "launches in a step of ours"
FROM_FILES = "ours, from JPEG files"
LISTS = ("launches", "sustained", "loader")
"""Lists of the results beside the rows."""


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
    parser.add_argument("--rounds", type=at_least(1), default=8, help="interleaved rounds that count")
    parser.add_argument("--seconds", type=not_negative, default=1.0, help="least length of a variant's turn in a round")
    parser.add_argument("--threads", type=at_least(0), default=0, help="on a CPU; 0: the cores that are free")
    parser.add_argument("--seed_checkout", type=checkout_of_improved_diffusion,
                        help="improved-diffusion's own code as the reference")  # fmt: skip
    parser.add_argument("--separate", choices=("auto", "always", "never"), default="auto", help="a process for each "
                        "variant (default: where memory is too short for all in one)")  # fmt: skip
    parser.add_argument("--sustained", type=not_negative, default=0.0, metavar="SECONDS", help="also every variant's "
                        "rate over so many seconds in one go, e.g. 60")  # fmt: skip
    parser.add_argument("--loader", action="store_true", help="also ours with JPEG files that its loader decodes")
    parser.add_argument(
        "--images", type=existing_folder, metavar="FOLDER", help="the files of --loader (default: made-up ones)"
    )
    parser.add_argument("--quick", action="store_true", help="a small network and few rounds")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json already holds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    if args.quick:
        if args.configs != parser.get_default("configs"):
            parser.error("argument --quick: it has a network of its own; leave out --quick or --configs")
        args.configs, args.rounds, args.seconds = "quick", min(args.rounds, 6), min(args.seconds, 0.7)
    args.loader = args.loader or args.images is not None
    return args


def load(name: str, flag: str = "--configs") -> Config:
    """A configuration by its name in configs/ or its file. UserError for one that isn't there, or isn't valid."""
    if name == "quick":
        return Config.model_validate(QUICK)
    file = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not file.is_file():
        raise UserError(f"{flag}: {name} is neither a file nor one of quick, {', '.join(config_names())}")
    return load_config(str(file))


def config_names() -> list[str]:
    """Names of the shipped configurations of diffusion models, sorted; those of classifiers have other settings."""
    models = {path.stem: json.loads(path.read_text())["model"] for path in CONFIGS.glob("*.json")}
    return sorted(name for name, model in models.items() if "classifier_depth" not in model)


def batches_of(text: str) -> list[int]:
    """The batch sizes of --batches, none for an empty text; UserError for what is no number of images."""
    try:
        batches = [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--batches: {text} must be whole numbers such as 256,16,1") from None
    if batches and min(batches) < 1:
        raise UserError(f"--batches: {min(batches)} is no number of images; give 1 or more")
    return batches


def precisions_of(text: str, usual: list[str], gpu: bool) -> list[str]:
    """The precisions of --precisions; UserError for fp16 without a GPU."""
    precisions = chosen(text, ["fp32", "bf16", "fp16"], usual, "--precisions")
    if not gpu and "fp16" in precisions:
        raise UserError("--precisions: fp16 needs a GPU; on a CPU use bf16 or fp32")
    return precisions


def chosen(given: str, known: list[str], default: list[str], flag: str) -> list[str]:
    """Names in a comma-separated flag, all or none; UserError for one that isn't known."""
    if given == "none":
        return []
    names = known if given == "all" else [name.strip() for name in given.split(",") if name.strip()] or default
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not one of {', '.join(known)}")
    return names


def rows_of(
    label: Label,
    case: Case,
    built: dict[str, Built],
    times: dict[str, list[float]],
    base: str,
    args: Any,
) -> list[dict[str, Any]]:
    """The table's rows for one configuration, precision and batch; ratios are base's time over each one's."""
    settings, batch = case.config.model, case.batch
    rows = []
    for name, seconds in times.items():
        ms = [1e3 * value for value in quartiles(seconds)]
        share = executed_share(name, settings, training=True)
        rows.append(
            {
                **label,
                "variant": name,
                "computes": precision_of(name, case.precision, case.device),
                "ms": ms,
                "images_per_second": [1e3 * batch / value for value in reversed(ms)],
                "ratio_to": base,
                **speeds(seconds, times.get(base), train_flops(settings) * batch, share, args),
                "peak_memory_gb": built[name].peak_memory / 1e9,
                "start_seconds": built[name].start_seconds,
            }
        )
    return rows


def run_case(label: Label, case: Case, variants: list[str], levers: list[str], results: ResultFile, args: Any) -> None:
    """Time one configuration, precision and batch: first all variants in turns, then each lever beside ours."""
    makers = {variant: functools.partial(VARIANTS[variant], case) for variant in variants}
    if "reference" in makers and args.seed_checkout:
        makers["reference"] = lambda: seed(case, args.seed_checkout)
    if variants and is_apart(args.separate, variants, case):
        time_apart(label, variants, levers, command_of(label, args), line_of, results)
    else:
        without_each = {lever: functools.partial(without, case, lever) for lever in levers}
        rows_from = functools.partial(rows_of, label, case, args=args)
        contest = Contest(label, case.device, rows_from, line_of, results, args.rounds, args.seconds)
        contest.time_variants(makers)
        contest.time_levers(without_each, lambda: ours(case))
    if case.device.type == "cpu" and "ours" in variants and results.missing(label, [LAUNCHES]):
        found = recorded_launches(case.config, case.batch, case.precision)
        print(f"  a GPU's launches in a step of ours: {found}", flush=True)
        results.add({**label, "variant": LAUNCHES, **found}, "launches")
    long_runs_of(label, case, makers, results, args)


def long_runs_of(label: Label, case: Case, makers: dict[str, Any], results: ResultFile, args: Any) -> None:
    """The rows of --sustained and --loader."""
    for name in results.missing(label, [f"{name}, sustained" for name in makers] if args.sustained else []):
        with results.guard(label, name):
            row = sustained(makers[name.removesuffix(", sustained")], case, args.sustained)
            results.add({**label, "variant": name, **row}, "sustained")
            rates = ", ".join(f"{when} {row[key]:.4g}" for when, key in (("at first", "first"), ("at last", "last")))
            print(f"  {name}: {row['images_per_second']:.4g} images/s over {row['seconds']:.0f} s, {rates}", flush=True)
        release_memory()
    for name in results.missing(label, [FROM_FILES] if args.loader else []):
        settings = usual(case) if "ours" in makers else {"compile": False}
        with results.guard(label, name), pictures(args.images, min(case.config.model.size_hw)) as folder:
            row = with_loader(case, folder, max(3.0, 3 * args.seconds), settings)
            results.add({**label, "variant": name, **settings, **row}, "loader")
            rates = f"{row['images_per_second']:.4g} images/s by {row['loader']}, {row['from_memory']:.4g} from memory"
            print(f"  {name}: {rates}; waiting {row['waiting']:.2%} of a step", flush=True)
        release_memory()


def is_apart(separate: str, variants: list[str], case: Case) -> bool:
    """Whether every variant gets a process of its own; with auto if all of them together would not fit in memory."""
    if separate != "auto" or len(variants) < 2:
        return separate == "always"
    gpu = case.device.type == "cuda"
    needed, free = memory_together(variants, case.config.model, case.batch, gpu), free_memory(case.device)
    if needed <= 0.85 * free:
        return False
    print(f"  together the variants would need {needed / 1e9:.0f} GB of {free / 1e9:.0f}: each gets its own process")
    return True


def command_of(label: Label, args: Any) -> list[str]:
    """This program with the flags for one case."""
    words = [__file__, "--configs", label["config"], "--batches", label["batch"], "--precisions", label["precision"]]
    words += ["--rounds", args.rounds, "--seconds", args.seconds, "--threads", torch.get_num_threads()]
    return [str(word) for word in [*words, *(["--seed_checkout", args.seed_checkout] if args.seed_checkout else [])]]


def named(row: dict[str, Any], beside: dict[str, Any] | None = None) -> str:
    """A row's variant, with its precision in brackets if that isn't the case's, or isn't that of the row beside it."""
    other = beside["computes"] if beside else row["precision"]
    return row["variant"] + (f" ({row['computes']})" if row["computes"] != other else "")


def line_of(row: dict[str, Any]) -> str:
    low, ratio, high = row["ratio"] or [float("nan")] * 3
    mfu = row["mfu"] or row["mfu_measured"]
    host = "" if row["host_ms"] is None else f"  host {row['host_ms']:.2f} ms"
    return (
        f"  {row['config']:22}{row['precision']:6}{row['batch']:5}  {named(row):30}{row['ms'][1]:9.1f} ms"
        f"{row['images_per_second'][1]:10.4g} img/s  {mfu:6.1%} model, {mfu * row['executed_share']:6.1%} executed"
        f"{host}  {row['peak_memory_gb']:6.2f} GB"
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
    batches = batches_of(args.batches)
    if len(batches) not in (0, 1, len(names)):
        raise UserError(f"--batches: give one number or one per configuration ({len(names)}), not {len(batches)}")
    cases = []
    for i, name in enumerate(names):
        config = load(name)
        usual = min(config.train.batch_size, 128 if gpu else 8) if name != "quick" else 8
        cases.append((name, config, batches[i % len(batches)] if batches else usual))
    bf16 = gpu or body_dtype("bf16", device) == torch.bfloat16
    usual_precisions = ["bf16"] if gpu else ["fp32", "bf16"] if bf16 else ["fp32"]
    precisions = precisions_of(args.precisions, usual_precisions, gpu)
    usual_variants = [name for name in VARIANTS if gpu or "max-autotune" not in name]
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
    results = ResultFile(args.json, place(args, device, rates), args.resume, lists=LISTS)
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
            if not results.missing(label, wanted(here, levers, args)):
                continue
            print(f"{name}, {precision}, batch {batch}", flush=True)
            with results.guard(label, "the whole case"):
                run_case(label, Case(config, batch, precision, processes), here, levers, results, args)
    print("ratios: " + ", ".join(summary(results.rows)))
    results.end()


def wanted(variants: list[str], levers: list[str], args: Any) -> list[str]:
    """The names of all rows of a case."""
    more = [f"{name}, sustained" for name in variants] if args.sustained else []
    return [
        *variants,
        *(f"ours -{lever}" for lever in levers),
        *more,
        *(["ours, from JPEG files"] if args.loader else []),
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Ours (eager, where that alone was timed) over every variant beside it, by configuration, precision and batch."""
    out = []
    for key in dict.fromkeys((row["config"], row["precision"], row["batch"]) for row in rows):
        here = {row["variant"]: row for row in rows if (row["config"], row["precision"], row["batch"]) == key}
        mine = next((here[name] for name in ("ours", "ours eager") if name in here), None)
        others = [row for name, row in here.items() if not name.startswith("ours")]
        if mine and others:
            against = ", ".join(f"{times_as_fast(mine, row):.2f} x {named(row, mine)}" for row in others)
            out.append(f"{Path(key[0]).stem} {key[1]} {against}")
    return out


if __name__ == "__main__":
    run_script(main, "bench_train.py")
