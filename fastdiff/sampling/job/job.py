"""A sampling job: many images by any number of processes, which can be stopped at any moment and go on later.

Image i depends on the job's identity and i alone, so it does not matter who draws it, or when, or that two do.
Processes share a folder and nothing else:

    OUT/job.json                what the job is
    OUT/claims/START-STOP.0     who is at which images, so that others take those elsewhere first
    OUT/parts/START-STOP.npz    images that are drawn
    OUT/samples_NxHxWxC.npz     all of them, put together by whoever finds all parts there

Nobody waits for anybody: with no unclaimed images left, a process draws those that others are at but have not finished.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.errors import UserError
from fastdiff.runtime.files import files_in, remove_partial_files
from fastdiff.runtime.processes import Processes
from fastdiff.sampling.job.chunks import DamagedPart, Range, Store, Writer, disk, range_of, split
from fastdiff.sampling.job.claims import Claim, Claims, kept_alive
from fastdiff.sampling.job.exports import Source
from fastdiff.sampling.job.manifest import agree, check_same, digest, new_record
from fastdiff.sampling.job.outputs import Outputs, Trace
from fastdiff.sampling.job.progress import STATUS, Progress
from fastdiff.sampling.pictures import CHANNELS, Draw, Images


@dataclass(frozen=True)
class Job:
    """What to draw, and what to make of it."""

    identity: dict[str, Any]
    """Everything that makes the images what they are, as JSON: setting → value. Not the count or batch size."""
    count: int
    """Images 0 to count - 1."""
    shape: tuple[int, int, int]
    """Height, width, channels."""
    labelled: bool
    seed: int
    part_size: int
    """Images per part, unless the folder's job has parts of another size."""
    save_as: tuple[str, ...] = ("npz",)
    """Of npz, png, zip, tar."""
    grid_images: int = 0
    """Images in the picture grid."""
    grid_classes: int = 0
    """More than 0: rows of the grid by class, so many classes."""
    class_names: tuple[str, ...] | list[str] = ()
    trajectory: int = 0
    """Images whose x_0 predictions become a strip and a GIF."""
    note: str = ""
    """Ends the closing line."""


def run_job(
    draw: Draw,
    job: Job,
    processes: Processes,
    folder: Path,
    *,
    overwrite: bool = False,
    trace: Trace | None = None,
) -> list[Path]:
    """Draw what is missing of a job's images, together with whoever else does, and make its files.

    draw       called for one range of images after another, each as large as a part or smaller.
    overwrite  removes another job's files from the folder instead of refusing it.
    trace      shows the way of job.trajectory images.

    Returns the job's files (a folder for png), which another process may be about to make. Raises UserError when the
    folder holds another job or can't be written to.
    """
    if job.shape[2] not in CHANNELS:
        for kind in job.save_as:
            if kind != "npz":
                raise UserError(f"--save_as: no {kind} can be made of {job.shape[2]} channels; npz takes any number")
    record = new_record(job.identity, job.shape, job.labelled, job.seed, job.part_size)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        record = agree(folder, record, overwrite)
    return _Run(draw, job, processes, folder, record, trace).run()


class _DrawnElsewhere(Exception):
    """Another process has finished the images that this one is at."""


