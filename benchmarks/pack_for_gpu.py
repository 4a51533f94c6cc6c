"""Pack what gpu_proof.py needs on a GPU machine without a network, into a folder .gpu of the checkout.

    python benchmarks/pack_for_gpu.py --images cifar10.tar.xz --compiled /tmp/fastdiff_gpu_proof/compiled
    python benchmarks/pack_for_gpu.py --packages --python 3.11                  no packages, or another Python there

That machine is taken to have torch, Triton, numpy, Pillow, psutil, tqdm, TensorBoard, safetensors and pytest for its
own Python; DeepSpeed, pydantic and diffusers come along as wheels. Compiled code is what a rehearsal left
(docs/gpu.md): it is found there only at the same path, with the same versions and the same kind of GPU. Copy the
checkout with its .gpu, and there begin with

    source .gpu/install.sh && python benchmarks/gpu_proof.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(ROOT))

from benchmarks.flag_types import usable_folder  # noqa: E402

FOLDER = ROOT / ".gpu"
PACKAGES = ("pydantic", "deepspeed", "hjson", "diffusers", "importlib_metadata")
FROM_SOURCE = ("deepspeed", "hjson")
"""Published without wheels; those that they build hold Python only, for any machine."""
WITH_NEEDS = ("pydantic",)
"""Bring what they need, too; the others' needs are taken to be there."""
GLIBC = (17, 24, 27, 28, 31, 34, 35, 39)
"""Minor versions of glibc 2 that wheels of today name; pip takes those that are listed, not all below."""
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
    parser.add_argument("--folder", type=usable_folder, default=FOLDER, help="where to pack (default: .gpu)")
    args = parser.parse_args(argv)
    for name in ("images", "compiled"):
        if getattr(args, name) and not getattr(args, name).exists():
            parser.error(f"--{name}: {getattr(args, name)} does not exist")
    if args.compiled and not next(worth_taking(args.compiled), None):
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


def worth_taking(cache: Path) -> Iterator[Path]:
    """Of compiled code, Inductor's graphs, which hold their kernels, and our own Triton kernels.

    Left out is what Inductor writes a second time, and its choices among launch configurations: on a machine without a
    real GPU they were made by timing nothing.
    """
    for name in ("fxgraph", "aotautograd"):
        yield from _files(cache / "inductor" / name)
    for kernel in sorted((cache / "triton").glob("*")):
        if kernel.is_file():  # fastdiff's list of what is compiled
            yield kernel
        elif not any(file.name.startswith(("triton_", "__grp__triton_")) for file in kernel.glob("*")):
            yield from _files(kernel)


def _files(folder: Path) -> Iterator[Path]:
    yield from (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".best_config")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    wheels = args.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    download(list(args.packages), args.python, wheels)
    if args.images:
        shutil.copyfile(args.images, args.folder / "images.tar.xz")
    if args.compiled:
        with tarfile.open(args.folder / "compiled.tar.xz", "w:xz") as file:
            for path in worth_taking(args.compiled):
                file.add(path, Path("compiled") / path.relative_to(args.compiled))
    (args.folder / "install.sh").write_text(INSTALL)
    files = [path for path in sorted(args.folder.rglob("*")) if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(args.folder)}")
    print(f"{sum(path.stat().st_size for path in files) / 2**20:8.1f} MiB in {args.folder}")


if __name__ == "__main__":
    main()
