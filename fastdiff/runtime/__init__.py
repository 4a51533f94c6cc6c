"""Processes, signals, files and the machine, for all kinds of runs. Knows no network."""
