"""Predicts time, memory and cost of a training step on 1 to 1024 GPUs from one GPU's step.

    python benchmarks/scaling.py --config imagenet64_270M --gpu H200                     a predicted step
    python benchmarks/scaling.py --config imagenet64_270M --step_ms 131 --micro 128      a measured one
    python benchmarks/scaling.py --config imagenet64_270M --stages 1,3 --accumulation 4 --csv out.csv

The network has P parameters of w bytes each (2 in bf16 and fp16, 4 in fp32) and K averages. There are n GPUs in nodes
of l = 8, and a micro-batches (`accumulation`) per step. DeepSpeed 0.19 does this at each ZeRO stage, as the tests
observe:

stage    what is sent, as whole tensors per step          bytes per GPU between steps and, (…), in the backward pass
0        all-reduce w P                                   w P + 4 P [w < 4] + 8 P + 4 K P  (+ w P)
1        all-reduce w P, all-gather w P                   w P + (12 + 4 K) P / n           (+ w P + w P / n + buckets)
2        a times all-reduce w P, all-gather w P           w P + (12 + 4 K) P / n           (+ w P / n + buckets)
3        a times reduce-scatter w P, f a times           w P / n + w S + (12 + 4 K) P / n
         all-gather w (P - S) and once w S                                (+ w P / n + bucket + w (P - S) if f = 1)

The terms are weights, float32 master weights, two moments, averages, and gradients. Stages 1 and 2 reduce by all-reduce
and keep their part, which is DeepSpeed's default and sends 1.5 times as much as stage 0. Stage 3 never releases the S
parameters of tensors up to stage3_param_persistence_threshold (100,000), and gathers the others f = 1 times per
micro-batch where it keeps them from the forward to the backward pass, which it does while 2 P is within
stage3_max_reuse_distance (a billion elements), and else f = 2 times. A bucket is reduce_bucket_size times w, by the
trainer P / 3 elements and at most 100 million at stages 1 and 2, which have two of them in the backward pass, and 50
million at stage 3, which always has one. A 16-bit step makes float32 copies
of the gradients, 4 P (stage 0) or 4 P / n, when the activations are gone: the greater of both counts. Activations are
`cost.saved_bytes` per image of a micro-batch; workspaces and fragmentation come on top. A GPU alone sends nothing.

A ring of n sends (n - 1) / n of a tensor per GPU for a reduce-scatter or an all-gather, twice that for an all-reduce.
In nodes of l it is hierarchical: (l - 1) / l of the tensor at --intra_gbs, and (k - 1) / k of its l-th part between
the k = n / l nodes at --inter_gbs; and each message waits --latency_us for each doubling of the GPUs.

    step = a * micro + optimiser + exposed
    micro     = launches + (measured - optimiser - launches) * images / --micro, or the roofline's target
    optimiser = its bytes per parameter * P / copy rate, of P / n parameters from stage 1 on
    exposed   = what is sent, less --overlap of the part of it that is sent during the backward pass (2/3 of micro)

The rest of that part is the price of sharing the GPU: while messages are sent, other kernels are slower. What is sent
during the backward pass depends on the stage:

0        nothing: DeepSpeed reduces after the last backward pass
1, 2     a timeline. The network is compiled in four regions (`fastdiff.models.regions`), each of which returns its
         gradients at the end of its backward pass; their shares of the time are those of the roofline. A bucket that
         is full is sent after those before it, and the backward pass waits when it fills a second one before the first
         one is sent, since DeepSpeed has two. What is in the bucket at the end is sent after the backward pass, and so
         are the gathered weights. Stage 1 reduces in the last micro-batch only.
3        as many reductions as the backward pass has time for, and as many gathers as the micro-batch has left

The column "1 graph" is the exposed time if the network were compiled as one graph: at stages 1 and 2 all gradients
appear at the end of the backward pass, and everything is exposed. Slow nodes, shared networks and waiting for images
are not modelled. The file holds the model and the table that shows it, whose columns are the terms above, hence its
length.
"""

# This is one long file, because its formulas are those of the docstring, which --help prints beside the flags.

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import roofline
from fastdiff.config.sections import Config
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, cost
from fastdiff.models.regions import UNetRegions
from fastdiff.runtime.machine import GPUS, find
from fastdiff.runtime.script import run_script
from fastdiff.training.microbatch import bucket_size, overlaps

