"""The diffusion process: noising, its posterior, the reverse step computed from a network's output, and losses.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239); Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.schedules import Schedule
from fastdiff.diffusion.settings import DiffusionSettings

Model = Callable[..., Tensor]
"""model(x [B, C, H, W], timesteps [B], **model_kwargs) → [B, C or 2C, H, W]"""


class ModelMeanType(Enum):
    """What the network predicts."""

    START_X = "x_0"
    EPSILON = "the noise"


class ModelVarType(Enum):
    """What determines the variance of the reverse step."""

    LEARNED = "the network, as a log variance"
    FIXED_SMALL = "the posterior's"
    FIXED_LARGE = "beta"
    LEARNED_RANGE = "the network, between the posterior's and beta"


class LossType(Enum):
    MSE = "mean squared error, plus the bound for learned variances"
    RESCALED_MSE = "the same, the bound scaled by T / 1000"
    KL = "the variational bound"
    RESCALED_KL = "the bound times T, an estimate of the whole sum"


@dataclass(frozen=True)
class PMeanVariance:
    """p(x_{t-1} | x_t) and the predicted x_0, each [B, C, H, W] float32."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


@dataclass
class GaussianDiffusion:
    """A process on the kept steps of a schedule. t [B] int64 is an index into these steps; 0 is the least noisy.

    The papers count steps from 1: at index t the network sees their x_{t+1}, and x_0 is the image.
    """

    schedule: Schedule
    mean_type: ModelMeanType = ModelMeanType.EPSILON
    var_type: ModelVarType = ModelVarType.FIXED_LARGE
    loss_type: LossType = LossType.MSE
    rescale_timesteps: bool = False
    min_snr_gamma: float = 0.0
    loss_terms: ClassVar[tuple[str, ...]] = ("loss", "mse", "vb")
    """The terms that `training_losses` may return."""

    def __post_init__(self) -> None:
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_timesteps

    @property
    def learns_variance(self) -> bool:
        return self.var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    @property
    def variance(self) -> str:
        """The ops' name for the meaning of the second half of a network's output: "learned", "range" or "fixed"."""
        return {ModelVarType.LEARNED: "learned", ModelVarType.LEARNED_RANGE: "range"}.get(self.var_type, "fixed")

    def at(self, table: str, t: Tensor) -> Tensor:
        """The schedule's float64 table at t, as float32 [B]. Tables are cached on the device."""
        key = (table, t.device)
        if key not in self._tables:
            values = torch.from_numpy(getattr(self.schedule, table))
            self._tables[key] = (values if table == "timestep_map" else values.float()).to(t.device)
        return self._tables[key][t]

    def _at(self, table: str, t: Tensor) -> Tensor:
        return self.at(table, t)[:, None, None, None]

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The network's timestep inputs: int64 steps of the original chain, or float32 scaled to 0..1000."""
        original = self.at("timestep_map", t)
        return original.float() * (1000.0 / self.schedule.original_steps) if self.rescale_timesteps else original

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each in x_start's shape [B, C, H, W]."""
        mean = self._at("sqrt_alphas_cumprod", t) * x_start
        variance = self._at("one_minus_alphas_cumprod", t).expand_as(x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t).expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W] for x_0 and the noise, both of that shape; the noise is drawn if None."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return ops.q_sample(x_start, self._loss_table(t.device)[t][:, :2], noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance [B, C, H, W] of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6-7)."""
        mean = self._at("posterior_mean_coef1", t) * x_start + self._at("posterior_mean_coef2", t) * x_t
        variance = self._at("posterior_variance", t).expand_as(x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t).expand_as(x_t)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 [B, C, H, W] for x_t and its noise (Ho et al. 2020, eq. 4)."""
        return self._at("sqrt_recip_alphas_cumprod", t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t) * eps

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise [B, C, H, W] in x_t for its x_0."""
        return (self._at("sqrt_recip_alphas_cumprod", t) * x_t - pred_xstart) / self._at(
            "sqrt_recipm1_alphas_cumprod", t
        )

    @property
    def log_variance_table(self) -> str:
        """The schedule's table with the fixed log variance, or with the upper end of a learned range."""
        if self.var_type is ModelVarType.FIXED_SMALL:
            return "posterior_log_variance_clipped"
        return "fixed_large_log_variance" if self.var_type is ModelVarType.FIXED_LARGE else "log_betas"

    @property
    def variance_table(self) -> str:
        """The schedule's table with the fixed variance."""
        return "posterior_variance" if self.var_type is ModelVarType.FIXED_SMALL else "fixed_large_variance"

    def _variances(self, values: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log variance of the reverse step; `values` is the network's prediction of them, or None."""
        high = self._at(self.log_variance_table, t)
        if values is None:
            return self._at(self.variance_table, t).expand_as(x), high.expand_as(x)
        low = self._at("posterior_log_variance_clipped", t)
        values = ops.log_variance(values, self.variance, low, high, x)
        return values.exp(), values

    def p_mean_variance_from_output(
        self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool = True
    ) -> PMeanVariance:
        """p(x_{t-1} | x_t) for a network's output [B, C or 2C, H, W]."""
        values = None
        if self.learns_variance:
            output, values = output.chunk(2, dim=1)
        variance, log_variance = self._variances(values, x, t)
        epsilon = self.mean_type is ModelMeanType.EPSILON
        pred_xstart = self.predict_xstart_from_eps(x, t, output) if epsilon else output
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return PMeanVariance(mean, variance, log_variance, pred_xstart)

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: dict[str, Any] | None = None
    ) -> PMeanVariance:
        """p(x_{t-1} | x_t) from one evaluation of the network at x [B, C, H, W] float32."""
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self.p_mean_variance_from_output(output, x, t, clip_denoised)

    def _bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, p: PMeanVariance) -> Tensor:
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        return ops.vb_terms_bpd(x_start, true_mean, true_log_variance, p.mean, p.log_variance, t == 0)

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The bound's term at t in bits per dimension, [B], and the predicted x_0."""
        p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs)
        return self._bound(x_start, x_t, t, p), p.pred_xstart

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: ops.Noise | None = None,
    ) -> dict[str, Tensor]:
        """The loss of every image: {"loss": [B], and "mse" and "vb" if they are parts of it}, float32.

        x_start is float32 [B, C, H, W], or uint8 [B, H, W, C]. Only "loss" has a gradient.

        With learned variances and an MSE loss (L_hybrid, Nichol & Dhariwal 2021, eq. 16) the bound trains only the
        variances: its mean is detached.
        """
        if noise is None:
            noise = torch.randn_like(ops.start_map(x_start))
        x_start, noise = ops.prepared(x_start, noise)
        rows = self._loss_table(x_start.device)[t]
        x_t = _noised(model, x_start, rows, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        kl = self.loss_type in (LossType.KL, LossType.RESCALED_KL)
        scale = {LossType.RESCALED_KL: float(self.num_timesteps), LossType.RESCALED_MSE: self.num_timesteps / 1000.0}
        loss, mse, vb = ops.diffusion_loss(
            output,
            x_start,
            rows,
            noise,
            epsilon=self.mean_type is ModelMeanType.EPSILON,
            variance=self.variance,
            kl=kl,
            vb_scale=scale.get(self.loss_type, 1.0),
        )
        if kl:
            return {"loss": loss}
        return {"loss": loss, "mse": mse, **({"vb": vb} if self.learns_variance else {})}

    def noised_for(self, model: Model, x_start: Tensor, t: Tensor, noise: ops.Noise) -> Tensor:
        """x_t for images as `training_losses` takes them, in the dtype and with the channels that the network takes.

        Where it has an `input_format`, that is [B, 8, H, W] in the dtype of its body, else [B, C, H, W] float32.
        """
        x_start, noise = ops.prepared(x_start, noise)
        return _noised(model, x_start, self._loss_table(x_start.device)[t], noise)

    def _loss_table(self, device: torch.device) -> Tensor:
        """The coefficients of ops.diffusion_loss at every t, [S, 10] float32 on the device."""
        key = ("loss", device)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(self.loss_coefficients().astype(np.float32)).to(device)
        return self._tables[key]

    def loss_coefficients(self) -> np.ndarray:
        """The coefficients of ops.diffusion_loss, [S, 10] float64 with columns ops.LOSS_COLUMNS."""
        s = self.schedule
        columns = {
            "log_variance": getattr(s, self.log_variance_table),
            "mse_weight": self._mse_weights(),
            "is_first": np.arange(s.num_timesteps) == 0,
        }
        return np.stack([columns[n] if n in columns else getattr(s, n) for n in ops.LOSS_COLUMNS], axis=1)

    def _mse_weights(self) -> np.ndarray:
        """Min-SNR weights of the squared error at every t (Hang et al. 2023, https://arxiv.org/abs/2303.09556)."""
        s = self.schedule
        if not self.min_snr_gamma:
            return np.ones(s.num_timesteps)
        snr = s.alphas_cumprod / (1 - s.alphas_cumprod)
        clipped = np.minimum(snr, self.min_snr_gamma)
        return clipped / snr if self.mean_type is ModelMeanType.EPSILON else clipped

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, [B]."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return ops.mean_flat(ops.normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The complete variational bound in bits per dimension.

        noise(t) returns the noise of step t, [B, C, H, W]; if None, torch draws it. Returns total_bpd and prior_bpd
        [B], and vb, xstart_mse and mse [B, T], whose column 0 is the largest timestep.
        """
        vb, xstart_mse, mse = [], [], []
        for step in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), step, device=x_start.device)
            eps = torch.randn_like(x_start) if noise is None else noise(step)
            x_t = self.q_sample(x_start, t, eps)
            term, pred_xstart = self.vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            vb.append(term)
            xstart_mse.append(ops.mean_flat((pred_xstart - x_start).square()))
            mse.append(ops.mean_flat((self.predict_eps_from_xstart(x_t, t, pred_xstart) - eps).square()))
        terms = {"vb": torch.stack(vb, 1), "xstart_mse": torch.stack(xstart_mse, 1), "mse": torch.stack(mse, 1)}
        prior = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}


def create_diffusion(
    settings: DiffusionSettings, learn_sigma: bool, kept: Sequence[int] | None = None
) -> GaussianDiffusion:
    """The process that the settings describe; `learn_sigma` says whether the network predicts variances.

    kept: the steps of the chain to keep, ascending, instead of timestep_respacing. Raises ValueError for both.
    """
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if settings.sigma_small else ModelVarType.FIXED_LARGE
    if settings.use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if settings.rescale_learned_sigmas else LossType.MSE
    return GaussianDiffusion(
        Schedule.create(settings.noise_schedule, settings.diffusion_steps, settings.timestep_respacing, kept),
        mean_type=ModelMeanType.START_X if settings.predict_xstart else ModelMeanType.EPSILON,
        var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=settings.rescale_timesteps,
        min_snr_gamma=settings.min_snr_gamma,
    )


def _noised(model: Model, x_start: Tensor, rows: Tensor, noise: ops.Noise) -> Tensor:
    """x_t as a network takes it; x_start and the noise are those of `ops.prepared`, rows those of the loss's table."""
    dtype, channels = getattr(model, "input_format", None) or (torch.float32, None)
    return ops.q_sample(x_start, rows[:, :2], noise, dtype=dtype, channels=channels)
