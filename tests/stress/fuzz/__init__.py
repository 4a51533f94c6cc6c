"""Fuzzing: thousands of damaged and malicious files and settings, each tested in a monitored process."""
