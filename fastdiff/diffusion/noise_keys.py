"""Keys of the counter generator, one per use of a seed: their high bits, or-ed to it, separate the random streams."""

NOISE = 1 << 32  # of training images
TIMESTEPS = 2 << 32  # of training images
SAMPLES = 3 << 32  # x_T and the noise of every sampling step
CLASSES = 4 << 32  # of samples whose class is drawn
BOUND = 5 << 32  # noise of the variational bound
ENLARGED = 6 << 32  # x_T and noise of a super-resolution job
LABEL_DROPOUT = 7 << 32  # which training images lose their label