PERSISTENT = 100_000
"""DeepSpeed's stage3_param_persistence_threshold, elements of one tensor."""
REUSE = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance, elements."""
GATHERED = 500_000_000
"""DeepSpeed's allgather_bucket_size, elements that stages 1 and 2 gather at once."""
USD_PER_HOUR = 3.0
"""The price of one GPU, an assumption; prices differ by a factor of three."""


@dataclass(frozen=True)
class Size:
    """Counts of a network's parameters, of those in tensors that stage 3 keeps whole, and of its tensors."""

    parameters: int
    persistent: int
    tensors: int
    reuse_distance: int = REUSE

    @property
    def kept(self) -> bool:
        """Whether stage 3 keeps gathered weights for the backward pass."""
        return 2 * self.parameters <= self.reuse_distance


@dataclass(frozen=True)
class Region:
    """A part of the network that returns its gradients at once: its share of the backward pass, and its parameters."""

    share: float
    parameters: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. Those from `gathered` on are only allocated during a part of the step."""

    weights: float
    masters: float
    moments: float
    averages: float
    gradients: float
    gathered: float
    buckets: float
    step_copies: float
    activations: float

    @property
    def peak(self) -> float:
        lasting = self.weights + self.masters + self.moments + self.averages + self.gradients
        return lasting + max(self.activations + self.gathered + self.buckets, self.step_copies)


@dataclass(frozen=True)
class Messages:
    """Bytes of whole tensors per optimiser step, by collective."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU of one ring sends."""
        return (2 * self.all_reduce + self.reduce_scatter + self.all_gather) * (gpus - 1) / gpus


@dataclass(frozen=True)
class Links:
    """Bytes per second and direction of one GPU: within its node, and between nodes."""

    intra: float
    inter: float
    latency: float = 0.0
    """Seconds for each doubling of the GPUs, per message."""
    node: int = 8

    def seconds(self, gathered: float, gpus: int, messages: float = 1) -> float:
        """Time of a reduce-scatter or an all-gather of `gathered` bytes over all GPUs; an all-reduce is both."""
        local = min(gpus, self.node)
        nodes = gpus / local
        within, between = gathered * (local - 1) / local, gathered / local * (nodes - 1) / nodes
        return within / self.intra + between / self.inter + messages * self.latency * math.log2(gpus)


@dataclass(frozen=True)
class Row:
    """One line of the table: times in ms per optimiser step, memory in GB of 10^9 bytes on each GPU."""

    gpus: int
    stage: int
    batch: int
    micro: int
    accumulation: int
    compute_ms: float
    optimiser_ms: float
    sent_mb: float
    communication_ms: float
    exposed_ms: float
    one_graph_ms: float
    """Exposed time if the network were compiled as one graph."""
    step_ms: float
    images_per_second: float
    efficiency: float
    """Images per second and GPU, over those of one GPU with the same micro-batch and no optimiser's share."""
    memory_gb: float
    fits: bool
    usd_per_step: float
    usd_per_million_images: float


def size_of(settings: BackboneSettings, persistent: int = PERSISTENT, reuse_distance: int = REUSE) -> Size:
    counts = [p.numel() for p in cost.on_meta(settings).parameters()]
    return Size(sum(counts), sum(count for count in counts if count <= persistent), len(counts), reuse_distance)


def memory(
    size: Size,
    stage: int,
    gpus: int,
    *,
    weight_bytes: int = 2,
    averages: int = 1,
    activations: float = 0.0,
    bucket: int = 0,
) -> Memory:
    """Memory of one GPU, by the module's table. A bucket of 0 elements stands for the trainer's."""
    P, w = size.parameters, weight_bytes
    buckets = (bucket or bucket_size(stage, gpus, P)) * (2 if overlaps(stage, gpus) else 1)
    share = P / gpus if stage else P
    weights = w * P if stage < 3 else w * (P / gpus + size.persistent)
    masters = 4 * share if stage or w < 4 else 0.0
    gradients = w * {0: P, 1: P + share, 2: share, 3: share}[stage]
    copies = 4 * share if w < 4 else 0.0
    return Memory(
        weights=weights,
        masters=masters,
        moments=8 * share,
        averages=4 * averages * share,
        gradients=gradients,
        gathered=w * (P - size.persistent) if stage == 3 and size.kept else 0.0,
        buckets=w * buckets if stage else 0.0,
        step_copies=copies,
        activations=activations,
    )


