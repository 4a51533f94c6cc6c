#!/usr/bin/env python3
"""Runs a program on a simulated GPU, which computes nothing, to find errors on the host's side.

    python benchmarks/rehearsal/run.py COMMAND...        REHEARSAL_LOG=1 prints every wait and every refusal

PyTorch's CUDA build, Triton, Inductor, CUDA graphs and the caching allocator run all of their own code, against a
library that takes the place of CUDA's runtime and driver, NVML, cuBLAS, cuDNN and NCCL and presents one H100. So the
rehearsal finds exceptions, operations that a CUDA graph refuses, hidden waits for the device, the host's time per step,
launches per step and peak memory. It checks no numbers, which are whatever lies in memory, no races, no time on a GPU,
not DALI, and not what the replaced libraries would refuse.

COMMAND must use the Python that runs this script: one with PyTorch's CUDA build. g++ is needed, and CUDA's headers from
the wheels nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl (`make rehearse` installs everything).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = [HERE / "gpu" / name for name in ("runtime.cpp", "driver.cpp", "libraries.cpp")]
PLACE = ROOT / ".rehearsal"
"""Folder of the built library and of compiled code. It is kept apart from a real GPU's, because here Inductor chose its
launch configurations by timing kernels that do nothing."""


def include_folders() -> list[Path]:
    """The folders of the headers of CUDA, cuDNN and NCCL in this Python's packages; exits with a sentence if none."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [packages / name / "include" for name in ("cu13", "cudnn", "nccl")] + [packages / "cu13/include/cccl"]
    needed = [folders[0] / "cuda_runtime_api.h", folders[0] / "crt/host_defines.h", folders[3] / "nv/target"]
    needed += [folders[1] / "cudnn.h", folders[2] / "nccl.h"]
    missing = [str(file) for file in needed if not file.is_file()]
    if missing:
        sys.exit(
            f"run.py: {sys.executable} has no {missing[0]}; pip install 'torch==2.11.0' (CUDA 13), "
            "'nvidia-cuda-crt==13.0.*' and 'nvidia-cuda-cccl==13.0.*'"
        )
    return folders


def build() -> Path:
    """The folder with the library, built if it is older than a source.

    Its name is the driver's, so that what Triton links against it runs on a real GPU's machine as well.
    """
    folder = PLACE / "gpu"
    if set(" :") & set(str(folder)):
        sys.exit(f"run.py: LD_PRELOAD takes no spaces and colons, as in {folder}; move the checkout")
    library = folder / "libcuda.so.1"
    newest = max(file.stat().st_mtime for file in (HERE / "gpu").iterdir())
    if library.is_file() and library.stat().st_mtime > newest:
        return folder
    if shutil.which("g++") is None:
        sys.exit("run.py: there is no g++; install it")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"partial.{os.getpid()}.so"
    headers = [f"-I{folder}" for folder in include_folders()]
    options = ["-std=c++17", "-O2", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{library.name}"]
    subprocess.run(["g++", *options, *headers, *map(str, SOURCES), "-o", str(partial), "-ldl", "-lpthread"], check=True)
    partial.replace(library)
    nvml = folder / "libnvidia-ml.so.1"
    nvml.unlink(missing_ok=True)
    nvml.symlink_to(library.name)
    # By this entry point `import torch` finds device.attach, in the processes that a program starts as well.
    package = folder / "rehearsal-1.dist-info"
    package.mkdir(exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: rehearsal\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[torch.backends]\nrehearsal = benchmarks.rehearsal.device:attach\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a program that runs on the simulated GPU."""
    changed = dict(os.environ)

    def put_first(name: str, *values: Path) -> None:
        changed[name] = os.pathsep.join([*map(str, values), *filter(None, [changed.get(name)])])

    put_first("LD_PRELOAD", folder / "libcuda.so.1")
    put_first("LD_LIBRARY_PATH", folder)
    put_first("PYTHONPATH", folder, ROOT)
    changed["TRITON_LIBCUDA_PATH"] = str(folder)
    changed.pop("TRITON_INTERPRET", None)
    changed.setdefault("XDG_CACHE_HOME", str(PLACE / "cache"))
    changed.setdefault("TORCHINDUCTOR_CACHE_DIR", str(PLACE / "cache" / "inductor"))
    changed.setdefault("TRITON_CACHE_DIR", str(PLACE / "cache" / "triton"))
    return changed


def main() -> None:
    command = sys.argv[1:]
    if not command:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    os.execvpe(command[0], command, environment(build()))


if __name__ == "__main__":
    main()
