"""Settings from flags, JSON files, checkpoints and presets."""