def messages(size: Size, stage: int, accumulation: int, *, weight_bytes: int = 2) -> Messages:
    """Messages of one optimiser step on several GPUs, by the module's table."""
    whole = float(weight_bytes * size.parameters)
    if stage == 0:
        return Messages(all_reduce=whole)
    if stage < 3:
        return Messages(all_reduce=whole * (accumulation if stage == 2 else 1), all_gather=whole)
    kept, times = float(weight_bytes * size.persistent), 1 if size.kept else 2
    return Messages(reduce_scatter=whole * accumulation, all_gather=times * accumulation * (whole - kept) + kept)


@dataclass(frozen=True)
class Step:
    """One GPU's time: seconds of a micro-batch by its images, and of the optimiser over all parameters."""

    launches: float
    per_image: float
    optimiser: float

    def micro(self, images: int) -> float:
        return self.launches + self.per_image * images


def regions_of(settings: Config, precision: str, micro: int, machine: roofline.Machine) -> list[Region]:
    """The regions in which the trainer compiles this network, in the order of the backward pass."""
    network = cost.on_meta(settings.model)
    regions = UNetRegions(network)

    def number(name: str) -> int:
        """The region of an operation or a parameter, in the order of the forward pass."""
        part, *rest = name.split(".")
        if part == "input_blocks":
            return int(int(rest[0]) >= len(regions.upper_inputs))
        if part == "output_blocks":
            return 2 + int(int(rest[0]) >= len(regions.lower_outputs))
        return {"middle_block": 1, "out": 3}.get(part, 0)

    seconds, counts = [0.0] * 4, [0] * 4
    for i in range(4):
        ops = [op for op in roofline.operations_of(settings, precision) if number(op.name) == i]
        made = roofline.predict(ops, micro, machine, convolution_efficiency=0.8, copy_efficiency=0.9)
        seconds[i] = sum(share.ms for name, share in made.shares.items() if name != "optimiser")
    for name, parameter in network.named_parameters():
        counts[number(name)] += parameter.numel()
    return [Region(s / sum(seconds), count) for s, count in zip(seconds, counts, strict=True)][::-1]


def measured_step(step_ms: float, micro: int, optimiser: float, launches: float) -> Step:
    """The step from a measured one of one micro-batch, less the predicted optimiser and launches."""
    rest = step_ms / 1e3 - optimiser - launches
    if rest <= 0:
        raise UserError(
            f"--step_ms {step_ms:g} is below what the optimiser and the launches alone are predicted to take "
            f"({1e3 * (optimiser + launches):.2f} ms); give the milliseconds of a whole step"
        )
    return Step(launches, rest / micro, optimiser)


def predicted_step(ops: Sequence[cost.Operation], machine: roofline.Machine, micro: int, optimiser_bytes: int) -> Step:
    """The roofline's target: 80% of the matmul rate, 90% of the copy rate."""
    made = roofline.predict(
        ops, micro, machine, convolution_efficiency=0.8, copy_efficiency=0.9, optimiser_bytes=optimiser_bytes
    )
    launches, optimiser = (made.shares[name].ms / 1e3 for name in ("launch gaps", "optimiser"))
    return Step(launches, (made.ms / 1e3 - launches - optimiser) / micro, optimiser)


def communication(
    size: Size, stage: int, accumulation: int, gpus: int, links: Links, weight_bytes: int, bucket: int
) -> tuple[float, float]:
    """Seconds of all reductions and of all gathers of one step, without any overlap."""
    if gpus == 1:
        return 0.0, 0.0
    sent = messages(size, stage, accumulation, weight_bytes=weight_bytes)
    times = accumulation if stage > 1 else 1
    halves = 2 if sent.all_reduce else 1
    reductions = halves * times * math.ceil(size.parameters / bucket)
    reducing = links.seconds(halves * sent.all_reduce + sent.reduce_scatter, gpus, reductions)
    if stage == 3:
        gathers = (1 if size.kept else 2) * accumulation * size.tensors
    else:
        gathers = math.ceil(size.parameters / GATHERED)
    return reducing, links.seconds(sent.all_gather, gpus, gathers) if stage else 0.0


def below_backward(regions: Sequence[Region], backward: float, bucket: int, reducing: float) -> float:
    """Seconds of the reductions of one backward pass that take place during it, by the module's timeline.

    regions   in the order of the backward pass
    backward  seconds of the backward pass alone
    bucket    elements
    reducing  seconds of the reductions of all parameters
    """
    per_element = reducing / sum(region.parameters for region in regions)
    now = free = 0.0  # when the backward pass and the last reduction so far end
    filled = 0
    for region in regions:
        now += region.share * backward
        filled += region.parameters
        while filled > bucket:
            now = max(now, free)
            free = now + bucket * per_element
            filled -= bucket
    end = max(now, free) + filled * per_element
    return reducing - (end - backward)


