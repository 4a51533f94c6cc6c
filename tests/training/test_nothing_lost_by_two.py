"""Two ranks wait for the one that draws, go back together, and see the same checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.train_flags import flags
from training.test_nothing_lost import status_of, steps_of

pytestmark = pytest.mark.slow

WITH_SHORT_POLLS = """
import sys
from fastdiff import train
from fastdiff.runtime.processes import Consensus
from fastdiff.training import loop
ask, draw_preview, drawing = Consensus.any, loop.draw_preview, []

def counted(self, request):
    if drawing and request:
        print("a poll", flush=True)
    return ask(self, request)

def drawn(*given):
    drawing.append(True)
    picture = draw_preview(*given)
    drawing.clear()
    return picture

loop.POLL, loop.draw_preview, Consensus.any = 0.0, drawn, counted
train.main(sys.argv[1:])
"""


def by_two(code: str, folder: Path, argv: list[str]) -> str:
    """Run the code with these arguments in two processes, and return their output."""
    script = folder / "script.py"
    script.write_text(code)
    return run_ranks([str(script), *argv])


def test_ranks_poll_the_one_that_draws(data: Path, tmp_path: Path) -> None:
    """No collective waits for a whole picture: here rank 0 answers a poll in each of the sampler's steps."""
    more = ("--max_steps", "4", "--sample_interval", "2", "--sample_respacing", "ddim5")
    out = by_two(WITH_SHORT_POLLS, tmp_path, flags(data, tmp_path / "run", *more))
    assert out.count("a poll") == 2 * (1 + 5)  # before each of two pictures, and after each of their five steps
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["step_000002.png", "step_000004.png"]
    assert status_of(tmp_path / "run") == ("done", 4, 0)


LAGGING_AND_BAD = """
import sys
from fastdiff import train
from fastdiff.runtime.processes import current
from fastdiff.training.checkpoints import resume
from fastdiff.training.trainer import Trainer
real, find = Trainer.losses, resume.find_snapshot
looks = []

def find_snapshot(config, folder):
    looks.append(folder)
    return (None, "") if current().rank == 1 and len(looks) == 1 else find(config, folder)

def losses(self, network, batch):
    bad = self.step >= 5 and self.stream_seed == self.train.seed and self.processes.rank == 1
    result = real(self, network, batch)
    return result._replace(loss=result.loss * float("nan")) if bad else result

resume.find_snapshot, Trainer.losses = find_snapshot, losses
train.main(sys.argv[1:])
"""


def test_two_ranks_go_back_together_and_look_again(data: Path, tmp_path: Path) -> None:
    """One rank has only non-finite losses, and one sees the checkpoint later than the other."""
    more = ("--save_interval", "2", "--max_bad_steps", "3", "--keep_last", "1", "--log_interval", "1")
    out = by_two(LAGGING_AND_BAD, tmp_path, flags(data, tmp_path / "run", "--max_steps", "12", *more))
    assert len(re.findall(r"[34] steps in a row had a non-finite loss or gradient", out)) == 1
    assert "step_000004, to continue with other images" in out
    assert status_of(tmp_path / "run") == ("done", 12, 0)
    assert steps_of(tmp_path / "run") == [12]
    by_two(LAGGING_AND_BAD, tmp_path, flags(data, tmp_path / "run", "--max_steps", "14", *more))
    assert status_of(tmp_path / "run") == ("done", 14, 0)
