"""Folders of pictures → batches of uint8 pixels and labels: listed, shuffled, sharded, read ahead, resumable.

This file imports nothing, so that the processes that decode images (cache/build.py) start without PyTorch.
"""
