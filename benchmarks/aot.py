"""Compile every kernel that the shipped configurations launch, for GPUs that are not here, and say what became of it.

    python benchmarks/aot.py                                     all configurations, for sm_80, sm_90 and sm_100
    python benchmarks/aot.py --configs cifar10_uncond --archs 90

Each configuration takes a training step and a few sampling steps on tensors without memory; what its ops would launch
is compiled and the machine code read. Exit code 1 when a launch breaks a rule: no spills, at most 255 registers,
shared memory within the GPU's limit, 128-bit loads and stores where a kernel moves maps, tensor-core instructions
where it multiplies matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("benchmarks/aot.py compiles kernels, which TRITON_INTERPRET=1 replaces; unset it")


import torch
from fastdiff.kernels import aot, launch
from fastdiff.kernels.aot import Compiled
from fastdiff.kernels.reference import CounterNoise
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.config import Config, SuperResConfig
from fastdiff.diffusion import create_diffusion, samplers
from fastdiff.models import SuperResSettings, build_model

CONFIGS = Path(__file__).parent.parent / "configs"
ARCHS = (80, 90, 100)

# Kernels that move maps or flat buffers: whose loads (l) and stores (s) must be 128 bits wide. Those that are not here
# handle a few numbers per image, or maps of three channels.
BULK = {
    "slab_forward": "ls",
    "slab_backward": "ls",
    "moments": "l",
    "sum_moments": "ls",
    "apply": "ls",
    "backward_sums": "l",
    "apply_backward": "ls",
    "image_noise": "s",
    "forward_short": "ls",
    "forward_long": "ls",
    "backward_whole": "ls",
    "backward_short": "ls",
    "backward_long": "ls",
    "pointers": "ls",
    "boxes": "ls",
    "adamw_ema": "ls",
    "squares": "l",
}
MATMUL = {*(name for name in BULK if name.endswith(("_short", "_long", "_whole"))), "pointers", "boxes"}


class OpCalls(TorchDispatchMode):
    """Collects calls of fastdiff's ops, one of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[str, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdiff":
            name = func.name().split("::")[1].split(".")[0]
            self.calls.setdefault(f"{name} {_signature(args)}", (name, args))
        return func(*args, **(kwargs or {}))


def _signature(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_signature, value)) + ")"
    return repr(value)


