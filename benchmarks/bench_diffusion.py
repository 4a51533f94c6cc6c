"""Times q_sample, diffusion_loss (with its gradient) and sampler_step: ours, PyTorch eager, torch.compile.

Noise is computed from counters unless the row says that it is given. The bytes counted are those of inputs and results,
so rows that compute noise are bound by its arithmetic, not by memory. Rows of torch.compile are given the noise,
because it treats the counters' products as 32-bit indices, which Triton refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastdiff.kernels import reference, reference_diffusion
from fastdiff.kernels.reference import CounterNoise
from gpu_timing import rotated
from torch import Tensor

from fastdiff.diffusion import DiffusionSettings, create_diffusion

SHAPES = {"64x64": (128, 64), "256x256": (16, 256)}
IMPLEMENTATIONS = ["ours", "ours, noise given", "eager", "compile, noise given"]


def setup(shape: str, device: torch.device, small: bool) -> Callable[[int], dict[str, Any]]:
    B, side = (2, 32) if small else SHAPES[shape]
    process = create_diffusion(DiffusionSettings(noise_schedule="cosine", diffusion_steps=4000), learn_sigma=True)

    def make(i: int) -> dict[str, Any]:
        torch.manual_seed(i)
        t = torch.randint(1, 4000, (B,), device=device)
        index = torch.arange(B, device=device)
        noise = CounterNoise(i, index, (3, side, side))
        channels_last = lambda c: torch.randn(B, side, side, c, device=device).permute(0, 3, 1, 2)
        return {
            "images": torch.randint(0, 256, (B, side, side, 3), dtype=torch.uint8, device=device),
            "rows": process._loss_table(device)[t],
            "step_rows": torch.randn(B, len(reference_diffusion.STEP_COLUMNS), device=device),
            "counters": noise,
            "noise": reference.image_noise(i, index, 0, (3, side, side)),
            "output": channels_last(6),
            "x": channels_last(3),
        }

    return make


def chosen(name: str, module: str, op: str) -> Callable[..., Any]:
    if name.startswith("ours"):
        if not torch.cuda.is_available():
            pytest.skip("Triton kernels need a GPU")
        import importlib

        return getattr(importlib.import_module(f"fastdiff.kernels.{module}"), op)
    definition = getattr(reference_diffusion, op)

    def plain(*args: Any, **settings: Any) -> Any:
        args = tuple(
            reference.image_noise(a.seed, a.index, 0, a.shape) if isinstance(a, CounterNoise) else a for a in args
        )
        return definition(*args, **settings)

    return torch.compile(plain, dynamic=False) if name.startswith("compile") else plain


def noise_of(name: str, made: dict[str, Any]) -> Any:
    return made["noise"] if name.endswith("given") else made["counters"]


def total_bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_q_sample(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"q_sample {shape}"
    function, make = chosen(name, "q_sample", "q_sample"), setup(shape, device, small)

    def prepared(i: int) -> tuple[Any, ...]:
        made = make(i)
        return made["images"], made["rows"][:, :2], noise_of(name, made)

    inputs = rotated(prepared)
    call = lambda x, rows, noise: function(x, rows, noise, dtype=torch.bfloat16, channels=8)
    gpu_time(call, inputs, bytes_moved=total_bytes(*inputs[0], call(*inputs[0])))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_loss(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"diffusion_loss and gradient {shape}"
    function, make = chosen(name, "diffusion_loss", "diffusion_loss"), setup(shape, device, small)

    def prepared(i: int) -> tuple[Any, ...]:
        made = make(i)
        return made["output"].requires_grad_(), made["images"], made["rows"], noise_of(name, made)

    def call(output: Tensor, images: Tensor, rows: Tensor, noise: Any) -> Tensor:
        loss = function(output, images, rows, noise, variance="range", vb_scale=4.0)[0]
        return torch.autograd.grad(loss.mean(), output)[0]

    inputs = rotated(prepared)
    gpu_time(call, inputs, bytes_moved=total_bytes(*inputs[0], inputs[0][0]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_step(name: str, shape: str, gpu_time: Any, benchmark: Any, device: torch.device, small: bool) -> None:
    benchmark.group = f"sampler_step {shape}"
    function, make = chosen(name, "sampler_step", "sampler_step"), setup(shape, device, small)
    ours = {"input_dtype": torch.bfloat16} if name.startswith("ours") else {}

    def prepared(i: int) -> tuple[Any, ...]:
        made = make(i)
        return made["output"], made["x"], made["step_rows"], noise_of(name, made)

    inputs = rotated(prepared)
    x = inputs[0][1]
    moved = total_bytes(*inputs[0], x, x) + 16 * x.numel() // 3
    gpu_time(lambda *args: function(*args, variance="range", **ours), inputs, bytes_moved=moved)
