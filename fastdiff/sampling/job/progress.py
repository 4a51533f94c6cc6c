"""Shows how many images of a job are done, counted over all its processes from the files in its folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from fastdiff.runtime.files import ProcessId, files_in, write_json

STATUS = ".status"
LOOK = 1.0
"""Seconds between checks of the folder."""
LINE = 30.0
"""Seconds between lines in a log."""


class Progress:
    """Shows a progress bar on a terminal, or lines in a log. Every process writes a status file for it.

    count    number of images of the job.
    there    number of images that existed when this process started.
    missing  returns how many images are not on disk yet.
    shows    whether this process shows the progress.
    """

    def __init__(self, count: int, there: int, missing: Callable[[], int], folder: Path, rank: int, shows: bool):
        self.count, self.there, self.missing, self.folder, self.rank = count, there, missing, folder, rank
        self._shows = shows
        self._own = 0.0  # images drawn by this process
        self._unfinished = 0.0  # those of them that are in no file yet
        self._started = self._looked = self._printed = time.monotonic()
        self._status = folder / f"{ProcessId.own().tag}{STATUS}"
        self._bar = tqdm(
            total=count,
            initial=there,
            unit="image",
            dynamic_ncols=True,
            disable=not shows or not sys.stderr.isatty(),
            bar_format="{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def add(self, images: float) -> bool:
        """Count more drawn images. Returns True about once a second, when the caller may check the folder, too."""
        self._own += images
        self._unfinished += images
        now = time.monotonic()
        if now - self._looked < LOOK:
            return False
        self._looked = now
        with suppress(OSError):  # a status that can't be written is no reason to end a job
            status = {"rank": self.rank, "rate": self._own / (now - self._started), "unfinished": self._unfinished}
            write_json(self._status, status, sync=False)
        if self._shows:
            self._show(now)
        return True

    def settle(self) -> None:
        """Note that all images drawn so far were passed to the writer or discarded."""
        self._unfinished = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._status.unlink(missing_ok=True)

    def _show(self, now: float) -> None:
        if self._bar.disable and now - self._printed < LINE:
            return
        statuses = self._statuses()
        on_disk = self.count - self.missing()
        done = min(on_disk + sum(unfinished for _, _, unfinished in statuses), self.count)
        rates = ""
        if len(statuses) > 1:
            rates = "process " + ", ".join(f"{rank}: {rate:.3g}/s" for rank, rate, _ in statuses)
        if not self._bar.disable:
            self._bar.n = done
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.refresh()
            return
        self._printed = now
        rate = (done - self.there) / (now - self._started)
        left = f", {round((self.count - done) / rate)} s left" if rate > 0 else ""
        rates = rates and f" ({rates})"
        print(f"{done:.1f} of {self.count} images, {rate:.3g} images/s{left}{rates}", flush=True)

    def _statuses(self) -> list[tuple[int, float, float]]:
        """(rank, images/s, images in no file yet) of every process that has a status file."""
        found = []
        for name in files_in(self.folder):
            if name.endswith(STATUS) and not name.startswith("."):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    status = json.loads((self.folder / name).read_text())
                    found.append((int(status["rank"]), float(status["rate"]), float(status["unfinished"])))
        return sorted(found)
