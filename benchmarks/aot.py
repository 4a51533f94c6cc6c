"""Compiles all kernels that the shipped configurations launch, for GPUs not in this machine, and checks the code.

    python benchmarks/aot.py                                     all configurations, for sm_80, sm_90 and sm_100
    python benchmarks/aot.py --configs cifar10_uncond --archs 90
    PYTHONPATH=.triton-3.6.0 python benchmarks/aot.py            with the oldest Triton that is supported

Each configuration takes a training step and a few sampling steps on tensors without memory, at the batch sizes of the
benchmarks; what its ops would launch is compiled and the machine code read. Exit code 1 when a launch does not compile
or breaks a rule: at most one value spilled (not counting those that it uses once per part of a map), at most 255
registers, shared memory within the GPU's limit, 128-bit loads and stores where a kernel moves maps, tensor-core
instructions where it multiplies matrices.

For sm_90 the cost of every launch at every shape is predicted from its machine code (`kernel_cost.py`) and printed
below its code: instructions of a thread per valid element, resident warps and bytes in flight per multiprocessor, DRAM
bytes over least bytes, microseconds on an H100, and the share of an H100's copy bandwidth. --cost FILE writes those of
training steps, from which `roofline.py` predicts steps. A launch whose loops can't be counted breaks a rule, too.

Launches of the kernels' tests, which are small and odd, must compile and fit on the GPU. The tests write them:

    python -m pytest tests/kernels --ignore=tests/kernels/test_aot.py --launches launches.jsonl
    python benchmarks/aot.py --launches launches.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from fastdiff.kernels import aot, launch
from fastdiff.kernels.aot import Compiled
from fastdiff.kernels.launch import Launch

from benchmarks import kernel_cost
from benchmarks.bench_train import CONFIGS, chosen
from benchmarks.flag_types import at_least, existing_file
from benchmarks.kernel_cost import Cost
from benchmarks.machine_code import Code
from benchmarks.python_source import Unknown
from fastdiff import ops
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.diffusion import create_diffusion
from fastdiff.diffusion.solvers import solver_table
from fastdiff.errors import UserError
from fastdiff.runtime.script import run_script
from fastdiff.sampling.engine import sampling_launches
from fastdiff.training.diagnostics.profile import classify
from fastdiff.training.step_plan import split_batch, training_launches

# Batch sizes of the benchmarks; other configurations train at their own size and draw 16 images at once.
TRAINED = {"cifar10_uncond": (128, 256)}
DRAWN = {"imagenet64_270M": (256, 16, 1), "cifar10_uncond": (512, 16)}
PRECISIONS = {"imagenet64_270M": (torch.bfloat16, torch.float16)}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SOLVERS = ("ddpm", "dpmpp_3m")

# Kernels that move maps or flat buffers, and which of their accesses, loads (l) or stores (s), must be 128 bits wide.
# The kernels that are absent handle a few numbers per image, or maps of three channels.
BULK = {
    "norm_forward": "ls",
    "norm_backward": "ls",
    "forward_short": "ls",
    "forward_long": "ls",
    "backward_whole": "ls",
    "backward_short": "ls",
    "backward_long": "ls",
    "output_moments": "ls",
    "output_products": "ls",
    "output_patches": "s",
    "output_backward_sums": "l",
    "output_gradient": "ls",
    "adamw_ema": "ls",
    "squares": "l",
}
# Loads and stores of local memory that a launch may have: the assembler stores one value and reads it once where that
# lets another block onto a multiprocessor. Those that a kernel makes once for each part of a map (`Code.spills`) may be
# this share of its instructions.
FEW_SPILLS, RARE_SPILLS = 2, 0.02
MATMUL = {name for name in BULK if name.endswith(("_short", "_long", "_whole"))}
MATMUL |= {"output_products", "output_backward_sums", "output_gradient"}


Step = tuple[str, Launch]
"""The name of a training step (`kernel_cost.step_name`), or an empty one, and a launch in it."""


def recorded(name: str) -> Iterator[Step]:
    """Launches of a configuration's training and sampling steps."""
    content = json.loads((CONFIGS / f"{name}.json").read_text())
    classifies = "classifier_depth" in content["model"]
    kind = ClassifierConfig if classifies else SuperResConfig if "large_size" in content["model"] else Config
    config = kind.model_validate(content)
    given, model = (config.model, config.diffusion), config.model
    for precision in PRECISIONS.get(name, (torch.bfloat16,)):
        for batch in TRAINED.get(name, (split_batch(config.train, 1),)):
            step = kernel_cost.step_name(name, batch, NAMES[precision])
            for one in training_launches(*given, batch, precision, rates=config.train.ema_rate):
                yield step if _expected(one) else "", one
    if classifies:
        return
    process = create_diffusion(config.diffusion, model.learn_sigma)
    for batch in DRAWN.get(name, (16,)):
        for solver in SOLVERS:
            for one in sampling_launches(model, process, solver_table(process, solver), batch, torch.bfloat16):
                yield "", one


