"""Solvers as tables: one row per evaluation of the network, with its timestep and the coefficients of the update.

A row computes x_next = c_x x + c_0 x_0 + c_1 h_1 + c_2 h_2 + c_3 h_3 + sigma noise from its own prediction x_0 and the
predictions h_i of earlier rows, latest first (ops.sampler_step).

If a classifier guides, the gradient of its log probability is a shift of the predicted noise, and thereby of x_0; in
ancestral sampling it shifts the mean (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, algorithms 2 and 1).

With x = alpha x_0 + sigma noise and lambda = log(alpha / sigma) the flow from step s to step t solves

    x_t = sigma_t / sigma_s x_s + alpha_t * integral from lambda_s to lambda_t of exp(lambda - lambda_t) x_0(lambda)

(Lu et al. 2022, https://arxiv.org/abs/2211.01095, eq. 8). Multistep solvers replace x_0(lambda) by a polynomial through
the predictions. At the image, which has no noise, lambda is infinite, so the last row returns x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from fastdiff import ops
from fastdiff.diffusion.process import GaussianDiffusion
from fastdiff.diffusion.schedules import Spacing

Solver = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "heun"]
HISTORY = ("earlier1", "earlier2", "earlier3")
Row = dict[str, float]
"""A row's coefficients by their names in ops.STEP_COLUMNS; missing ones are 0."""


@dataclass(frozen=True)
class SolverTable:
    """A solver's rows, one per evaluation of the network, from the noisiest step to the image."""

    steps: np.ndarray
    """[E] int64: the kept step of the schedule at which the network is evaluated."""
    coefficients: np.ndarray
    """[E, 12] float64, columns ops.STEP_COLUMNS; sigma is 0 in rows without noise."""
    complete: np.ndarray
    """[E] bool: False if x after the row is a trial point, not a point of the trajectory."""
    variance: str = "fixed"
    """How the rows use the second half of the network's output: the `variance` of ops.sampler_step."""

    @property
    def num_evaluations(self) -> int:
        return len(self.steps)

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return bool(self.column("sigma").any())

    @property
    def history(self) -> int:
        """The largest number of earlier predictions that a row needs, 0 to 3."""
        return int(self.history_used.max())

    @property
    def history_used(self) -> np.ndarray:
        """[E] int64: the number of earlier predictions that each row needs."""
        used = np.stack([self.column(name) != 0 for name in HISTORY], axis=1)
        return (used * np.arange(1, len(HISTORY) + 1)).max(axis=1)

    def column(self, name: str) -> np.ndarray:
        """One of ops.STEP_COLUMNS, [E] float64."""
        return self.coefficients[:, ops.STEP_COLUMNS.index(name)]


class SolverInfo(NamedTuple):
    """A solver's entry in `SOLVERS`."""

    make: Callable[[GaussianDiffusion, float], SolverTable]
    """Computes the table for a process and a noise eta, which only ddim uses."""
    least_steps: int
    spacing: Spacing
    """The default spacing of the steps: multistep solvers are best with even steps in log SNR."""
    description: str


def solver_table(diffusion: GaussianDiffusion, solver: str, eta: float = 0.0) -> SolverTable:
    """The solver's table for the timesteps that the process keeps.

    eta scales DDIM's noise: 0 for none, 1 for as much as DDPM. Raises ValueError for an unknown solver, for fewer steps
    than the solver needs, and for an eta with any other solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not known; use one of {', '.join(SOLVERS)}")
    info = SOLVERS[solver]
    if diffusion.num_timesteps < info.least_steps:
        raise ValueError(f"{solver} takes at least {info.least_steps} steps, not {diffusion.num_timesteps}")
    if eta and solver != "ddim":
        raise ValueError(f"eta {eta:g} is for solver ddim; {solver} has no eta")
    return info.make(diffusion, eta)


def _table(
    diffusion: GaussianDiffusion,
    steps: Sequence[int],
    columns: dict[str, np.ndarray],
    complete: Sequence[bool] | None = None,
    variance: str = "fixed",
) -> SolverTable:
    """A table with the given columns, [E] each, and those that compute the predicted x_0 and its guidance."""
    s, at = diffusion.schedule, np.array(steps, dtype=np.int64)
    known = {
        "recip": s.sqrt_recip_alphas_cumprod[at],
        "recipm1": s.sqrt_recipm1_alphas_cumprod[at],
        "guided_x_start": (s.one_minus_alphas_cumprod * s.sqrt_recip_alphas_cumprod)[at],
        **columns,
    }
    zeros = np.zeros(len(at))
    table = np.stack([known.get(name, zeros) for name in ops.STEP_COLUMNS], axis=1)
    whole = np.ones(len(at), dtype=bool) if complete is None else np.array(complete)
    return SolverTable(at, table, whole, variance)


def _from_rows(
    diffusion: GaussianDiffusion, steps: Sequence[int], rows: Sequence[Row], complete: Sequence[bool] | None = None
) -> SolverTable:
    names = {name for row in rows for name in row}
    columns = {name: np.array([row.get(name, 0.0) for row in rows]) for name in names}
    return _table(diffusion, steps, columns, complete)


def _ddpm(diffusion: GaussianDiffusion, eta: float) -> SolverTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2)."""
    s = diffusion.schedule
    log_variance = getattr(s, diffusion.log_variance_table)
    sigma = np.ones_like(log_variance) if diffusion.learns_variance else np.exp(0.5 * log_variance)
    columns = {
        "x": s.posterior_mean_coef2,
        "x_start": s.posterior_mean_coef1,
        "sigma": np.append(0.0, sigma[1:]),
        "low": s.posterior_log_variance_clipped,
        "high": log_variance,
        "guided_x_start": np.zeros_like(sigma),
        "guided_x": np.ones_like(sigma) if diffusion.learns_variance else getattr(s, diffusion.variance_table),
    }
    return _descending(diffusion, columns, diffusion.variance)


