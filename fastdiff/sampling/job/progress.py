"""How far a job is, counted over all processes by what they leave in its folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from fastdiff.runtime.files import files_in, partial_path
from fastdiff.runtime.processes import ProcessId

STATUS = ".status"
_OFTEN = 1.0  # seconds between looks at the folder
_SELDOM = 30.0  # seconds between lines of a log


class Progress:
    """A bar on a terminal, else a line now and then, on the process that shows it; the others only tell their part.

    count    images of the job; there: those that were there when it began.
    missing  says how many images are not on disk yet.
    """

    def __init__(self, count: int, there: int, missing: Callable[[], int], folder: Path, rank: int, shows: bool):
        self.count, self.there, self.missing, self.folder, self.rank = count, there, missing, folder, rank
        self.shows = shows
        self.own = 0.0  # images drawn by this process
        self.unfinished = 0.0  # of those, what is in no file yet
        self.started = self.looked = self.spoken = time.monotonic()
        self.status = folder / f"{ProcessId.own().tag}{STATUS}"
        terminal = sys.stderr.isatty()
        self.speaks = shows and not terminal
        self.bar = tqdm(
            total=count,
            initial=there,
            unit="image",
            dynamic_ncols=True,
            disable=not shows or not terminal,
            bar_format="{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def add(self, images: float) -> bool:
        """So much more is drawn. True about once a second, when there is time to look around."""
        self.own += images
        self.unfinished += images
        now = time.monotonic()
        if now - self.looked < _OFTEN:
            return False
        self.looked = now
        self._tell(now)
        if self.shows:
            self._show(now)
        return True

    def settle(self) -> None:
        """What was drawn so far has gone to the writer, or was given up."""
        self.unfinished = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.status.unlink(missing_ok=True)

    def _tell(self, now: float) -> None:
        told = {"rank": self.rank, "rate": self.own / (now - self.started), "unfinished": self.unfinished}
        partial = partial_path(self.status)
        with suppress(OSError):  # not worth ending a job for
            partial.write_text(json.dumps(told))
            partial.replace(self.status)

    def _others(self) -> list[tuple[int, float, float]]:
        """(rank, images/s, images in no file yet) of all processes that tell, this one among them."""
        found = []
        for name in files_in(self.folder):
            if name.endswith(STATUS) and not name.startswith("."):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    told = json.loads((self.folder / name).read_text())
                    found.append((int(told["rank"]), float(told["rate"]), float(told["unfinished"])))
        return sorted(found)

    def _show(self, now: float) -> None:
        if not self.bar.disable:
            self.bar.n, processes = self._done()
            self.bar.set_postfix_str(_rates(processes), refresh=False)
            self.bar.refresh()
        elif self.speaks and now - self.spoken >= _SELDOM:  # a log file gets a line now and then instead of a bar
            self.spoken = now
            done, processes = self._done()
            rate = (done - self.there) / (now - self.started)
            left = f", {round((self.count - done) / rate)} s left" if rate > 0 else ""
            each = _rates(processes)
            print(
                f"{done:.1f} of {self.count} images, {rate:.3g} images/s{left}{f' ({each})' if each else ''}",
                flush=True,
            )

    def _done(self) -> tuple[float, list[tuple[int, float, float]]]:
        processes = self._others()
        on_disk = self.count - self.missing()
        return min(on_disk + sum(unfinished for _, _, unfinished in processes), self.count), processes


def _rates(processes: list[tuple[int, float, float]]) -> str:
    """'process 0: 3.2/s, 1: 3.1/s', or nothing for one process alone."""
    if len(processes) < 2:
        return ""
    return "process " + ", ".join(f"{rank}: {rate:.3g}/s" for rank, rate, _ in processes)
