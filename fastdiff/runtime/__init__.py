"""Processes, signals, files and the machine: what a run stands on. Knows no network."""
