"""Training runs: settings, steps, checkpoints and what is reported."""
