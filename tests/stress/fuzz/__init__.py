"""Hostile input: thousands of damaged and malicious files and settings, each tried in a process that is watched."""
