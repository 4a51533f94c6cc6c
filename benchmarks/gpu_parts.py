"""The parts of benchmarks/gpu_proof.py: each proves or measures one thing on a GPU and writes down what it found.

A part is a function of a Context, in a process of its own. PARTS is in order of value: whether results are right, then
the throughput figures that matter most. With `tiny` every part runs on any machine in seconds, on networks and inputs
so small that their figures say nothing: to see that the parts themselves work.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.proof_log import Log

ROOT = Path(__file__).resolve().parents[1]
CIFAR10, IMAGENET64 = "cifar10_uncond", "imagenet64_270M"
TINY_MODEL: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
}
MARGIN = 5.0
"""Seconds before its limit at which a part ends a command of its own, to write down what that has left."""


@dataclass(frozen=True)
class Context:
    """Where a part runs and where it writes."""

    part: str
    log: Log
    out: Path
    """Folder of the results, the log and the picture."""
    work: Path
    """Scratch: images, runs, compiled code. It may be on another disk."""
    images: Path | None
    """A folder of pictures, or a tar file of one, to train on; None: made-up ones."""
    tiny: bool
    rehearsal: bool
    """Whether the GPU computes nothing, so that numbers aren't judged."""
    until: float
    """time.monotonic() at which the part is stopped."""

    def emit(self, kind: str, **fields: Any) -> None:
        self.log.write(self.part, kind, **fields)

    @property
    def left(self) -> float:
        """Seconds that a command of this part may take."""
        return max(1.0, self.until - time.monotonic() - MARGIN)


@dataclass(frozen=True)
class Part:
    """One thing to prove."""

    name: str
    seconds: float
    """Predicted seconds on an H100 that finds compiled code. It is stopped after four times as long and 20 s more."""
    run: Callable[[Context], None]
    alone: bool = True
    """Whether it needs the GPU for itself, as everything that is timed does."""


class LeftOut(Exception):
    """The part needs something that isn't here; the message says what."""


class OutOfTime(Exception):
    """A command of the part was cut off at the part's limit."""


def run_command(context: Context, argv: Sequence[str], **env: str) -> int:
    """Run a command of the checkout until it ends or the part's time is over; its exit code, or 124."""
    print("$ " + " ".join(argv), flush=True)
    try:
        return subprocess.run(argv, cwd=ROOT, env={**os.environ, **env}, timeout=context.left).returncode
    except subprocess.TimeoutExpired:
        return 124


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _succeed(code: int, what: str) -> None:
    """Raise an exception unless a command's exit code is 0."""
    if code == 124:
        raise OutOfTime(f"{what} was cut off at the part's limit")
    if code:
        raise RuntimeError(f"{what} ended with exit code {code}")


# --- the machine, and correctness ---


def machine(context: Context) -> None:
    """Name, versions, and the rates that everything else is compared with."""
    import torch
    import triton

    from fastdiff.hardware import device_name, measure_rates

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
        # Torch's own warnings differ between its versions; here they are shown, and fail nothing.
        options = ["-p", "benchmarks.report_tests", "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
        begin = time.monotonic()
        env = {"FASTDIFF_TEST_REPORT": str(report), "OMP_NUM_THREADS": "1", "FASTDIFF_DEVICE": _device()}
        code = run_command(context, [sys.executable, "-m", "pytest", *options, *given], **env)
        rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        for row in rows:
            if "test" in row:
                context.emit("failure", **row)
        counts = next((row for row in rows if "passed" in row), {})
        verdict = {0: "passed", 1: "failed", 5: "no test was found", 124: "out of time"}.get(code, f"exit code {code}")
        context.emit("tests", verdict=verdict, **counts, seconds=round(time.monotonic() - begin, 1))
        _succeed(code, "pytest")

    return run


KERNEL_TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "group_norm_silu",
        "add_group_norm_silu",
        "attention",
        "diffusion_kernels",
        "adamw_ema",
        "convolutions",
        "norm_coefficients",
        "reference",
    )
]
kernels = native_tests(*KERNEL_TESTS, tiny=("tests/kernels/test_norm_coefficients.py",), workers=10)
golden = native_tests(
    "tests/test_golden_kernels.py",
    "tests/test_golden_model.py",
    "tests/test_golden_training.py",
    tiny=("tests/images/test_order.py",),
    workers=4,
)
gpu_tests = native_tests(
    "-k", "gpu and not (kernels or gpu_proof or pack_for_gpu)", "tests", tiny=("tests/test_hardware.py",), workers=8
)


