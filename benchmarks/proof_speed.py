"""Parts of gpu_proof.py that measure whole steps and drawing, single kernels, saving and loading."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.proof_checks import native_tests
from benchmarks.proof_part import Context, LeftOut, Part, run_command, succeed

TINY_MODEL: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
}


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

        from benchmarks.result_file import release_memory

        if context.rehearsal and "max-autotune" in variant:
            raise LeftOut("it takes an hour to choose by times that mean nothing; rehearsal/step_costs.py tries it")
        for batch in batches[:1] if context.tiny else batches:
            try:
                measure_variant(context, config, batch, variant, precision, draw, profile)
            except torch.OutOfMemoryError as error:
                context.emit("note", reason=f"batch {batch} does not fit: {str(error).splitlines()[0][:200]}")
            else:
                return
            torch._dynamo.reset()
            release_memory()
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
    """Build and time one variant; emits a row when it is timed and another when it is profiled."""
    from benchmarks import bench_sampling, bench_train, sampling_variants, train_variants
    from benchmarks.contest import quartiles
    from benchmarks.operations import executed_share, precision_of
    from benchmarks.variant_timing import measure, start
    from fastdiff.runtime.machine import tf32

    if "max-autotune" in variant:
        # Code compiled in a rehearsal, which pack_for_gpu.py may have brought along, was chosen by meaningless times.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(context.work / "autotuned")
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
        make, per_step = functools.partial(bench_train.MAKERS[variant], case), 1
    if variant.startswith("ours"):
        print("\n".join(compile_beforehand(case, draw)), flush=True)
    computed = precision_of(variant, precision, processes.device)
    row: dict[str, Any] = {"config": config, "variant": variant, "precision": computed, "batch": batch, "ratio": None}
    row["executed_share"] = executed_share(variant, settings.model, training=not draw)

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

    with tf32(False) if variant.startswith("ours") else contextlib.nullcontext():  # as in a run of fastdiff
        measure(make, case, emit, seconds=0.2 if context.tiny else 4.0, profile_steps=3 if profile else 0)


def compile_beforehand(case: Any, draw: bool) -> list[str]:
    """Start the processes that compile a variant's Triton kernels, as a run does; returns the lines that a run logs."""
    from fastdiff import precompile
    from fastdiff.models.unet import DTYPES
    from fastdiff.sampling.engine import sampling_launches
    from fastdiff.training.step_plan import training_launches

    dtype, model = DTYPES[case.precision], case.config.model
    if draw:
        launches = functools.partial(sampling_launches, model, case.diffusion(), case.table(), case.batch, dtype)
    else:
        scaled = case.precision == "fp16"
        rates = case.config.train.ema_rate
        given = (model, case.config.diffusion, case.batch, dtype)
        launches = functools.partial(training_launches, *given, rates=rates, scaled=scaled)
    return precompile.start(launches, case.device)


def compiled_code() -> dict[str, int]:
    """The numbers of Inductor's graphs that this process found in the cache, and that it had to compile."""
    from torch._dynamo.utils import counters

    seen = counters["inductor"]
    return {"graphs_found": seen["fxgraph_cache_hit"], "graphs_compiled": seen["fxgraph_cache_miss"]}


def in_one_go(config: str, batch: int) -> Callable[[Context], None]:
    """A part that records ours over a minute without a pause, as the GPU's clock and temperature settle."""

    def run(context: Context) -> None:
        from benchmarks.long_runs import sustained
        from benchmarks.train_variants import ours

        case = training_case(context, config, batch)
        found = sustained(lambda: ours(case), case, 0.5 if context.tiny else 60.0)
        context.emit("fact", config=config, variant="ours", batch=case.batch, **found)

    return run


def from_files(config: str, batch: int) -> Callable[[Context], None]:
    """A part that trains ours on JPEG files, read and decoded by its loader, and on one batch in memory, in turns."""

    def run(context: Context) -> None:
        from benchmarks import long_runs, proof_checks
        from benchmarks.train_variants import usual

        case = training_case(context, config, batch)
        given = proof_checks.pictures(context) if context.images else None
        with long_runs.pictures(given, min(case.config.model.size_hw)) as folder:
            found = long_runs.with_loader(case, folder, 0.3 if context.tiny else 15.0, usual(case))
        context.emit("fact", config=config, variant="ours", batch=case.batch, made_up=given is None, **found)

    return run


def training_case(context: Context, config: str, batch: int) -> Any:
    """The case in bf16, or a tiny one in fp32."""
    from benchmarks import bench_train, train_variants
    from benchmarks.variant_timing import start

    processes, settings = start(), bench_train.load(config)
    if context.tiny:
        settings = settings.model_copy(update={"model": shrunk(settings.model)})
    given = (2, "fp32") if context.tiny else (batch, "bf16")
    return train_variants.Case(settings, *given, processes)


