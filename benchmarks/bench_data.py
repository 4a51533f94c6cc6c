"""Measures images per second from a folder of JPEG files, by every loader, against improved-diffusion's way.

    python benchmarks/bench_data.py                                 pictures made up on the spot: photos and tiny ones
    python benchmarks/bench_data.py --data_dir DIR --size 64 --json out.json

The reference is improved-diffusion's: one worker process of PyTorch's DataLoader, which opens, halves, resizes, crops
and converts to float32 one picture after the other. `packed` reads images that were decoded before, from a mapped file
(disk) or an array (memory). Rounds are interleaved; in each, a loader is opened, gives one batch to warm up, and is
then timed. `per core` is images per second of processor time, of all threads and processes together, so that neither
their number nor a busy machine changes it. The last line has the ratios of that to the reference's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdiff.images.listing import list_images
from fastdiff.images.open import open_images
from fastdiff.images.settings import DataSettings

TARGETS = {
    "imagenet64_uncond": (64, 2015),
    "imagenet64_270M": (64, 979),
    "cifar10_uncond": (32, 8210),
    "upsample_256": (256, 146),
    "lsun_bedroom_lr1e-4": (256, 301),
}
"""Image size, and images per second that training is meant to reach on one H200: predictions, none was measured."""
WAITING = 0.02
"""Share of a training step that may be spent waiting for images."""
OURS: dict[str, dict[str, str]] = {
    "pillow": {"loader": "pillow"},
    "dali": {"loader": "dali"},
    "packed-disk": {"cache": "disk"},
    "packed-memory": {"cache": "gpu"},
}


class OneByOne(Dataset):
    """improved-diffusion's data set: a picture is read, reduced, cropped and scaled to [-1, 1] when it is asked for."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths, self.size = list_images(folder), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, int]]:
        with open(self.paths[index], "rb") as file:
            picture = Image.open(file)
            picture.load()
        while min(picture.size) >= 2 * self.size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = self.size / min(picture.size)
        wanted = round(picture.width * scale), round(picture.height * scale)
        pixels = np.array(picture.resize(wanted, Image.Resampling.BICUBIC).convert("RGB"))
        top, left = ((side - self.size) // 2 for side in pixels.shape[:2])
        pixels = pixels[top : top + self.size, left : left + self.size]
        return np.transpose(pixels.astype(np.float32) / 127.5 - 1, (2, 0, 1)), {}


class Endless(Sampler):
    """Random indices without end, so that no round meets the end of an epoch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


@contextmanager
def batches(name: str, folder: Path, cache: Path, size: int, args: argparse.Namespace) -> Iterator[Iterator[Any]]:
    """A variant's endless batches."""
    if name == "reference":
        data = OneByOne(folder, size)
        loader = iter(DataLoader(data, args.batch_size, sampler=Endless(len(data)), num_workers=1, drop_last=True))
        yield loader
        del loader  # ends its worker
        return
    how: Any = OURS[name]
    settings = DataSettings(
        data_dir=str(folder), num_workers=args.threads, cache_dir=str(cache) if "cache" in how else "", **how
    )
    with open_images(settings, size_hw=(size, size), channels=3, batch_size=args.batch_size) as images:
        yield images


def measure(folder: Path, size: int, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Images per second, and per second of processor time, of each variant in each round; their order rotates."""
    names = ["reference", *args.variants]
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=args.cache_dir) as cache:
        for i in range(args.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                with batches(name, folder, Path(cache), size, args) as stream:
                    next(stream)
                    count, start, processor = 0, time.perf_counter(), processor_seconds()
                    while time.perf_counter() - start < args.seconds or count == 0:
                        next(stream)
                        count += args.batch_size
                    wall, used = time.perf_counter() - start, processor_seconds() - processor
                    rates[name].append((count / wall, count / max(used, 1e-9)))
    return rates


def processor_seconds() -> float:
    """Processor time of this process and its living children."""
    used = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def report(title: str, size: int, rates: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Print a table; returns its rows."""
    print(f"\n{title} to {size}x{size}")
    print(f"{'':16}{'images/s':>12}{'per core':>12}{'quartiles':>24}{'ratio':>10}   quartiles of the ratio")
    rows: dict[str, Any] = {}
    reference = np.array(rates["reference"])[:, 1]
    for name, values in rates.items():
        wall, per_core = np.array(values).T
        core = np.percentile(per_core, [25, 50, 75])
        ratio = np.percentile(per_core / reference, [25, 50, 75])
        rows[name] = {"images_per_second": np.median(wall), "per_core": core.tolist(), "ratio": ratio.tolist()}
        around = f"{core[0]:,.0f} .. {core[2]:,.0f}"
        print(
            f"{name:16}{np.median(wall):12,.0f}{core[1]:12,.0f}{around:>24}{ratio[1]:10.2f}   "
            f"{ratio[0]:.2f} .. {ratio[2]:.2f}"
        )
    return rows


def report_needs(size: int, rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Print how many cores like this one a GPU would need; returns {configuration: {variant: cores}}."""
    needs: dict[str, dict[str, float]] = {}
    for config, (its_size, rate) in TARGETS.items():
        if its_size == size:
            enough = (1 - WAITING) * rate
            needs[config] = {name: enough / row["per_core"][1] for name, row in rows.items()}
            cores = ", ".join(f"{name} {count:.2g}" for name, count in needs[config].items())
            print(
                f"loader cores for {config} at {rate} images/s per GPU (a prediction), waiting < {WAITING:.0%}: {cores}"
            )
    return needs


def make_pictures(folder: Path, count: int, height: int, width: int) -> Path:
    """JPEG files of smooth fields at several scales under fine grain, about as large as a camera's."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        h, w = (round(side * generator.uniform(0.9, 1.1)) if side > 32 else side for side in (height, width))
        pixels = generator.normal(128, 5, (h, w, 1)).repeat(3, axis=2)
        for cells, strength in ((3, 60), (9, 30), (31, 20), (101, 16)):
            noise = generator.integers(0, 256, (min(cells, h), min(cells, w), 3), dtype=np.uint8)
            field = Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC)
            pixels += (np.asarray(field, dtype=float) - 128) * (strength / 128)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"made_{number:04d}.jpg", quality=92)
    return folder


def cases(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield (title, folder, size) of each set of images to read."""
    if args.data_dir:
        paths = list_images(args.data_dir)
        mean = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        yield f"{len(paths):,} files of {mean:.3g} kB", args.data_dir, args.size
        return
    few = 4 if args.quick else 1
    for title, count, height, width, size in (("photos", 128, 375, 500, 64), ("tiny pictures", 2048, 32, 32, 32)):
        folder = make_pictures(scratch / title.replace(" ", "_"), count // few, height, width)
        mean = sum(path.stat().st_size for path in folder.iterdir()) / (count // few) / 1000
        yield f"made-up {title}, {height}x{width}, {mean:.3g} kB", folder, size


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="a folder of images; without one, pictures are made up")
    parser.add_argument("--size", type=int, default=64, help="pixels per side, with --data_dir")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of ours; the reference has one worker process")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="per variant and round, after the first batch")
    parser.add_argument("--variants", default=",".join(OURS), help="ours to measure")
    parser.add_argument("--cache_dir", type=Path, help="where to put the packed images (default: the temporary folder)")
    parser.add_argument("--quick", action="store_true", help="three short rounds of few pictures")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.variants = args.variants.split(",")
    unknown = [name for name in args.variants if name not in OURS]
    if unknown:
        parser.error(f"--variants: no {unknown[0]}; there are {', '.join(OURS)}")
    if args.quick:
        args.rounds, args.seconds = 3, 0.3
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError):
        args.variants = [name for name in args.variants if name != "dali"]
    return args


def place() -> dict[str, Any]:
    """Device, versions, commit and date of the figures."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "device": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "commit": commit,
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    where = place()
    print(f"{where['device']}, {where['cores']} cores, load {where['load']:.1f}, {args.threads} threads")
    results, ratios = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for title, folder, size in cases(args, Path(scratch)):
            rows = report(title, size, measure(folder, size, args))
            results.append({"images": title, "size": size, "rows": rows, "cores": report_needs(size, rows)})
            shown = ", ".join(f"{name} {row['ratio'][1]:.3g}" for name, row in rows.items() if name != "reference")
            ratios.append(f"{size}x{size}: {shown}")
    if args.json:
        setup = {name: getattr(args, name) for name in ("batch_size", "threads", "rounds", "seconds")}
        args.json.write_text(json.dumps({**where, "setup": setup, "results": results}, indent=2) + "\n")
    print("\nratios per core: " + "; ".join(ratios))


if __name__ == "__main__":
    main()
