"""Predicts how fast a training step could be, from its operations and least traffic and the rates of a GPU.

    python benchmarks/roofline.py --config imagenet64_270M --gpu H200
    python benchmarks/roofline.py --config imagenet64_270M --gpu here --profile runs/NAME/profile/profile.json
    python benchmarks/roofline.py --config my.json --gpu A100 --batch 64 --json out.json

Each operation of `fastdiff/models/cost.py` takes, forward and again backward,

    max(run FLOPs / (matmul rate * convolution efficiency), bytes / (copy rate * copy efficiency))

and each kernel takes --launch_us more, once per batch ("launch gaps"; --launch_us 0 is a step of CUDA graphs). The
floor has both efficiencies at 1, the target has those given. On an H100 or H200 the target takes the time of norms,
attention, noising, losses and the update from --kernel_costs instead, which has a prediction for every launch of our
kernels in the steps of shipped configurations (`kernel_cost.py`). Our norms compute the residual sums and the last
layer, so that these are not counted again. For another batch the times are scaled; where the file has no such
configuration, the line below the table says that --copy_efficiency stands for our kernels.

MFU is a share of the datasheet's dense bf16 peak and counts the FLOPs of the network as improved-diffusion defines it.
Input, communication and the host's own time are assumed to be hidden. --gpu here measures both rates on this machine;
with precision fp32 the rates must be measured or given.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import kernel_cost
from fastdiff.config.load import load
from fastdiff.config.sections import Config, SuperResConfig
from fastdiff.errors import UserError, did_you_mean
from fastdiff.models import cost
from fastdiff.runtime.machine import GPUS, Rates, device_name, find, measure_rates
from fastdiff.runtime.script import run_script
from fastdiff.training.diagnostics.profile import CLASS_OF, FLOOR_CLASSES, GAPS, Share, classify
from fastdiff.training.diagnostics.profile import predict as predict_classes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KERNEL_COSTS = Path(__file__).with_name("results") / f"aot_cost_sm{kernel_cost.ARCH}.json"
MODELLED = [GPUS[name].name for name in ("H100", "H200")]
"""The GPUs whose multiprocessors `kernel_cost.py` describes."""


@dataclass(frozen=True)
class Machine:
    """The rates of a machine in FLOP/s and bytes/s; peak_flops is None where no datasheet is known."""

    name: str
    matmul_flops: float
    copy_bytes: float
    peak_flops: float | None


@dataclass(frozen=True)
class Prediction:
    """The predicted times of one training step of `batch` images on one GPU."""

    batch: int
    train_flops: float
    """Per image, of the network as improved-diffusion defines it."""
    shares: dict[str, Share]

    @property
    def ms(self) -> float:
        return sum(share.ms for share in self.shares.values())

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.ms

    def mfu(self, peak_flops: float) -> float:
        return self.train_flops * self.images_per_second / peak_flops


def predict(ops: Sequence[cost.Operation], batch: int, machine: Machine, **assumed: Any) -> Prediction:
    """Predict a step; `assumed` are the efficiencies and costs that `predict_classes` takes."""
    shares = predict_classes(ops, batch, Rates(machine.matmul_flops, machine.copy_bytes), **assumed)
    return Prediction(batch, 3 * sum(op.flops for op in ops), shares)


@dataclass(frozen=True)
class Kernels:
    """Our kernels' launches in a step, of the batch for which they were predicted."""

    rows: list[kernel_cost.Row]
    batch: int
    batch_asked: int

    def classes(self) -> dict[str, list[kernel_cost.Row]]:
        found: dict[str, list[kernel_cost.Row]] = {}
        for row in self.rows:
            found.setdefault(classify([f"_{row.kernel}"]), []).append(row)
        return found


def kernels_of(steps: dict[str, list[kernel_cost.Row]], config: str, batch: int, precision: str) -> Kernels | None:
    """Our kernels in a step, of the nearest batch that the file has; None if it has no step of the configuration."""
    names = {name: name.split() for name in steps}
    batches = {int(words[1]): name for name, words in names.items() if (words[0], words[2]) == (config, precision)}
    if not batches:
        return None
    nearest = min(batches, key=lambda each: abs(math.log(each / batch)))
    return Kernels(steps[batches[nearest]], nearest, batch)


