"""Runs several scripts one after another in the processes of one launcher: [["sample", [flags]], ...] as JSON."""

import importlib
import json
import sys

if __name__ == "__main__":
    for script, argv in json.loads(sys.argv[1]):
        importlib.import_module(f"fastdiff.{script}").main(argv)
