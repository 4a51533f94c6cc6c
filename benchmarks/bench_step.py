"""A whole training step, ours against improved-diffusion's operations, in one process with interleaved rounds.

    python benchmarks/bench_step.py                          1.7M parameters, the size of the golden tests
    python benchmarks/bench_step.py --num_channels 64 --num_res_blocks 2 --json out.json

Ours is the trainer as train.py runs it: DeepSpeed's engine, counter-based noise, metrics and EMA included. The last
line printed is the ratios: reference time over ours, so that above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.images import Batch
from fastdiff.models import UNetSettings, build_model
from fastdiff.training.engine import start_processes
from fastdiff.training.settings import TrainSettings
from fastdiff.training.trainer import Trainer

try:  # run as a script, or imported beside its neighbour
    from seed_step import SeedStep, SeedUNet
except ImportError:
    from benchmarks.seed_step import SeedStep, SeedUNet


class SameBatch:
    """A loader that hands out one batch again and again: input is not what is measured."""

    class_names: list[str] = []

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.position = images, 0

    def __next__(self) -> Batch:
        count = len(self.images)
        positions = torch.arange(self.position, self.position + count)
        self.position += count
        return Batch(self.images, torch.zeros(count, dtype=torch.int64, device=self.images.device), positions)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_channels", type=int, default=32)
    parser.add_argument("--num_res_blocks", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds after one to warm up")
    parser.add_argument("--steps", type=int, default=2, help="steps per variant and round")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--variants", default="fp32,bf16", help="of fp32, bf16, fp16, each with +compile if wanted")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def make_variants(args: argparse.Namespace) -> dict[str, object]:
    """Name → something that takes one step when called."""
    processes = start_processes()
    device = processes.device
    settings = UNetSettings(
        image_size=args.image_size,
        num_channels=args.num_channels,
        num_res_blocks=args.num_res_blocks,
        channel_mult="" if args.image_size in (32, 64, 256) else "1,2,2",
        learn_sigma=True,
    )
    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=4000, noise_schedule="cosine"), learn_sigma=True)
    torch.manual_seed(0)
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    weights = {
        name: value + 0.02 * torch.randn_like(value) for name, value in build_model(settings).state_dict().items()
    }
    seed_model = SeedUNet(settings)
    seed_model.load_state_dict(weights)
    check_same_function(seed_model, settings, weights)
    reference = SeedStep(seed_model.to(device), diffusion, lr=1e-4, ema_rate=0.9999)
    variants: dict[str, object] = {"reference": lambda: reference(images)}
    for name in args.variants.split(","):
        precision, _, compiled = name.partition("+")
        model = build_model(settings)
        model.load_state_dict(weights)
        stage = 0 if precision == "fp32" else 1  # as the shipped configurations
        train = TrainSettings(batch_size=args.batch_size, precision=precision, compile=bool(compiled), zero_stage=stage)
        variants[name] = Trainer(train, {}, model, diffusion, SameBatch(images), processes).take_step
    return variants


def check_same_function(seed_model: SeedUNet, settings: UNetSettings, weights: dict[str, torch.Tensor]) -> None:
    """Both sides must compute the same thing, or their times say nothing."""
    ours = build_model(settings).eval()
    ours.load_state_dict(weights)
    x, t = torch.randn(2, 3, *settings.size_hw), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), seed_model.eval()(x, t), atol=1e-4, rtol=1e-4)


def measure(variants: dict[str, object], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each variant in each round; their order rotates."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            for _ in range(steps):
                variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append((time.perf_counter() - start) / steps)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    q = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return q[0].item(), q[1].item(), q[2].item()


def hardware() -> dict[str, object]:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    variants = make_variants(args)
    times = measure(variants, args.rounds, args.steps)
    place = hardware()
    print(f"{place['device']}, torch {place['torch']}, {place['threads']} threads")
    print(f"{'':12}{'ms/step':>10}{'images/s':>10}{'ratio':>8}   quartiles of the ratio")
    rows = {}
    for name, seconds in times.items():
        median = quartiles(seconds)[1]
        ratios = [r / s for r, s in zip(times["reference"], seconds, strict=True)]
        low, ratio, high = quartiles(ratios)
        rows[name] = {"ms": 1e3 * median, "images_per_second": args.batch_size / median, "ratio": [low, ratio, high]}
        print(f"{name:12}{1e3 * median:10.1f}{args.batch_size / median:10.1f}{ratio:8.2f}   {low:.2f} .. {high:.2f}")
    if args.json:
        setup = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({**place, "setup": setup, "rows": rows}, indent=2) + "\n")
    print("ratios: " + ", ".join(f"{name} {row['ratio'][1]:.2f}" for name, row in rows.items() if name != "reference"))


if __name__ == "__main__":
    main()
