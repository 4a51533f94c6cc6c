"""What launchers make of a rank that dies, and of one that is asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny
from training.pictures_folder import make_pictures

ROOT = Path(__file__).resolve().parents[2]
FLAGS = tiny.flags(
    {
        **tiny.MODEL,
        **{"diffusion_steps": 100, "noise_schedule": "cosine", "batch_size": 4, "lr": 1e-3, "loader": "pillow"},
        **{"compile": False, "log_interval": 10, "save_interval": 5},
    }
)


def start(launcher: list[str], folder: Path, steps: int) -> subprocess.Popen[str]:
    """Training by two processes of a launcher, in `folder`/run."""
    data = make_pictures(folder / "pictures")
    script = [str(ROOT / "fastdiff" / "train.py"), *FLAGS, "--max_steps", str(steps)]
    return subprocess.Popen(
        [*launcher, *script, "--data_dir", str(data), "--run_dir", str(folder / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        start_new_session=True,
    )


def signal_rank(process: subprocess.Popen[str], rank: int, number: signal.Signals, folder: Path, step: int) -> None:
    """Send a signal to a rank once there is a checkpoint of a step."""
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
            os.kill(int(entry.name), number)


def test_torchrun_starts_anew_after_a_death(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*launcher, "--max_restarts", "2"], tmp_path, 40)
    signal_rank(process, 1, signal.SIGKILL, tmp_path, 10)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "is gone without a word" in said
    assert "resuming from" in said
    assert said.rstrip().splitlines()[-1].startswith("done: 40 steps")


def test_a_signal_to_a_rank_comes_out_of_deepspeed_as_75(tmp_path: Path) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--log_level", "error"]
    process = start(launcher, tmp_path, 4000)
    signal_rank(process, 1, signal.SIGUSR1, tmp_path, 5)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
