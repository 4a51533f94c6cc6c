"""Sampling loops: generators that yield the state after every step, from noise to images.

`noise(t)` returns the standard normal noise [B, C, H, W] of step t, as a tensor or as counters, so each image can have
its own seed, and a test can pass recorded noise. One op computes the next x from the network's output; solvers are
tables of its coefficients (diffusion.solvers). `sampling.engine` runs the same tables in place, for jobs.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.process import GaussianDiffusion, Model, ModelMeanType
from fastdiff.diffusion.solvers import SolverTable, solver_table

Noise = Callable[[int], ops.Noise]
Gradient = Callable[[Tensor, int], Tensor]
"""gradient(x, step) → that of a classifier's log probability by x [B, C, H, W], times its scale, at a kept step."""


@dataclass(frozen=True)
class Step:
    """The state after step t: the sample x_{t-1} (x_{t+1} in reverse) and the predicted x_0.

    t counts down to 0 with every solver. Heun's method predicts x_0 at the trial point.
    """

    t: int
    sample: Tensor
    pred_xstart: Tensor


@torch.no_grad()
def solve(
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    table: SolverTable,
    noise: Noise | None = None,
    *,
    epsilon: bool = True,
    clip: bool = True,
    input_dtype: torch.dtype | None = None,
    gradient: Gradient | None = None,
) -> Iterator[Step]:
    """Run a solver table from x_T [B, C, H, W] float32. Yields a Step after every complete row.

    predict(network_input, step)  The network's output [B, C or 2C, H, W] at that kept step of the schedule: the noise,
                                  or x_0 if not `epsilon`. network_input is x, or, if a kernel computed it and
                                  `input_dtype` is given, x padded to [B, 8, H, W] in that dtype.
    noise(step)                   Called in rows that add noise. May be None if the table is not stochastic.
    clip                          Clip the predicted x_0 to [-1, 1].
    gradient(x, step)             Guides as the table says; None without a classifier.

    A float64 x is computed in float64 by the reference ops, because the kernels compute in float32.
    """
    if table.stochastic and noise is None:
        raise ValueError("the solver is stochastic and needs noise")
    dtype = torch.promote_types(x.dtype, torch.float32)
    coefficients = torch.from_numpy(table.coefficients).to(x.device, dtype)
    takes_noise, history_used = table.column("sigma") != 0, table.history_used
    history: deque[Tensor] = deque(maxlen=table.history)
    t = int(table.complete.sum())
    network_input = x
    for row, step in enumerate(table.steps.tolist()):
        x, pred_xstart, network_input = ops.sampler_step(
            predict(network_input, step),
            x,
            coefficients[row].expand(len(x), -1),
            noise(step) if noise is not None and takes_noise[row] else None,
            gradient=None if gradient is None else gradient(x, step),
            history=tuple(itertools.islice(history, history_used[row])),
            epsilon=epsilon,
            clip=clip,
            variance=table.variance,
            input_dtype=input_dtype,
        )
        history.appendleft(pred_xstart)
        if table.complete[row]:
            t -= 1
            yield Step(t, x, pred_xstart)


def _timesteps(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


def _loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    noise: Noise | None,
    table: SolverTable,
    clip_denoised: bool,
    model_kwargs: dict[str, Any] | None,
    gradient: Gradient | None,
) -> Iterator[Step]:
    dtype, _ = getattr(model, "input_format", None) or (None, None)

    def predict(network_input: Tensor, step: int) -> Tensor:
        return model(network_input, diffusion.model_timesteps(_timesteps(x, step)), **(model_kwargs or {}))

    epsilon = diffusion.mean_type is ModelMeanType.EPSILON
    yield from solve(
        predict, x, table, noise, epsilon=epsilon, clip=clip_denoised, input_dtype=dtype, gradient=gradient
    )


def p_sample_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    noise: Noise,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    gradient: Gradient | None = None,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) from x = x_T [B, C, H, W] float32."""
    table = solver_table(diffusion, "ddpm")
    yield from _loop(diffusion, model, x, noise, table, clip_denoised, model_kwargs, gradient)


def ddim_sample_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    noise: Noise | None = None,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
    gradient: Gradient | None = None,
) -> Iterator[Step]:
    """DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502): eta 0 is deterministic and needs
    no noise, 1 is as noisy as DDPM."""
    table = solver_table(diffusion, "ddim", eta)
    yield from _loop(diffusion, model, x, noise, table, clip_denoised, model_kwargs, gradient)


@torch.no_grad()
def ddim_reverse_step(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    step: int,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> Step:
    """One step of the deterministic DDIM flow towards noise: x_t → x_{t+1} (Song et al. 2020, section 4.3)."""
    t = _timesteps(x, step)
    pred_xstart = diffusion.p_mean_variance(model, x, t, clip_denoised, model_kwargs).pred_xstart
    eps = diffusion.predict_eps_from_xstart(x, t, pred_xstart)
    a_next = diffusion.at("alphas_cumprod_next", t)
    coefficients = torch.stack([a_next.sqrt(), (1 - a_next).sqrt()], dim=1)
    return Step(step, ops.q_sample(pred_xstart, coefficients, eps), pred_xstart)


def ddim_reverse_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    x: Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Encode images x_0 [B, C, H, W] into noise, deterministically."""
    for step in range(diffusion.num_timesteps):
        state = ddim_reverse_step(diffusion, model, x, step, clip_denoised, model_kwargs)
        x = state.sample
        yield state
