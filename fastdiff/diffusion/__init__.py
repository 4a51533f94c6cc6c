"""The diffusion process: schedules, losses, samplers. Knows no network, file or flag."""

from fastdiff.diffusion.process import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.diffusion.solvers import SOLVERS, Plan, make_plan
from fastdiff.diffusion.timesteps import create_timestep_sampler

__all__ = [
    "SOLVERS",
    "DiffusionSettings",
    "GaussianDiffusion",
    "Plan",
    "create_diffusion",
    "create_timestep_sampler",
    "keep_steps",
    "make_plan",
]
