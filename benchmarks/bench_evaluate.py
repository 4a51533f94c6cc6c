"""Times a folder of PNG files on its way to the statistics of FID: ours beside torch-fidelity's own loop and clean-fid.

    python benchmarks/bench_evaluate.py --quick --json evaluate.json
    python benchmarks/bench_evaluate.py --data_dir DIR --feature_weights FILE --clean_fid_weights FILE

Every variant decodes the files, computes the 2,048 features of Inception's last pooling of each image, resized as
TensorFlow 1 does, and their mean and covariance. `ours` is what `evaluate.py --reference` does, `torch-fidelity` its
functions for a folder, `clean-fid` its mode legacy_tensorflow. `clean-fid resize` is the decoding and the bicubic
resizing of clean-fid's mode clean alone, which computes no features and has no ratio. Each round runs every variant
over all files, in an order that rotates; figures are medians and quartiles. Building and compiling the network, and a
first run over all files, are not counted. `error` is the difference of the mean features from torch-fidelity's, over
the features' deviation, both as norms.

Without --feature_weights the weights are random, which changes no time. clean-fid's network is a file of its own,
inception-2015-12-05.pt; without --clean_fid_weights its row is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_train import chosen, quartiles
from benchmarks.result_file import ResultFile
from benchmarks.variant_timing import synchronize
from fastdiff.errors import UserError
from fastdiff.evaluation.collect import Wanted, collect
from fastdiff.evaluation.features import INCEPTION, open_features
from fastdiff.evaluation.fidelity import prepare_torchvision, torch_fidelity_module
from fastdiff.evaluation.image_sets import open_image_set
from fastdiff.images.listing import list_images
from fastdiff.runtime.machine import device_name, keep_compiled_code, use_free_cores
from fastdiff.runtime.processes import Processes, current
from fastdiff.runtime.script import run_script

BASE = "torch-fidelity"
"""The variant that ratios refer to."""


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] of the features of all images."""

    mean: np.ndarray
    covariance: np.ndarray


class Case(NamedTuple):
    """What all variants are given."""

    folder: Path
    weights: Path
    clean_fid_weights: Path | None
    batch_size: int
    processes: Processes


Work = Callable[[Path], Statistics | None]
"""work(folder) → the statistics of its images, None where none are computed. The network is ready."""


def ours(precision: str, compiled: bool = True) -> Callable[[Case], Work]:
    """What evaluate.py does with a reference; compiled on a GPU, as it is for 2,000 images or more."""

    def make(case: Case) -> Work:
        device = case.processes.device
        compile_it = compiled and device.type == "cuda"
        network = open_features(INCEPTION, str(case.weights), precision, device, compiled=compile_it)  # type: ignore[arg-type]

        def work(folder: Path) -> Statistics:
            images = open_image_set(str(folder), device=device)
            batches = images.batches(case.batch_size)
            wanted, size = Wanted(moments=("pool",)), min(case.batch_size, images.count)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the progress bar
                found = collect(
                    batches, network, wanted, case.processes, count=images.count, batch_size=size, what="reference"
                )
            moments = found.moments["pool"]
            return Statistics(moments.mean.numpy(), moments.covariance.numpy())

        return work

    return make


def torch_fidelity(case: Case) -> Work:
    """torch-fidelity's loop over a folder, with its workers, and its statistics."""
    utils, fid = torch_fidelity_module("utils"), torch_fidelity_module("metric_fid")
    cuda = case.processes.device.type == "cuda"
    settings = {"verbose": False, "feature_extractor_weights_path": str(case.weights)}
    extractor = utils.create_feature_extractor(INCEPTION, ["2048"], cuda=cuda, **settings)

    def work(folder: Path) -> Statistics:
        given = utils.make_input_descriptor_from_int(1, input1=str(folder))
        images = utils.prepare_input_from_descriptor(given, **settings)
        features = utils.get_featuresdict_from_dataset(images, extractor, case.batch_size, cuda, False, False)
        found = fid.fid_featuresdict_to_statistics(features, "2048")
        return Statistics(found["mu"], found["sigma"])

    return work


