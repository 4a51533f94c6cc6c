"""Kills a training run repeatedly, also while it writes a checkpoint, and checks that nothing is lost.

    python tests/stress/chaos.py --kills 100                  one process: some 20 minutes on two cores
    python tests/stress/chaos.py --kills 20 --processes 2     under torchrun; a random rank is killed, and all must end

The same command is started until it ends by itself. It is killed by SIGKILL at random times: during the start, between
steps, and while a checkpoint is written. A second run with the same settings is not disturbed. At the end both must
have the same losses at every step and bit-identical weights, averages and moments, and every listed checkpoint must
have been complete. The last line of output is the verdict; the exit code is 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from helpers.pictures_folder import make_pictures  # noqa: E402

from fastdiff.training.checkpoints.folder import list_checkpoints, newest_whole, step_of  # noqa: E402
from fastdiff.training.checkpoints.format import read_snapshot  # noqa: E402
from fastdiff.training.checkpoints.manifest import find_damage  # noqa: E402

STEPS_PER_KILL = 6
MACHINE = ("images_per_second", "data_wait", "memory_gb")
"""Columns of progress.csv that differ between runs."""
END_SECONDS = 60
"""Seconds within which all ranks must end after one is killed."""


class Lost(Exception):
    """Something was lost; the message says what."""


@dataclass
class Tally:
    """Statistics of the kills so far."""

    kills: Counter[str] = field(default_factory=Counter)
    checked: set[tuple[str, float]] = field(default_factory=set)
    slowest_end: float = 0.0
    partial: int = 0


def command(data: Path, run: Path, steps: int, processes: int, more: str) -> list[str]:
    """Return the command of a small run with every kind of state, which saves every third step."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    model = "--image_size 8 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 4"
    process = "--diffusion_steps 20 --noise_schedule cosine --learn_sigma True --dropout 0.1 --class_cond True"
    training = (
        f"--num_classes 3 --batch_size 4 --microbatch {2 // processes} --lr 1e-3 --lr_anneal_steps {2 * steps} "
        f"--max_steps {steps} --ema_rate 0.9,0.99 --schedule_sampler loss-second-moment --random_flip True --seed 5 "
        f"--deterministic True --loader pillow --log_interval 2 --save_interval 3 --keep_last 3 "
        f"--zero_stage {processes - 1}"
    )
    flags = f"{model} {process} {training} {more}".split()
    folders = ["--data_dir", str(data), "--run_dir", str(run)]
    return [*launcher, str(ROOT / "fastdiff" / "train.py"), *folders, *flags]


class Life:
    """One start of the run, in its own session."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self.log = log.open("ab")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(argv, stdout=self.log, stderr=self.log, env=env, start_new_session=True)

    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self, rng: random.Random) -> float:
        """Kill a random rank, or the only process. Returns the seconds until all processes have ended."""
        ranks = [
            child for child in psutil.Process(self.process.pid).children() if "train.py" in " ".join(child.cmdline())
        ]
        os.kill(rng.choice(ranks).pid if ranks else self.process.pid, signal.SIGKILL)
        start = time.monotonic()
        try:
            self.process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise Lost(f"{END_SECONDS} s after a rank was killed the others still ran") from None
        self.close()
        return time.monotonic() - start

    def close(self) -> None:
        self.log.close()


def wait_for_moment(life: Life, run: Path, kind: str, rng: random.Random) -> bool:
    """Wait for the time to kill the run. Returns False if the run ended before."""
    if kind == "starting":
        until = time.monotonic() + rng.uniform(0, 8)
        return _sleep(life, lambda: time.monotonic() >= until)
    if kind == "training":
        wanted = _rows(run) + rng.randint(0, 2)
        return _sleep(life, lambda: _started(life) and _rows(run) >= wanted) and _linger(rng, 0.08)
    writes = rng.randint(1, 3)
    for _ in range(writes):
        if not _sleep(life, lambda: not _writing(run)) or not _sleep(life, lambda: _writing(run)):
            return False
    return _linger(rng, 0.03)


def _sleep(life: Life, until) -> bool:
    while not until():
        if life.over():
            return False
        time.sleep(0.0005)
    return True


def _linger(rng: random.Random, most: float) -> bool:
    time.sleep(rng.uniform(0, most))
    return True


def _started(life: Life) -> bool:
    return b"first step" in Path(life.log.name).read_bytes()[-2000:]


def _writing(run: Path) -> bool:
    try:
        return any(name.startswith(".step_") for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def _rows(run: Path) -> int:
    try:
        return (run / "progress.csv").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def check_listed(run: Path, tally: Tally) -> None:
    """Raise Lost unless every checkpoint under its final name is complete and readable."""
    for folder in list_checkpoints(run / "checkpoints"):
        key = (folder.name, folder.stat().st_mtime)
        if key in tally.checked:
            continue
        if wrong := find_damage(folder):
            raise Lost(f"{folder.name} was listed and is damaged: {wrong}")
        snapshot = read_snapshot(folder, ["0.9", "0.99"])
        if snapshot.notes or snapshot.step != step_of(folder):
            raise Lost(f"{folder.name} was listed and lacks something: {snapshot.notes}")
        tally.checked.add(key)
    left = list((run / "checkpoints").glob(".step_*"))
    tally.partial += bool(left)


def compare(run: Path, alone: Path, steps: int) -> None:
    """Raise Lost if the losses or final states of the two runs differ."""
    traces = []
    for folder in (run, alone):
        with (folder / "progress.csv").open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v and k not in MACHINE} for row in csv.DictReader(file)]
        traces.append(rows)
    for killed, undisturbed in zip(*traces, strict=False):
        if killed != undisturbed:
            raise Lost(f"the loss trace differs at step {undisturbed['step']}: {killed} against {undisturbed}")
    if len(traces[0]) != len(traces[1]):
        raise Lost(f"the loss trace has {len(traces[0])} rows, the undisturbed run's {len(traces[1])}")
    name = f"step_{steps:06d}"
    for file in sorted((alone / "checkpoints" / name).glob("*.pt")):
        states = [torch.load(f / "checkpoints" / name / file.name, weights_only=True) for f in (run, alone)]
        if difference := _difference(*states):
            raise Lost(f"{file.name} differs at {difference}")


def _difference(a: object, b: object, where: str = "") -> str:
    """Return where two nested states differ; empty if they are bit-identical."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else where or "its value"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where} (keys)"
        return next((d for key in a if key != "run_dir" and (d := _difference(a[key], b[key], f"{where}/{key}"))), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := _difference(x, y, f"{where}[{i}]"))), ""
        )
    return "" if a == b else f"{where}: {a!r} against {b!r}"