def sanitizer(context: Context) -> None:
    """compute-sanitizer over small cases of the kernels: accesses out of bounds, races in shared memory."""
    if not shutil.which("compute-sanitizer"):
        raise LeftOut("compute-sanitizer is not installed; it comes with CUDA's toolkit")
    small = ["-k", "(shapes or every_way or dropout or q_sample) and not compiles", *KERNEL_TESTS[:1], KERNEL_TESTS[3]]
    codes = []
    for tool in ("memcheck", "racecheck"):
        argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x"]
        code = run_command(context, [*argv, "-W", "default", *small])
        context.emit("tests", verdict={0: f"{tool}: nothing found"}.get(code, f"{tool}: exit code {code}"))
        codes.append(code)
    _succeed(max(codes), "compute-sanitizer")


# --- what a user does first ---


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
    """Smooth random pictures, 32x32: something that a network can learn at once."""
    import numpy as np
    from PIL import Image

    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")


def train(context: Context) -> None:
    """train.py as a user starts it: CIFAR-10's network in bf16, some hundred steps, in which the loss must fall.

    Then sample.py from that run; the picture that it makes is kept beside the results.
    """
    run = context.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    code, losses = _train_real(context, run)
    _succeed(code, "train.py")
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
    context.emit("fact", picture=bool(made), seconds=round(time.monotonic() - begin, 1))
    _succeed(code, "sample.py")


def same_losses(context: Context) -> None:
    """The kernels' training and PyTorch's, from one seed, in float32 and bf16: the losses must stay together."""
    import torch
    from training.small_trainer import losses_of, small_trainer

    from fastdiff import ops

    model = {"image_size": 16 if context.tiny else 32, "num_channels": 32 if context.tiny else 64, "dropout": 0.0}
    for precision, allowed in (("fp32", 1e-3), ("bf16", 3e-2))[: 1 if context.tiny else 2]:
        made = {}
        for mode in ("reference", "auto"):
            with ops.using(mode):
                trainer = small_trainer(model=model, precision=precision, batch_size=8, microbatch=-1)
                made[mode] = [row["loss"] for row in losses_of(trainer, 2 if context.tiny else 20)]
        ours, theirs = (torch.tensor(made[mode]) for mode in ("auto", "reference"))
        off = float(((ours - theirs).abs() / theirs.abs()).max())
        context.emit("fact", precision=precision, greatest_relative_difference=off, allowed=allowed, losses=made)
        if not off <= allowed and not context.rehearsal:
            raise RuntimeError(f"{precision}: the losses differ by {off:.1e}, allowed are {allowed:.0e}")


# --- throughput, one variant per process ---


def throughput(
    config: str,
    batches: Sequence[int],
    variant: str,
    precision: str = "bf16",
    *,
    draw: bool = False,
    profile: bool = False,
) -> Callable[[Context], None]:
    """A part that times one variant's training step, or its drawing, at the first of the batches that fits."""

    def run(context: Context) -> None:
        import torch

        for batch in batches[:1] if context.tiny else batches:
            try:
                measure_variant(context, config, batch, variant, precision, draw, profile)
            except torch.OutOfMemoryError as error:
                context.emit("note", reason=f"batch {batch} does not fit: {str(error).splitlines()[0][:200]}")
            else:
                return
            from benchmarks.variant_timing import free

            free()
        raise RuntimeError(f"none of the batches {', '.join(map(str, batches))} fits in memory")

    return run


def shrunk(model: Any) -> Any:
    """Settings of a tiny network of the same kind, with labels if it has any."""
    size = {"large_size": 16, "small_size": 8} if hasattr(model, "large_size") else {"image_size": 16}
    kept = {"class_cond": model.class_cond, "num_classes": model.num_classes}
    return type(model)(**TINY_MODEL, **size, **kept)


