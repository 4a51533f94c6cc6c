"""What keeps a non-finite loss or gradient out of the weights, and counts the steps that were skipped for one."""

from __future__ import annotations

import torch
from torch import Tensor


def guarded(loss: Tensor) -> Tensor:
    """The loss, whose gradients are NaN throughout where it is not finite itself.

    So whoever looks at gradients sees every bad loss: of any micro-batch, and once they are summed of any rank.
    """
    return loss * (1 + 0 * loss.detach())


class Skips:
    """Counts skipped steps on the device; only `read` waits for it.

    counts  [2] int64: skipped steps, and how many there were in a row up to now. A step in which fp16's loss scale
            could still fall is a part of the search for it, not a sign of divergence: it is skipped, but neither adds
            to the row nor ends it.
    known   the same on the host: of now on a CPU, of a step or two ago on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.known = (0, 0)
        self._pinned = torch.zeros(2, dtype=torch.int64, pin_memory=True) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def note(self, bad: Tensor, searching: Tensor | None = None) -> None:
        """After a step: whether it was skipped, and whether the loss scale fell in it, bool scalars on the device."""
        adds = bad if searching is None else bad & ~searching
        self.counts.copy_(torch.stack([self.counts[0] + bad, (self.counts[1] + adds) * bad]))

    def publish(self) -> None:
        """Send the counts to the host, unless those sent before are still on their way."""
        if self._pinned is None or (self._copied is not None and not self._copied.query()):
            return
        self.poll()
        self._pinned.copy_(self.counts, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def poll(self) -> tuple[int, int]:
        """`known`, as new as it can be without waiting for a GPU."""
        if self._pinned is None:
            return self.read()
        if self._copied is not None and self._copied.query():
            self._copied = None
            skipped, streak = self._pinned.tolist()
            self.known = (skipped, streak)
        return self.known

    def read(self) -> tuple[int, int]:
        """`known`, as of now. Waits for the device."""
        skipped, streak = self.counts.tolist()
        self.known, self._copied = (skipped, streak), None
        return self.known

    def set(self, skipped: int, streak: int) -> None:
        """Take up counts of another run."""
        self.counts.copy_(torch.tensor([skipped, streak]))
        self.known, self._copied = (skipped, streak), None
