"""Which dtype the body of a network computes in."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def body_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for a precision on a device.

    bf16 on a CPU without bf16 instructions computes in float32: there bf16 convolutions take ten times as long.
    """
    if precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        return torch.float32
    return DTYPES[precision]


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