def levers(config: str, batch: int) -> Callable[[Context], None]:
    """A part that times ours with each lever off beside ours, by bench_train.py, one lever after the other."""

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
            argv = [sys.executable, "benchmarks/bench_train.py", *given, *short, "--variants", "none", "--levers", name]
            code = run_command(context, [*argv, "--json", str(result)])
            rows = json.loads(result.read_text())["rows"] if result.is_file() else []
            for row in rows:
                if row["variant"] == f"ours -{name}":
                    context.emit("fact", lever=name, times_as_fast_with_it=1 / row["ratio"][1], row=row)
            succeed(code, f"bench_train.py without lever {name}")

    return run


# --- single kernels ---


def figures(section: str, seconds: float) -> Part:
    """A part that records a section of kernel_figures.py, the costliest shapes first, for about `seconds`."""

    def run(context: Context) -> None:
        from benchmarks import kernel_figures
        from benchmarks.variant_timing import start

        cases = kernel_figures.cases_of(kernel_figures.parse(["--tiny"] if context.tiny else []))
        few = {"most": 1, "rounds": 1} if context.tiny else {}
        emit = lambda row: context.emit("figure", **row)
        kernel_figures.measure([section], cases, start().device, emit, seconds, context.tiny, **few)

    return Part(section, seconds + 10, run)


def other_kernels(context: Context) -> None:
    """Record optimiser, noising, loss and sampler's step: the rows of bench_adamw_ema.py and bench_diffusion.py."""
    result = context.out / "kernels.json"
    options = ["-W", "ignore", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-o", "timeout=300"]
    files = ["benchmarks/bench_diffusion.py", *([] if context.tiny else ["benchmarks/bench_adamw_ema.py"])]
    short = ["-k", "q_sample"] if context.tiny else []
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files, *short]
    code = run_command(context, [*argv, "--benchmark-json", str(result)])
    rows = json.loads(result.read_text())["benchmarks"] if result.is_file() and result.stat().st_size else []
    for row in rows:
        context.emit("figure", kernel=row["group"], name=row["name"], **row["extra_info"])
    succeed(code, "pytest")


def saving(context: Context) -> None:
    """Record the time that a checkpoint of the 270M network costs training."""
    result = context.work / "saving.json"
    case = "--config imagenet64_270M --batch 64 --precision bf16 --rounds 3"
    if context.tiny:
        case = "--config quick --batch 2 --rounds 1 --steps 2"
    argv = [sys.executable, "benchmarks/bench_saving.py", *case.split(), "--folder", str(context.work)]
    succeed(run_command(context, [*argv, "--json", str(result)]), "bench_saving.py")
    found = json.loads(result.read_text())
    stops = {f"{way}_stood_still_ms": found[way]["stood_still_ms"][1] for way in ("beside", "waiting")}
    numbers = {"step_ms": found["step_ms"][1], "guards_ms": found["guards_ms"][1], **stops}
    context.emit("fact", megabytes=found["megabytes"], **numbers, all=found)


def dali(context: Context) -> None:
    """Run the tests of DALI's decoding on the GPU, and record images per second of every loader."""
    from importlib.util import find_spec

    if find_spec("nvidia.dali" if find_spec("nvidia") else "nvidia") is None:
        raise LeftOut("nvidia-dali is not installed")
    native_tests("tests/images/test_dali.py", tiny=("tests/images/test_order.py",), workers=1)(context)
    if not context.tiny:
        result = context.work / "data.json"
        argv = [sys.executable, "benchmarks/bench_data.py", "--quick", "--json", str(result)]
        succeed(run_command(context, argv), "bench_data.py")
        context.emit("fact", loaders=json.loads(result.read_text()))


def evaluation(context: Context) -> None:
    """Record images per second of Inception's features and their statistics, beside torch-fidelity's own loop."""
    from importlib.util import find_spec

    if find_spec("torch_fidelity") is None:
        raise LeftOut("torch-fidelity is not installed")
    result = context.work / "evaluation.json"
    argv = [sys.executable, "benchmarks/bench_evaluate.py", "--json", str(result)]
    tiny = ["--images", "4", "--rounds", "1", "--variants", "torch-fidelity,ours"]
    argv += tiny if context.tiny else ["--rounds", "3"]
    succeed(run_command(context, argv), "bench_evaluate.py")
    found = json.loads(result.read_text())
    context.emit("fact", features={row["variant"]: row["images_per_second"][1] for row in found["rows"]}, all=found)
