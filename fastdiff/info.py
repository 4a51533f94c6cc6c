"""Say what files and folders are: checkpoints, runs, sampling jobs, images, results, and other programs' weights.

    python fastdiff/info.py runs/cifar10_uncond
    python fastdiff/info.py --json ema_0.9999_500000.pt samples_64x32x32x3.npz

Prints the kind, what is known of it, the settings that differ from their defaults, and a command that fits, in which
words in capitals are to be filled in. The name of a configuration, such as cifar10_uncond, is described as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.errors import UserError, leave_quietly_on_ctrl_c

if __name__ == "__main__":
    leave_quietly_on_ctrl_c()  # before the slow imports

from fastdiff.runtime.paths import expand_path
from fastdiff.runtime.script import run_script, script_name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="file or folder")
    parser.add_argument("--all", action="store_true", help="also print the settings that have their defaults")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each path, with all settings")
    args = parser.parse_args(argv)
    if not args.paths:
        raise UserError("name a file or a folder")
    from fastdiff.inspection.find import find

    problems = []
    for number, path in enumerate(args.paths):
        try:
            found = find(expand_path(path))
        except UserError as error:
            problems.append(str(error))
            continue
        shown = json.dumps(found.as_json(), indent=2, ensure_ascii=False) if args.json else found.text(args.all)
        print(("\n" if number and not args.json else "") + shown)
    for problem in problems[:-1]:
        print(f"{script_name()}: error: {problem}", file=sys.stderr)
    if problems:
        raise UserError(problems[-1])


if __name__ == "__main__":
    run_script(main, "info.py")
