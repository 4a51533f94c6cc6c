"""Makes the output files of a job once all images are drawn: the formats of --save_as, a grid, a trajectory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, PngImagePlugin

from fastdiff.runtime.files import atomic_write, files_in, remove_partial_files
from fastdiff.sampling.job import exports
from fastdiff.sampling.job.chunks import Store
from fastdiff.sampling.job.manifest import Job
from fastdiff.sampling.pictures import CHANNELS, class_words, grid, index_in, save_animation, strip

Trace: TypeAlias = Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray]]
"""trace(index [n] int64) → (predictions of x_0 over the steps, noisy first, final images); each [n, H, W, C] uint8."""


class Outputs:
    """The output files of a job. A file that exists under its name is complete and is not made again.

    trace draws the trajectory; None leaves it out.
    """

    def __init__(self, store: Store, job: Job, trace: Trace | None) -> None:
        self.store, self.job, self.trace = store, job, trace
        self.base = store.folder / (f"samples_{job.count}x" + "x".join(map(str, job.shape)))
        self.images = store.folder / "images"
        self.words = class_words(list(job.class_names))
        pictures = job.shape[2] in CHANNELS
        self.grid = min(job.grid_images, job.count) if pictures else 0
        self.trajectory = min(job.trajectory, job.count) if pictures and trace is not None else 0

    @property
    def key(self) -> str:
        """A part of a file name that distinguishes these outputs from others of the same job."""
        return "-".join([str(self.job.count), *self.job.save_as, str(self.grid), str(self.trajectory)])

    def path(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    def paths(self) -> list[Path]:
        """All files, those of the formats first; for png the folder."""
        found = [path for kind in self.job.save_as for path in self._paths_of(kind)]
        if self.grid:
            found.append(self.path(".png"))
        if self.trajectory:
            found += [self.path("_steps.png"), self.path("_steps.gif")]
        return found

    def places(self) -> str:
        """Where the images are, for a message."""
        files = [self._paths_of(kind) for kind in self.job.save_as]
        return " and ".join(f"{first} to {rest[-1].name}" if rest else str(first) for first, *rest in files)

    def missing(self) -> list[str]:
        """The outputs that are still to be made: formats, "grid", "trajectory"."""
        missing = [kind for kind in self.job.save_as if not self._is_made(kind)]
        if self.grid and _label(self.path(".png")) != self._grid_label():
            missing.append("grid")
        steps = self.path("_steps.png")
        if self.trajectory and not (self.path("_steps.gif").exists() and _label(steps) == self._steps_label()):
            missing.append("trajectory")
        return missing

    def make(self, missing: list[str]) -> list[str]:
        """Make the missing outputs. Returns lines to print about the pictures."""
        lines = []
        if "npz" in missing:
            exports.write_npz(self.path(".npz"), self.store)
        if "png" in missing:
            exports.write_pngs(self.images, self.store, self.words, self._written())
        if "zip" in missing:
            exports.write_zip(self.path(".zip"), self.store, self.words)
        if "tar" in missing:
            exports.write_tars(self.base, self.store)
        if "grid" in missing:
            self._save_grid()
            lines.append(f"a grid of the first {self.grid} images in {self.path('.png')}")
        if "trajectory" in missing:
            self._save_trajectory()
            lines.append(f"trajectories of the first {self.trajectory} images in {self.path('_steps.png')} and .gif")
        return lines

    def tidy(self) -> None:
        """Remove unfinished files."""
        remove_partial_files(self.store.folder)
        remove_partial_files(self.images)

    def _paths_of(self, kind: str) -> list[Path]:
        if kind == "tar":
            return exports.shard_paths(self.base, self.job.count)
        return [self.images if kind == "png" else self.path(f".{kind}")]

    def _is_made(self, kind: str) -> bool:
        if kind == "npz":
            return any(piece.path == self.path(".npz") for piece in self.store.merged())
        if kind == "png":
            return self._written().issuperset(range(self.job.count))
        return all(path.exists() for path in self._paths_of(kind))

    def _written(self) -> set[int]:
        """Numbers of the images that have a PNG file."""
        return {index for name in files_in(self.images) if (index := index_in(name)) is not None}

    def _save_grid(self) -> None:
        """Save the first images, sorted by class; each class has rows of its own if they come out even."""
        images, labels = [], []
        for start, drawn in self.store.images():
            images.append(drawn.images)
            labels.append(np.zeros(len(drawn.images)) if drawn.labels is None else drawn.labels)
            if start + len(drawn.images) >= self.grid:
                break
        order = np.argsort(np.concatenate(labels)[: self.grid], kind="stable")
        classes = self.job.grid_classes
        per_class = self.grid // classes if classes and self.grid % classes == 0 else None
        self._save_png(".png", grid(np.concatenate(images)[order], columns=per_class), self._grid_label())

    def _save_trajectory(self) -> None:
        assert self.trace is not None
        frames, final = self.trace(np.arange(self.trajectory))
        with atomic_write(self.path("_steps.gif"), sync=False) as file:
            save_animation(file, frames, final)
        # The strip comes last, because its label says that both files are complete.
        self._save_png("_steps.png", strip(frames, final), self._steps_label())

    def _save_png(self, ending: str, image: Image.Image, label: str) -> None:
        about = PngImagePlugin.PngInfo()
        about.add_text("shows", label)
        with atomic_write(self.path(ending), sync=False) as file:
            image.save(file, format="PNG", pnginfo=about)

    def _grid_label(self) -> str:
        return f"{self.grid} images, {self.job.grid_classes} classes"

    def _steps_label(self) -> str:
        return f"{self.trajectory} images over the steps"


def _label(path: Path) -> str | None:
    """The label that _save_png wrote into a picture; None if there is no picture."""
    try:
        with Image.open(path) as image:
            return image.info.get("shows")
    except OSError:
        return None
