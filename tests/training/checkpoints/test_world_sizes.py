"""A run can be resumed with another number of processes (1, 2, 3, 1) and another ZeRO stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import HELPERS
from helpers.pictures_folder import make_pictures
from helpers.ranks import run_ranks
from helpers.world_size_checks import BATCH

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 3, 1)
STAGES = (0, 2, 1, 3)  # with each number of processes
STEPS = 2  # with each number of processes


def go_on(data: Path, work: Path, world_size: int, steps: int, stage: int) -> None:
    program = HELPERS / "world_size_checks.py"
    run_ranks([str(word) for word in (program, data, work, steps, stage)], world_size)


def test_one_two_three_one(tmp_path: Path) -> None:
    data, work, straight = make_pictures(tmp_path / "data"), tmp_path / "work", tmp_path / "straight"
    count = len(list(data.iterdir()))
    work.mkdir()
    straight.mkdir()
    for world_size, stage in zip(WORLDS, STAGES, strict=True):
        go_on(data, work, world_size, STEPS, stage)
    go_on(data, straight, 1, STEPS * len(WORLDS), 0)
    ends = [STEPS * (i + 1) for i in range(len(WORLDS))]
    reports = [torch.load(work / f"report_{end}.pt", weights_only=True) for end in ends]
    assert [report["world_size"] for report in reports] == list(WORLDS)
    # The loaded weights, averages, moments and loss history are those of the checkpoint.
    assert [report["wrong"] for report in reports] == [[]] * len(WORLDS)

    # The stream of images continues: each comes once per epoch, in the order of a run with one process throughout.
    seen = [entry for file in sorted(work.glob("seen_*.pt")) for entry in torch.load(file, weights_only=True)]
    seen.sort(key=lambda entry: entry[0])
    assert [position for position, *_ in seen] == list(range(BATCH * STEPS * len(WORLDS)))
    shown = [(label, bytes(pixels.numpy())) for _, label, pixels in seen]
    flips = {image: min(image, _mirrored(image)) for _, image in shown}
    for start in range(0, len(shown) - count + 1, count):
        epoch = Counter(flips[image] for _, image in shown[start : start + count])
        assert set(epoch.values()) == {1}, start
        assert len(epoch) == count
    (alone,) = straight.glob("seen_*.pt")
    whole = torch.load(alone, weights_only=True)
    assert all(torch.equal(a[2], b[2]) and a[:2] == b[:2] for a, b in zip(seen, whole, strict=True))

    # Each rank has its own dropout masks, so losses agree only roughly, but exactly in the two steps of one process.
    losses = [loss for report in reports for loss in report["losses"]]
    straight_losses = torch.load(straight / f"report_{ends[-1]}.pt", weights_only=True)["losses"]
    assert losses[:STEPS] == straight_losses[:STEPS]
    assert losses == pytest.approx(straight_losses, rel=0.1)


def _mirrored(image: bytes) -> bytes:
    return bytes(torch.frombuffer(bytearray(image), dtype=torch.uint8).view(8, 8, 3).flip(1).flatten().numpy())