def measure_variant(
    context: Context, config: str, batch: int, variant: str, precision: str, draw: bool, profile: bool
) -> None:
    """Build and time one variant; a row when it is timed, another when it is profiled."""
    from benchmarks import bench_sampling, bench_train, sampling_variants, train_variants
    from benchmarks.bench_train import quartiles
    from benchmarks.variant_timing import measure, start

    # A variant that computes something else is found by the tests; here it would cost a forward pass on the CPU.
    train_variants.check_same_function = lambda *_: None
    sampling_variants.check_same_function = lambda *_: None
    processes = start()
    settings = bench_train.load(config)
    if context.tiny:
        settings = settings.model_copy(update={"model": shrunk(settings.model)})
        batch, precision = 2, "fp32"
    if draw:
        steps = 2 if context.tiny else 10
        case = sampling_variants.DrawCase(settings, batch, precision, processes, steps=steps)
        make, per_step = functools.partial(bench_sampling.VARIANTS[variant], case), case.evaluations
    else:
        case = train_variants.Case(settings, batch, precision, processes)
        make, per_step = functools.partial(bench_train.VARIANTS[variant], case), 1
    if variant.startswith("ours"):
        print("\n".join(compile_beforehand(case, draw)), flush=True)
    # The original knows fp16 only, and on a CPU float32.
    computed = precision if variant != "reference" else "fp16" if processes.device.type == "cuda" else "fp32"
    row: dict[str, Any] = {"config": config, "variant": variant, "precision": computed, "batch": batch, "ratio": None}

    def emit(**found: Any) -> None:
        if "classes" in found:
            context.emit("profile", config=config, variant=variant, **found)
        elif "ms" in found:
            rounds = [value / per_step for value in found["ms"]]
            slow_to_fast = [1e3 * batch / ms for ms in reversed(quartiles(found["ms"]))]
            rates = {"images_per_second": slow_to_fast}
            if draw:
                rates["evaluations_per_second"] = [per_step * rate for rate in slow_to_fast]
                row.update(solver=case.solver, steps=case.steps)
            more = {name: value for name, value in found.items() if name not in ("ms", *rates)}
            context.emit("throughput", **row, ms=quartiles(rounds), **rates, **more)
        else:
            row.update(found)
            context.emit("fact", variant=variant, batch=batch, **found, **compiled_code())

    measure(make, case, emit, seconds=0.2 if context.tiny else 4.0, profile_steps=3 if profile else 0)


def compile_beforehand(case: Any, draw: bool) -> list[str]:
    """Start the processes that compile a variant's Triton kernels, as a run does; what it would say of that."""
    from fastdiff import precompile
    from fastdiff.models.precision import DTYPES
    from fastdiff.sampling.launches import sampling_launches
    from fastdiff.training.launches import training_launches

    dtype, model = DTYPES[case.precision], case.config.model
    if draw:
        launches = functools.partial(sampling_launches, model, case.diffusion(), case.plan(), case.batch, dtype)
    else:
        scaled = case.precision == "fp16"
        rates = case.config.train.ema_rate
        given = (model, case.config.diffusion, case.batch, dtype)
        launches = functools.partial(training_launches, *given, rates=rates, scaled=scaled)
    return precompile.start(launches, case.device)


def compiled_code() -> dict[str, int]:
    """How many of Inductor's graphs this process found in the cache, and how many it had to compile."""
    from torch._dynamo.utils import counters

    seen = counters["inductor"]
    return {"graphs_found": seen["fxgraph_cache_hit"], "graphs_compiled": seen["fxgraph_cache_miss"]}


