"""Runs many cases of a kind in monitored processes, and counts the results."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.kinds import ALL

ABOVE = Path(__file__).resolve().parents[1:4]
START_SECONDS = 120.0
"""Time limit for imports, before the first case."""


@dataclass
class Report:
    """The results of cases of one kind."""

    kind: str
    seed: int
    results: Counter[str] = field(default_factory=Counter)
    """Cases by result: read, refused."""
    names: Counter[str] = field(default_factory=Counter)
    """Cases by the first word of their names."""
    wrong: list[str] = field(default_factory=list)
    """Each failure, with the command that repeats its case."""
    slowest: tuple[float, str] = (0.0, "")
    most_bytes: tuple[int, str] = (0, "")
    """Largest growth of a process since the start of its first case, and the case."""
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.results.values())

    def fail(self, index: int, name: str, why: str) -> None:
        again = f"python tests/stress/fuzz/run.py --only {self.kind}:{index} --seed {self.seed}"
        self.wrong.append(f"{self.kind} {index} ({name}): {why}\n  again: {again}")

    def add(self, line: dict) -> None:
        name = f"{line['end']} ({line['name']})"
        self.results[line["result"]] += 1
        self.names[line["name"].split()[0]] += 1
        self.slowest = max(self.slowest, (line["seconds"], name))
        self.most_bytes = max(self.most_bytes, (line["bytes"], name), key=lambda pair: pair[0])
        if line["wrong"]:
            self.fail(line["end"], line["name"], line["wrong"])
        elif line["bytes"] > ALL[self.kind].bound_bytes:
            self.fail(line["end"], line["name"], f"took {line['bytes'] / 2**20:.0f} MiB")

    def __add__(self, other: Report) -> Report:
        return Report(
            self.kind,
            self.seed,
            self.results + other.results,
            self.names + other.names,
            self.wrong + other.wrong,
            max(self.slowest, other.slowest),
            max(self.most_bytes, other.most_bytes),
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.results.most_common())
        return (
            f"{self.kind}: {self.count} cases in {self.seconds:.0f} s: {counts}, {len(self.wrong)} wrong; slowest "
            f"{self.slowest[0]:.2f} s, {self.slowest[1]}; peak {self.most_bytes[0] / 2**20:.0f} MiB, "
            f"{self.most_bytes[1]}"
        )


def run(kind: str, seed: int, start: int, stop: int) -> Report:
    """Run cases start to stop - 1. A case that hangs or kills its process fails, and the next ones still run."""
    report = Report(kind, seed)
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while start < stop:
            start = _run_process(report, kind, seed, start, stop, folder)
            if len(report.wrong) > 20:
                break
    report.seconds = time.monotonic() - clock
    return report


def _run_process(report: Report, kind: str, seed: int, start: int, stop: int, folder: str) -> int:
    """Run cases in one process. Returns the number of the next case, or `stop` if the process can't start."""
    command = [sys.executable, "-m", "fuzz.worker", kind, str(seed), str(start), str(stop), folder]
    paths = [*map(str, ABOVE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        assert process.stdout is not None
        at, name, hung = start, "start", False
        limit = START_SECONDS
        waiting = b""
        while start < stop:
            if b"\n" not in waiting:
                if not select.select([process.stdout], [], [], limit)[0]:
                    process.kill()
                    hung = True
                    break
                more = os.read(process.stdout.fileno(), 1 << 16)  # readline would keep lines that select can't see
                if not more:
                    break
                waiting += more
                continue
            text, _, waiting = waiting.partition(b"\n")
            line = json.loads(text)
            if "begin" in line:
                at, name, limit = line["begin"], line["name"], ALL[kind].limit_seconds
            else:
                report.add(line)
                start, limit = line["end"] + 1, START_SECONDS
        if start < stop:
            process.wait()
            errors.seek(0)
            tail = errors.read()[-1500:].decode(errors="replace")
            why = f"took more than {limit:.0f} s" if hung else f"ended its process ({process.returncode}): {tail}"
            report.fail(at, name, why)
            report.results["lost"] += 1
            start = at + 1 if name != "start" else stop
    return start
