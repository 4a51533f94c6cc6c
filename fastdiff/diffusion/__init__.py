"""The diffusion process: schedules, losses, solvers and samplers, without networks, files or flags."""

from fastdiff.diffusion.process import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.diffusion.solvers import SOLVERS, SolverTable, solver_table
from fastdiff.diffusion.timesteps import create_timestep_sampler

__all__ = [
    "SOLVERS",
    "DiffusionSettings",
    "GaussianDiffusion",
    "SolverTable",
    "create_diffusion",
    "create_timestep_sampler",
    "keep_steps",
    "solver_table",
]
