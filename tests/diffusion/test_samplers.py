"""Samplers return the known answer for data from N(0, s²), whose best predictor is linear in x_t."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.tiny import relative_error
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import SOLVERS, DiffusionSettings, GaussianDiffusion, create_diffusion, keep_steps, solver_table
from fastdiff.diffusion.samplers import ddim_reverse_loop, ddim_sample_loop, p_sample_loop, solve

S = 0.5
SHAPE = (3, 16, 16)
COUNT = 32
VALUES = COUNT * 3 * 16 * 16  # 24576 independent values: their spread is known to 1 / sqrt(2 * 24576) = 0.45%


def process(steps: int, schedule: str = "cosine", learn_sigma: bool = False, **settings: object) -> GaussianDiffusion:
    given = {"diffusion_steps": steps, "noise_schedule": schedule, "rescale_timesteps": False, **settings}
    return create_diffusion(DiffusionSettings(**given), learn_sigma)


def best_predictor(diffusion: GaussianDiffusion, s: float = S) -> Callable[..., Tensor]:
    """E[eps | x_t] = sqrt(1 - a) x_t / (a s² + 1 - a) for x_0 ~ N(0, s²), a the cumulative alpha."""
    a = torch.from_numpy(diffusion.schedule.alphas_cumprod)
    factor = ((1 - a).sqrt() / (a * s**2 + 1 - a)).float()
    place = {original: kept for kept, original in enumerate(diffusion.schedule.timestep_map.tolist())}

    def model(x: Tensor, t: Tensor) -> Tensor:
        kept = torch.tensor([place[int(step)] for step in t])
        eps = factor[kept][:, None, None, None] * x
        # With learned variances the second half picks the posterior's end of the range.
        return torch.cat([eps, -torch.ones_like(x)], dim=1) if diffusion.learns_variance else eps

    return model


def noise_source(seed: int = 0) -> Callable[[int], Tensor]:
    return lambda t: ops.image_noise(seed, torch.arange(COUNT), t + 1, SHAPE)


def start(seed: int = 0) -> Tensor:
    return ops.image_noise(seed, torch.arange(COUNT), 0, SHAPE)


def last(steps: object) -> Tensor:
    *_, final = steps  # type: ignore[misc]
    return final.sample


# The spread may be off by four standard errors (4 * 0.45%) and by the error of a finite number of steps, which is of
# order 1 / steps and below 2% at 200 steps.
TOLERANCE = 0.038


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
def test_ancestral_sampling_returns_the_spread(schedule: str, variance: str) -> None:
    learned = variance == "learned"
    diffusion = process(250, schedule, learned, sigma_small=variance == "posterior")
    images = last(p_sample_loop(diffusion, best_predictor(diffusion), start(), noise_source(), clip_denoised=False))
    assert images.std().item() == pytest.approx(S, rel=TOLERANCE)
    assert abs(images.mean().item()) < 5 * S / VALUES**0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_returns_the_spread(schedule: str, eta: float) -> None:
    diffusion = process(250, schedule)
    model = best_predictor(diffusion)
    images = last(ddim_sample_loop(diffusion, model, start(), noise_source(), clip_denoised=False, eta=eta))
    assert images.std().item() == pytest.approx(S, rel=TOLERANCE)
    assert abs(images.mean().item()) < 5 * S / VALUES**0.5


@pytest.mark.parametrize("respacing", ["ddim250", "200", "80,80,80"])
def test_respaced_chain_returns_the_spread(respacing: str) -> None:
    """The network gets the original chain's timesteps."""
    diffusion = process(1000, "linear", timestep_respacing=respacing)
    model = best_predictor(diffusion)
    for sampler in (p_sample_loop, ddim_sample_loop):
        images = last(sampler(diffusion, model, start(), noise_source(), clip_denoised=False))
        assert images.std().item() == pytest.approx(S, rel=TOLERANCE)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_returns_the_spread(solver: str, schedule: str) -> None:
    """Few steps of a long chain in float32 suffice, but ancestral sampling needs many."""
    settings = DiffusionSettings(diffusion_steps=1000, noise_schedule=schedule, rescale_timesteps=False)
    kept = keep_steps(settings, {"ddpm": 400, "ddim": 200}.get(solver, 60), "logsnr", 160.0)
    diffusion = create_diffusion(settings, False, kept)
    model = best_predictor(diffusion)
    predict = lambda x, step: model(x, diffusion.model_timesteps(torch.full((len(x),), step)))
    images = last(solve(predict, start(), solver_table(diffusion, solver), noise_source(), clip=False))
    assert images.dtype == torch.float32
    assert images.std().item() == pytest.approx(S, rel=TOLERANCE)
    assert abs(images.mean().item()) < 5 * S / VALUES**0.5


