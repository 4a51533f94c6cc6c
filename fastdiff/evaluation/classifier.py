"""A small classifier of the user's own labelled images, whose features stand in for Inception's.

Inception knows photographs of ImageNet's classes. For drawings, digits, spectrograms or microscopy a classifier of the
images themselves tells more, at the price that its distances can be compared with each other only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.runtime.files import atomic_write
from fastdiff.runtime.untrusted import read

FEATURES = 64
_KIND = "fastdiff classifier"


class Classifier(nn.Module):
    """Convolutions down to 4 pixels, a layer of FEATURES features, and a layer of classes."""

    def __init__(self, channels: int, size_hw: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.channels, self.size_hw = channels, size_hw
        layers: list[nn.Module] = []
        width, size = channels, min(size_hw)
        while size > 4 or not layers:
            wider = 32 if not layers else 64
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if size > 4 else []
            width, size = wider, size // 2
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.penultimate = nn.Sequential(nn.Linear(16 * width, FEATURES), nn.ReLU())
        self.last = nn.Linear(FEATURES, classes)

    @staticmethod
    def scaled(images: Tensor) -> Tensor:
        """The network's input [N, C, H, W] float32 in [-1, 1] of images [N, C, H, W] uint8."""
        return images.float() / 127.5 - 1

    def features(self, x: Tensor) -> Tensor:
        """[N, FEATURES] of images [N, C, H, W] in [-1, 1]."""
        return self.penultimate(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W] in [-1, 1]."""
        return self.last(self.features(x))


def train_classifier(
    images: np.ndarray, labels: np.ndarray, classes: int, device: torch.device, seconds: float = 60, steps: int = 1500
) -> Classifier:
    """Train a classifier from a fixed seed for `steps` batches of 64 images, each batch shifted by up to a pixel.

    images are [N, H, W, C] uint8, labels [N] int64. Training ends early after `seconds` seconds.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(images.shape[3], (images.shape[1], images.shape[2]), classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    x = F.pad(Classifier.scaled(torch.from_numpy(images).to(device).permute(0, 3, 1, 2)), (1, 1, 1, 1), value=-1)
    y = torch.from_numpy(labels).to(device)
    height, width = images.shape[1:3]
    start = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator).to(device)
        down, right = torch.randint(3, (2,), generator=generator).tolist()
        loss = F.cross_entropy(model(x[chosen, :, down : down + height, right : right + width]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if time.perf_counter() - start > seconds:
            break
    return model.eval()


def write_classifier(model: Classifier, path: Path) -> None:
    """Write the network into a file that `read_classifier` reads."""
    shape = {"channels": model.channels, "size_hw": list(model.size_hw), "classes": model.last.out_features}
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"kind": _KIND, **shape, "state": state}, file)


def _content(path: Path) -> dict[str, Any]:
    content = read(path)
    return content if isinstance(content, dict) and content.get("kind") == _KIND else {}


def is_classifier(path: Path) -> bool:
    """Whether a file was written by `write_classifier`."""
    try:
        return bool(_content(path))
    except UserError:  # TorchScript is a zip with code, for example
        return False


def read_classifier(path: Path) -> Classifier:
    """Read a file of `write_classifier`. Raises UserError for a damaged one."""
    content = _content(path)
    try:
        height, width = content["size_hw"]
        model = Classifier(int(content["channels"]), (int(height), int(width)), int(content["classes"]))
        model.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        raise UserError(f"{path} is no classifier of --train_features, or is damaged") from None
    return model
