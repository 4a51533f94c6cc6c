"""Runs several scripts one after another in the processes of one launcher: [["sample", [flags]], ...] as JSON."""

import importlib
import json
import sys

from fastdiff.runtime.script import run_script


def main() -> None:
    for script, argv in json.loads(sys.argv[1]):
        importlib.import_module(f"fastdiff.{script}").main(argv)


if __name__ == "__main__":
    run_script(main, "run_scripts.py")
