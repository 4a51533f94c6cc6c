"""fp16's dynamic loss scale on the device, by DeepSpeed's rule and names, so that checkpoints go both ways."""

from __future__ import annotations

import torch
from torch import Tensor


class LossScale:
    """Halves when gradients overflow, doubles after every `window` steps without. Nothing here waits for the device.

    cur_scale            float32 scalar, at first 2^20 (improved-diffusion's).
    cur_iter             int64 scalar, updates so far, skipped ones too.
    last_overflow_iter   int64 scalar, -1 at first.
    """

    NAMES = ("cur_scale", "cur_iter", "last_overflow_iter")

    def __init__(self, window: int, device: torch.device) -> None:
        self.window = window
        self.cur_scale = torch.full((), 2.0**20, device=device)
        self.cur_iter = torch.zeros((), dtype=torch.int64, device=device)
        self.last_overflow_iter = torch.full((), -1, dtype=torch.int64, device=device)

    def update(self, found_inf: Tensor) -> None:
        """After a step: found_inf is a scalar on the device, not 0 where gradients overflowed."""
        overflow = found_inf != 0
        quiet = self.cur_iter - self.last_overflow_iter - 1
        grows = (quiet > 0) & (quiet % self.window == 0)
        raised = torch.where(grows, 2 * self.cur_scale, self.cur_scale)
        self.cur_scale.copy_(torch.where(overflow, (self.cur_scale / 2).clamp(min=1.0), raised))
        self.last_overflow_iter.copy_(torch.where(overflow, self.cur_iter, self.last_overflow_iter))
        self.cur_iter += 1

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name).item() for name in self.NAMES}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in self.NAMES:
            if name in state:
                getattr(self, name).fill_(state[name])
