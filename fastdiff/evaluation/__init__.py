"""Metrics of image sets: sets of images → features → distances between their distributions."""
