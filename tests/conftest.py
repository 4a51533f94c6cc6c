"""Settings of every test."""

import os
from collections.abc import Iterator

import pytest
import torch

# Test networks are tiny: one thread beats two, and processes that share the cores don't fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # on a GPU, recorded numbers are float32's
# Without a GPU, kernels run in Triton's interpreter; it must be asked for before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _torchs_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces it for good, by a function that torch.compile doesn't trace without a warning."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear
