"""Compiles kernels ahead of time, then trains and samples with kernels that are launched on a simulated GPU.

Prints as JSON which kernels the run found in Triton's cache and which it compiled: {"found": names, "compiled": names,
"ahead": number of launches compiled ahead}. The process must run without TRITON_INTERPRET, with an empty cache.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from fastdiff.kernels import aot
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastdiff import ops, precompile
from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.solvers import solver_table
from fastdiff.models import UNetSettings, build_model
from fastdiff.models.regions import UNetRegions
from fastdiff.models.unet import freeze
from fastdiff.sampling.engine import Engine, sampling_launches
from fastdiff.sampling.guided_network import Guidance, GuidedNetwork
from fastdiff.training.step_plan import training_launches
from helpers import small_trainer as small
from helpers.small_trainer import small_trainer

ARCH = 90
MODEL: dict[str, Any] = {**small.MODEL, "channel_mult": "1", "attention_resolutions": "8"}
WIDE = {**MODEL, "num_channels": 64}  # shares no launch of a norm with MODEL
DIFFUSION = DiffusionSettings(diffusion_steps=50, noise_schedule="cosine")
RATES = (0.9, 0.99)
LABELLED = UNetSettings(**{**MODEL, "class_cond": True, "null_class": True, "num_classes": 3})
DRAWING = (create_diffusion(DIFFUSION, learn_sigma=True), solver_table(create_diffusion(DIFFUSION, True), "ddpm"))
GUIDANCE = Guidance(2.0, (0.0, 1.0))
BATCH = 5


class NoGPU:
    """The parts of a driver that Triton uses in a launch. It loads and runs nothing."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *args: None)
    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def recorded() -> list[Any]:
    """Return the launches of the three training steps, which are not compiled, and of the drawing below."""
    model = UNetSettings(**MODEL)
    plain: dict[str, Any] = {"rates": RATES, "compiled": False}
    found = training_launches(model, DIFFUSION, 2, torch.bfloat16, more=True, **plain)
    engine: dict[str, Any] = {**plain, "through_engine": True}
    found += training_launches(model, DIFFUSION, 2, torch.bfloat16, **engine)
    found += training_launches(UNetSettings(**WIDE), DIFFUSION, 2, torch.bfloat16, in_regions=True, **engine)
    return found + sampling_launches(LABELLED, *DRAWING, BATCH, torch.bfloat16, guidance=GUIDANCE)


def compile_ahead(launches: list[Any]) -> int:
    """Compile the launches in two processes, as a run does, and return their number."""
    lines = list(dict.fromkeys(map(aot.to_json, launches)))
    workers = [precompile.spawn(ARCH, lines[i::2]) for i in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert aot.missing(lines, ARCH) == []
    return len(lines)


def step(in_regions: bool = False, **given: Any) -> None:
    model, rates = WIDE if in_regions else MODEL, ",".join(map(str, RATES))
    trainer = small_trainer(model=model, dtype=torch.bfloat16, ema_rate=rates, **given)
    draw_timesteps = trainer.draw_timesteps  # its kernel does nothing either, and leaves numbers that are no timesteps
    trainer.draw_timesteps = lambda batch, key: tuple(map(torch.zeros_like, draw_timesteps(batch, key)))
    if in_regions:
        trainer.model.forward = UNetRegions(trainer.model)  # type: ignore[method-assign]
    trainer.take_step()


def draw() -> None:
    process, plan = DRAWING
    model = freeze(build_model(LABELLED).set_precision(torch.bfloat16))
    engine = Engine(GuidedNetwork(model, plan, process, GUIDANCE), batch_size=BATCH, seed_and_key=SAMPLES)
    engine.draw(torch.arange(BATCH), torch.arange(BATCH) % 3)


def main() -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    ops.use("triton", anywhere=True)
    ahead = compile_ahead(recorded())
    knobs.compilation.listener = lambda *, metadata, cache_hit, **_: seen[cache_hit].add(metadata["name"])
    driver.set_active(NoGPU())
    step()
    step(zero_stage=2, precision="bf16")  # through DeepSpeed
    step(zero_stage=2, precision="bf16", in_regions=True)
    draw()
    print(json.dumps({"found": sorted(seen[True]), "compiled": sorted(seen[False]), "ahead": ahead}))


if __name__ == "__main__":
    main()
