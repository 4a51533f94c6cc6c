"""Runs the command `fastdiff`: python -m fastdiff train ..."""

from fastdiff.command import main

main()