def _ddim(diffusion: GaussianDiffusion, eta: float) -> SolverTable:
    """DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502)."""
    s = diffusion.schedule
    a_t, a_prev = s.alphas_cumprod, s.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - a_prev) / (1 - a_t)) * np.sqrt(1 - a_t / a_prev)  # eq. 16
    # The factor of the predicted noise in eq. 12, expressed by x and x_0; at eta 1 its square may round below 0.
    direction = np.sqrt(np.maximum(1 - a_prev - sigma**2, 0))
    columns = {
        "x": direction * s.sqrt_recip_alphas_cumprod / s.sqrt_recipm1_alphas_cumprod,
        "x_start": np.sqrt(a_prev) - direction / s.sqrt_recipm1_alphas_cumprod,
        "sigma": sigma,
    }
    return _descending(diffusion, columns)


def _descending(diffusion: GaussianDiffusion, columns: dict[str, np.ndarray], variance: str = "fixed") -> SolverTable:
    """A table that visits every kept step once, from columns [S] in ascending order of steps."""
    steps = range(diffusion.num_timesteps - 1, -1, -1)
    return _table(diffusion, steps, {name: column[::-1] for name, column in columns.items()}, variance=variance)


class _Levels:
    """alpha, sigma and lambda at every kept step, [S]."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.alpha = diffusion.schedule.sqrt_alphas_cumprod
        self.sigma = diffusion.schedule.sqrt_one_minus_alphas_cumprod
        self.log_snr = np.log(self.alpha / self.sigma)

    def weights(self, source: int, target: int, nodes: Sequence[int], noisy: bool = False) -> dict[int, float]:
        """The weight of each node's prediction in x at `target`, for a step from `source`.

        They integrate the polynomial through the nodes, times alpha. As published for DPM-Solver++ and for B_2(h) of
        UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867), the slope between two nodes has the weight of half a
        step, which differs from the exact integral in third order.
        """
        h = self.log_snr[target] - self.log_snr[source]
        rate = 2 * h if noisy else h
        places = np.array([(self.log_snr[node] - self.log_snr[source]) / h for node in nodes])
        # integral of rate exp(-rate (1 - u)) u^n over u in 0..1
        moments = np.array([math.factorial(n) * rate * _phi(n + 1, -rate) for n in range(len(nodes))])
        if len(nodes) == 2:
            moments[1] = moments[0] / 2
        weights = np.linalg.solve(np.vander(places, increasing=True).T, moments)
        return dict(zip(nodes, (self.alpha[target] * weights).tolist(), strict=True))


def _phi(k: int, z: float) -> float:
    """phi_k(z) = sum over n of z^n / (n + k)!, by its series near 0, where the closed form loses digits."""
    if abs(z) < 1:
        return math.fsum(z**n / math.factorial(n + k) for n in range(20))
    return math.exp(z) if k == 0 else (_phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


def _named(weights: dict[int, float], newest: int) -> Row:
    """The coefficients of a row, from weights by step; the network's latest evaluation was at the step `newest`."""
    return {("x_start", *HISTORY)[step - newest]: weight for step, weight in weights.items()}


