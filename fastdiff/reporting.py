"""What a run tells its user: a progress bar, log.txt, progress.csv and TensorBoard curves."""

from __future__ import annotations

import csv
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tqdm import tqdm


class Reporter:
    """Writes a run's metrics into its folder and shows progress. On ranks other than 0, and in a dry run, it is mute.

    progress.csv is kept when a run resumes; a metric that appears later gets a column of its own.
    """

    def __init__(self, folder: Path | None, total_steps: int, first_step: int, batch_size: int) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self._bar: tqdm | None = None
        self._tensorboard = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._csv, self._log = folder / "progress.csv", (folder / "log.txt").open("a", buffering=1)
        # Rows after the checkpoint that the run resumes from will be made again.
        rows = [row for row in _read_rows(self._csv) if int(row.get("step", 0)) <= first_step]
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        if rows:
            self._rewrite(rows)
        else:
            self._csv.unlink(missing_ok=True)
        self._warnings = logging.FileHandler(folder / "log.txt")  # warnings of other modules belong in the log too
        self._warnings.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger().addHandler(self._warnings)
        self._tensorboard = SummaryWriter(str(folder), purge_step=first_step)
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, message: str) -> None:
        """A line for people, on the screen and in log.txt."""
        if self.folder is None:
            return
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, total_steps: int, metrics: Mapping[str, float], images_per_second: float) -> None:
        """The metrics of a log interval that ended with `step` steps done."""
        if self.folder is None:
            return
        row = {"step": step, **metrics}
        self._append(row)
        for name, value in metrics.items():
            if self._tensorboard is not None and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, step)
        remaining = (total_steps - step) * self.batch_size / max(images_per_second, 1e-9)
        shown = [f"{name} {metrics[name]:.4g}" for name in ("loss", "mse", "vb", "grad_norm") if name in metrics]
        pace = f"{images_per_second:.4g} images/s  ETA {_duration(remaining)}"
        self.say(f"step {step}/{total_steps}  {'  '.join(shown)}  {pace}")

    def picture(self, name: str, step: int, image) -> None:
        """An [H, W, C] uint8 picture for TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def _append(self, row: dict[str, float]) -> None:
        fresh = [name for name in row if name not in self._columns]
        if fresh:  # a new column: the file is written anew
            rows = _read_rows(self._csv)
            self._columns += fresh
            self._rewrite(rows)
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow({k: f"{v:.10g}" for k, v in row.items()})

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        partial = self._csv.with_name(".progress.csv.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self._csv)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self.folder is not None:
            logging.getLogger().removeHandler(self._warnings)
            self._warnings.close()
            self._log.close()


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{seconds:02d}"
