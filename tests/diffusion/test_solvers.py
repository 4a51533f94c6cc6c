"""Solvers agree with closed forms: their order, results, spread, and the integrals in their rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny import relative_error
from helpers.toy_data import ONE_MODE, STARTS, TWO_MODES, Modes, log_chain
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import SOLVERS, DiffusionSettings, GaussianDiffusion, create_diffusion, keep_steps, solver_table
from fastdiff.diffusion.samplers import solve

DETERMINISTIC = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "heun")
STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde")


def spaced(steps: int, schedule: str = "cosine", spacing: str = "logsnr", **settings: object) -> GaussianDiffusion:
    """Keep `steps` of a chain of 1000 steps, up to noise 160."""
    whole = DiffusionSettings(diffusion_steps=1000, noise_schedule=schedule, **settings)
    return create_diffusion(whole, False, keep_steps(whole, steps, spacing, 160.0))


def final(data: Modes, diffusion: GaussianDiffusion, solver: str, x: Tensor = STARTS) -> Tensor:
    *_, step = solve(data.predictor(diffusion), x, solver_table(diffusion, solver), clip=False)
    return step.sample


@pytest.mark.parametrize("data", [ONE_MODE, TWO_MODES], ids=["one mode", "two modes"])
@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("dpmpp_3m", 3), ("unipc", 3), ("heun", 2)]
)
def test_order(solver: str, order: int, data: Modes) -> None:
    """Twice the steps leave 2^-order of the error, measured in quantiles before the last step, which is of order 1."""
    errors = []
    for steps in (64, 128, 256):
        diffusion = log_chain(steps, 0.02, 1000)
        a = diffusion.schedule.alphas_cumprod
        *_, before_last, _ = solve(data.predictor(diffusion), STARTS, solver_table(diffusion, solver), clip=False)
        moved = data.quantile(before_last.sample, a[0]) - data.quantile(STARTS, a[-1])
        errors.append(moved.abs().max().item())
    slopes = -np.diff(np.log2(errors))
    assert slopes.min() > order - 0.2
    if order == 1:
        assert slopes.max() < 1.2


# The relative error of x_0 after 24 steps that are even in log SNR: as measured, plus a third.
ENDS = {"ddim": 0.14, "dpmpp_2m": 0.015, "dpmpp_3m": 0.0025, "unipc": 0.008, "heun": 0.035}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_flow_of_one_mode(solver: str, schedule: str) -> None:
    """The flow scales x_T by the ratio of the spreads of x_0 and x_T."""
    diffusion = spaced(24, schedule)
    a = diffusion.schedule.alphas_cumprod[-1]
    exact = STARTS * ONE_MODE.spread / math.sqrt(a * ONE_MODE.spread**2 + 1 - a)
    assert relative_error(final(ONE_MODE, diffusion, solver), exact) < ENDS[solver]


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "logsnr", "karras"])
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_flow_of_two_modes(solver: str, spacing: str) -> None:
    """Every spacing keeps the quantiles; a first-order solver with 100 steps errs by 1%."""
    diffusion = spaced(100, "linear", spacing)
    end = TWO_MODES.quantile(final(TWO_MODES, diffusion, solver), 1.0)
    start = TWO_MODES.quantile(STARTS, diffusion.schedule.alphas_cumprod[-1])
    assert (end - start).abs().max().item() < 0.01


def spread_of(diffusion: GaussianDiffusion, solver: str, eta: float = 0.0) -> float:
    """Return the exact spread of a solver's results for ONE_MODE, whose predictor is linear.

    Image 0 starts with x = 1 and has no noise; image i starts with 0 and has noise 1 only at row i - 1. The sum of the
    squares of their results is the variance.
    """
    table = solver_table(diffusion, solver, eta)
    x = torch.zeros(table.num_evaluations + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = 1
    row_of = {step: row for row, step in enumerate(table.steps.tolist())}

    def noise(step: int) -> Tensor:
        only = torch.zeros_like(x)
        only[row_of[step] + 1] = 1
        return only

    *_, end = solve(ONE_MODE.predictor(diffusion), x, table, noise, clip=False)
    return math.sqrt(end.sample.square().sum().item())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_stochastic_solvers_return_the_spread(solver: str, schedule: str) -> None:
    """The error is of order 1 / steps for ancestral sampling and of order 1 / steps² for the multistep solvers."""
    errors = [
        abs(spread_of(spaced(steps, schedule, sigma_small=True), solver) / ONE_MODE.spread - 1) for steps in (50, 100)
    ]
    assert errors[1] < (0.05 if solver == "ddpm" else 0.002)
    assert errors[1] < (0.6 if solver == "ddpm" else 0.3) * errors[0]


def targets(plan_steps: np.ndarray, diffusion: GaussianDiffusion) -> tuple[np.ndarray, ...]:
    """Return alpha and sigma of x before and after every row; after the last row they are 1 and 0."""
    a = np.sqrt(diffusion.schedule.alphas_cumprod)[plan_steps]
    sigma = np.sqrt(1 - diffusion.schedule.alphas_cumprod)[plan_steps]
    return a, sigma, np.append(a[1:], 1.0), np.append(sigma[1:], 0.0)


@pytest.mark.parametrize(("solver", "eta"), [*((solver, 0.0) for solver in SOLVERS), ("ddim", 0.5), ("ddim", 1.0)])
@pytest.mark.parametrize("steps", [6, 40])
def test_rows_keep_the_levels(solver: str, eta: float, steps: int) -> None:
    """If every prediction is x_0 itself, each row maps alpha x_0 + sigma noise to that of the next level."""
    diffusion = spaced(steps, sigma_small=True)
    table = solver_table(diffusion, solver, eta)
    alpha, sigma, next_alpha, next_sigma = targets(table.steps, diffusion)
    predictions = sum(table.column(name) for name in ("x_start", "earlier1", "earlier2", "earlier3"))
    np.testing.assert_allclose(table.column("x") * alpha + predictions, next_alpha, rtol=1e-9, atol=1e-12)
    # DDPM's variance is the posterior's, and its first step's log is clipped.
    spread = np.hypot(table.column("x") * sigma, table.column("sigma"))
    np.testing.assert_allclose(spread, next_sigma, rtol=1e-9, atol=1e-12)
    assert table.stochastic == (solver in STOCHASTIC or eta > 0)
    assert table.column("sigma")[table.steps == 0].max() == 0
    assert set(table.steps) == set(range(steps))


@pytest.mark.parametrize("noisy", [False, True])
def test_third_order_rows_are_integrals(noisy: bool) -> None:
    """The coefficients are integrals of the parabola through three predictions, by Gauss-Legendre quadrature."""
    diffusion = spaced(12, "linear", "karras")
    table = solver_table(diffusion, "dpmpp_3m_sde" if noisy else "dpmpp_3m")
    a = diffusion.schedule.alphas_cumprod
    log_snr = 0.5 * np.log(a / (1 - a))
    points, shares = np.polynomial.legendre.leggauss(30)
    for row in range(2, 10):
        s = 11 - row
        u = log_snr[s] + (points + 1) / 2 * (log_snr[s - 1] - log_snr[s])
        rate = 2.0 if noisy else 1.0
        kernel = rate * np.exp(-rate * (log_snr[s - 1] - u)) * shares * (log_snr[s - 1] - log_snr[s]) / 2
        nodes = log_snr[s : s + 3]
        for i, name in enumerate(("x_start", "earlier1", "earlier2")):
            others = np.delete(nodes, i)
            lagrange = np.prod([(u - other) / (nodes[i] - other) for other in others], axis=0)
            weight = np.sqrt(a[s - 1]) * (kernel * lagrange).sum()
            assert table.column(name)[row] == pytest.approx(weight, rel=1e-9), (row, name)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_predicting_the_start_with_clipping(solver: str) -> None:
    """A network that predicts x_0 gives the same result, and clipping bounds predictions by [-1, 1]."""
    data = Modes(0.3, 0.15)
    diffusion = spaced(20)
    alphas_cumprod = diffusion.schedule.alphas_cumprod.tolist()
    table = solver_table(diffusion, solver)
    steps = solve(lambda x, step: data.denoised(x, alphas_cumprod[step]), STARTS, table, epsilon=False, clip=True)
    *_, end = steps
    assert relative_error(end.sample, final(data, diffusion, solver)) < 1e-9
    wide = Modes(0.0, 3.0)
    clipped = list(solve(wide.predictor(diffusion), STARTS, table, clip=True))
    assert max(step.pred_xstart.abs().max() for step in clipped) == 1
    assert clipped[-1].sample.abs().max() <= 1
    loose = list(solve(wide.predictor(diffusion), STARTS, table, clip=False))
    assert max(step.pred_xstart.abs().max() for step in loose) > 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_of_80000(solver: str) -> None:
    """All rows of the cosine chain of 4000 steps are finite, and below noise 160 so are float32 samples."""
    settings = DiffusionSettings(diffusion_steps=4000, noise_schedule="cosine")
    kept = [0, 5, 1000, 3000, *range(3990, 4000)]
    table = solver_table(create_diffusion(settings, False, kept), solver)
    assert table.column("recip").max() > 80000
    assert np.isfinite(table.coefficients).all()
    diffusion = create_diffusion(settings, False, keep_steps(settings, 12, "logsnr", 160.0))
    x = STARTS.float()
    noise = lambda t: ops.image_noise(0, torch.arange(1), t + 1, tuple(x.shape[1:]))
    for step in solve(TWO_MODES.predictor(diffusion), x, solver_table(diffusion, solver), noise, clip=False):
        assert step.sample.isfinite().all()
        assert step.sample.dtype == torch.float32
    assert step.sample.abs().max() < 3


def test_ddpm_rows_are_the_posterior() -> None:
    for learn_sigma in (False, True):
        diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50, noise_schedule="cosine"), learn_sigma)
        table, s = solver_table(diffusion, "ddpm"), diffusion.schedule
        assert table.steps.tolist() == list(range(49, -1, -1))
        assert table.variance == ("range" if learn_sigma else "fixed")
        assert (table.column("x") == s.posterior_mean_coef2[::-1]).all()
        assert (table.column("x_start") == s.posterior_mean_coef1[::-1]).all()
        assert (table.column("low") == s.posterior_log_variance_clipped[::-1]).all()
        high = s.log_betas if learn_sigma else s.fixed_large_log_variance
        assert (table.column("high") == high[::-1]).all()
        sigma = np.ones(50) if learn_sigma else np.exp(0.5 * high)
        assert (table.column("sigma") == np.append(sigma[:0:-1], 0)).all()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_rows_are_equation_12(eta: float) -> None:
    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50, noise_schedule="cosine"), True)
    table, s = solver_table(diffusion, "ddim", eta), diffusion.schedule
    assert table.variance == "fixed"
    x_start, eps = 0.7, -1.3
    a, previous = s.alphas_cumprod[::-1], s.alphas_cumprod_prev[::-1]
    sigma = eta * np.sqrt((1 - previous) / (1 - a) * (1 - a / previous))
    expected = np.sqrt(previous) * x_start + np.sqrt(1 - previous - sigma**2) * eps
    x = np.sqrt(a) * x_start + np.sqrt(1 - a) * eps
    np.testing.assert_allclose(table.column("x") * x + table.column("x_start") * x_start, expected, rtol=1e-9)
    np.testing.assert_allclose(table.column("sigma"), sigma, rtol=1e-12)


HISTORY = {"dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m": 2, "dpmpp_3m_sde": 2, "unipc": 2, "heun": 1}


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_in_their_order(solver: str) -> None:
    """There is one step per kept timestep, down to 0; Heun's take two evaluations, except for the last."""
    diffusion = spaced(8)
    table = solver_table(diffusion, solver)
    assert table.num_evaluations == (15 if solver == "heun" else 8)
    assert table.history == HISTORY.get(solver, 0)
    asked, drawn = [], []

    def predict(x: Tensor, step: int) -> Tensor:
        asked.append(step)
        return ONE_MODE.predictor(diffusion)(x, step)

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return torch.zeros_like(STARTS)

    steps = list(solve(predict, STARTS, table, noise))
    assert [step.t for step in steps] == list(range(7, -1, -1))
    assert asked == table.steps.tolist()
    assert drawn == (list(range(7, 0, -1)) if table.stochastic else [])
    assert torch.equal(steps[-1].sample, steps[-1].pred_xstart)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_fewest_steps(solver: str) -> None:
    least = SOLVERS[solver].least_steps
    table = solver_table(spaced(least), solver)
    assert np.isfinite(table.coefficients).all()
    if least > 1:
        with pytest.raises(ValueError, match=f"^{solver} takes at least {least} steps, not {least - 1}$"):
            solver_table(spaced(least - 1), solver)


def test_errors() -> None:
    diffusion = spaced(5)
    with pytest.raises(ValueError, match=r"^solver 'euler' is not known; use one of ddpm, ddim, dpmpp_2m"):
        solver_table(diffusion, "euler")
    with pytest.raises(ValueError, match=r"^eta 0.5 is for solver ddim; heun has no eta$"):
        solver_table(diffusion, "heun", 0.5)
    with pytest.raises(ValueError, match="needs noise"):
        next(solve(ONE_MODE.predictor(diffusion), STARTS, solver_table(diffusion, "ddpm")))
