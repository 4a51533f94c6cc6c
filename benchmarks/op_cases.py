"""The ops of a training step and of drawing at all shapes of a configuration, as our kernels and by their definitions.

Tensors have no memory (the meta device). The network's body is bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fastdiff.kernels import reference
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_adamw_ema
from benchmarks.norm_figures import Norm
from benchmarks.step_calls import training_calls
from fastdiff import ops
from fastdiff.config.sections import Config
from fastdiff.diffusion import create_diffusion
from fastdiff.models import build_model
from fastdiff.precompile import META, Call

PRODUCTS = {"constant_and_index_propagation": False}
"""By default Inductor takes the products of noise counters for 32-bit indices, and the code doesn't compile."""


@dataclass
class Case:
    """An op at one shape. In mode triton `run` launches our kernels, in mode reference it computes the definition."""

    op: str
    shape: str
    elements: int
    """Those of its map, or of its largest tensor."""
    tensors: list[Tensor]
    """The arguments of `run`, without memory; those whose gradient a backward pass computes require one."""
    run: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Of torch._inductor.config."""
    count: int = 1
    """How often a step calls the op."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def on(device: torch.device, x: Tensor) -> Tensor:
    """A tensor like x on a device; float maps are channels-last, as the network has them."""
    if x.dim() == 4 and x.dtype.is_floating_point:
        made = torch.empty(x.shape, dtype=x.dtype, device=device, memory_format=torch.channels_last)
    else:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return made.requires_grad_(x.requires_grad)


def with_gradients(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_(x.dtype.is_floating_point) for x in tensors]


def shape_of(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def noisy(op: str, x: Tensor, tensors: list[Tensor], run: Callable[..., Any]) -> Iterator[Case]:
    """run(*tensors, noise) for images like x [B, C, H, W], with noise from counters, and with noise that is given."""
    index, shape = meta(len(x), dtype=torch.int64), tuple(x.shape[1:])
    counters = lambda *given: run(*given[:-1], ops.CounterNoise(0, given[-1], shape))
    yield Case(op, shape_of(x), x.numel(), [*tensors, index], counters, PRODUCTS)
    yield Case(f"{op} with given noise", shape_of(x), x.numel(), [*tensors, meta(*x.shape)], run)


def cases_of_call(call: Call) -> Iterator[Case]:
    """The cases of an op that a training step calls; with the loss also those of drawing images of that shape."""
    op = call.op.removeprefix("fastdiff::")
    match op, call.args:
        case "group_norm_silu" | "add_group_norm_silu", (x, *_):
            norm = Norm(call)
            skip, offset = norm.given["skip"], norm.given["offset"]
            elements = x.numel() + (0 if skip is None else skip.numel())
            tensors = with_gradients(*norm.tensors(call.args).values())
            shape = norm.shape + ("" if offset is None else " offset")
            yield Case(op, shape, elements, tensors, norm.definition(ops))
        case "output_layer", (x, second, second_bias, *parameters, _):

            def layer(x: Tensor, second: Tensor, second_bias: Tensor, *parameters: Tensor) -> Tensor:
                chosen = ops.output_layer if ops.uses_kernels(x) else reference.output_layer
                return chosen(x, *parameters, second=second, second_bias=second_bias)

            tensors = with_gradients(x, second, second_bias, *parameters)
            yield Case(op, shape_of(x), x.numel(), tensors, layer)
        case "q_sample", (images, rows, *_, dtype, channels):
            x = images.permute(0, 3, 1, 2)
            run = lambda x, rows, noise: ops.q_sample(x, rows, noise, dtype=dtype, channels=channels)
            yield from noisy(op, x, [images, rows], run)
            noise = lambda index: ops.image_noise(0, index, 0, tuple(x.shape[1:]))
            yield Case("image_noise", shape_of(x), x.numel(), [meta(len(x), dtype=torch.int64)], noise, PRODUCTS)
        case "diffusion_loss", (output, images, rows, *_, epsilon, variance, kl, vb_scale):
            given = {"epsilon": epsilon, "variance": variance, "kl": kl, "vb_scale": vb_scale}
            run = lambda output, x, rows, noise: ops.diffusion_loss(output, x, rows, noise, **given)[0]
            x = images.permute(0, 3, 1, 2)
            yield from noisy(op, x, [*with_gradients(output), images, rows], run)
            yield from sampler_cases(output.detach(), meta(*x.shape), meta(len(x), len(ops.STEP_COLUMNS)), variance)
        case "image_uniform", (_, index, draw):
            uniform = lambda index: ops.image_uniform(0, index, draw)
            yield Case(op, shape_of(index), len(index), [index], uniform)


def sampler_cases(output: Tensor, x: Tensor, rows: Tensor, variance: str) -> Iterator[Case]:
    """A step of DDPM, and one of DPM-Solver++(3M), which has two earlier predictions and no noise."""

    def step(output: Tensor, x: Tensor, rows: Tensor, *history: Tensor, noise: Any) -> Any:
        given = {"history": history, "variance": variance, "input_dtype": torch.bfloat16}
        x_next, x_start, network_input = ops.sampler_step(output, x, rows, noise, **given)
        if network_input is x_next:  # by the definition, which doesn't convert it
            network_input = F.pad(x_next.bfloat16(), (0, 0, 0, 0, 0, 8 - x.shape[1]))
        return x_next, x_start, network_input

    yield from noisy("sampler_step", x, [output, x, rows], lambda *given: step(*given[:-1], noise=given[-1]))
    multistep = lambda *given: step(*given, noise=None)
    yield Case("sampler_step with two predictions", shape_of(x), x.numel(), [output, x, rows, x, x], multistep)


def cases_of(config: Config, B: int) -> Iterator[Case]:
    """All ops of a configuration with batches of B images, at each shape once."""
    found: dict[tuple[str, str], Case] = {}
    for call in training_calls(config, B, torch.bfloat16, "fastdiff::"):
        for case in cases_of_call(call):
            case.count = call.count + (known.count if (known := found.get((case.op, case.shape))) else 0)
            found[case.op, case.shape] = case
    yield from found.values()
    T = create_diffusion(config.diffusion, config.model.learn_sigma).num_timesteps
    tables = [meta(B, dtype=torch.float64), meta(T, dtype=torch.int64), meta(T)]
    yield Case("timesteps_at", str(B), B, tables, ops.timesteps_at)
    losses = [meta(3, 5, 3, dtype=torch.float64), meta(B, dtype=torch.int64), *(meta(B) for _ in range(4))]
    add = lambda sums, t, weights, *losses: ops.add_losses_(sums, losses, t, weights, T)
    yield Case("add_losses_", f"3x{B}", 3 * B, losses, add)
    with META:
        parameters = build_model(config.model).parameters()
    yield from update_cases(sum(p.numel() for p in parameters))


def update_cases(numel: int) -> Iterator[Case]:
    """The optimiser's update and the gradient's norm over one flat buffer, which suits Inductor better than a list."""
    state = bench_adamw_ema.make([numel], META)

    def update(*tensors: Tensor) -> None:
        given = bench_adamw_ema.State(*([x] for x in tensors))
        (bench_adamw_ema.ours(given) if ops.uses_kernels(tensors[0]) else lambda: bench_adamw_ema.plain(given))()

    squares = lambda x: ops.squared_norm([x]) if ops.uses_kernels(x) else x.square().sum()  # no _foreach_norm
    yield Case("adamw_ema_", str(numel), numel, [x for (x,) in state], update)
    yield Case("squared_norm", str(numel), numel, state.grads, squares)
