"""Sampling jobs: many images by any number of processes that share a folder."""