def torment(argv: list[str], run: Path, kills: int, rng: random.Random, tally: Tally) -> None:
    """Start, kill and check the run `kills` times; then let it finish."""
    log = run.with_name("killed.txt")
    begun = time.monotonic()
    while (done := sum(tally.kills.values())) < kills:
        life = Life(argv, log)
        kind = rng.choices(("starting", "training", "writing"), (1, 3, 3))[0]
        if not wait_for_moment(life, run, kind, rng):
            life.close()
            if life.process.returncode == 0:
                raise Lost(f"the run ended after {done} kills: too few steps for {kills}")
            raise Lost(f"the run ended by itself, with exit code {life.process.returncode}; see {log}")
        kind = "writing" if _writing(run) else kind
        tally.slowest_end = max(tally.slowest_end, life.kill(rng))
        tally.kills[kind] += 1
        check_listed(run, tally)
        pace = (time.monotonic() - begun) / (done + 1)
        newest = newest_whole(run / "checkpoints")[0]
        at = step_of(newest) if newest else 0
        print(
            f"kill {done + 1}/{kills} while {kind}; newest whole checkpoint: step {at}; "
            f"{pace:.1f} s a kill, about {pace * (kills - done - 1) / 60:.0f} min left",
            flush=True,
        )
    life = Life(argv, log)
    if life.process.wait(timeout=1800):
        raise Lost(f"the last start ended with exit code {life.process.returncode}; see {log}")
    life.close()
    check_listed(run, tally)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2), help="ranks, under torchrun if there are 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times (default: 0)")
    parser.add_argument("--flags", default="", help="more flags for train.py, e.g. '--precision bf16'")
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary one)")
    args = parser.parse_args()
    tally, start = Tally(), time.monotonic()
    steps = STEPS_PER_KILL * args.kills + 20
    with tempfile.TemporaryDirectory() as temporary:
        work = args.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--folder: {work} must be empty")
        make_pictures(work / "pictures", count=14)
        try:
            print(f"an undisturbed run of {steps} steps first", flush=True)
            alone = Life(
                command(work / "pictures", work / "alone", steps, args.processes, args.flags), work / "alone.txt"
            )
            if alone.process.wait(timeout=3600):
                raise Lost(f"the undisturbed run failed:\n{(work / 'alone.txt').read_text()[-2000:]}")
            alone.close()
            argv = command(work / "pictures", work / "run", steps, args.processes, args.flags)
            torment(argv, work / "run", args.kills, random.Random(args.seed), tally)
            compare(work / "run", work / "alone", steps)
            verdict, code = "nothing was lost", 0
        except Lost as lost:
            if (work / "killed.txt").is_file():
                print((work / "killed.txt").read_text(errors="replace")[-3000:])
            verdict, code = f"LOST: {lost}", 1
    done = sum(tally.kills.values())
    kinds = ", ".join(f"{count} while {kind}" for kind, count in sorted(tally.kills.items()))
    print(
        f"{done} kills ({kinds}) of {args.processes} process{'es' if args.processes > 1 else ''} in "
        f"{(time.monotonic() - start) / 60:.1f} min; {len(tally.checked)} checkpoints read, {tally.partial} times an "
        f"unfinished one lay beside them; all ranks ended within {tally.slowest_end:.1f} s"
    )
    print(f"verdict after {done} kills: {verdict}")
    return code


if __name__ == "__main__":
    sys.exit(main())
