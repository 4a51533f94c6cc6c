"""Measures what checkpoints, and the guards against non-finite numbers, cost training.

    python benchmarks/bench_saving.py --json benchmarks/results/saving_quick_cpu.json
    python benchmarks/bench_saving.py --config imagenet64_270M --batch 128 --precision bf16 --folder DISK

Three windows of the same number of steps take turns: `none` saves nothing; `beside` saves at its start, in the
background; `waiting` saves at its start and waits. `cost` is how much longer a window took than the one without a
checkpoint; `stood still` is the part of it in which no step ran. `guards` is the pass over the gradients that finds
non-finite ones. All figures are medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.bench_train import load, quartiles
from benchmarks.train_variants import Case, trainer_of
from benchmarks.variant_timing import synchronize
from fastdiff import ops
from fastdiff.errors import UserError
from fastdiff.runtime.machine import device_name, use_free_cores
from fastdiff.runtime.script import run_script
from fastdiff.training.checkpoints.saver import Saver
from fastdiff.training.deepspeed_engine import start_processes
from fastdiff.training.trainer import Trainer

WAYS = ("none", "beside", "waiting")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quick", help="name in configs/, a JSON file, or quick (default)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--steps", type=int, default=0, help="in a window (default: as many as four writes take)")
    parser.add_argument("--rounds", type=int, default=7, help="windows of each kind (default: 7)")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    for name in ("batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def window(trainer: Trainer, folder: Path, way: str, steps: int) -> dict[str, float]:
    """Take `steps` steps with one checkpoint or none; returns the seconds of all, and those in which no step ran."""
    saver = Saver(folder, keep_last=1, background=way == "beside")
    synchronize()
    start = time.perf_counter()
    if way != "none":
        saver.save(trainer.step, trainer.checkpoint_files({}), 0)
    stood_still = time.perf_counter() - start
    for _ in range(steps):
        trainer.take_step()
        trainer.read_metrics()  # waits for the device
    seconds = time.perf_counter() - start
    saver.wait()
    waited = time.perf_counter() - start - seconds
    saver.close()
    return {"seconds": seconds + waited, "stood_still": stood_still + waited}


def guards_ms(trainer: Trainer, repeats: int = 30) -> list[float]:
    """Milliseconds of the gradients' norm, which a step without guards would not compute."""
    trainer.take_step()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        float(ops.squared_norm(gradients))
        times.append(1e3 * (time.perf_counter() - start))
    return quartiles(times)


def measure(trainer: Trainer, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Run windows of all kinds in turns; returns the cost of each kind of checkpoint, and of the guards."""
    made: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for round_ in range(rounds):
        for way in WAYS[round_ % 3 :] + WAYS[: round_ % 3]:
            made[way].append(window(trainer, folder, way, steps))
        print(f"round {round_ + 1}/{rounds}", flush=True)
    step_ms = [1e3 * entry["seconds"] / steps for entry in made["none"]]
    found: dict[str, Any] = {"step_ms": quartiles(step_ms)}
    for way in WAYS[1:]:
        costs = [a["seconds"] - b["seconds"] for a, b in zip(made[way], made["none"], strict=True)]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(made[way], made["none"], strict=True)]
        found[way] = {
            "cost_ms": quartiles([1e3 * cost for cost in costs]),
            "stood_still_ms": quartiles([1e3 * entry["stood_still"] for entry in made[way]]),
            "window_ratio": quartiles(ratios),
        }
    return {**found, "guards_ms": guards_ms(trainer)}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = start_processes()
    use_free_cores()
    case = Case(load(args.config, "--config"), args.batch, args.precision, processes)
    trainer = trainer_of(case)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        for _ in range(3):
            trainer.take_step()
        writes = [window(trainer, folder, "waiting", 0)["seconds"] for _ in range(3)]
        step = window(trainer, folder, "none", 5)["seconds"] / 5
        steps = args.steps or max(5, round(4 * statistics.median(writes) / step))
        found = measure(trainer, folder, steps, args.rounds)
    megabytes = trainer.state_bytes / 1e6
    print(f"{args.config}, batch {args.batch}, {args.precision}, on {device_name(processes.device)}: a checkpoint of")
    print(f"{megabytes:.1f} MB per {steps} steps of {found['step_ms'][1]:.1f} ms")
    for way in WAYS[1:]:
        low, cost, high = found[way]["cost_ms"]
        still, ratio = found[way]["stood_still_ms"][1], found[way]["window_ratio"]
        print(
            f"{way:8}  cost {cost:.1f} ms ({low:.1f} to {high:.1f}), stood still {still:.1f} ms; "
            f"the window took {ratio[1]:.3f} times as long ({ratio[0]:.3f} to {ratio[2]:.3f})"
        )
    low, guards, high = found["guards_ms"]
    print(f"guards    {guards:.2f} ms ({low:.2f} to {high:.2f}), {guards / found['step_ms'][1]:.2%} of a step")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        given = " ".join(f"--{key} {getattr(args, key)}" for key in ("config", "batch", "precision", "rounds"))
        head = {
            "device": device_name(processes.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "commit": commit,
            "date": date.today().isoformat(),
            "command": f"python benchmarks/bench_saving.py {given}",
            "steps": steps,
            "megabytes": megabytes,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, **found}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main, "bench_saving.py")