def _expected(one: Launch) -> bool:
    """Whether a step launches this on a GPU that has no measured choices: PyTorch computes some sizes of attention."""
    given = one.named()
    return classify([one.kernel.__name__]) != "attention" or ops.expected_way(given["L"], given["D"]) == "ours"


def optional() -> Iterator[Step]:
    """Launches that no configuration chooses: updates through DeepSpeed's engine."""
    with launch.record() as found:
        for name, args in optimiser_calls():
            launch.IMPLEMENTATIONS[name](*args)
    for one in found:
        yield "", one


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def optimiser_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """AdamW over one flat buffer with one and with two averages, and the norm of its gradient."""
    flat, scalar = _meta(55_000_000, dtype=torch.float32), _meta(dtype=torch.float32)
    for rates in ([0.9999], [0.9999, 0.999]):
        numbers = (rates, 1e-4, 0.9, 0.999, 1e-8, 0.0, None, None, len(rates) == 1)
        lists = ([flat], [flat], [flat], [flat], [flat] * len(rates), [], [scalar])
        yield "adamw_ema_", (*lists, *numbers)
    yield "squared_norm", ([flat],)


def _multiplies(made: Compiled) -> bool:
    """Whether the products run on tensor cores; with 32 rows or fewer HMMA will do, as padding costs more."""
    length = re.search(r"\bL=(\d+)", made.variant)
    few = length is not None and int(length[1]) <= 32
    return aot.MATMUL[made.arch] in made.matmuls or (few and "HMMA" in made.matmuls)


def broken_rules(made: Compiled, code: Code | None) -> list[str]:
    """The rules that a compiled launch breaks; empty if it breaks none. No code: it need not be fast."""
    wrong = []
    if made.registers > 255:
        wrong.append(f"{made.registers} registers")
    if made.shared > aot.SHARED_LIMIT[made.arch]:
        wrong.append(f"{made.shared} bytes of shared memory")
    if not code:
        return wrong
    if code.spills() > FEW_SPILLS or made.spills > RARE_SPILLS * len(code.instructions):
        wrong.append(f"{made.spills} spills")
    bulk = BULK.get(made.kernel, "")
    if "l" in bulk and not made.wide_loads():
        wrong.append("no 128-bit loads")
    if "s" in bulk and not made.wide_stores():
        wrong.append("no 128-bit stores")
    if made.kernel in MATMUL and not _multiplies(made):
        wrong.append(f"no {aot.MATMUL[made.arch]}")
    return wrong


