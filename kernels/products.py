"""Matrix products in the kernels' device code."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # read when kernels are defined, as Triton does


@triton.jit
def dot(b_x, b_y, b_acc, INTERPRETED: tl.constexpr = INTERPRETED):
    """b_x @ b_y + b_acc, of float32 numbers without TF32."""
    if INTERPRETED:  # the interpreter stores bf16 as integers and would multiply those
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")
