"""Noise keys, which keep the random numbers of different uses apart.

`seed | KEY` seeds the counter generator (`ops.image_noise`, `ops.image_uniform`). Its numbers depend only on that seed,
an image's number and a counter: without keys, two uses with equal counters would get the same numbers. A seed has 32
bits, and the keys are above them. Changing a key changes the results of runs.
"""

NOISE = 1 << 32  # noise of training images
TIMESTEPS = 2 << 32  # timesteps of training images
SAMPLES = 3 << 32  # x_T and the noise of every sampling step
CLASSES = 4 << 32  # classes of samples, if they are random
BOUND = 5 << 32  # noise for evaluating the variational bound
ENLARGED = 6 << 32  # x_T and noise of super-resolution
LABEL_DROPOUT = 7 << 32  # which training images lose their label
VALIDATION_NOISE = 8 << 32  # noise of validation images
VALIDATION_TIMESTEPS = 9 << 32  # timesteps of validation images
