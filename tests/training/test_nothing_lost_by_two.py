"""Two ranks that wait for one of them, go back together, and see the same checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pictures_folder import make_pictures
from training.test_nothing_lost import status_of, steps_of
from training.test_train_scripts import flags

from fastdiff import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


WITH_SHORT_POLLS = """
import sys
from fastdiff import train
from fastdiff.training import loop
may_draw_on = loop.Loop._may_draw_on

def counted(self):
    began = self.last_poll
    go_on = may_draw_on(self)
    if self.last_poll != began:
        print("a poll", flush=True)
    return go_on

loop.POLL, loop.Loop._may_draw_on = 0.0, counted
train.main(sys.argv[1:])
"""


def by_two(code: str, folder: Path, argv: list[str]) -> str:
    """What two processes say that run the code, with these arguments."""
    script = folder / "script.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parents[1])}
    done = subprocess.run([*launcher, *argv], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    """Numbers that stay bad on one rank; and a rank that sees the checkpoint later than the other."""
    more = ("--save_interval", "2", "--max_bad_steps", "3", "--keep_last", "1", "--log_interval", "1")
    out = by_two(LAGGING_AND_BAD, tmp_path, flags(data, tmp_path / "run", "--max_steps", "12", *more))
    assert len(re.findall(r"[34] steps in a row had a non-finite loss or gradient", out)) == 1
    assert "step_000004, to continue with other images" in out
    assert status_of(tmp_path / "run") == ("done", 12, 0)
    assert steps_of(tmp_path / "run") == [12]
    by_two(LAGGING_AND_BAD, tmp_path, flags(data, tmp_path / "run", "--max_steps", "14", *more))
    assert status_of(tmp_path / "run") == ("done", 14, 0)
