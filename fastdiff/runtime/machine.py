"""The machine and PyTorch's settings on it: rates of GPUs, free memory, cores, compiled code, cuDNN and TF32.

Peaks are those of dense bf16 with float32 accumulation; they and the memory's bandwidth come from NVIDIA's datasheets.
The rates of an H200 are those that PyTorch reached on one: in a product of two 8192 x 8192 bf16 matrices (788 TFLOP/s)
and in a copy on the device, read and write counted (4.3 TB/s). The other GPUs are assumed to reach the same shares of
their datasheets; `measure_rates` measures.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import UserError

MATMUL_SHARE = 788 / 989
"""Share of the datasheet's FLOP/s that a large matrix product reaches on an H200."""
COPY_SHARE = 4.3 / 4.8
"""Share of the datasheet's bandwidth that a device copy reaches on an H200."""


@dataclass(frozen=True)
class Gpu:
    """Figures of a GPU by its datasheet, and two rates that it reaches; in FLOP/s, bytes/s and bytes."""

    name: str
    peak_flops: float
    bandwidth: float
    memory: float
    matmul_flops: float
    copy_bytes: float
    names: str
    """Regular expression for its name in torch.cuda.get_device_name()."""


def _gpu(name: str, teraflops: float, terabytes: float, gigabytes: float, names: str) -> Gpu:
    peak, bandwidth = teraflops * 1e12, terabytes * 1e12
    return Gpu(name, peak, bandwidth, gigabytes * 1e9, peak * MATMUL_SHARE, bandwidth * COPY_SHARE, names)


# PCIe and NVL boards of the same chips are slower and GB200 is faster, so the expressions leave them out.
GPUS: dict[str, Gpu] = {
    "H200": _gpu("H200", 989, 4.8, 141, r"H200(?! NVL)"),
    "H100": _gpu("H100 SXM", 989, 3.35, 80, r"H100 (SXM|80GB HBM3)|H100$"),
    "A100": _gpu("A100 80GB SXM", 312, 2.039, 80, r"A100-SXM4-80GB|A100 (80GB )?SXM|A100$"),
    "B200": _gpu("B200", 2250, 8.0, 180, r"(?<!G)B200"),
}


