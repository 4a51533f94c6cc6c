"""Reports a run's progress: a progress bar, log.txt, progress.csv and TensorBoard curves."""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fastdiff.errors import UserError
from fastdiff.runtime.files import remove_partial_files, sync_path, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


SHOWN = ("loss", "mse", "vb", "acc@1", "acc@5", "val_loss", "val_acc@1", "val_acc@5", "grad_norm")
"""The metrics in lines of the log."""


class Reporter:
    """Writes a run's metrics into its folder and shows progress; without a folder, as on ranks other than 0, nothing.

    progress.csv is kept when a run resumes; a metric that appears later gets a new column. UserError for a file that
    can't be written.
    """

    def __init__(self, folder: Path | None, total_steps: int, first_step: int) -> None:
        self.folder, self.total_steps = folder, total_steps
        self._bar: tqdm | None = None
        self._tensorboard: SummaryWriter | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        self._csv = folder / "progress.csv"
        with self._writing("log.txt"):  # warnings of other modules go there, too
            self._log_file = logging.FileHandler(folder / "log.txt", errors="backslashreplace")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger().addHandler(self._log_file)
        try:
            self.rewind(first_step)
        except UserError as error:
            self.__exit__(UserError, error, None)
            raise

    def rewind(self, step: int) -> None:
        """Continue from `step`, without the rows after it, which will be written again."""
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        rows = [row for row in _read_rows(self._csv) if int(row["step"]) <= step]
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        with self._writing("progress.csv"):
            if rows:
                self._rewrite(rows)
            else:
                self._csv.unlink(missing_ok=True)
        with self._writing("the TensorBoard events"):
            if self._tensorboard is not None:
                self._tensorboard.close()
            self._tensorboard = SummaryWriter(str(self.folder), purge_step=step + 1)  # hides this step and later ones
        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def log(self, message: str) -> None:
        """Print a line on the screen and, with the time, into log.txt."""
        if self.folder is None:
            return
        with self._writing("log.txt"):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self._log_file.stream, flush=True)
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, total_steps: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Report the metrics of a log interval that ended with `step` steps done."""
        if self.folder is None:
            return
        with self._writing("progress.csv"):
            self._append({"step": step, **metrics})
        self._add_curves(step, metrics)
        shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
        bad = [f"skipped {metrics['skipped_steps']:.0f}"] if metrics.get("skipped_steps") else []
        rate = metrics.get("images_per_second")
        pace = [] if rate is None else [f"{rate:.4g} images/s", f"ETA {_duration(seconds_left)}"]
        self.log("  ".join([f"step {step}/{total_steps}", *shown, *bad, *pace]))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the row of `step`, which is the last one or is not there yet, and to the curves."""
        if self.folder is None or not metrics:
            return
        with self._writing("progress.csv"):
            rows = _read_rows(self._csv)
            if rows and int(rows[-1]["step"]) == step:
                rows[-1] |= _texts(metrics)
                self._columns = list(dict.fromkeys([*self._columns, *metrics]))
                self._rewrite(rows)
            else:
                self._append({"step": step, **metrics})
        self._add_curves(step, metrics)

    def lacks(self, step: int, metrics: Collection[str]) -> bool:
        """Whether the row of `step` lacks one of these metrics; False without a folder."""
        if self.folder is None:
            return False
        found = {name for row in _read_rows(self._csv) if int(row["step"]) == step for name in row}
        return not found.issuperset(metrics)

    def _add_curves(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._writing("the TensorBoard events"):
            for name, value in metrics.items():
                if self._tensorboard is not None and math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """Add an [H, W, C] uint8 picture to TensorBoard."""
        if self._tensorboard is not None:
            with self._writing("the TensorBoard events"):
                self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        """Wait until progress.csv and log.txt are on disk."""
        if self.folder is None:
            return
        with self._writing("progress.csv"):
            for path in (self._csv, self.folder / "log.txt"):
                if path.is_file():
                    sync_path(path)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"--run_dir: {what} in {self.folder} can't be written ({reason})") from error

    def _append(self, row: dict[str, float]) -> None:
        fresh = [name for name in row if name not in self._columns]
        if fresh:  # new columns: rewrite the file
            rows = _read_rows(self._csv)
            self._columns += fresh
            self._rewrite(rows)
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(_texts(row))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._csv, table.getvalue())

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        with suppress(OSError) if error else self._writing("the TensorBoard events"):
            if self._tensorboard is not None:
                self._tensorboard.close()
        if self.folder is not None:
            logging.getLogger().removeHandler(self._log_file)
            with suppress(OSError) if error else self._writing("log.txt"):
                self._log_file.close()


def _texts(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.10g}" for name, value in metrics.items()}


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of progress.csv, except a last one that a crash cut off."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode(errors="replace").replace("\0", "")
    whole = text[: text.rfind("\n") + 1]
    try:
        rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(io.StringIO(whole, newline=""))]
    except csv.Error as error:
        raise UserError(f"--run_dir: {path} is no table of a run ({error}); move it away") from error
    return [row for row in rows if row.get("step", "").isdecimal() and len(row["step"]) < 19]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{seconds:02d}"
