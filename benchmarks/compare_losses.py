"""Checks that the fast paths learn what the reference path learns: compares the losses of both, with several seeds.

    python benchmarks/compare_losses.py --data_dir DIR --config configs/cifar10_uncond.json --batch_size 128
    python benchmarks/compare_losses.py --data_dir DIR --num_channels 32 --num_res_blocks 1 --batch_size 8   on a CPU

Each seed trains twice: with everything on (`auto`), and with `--kernels reference --compile False` (`reference`).
Images, timesteps and noise are the same for both, so their losses differ by rounding and its growth over the steps.
The exit code is 1 if the difference between the paths, over the last half of the steps, is larger than the spread
between seeds. Other flags go to train.py. losses.json and losses.png are written to --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from fastdiff import train
from fastdiff.runtime.script import run_script

PATHS = {"auto": ["--kernels", "auto"], "reference": ["--kernels", "reference", "--compile", "False"]}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--every", type=int, default=10, help="steps per point")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_losses"))
    return parser.parse_known_args(argv)


def losses_of(folder: Path) -> np.ndarray:
    """The column loss of a run's progress.csv, one value per interval."""
    with (folder / "progress.csv").open(newline="") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def picture(curves: dict[str, np.ndarray], every: int, path: Path) -> None:
    """Draw the curves of both paths, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, values), style in zip(curves.items(), ("-", "--"), strict=True):
        steps = every * np.arange(1, values.shape[1] + 1)
        for seed, row in enumerate(values):
            axes.plot(steps, row, style, color=f"C{seed}", label=f"{name}, seed {seed}", linewidth=1.2)
    axes.set(xlabel="steps", ylabel="loss", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    args, rest = parse(argv)
    curves: dict[str, np.ndarray] = {}
    for path, flags in PATHS.items():
        rows = []
        for seed in range(args.repeats):
            folder = args.out / f"{path}_{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            own = {"run_dir": folder, "seed": seed, "max_steps": args.steps, "log_interval": args.every}
            own |= {"save_interval": 10**6, "sample_interval": 0}
            train.main([*rest, *flags, *(str(word) for name, value in own.items() for word in (f"--{name}", value))])
            rows.append(losses_of(folder))
        curves[path] = np.stack(rows)
    half = curves["auto"].shape[1] // 2
    late = {name: values[:, half:].mean(axis=1) for name, values in curves.items()}
    difference = np.abs(late["auto"] - late["reference"])
    spread = float(late["reference"].std(ddof=1)) if args.repeats > 1 else float("nan")
    nearest = np.abs(curves["auto"] - curves["reference"]).max()
    for seed in range(args.repeats):
        print(f"seed {seed}: loss of the last half {late['auto'][seed]:.6f}, reference {late['reference'][seed]:.6f}")
    print(f"largest difference at any point {nearest:.2e}")
    print(f"difference between paths {difference.max():.2e}, spread between seeds {spread:.2e}")
    result = {"steps": args.steps, "every": args.every, "flags": rest}
    result |= {name: values.tolist() for name, values in curves.items()}
    (args.out / "losses.json").write_text(json.dumps(result) + "\n")
    picture(curves, args.every, args.out / "losses.png")
    if not difference.max() <= spread:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, "compare_losses.py")
