"""torchrun restarts a run whose rank died, deepspeed passes on the code of a stopped one, and Ctrl-C saves once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tiny
from helpers.pictures_folder import make_pictures

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--log_level", "error"],
}
FLAGS = tiny.flags(
    {
        **tiny.MODEL,
        **{"diffusion_steps": 100, "noise_schedule": "cosine", "batch_size": 4, "lr": 1e-3, "loader": "pillow"},
        **{"compile": False, "log_interval": 10, "save_interval": 5},
    }
)


def start(launcher: str, folder: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    """Start training by two processes of a launcher in `folder`/run; `more` are flags for the launcher."""
    data = make_pictures(folder / "pictures")
    script = [str(ROOT / "fastdiff" / "train.py"), *FLAGS, "--max_steps", str(steps)]
    return subprocess.Popen(
        [*LAUNCHERS[launcher], *more, *script, "--data_dir", str(data), "--run_dir", str(folder / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})},
        start_new_session=True,
    )


def pid_of(rank: int, process: subprocess.Popen[str], folder: Path, step: int) -> int:
    """Wait for the checkpoint of a step, and return the process number of a rank."""
    until = time.monotonic() + 200
    while not (folder / "run" / "checkpoints" / f"step_{step:06d}").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            mine = str(folder / "run").encode() in (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and f"RANK={rank}".encode() in words:
            return int(entry.name)
    raise AssertionError(f"no rank {rank}")


def test_torchrun_restarts_after_a_death(tmp_path: Path) -> None:
    process = start("torchrun", tmp_path, 200, "--max_restarts", "2")
    os.kill(pid_of(1, process, tmp_path, 10), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "is gone without a word" in said
    assert "resuming from" in said
    assert said.rstrip().splitlines()[-1].startswith("done: 200 steps")


def test_deepspeed_exits_with_75_after_a_signal_to_a_rank(tmp_path: Path) -> None:
    process = start("deepspeed", tmp_path, 4000)
    os.kill(pid_of(1, process, tmp_path, 5), signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_in_the_terminal(launcher: str, tmp_path: Path) -> None:
    """Launcher and ranks get SIGINT together, and the launcher sends more signals after it: all ranks save one step."""
    process = start(launcher, tmp_path, 4000)
    pid_of(1, process, tmp_path, 5)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 130), said
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{status['step']:06d}"
    assert said.count("a second Ctrl-C ends the run at once") <= 1  # a busy machine may have saved before it is said
    assert said.count(f"stopped by Ctrl-C after step {status['step']}; everything is saved") == 1
    assert "ended at once" not in said
