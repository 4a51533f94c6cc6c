"""Packs what gpu_proof.py needs on a GPU machine without a network, into the folder .gpu of the checkout.

    python benchmarks/pack_for_gpu.py --images cifar10.tar.xz --compiled /tmp/fastdiff_gpu_proof/compiled
    python benchmarks/pack_for_gpu.py --packages --python 3.11                  no packages, or another Python there

That machine is assumed to have torch, Triton, numpy, Pillow, psutil, tqdm, TensorBoard, safetensors and pytest for its
own Python; DeepSpeed, pydantic and diffusers come along as wheels. Compiled code comes from a rehearsal (docs/gpu.md);
it is found only at the same path, by the same versions, for the same kind of GPU. Copy the checkout with its .gpu, and
begin there with

    source .gpu/install.sh && python benchmarks/gpu_proof.py
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(ROOT))

from benchmarks.flag_types import at_least, usable_folder  # noqa: E402

FOLDER = ROOT / ".gpu"
PACKAGES = ("pydantic", "deepspeed", "hjson", "diffusers", "importlib_metadata")
FROM_SOURCE = ("deepspeed", "hjson")
"""Packages that are published without wheels; the wheels built from them hold only Python, for any machine."""
WITH_NEEDS = ("pydantic",)
"""Packages whose dependencies are packed, too; those of the others are assumed to be there."""
GLIBC = (17, 24, 27, 28, 31, 34, 35, 39)
"""Minor versions of glibc 2 in the names of wheels; pip takes those that are listed, not all below."""
INSTALL = """\
# To be sourced on the GPU machine: installs the wheels beside this file into a folder of their own, once.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${SITE:-${TMPDIR:-/tmp}/fastdiff_site}
if [ ! -e "$site/.complete" ] && ls "$here"/wheels/*.whl > /dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$here"/wheels/*.whl \\
        && touch "$site/.complete" || return 1
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help=f"default: {' '.join(PACKAGES)}")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python")
    parser.add_argument("--images", type=Path, help="tar.xz file of pictures to train on")
    parser.add_argument("--compiled", type=Path, help="folder of compiled code to take along")
    parser.add_argument("--most", type=at_least(1), default=math.inf, metavar="MIB", help="end compiled code at about "
                        "so many MiB; what was compiled last is left out (default: take all)")  # fmt: skip
    parser.add_argument("--folder", type=usable_folder, default=FOLDER, help="where to pack (default: .gpu)")
    args = parser.parse_args(argv)
    for name in ("images", "compiled"):
        if getattr(args, name) and not getattr(args, name).exists():
            parser.error(f"--{name}: {getattr(args, name)} does not exist")
    if args.compiled and not worth_taking(args.compiled):
        parser.error(f"--compiled: {args.compiled} holds no compiled code; give a folder with inductor/ and triton/")
    if args.images and not args.images.name.endswith(".tar.xz"):
        parser.error(f"--images: {args.images} must be a .tar.xz file")
    return args


def download(packages: list[str], python: str, wheels: Path) -> None:
    """Fetch wheels for another Python on 64-bit Linux, at the versions of constraints.txt."""
    pip = [sys.executable, "-m", "pip"]
    pinned = ["-c", str(ROOT / "constraints.txt"), "-q"]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    target += [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    for name in packages:
        if name in FROM_SOURCE:
            command = [*pip, "wheel", *pinned, "--no-deps", "-w", str(wheels), name]
        else:
            needs = [] if name in WITH_NEEDS else ["--no-deps"]
            command = [*pip, "download", *pinned, *target, *needs, "-d", str(wheels), name]
        subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})


def worth_taking(cache: Path) -> list[Path]:
    """Files of compiled code: Inductor's graphs, which hold their kernels, and our Triton kernels; the oldest first.

    These are left out: duplicates that Inductor writes; its choices among launch configurations, which a rehearsal
    makes by timing kernels that do nothing; the kernels' intermediate code; and fastdiff's list of compiled launches,
    which names the left-out ones as well (without the list, a run looks for each launch).
    """
    graphs = [path for name in ("fxgraph", "aotautograd") for path in (cache / "inductor" / name).rglob("*")]
    kernels: list[Path] = []
    for folder in (cache / "triton").glob("*/"):
        files = list(folder.glob("*"))
        if not any(file.name.startswith(("triton_", "__grp__triton_")) for file in files):
            kernels += [file for file in files if file.suffix in (".json", ".cubin", ".so")]
    found = [path for path in (*graphs, *kernels) if path.is_file() and path.suffix != ".best_config"]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))


def pack(cache: Path, target: Path, most: float) -> int:
    """Pack what is worth taking until the packed file has about `most` bytes; returns how many files were left out."""
    paths = worth_taking(cache)
    with target.open("wb") as raw, lzma.open(raw, "wb") as packed, tarfile.open(fileobj=packed, mode="w|") as file:
        for i, path in enumerate(paths):
            if raw.tell() > most:
                return len(paths) - i
            file.add(path, Path("compiled") / path.relative_to(cache))
    return 0


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    wheels = args.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    download(list(args.packages), args.python, wheels)
    if args.images:
        shutil.copyfile(args.images, args.folder / "images.tar.xz")
    if args.compiled:
        left = pack(args.compiled, args.folder / "compiled.tar.xz", args.most * 2**20)
        if left:
            print(f"{left} files of compiled code are left out, for --most {args.most} MiB")
    (args.folder / "install.sh").write_text(INSTALL)
    files = [path for path in sorted(args.folder.rglob("*")) if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(args.folder)}")
    print(f"{sum(path.stat().st_size for path in files) / 2**20:8.1f} MiB in {args.folder}")


if __name__ == "__main__":
    main()