def with_kernels(
    general: Prediction, ops: Sequence[cost.Operation], kernels: Kernels, machine: Machine, launch_us: float
) -> Prediction:
    """A prediction in which the times of our kernels replace those of their classes.

    Attention blocks for which the file has no launch, because flash attention takes them, keep their general share.
    """
    shares = dict(general.shares)
    launches = 0.0
    for name, rows in kernels.classes().items():
        if name not in shares:
            raise UserError(
                f"--kernel_costs has a kernel {rows[0].kernel}, which this version doesn't have; "
                "write the file again with benchmarks/aot.py --cost"
            )
        replaced = [op for op in ops if CLASS_OF[op.kind] == name]
        left = 0.0
        if name == "attention":
            own = sum(row.count for row in rows if row.kernel.startswith("forward"))
            left = max(0.0, 1 - own / len(replaced))
        scale = 1.0 if name == "optimiser" else kernels.batch_asked / kernels.batch
        costs = [(row.count, row.cost.scaled(scale)) for row in rows]
        seconds = sum(count * each.seconds(machine.copy_bytes) for count, each in costs)
        moved = sum(count * each.dram_bytes for count, each in costs) / kernels.batch_asked
        before = shares[name]
        shares[name] = Share(before.run_flops, moved + left * before.bytes, 1e3 * seconds + left * before.ms)
        launches += sum(row.count for row in rows) - (1 - left) * sum(sum(op.launches) for op in replaced)
        launches -= name == "optimiser"
    gaps = shares[GAPS]
    shares[GAPS] = Share(gaps.run_flops, gaps.bytes, gaps.ms + 1e-3 * launch_us * launches)
    return Prediction(general.batch, general.train_flops, shares)


def load_config(name: str) -> Config:
    """The settings in a file, or in configs/NAME.json. Raises UserError."""
    path = Path(name)
    if not path.is_file():
        path = CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS.glob("*.json"))
        hint = did_you_mean(name, known) or f"; configs/ has {', '.join(known)}"
        raise UserError(f"--config {name} is neither a file nor a name in configs/{hint}")
    try:
        kind = SuperResConfig if "large_size" in json.loads(path.read_text()).get("model", {}) else Config
    except (ValueError, AttributeError) as error:
        raise UserError(f"--config {path}: is not a JSON object with sections such as model ({error})") from None
    return load(["--config", str(path)], description="", sections=("model", "diffusion", "train"), kind=kind)[0]


def machine_for(
    gpu: str, precision: str = "bf16", matmul_tflops: float | None = None, copy_tbs: float | None = None
) -> Machine:
    """The GPU of that name, or "here"; rates that are given replace its own. Raises UserError."""
    given = matmul_tflops is not None and copy_tbs is not None
    if gpu == "here":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = device_name(device)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        rates = Rates(0, 0) if given else measure_rates(device, dtype=dtype)
        known = find(name)
        peak = known.peak_flops if known else None
    else:
        known = find(gpu)
        if known is None:
            raise UserError(f"--gpu {gpu} is not in the table; give one of {', '.join(GPUS)}, or here")
        if precision == "fp32" and matmul_tflops is None:
            raise UserError(f"--gpu {gpu}'s rates are for bf16 and fp16, not fp32; give --matmul_tflops, or --gpu here")
        name, rates, peak = known.name, Rates(known.matmul_flops, known.copy_bytes), known.peak_flops
    matmul = rates.matmul_flops if matmul_tflops is None else matmul_tflops * 1e12
    copy = rates.copy_bytes if copy_tbs is None else copy_tbs * 1e12
    return Machine(name, matmul, copy, peak)


def operations_of(settings: Config, precision: str) -> list[cost.Operation]:
    return cost.operations(settings.model, cost.SINGLE if precision == "fp32" else cost.HALF)


def optimiser_bytes_of(settings: Config, precision: str) -> int:
    return cost.optimiser_bytes(len(settings.train.ema_rate), half_copy=precision != "fp32")


