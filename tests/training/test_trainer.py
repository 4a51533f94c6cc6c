"""The trainer's handling of images."""

from __future__ import annotations

import torch

from fastdiff.training.trainer import low_res_of


def test_small_images_are_means_of_blocks() -> None:
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(low_res_of(x, (4, 6)), x.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5)))