def row(made: Compiled, wrong: list[str]) -> str:
    """One line of the table."""
    widths = lambda counts: " ".join(f"{n}x{bits}" for bits, n in counts.items())
    core = " ".join(f"{n}x{name}" for name, n in {**made.matmuls, **made.others}.items())
    verdict = "; ".join(wrong) or "ok"
    return (
        f"sm_{made.arch:<4}{made.kernel:26}{made.registers:5}{made.spills:4}{made.shared:8}{made.warps:4}  "
        f"{widths(made.loads):26}{widths(made.stores):18}{core:28} {verdict:12}  {made.variant}"
    )


class Job(NamedTuple):
    """Launches that compile to the same code, at all their shapes, to compile for a GPU."""

    launches: list[Launch]
    arch: int
    must_be_fast: bool


class Result(NamedTuple):
    """The code of a job's launches, the cost of each, and the rules that are broken, missing costs among them."""

    made: Compiled
    costs: list[Cost]
    wrong: list[str]


_jobs: list[Job] = []  # forked processes see it; kernels can't be sent to them


def compile_job(i: int) -> Result:
    job = _jobs[i]
    made, text = aot.inspect_launch(job.launches[0], job.arch)
    code = Code(text, job.launches[0].kernel.fn) if job.must_be_fast else None
    costs, wrong = [], broken_rules(made, code)
    if code and job.arch == kernel_cost.ARCH:
        try:
            for one in job.launches:
                costs.append(kernel_cost.predict(kernel_cost.counts_of(code, one, made.registers, made.shared)))
        except Unknown as error:
            costs = []
            wrong.append(f"cost unknown: {error}")
    return Result(made, costs, wrong)


def results_of(jobs: list[Job], processes: int) -> Iterator[Future[Result]]:
    """Compile the jobs in forked processes, and yield their results in the jobs' order."""
    _jobs[:] = jobs
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        yield from [pool.submit(compile_job, i) for i in range(len(jobs))]


