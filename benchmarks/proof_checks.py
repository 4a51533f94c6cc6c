"""Parts of gpu_proof.py that check results: tests, real runs, and training with and without kernels."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.proof_part import Context, LeftOut, run_command, succeed
from fastdiff.errors import USER_ERROR

CIFAR10 = "cifar10_uncond"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(context: Context) -> None:
    """Record the device's name, the versions, and the rates with which all figures are compared."""
    import torch
    import triton

    from fastdiff.runtime.machine import device_name, measure_rates

    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    sizes = {"size": 256, "copy_size": 1 << 20} if context.tiny else {}
    rates = measure_rates(device, **sizes)
    context.emit(
        "machine",
        device=device_name(device),
        torch=torch.__version__,
        triton=triton.__version__,
        cudnn=torch.backends.cudnn.version(),
        cores=os.cpu_count(),
        properties=str(torch.cuda.get_device_properties(0)) if cuda else "",
        matmul_tflops=rates.matmul_flops / 1e12,
        copy_gbs=rates.copy_bytes / 1e9,
    )


def native_tests(*argv: str, tiny: Sequence[str], workers: int) -> Callable[[Context], None]:
    """A part that runs tests natively on the GPU, `workers` at a time; `tiny` are arguments for few of them instead."""

    def run(context: Context) -> None:
        report = context.work / f"{context.part.replace(' ', '_')}.jsonl"
        report.unlink(missing_ok=True)
        count = min(workers, max(1, (os.cpu_count() or 1) - 4)) if not context.tiny else 1
        given = [*(tiny if context.tiny else argv), *(("-n", str(count), "--dist", "load") if count > 1 else ())]
        # Torch's own warnings differ between its versions, so they are shown and fail no test.
        options = ["-p", "benchmarks.report_tests", "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
        begin = time.monotonic()
        env = {"FASTDIFF_TEST_REPORT": str(report), "OMP_NUM_THREADS": "1", "FASTDIFF_DEVICE": _device()}
        if context.rehearsal:
            options += ["-p", "benchmarks.rehearsal.no_comparisons"]
            env["PYTHONPYCACHEPREFIX"] = str(context.work / "pycache")
        code = run_command(context, [sys.executable, "-m", "pytest", *options, *given], **env)
        rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        for row in rows:
            if "test" in row:
                context.emit("failure", **row)
        counts = next((row for row in rows if "passed" in row), {})
        verdict = {0: "passed", 1: "failed", 5: "no test was found", 124: "out of time"}.get(code, f"exit code {code}")
        context.emit("tests", verdict=verdict, **counts, seconds=round(time.monotonic() - begin, 1))
        succeed(code, "pytest")

    return run


KERNEL_TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "group_norm_silu",
        "add_group_norm_silu",
        "norm_and_shortcut",
        "output_layer",
        "attention",
        "diffusion_kernels",
        "adamw_ema",
        "convolutions",
        "reference",
    )
]
kernels = native_tests(*KERNEL_TESTS, tiny=("tests/kernels/test_convolutions.py",), workers=10)
golden = native_tests(
    "tests/golden/test_golden_kernels.py",
    "tests/golden/test_golden_model.py",
    "tests/golden/test_golden_training.py",
    tiny=("tests/images/test_order.py",),
    workers=4,
)
gpu_tests = native_tests(
    "-k",
    "gpu and not (kernels or gpu_proof or pack_for_gpu)",
    "tests",
    tiny=("tests/runtime/test_machine.py",),
    workers=8,
)


def sanitizer(context: Context) -> None:
    """Run compute-sanitizer over small cases of the kernels: accesses out of bounds, races in shared memory."""
    if not shutil.which("compute-sanitizer"):
        raise LeftOut("compute-sanitizer is not installed; it comes with CUDA's toolkit")
    small = ["-k", "(shapes or every_way or dropout or q_sample) and not compiles", *KERNEL_TESTS[:1], KERNEL_TESTS[3]]
    codes = []
    for tool in ("memcheck", "racecheck"):
        argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x"]
        code = run_command(context, [*argv, "-W", "default", *small])
        context.emit("tests", verdict={0: f"{tool}: nothing found"}.get(code, f"{tool}: exit code {code}"))
        codes.append(code)
    succeed(max(codes), "compute-sanitizer")


# --- training and sampling as a user starts them ---


def pictures(context: Context) -> Path:
    """The folder to train on: the given one, a given tar file's, or one of made-up pictures."""
    if context.images and context.images.is_dir():
        return context.images
    source = "made_up"
    if context.images:
        state = context.images.stat()
        source = f"{context.images.name.split('.')[0]}_{state.st_size}_{state.st_mtime_ns}"
    folder = context.work / f"images_{source}"
    if not folder.is_dir():
        partial = context.work / f"images.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if context.images:
            with tarfile.open(context.images) as file:
                file.extractall(partial, filter="data")
        else:
            _make_up(partial)
        partial.rename(folder)
    return folder


