"""What is made of a job's images once all are there: the files asked for, a picture grid, a trajectory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, PngImagePlugin

from fastdiff.runtime.files import atomic_write, files_in, remove_partial_files
from fastdiff.sampling.job import exports
from fastdiff.sampling.job.exports import Source
from fastdiff.sampling.pictures import grid, save_animation, strip

Trace: TypeAlias = Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray]]
"""trace(index [n] int64) → (predictions of x_0 over the steps, noisy first, final images); each [n, H, W, C] uint8."""


class Outputs:
    """The files of a job of `count` images. Each is whole when it has its name, so those that are there stay.

    formats     of npz, png, zip, tar.
    grid        images in the picture grid; grid_classes > 0: in rows by class, so many classes.
    trajectory  images whose way is shown, by trace.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        shape: tuple[int, int, int],
        formats: tuple[str, ...],
        class_names: list[str],
        grid: tuple[int, int],
        trajectory: int,
    ) -> None:
        self.folder, self.count, self.formats = folder, count, formats
        self.name = f"samples_{count}x" + "x".join(map(str, shape))
        self.images = folder / "images"
        self.words = exports.class_words(class_names)
        self.grid_images, self.grid_classes = min(grid[0], count), grid[1]
        self.trajectory = min(trajectory, count)

    @property
    def key(self) -> str:
        """What is made, as a part of a file's name."""
        return "-".join([str(self.count), *self.formats, str(self.grid_images), str(self.trajectory)])

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.name}{ending}"

    def main(self) -> dict[str, str]:
        """Format → where its images are, in words."""
        places = {"npz": str(self.path(".npz")), "zip": str(self.path(".zip")), "png": str(self.images)}
        shards = exports.shard_paths(self.path(""), self.count)
        places["tar"] = str(shards[0]) if len(shards) == 1 else f"{shards[0]} to {shards[-1].name}"
        return {kind: places[kind] for kind in self.formats}

    def paths(self) -> list[Path]:
        """All files, those of the formats first; for png the folder."""
        found: list[Path] = []
        for kind in self.formats:
            if kind == "tar":
                found += exports.shard_paths(self.path(""), self.count)
            else:
                found.append(self.images if kind == "png" else self.path(f".{kind}"))
        if self.grid_images:
            found.append(self.path(".png"))
        if self.trajectory:
            found += [self.path("_steps.png"), self.path("_steps.gif")]
        return found

    def missing(self, npz: bool) -> list[str]:
        """What is still to be made: formats, grid, trajectory. npz: whether that is there, and sound."""
        there = {
            "npz": lambda: npz,
            "zip": lambda: self.path(".zip").exists(),
            "tar": lambda: all(path.exists() for path in exports.shard_paths(self.path(""), self.count)),
            "png": lambda: self.count <= len(self._written()) and self._written().issuperset(range(self.count)),
        }
        missing = [kind for kind in self.formats if not there[kind]()]
        if self.grid_images and _label(self.path(".png")) != self._grid_label():
            missing.append("grid")
        steps = self.path("_steps.png")
        if self.trajectory and not (self.path("_steps.gif").exists() and _label(steps) == self._steps_label()):
            missing.append("trajectory")
        return missing

    def make(self, missing: list[str], source: Source, trace: Trace | None) -> list[str]:
        """Make what is missing. Returns lines about the pictures."""
        lines = []
        if "npz" in missing:
            exports.write_npz(self.path(".npz"), source)
        if "png" in missing:
            exports.write_pngs(self.images, source, self.words, self._written())
        if "zip" in missing:
            exports.write_zip(self.path(".zip"), source, self.words)
        if "tar" in missing:
            exports.write_tars(self.path(""), source)
        if "grid" in missing:
            self._save_grid(source)
            lines.append(f"the first {self.grid_images} as a picture in {self.path('.png')}")
        if "trajectory" in missing and trace is not None:
            frames, final = trace(np.arange(self.trajectory))
            with atomic_write(self.path("_steps.gif"), sync=False) as file:
                save_animation(file, frames, final)
            self._save_png("_steps.png", strip(frames, final), self._steps_label())  # last: it says what they show
            lines.append(f"the way of the first {self.trajectory} in {self.path('_steps.png')} and .gif")
        return lines

    def tidy(self) -> None:
        """Remove unfinished files."""
        remove_partial_files(self.folder)
        remove_partial_files(self.images)

    def _written(self) -> set[int]:
        return {index for name in files_in(self.images) if (index := exports.index_in(name)) is not None}

    def _save_grid(self, source: Source) -> None:
        """The first images; by class, a row (or several) each, when the classes were chosen."""
        images, labels = [], []
        for start, drawn in source.images(0):
            images.append(drawn.images[: self.grid_images - start])
            labels.append(np.zeros(len(drawn.images)) if drawn.labels is None else drawn.labels)
            if start + len(drawn.images) >= self.grid_images:
                break
        order = np.argsort(np.concatenate(labels)[: self.grid_images], kind="stable")
        classes = self.grid_classes
        per_class = self.grid_images // classes if classes and self.grid_images % classes == 0 else None
        self._save_png(".png", grid(np.concatenate(images)[order], columns=per_class), self._grid_label())

    def _save_png(self, ending: str, image: Image.Image, label: str) -> None:
        about = PngImagePlugin.PngInfo()
        about.add_text("shows", label)
        with atomic_write(self.path(ending), sync=False) as file:
            image.save(file, format="PNG", pnginfo=about)

    def _grid_label(self) -> str:
        return f"{self.grid_images} images, {self.grid_classes} classes"

    def _steps_label(self) -> str:
        return f"{self.trajectory} images over the steps"


def _label(path: Path) -> str | None:
    """What a picture of ours says that it shows; None when there is none."""
    try:
        with Image.open(path) as image:
            return image.info.get("shows")
    except OSError:
        return None