def row(
    size: Size,
    step: Step,
    stage: int,
    gpus: int,
    micro: int,
    accumulation: int,
    links: Links,
    *,
    weight_bytes: int = 2,
    averages: int = 1,
    saved: float = 0.0,
    overlap: float = 0.5,
    gpu_memory: float = math.inf,
    usd_per_hour: float = USD_PER_HOUR,
    bucket: int = 0,
    regions: Sequence[Region] = (),
) -> Row:
    """One line of the table.

    saved    Bytes of activations per image.
    bucket   Elements; 0 stands for the trainer's.
    regions  In the order of the backward pass; none stands for one graph.
    """
    batch = micro * accumulation * gpus
    compute = accumulation * step.micro(micro)
    optimiser = step.optimiser / (gpus if stage else 1)
    bucket = bucket or bucket_size(stage, gpus, size.parameters)
    reducing, gathering = communication(size, stage, accumulation, gpus, links, weight_bytes, bucket)
    backward = 2 / 3 * step.micro(micro)
    below = 0.0
    if stage == 3:
        below = min(reducing, accumulation * backward)
        below += min(gathering, compute - below)
    elif stage and regions:
        times = accumulation if stage == 2 else 1
        below = times * below_backward(regions, backward, bucket, reducing / times)
    exposed = reducing + gathering - overlap * below
    seconds = compute + optimiser + exposed
    needed = memory(
        size, stage, gpus, weight_bytes=weight_bytes, averages=averages, activations=saved * micro, bucket=bucket
    ).peak
    usd = usd_per_hour / 3600 * gpus * seconds
    sent = messages(size, stage, accumulation, weight_bytes=weight_bytes).sent(gpus)
    return Row(
        gpus=gpus,
        stage=stage,
        batch=batch,
        micro=micro,
        accumulation=accumulation,
        compute_ms=1e3 * compute,
        optimiser_ms=1e3 * optimiser,
        sent_mb=sent / 1e6,
        communication_ms=1e3 * (reducing + gathering),
        exposed_ms=1e3 * exposed,
        one_graph_ms=1e3 * (exposed if stage == 3 else reducing + gathering),
        step_ms=1e3 * seconds,
        images_per_second=batch / seconds,
        efficiency=batch / seconds / gpus * step.micro(micro) / micro,
        memory_gb=needed / 1e9,
        fits=needed <= gpu_memory,
        usd_per_step=usd,
        usd_per_million_images=usd / batch * 1e6,
    )