def outcome(job: Job, future: Future[Result]) -> dict[str, Any]:
    """Print the rows of the table that a job gives, and return its values."""
    try:
        made, costs, wrong = future.result()
    except Exception as error:  # the compiler's, of any kind; BrokenProcessPool where it crashed
        wrong = [f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"]
        failed = {"kernel": name_of(job.launches[0]), "variant": aot.variant(job.launches[0]), "costs": []}
        print(f"sm_{job.arch:<4}{failed['kernel']:26}{wrong[0]}  {failed['variant']}", flush=True)
        return {**failed, "arch": job.arch, "wrong": wrong}
    shapes = [kernel_cost.shape_of(one) for one in job.launches[: len(costs)]]
    lines = [kernel_cost.line(shape, cost) for shape, cost in zip(shapes, costs, strict=True)]
    print("\n".join([row(made, wrong), *dict.fromkeys(lines)]), flush=True)
    return {
        **asdict(made),
        "costs": [{"shape": s, **asdict(c)} for s, c in zip(shapes, costs, strict=True)],
        "wrong": wrong,
    }


def name_of(one: Launch) -> str:
    return str(one.kernel.__name__.lstrip("_"))


def selected(launches: Iterable[Launch], kernels: list[str], each: int) -> list[list[Launch]]:
    """Launches by their code, each shape once; of each kernel at most `each` codes (0: all), evenly chosen."""
    by_kernel: dict[str, dict[Any, dict[Any, Launch]]] = {}
    for one in launches:
        shapes = by_kernel.setdefault(name_of(one), {}).setdefault(aot.code_key(one), {})
        shapes.setdefault(kernel_cost.work_key(one), one)
    found = []
    for name, codes in by_kernel.items():
        some = [list(shapes.values()) for shapes in codes.values()]
        if name in kernels:
            step = (len(some) - 1) / (each - 1) if 1 < each < len(some) else 1
            found += some if not each else [some[round(i * step)] for i in range(min(each, len(some)))]
    return found


def steps_of(fast: list[Step], results: dict[Any, Cost]) -> dict[str, list[kernel_cost.Row]]:
    """The rows of each training step; `results` has the cost of a launch by its code and its work."""
    counts: dict[str, dict[Any, int]] = {}
    launches: dict[Any, Launch] = {}
    for step, one in fast:
        key = (aot.code_key(one), kernel_cost.work_key(one))
        if step:
            counts.setdefault(step, {}).setdefault(key, 0)
            counts[step][key] += 1
            launches[key] = one
    return {
        step: [
            kernel_cost.Row(name_of(launches[key]), kernel_cost.shape_of(launches[key]), count, results[key])
            for key, count in by_key.items()
        ]
        for step, by_key in counts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="all", help="names of configurations (default: all)")
    parser.add_argument("--archs", default="all", help="compute capabilities times ten (default: all that are known)")
    parser.add_argument("--kernels", default="all", help="names of kernels (default: all)")
    parser.add_argument("--training", action="store_true", help="leave out what is not a training step's")
    parser.add_argument("--each", type=at_least(0), default=0, metavar="N", help="at most N launches of each kernel")
    parser.add_argument("--launches", type=existing_file, help="a file of tests' launches to compile as well")
    parser.add_argument("--processes", type=at_least(1), default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--cost", type=Path, help="write the predictions for training steps on sm_90 here")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET=1 replaces the kernels, which are to be compiled; unset it")
    known = sorted(map(str, aot.SHARED_LIMIT), key=int)
    archs = [int(arch) for arch in chosen(args.archs, known, known, "--archs")]
    if args.cost and (kernel_cost.ARCH not in archs or args.each or args.kernels != "all"):
        raise UserError(f"--cost needs all kernels for sm_{kernel_cost.ARCH}; leave out --each and --kernels")
    names = chosen(args.configs, sorted(path.stem for path in CONFIGS.glob("*.json")), [], "--configs")
    steps = [*(step for name in names for step in recorded(name)), *optional()]
    steps = [step for step in steps if step[0] or not args.training]
    kernels = sorted({name_of(one) for _, one in steps})
    groups = selected((one for _, one in steps), chosen(args.kernels, kernels, kernels, "--kernels"), args.each)
    fast = [group[0] for group in groups]
    tests = [aot.from_json(line) for line in args.launches.read_text().splitlines()] if args.launches else []
    tests = aot.unique([*fast, *tests])[len(fast) :]
    print(
        f"Triton {triton.__version__}: {len(fast)} compilations"
        f"{f' and {len(tests)} of tests' if tests else ''} for each of {', '.join(f'sm_{arch}' for arch in archs)}",
        flush=True,
    )
    print(
        f"{'GPU':7}{'kernel':26}{'regs':>5}{'spl':>4}{'shared':>8}{'wrp':>4}  {'loads x bits':26}{'stores x bits':18}"
    )
    jobs = [Job(group, arch, True) for group in groups for arch in archs]
    jobs += [Job([one], arch, False) for one in tests for arch in archs]
    futures: list[Future[Result]] = []
    table = []
    for job, future in zip(jobs, results_of(jobs, args.processes), strict=True):
        futures.append(future)
        table.append(outcome(job, future))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    if args.cost:
        predicted = [i for i, job in enumerate(jobs) if job.must_be_fast and job.arch == kernel_cost.ARCH]
        if all(table[i]["costs"] for i in predicted):
            costs = {
                (aot.code_key(one), kernel_cost.work_key(one)): cost
                for i in predicted
                for one, cost in zip(jobs[i].launches, futures[i].result().costs, strict=True)
            }
            kernel_cost.write(args.cost, triton.__version__, steps_of(steps, costs))
        else:
            print(f"{args.cost} is not written, because costs are missing")
    broken = [made for made in table if made["wrong"]]
    print(f"{len(table)} compiled, {len(broken)} break a rule")
    for made in broken:
        print(f"sm_{made['arch']} {made['kernel']} [{made['variant']}]: {'; '.join(made['wrong'])}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    run_script(main, "aot.py")
