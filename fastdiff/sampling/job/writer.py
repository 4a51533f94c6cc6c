"""Writing what is drawn while more is drawn, and what becomes of the file system's errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff.sampling.drawn import Drawn
from fastdiff.sampling.job.chunks import Range, Store
from fastdiff.sampling.job.claims import Claim
from fastdiff.settings import UserError


class Writer:
    """Writes parts while the next are drawn, and ends their claims; at most two wait."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque[tuple[Range, Claim, Future[None]]] = deque()

    def put(self, part: Range, drawn: Drawn, claim: Claim) -> None:
        self.waiting.append((part, claim, self.pool.submit(self._write, part, drawn, claim)))
        while len(self.waiting) > 2:
            self._first()
        self.check()

    def pending(self) -> set[Range]:
        """Parts that are not known to be written."""
        return {part for part, _, future in self.waiting if not future.done()}

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        while self.waiting and self.waiting[0][2].done():
            self._first()

    def wait(self) -> None:
        while self.waiting:
            self._first()

    def _first(self) -> None:
        with disk(self.folder):
            self.waiting.popleft()[2].result()

    def _write(self, part: Range, drawn: Drawn, claim: Claim) -> None:
        try:
            self.store.write(part, drawn)
        finally:
            claim.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.pool.shutdown(wait=True)  # what is drawn is worth its file, whatever has happened
        if error is None:
            self.wait()


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """An error of the file system becomes one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--out_dir: {folder} can't be written to or read ({reason}); the images that are in it are kept, and the "
            "same command goes on with them"
        ) from error
