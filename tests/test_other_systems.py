"""Loading and drawing need nothing that Windows or macOS lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT
from helpers.tiny import pictures, save, super_res, unet

PROGRAM = """
import os, signal, sys
import torch  # its files for this system need some of what is removed
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "triton", "deepspeed", "nvidia", "lmdb"):
    sys.modules[name] = None  # importing it raises ImportError
for module, names in {
    os: ("sched_getaffinity", "O_NONBLOCK", "O_CLOEXEC", "fork", "register_at_fork", "getuid", "geteuid",
         "getloadavg", "killpg", "setsid", "mkfifo", "wait3", "wait4"),
    signal: ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "pthread_sigmask", "setitimer", "alarm", "pause"),
}.items():
    for name in names:
        delattr(module, name) if hasattr(module, name) else None
"""
DRAW = """
import numpy as np
import fastdiff
model = fastdiff.load(sys.argv[1])
assert model.device.type == "cpu"
images = model.sample(2, steps=2)
images.save("a.npz"), images.save("a.png")
assert np.load("a.npz")["arr_0"].shape == (2, 8, 8, 3)
assert model.encode(images.images, steps=2).shape == (2, 3, 8, 8)
assert fastdiff.load(sys.argv[2]).enlarge(images.images, steps=2).images.shape == (2, 16, 16, 3)
"""
SCRIPTS = """
from fastdiff import sample, super_res_sample, nll
from fastdiff.runtime.script import run_script
def main():
    sample.main(["--model_path", sys.argv[1], "--num_samples", "2", "--steps", "2", "--out_dir", "o"])
    super_res_sample.main(
        ["--model_path", sys.argv[2], "--base_samples", "o/samples_2x8x8x3.npz", "--steps", "2", "--out_dir", "large"])
    nll.main(["--model_path", sys.argv[1], "--data_dir", "pictures", "--out_dir", "scores"])
run_script(main, "sample.py")
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(save(unet(), folder / "small.pt")), str(save(super_res(), folder / "large.pt"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM + program, *paths]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_python(tmp_path: Path) -> None:
    done = run(DRAW, tmp_path)
    assert done.returncode == 0, done.stderr


def test_scripts(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", ["a", "b"])
    done = run(SCRIPTS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large" / "samples_2x16x16x3.npz").is_file()
    assert (tmp_path / "scores" / "vb_terms.npz").is_file()