def test_predicting_the_start_is_the_same() -> None:
    """A network that predicts x_0 gives the same images, up to the float32 rounding of 250 steps."""
    of_noise, of_start = process(250), process(250, predict_xstart=True)
    eps_model = best_predictor(of_noise)

    def start_model(x: Tensor, t: Tensor) -> Tensor:
        return of_noise.predict_xstart_from_eps(x, t, eps_model(x, t))

    for sampler in (p_sample_loop, ddim_sample_loop):
        a = last(sampler(of_noise, eps_model, start(), noise_source(), clip_denoised=False))
        b = last(sampler(of_start, start_model, start(), noise_source(), clip_denoised=False))
        assert relative_error(a, b) < 1e-4


def test_clipping_bounds_the_prediction() -> None:
    diffusion = process(50)
    model = best_predictor(diffusion, s=3.0)
    for sampler in (p_sample_loop, ddim_sample_loop):
        steps = list(sampler(diffusion, model, start(), noise_source(), clip_denoised=True))
        assert [step.t for step in steps] == list(reversed(range(50)))
        assert max(step.pred_xstart.abs().max() for step in steps) <= 1
        loose = list(sampler(diffusion, model, start(), noise_source(), clip_denoised=False))
        assert max(step.pred_xstart.abs().max() for step in loose) > 1


def test_ddim_is_deterministic_at_eta_0() -> None:
    """At eta 0 no noise is drawn, and at eta > 0 the images depend on it."""
    diffusion = process(20)
    model = best_predictor(diffusion)

    def unwanted(t: int) -> Tensor:
        raise AssertionError("noise was drawn")

    first, again = (last(ddim_sample_loop(diffusion, model, start(), unwanted)) for _ in range(2))
    assert torch.equal(first, again)
    noisy = [last(ddim_sample_loop(diffusion, model, start(), noise_source(seed), eta=0.5)) for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_no_noise_after_the_last_step() -> None:
    """x_0 is the mean of the last step and does not depend on its noise."""
    diffusion = process(20)
    model = best_predictor(diffusion)
    for sampler in (p_sample_loop, ddim_sample_loop):
        loud = lambda t: noise_source()(t) * (1e6 if t == 0 else 1)
        kwargs = {"eta": 1.0} if sampler is ddim_sample_loop else {}
        a = last(sampler(diffusion, model, start(), noise_source(), **kwargs))
        assert torch.equal(a, last(sampler(diffusion, model, start(), loud, **kwargs)))


def test_encoding_and_decoding_returns_the_start() -> None:
    """Reverse DDIM followed by DDIM is of first order, so twice the steps leave half the error."""
    errors = []
    x_start = S * start(seed=3)
    for steps in (200, 400):
        diffusion = process(steps, "linear")
        model = best_predictor(diffusion)
        code = last(ddim_reverse_loop(diffusion, model, x_start, clip_denoised=False))
        assert code.std().item() == pytest.approx(1, rel=TOLERANCE)
        back = last(ddim_sample_loop(diffusion, model, code, noise_source(), clip_denoised=False))
        errors.append(relative_error(back, x_start))
    assert errors[1] < 0.03
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_conversions_round_trip(schedule: str) -> None:
    """x_0 → (x_t, eps) → x_0 and back is exact up to the tables' rounding to float32.

    A table entry is off by 2^-24 of itself. x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a) magnifies that by 1 / sqrt(a),
    eps = (x_t / sqrt(a) - x_0) / sqrt(1 / a - 1) by 1 / sqrt(1 - a).
    """
    diffusion = process(1000, schedule)
    generator = torch.Generator().manual_seed(0)
    a = torch.from_numpy(diffusion.schedule.alphas_cumprod)
    for step in (0, 1, 10, 500, 900, 998):
        t = torch.full((4,), step)
        x_start, eps = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
        x_t = diffusion.q_sample(x_start, t, eps)
        largest = max(x_start.abs().max(), eps.abs().max()).item()
        rounding = 4 * 2**-24 * largest
        found = diffusion.predict_xstart_from_eps(x_t, t, eps)
        assert (found - x_start).abs().max().item() < rounding / a[step].sqrt()
        found = diffusion.predict_eps_from_xstart(x_t, t, x_start)
        assert (found - eps).abs().max().item() < rounding / (1 - a[step]).sqrt()
        again = diffusion.predict_eps_from_xstart(x_t, t, diffusion.predict_xstart_from_eps(x_t, t, eps))
        torch.testing.assert_close(again, eps, rtol=1e-12, atol=1e-9)


def test_best_predictor_reaches_the_entropy_of_the_noise() -> None:
    """Its mean squared error is a s² / (a s² + 1 - a), which training_losses must report."""
    diffusion = process(100)
    model = best_predictor(diffusion)
    x_start, noise = S * start(seed=1), start(seed=2)
    for step in (0, 30, 99):
        a = diffusion.schedule.alphas_cumprod[step]
        losses = diffusion.training_losses(model, x_start, torch.full((COUNT,), step), noise=noise)
        expected = a * S**2 / (a * S**2 + 1 - a)
        # The mean of so many squares of normal values has a standard error of sqrt(2 / VALUES) = 0.9%.
        assert losses["loss"].mean().item() == pytest.approx(expected, rel=5 * (2 / VALUES) ** 0.5)
