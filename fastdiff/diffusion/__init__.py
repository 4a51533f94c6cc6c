"""The diffusion process: schedules, losses, solvers and samplers, without networks, files or flags.

The keys below separate the random streams of one seed. They are or-ed to the seed of the counter generator.
"""

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
NOISE = 1 << 32  # of training images
TIMESTEPS = 2 << 32  # of training images
SAMPLES = 3 << 32  # x_T and the noise of every sampling step
CLASSES = 4 << 32  # of samples whose class is drawn
BOUND = 5 << 32  # noise of the variational bound
ENLARGED = 6 << 32  # x_T and noise of a super-resolution job
LABEL_DROPOUT = 7 << 32  # which training images lose their label
