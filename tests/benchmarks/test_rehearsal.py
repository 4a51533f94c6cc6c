"""The simulated GPU notices where a real one would make the host wait, and what a CUDA graph would refuse.

These tests run only in the environment of `make rehearse`, whose PyTorch is a CUDA build.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

pytestmark = pytest.mark.slow

HEADERS = Path(torch.__file__).parents[1] / "nvidia/cu13/include/crt"

if not torch.version.cuda or not HEADERS.is_dir() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs the environment of make rehearse", allow_module_level=True)


def run(program: str) -> str:
    """Run a Python program on the simulated GPU, and return its output."""
    head = "import torch\nfrom benchmarks.rehearsal.device import counts, events, no_waits\n"
    command = [sys.executable, str(ROOT / "benchmarks/rehearsal/run.py"), sys.executable, "-c", head + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_h100() -> None:
    made = run("print(torch.cuda.device_count(), torch.cuda.get_device_capability(), torch.cuda.get_device_name())")
    assert made == "1 (9, 0) NVIDIA H100 80GB HBM3\n"


def test_a_folder_that_cannot_be_preloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.rehearsal import run

    monkeypatch.setattr(run, "PLACE", tmp_path / "a b")
    with pytest.raises(SystemExit, match="takes no spaces and colons, as in .*/a b/gpu; move the checkout"):
        run.build()


def test_launches_are_counted() -> None:
    """A sum, a product and a convolution take one launch each, after their first calls."""
    made = run("""
x = torch.ones(2, 8, 16, 16, device="cuda")
w = torch.ones(8, 8, 3, 3, device="cuda")
for _ in range(2):
    before = counts()
    y, z, c = x + 1, x[0, 0] @ x[0, 0], torch.nn.functional.conv2d(x, w)
print((counts() - before).kernel_launches, tuple(c.shape))
""")
    assert made == "3 (2, 8, 14, 14)\n"


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        ("x.sum().item()", True),
        ("x.cpu()", True),
        ("torch.tensor([1.0], device='cuda')", True),
        ("event = torch.cuda.Event(); event.record(); event.synchronize()", True),
        ("pinned.copy_(x, non_blocking=True)", False),
        ("x.copy_(pinned, non_blocking=True)", False),
        ("torch.full((3,), 2.0, device='cuda')", False),
        ("torch._foreach_add_([x], [x.sum()])", False),
        ("torch._foreach_add_([x], x.sum())", True),
    ],
)
def test_waits_are_seen_and_forbidden(operation: str, waits: bool) -> None:
    made = run(f"""
x = torch.ones(4, device="cuda")
pinned = torch.ones(4).pin_memory()
before = counts()
{operation}
print((counts() - before).host_waits > 0, len(events) > 0)
try:
    with no_waits():
        {operation}
    print("allowed")
except RuntimeError as error:
    print("not permitted" in str(error))
""")
    assert made == ("True True\nTrue\n" if waits else "False False\nallowed\n")


def test_a_thread_of_a_loader_may_wait() -> None:
    made = run("""
import threading
x = torch.ones(4, device="cuda")
found = []
with no_waits():
    thread = threading.Thread(target=lambda: found.append(x.sum().item()), name="loader")
    thread.start()
    thread.join()
print(len(found), events[-1].thread)
""")
    assert made == "1 loader\n"


def test_where_a_wait_was(tmp_path: Path) -> None:
    """A wait is reported with the file, line and function of the caller."""
    file = tmp_path / "program.py"
    file.write_text("def read(x):\n    return x.item()\n")
    made = run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import program
program.read(torch.ones((), device="cuda"))
print(events[-1].where[0])
""")
    assert made == f"{'/'.join(file.parts[-3:])}:2 read\n"


@pytest.mark.parametrize(
    ("operation", "refused"),
    [
        ("y = x + 1", False),
        ("y = x @ x", False),
        ("x.sum().item()", True),
        ("torch.cuda.synchronize()", True),
        ("x.copy_(torch.ones(4, 4))", True),
        ("x.copy_(pinned, non_blocking=True)", False),
        ("event.query()", True),
    ],
)
def test_what_a_capture_refuses(operation: str, refused: bool) -> None:
    made = run(f"""
x = torch.ones(4, 4, device="cuda")
x @ x
pinned = torch.ones(4, 4).pin_memory()
event = torch.cuda.Event()
event.record()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        x.add_(1)
        {operation}
    graph.replay()
    print("captured", counts().graph_launches)
except RuntimeError:
    print("refused")
""")
    assert made == ("refused\n" if refused else "captured 1\n")


def test_memory_is_counted_and_ends() -> None:
    made = run("""
x = torch.empty(60_000_000_000, dtype=torch.uint8, device="cuda")
print(counts().peak_allocated // 10**9, torch.cuda.mem_get_info()[0] // 10**9)
try:
    torch.empty(60_000_000_000, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("full")
""")
    assert made == "60 23\nfull\n"


def test_values_come_back() -> None:
    """Values that are copied to the GPU and back are unchanged, so that a checkpoint contains the weights."""
    made = run("""
x = torch.arange(1_000_000)
print(torch.equal(x.cuda().cpu(), x))
""")
    assert made == "True\n"