def clean_fid(case: Case) -> Work:
    """clean-fid's loop over a folder in its mode that resizes as TensorFlow does."""
    module = _clean_fid_module()
    if case.clean_fid_weights is None:
        raise UserError("its weights are missing: fetch inception-2015-12-05.pt and name it by --clean_fid_weights")
    if not case.clean_fid_weights.is_file():
        raise UserError(f"--clean_fid_weights: {case.clean_fid_weights} does not exist")
    device = case.processes.device
    base = torch.jit.load(str(case.clean_fid_weights)).eval().to(device)
    network = lambda x: base(x, return_features=True).view(len(x), -1)

    def work(folder: Path) -> Statistics:
        features = module.get_folder_features(
            str(folder),
            network,
            batch_size=case.batch_size,
            device=device,
            mode="legacy_tensorflow",
            verbose=False,
            num_workers=_workers(),
        )
        return Statistics(features.mean(axis=0), np.cov(features, rowvar=False))

    return work


def clean_fid_resize(case: Case) -> Work:
    """clean-fid's decoding and resizing of its mode clean, which is done on the CPU image by image."""
    _clean_fid_module()
    from cleanfid.utils import ResizeDataset
    from torch.utils.data import DataLoader

    def work(folder: Path) -> None:
        files = [str(path) for path in list_images(folder)]
        for _ in DataLoader(ResizeDataset(files, mode="clean"), batch_size=case.batch_size, num_workers=_workers()):
            pass

    return work


def _clean_fid_module() -> Any:
    prepare_torchvision()
    try:
        from cleanfid import fid
    except ImportError:
        raise UserError("clean-fid is not installed: pip install clean-fid") from None
    return fid


def _workers() -> int:
    """Worker processes of clean-fid: as many as torch-fidelity takes."""
    return min(4, 2 * (os.cpu_count() or 1))


VARIANTS: dict[str, Callable[[Case], Work]] = {
    BASE: torch_fidelity,
    "ours": ours("fp32"),
    "ours eager": ours("fp32", compiled=False),
    "ours bf16": ours("bf16"),
    "ours fp16": ours("fp16"),
    "clean-fid": clean_fid,
    "clean-fid resize": clean_fid_resize,
}
_GPU_ONLY = ("ours eager", "ours fp16")


def computes(variant: str, device: torch.device) -> str:
    """The arithmetic of a variant's convolutions: on a GPU PyTorch rounds factors to TF32, which ours turns off."""
    if variant.startswith("ours"):
        return variant.rpartition(" ")[2] if variant.endswith(("bf16", "fp16")) else "fp32"
    if variant == "clean-fid resize":
        return "–"
    return "tf32" if device.type == "cuda" else "fp32"


def error_of(found: Statistics, exact: Statistics) -> float:
    """The norm of the difference of the means, over that of the features' deviations."""
    return float(np.linalg.norm(found.mean - exact.mean) / np.trace(exact.covariance) ** 0.5)


def make_pictures(folder: Path, count: int, size: int) -> Path:
    """Write PNG files of smooth fields under grain, which are about as large as photographs of that size."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=float)
        pixels = field + generator.normal(0, 5, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"made_{number:05d}.png")
    return folder


def random_weights(path: Path) -> Path:
    """Write random weights of torch-fidelity's Inception network."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers.inception import write_random_weights

    return write_random_weights(path)


def measure(case: Case, variants: list[str], rounds: int, label: dict[str, Any], results: ResultFile) -> None:
    """Build the variants, run each over all files once a round, and add their rows."""
    count = len(list_images(case.folder))
    works: dict[str, Work] = {}
    errors: dict[str, float | None] = {}
    exact: Statistics | None = None
    for name in variants:
        with results.guard(label, name):
            work = VARIANTS[name](case)
            found = work(case.folder)  # the first run compiles
            exact = found if name == BASE else exact
            errors[name] = error_of(found, exact) if found and exact else None
            works[name] = work
            print(f"  {name} is ready", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize()
            begin = time.perf_counter()
            works[name](case.folder)
            synchronize()
            seconds[name].append(time.perf_counter() - begin)
    base = seconds.get(BASE)
    for name, taken in seconds.items():
        compared = base and name != "clean-fid resize"
        ratio = quartiles([b / s for b, s in zip(base, taken, strict=True)]) if compared else None
        rates = quartiles([count / s for s in taken])
        arithmetic = computes(name, case.processes.device)
        row = {**label, "variant": name, "computes": arithmetic, "images_per_second": rates}
        results.add({**row, "ratio": ratio, "error": errors[name], "seconds": taken})
        print(line_of(results.rows[-1]), flush=True)


def line_of(row: dict[str, Any]) -> str:
    low, middle, high = row["images_per_second"]
    ratio = "" if row["ratio"] is None else f"  {row['ratio'][1]:.2f} ({row['ratio'][0]:.2f} .. {row['ratio'][2]:.2f})"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    return f"  {row['variant']:18}{row['computes']:5}{middle:9.4g} images/s ({low:.4g} .. {high:.4g}){ratio}{error}"


def place(args: argparse.Namespace, device: torch.device, images: int, size: str) -> dict[str, Any]:
    """Device, versions, commit, date and command of the figures."""
    versions = {}
    for package in ("torch-fidelity", "torchvision", "clean-fid"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    given = "--quick" if args.quick else f"--images {args.images} --size {args.size} --rounds {args.rounds}"
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "versions": versions,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": date.today().isoformat(),
        "command": f"python benchmarks/bench_evaluate.py {given}",
        "images": images,
        "size": size,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "weights": "released" if args.feature_weights else "random",
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="a folder of PNGs of one size; without one, pictures are made up")
    parser.add_argument("--images", type=int, default=2048, help="pictures to make up (default: 2048)")
    parser.add_argument("--size", type=int, default=64, help="their pixels per side (default: 64)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU (default: the free cores)")
    parser.add_argument("--variants", default="", help=f"several of {', '.join(VARIANTS)} (default: all that run here)")
    parser.add_argument("--feature_weights", type=Path, help="torch-fidelity's weights of Inception")
    parser.add_argument("--clean_fid_weights", type=Path, help="inception-2015-12-05.pt")
    parser.add_argument("--quick", action="store_true", help="three rounds of 32 pictures in batches of 16, one thread")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.rounds, args.batch_size, args.threads = 32, 3, 16, 1
    for name in ("images", "size", "batch_size", "rounds"):
        if getattr(args, name) < 1 + (name == "images"):
            raise UserError(f"--{name} must be at least {1 + (name == 'images')}, not {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = current()
    gpu = processes.device.type == "cuda"
    if args.threads:
        torch.set_num_threads(args.threads)
    elif not gpu:
        use_free_cores()
    keep_compiled_code()
    warnings.filterwarnings("ignore", "This DataLoader will create")  # the peers' numbers of workers are kept
    usual = [name for name in VARIANTS if gpu or name not in _GPU_ONLY]
    variants = chosen(args.variants, list(VARIANTS), usual, "--variants")
    variants.sort(key=lambda name: name != BASE)  # the others are compared with it
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data_dir or make_pictures(Path(scratch) / "pictures", args.images, args.size)
        weights = args.feature_weights or random_weights(Path(scratch) / "random.pth")
        images = open_image_set(str(folder), device=processes.device)
        size = "x".join(map(str, images.shape))
        head = place(args, processes.device, images.count, size)
        results = ResultFile(args.json, head, resume=False)
        print(f"{head['device']}, torch {head['torch']}, {head['threads']} threads; {images.count} PNGs of {size}")
        case = Case(folder, weights, args.clean_fid_weights, args.batch_size, processes)
        measure(case, variants, args.rounds, {"size": size}, results)
    compared = [row for row in results.rows if row["ratio"] and row["variant"] != BASE]
    shown = [f"{row['variant']} {row['ratio'][1]:.2f}" for row in compared]
    print(f"ratios: {', '.join(shown) or 'none'} x {BASE}")
    results.end()


if __name__ == "__main__":
    run_script(main, "bench_evaluate.py")
