"""Loading and drawing leave the process of the program that uses fastdiff as they found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.tiny import save, super_res, unet

PROGRAM = """
import json, logging, os, random, signal, sys, threading, warnings
import numpy as np
import torch
from fastdiff.errors import UserError

def state():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = [(torch.backends, "fp32_precision"), *((cudnn, name) for name in (
        "enabled", "benchmark", "benchmark_limit", "deterministic", "allow_tf32")), (cudnn.conv, "fp32_precision"),
        *((matmul, name) for name in ("allow_tf32", "fp32_precision", "allow_bf16_reduced_precision_reduction"))]
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "switches": [str(getattr(*each)) for each in switches],
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory],
        "products": torch.get_float32_matmul_precision(),
        "default": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")],
        "random": [torch.get_rng_state().tolist(), str(random.getstate()), str(np.random.get_state())],
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "logging": [str(logging.root.handlers), logging.root.level, logging.root.disabled],
        "path": sys.path[:],
        "streams": [id(sys.stdout), id(sys.stderr), id(sys.excepthook), id(threading.excepthook)],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": [str(each) for each in warnings.filters],
        "numpy": [np.geterr(), np.get_printoptions()["precision"]],
    }

import fastdiff
fastdiff.load, fastdiff.Model
import fastdiff.sampling.sampler
kind, path, large = sys.argv[1:]
if kind == "changed":
    torch.set_num_threads(2)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 3
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.manual_seed(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
before, modules = state(), dict(sys.modules)

def check(name):
    after = state()
    for key in before:
        assert after[key] == before[key], (name, key, before[key], after[key])
    assert all(sys.modules.get(each) is module for each, module in modules.items()), name

def refused(call):
    try:
        call()
    except UserError:
        return
    raise AssertionError("no error")

model = fastdiff.load(path, device="cpu")
check("load")
drawn = model.sample(2, steps=2).images
check("sample")
model.encode(drawn, steps=2)
check("encode")
fastdiff.load(large, device="cpu").enlarge(drawn, steps=2)
check("enlarge")
refused(lambda: fastdiff.load(path, preset="nonsense", device="cpu"))
refused(lambda: fastdiff.load(path, kernels="nonsense", device="cpu"))
refused(lambda: model.sample(2, steps=10**9))
refused(lambda: model.encode(drawn, steps=10**9))
refused(lambda: model.sample(2, eta=7))
check("errors")
again = fastdiff.load(path, device="cpu").sample(2, steps=2).images
print(json.dumps([drawn.tolist(), again.tolist()]))
"""


@pytest.mark.parametrize("kind", ["as it was", "changed"])
def test_the_process_is_left_as_it_was(kind: str, tmp_path: Path) -> None:
    """Whatever the program has set beforehand, and the images are the same."""
    paths = [str(save(unet(), tmp_path / "small.pt")), str(save(super_res(), tmp_path / "large.pt"))]
    results = []
    for program in ("as it was", kind):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-c", PROGRAM, program, *paths]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        results += json.loads(done.stdout)
    assert all(images == results[0] for images in results)