def find(name: str) -> Gpu | None:
    """The GPU with this name in torch.cuda.get_device_name(), as "NVIDIA H100 80GB HBM3"; None if it isn't in GPUS."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.names, name.strip())), None)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the CPU's model ("AMD EPYC 9655P 96-Core Processor") if the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


@dataclass(frozen=True)
class Rates:
    """Measured speed of a device: FLOP/s of a matrix product, and bytes/s of a copy, read and write counted."""

    matmul_flops: float
    copy_bytes: float


def measure_rates(
    device: torch.device, *, dtype: torch.dtype | None = None, size: int = 0, copy_size: int = 0, repeats: int = 5
) -> Rates:
    """Measure a device; each rate is the best of `repeats` rounds.

    dtype      of the matrix product; by default bf16 on a GPU and float32 on a CPU.
    size       of the square matrices; by default 8192 on a GPU and 1024 on a CPU.
    copy_size  bytes copied, more than caches hold; by default 1 GiB on a GPU and 64 MiB on a CPU.
    """
    on_gpu = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    size, copy_size = size or (8192 if on_gpu else 1024), copy_size or (1 << 30 if on_gpu else 1 << 26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    calls = 10 if on_gpu else 1
    matmul_seconds = best_seconds(lambda: torch.mm(a, b, out=product), device, repeats, calls)
    source = torch.zeros(copy_size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copy_seconds = best_seconds(lambda: target.copy_(source), device, repeats, calls)
    return Rates(2 * size**3 / matmul_seconds, 2 * copy_size / copy_seconds)


def best_seconds(fn: Callable[[], Any], device: torch.device, rounds: int, calls: int = 1) -> float:
    """Seconds of a call, in the best of `rounds` rounds after one call to warm up.

    calls  Calls per round, between two synchronisations with a GPU; several hide the time of a launch.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    fn()
    best = math.inf
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        wait(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of this machine or the part of it that a container may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cached = next(int(words[1]) for words in lines if words[0] == "file")  # the cache of files is freed on demand
        return min(free, limit - used + cached)
    except (OSError, ValueError, StopIteration):  # no container, or no limit
        return free


def use_free_cores(before: int | None = None) -> int:
    """Set torch's number of threads to `free_cores`, unless OMP_NUM_THREADS gives it; returns the number.

    before is the number that a resumed run had. It is kept if there are as many cores, because sums over another number
    of threads differ in their last bits.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        keep = before is not None and 0 < before <= _share()
        torch.set_num_threads(before if before is not None and keep else free_cores())
    return torch.get_num_threads()


LONG_CALL = 1.0
"""Seconds of a call that is timed once, without a warm-up."""


def choose_threads(work: Callable[[], Any]) -> str:
    """Set torch's number of threads to the one with which calls of `work` take least time; returns a line for the log.

    From the present number on, twice as many are tried as long as that is faster, else half as many. A larger number
    must be 5% faster, because beside other programs it is the less steady one. Nothing is timed, and the line is empty,
    where OMP_NUM_THREADS gives the number, where several processes of the run share this machine, and with one core.
    """
    if os.environ.get("OMP_NUM_THREADS") or local_processes() > 1 or allowed_cores() == 1:
        return ""
    seconds: dict[int, float] = {}
    first, most = min(torch.get_num_threads(), allowed_cores()), allowed_cores()

    def is_fastest(count: int) -> bool:
        torch.set_num_threads(count)
        start = time.perf_counter()
        work()
        seconds[count] = time.perf_counter() - start
        if seconds[count] < LONG_CALL:
            seconds[count] = _mean_seconds(work)
        return seconds[count] == min(seconds.values())

    is_fastest(first)
    count = min(2 * first, most)
    while count not in seconds and is_fastest(count):
        count = min(2 * count, most)
    count = first // 2 if min(seconds, key=seconds.__getitem__) == first else 0
    while count and is_fastest(count):
        count //= 2
    for count in [count for count, each in seconds.items() if each <= min(LONG_CALL, 1.5 * min(seconds.values()))]:
        torch.set_num_threads(count)
        seconds[count] = (seconds[count] + _mean_seconds(work)) / 2
    chosen = min(count for count, each in seconds.items() if each <= 1.05 * min(seconds.values()))
    torch.set_num_threads(chosen)
    timed = ", ".join(f"{each:.2g} s with {count}" for count, each in sorted(seconds.items()))
    return f"threads: {chosen} from here on, by trial (the network takes {timed}; OMP_NUM_THREADS gives another number)"


def _mean_seconds(work: Callable[[], Any], least: float = 0.2) -> float:
    """Mean seconds of a call, over as many as take `least` seconds. The mean counts what other programs delay."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < least:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def free_cores() -> int:
    """Cores that this process may use and that are idle, at least 1.

    If the run has several processes on this machine, each takes an equal share without regard to the load, which would
    include that of the others.
    """
    if local_processes() > 1:
        return _share()
    try:
        import psutil

        busy = psutil.cpu_percent(interval=0.25) / 100  # of all cores; waiting for disks counts as idle
        return max(1, min(allowed_cores(), math.floor((1 - busy) * psutil.cpu_count() + 0.5)))
    except (ImportError, OSError):  # the system doesn't tell
        return allowed_cores()


def _share() -> int:
    return max(1, allowed_cores() // local_processes())


def number_from_environment(name: str, default: int) -> int:
    """An environment variable's whole number, or the default where it is empty or absent; UserError for other text."""
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} is {text}, not a whole number; correct or unset it") from None


def local_processes() -> int:
    """Processes of this run on this machine, by torchrun's variable or DeepSpeed's launcher's."""
    return max(1, number_from_environment("LOCAL_WORLD_SIZE", number_from_environment("LOCAL_SIZE", 1)))


def allowed_cores() -> int:
    """Cores that this process may use by the scheduler's mask and the container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def cache_folder() -> Path:
    """The folder for results that later runs use again: ~/.cache/fastdiff, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"


def keep_compiled_code() -> Path:
    """Store Inductor's code in `cache_folder` instead of /tmp, unless TORCHINDUCTOR_CACHE_DIR is set.

    It stays in /tmp where that folder can't be written to, or has a space in its path, which PyTorch passes to g++
    without quotes. Triton's cache is put inside it, unless TRITON_CACHE_DIR is set. Inductor would do that too, but
    only at its first compilation, after kernels were launched. Must be called before anything is compiled. Returns
    Inductor's folder.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "inductor"
        if " " in str(folder) or not _can_be_written(folder):
            folder = Path(tempfile.gettempdir()) / f"fastdiff_{getattr(os, 'getuid', str)()}" / "inductor"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return folder


def _can_be_written(folder: Path) -> bool:
    """Whether a folder, made here if need be, can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def share_compile_processes() -> int:
    """Let Inductor compile in as many processes as this one has cores, unless TORCHINDUCTOR_COMPILE_THREADS is set.

    By itself every rank would start one per core of the machine, up to 32, whatever a container may use. Must be called
    before Dynamo is imported, as by DeepSpeed or by the first optimiser. Returns the number.
    """
    count = number_from_environment("TORCHINDUCTOR_COMPILE_THREADS", min(32, _share()))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(count)
    return count


def missing_compiler(device: torch.device) -> str:
    """The reason why nothing can be compiled for a device; empty if it can."""
    if device.type == "cpu" and shutil.which(_cpp_compiler()) is None:
        return "on a CPU it needs a C++ compiler (g++, or CXX), and there is none"
    return ""


def _cpp_compiler() -> str:
    """The compiler that Inductor uses for code on a CPU."""
    return os.environ.get("CXX", "g++")


KEEPS_STORES = "-fno-dse"
"""The flag of g++ without which compiled bf16 networks have wrong gradients on CPUs with AVX-512.

Inductor transposes maps in tiles of 32x32 bf16 numbers, through an array on the stack. At -O3 a pass of g++ 11 and 12,
the elimination of dead stores in RTL, deletes the stores to that array and not the loads from it, so that the kernel
reads what lay on the stack before. The flag leaves out this pass, which changes no arithmetic.
"""


@functools.cache
def _accepts(compiler: str, flag: str) -> bool:
    """Whether a C++ compiler is there and has this flag; clang, for one, refuses g++'s."""
    command = [compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return shutil.which(compiler) is not None and subprocess.run(command, capture_output=True).returncode == 0


_CACHEABLE = {f"torch.nn.attention.{name}": "constants" for name in ("_sdpa_kernel", "_backend_from_string")}
"""What torch.compile makes of sdpa_kernel. By itself it would not keep a graph with these calls, and trace the network
anew at every start; their arguments are constants, which are part of the cache's key."""


def compile_kwargs(device: torch.device, fullgraph: bool = True, frozen: bool = False) -> dict[str, Any]:
    """Arguments of torch.compile: one graph with fixed shapes, and on a GPU tensors in the layouts that the code gives.

    The network's maps and weights are channels-last there. Inductor's layout optimization would make every tensor of
    four dimensions channels-last, also attention's [B, N, L, D], which then is copied there and back. On a CPU weights
    that no longer change (frozen) are stored in oneDNN's layout, and g++ gets `KEEPS_STORES`.
    """
    options: dict[str, Any] = {}
    if device.type == "cuda":
        options = {"layout_optimization": False, "unsafe_marked_cacheable_functions": _CACHEABLE}
    if frozen and device.type == "cpu":
        options["freezing"] = True
    if device.type == "cpu" and _accepts(_cpp_compiler(), KEEPS_STORES):
        # Inductor has no option for flags, but writes the value of this one behind "-ffp-contract=" as it is.
        contract = torch._inductor.config.cpp.enable_floating_point_contract_flag  # type: ignore[attr-defined]
        options["cpp.enable_floating_point_contract_flag"] = f"{contract} {KEEPS_STORES}"
    return {"fullgraph": fullgraph, "dynamic": False, **({"options": options} if options else {})}


def prepare_cudnn(deterministic: bool = False, benchmark_limit: int = 10) -> str:
    """Let cuDNN time up to `benchmark_limit` plans (0: all) at the first use of every shape of a convolution.

    PyTorch keeps the choice as long as the process runs, and can't store it. With `deterministic` nothing is timed, and
    only algorithms that give the same bits every time are used. Must be called before the first use of cuBLAS. Returns
    a line for the log.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.benchmark_limit = benchmark_limit
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no code reads it before writing
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return "cuDNN: deterministic algorithms, chosen by its heuristics"
    plans = f"up to {benchmark_limit}" if benchmark_limit else "all"
    return f"cuDNN: the fastest of {plans} plans for each convolution, timed at its first call"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 within the block, for float32 matrix products and convolutions on a GPU.

    TF32 rounds the factors to 10 bits of mantissa, so that tensor cores can multiply them. By default PyTorch allows it
    to cuDNN and not to cuBLAS. The state belongs to the process, not to the thread; it is restored afterwards. The
    Triton kernels of `kernels/` multiply float32 numbers exactly in either case.

    PyTorch's older switches (`allow_tf32`) also set its newer ones (`fp32_precision`), but not the other way round. If
    the two disagree, reading an older one raises an error, and parts of Inductor read it. So every switch is set, also
    oneDNN's, which `torch.set_float32_matmul_precision` sets together with cuBLAS's.
    """
    backends: Any = torch.backends
    matmul, cudnn, onednn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    outer, before = [backends, cudnn, onednn], []
    for switch in [*outer, matmul, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv, onednn.rnn]:
        before.append((switch, switch.fp32_precision))
        if switch in outer:
            switch.fp32_precision = "none"  # inner switches would show and follow an outer one's value
    older = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # the older and the newer switches disagree already
        products = "high" if older[0] else "highest"
    with warnings.catch_warnings():
        if not allowed:  # Inductor recommends TF32 whenever it compiles a float32 product for a GPU
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        try:
            torch.set_float32_matmul_precision("highest")
            matmul.allow_tf32 = cudnn.allow_tf32 = allowed
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = older
            torch.set_float32_matmul_precision(products)
            for switch, value in reversed(before):  # the general one last, because setting oneDNN's resets it
                switch.fp32_precision = value