class _Run:
    """One process's part in a job."""

    def __init__(
        self, draw: Draw, job: Job, processes: Processes, folder: Path, record: dict[str, Any], trace: Trace | None
    ) -> None:
        self.draw, self.job, self.processes, self.folder, self.record = draw, job, processes, folder, record
        self.trace = trace
        self.store = Store(folder, job.shape, job.labelled, job.seed, digest(record["identity"]))
        self.claims = Claims(folder / "claims")
        pictures = job.shape[2] in CHANNELS
        self.outputs = Outputs(
            folder,
            job.count,
            job.shape,
            job.save_as,
            list(job.class_names),
            (job.grid_images if pictures else 0, job.grid_classes),
            job.trajectory if pictures and trace is not None else 0,
        )
        self.started = time.monotonic()

    def run(self) -> list[Path]:
        with disk(self.folder):
            there = self.job.count - self._missing()
            if not self._to_make():
                self._tidy()
                if self.processes.is_main:
                    print(f"{self._where()}: complete already{self.job.note}")
                return self.outputs.paths()
        if there and self.processes.is_main:
            print(f"{there} of {self.job.count} images are there already, in {self.folder}", flush=True)
        while True:
            if self._missing():
                self._draw_missing(there)
            try:
                with disk(self.folder):
                    return self._finish(there)
            except DamagedPart as damaged:
                self.store.discard(damaged)
                print(damaged, flush=True)

    def _missing(self) -> int:
        return sum(stop - start for start, stop in self.store.missing(self.job.count))

    def _to_make(self) -> list[str]:
        """Outputs that are not there."""
        usable = any(piece.path == self.outputs.path(".npz") for piece in self.store.merged())
        return self.outputs.missing(usable)

    # --- drawing ---

    def _draw_missing(self, there: int) -> None:
        """Draw until all images are on disk, whoever drew them."""
        with disk(self.folder):
            for place in (self.store.parts, self.claims.folder):
                place.mkdir(exist_ok=True)
        progress = Progress(
            self.job.count, there, self._missing, self.claims.folder, self.processes.rank, self.processes.is_main
        )
        with Writer(self.store, self.folder) as writer, progress:
            while True:
                with disk(self.folder):
                    check_same(self.folder, self.record)
                    # Before the parts, because what has left either of these is in a part.
                    held, pending = self.claims.held(), writer.pending()
                    missing = self.store.missing(self.job.count)
                    if not missing:
                        return
                    todo = [part for part in split(missing, self.record["part_size"]) if part not in pending]
                    if not todo:
                        writer.wait()
                        continue
                    part, claim = self._choose(todo, held)
                    if claim is not None and self.store.path(part).exists():  # in the meantime
                        claim.release()
                        claim = None
                if claim is not None:
                    self._draw_part(part, claim, writer, progress)

    def _choose(self, todo: list[Range], held: dict[str, Any]) -> tuple[Range, Claim | None]:
        """What to draw next, and this process's claim on it, which is None when another was quicker.

        First what nobody is at, each process from another place on; then what the fewest are at.
        """
        begin = len(todo) * self.processes.rank // max(self.processes.world_size, 1)
        todo = [*todo[begin:], *todo[:begin]]
        free = [part for part in todo if part.name not in held or held[part.name].gone]
        part = free[0] if free else min(todo, key=lambda part: held[part.name].generation)
        generation = held[part.name].generation + 1 if part.name in held else 0
        return part, self.claims.take(part.name, generation)

    def _draw_part(self, part: Range, claim: Claim, writer: Writer, progress: Progress) -> None:
        def on_progress(images: float) -> None:
            if progress.add(images):
                writer.check()
                if self.store.path(part).exists() or not claim.path.exists():
                    raise _DrawnElsewhere

        try:
            drawn = self.draw(np.arange(part.start, part.stop), on_progress)
            _check(drawn, part, self.job)
        except BaseException as error:
            claim.release()
            if not isinstance(error, _DrawnElsewhere):
                raise
        else:
            writer.put(part, drawn, claim)
        progress.settle()

    # --- putting together ---

    def _finish(self, there: int) -> list[Path]:
        """Make the files, unless another process does."""
        name = f"merge-{self.outputs.key}"
        lines: list[str] = []
        claim = self.claims.take_alone(name)
        if claim is None:
            self.store.tidy()  # the other may have done so before this process's last part
            with suppress(OSError):
                self.claims.folder.rmdir()
            print(f"process {self.processes.rank}: all images are drawn; another process puts them together")
            return self.outputs.paths()
        with kept_alive(claim):
            check_same(self.folder, self.record)
            made = self._to_make()
            try:
                lines = self.outputs.make(made, self._source(), self.trace)
            except FileNotFoundError as error:  # this process stood still so long that others have tidied up
                if self._to_make():
                    raise DamagedPart(Path(str(error.filename)), "it has vanished") from error
                made = []
            self._tidy()
        with suppress(OSError):
            self.claims.folder.rmdir()
        if made:
            seconds = time.monotonic() - self.started
            rate = f", {(self.job.count - there) / seconds:.3g} images/s" if there < self.job.count else ""
            print(f"{self._where()}, {seconds:.1f} s{rate}{self.job.note}")
            for line in lines:
                print(line)
        else:
            print(f"process {self.processes.rank}: all images are drawn; another process has put them together")
        return self.outputs.paths()

    def _where(self) -> str:
        return f"{self.job.count} images in {' and '.join(self.outputs.main().values())}"

    def _source(self) -> Source:
        """The images as they are on disk; raises DamagedPart when some are missing after all."""

        def pieces(first: int) -> list[Any]:
            chosen, missing = self.store.cover(self.job.count)
            if missing:
                raise DamagedPart(self.store.path(missing[0]), "it is missing")
            return [
                piece._replace(used=Range(max(piece.used.start, first), piece.used.stop))
                for piece in chosen
                if piece.used.stop > first
            ]

        return Source(
            self.job.count,
            self.job.shape,
            self.job.labelled,
            self.job.seed,
            lambda first: self.store.read(pieces(first), self.record["part_size"]),
            lambda: self.store.read_labels(pieces(0)),
        )

    def _tidy(self) -> None:
        """Remove what the job needs no more: parts that are in an npz, claims on images that are there, leftovers."""
        self.outputs.tidy()
        self.store.tidy()
        folder = self.claims.folder
        for name in files_in(folder):
            if name.endswith((STATUS, ".now")):
                (folder / name).unlink(missing_ok=True)
        holes = self.store.missing(self.job.count)  # of a job whose images are needed no more, or of another format

        def needless(name: str) -> bool:
            part = range_of(name)
            if part is None or part.stop > self.job.count:
                return False
            return all(hole.start >= part.stop or hole.stop <= part.start for hole in holes)

        self.claims.tidy(needless)
        remove_partial_files(folder)
        remove_partial_files(self.folder)
        with suppress(OSError):
            folder.rmdir()


def _check(drawn: Images, part: Range, job: Job) -> None:
    count = part.stop - part.start
    assert drawn.images.shape == (count, *job.shape), (drawn.images.shape, count, job.shape)
    assert drawn.images.dtype == np.uint8, drawn.images.dtype
    if job.labelled:
        assert drawn.labels is not None
        assert drawn.labels.shape == (count,), drawn.labels.shape
        assert drawn.labels.dtype == np.int64, drawn.labels.dtype