def _make_up(folder: Path, count: int = 256) -> None:
    """Write smooth random pictures, 32x32, which a network learns in few steps."""
    import numpy as np
    from PIL import Image

    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")


def train(context: Context) -> None:
    """Run train.py as a user starts it: CIFAR-10's network in bf16, some hundred steps, in which the loss must fall.

    Then sample.py draws from that run; its picture is kept beside the results.
    """
    run = context.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    code, losses = _train_real(context, run)
    succeed(code, "train.py")
    _sample_real(context, run)
    if not context.rehearsal and not losses[-1] < (1.0 if context.tiny else 0.5) * losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


def _train_real(context: Context, run: Path) -> tuple[int, list[float]]:
    steps = 6 if context.tiny else 300
    small = "--num_channels 32 --num_res_blocks 1 --batch_size 8 --compile False --precision fp32"
    real = "--batch_size 256 --precision bf16"
    flags = (
        f"--config configs/{CIFAR10}.json --max_steps {steps} --save_interval {steps} --lr 3e-4 --ema_rate 0.99 "
        f"--log_interval {2 if context.tiny else 20} --loader pillow {small if context.tiny else real}"
        f"{' --max_bad_steps 0' if context.rehearsal else ''}"
    )
    argv = [sys.executable, "fastdiff/train.py", *flags.split()]
    begin = time.monotonic()
    code = run_command(context, [*argv, "--data_dir", str(pictures(context)), "--run_dir", str(run)])
    seconds = round(time.monotonic() - begin, 1)
    progress = run / "progress.csv"
    if not progress.is_file():
        raise RuntimeError(f"train.py wrote no {progress.name}; exit code {code}")
    with progress.open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row.get("loss")]
    names = ("images_per_second", "grad_norm", "memory_gb", "data_wait")
    last = {name: float(rows[-1][name]) for name in names if rows[-1].get(name)}
    ends = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
    context.emit("fact", **ends, **last, losses=losses, seconds=seconds)
    return code, losses


def _sample_real(context: Context, run: Path) -> None:
    out = context.work / "samples"
    count, batch, steps = (4, 4, 3) if context.tiny else (64, 64, 25)
    flags = f"--num_samples {count} --batch_size {batch} --steps {steps} --solver dpmpp_2m_sde --overwrite True"
    flags += " --precision fp32 --compile False" if context.tiny else " --precision bf16"
    argv = [sys.executable, "fastdiff/sample.py", "--model_path", str(run), *flags.split(), "--out_dir", str(out)]
    begin = time.monotonic()
    code = run_command(context, argv)
    made = sorted(out.glob("*.png"))
    if made:
        shutil.copyfile(made[0], context.out / "samples.png")
    context.emit("fact", picture=bool(made), exit_code=code, seconds=round(time.monotonic() - begin, 1))
    if code != USER_ERROR or not context.rehearsal:  # images that aren't finite are refused
        succeed(code, "sample.py")


def same_losses(context: Context) -> None:
    """Train with the kernels and with PyTorch, from one seed, in float32 and bf16: the losses must agree."""
    import torch
    from helpers.small_trainer import losses_of, small_trainer

    from fastdiff import ops

    model = {"image_size": 16 if context.tiny else 32, "num_channels": 32 if context.tiny else 64, "dropout": 0.0}
    for precision, allowed in (("fp32", 1e-3), ("bf16", 3e-2))[: 1 if context.tiny else 2]:
        made = {}
        for mode in ("reference", "auto"):
            with ops.using(mode):
                trainer = small_trainer(model=model, precision=precision, batch_size=8, microbatch=-1)
                rows = losses_of(trainer, 2 if context.tiny else 20)
                made[mode] = [row.get("loss", math.nan) for row in rows]  # a step that isn't finite has none
        ours, theirs = (torch.tensor(made[mode]) for mode in ("auto", "reference"))
        off = float(((ours - theirs).abs() / theirs.abs()).max())
        context.emit("fact", precision=precision, greatest_relative_difference=off, allowed=allowed, losses=made)
        if not off <= allowed and not context.rehearsal:
            raise RuntimeError(f"{precision}: the losses differ by {off:.1e}, allowed are {allowed:.0e}")


def chaos(context: Context) -> None:
    """Check that a small run that is killed at random instants loses nothing, in float32 and in fp16."""
    script = [sys.executable, "tests/stress/chaos.py"]
    if context.tiny:  # a test of its own runs it
        succeed(run_command(context, [*script, "--help"]), "chaos.py")
        return
    for name, flags in {"fp32": "", "fp16": "--precision fp16"}.items():
        code = run_command(context, [*script, "--kills", "5", *(["--flags", flags] if flags else [])])
        context.emit("fact", precision=name, nothing_lost=code == 0)
        if not context.rehearsal:
            succeed(code, f"chaos.py ({name})")
