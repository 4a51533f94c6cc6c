"""Checkpoints: their files, folders, writing and resuming."""
