"""Tests new cases of hostile input for a given time, and prints the results.

    python tests/stress/fuzz/run.py --seconds 600 --seed 7
    python tests/stress/fuzz/run.py --only pictures:1234 --seed 7      one case again
    python tests/stress/fuzz/run.py --kinds pictures,bombs --seconds 60

The last line is the verdict; the exit code is 0 only if no case failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:4]]

from fuzz.campaign import Report, run  # noqa: E402
from fuzz.kinds import KINDS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="the time, about (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="each seed gives other cases; the tests use 0 (default: 1)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of cases (default: all)")
    parser.add_argument("--only", default="", metavar="KIND:NUMBER", help="run this case only")
    args = parser.parse_args()
    if args.only:
        kind, _, number = args.only.partition(":")
        sys.exit(_verdict([run(kind, args.seed, int(number), int(number) + 1)], time.monotonic()))
    started = time.monotonic()
    reports: dict[str, Report] = {}
    done: Counter[str] = Counter()
    while time.monotonic() - started < args.seconds:
        for kind in args.kinds.split(","):
            if time.monotonic() - started >= args.seconds and len(reports) == len(args.kinds.split(",")):
                break
            count = KINDS[kind].count
            found = run(kind, args.seed, done[kind], done[kind] + count)
            done[kind] += count
            print(found, flush=True)
            for line in found.wrong:
                print(f"WRONG: {line}", flush=True)
            reports[kind] = reports[kind] + found if kind in reports else found
    print()
    sys.exit(_verdict(list(reports.values()), started))


def _verdict(reports: list[Report], started: float) -> int:
    wrong = [line for report in reports for line in report.wrong]
    for report in reports:
        print(report)
    for line in wrong:
        print(f"WRONG: {line}")
    total = sum(report.count for report in reports)
    print(f"{'FAILED' if wrong else 'PASSED'}: {total} cases, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    main()
