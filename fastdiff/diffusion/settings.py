"""Settings of the diffusion process."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastdiff.diffusion.schedules import named_betas, space_timesteps
from fastdiff.settings import Affects, Settings


class DiffusionSettings(Settings):
    """The forward chain, what the network predicts, and the loss."""

    diffusion_steps: int = Field(1000, ge=2, le=100_000)
    """T, the length of the forward chain."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """linear: Ho et al. 2020, section 4. cosine: Nichol & Dhariwal 2021, eq. 17."""
    timestep_respacing: Annotated[str, Affects("steps")] = ""
    """Which steps to keep: empty: all; 250: that many, evenly; 10,15,20: so many in each of three equal parts; ddim50:
    50 at a fixed whole stride, whatever the solver."""
    sigma_small: bool = False
    """Without learn_sigma: use the posterior variance instead of beta."""
    predict_xstart: bool = False
    """The network predicts x_0 instead of the noise."""
    use_kl: Annotated[bool, Affects("training")] = False
    """Train on the variational bound (L_vlb)."""
    rescale_timesteps: bool = True
    """Show the network timesteps scaled to 0..1000."""
    rescale_learned_sigmas: Annotated[bool, Affects("training")] = True
    """With learn_sigma: scale the bound's share of the hybrid loss by T / 1000."""
    min_snr_gamma: Annotated[float, Affects("training")] = Field(0.0, ge=0)
    """Weigh the squared error by Min-SNR with this gamma (Hang et al. 2023; 5 is usual); 0: no weights."""

    @model_validator(mode="after")
    def _possible(self) -> DiffusionSettings:
        named_betas(self.noise_schedule, self.diffusion_steps)
        if self.use_kl and self.min_snr_gamma:
            raise ValueError("min_snr_gamma weighs the squared error, which use_kl leaves out; give one of them")
        space_timesteps(self.diffusion_steps, self.timestep_respacing)
        return self