def calls_of(file: Path, precision: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The calls of fastdiff's ops in a training step and in sampling steps of a configuration."""
    content = json.loads(file.read_text())
    kind = SuperResConfig if "large_size" in content.get("model", {}) else Config
    config = kind.model_validate(content)
    meta = torch.device("meta")
    with meta:
        model = build_model(config.model).train().set_precision(precision)
    diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
    with OpCalls() as seen, ops.using("triton", anywhere=True):
        for batch, training in ((min(config.train.batch_size, 64), True), (4, False)):
            C, (H, W) = config.model.in_channels, config.model.size_hw
            index = torch.empty(batch, dtype=torch.int64, device=meta)
            kwargs: dict[str, Any] = {"y": index} if config.model.class_cond else {}
            if isinstance(config.model, SuperResSettings):
                kwargs["low_res"] = torch.empty(batch, C, *config.model.small_size, device=meta)
            if training:
                images = torch.empty(batch, H, W, C, dtype=torch.uint8, device=meta)
                noise = CounterNoise(1 << 32, index, (C, H, W))
                diffusion.training_losses(model, images, index, kwargs, noise)["loss"].mean().backward()
                continue
            x, made = torch.empty(batch, C, H, W, device=meta), CounterNoise(1 << 32, index, (C, H, W), index)
            model.eval()
            for loop in (samplers.p_sample_loop, samplers.ddim_sample_loop):
                steps = loop(diffusion, model, x, lambda t, made=made: made, model_kwargs=kwargs)
                for _ in range(2):
                    next(steps)
    yield from seen.calls.values()


def launches_of(files: list[Path]) -> list[launch.Launch]:
    """What those calls launch, each kind of compilation once."""
    with launch.record() as recorded:
        for file in files:
            for name, args in calls_of(file):
                launch.IMPLEMENTATIONS[name](*args)
        for name, args in (*optimiser_calls(), *convolution_calls()):
            launch.IMPLEMENTATIONS[name](*args)
    return aot.unique(recorded)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def optimiser_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """AdamW over one flat buffer with one and with two averages, and the norm of its gradient."""
    flat, scalar = _meta(55_000_000, dtype=torch.float32), _meta(dtype=torch.float32)
    for rates in ([0.9999], [0.9999, 0.999]):
        numbers = (rates, 1e-4, 0.9, 0.999, 1e-8, 0.0, None, None, len(rates) == 1)
        lists = ([flat], [flat], [flat], [flat], [flat] * len(rates), [], [scalar])
        yield "adamw_ema_", (*lists, *numbers)
    yield "squared_norm", ([flat],)


def convolution_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """conv3x3, which no configuration chooses: the two convolutions of a residual block."""
    for C1, C2, C_out, side in ((128, 128, 128, 64), (384, 0, 384, 16), (512, 0, 512, 8)):
        channels_last = lambda C, side=side: _meta(4, side, side, C).permute(0, 3, 1, 2)
        affine, weight, bias = _meta(4, C1 + C2, dtype=torch.float32), _meta(C_out, 3, 3, C1 + C2), _meta(C_out)
        x, skip = channels_last(C1), channels_last(C2) if C2 else None
        yield "conv3x3", (x, weight, bias, skip, affine, affine, affine, None, True, False)
        yield "conv3x3", (x, weight, bias, skip, affine, affine, affine, channels_last(C_out), True, False)


def _multiplies(made: Compiled) -> bool:
    """Whether the products run on tensor cores; those of 32 rows or fewer by HMMA everywhere, padding costs more."""
    length = re.search(r"\bL=(\d+)", made.variant)
    few = length is not None and int(length[1]) <= 32
    return aot.MATMUL[made.arch] in made.matmuls or (few and "HMMA" in made.matmuls)


def broken_rules(made: Compiled) -> list[str]:
    """What a compiled launch gets wrong, in words; empty when nothing."""
    wrong = []
    if made.spills:
        wrong.append(f"{made.spills} spills")
    if made.registers > 255:
        wrong.append(f"{made.registers} registers")
    if made.shared > aot.SHARED_LIMIT[made.arch]:
        wrong.append(f"{made.shared} bytes of shared memory")
    bulk = BULK.get(made.kernel, "")
    if "l" in bulk and not made.wide_loads():
        wrong.append("no 128-bit loads")
    if "s" in bulk and not made.wide_stores():
        wrong.append("no 128-bit stores")
    if made.kernel in MATMUL and not _multiplies(made):
        wrong.append(f"no {aot.MATMUL[made.arch]}")
    return wrong


def row(made: Compiled) -> str:
    """One line of the table."""
    widths = lambda counts: " ".join(f"{n}x{bits}" for bits, n in counts.items())
    core = " ".join(f"{n}x{name}" for name, n in {**made.matmuls, **made.others}.items())
    verdict = "; ".join(broken_rules(made)) or "ok"
    return (
        f"sm_{made.arch:<4}{made.kernel:26}{made.registers:5}{made.spills:4}{made.shared:8}{made.warps:4}  "
        f"{widths(made.loads):26}{widths(made.stores):18}{core:24}{verdict:12}  {made.variant}"
    )


_jobs: list[tuple[launch.Launch, int]] = []  # forked processes see it; kernels can't be sent to them


def compile_job(i: int) -> Compiled:
    return aot.compile_launch(*_jobs[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--configs", default=",".join(names), help="names of configurations (default: all)")
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="compute capabilities times ten")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    args = parser.parse_args()
    unknown = [name for name in args.configs.split(",") if name not in names]
    if unknown:
        sys.exit(f"--configs: {unknown[0]} is not one of {', '.join(names)}")
    warnings.simplefilter("ignore")  # without memory there is no layout to keep
    launches = launches_of([CONFIGS / f"{name}.json" for name in args.configs.split(",")])
    archs = [int(arch) for arch in args.archs.split(",")]
    print(f"{len(launches)} compilations for each of {', '.join(f'sm_{arch}' for arch in archs)}", flush=True)
    print(
        f"{'GPU':7}{'kernel':26}{'regs':>5}{'spl':>4}{'shared':>8}{'wrp':>4}  {'loads x bits':26}{'stores x bits':18}"
    )
    table, wrong = [], 0
    _jobs.extend((each, arch) for each in launches for arch in archs)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for made in pool.map(compile_job, range(len(_jobs))):
            print(row(made), flush=True)
            table.append({**asdict(made), "wrong": broken_rules(made)})
            wrong += bool(broken_rules(made))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(table)} compiled, {wrong} break a rule")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
