"""Check fastdiff on one GPU and measure its speed, the most valuable parts first, within a time limit if one is given.

    python benchmarks/gpu_proof.py                       everything that is not done yet; may be repeated
    python benchmarks/gpu_proof.py --seconds 560         ends within so many seconds
    python benchmarks/gpu_proof.py --only machine "270M*"
    python benchmarks/gpu_proof.py --list                the parts, and about how long each takes

Every part runs in a process of its own with a limit, so that an exception, a lack of memory or a hang costs that part
alone. Everything found is on disk at once (results.jsonl in --out; log.txt holds what was printed), so a command that
is killed has lost nothing: the same command again does what is left at this commit. A table with ratios comes last.
Exit code 0: every wanted part is done. 3: some are left, for lack of time or of what they need. 1: one failed. 2: a
flag is wrong, or there is no GPU.

`report.py results.jsonl` makes tables and charts. docs/gpu.md says how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import importlib
import lzma
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(HERE.parent))
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]  # its modules are benchmarks.NAME
sys.path.append(str(HERE.parent / "tests"))
# A process that has opened CUDA can't be forked; this way torch asks the driver's library whether there is a GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from benchmarks.flag_types import existing_file, usable_folder  # noqa: E402
from benchmarks.gpu_parts import PARTS  # noqa: E402
from benchmarks.proof_log import FILE, OK, Log, Row, finished, latest_kind, of_one_kind, read_rows, table  # noqa: E402
from benchmarks.proof_part import ROOT, Context, LeftOut, OutOfTime, Part  # noqa: E402
from fastdiff.evaluation.fidelity import prepare_torchvision  # noqa: E402

BROUGHT = ROOT / ".gpu"
"""The folder in which pack_for_gpu.py puts the files for a machine without a network."""
IMPORTS = (
    *("deepspeed", "torch._inductor.compile_fx", "fastdiff.training.run", "fastdiff.sampling.sampler"),
    "diffusers.models.unets.unet_2d",
)
"""Imported once, where they are installed, before parts are forked off: together they take many seconds."""
PATIENCE = 4.0
"""A part is stopped after so many times its predicted seconds, and 20 more."""
CLOSING = 5.0
"""Seconds kept for the table."""
LEFT_OUT, OUT_OF_TIME = 4, 5
"""Exit codes of a part that lacks what it needs, and of one whose own command was cut off at the part's limit."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch = Path(tempfile.gettempdir()) / "fastdiff_gpu_proof"
    flag = parser.add_argument
    flag("--out", type=usable_folder, default=ROOT / ".gpu_proof", help="folder of results (default: %(default)s)")
    flag("--work", type=usable_folder, default=scratch, help="scratch for compiled code, images and runs, and a copy "
         "of the results (default: %(default)s)")  # fmt: skip
    flag("--keep", type=usable_folder, metavar="FOLDER", help="keep the results there, with tables and charts")
    flag("--seconds", type=float, default=float("inf"), help="end within so many (default: no limit)")
    flag("--only", nargs="+", metavar="PART", default=["*"], help="names, or patterns such as '270M*'")
    flag("--done_in", type=existing_file, nargs="+", metavar="FILE", default=[], help="results.jsonl of earlier "
         "commands: parts that they finished are left out, and their rows copied")  # fmt: skip
    flag("--again", action="store_true", help="run also what is done already")
    flag("--images", type=Path, help="folder or tar file to train on (default: made-up pictures)")
    flag("--commit", default="", help="the commit's name, where the checkout has no .git")
    flag("--stretch", type=float, default=1.0, help="multiplies every limit, for slow machines")
    flag("--spawn", action="store_true", help="start every part as a fresh process, not a forked one: some seconds "
         "more each")  # fmt: skip
    flag("--tiny", action="store_true", help="tiny networks and inputs: shows on any machine that the parts run; their "
         "figures mean nothing")  # fmt: skip
    flag("--rehearsal", action="store_true", help="don't judge numbers: the GPU computes nothing")
    flag("--list", action="store_true", help="print the parts and about how long each takes")
    args = parser.parse_args(argv)
    names = [part.name for part in PARTS]
    for word in args.only:
        if not fnmatch.filter(names, word):
            parser.error(f"--only: no part is called {word}; the parts are {', '.join(names)}")
    if args.images and not args.images.exists():
        parser.error(f"--images: {args.images} does not exist")
    if not args.seconds > 0 or not 0 < args.stretch < float("inf"):
        parser.error("--seconds and --stretch must be greater than 0")
    return args