def levers(config: str, batch: int) -> Callable[[Context], None]:
    """A part that times ours with each lever off beside ours; bench_train.py's rows, one lever after the other."""

    def run(context: Context) -> None:
        from benchmarks.train_variants import LEVERS

        names = list(LEVERS)[:1] if context.tiny else list(LEVERS)
        for name in names:
            result = context.work / "lever.json"
            result.unlink(missing_ok=True)
            given = ["--configs", config, "--batches", str(batch)]
            if context.tiny:
                file = context.work / "tiny.json"
                file.write_text(json.dumps({"model": {**TINY_MODEL, "image_size": 16}}))
                given = ["--configs", str(file), "--batches", "2", "--precisions", "fp32"]
            short = ["--rounds", "2" if context.tiny else "5", "--seconds", "0.05" if context.tiny else "0.5"]
            argv = [sys.executable, "benchmarks/bench_train.py", *given, *short, "--variants", "ours", "--levers", name]
            code = run_command(context, [*argv, "--json", str(result)])
            rows = json.loads(result.read_text())["rows"] if result.is_file() else []
            for row in rows:
                if row["variant"] == f"ours -{name}":
                    context.emit("fact", lever=name, times_as_fast_with_it=1 / row["ratio"][1], row=row)
            _succeed(code, f"bench_train.py without lever {name}")

    return run


# --- single kernels ---


def figures(section: str, seconds: float) -> Part:
    """A part that writes down a section of kernel_figures.py, the costliest shapes first, for about `seconds`."""

    def run(context: Context) -> None:
        from benchmarks import kernel_figures
        from benchmarks.variant_timing import start

        cases = kernel_figures.cases_of(kernel_figures.parse(["--tiny"] if context.tiny else []))
        few = {"most": 1, "rounds": 1} if context.tiny else {}
        emit = lambda row: context.emit("figure", **row)
        kernel_figures.measure([section], cases, start().device, emit, seconds, context.tiny, **few)

    return Part(section, seconds + 10, run)


def other_kernels(context: Context) -> None:
    """Optimiser, noising, loss and sampler's step: the rows of bench_adamw_ema.py and bench_diffusion.py."""
    result = context.out / "kernels.json"
    options = ["-W", "ignore", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-o", "timeout=300"]
    files = ["benchmarks/bench_diffusion.py", *([] if context.tiny else ["benchmarks/bench_adamw_ema.py"])]
    short = ["-k", "q_sample"] if context.tiny else []
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files, *short]
    code = run_command(context, [*argv, "--benchmark-json", str(result)])
    rows = json.loads(result.read_text())["benchmarks"] if result.is_file() and result.stat().st_size else []
    for row in rows:
        context.emit("figure", kernel=row["group"], name=row["name"], **row["extra_info"])
    _succeed(code, "pytest")


# --- nothing lost, and images ---


def saving(context: Context) -> None:
    """What a checkpoint of the 270M network costs training."""
    result = context.work / "saving.json"
    case = f"--config {IMAGENET64} --batch 64 --precision bf16 --rounds 3"
    if context.tiny:
        case = "--config quick --batch 2 --rounds 1 --steps 2"
    argv = [sys.executable, "benchmarks/bench_saving.py", *case.split(), "--folder", str(context.work)]
    _succeed(run_command(context, [*argv, "--json", str(result)]), "bench_saving.py")
    found = json.loads(result.read_text())
    stops = {f"{way}_stood_still_ms": found[way]["stood_still_ms"][1] for way in ("beside", "waiting")}
    numbers = {"step_ms": found["step_ms"][1], "guards_ms": found["guards_ms"][1], **stops}
    context.emit("fact", megabytes=found["megabytes"], **numbers, all=found)


def chaos(context: Context) -> None:
    """A small run that is killed at random instants loses nothing, in float32 and in fp16."""
    script = [sys.executable, "tests/chaos.py"]
    if context.tiny:  # a test of its own runs it
        _succeed(run_command(context, [*script, "--help"]), "chaos.py")
        return
    for name, flags in {"fp32": "", "fp16": "--precision fp16"}.items():
        code = run_command(context, [*script, "--kills", "5", *(["--flags", flags] if flags else [])])
        context.emit("fact", precision=name, nothing_lost=code == 0)
        _succeed(code, f"chaos.py ({name})")