def shares(gpus: Sequence[int], batch: int, micro: int, accumulation: int | None) -> Iterator[tuple[int, int, int]]:
    """(GPUs, micro-batch, accumulation) for each number of GPUs that can share the batch evenly.

    With `accumulation` the batch grows with the GPUs instead. As `training.step_plan.split_batch`: equal micro-batches.
    """
    for n in gpus:
        if accumulation:
            yield n, micro, accumulation
        elif batch % n == 0:
            share = batch // n
            images = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
            yield n, images, share // images


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="of configs/, or any JSON file")
    parser.add_argument("--gpu", default="H200", help=f"{', '.join(GPUS)} (default: H200)")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="(default: bf16)")
    parser.add_argument("--step_ms", type=float, help="one GPU's measured step of one micro-batch; else predicted")
    parser.add_argument("--micro", type=int, metavar="N", help="images of a micro-batch (default: the configuration's)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="over all GPUs (default: the configuration's)")
    parser.add_argument("--accumulation", type=int, metavar="A", help="fixed; then the batch grows with the GPUs")
    parser.add_argument("--gpus", default="1,2,4,8,16,32,64,128,256,512,1024", help="(default: 1 to 1024 by doubling)")
    parser.add_argument("--stages", default="0,1,2,3", help="of ZeRO (default: 0,1,2,3)")
    parser.add_argument("--intra_gbs", type=float, default=450, help="GB/s per GPU in a node (default: 450, NVLink 4)")
    parser.add_argument(
        "--inter_gbs", type=float, default=50, help="GB/s per GPU between nodes (default: 50, 400 Gb/s)"
    )
    parser.add_argument("--latency_us", type=float, default=5, help="per message and doubling (default: 5, assumed)")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of what is sent beside kernels that is free (default: 0.5)"
    )
    parser.add_argument("--bucket", type=int, help="reduce_bucket_size, in elements (default: the trainer's)")
    parser.add_argument(
        "--usd_per_hour", type=float, default=USD_PER_HOUR, help=f"of a GPU (default: {USD_PER_HOUR:g}, an assumption)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args(argv)
    for name in ("step_ms", "micro", "batch_size", "accumulation", "intra_gbs", "inter_gbs", "bucket"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, not {value:g}")
    if args.accumulation and args.batch_size:
        raise UserError("--accumulation makes the batch grow with the GPUs, --batch_size fixes it; give one of them")
    if not 0 <= args.overlap <= 1:
        raise UserError(f"--overlap is a share between 0 and 1, not {args.overlap:g}")
    for name in ("latency_us", "usd_per_hour"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must not be below 0, got {getattr(args, name):g}")
    args.gpus, args.stages = (
        _numbers(args.gpus, "--gpus", range(1, 1 << 20)),
        _numbers(args.stages, "--stages", range(4)),
    )
    return args


def _numbers(text: str, flag: str, allowed: range) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) in allowed for part in parts):
        raise UserError(f"{flag} must be whole numbers from {allowed[0]} to {allowed[-1]} such as 1,2, not {text!r}")
    return [int(part) for part in parts]


def rows(args: argparse.Namespace) -> tuple[list[Row], str]:
    """The rows of the table, and a line that says what they are based on."""
    settings = roofline.load_config(args.config)
    gpu = find(args.gpu)
    if gpu is None:
        raise UserError(f"--gpu {args.gpu} is not in the table; give one of {', '.join(GPUS)}")
    machine = roofline.machine_for(args.gpu, args.precision)
    micro = args.micro or roofline.usual_batch(settings)
    ops, size = roofline.operations_of(settings, args.precision), size_of(settings.model)
    step = predicted_step(ops, machine, micro, roofline.optimiser_bytes_of(settings, args.precision))
    source = "a predicted step"
    if args.step_ms:
        step = measured_step(args.step_ms, micro, step.optimiser, step.launches)
        source = f"a measured step of {args.step_ms:g} ms"
    batch = args.batch_size or settings.train.batch_size
    regions = regions_of(settings, args.precision, micro, machine)
    links = Links(args.intra_gbs * 1e9, args.inter_gbs * 1e9, args.latency_us * 1e-6)
    made = [
        row(
            size,
            step,
            stage,
            n,
            images,
            times,
            links,
            averages=len(settings.train.ema_rate),
            saved=cost.saved_bytes(ops),
            overlap=args.overlap,
            gpu_memory=gpu.memory,
            usd_per_hour=args.usd_per_hour,
            bucket=args.bucket or 0,
            regions=regions,
        )
        for n, images, times in shares(args.gpus, batch, micro, args.accumulation)
        for stage in args.stages
    ]
    if not made:
        raise UserError(f"--batch_size {batch} can't be shared evenly by any of --gpus; {args.gpus[0]} must divide it")
    return made, f"{gpu.name}, {args.precision}, {source} of {micro} images on one GPU; all of this is a prediction"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    made, basis = rows(args)
    print(f"{args.config}: {basis}")
    print(
        f"links {args.intra_gbs:g} and {args.inter_gbs:g} GB/s per GPU, overlap {args.overlap:g}, "
        f"${args.usd_per_hour:g} per GPU and hour (an assumption)"
    )
    print(
        f"{'GPUs':>5}{'ZeRO':>5}{'batch':>8}{'micro':>12}{'step ms':>10}{'exposed':>9}{'1 graph':>9}{'sent MB':>9}"
        f"{'images/s':>10}{'eff.':>6}{'GB':>8}{'$/step':>10}{'$/M images':>12}"
    )
    for r in made:
        shared = f"{r.accumulation} x {r.micro}"
        print(
            f"{r.gpus:5}{r.stage:5}{r.batch:8}{shared:>12}{r.step_ms:10.2f}{r.exposed_ms:9.2f}{r.one_graph_ms:9.2f}{r.sent_mb:9.0f}"
            f"{r.images_per_second:10.0f}{r.efficiency:6.0%}{r.memory_gb:7.1f}{' ' if r.fits else '!'}"
            f"{r.usd_per_step:10.5f}{r.usd_per_million_images:12.2f}"
        )
    if not all(r.fits for r in made):
        print("! more than the GPU's memory")
    if args.json:
        setup: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("json", "csv")}
        args.json.write_text(
            json.dumps({"basis": basis, "setup": setup, "rows": [asdict(r) for r in made]}, indent=2) + "\n"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(r) for r in made)


if __name__ == "__main__":
    run_script(main, "scaling.py")