def usual_batch(settings: Config) -> int:
    """The images that one GPU takes at once: the micro-batch, where the settings name one."""
    micro = settings.train.microbatch
    return min(micro, settings.train.batch_size) if isinstance(micro, int) and micro > 0 else settings.train.batch_size


def read_profile(path: Path) -> dict[str, Any]:
    """The profile that `train.py --profile` wrote: batch, step_ms, and ms per step by class. Raises UserError."""
    try:
        profile = json.loads(path.read_text())
        batch, classes = int(profile["batch"]), {str(k): float(v) for k, v in profile["classes"].items()}
        return {**profile, "batch": batch, "classes": classes, "step_ms": float(profile["step_ms"])}
    except OSError as error:
        raise UserError(
            f"--profile {path} can't be read ({error.strerror}); give what --profile of train.py wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--profile {path} is not what --profile of train.py writes (batch, step_ms and classes): "
            f"{type(error).__name__} {error}"
        ) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="of configs/, or any JSON file")
    parser.add_argument("--gpu", default="H200", help=f"{', '.join(GPUS)}, or here to measure (default: H200)")
    parser.add_argument("--matmul_tflops", type=float, metavar="X", help="rate of matrix products, TFLOP/s")
    parser.add_argument("--copy_tbs", type=float, metavar="Y", help="rate of a copy, read and written, TB/s")
    parser.add_argument("--batch", type=int, metavar="N", help="images per step on the GPU (default: the micro-batch)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="(default: the configuration's)")
    parser.add_argument("--conv_efficiency", type=float, default=0.8, help="of products in the target (default: 0.8)")
    parser.add_argument("--copy_efficiency", type=float, default=0.9, help="of copies in the target (default: 0.9)")
    parser.add_argument("--launch_us", type=float, default=2.0, help="between kernels (default: 2)")
    parser.add_argument(
        "--kernel_costs",
        type=Path,
        default=KERNEL_COSTS,
        metavar="FILE",
        help=f"predictions for our kernels, by aot.py --cost (default: {KERNEL_COSTS.name} in benchmarks/results)",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured times to set beside the target")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    for name in ("matmul_tflops", "copy_tbs", "batch"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, not {value:g}")
    for name in ("conv_efficiency", "copy_efficiency"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name} must be above 0 and at most 1, not {getattr(args, name):g}")
    if args.launch_us < 0:
        raise UserError(f"--launch_us must not be below 0, got {args.launch_us:g}")
    return args


def table(floor: Prediction, target: Prediction, measured: dict[str, Any] | None) -> list[str]:
    """The lines of the table: one for each class of work, then the whole step."""
    heads = [f"{'':18}{'GFLOP/image':>12}{'MB/image':>10}{'floor ms':>10}{'target ms':>11}"]
    if measured:
        heads = [heads[0] + f"{'measured ms':>13}{'x target':>10}"]
    names = list(FLOOR_CLASSES)
    names += [name for name in (measured or {"classes": {}})["classes"] if name not in names]
    lines = []
    for name in names:
        share, low = target.shares.get(name), floor.shares.get(name)
        if share and low:
            line = f"{name:18}{share.run_flops / 1e9:12.2f}{share.bytes / 1e6:10.1f}{low.ms:10.3f}{share.ms:11.3f}"
        else:
            line = f"{name:18}{'-':>12}{'-':>10}{'-':>10}{'-':>11}"
        if measured:
            line += _beside(measured["classes"].get(name), share.ms if share else 0.0)
        lines.append(line)
    shares = target.shares.values()
    flops, moved = sum(s.run_flops for s in shares), sum(s.bytes for s in shares)
    whole = f"{'step':18}{flops / 1e9:12.2f}{moved / 1e6:10.1f}{floor.ms:10.3f}{target.ms:11.3f}"
    return [*heads, *lines, whole + (_beside(measured["step_ms"], target.ms) if measured else "")]


def _beside(measured: float | None, predicted: float) -> str:
    ratio = "-" if not predicted or measured is None else f"{measured / predicted:.2f}"
    return f"{'-' if measured is None else format(measured, '.3f'):>13}{ratio:>10}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = load_config(args.config)
    precision = args.precision or settings.train.precision
    measured = read_profile(args.profile) if args.profile else None
    if measured and args.batch not in (None, measured["batch"]):
        raise UserError(f"--batch {args.batch} contradicts the {measured['batch']} images per step of {args.profile}")
    batch = measured["batch"] if measured else args.batch or usual_batch(settings)
    machine = machine_for(args.gpu, precision, args.matmul_tflops, args.copy_tbs)
    ops = operations_of(settings, precision)
    common: dict[str, Any] = {
        "launch_us": args.launch_us,
        "optimiser_bytes": optimiser_bytes_of(settings, precision),
    }
    floor = predict(ops, batch, machine, **common)
    assumed = {
        **common,
        "convolution_efficiency": args.conv_efficiency,
        "copy_efficiency": args.copy_efficiency,
    }
    target, note = refine(predict(ops, batch, machine, **assumed), ops, args, machine, precision, assumed)
    forward = sum(op.flops for op in ops)
    print(f"{args.config}: {cost.parameters(ops) / 1e6:.1f}M parameters, {forward / 1e9:.1f} GFLOP forward per image")
    print(
        f"{machine.name}: {machine.matmul_flops / 1e12:.4g} TFLOP/s, copies {machine.copy_bytes / 1e12:.3g} TB/s; ",
        end="",
    )
    print(f"batch {batch}, {precision}; floor and target are predictions")
    print("\n".join(table(floor, target, measured)))
    print(note)
    seen = 1e3 * batch / measured["step_ms"] if measured else None
    for name, rate in (("floor", floor.images_per_second), ("target", target.images_per_second), ("measured", seen)):
        if rate is None:
            continue
        shares = [f"{rate * 3 * forward / machine.matmul_flops:.1%} of the matmul rate"]
        if machine.peak_flops:
            shares.insert(0, f"MFU {rate * 3 * forward / machine.peak_flops:.1%}")
        print(f"{name:9}{rate:12.1f} images/s, {', '.join(shares)}")
    if args.json:
        figures = {
            "config": args.config,
            "precision": precision,
            "machine": asdict(machine),
            "parameters": cost.parameters(ops),
            "forward_flops": forward,
            "saved_bytes": cost.saved_bytes(ops),
            "efficiency": {"convolutions": args.conv_efficiency, "copies": args.copy_efficiency},
            **{name: _figures(p, machine) for name, p in (("floor", floor), ("target", target))},
            **({"measured": measured} if measured else {}),
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def refine(
    target: Prediction,
    ops: Sequence[cost.Operation],
    args: argparse.Namespace,
    machine: Machine,
    precision: str,
    assumed: dict[str, Any],
) -> tuple[Prediction, str]:
    """The target with the predictions for our kernels, and a line that says where they are from. Raises UserError.

    assumed  what `predict` took for the target
    """
    path = Path(args.config)
    config = path.stem if not path.is_file() or path.resolve().parent == CONFIGS else ""
    kernels = None
    if machine.name in MODELLED:
        kernels = kernels_of(kernel_cost.read(args.kernel_costs), config, target.batch, precision)
    if kernels is None:
        return target, f"target: our kernels move their bytes at {args.copy_efficiency:.0%} of the copy rate"
    ours = ", ".join(name for name in FLOOR_CLASSES if name in kernels.classes())
    scaled = "" if kernels.batch == target.batch else f", scaled from batch {kernels.batch}"
    computed = {"residual", *(("output conv",) if "norms" in kernels.classes() and precision != "fp32" else ())}
    rest = [op for op in ops if op.kind not in computed]
    general = replace(predict(rest, target.batch, machine, **assumed), train_flops=target.train_flops)
    made = with_kernels(general, rest, kernels, machine, args.launch_us)
    return made, f"target: {ours} as predicted from the machine code of our kernels{scaled}"


def _figures(prediction: Prediction, machine: Machine) -> dict[str, Any]:
    mfu = prediction.mfu(machine.peak_flops) if machine.peak_flops else None
    rate = {"ms": prediction.ms, "images_per_second": prediction.images_per_second, "mfu": mfu}
    return {**rate, "batch": prediction.batch, "classes": {n: asdict(s) for n, s in prediction.shares.items()}}


if __name__ == "__main__":
    run_script(main, "roofline.py")
