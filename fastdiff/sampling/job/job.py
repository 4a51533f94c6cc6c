"""A sampling job: any number of processes draw its images. It can be stopped at any moment and continued later.

Image i depends on the job's identity and i alone, so it does not matter which process draws it, when, or how often.
The processes share a folder and nothing else:

    OUT/job.json                the manifest: what the job is
    OUT/claims/START-STOP.0     the claim of a process on these images, so that others draw different ones first
    OUT/parts/START-STOP.npz    a chunk of drawn images
    OUT/samples_NxHxWxC.npz     all images, merged by a process that finds all chunks

No process waits for another: if no unclaimed images are left, it draws those that others have claimed but not finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from fastdiff import errors
from fastdiff.errors import StopWith, UserError, blaming
from fastdiff.runtime.files import files_in, remove_partial_files
from fastdiff.runtime.processes import Processes
from fastdiff.sampling.job.chunks import DamagedFile, Range, Store, Writer, disk, range_of, split
from fastdiff.sampling.job.claims import Claim, Claims, Held
from fastdiff.sampling.job.manifest import Job, Manifest, agree, check_same, manifest_of
from fastdiff.sampling.job.outputs import Outputs, Trace
from fastdiff.sampling.job.progress import STATUS, Progress
from fastdiff.sampling.pictures import CHANNELS, Draw, Images


def run_job(
    draw: Draw, job: Job, processes: Processes, folder: Path, *, overwrite: bool = False, trace: Trace | None = None
) -> list[Path]:
    """Draw the missing images of a job, together with all other processes that work on it, and make its output files.

    draw is called for one range of images after another, each at most a chunk. overwrite removes another job's files
    from the folder instead of refusing it. trace draws the trajectories of job.trajectory images.

    Returns the job's files (a folder for png), which another process may still be writing. Raises UserError if the
    folder holds another job or can't be written to, StopWith after Ctrl-C.
    """
    if job.shape[2] not in CHANNELS:
        for kind in job.save_as:
            if kind != "npz":
                raise UserError(f"--save_as: no {kind} can be made of {job.shape[2]} channels; npz takes any number")
    with disk(folder), blaming("--out_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        manifest = agree(folder, manifest_of(job), overwrite)
    work = _Run(draw, job, processes, folder, manifest, trace)
    try:
        return work.run()
    except KeyboardInterrupt:
        raise StopWith(errors.INTERRUPTED, work.interrupted()) from None


class _DrawnElsewhere(Exception):
    """Another process has finished the images that this one is drawing."""


class _Run:
    """The work of one process on a job."""

    def __init__(
        self, draw: Draw, job: Job, processes: Processes, folder: Path, manifest: Manifest, trace: Trace | None
    ) -> None:
        self.draw, self.job, self.processes, self.folder, self.manifest = draw, job, processes, folder, manifest
        self.store = Store(folder, manifest, job.count)
        self.claims = Claims(folder / "claims")
        self.outputs = Outputs(self.store, job, trace)
        self.started = time.monotonic()

    def run(self) -> list[Path]:
        with disk(self.folder):
            there = self.job.count - self._missing()
            if not self.outputs.missing():
                self._tidy()
                if self.processes.is_main:
                    print(f"{self._summary()}: complete already{self.job.note}")
                return self.outputs.paths()
        if there and self.processes.is_main:
            print(f"{there} of {self.job.count} images are there already, in {self.folder}", flush=True)
        while True:
            if self._missing():
                self._draw_missing(there)
            try:
                with disk(self.folder):
                    return self._finish(there)
            except DamagedFile as damaged:
                self.store.discard(damaged)
                print(damaged, flush=True)

    def interrupted(self) -> str:
        """The sentence on what Ctrl-C has left."""
        there = self.job.count - self._missing()
        kept = f"{there} of {self.job.count} images are kept in {self.folder}" if there else "no images were drawn yet"
        return f"stopped by Ctrl-C; {kept}, and the same command {'goes on from there' if there else 'starts again'}"

    def _missing(self) -> int:
        """How many images are not on disk."""
        return sum(stop - start for start, stop in self.store.missing())

    def _check_same(self) -> None:
        with blaming("--out_dir"):
            check_same(self.folder, self.manifest)

    # --- drawing ---

    def _draw_missing(self, there: int) -> None:
        """Draw chunks until all images are on disk, drawn by this process or by others."""
        with disk(self.folder):
            for folder in (self.store.chunks, self.claims.folder):
                folder.mkdir(exist_ok=True)
        progress = Progress(
            self.job.count, there, self._missing, self.claims.folder, self.processes.rank, self.processes.is_main
        )
        with Writer(self.store) as writer, progress:
            while True:
                with disk(self.folder):
                    self._check_same()
                    # These are read before the list of chunks: work that leaves them by then is in a chunk.
                    held, unwritten = self.claims.held(), writer.wait(most=2)
                    missing = self.store.missing()
                    if not missing:
                        return
                    todo = [chunk for chunk in split(missing, self.store.chunk_size) if chunk not in unwritten]
                    if not todo:
                        writer.wait(most=0)
                        continue
                    chunk, claim = self._choose(todo, held)
                    if claim is not None and self.store.path(chunk).exists():  # it was finished in the meantime
                        claim.release()
                        claim = None
                if claim is not None:
                    self._draw_chunk(chunk, claim, writer, progress)

    def _choose(self, todo: list[Range], held: Mapping[str, Held]) -> tuple[Range, Claim | None]:
        """The chunk to draw next, and the claim on it, which is None if another process claimed it first.

        Unclaimed chunks come first, and each process starts at a different one. After those come the chunks that the
        fewest processes are drawing.
        """
        begin = len(todo) * self.processes.rank // max(self.processes.world_size, 1)
        todo = [*todo[begin:], *todo[:begin]]
        claims = {chunk: held.get(chunk.name, Held()) for chunk in todo}
        free = [chunk for chunk in todo if claims[chunk].abandoned]
        chunk = free[0] if free else min(todo, key=lambda chunk: claims[chunk].generation)
        return chunk, self.claims.take(chunk.name, claims[chunk].generation + 1)

    def _draw_chunk(self, chunk: Range, claim: Claim, writer: Writer, progress: Progress) -> None:
        def on_progress(images: float) -> None:
            if progress.add(images):
                writer.wait(most=2)  # raises an error from writing as early as possible
                if self.store.path(chunk).exists() or not claim.path.exists():
                    raise _DrawnElsewhere

        try:
            drawn = self.draw(np.arange(chunk.start, chunk.stop), on_progress)
            _check(drawn, chunk, self.job)
        except BaseException as error:
            claim.release()
            if not isinstance(error, _DrawnElsewhere):
                raise
        else:
            writer.put(chunk, drawn, claim)
        progress.settle()

    # --- making the files ---

    def _finish(self, there: int) -> list[Path]:
        """Make the output files, unless another process is making them."""
        made: list[str] = []
        lines: list[str] = []
        claim = self.claims.take_alone(f"merge-{self.outputs.key}")
        if claim is not None:
            with claim:
                self._check_same()
                made = self.outputs.missing()
                try:
                    lines = self.outputs.make(made)
                except FileNotFoundError as error:  # another process took over and has removed the chunks
                    if self.outputs.missing():
                        raise DamagedFile(Path(str(error.filename)), "it was removed") from error
                    made = []
        self._tidy()
        if made:
            seconds = time.monotonic() - self.started
            rate = f", {(self.job.count - there) / seconds:.3g} images/s" if there < self.job.count else ""
            print("\n".join([f"{self._summary()}, {seconds:.1f} s{rate}{self.job.note}", *lines]))
        else:
            merges = "merges" if claim is None else "has merged"
            print(f"process {self.processes.rank}: all images are drawn; another process {merges} them")
        return self.outputs.paths()

    def _summary(self) -> str:
        return f"{self.job.count} image{'s' * (self.job.count != 1)} in {self.outputs.places()}"

    def _tidy(self) -> None:
        """Remove files that the job no longer needs: merged chunks, claims on drawn images, partial files."""
        self.outputs.tidy()
        self.store.tidy()
        folder = self.claims.folder
        for name in files_in(folder):
            if name.endswith((STATUS, ".now")):  # versions until 0.1 wrote .now
                (folder / name).unlink(missing_ok=True)
        holes = self.store.missing()

        def is_drawn(name: str) -> bool:
            chunk = range_of(name)
            return chunk is not None and chunk.stop <= self.job.count and not chunk.overlaps(holes)

        self.claims.tidy(is_drawn)
        remove_partial_files(folder)
        with suppress(OSError):  # it contains claims
            folder.rmdir()


def _check(drawn: Images, chunk: Range, job: Job) -> None:
    count = chunk.stop - chunk.start
    assert drawn.images.shape == (count, *job.shape), (drawn.images.shape, count, job.shape)
    assert drawn.images.dtype == np.uint8, drawn.images.dtype
    if job.labelled:
        assert drawn.labels is not None
        assert drawn.labels.shape == (count,), drawn.labels.shape
        assert drawn.labels.dtype == np.int64, drawn.labels.dtype