def mode_of(args: argparse.Namespace) -> str:
    return "tiny" if args.tiny else "rehearsal" if args.rehearsal else "real"


def prepare(args: argparse.Namespace) -> None:
    """Make the folders, unpack compiled code that was brought along, and point the compilers' caches at it."""
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    compiled = args.work / "compiled"
    packed = BROUGHT / "compiled.tar.xz"
    if packed.is_file() and not compiled.is_dir():
        partial = args.work / f"compiled.{os.getpid()}"
        try:
            with tarfile.open(packed) as file:
                file.extractall(partial, filter="data")
            (partial / "compiled").rename(compiled)
        except (tarfile.TarError, EOFError, OSError, lzma.LZMAError) as error:
            print(f"{packed} can't be unpacked ({error}): everything is compiled anew")
        shutil.rmtree(partial, ignore_errors=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if args.images is None and (BROUGHT / "images.tar.xz").is_file():
        args.images = BROUGHT / "images.tar.xz"
    if args.tiny:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than everything else that is tiny


def known_rows(args: argparse.Namespace) -> list[Row]:
    """The findings of earlier commands of the same mode and commit, in --out or in the files of --done_in."""
    files = [args.out / FILE, *args.done_in]
    rows = [row for file in dict.fromkeys(files) if file.is_file() for row in read_rows(file)]
    return of_one_kind(rows, mode_of(args), args.commit)


@dataclass
class Running:
    """A part that has been started."""

    part: Part
    process: BaseProcess
    began: float
    until: float


class Proof:
    """Starts parts, stops those that outlast their limits, and remembers which failed."""

    def __init__(self, args: argparse.Namespace, began: float, done: set[str]) -> None:
        self.args, self.began, self.done = args, began, done
        self.deadline = began + args.seconds - CLOSING
        self.log = Log(tuple(dict.fromkeys((args.out, args.work))), began)
        self.method = "spawn" if args.spawn else "fork"
        self.running: list[Running] = []
        self.failed: list[str] = []
        self.left: list[str] = []

    def go(self, parts: list[Part]) -> None:
        """Run the parts in order. Those that need the GPU alone wait for those that don't."""
        for part in parts:
            if part.name in self.done:
                continue
            if part.alone:
                self.finish_all()
            if self.deadline - time.monotonic() < part.seconds:
                self.left.append(part.name)
                continue
            self.start(part)
            if part.alone:
                self.finish_all()
        self.finish_all()

    def finish_all(self) -> None:
        """Wait until every part that runs has ended or was stopped at its limit."""
        while self.running:
            limit = min(running.until for running in self.running)
            connection.wait([r.process.sentinel for r in self.running], timeout=max(0.0, limit - time.monotonic()))
            for running in list(self.running):
                if not running.process.is_alive() or time.monotonic() >= running.until:
                    self.finish(running)

    def start(self, part: Part) -> None:
        now = time.monotonic()
        print(f"== {part.name}, {now - self.began:.0f} s after the start", flush=True)
        until = min(now + self.args.stretch * (PATIENCE * part.seconds + 20), self.deadline)
        images = self.args.images.resolve() if self.args.images else None
        args = self.args
        context = Context(part.name, self.log, args.out, args.work, images, args.tiny, args.rehearsal, until)
        given = (context, os.getpid())
        process = multiprocessing.get_context(self.method).Process(target=run_part, args=given, name=part.name)
        process.start()
        self.running.append(Running(part, process, now, until))

    def finish(self, running: Running) -> None:
        """End a part if it hasn't ended, and write down how it did."""
        name, process = running.part.name, running.process
        code = None if process.is_alive() else process.exitcode
        stop(process)  # also what a part has started and left behind
        self.running.remove(running)
        cut_off = running.until >= self.deadline
        if code == 0:
            verdict = OK
        elif code == LEFT_OUT or (code in (None, OUT_OF_TIME) and cut_off):
            verdict = "left out" if code == LEFT_OUT else "out of time: --seconds were over"
            self.left.append(name)
        else:
            verdict = "stopped at its limit" if code in (None, OUT_OF_TIME) else f"failed with exit code {code}"
            self.failed.append(name)
        self.log.write(name, "end", verdict=verdict, seconds=round(time.monotonic() - running.began, 1))
        write_table(self.log)
        if name == "machine" and name in self.failed and self.method == "fork":
            self.log.write(name, "note", reason="it failed in a forked process; now every part starts as a fresh one")
            self.method = "spawn"
            self.failed.remove(name)
            self.start(running.part)


def run_part(context: Context, parent: int) -> None:
    """Run in the part's process: its output goes to log.txt; an exception becomes a row and exit code 1."""
    os.setpgid(0, 0)  # so that it can be stopped with all that it has started
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    with (context.out / "log.txt").open("a", buffering=1) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        print(f"\n===== {context.part}", flush=True)
        part = next(part for part in PARTS if part.name == context.part)
        code = 0
        try:
            part.run(context)
        except LeftOut as error:
            context.emit("note", reason=str(error))
            code = LEFT_OUT
        except Exception as error:
            traceback.print_exc()
            context.emit("note", error=f"{type(error).__name__}: {error}"[:600])
            code = OUT_OF_TIME if isinstance(error, OutOfTime) else 1
    os._exit(code)  # the clean-up of CUDA and of process groups may hang, and its seconds are the next part's


def end_with(parent: int) -> None:
    """Kill this process and all that it has started when the command is gone, which may have been killed itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def stop(process: BaseProcess) -> None:
    """Kill a part's process and all processes of its group that are still there."""
    if process.pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have got as far as to have a group of its own
    process.join()


def write_table(log: Log) -> str:
    text = table(latest_kind(read_rows(log.file)))
    (log.folders[0] / "table.txt").write_text(text + "\n")
    return text


def commit_of(args: argparse.Namespace) -> str:
    given = args.commit
    if not given and shutil.which("git"):
        argv = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        given = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return given or "unknown"


def print_parts(parts: list[Part]) -> None:
    for part in parts:
        print(f"{part.seconds:5.0f} s  {part.name}" + ("" if part.alone else "  (may run beside others)"))
    total = sum(part.seconds for part in parts)
    print(f"{total / 60:5.0f} minutes together, predicted for an H100 that finds compiled code")


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse(argv)
    wanted = [part for part in PARTS if any(fnmatch.fnmatch(part.name, word) for word in args.only)]
    if args.list:
        print_parts(wanted)
        return 0
    if not args.tiny and not gpu_is_here():
        print("gpu_proof.py: there is no GPU here; --tiny shows that the parts run, make rehearse does more")
        return 2
    resolved = {name: getattr(args, name).resolve() for name in ("out", "work")}
    args = argparse.Namespace(**{**vars(args), **resolved, "commit": commit_of(args)})
    with contextlib.ExitStack() as held:
        try:
            prepare(args)
            for folder in {args.out, args.work}:
                held.enter_context(locked(folder))
            before = known_rows(args)
        except (OSError, ValueError) as error:
            print(f"gpu_proof.py: {error}")
            return 2
        command = "python benchmarks/gpu_proof.py " + shlex.join(sys.argv[1:] if argv is None else argv)
        return prove(args, wanted, before, command, began)


def prove(args: argparse.Namespace, wanted: list[Part], before: list[Row], command: str, began: float) -> int:
    """Run what is left of the wanted parts, show the table, and return the exit code."""
    if args.tiny:
        wanted = [replace(part, seconds=5.0) for part in wanted]
    proof = Proof(args, began, set() if args.again else finished(before))
    proof.log.cut_half_lines()
    if not (args.out / FILE).exists():
        proof.log.copy(before)
    start = {"command": command, "commit": args.commit, "date": date.today().isoformat(), "mode": mode_of(args)}
    proof.log.write("all", "start", **start)
    print(f"results: {proof.log.file}; what the parts print: {args.out / 'log.txt'}", flush=True)
    if not args.spawn:
        prepare_torchvision()  # diffusers imports it where it is installed
        for name in IMPORTS:
            with contextlib.suppress(ImportError):  # a part that needs it will say so
                importlib.import_module(name)
    before_signal = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        proof.go(wanted)
    finally:
        for running in proof.running:  # the command is stopped
            stop(running.process)
        signal.signal(signal.SIGTERM, before_signal)
        print(write_table(proof.log), flush=True)
    print(f"results, log and table are in {args.out}")
    if args.keep:
        from benchmarks import report
        from fastdiff.errors import UserError

        try:
            report.main([str(proof.log.file), "--keep", str(args.keep)])
        except UserError as error:
            print(f"nothing was kept: {error}")
    if proof.left:
        print(f"left: {', '.join(proof.left)}; the same command again does them")
    return 1 if proof.failed else 3 if proof.left else 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder; ValueError where one is in it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another gpu_proof.py runs in {folder}; wait for it, or name another folder") from None
        yield


def gpu_is_here() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    from fastdiff.runtime.script import tolerate_closed_output

    with tolerate_closed_output():
        code = main()
    sys.exit(code)
