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

# Noise keys: `seed | KEY` seeds the counter generator (ops.image_noise, ops.image_uniform). Its numbers depend only on
# the seed, an image's number and a counter, so without keys, two uses with equal counters would get the same numbers.
# A seed has 32 bits; the keys are above them. Changing a key changes the results of runs.
NOISE = 1 << 32  # noise of training images
TIMESTEPS = 2 << 32  # timesteps of training images
SAMPLES = 3 << 32  # x_T and the noise of every sampling step
CLASSES = 4 << 32  # classes of samples, if they are random
BOUND = 5 << 32  # noise for evaluating the variational bound
ENLARGED = 6 << 32  # x_T and noise of super-resolution
LABEL_DROPOUT = 7 << 32  # which training images lose their label