def _dpmpp(diffusion: GaussianDiffusion, eta: float, order: int, noisy: bool) -> SolverTable:
    """DPM-Solver++ multistep, deterministic or stochastic.

    The order is lower in the first rows, which have fewer predictions, and in the last ones, where lambda grows without
    bound. The polynomial of order 3 is integrated exactly; common implementations halve its curvature, which reduces
    the order to 2.
    """
    levels, count = _Levels(diffusion), diffusion.num_timesteps
    rows: list[Row] = []
    for s in range(count - 1, 0, -1):
        t, nodes = s - 1, range(s, s + min(order, count - s, s + 1))
        ratio, decay = levels.sigma[t] / levels.sigma[s], math.exp(levels.log_snr[s] - levels.log_snr[t])
        row = {"x": ratio * (decay if noisy else 1), **_named(levels.weights(s, t, nodes, noisy), s)}
        rows.append({**row, "sigma": levels.sigma[t] * math.sqrt(1 - decay**2) if noisy else 0.0})
    return _from_rows(diffusion, range(count - 1, -1, -1), [*rows, {"x_start": 1.0}])


def _unipc(diffusion: GaussianDiffusion, eta: float, order: int = 2) -> SolverTable:
    """UniPC with B_2(h), predicting x_0: a predictor whose x is corrected after the next evaluation.

    The corrected and the predicted x differ only in weights of predictions, so the next row includes the correction.
    """
    levels, count = _Levels(diffusion), diffusion.num_timesteps
    rows: list[Row] = []
    nodes = range(0)
    for s in range(count - 1, 0, -1):
        correction = dict.fromkeys([s, *nodes], 0.0)  # step of a prediction → its weight in the correction of x at s
        if nodes:
            for step, weight in levels.weights(s + 1, s, [s, *nodes]).items():
                correction[step] += weight
            for step, weight in levels.weights(s + 1, s, nodes).items():
                correction[step] -= weight
        nodes = range(s, s + min(order, count - s, s + 1))
        ratio = levels.sigma[s - 1] / levels.sigma[s]
        weights = {step: ratio * weight for step, weight in correction.items()}
        for step, weight in levels.weights(s, s - 1, nodes).items():
            weights[step] = weights.get(step, 0.0) + weight
        rows.append({"x": ratio, **_named(weights, s)})
    return _from_rows(diffusion, range(count - 1, -1, -1), [*rows, {"x_start": 1.0}])


def _heun(diffusion: GaussianDiffusion, eta: float) -> SolverTable:
    """Heun's method in x / alpha over sigma / alpha (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1)
    without churn: a trial step of Euler, then the mean of both slopes.

    At the trial point x' the first slope is also (x' - x_0) / sigma' with the earlier x_0, so the second row adds half
    of the difference between the slopes.
    """
    levels, count = _Levels(diffusion), diffusion.num_timesteps
    steps, rows = [], []
    for s in range(count - 1, 0, -1):
        t = s - 1
        trial = {"x": levels.sigma[t] / levels.sigma[s], **_named(levels.weights(s, t, [s]), s)}
        half = levels.alpha[t] * math.expm1(levels.log_snr[t] - levels.log_snr[s]) / 2
        steps += [s, t]
        rows += [trial, {"x": 1.0, "x_start": half, "earlier1": -half}]
    complete = [False, True] * (count - 1)
    return _from_rows(diffusion, [*steps, 0], [*rows, {"x_start": 1.0}], [*complete, True])


SOLVERS: dict[str, SolverInfo] = {
    "ddpm": SolverInfo(_ddpm, 1, "uniform", "ancestral sampling, as noisy as the chain it was trained on"),
    "ddim": SolverInfo(_ddim, 1, "uniform", "first order; deterministic, or with noise by eta"),
    "dpmpp_2m": SolverInfo(
        partial(_dpmpp, order=2, noisy=False), 2, "logsnr", "DPM-Solver++, second order, deterministic"
    ),
    "dpmpp_3m": SolverInfo(
        partial(_dpmpp, order=3, noisy=False), 3, "logsnr", "DPM-Solver++, third order, deterministic"
    ),
    "dpmpp_2m_sde": SolverInfo(
        partial(_dpmpp, order=2, noisy=True), 2, "logsnr", "DPM-Solver++, second order, with noise"
    ),
    "dpmpp_3m_sde": SolverInfo(
        partial(_dpmpp, order=3, noisy=True), 3, "logsnr", "DPM-Solver++, third order, with noise"
    ),
    "unipc": SolverInfo(_unipc, 2, "logsnr", "UniPC: second order, raised to third by a corrector; deterministic"),
    "heun": SolverInfo(_heun, 2, "karras", "second order, two evaluations a step; deterministic"),
}
