"""Training runs: settings, steps, checkpoints, logs and diagnostics."""