def dali(context: Context) -> None:
    """DALI's decoding on the GPU: its tests, and images per second of every loader."""
    from importlib.util import find_spec

    if find_spec("nvidia.dali" if find_spec("nvidia") else "nvidia") is None:
        raise LeftOut("nvidia-dali is not installed")
    native_tests("tests/images/test_dali.py", tiny=("tests/images/test_order.py",), workers=1)(context)
    if not context.tiny:
        result = context.work / "data.json"
        argv = [sys.executable, "benchmarks/bench_data.py", "--quick", "--json", str(result)]
        _succeed(run_command(context, argv), "bench_data.py")
        context.emit("fact", loaders=json.loads(result.read_text()))


def _train(name: str, seconds: float, config: str, batches: Sequence[int], variant: str, **more: Any) -> Part:
    return Part(name, seconds, throughput(config, batches, variant, **more))


def _draw(name: str, seconds: float, config: str, batch: int, variant: str, **more: Any) -> Part:
    return Part(f"draw {name}", seconds, throughput(config, [batch], variant, draw=True, **more))


# The reference keeps 356 MB of activations per image of the 270M network, so that 128 need not fit in 80 GB.
PARTS = (
    Part("machine", 15, machine),
    Part("kernels", 120, kernels, alone=False),
    Part("train", 90, train, alone=False),
    _train("cifar10 ours", 25, CIFAR10, [256], "ours", profile=True),
    _train("cifar10 ours graph", 25, CIFAR10, [256], "ours +cuda_graph"),
    _train("270M ours", 40, IMAGENET64, [128], "ours", profile=True),
    _train("270M reference", 30, IMAGENET64, [128, 64], "reference"),
    _train("270M reference compiled", 45, IMAGENET64, [128, 64], "reference+compile", profile=True),
    _train("cifar10 reference", 15, CIFAR10, [256], "reference"),
    _train("cifar10 reference compiled", 30, CIFAR10, [256], "reference+compile"),
    _draw("270M ours", 30, IMAGENET64, 256, "ours", profile=True),
    _draw("270M reference", 25, IMAGENET64, 256, "reference"),
    Part("golden", 40, golden, alone=False),
    Part("same losses", 30, same_losses, alone=False),
    figures("norms", 70),
    _train("270M diffusers", 45, IMAGENET64, [128, 64], "diffusers"),
    _train("270M ours graph", 40, IMAGENET64, [128], "ours +cuda_graph"),
    figures("convolutions", 50),
    _draw("270M diffusers", 35, IMAGENET64, 256, "diffusers"),
    _draw("cifar10 ours", 25, CIFAR10, 512, "ours"),
    _draw("cifar10 reference", 20, CIFAR10, 512, "reference"),
    _train("cifar10 diffusers", 30, CIFAR10, [256], "diffusers"),
    _train("270M ours fp16", 40, IMAGENET64, [128], "ours", precision="fp16"),
    _train("cifar10 ours fp16", 25, CIFAR10, [256], "ours", precision="fp16"),
    figures("attention", 40),
    Part("gpu tests", 100, gpu_tests, alone=False),
    Part("sanitizer", 90, sanitizer, alone=False),
    Part("chaos", 90, chaos, alone=False),
    Part("other kernels", 60, other_kernels),
    Part("saving", 60, saving),
    Part("dali", 60, dali),
    _draw("270M reference compiled", 35, IMAGENET64, 256, "reference+compile"),
    _draw("270M ours one", 20, IMAGENET64, 1, "ours"),
    _draw("270M reference one", 15, IMAGENET64, 1, "reference"),
    _draw("270M ours sixteen", 20, IMAGENET64, 16, "ours"),
    _draw("270M reference sixteen", 15, IMAGENET64, 16, "reference"),
    _train("uncond ours", 40, "imagenet64_uncond", [128], "ours"),
    _train("uncond reference", 25, "imagenet64_uncond", [128, 64], "reference"),
    _train("lsun ours", 40, "lsun_bedroom_lr1e-4", [32], "ours"),
    _train("lsun reference", 30, "lsun_bedroom_lr1e-4", [32, 16, 8], "reference"),
    _train("upsample ours", 45, "upsample_256", [16], "ours"),
    _train("upsample reference", 35, "upsample_256", [16, 8, 4], "reference"),
    Part("levers", 400, levers("imagenet64_uncond", 128)),
)
