"""Solvers agree with diffusers' schedulers, given the same outputs of a network at the same noise levels.

The schedulers' float32 tables are replaced by ours, so that the updates are compared. DPMSolverMultistep computes in
float32 in any case.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import relative_error
from torch import Tensor

from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion, keep_steps, solver_table
from fastdiff.diffusion.samplers import Step, solve

diffusers = pytest.importorskip("diffusers")
# diffusers passes a tensor to np.array, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FLOAT32, FLOAT64 = 1e-5, 1e-9


def spaced(steps: int, spacing: str = "logsnr") -> GaussianDiffusion:
    settings = DiffusionSettings(diffusion_steps=1000, noise_schedule="cosine")
    return create_diffusion(settings, False, keep_steps(settings, steps, spacing, 80.0))


def start() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: Tensor, step: int) -> Tensor:
    """An arbitrary smooth function of x and the step."""
    return 0.8 * torch.sin(x + 0.1 * step) + 0.3 * x.roll(1, dims=3)


def noise(step: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step + 1), dtype=torch.float64)


def ours(diffusion: GaussianDiffusion, solver: str, eta: float = 0.0, clip: bool = False) -> list[Step]:
    return list(solve(network, start(), solver_table(diffusion, solver, eta), noise, clip=clip))


def scheduler(kind: str, diffusion: GaussianDiffusion, **settings: Any) -> Any:
    """Make a scheduler with the noise levels and the timesteps of the process."""
    count = diffusion.num_timesteps
    betas = diffusion.schedule.betas
    peer = getattr(diffusers, kind)(num_train_timesteps=count, trained_betas=betas, **settings)
    peer.set_timesteps(count)
    noise_levels = torch.from_numpy(diffusion.schedule.sqrt_recipm1_alphas_cumprod.copy())
    peer.sigmas = torch.cat([noise_levels.flip(0), torch.zeros(1, dtype=torch.float64)])
    peer.timesteps = torch.arange(count - 1, -1, -1)
    return peer


def theirs(peer: Any, **noisy: bool) -> list[Tensor]:
    x, samples = start(), []
    for t in peer.timesteps.tolist():
        given = {"variance_noise": noise(t)} if noisy else {}
        x = peer.step(network(x, t), t, x, **given).prev_sample.double()
        samples.append(x)
    return samples


def assert_same(steps: list[Step], samples: list[Tensor], tolerance: float) -> None:
    assert len(steps) == len(samples)
    for step, sample in zip(steps, samples, strict=True):
        assert relative_error(step.sample, sample) < tolerance, f"step {step.t}"


@pytest.mark.parametrize("spacing", ["logsnr", "uniform"])
@pytest.mark.parametrize("steps", [3, 12, 30])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpm_solver(solver: str, steps: int, spacing: str) -> None:
    """The last step, to noise 0, is of first order in both."""
    diffusion = spaced(steps, spacing)
    kind = "sde-dpmsolver++" if solver.endswith("sde") else "dpmsolver++"
    settings = {"solver_order": 2, "algorithm_type": kind, "final_sigmas_type": "zero"}
    peer = scheduler("DPMSolverMultistepScheduler", diffusion, **settings)
    assert_same(ours(diffusion, solver), theirs(peer, noisy=True), FLOAT32)


@pytest.mark.parametrize("steps", [4, 12, 30])
def test_third_order(steps: int) -> None:
    """UniPC's predictor of order 3 without its corrector is the same integral of the same polynomial.

    DPMSolverMultistep's third order has half the curvature of the polynomial, and another one in its stochastic form.
    """
    diffusion = spaced(steps)
    off = {"disable_corrector": list(range(steps))}
    peer = scheduler("UniPCMultistepScheduler", diffusion, solver_order=3, final_sigmas_type="zero", **off)
    assert_same(ours(diffusion, "dpmpp_3m"), theirs(peer), FLOAT64)


@pytest.mark.parametrize("spacing", ["logsnr", "uniform"])
@pytest.mark.parametrize("steps", [3, 12, 30])
def test_unipc(steps: int, spacing: str) -> None:
    diffusion = spaced(steps, spacing)
    settings = {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
    peer = scheduler("UniPCMultistepScheduler", diffusion, **settings)
    assert_same(ours(diffusion, "unipc"), theirs(peer), FLOAT64)


def test_heun() -> None:
    """The scheduler works on x / alpha, so x is scaled before and after; only samples of whole steps are compared."""
    diffusion = spaced(12)
    peer = scheduler("HeunDiscreteScheduler", diffusion)
    levels = peer.sigmas
    peer.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    alpha = torch.from_numpy(diffusion.schedule.sqrt_alphas_cumprod.copy())
    table = solver_table(diffusion, "heun")
    peer.set_begin_index(0)
    peer._step_index = 0
    x, samples = start() / alpha[-1], []
    for row, step in enumerate(table.steps.tolist()):
        x = peer.step(network(x * alpha[step], step), peer.timesteps[0], x).prev_sample
        after = 1.0 if step == 0 and row == table.num_evaluations - 1 else alpha[table.steps[row + 1]]
        if table.complete[row]:
            samples.append(x * after)
    assert_same(ours(diffusion, "heun"), samples, FLOAT64)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(eta: float, clip: bool) -> None:
    diffusion = spaced(12)
    settings = {"clip_sample": clip, "set_alpha_to_one": True}
    peer = scheduler("DDIMScheduler", diffusion, **settings)
    peer.alphas_cumprod = torch.from_numpy(diffusion.schedule.alphas_cumprod.copy())
    x, samples = start(), []
    for t in range(11, -1, -1):
        # By default the scheduler does not recompute the noise after clipping the prediction.
        given = {"use_clipped_model_output": clip, "variance_noise": noise(t) if eta else None}
        x = peer.step(network(x, t), t, x, eta=eta, **given).prev_sample
        samples.append(x)
    assert_same(ours(diffusion, "ddim", eta, clip), samples, FLOAT64)
