"""Settings that apply to every test."""

import os
from collections.abc import Iterator

import pytest
import torch

# Test networks are tiny: one thread is faster than two, and processes that run at once don't compete for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
os.environ.pop("OPENAI_LOGDIR", None)  # it would redirect the output of scripts
torch.backends.cudnn.allow_tf32 = False  # on a GPU, the recorded numbers need exact float32 products
# Without a GPU, kernels run in Triton's interpreter, which must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _mode_of_the_ops() -> Iterator[None]:
    """Restore the choice of kernels, which scripts make for the whole process."""
    from fastdiff import ops

    before = ops._mode
    yield
    ops._mode = before


@pytest.fixture(autouse=True)
def _torchs_linear() -> Iterator[None]:
    """Restore F.linear, which DeepSpeed's ZeRO-3 replaces by a function that torch.compile traces with a warning."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear
