"""The diffusion process: schedules, losses, samplers. Knows no network, file or flag."""

from fastdiff.diffusion.process import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.diffusion.timesteps import create_sampler

__all__ = ["DiffusionSettings", "GaussianDiffusion", "create_diffusion", "create_sampler"]
