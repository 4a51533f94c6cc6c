"""All throughput that is to be measured on a GPU, training and drawing, in parts that fit into nine minutes each.

    python benchmarks/bench_gpu.py                     the parts that --results lacks, in order, until time is up
    python benchmarks/bench_gpu.py --only 270M levers  some parts
    python benchmarks/bench_gpu.py --list

A part that is done has its JSON in --results and is not run again (--again runs it anew), so the command can simply be
repeated until it says that nothing is left; compiled code is kept in between. Exit code 0 when nothing is left, 3 when
parts are left, 1 when one failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A command that writes the file it is given, and about how many minutes it takes."""

    name: str
    minutes: float
    command: tuple[str, ...]

    def argv(self, results: Path) -> list[str]:
        return [sys.executable, *self.command, "--json", str(self.file(results))]

    def file(self, results: Path) -> Path:
        return results / f"gpu_{self.name.replace(' ', '_')}.json"


def _train(config: str, batch: int, *more: str) -> tuple[str, ...]:
    given = ("--configs", config, "--batches", str(batch), "--rounds", "6", "--seconds", "0.6", "--resume")
    return (str(HERE / "bench_train.py"), *given, *more)


def _levers(*names: str) -> tuple[str, ...]:
    return _train("imagenet64_uncond", 128, "--variants", "ours", "--levers", ",".join(names))


def _draw(config: str, batches: str, *more: str) -> tuple[str, ...]:
    given = (
        "--configs",
        config,
        "--batches",
        batches,
        "--steps",
        "10",
        "--rounds",
        "5",
        "--seconds",
        "0.6",
        "--resume",
    )
    return (str(HERE / "bench_sampling.py"), *given, *more)


ALL = ("--variants", "reference,reference+compile,diffusers,ours")
PARTS = (
    Part("270M", 4.5, _train("imagenet64_270M", 128, *ALL)),
    Part("cifar10", 3.5, _train("cifar10_uncond", 256, "--variants", ALL[1] + ",ours +cuda_graph")),
    Part("uncond", 4, _train("imagenet64_uncond", 128, *ALL)),
    Part("lsun", 4, _train("lsun_bedroom_lr1e-4", 32, *ALL)),
    Part("upsample", 4, _train("upsample_256", 16, "--variants", "reference,reference+compile,ours")),
    Part("270M fp16", 2.5, _train("imagenet64_270M", 128, "--variants", "ours", "--precisions", "bf16,fp16")),
    Part("levers 1", 6, _levers("compile", "kernels", "group norm kernel")),
    Part("levers 2", 6, _levers("attention kernel", "noising and loss kernels", "optimiser kernel")),
    Part("levers 3", 6, _levers("transposed upsampling", "virtual concat of skips", "weights laid out once")),
    Part("levers 4", 4, _levers("one embedding product", "residual sum in the norm")),
    Part("sampling 270M", 7, _draw("imagenet64_270M", "256", *ALL, "--split")),
    Part("sampling cifar10", 6, _draw("cifar10_uncond", "512", *ALL, "--split")),
    Part("sampling one", 4, _draw("imagenet64_270M", "1", "--variants", "reference,ours,ours eager")),
    Part("sampling few", 4, _draw("imagenet64_270M", "16", "--variants", "reference,ours,ours eager")),
    Part("sampling levers", 7, _draw("cifar10_uncond", "512", "--variants", "ours", "--levers=all")),
    Part("sampling levers few", 7, _draw("cifar10_uncond", "16", "--variants", "ours", "--levers=all")),
    Part("loaders", 2, (str(HERE / "bench_data.py"), "--quick")),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--minutes", type=float, default=8.8, help="no part begins that might end later")
    parser.add_argument("--again", action="store_true", help="also the parts that are done")
    parser.add_argument("--list", action="store_true", help="what is done and what is left")
    args = parser.parse_args(argv)
    names = [part.name for part in PARTS]
    for word in args.only or []:
        if not any(name.startswith(word) for name in names):
            parser.error(f"--only: {word} begins none of {', '.join(names)}")
    return args


def left(args: argparse.Namespace) -> list[Part]:
    """The parts still to be run."""
    wanted = [p for p in PARTS if not args.only or any(p.name.startswith(word) for word in args.only)]
    return [p for p in wanted if args.again or not p.file(args.results).is_file()]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    waiting, start, outcome = left(args), time.perf_counter(), []
    if args.list:
        for part in PARTS:
            state = "left" if part in waiting else "done"
            print(f"{state:6}{part.name:14}about {part.minutes:g} minutes")
        return 3 if waiting else 0
    skipped, failed = [], 0
    for part in waiting:
        remaining = args.minutes - (time.perf_counter() - start) / 60
        if remaining < part.minutes and outcome:
            skipped.append(part.name)
            continue
        print(f"== {part.name}", flush=True)
        began = time.perf_counter()
        try:
            code = subprocess.run(part.argv(args.results), timeout=max(60.0, 60 * remaining)).returncode
        except subprocess.TimeoutExpired:
            code = 124
            part.file(args.results).unlink(missing_ok=True)
        failed += bool(code)
        verdict = "ok" if not code else "out of time" if code == 124 else f"failed ({code})"
        outcome.append(f"{part.name:14}{time.perf_counter() - began:6.0f} s  {verdict}")
    print("\n".join(outcome))
    if skipped:
        print(f"left for another time: {', '.join(skipped)}")
    return 1 if failed else 3 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
