"""PTX instructions for which Triton has no function, and what its interpreter runs in their place."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

if knobs.runtime.interpret:

    @triton.jit
    def sigmoid(b_x):
        """As below, to float32's precision."""
        return tl.sigmoid(b_x)

    @triton.jit
    def to_float(b_x):
        """As below."""
        return b_x.to(tl.float32)

    @triton.jit
    def trap():
        """As below; nothing that the interpreter runs comes here."""
        tl.device_assert(False)

else:

    @triton.jit
    def sigmoid(b_x):
        """1 / (1 + exp(-x)) for fp32 by the GPU's approximations: four instructions.

        ex2.approx errs by at most 2^-22 and rcp.approx by 2^-23 (PTX ISA, floating-point instructions), and the product
        before them by a rounding. So the relative error is below 2^-20 for |x| up to 8, and below 2^-18 up to 30. A
        division would check the range of its operands, which takes three times as long.
        """
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; "  # the factor is -log2(e)
            "add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [b_x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def to_float(b_x):
        """A tensor as fp32. A bf16 number takes one instruction; Triton's conversion takes one and a half."""
        if b_x.dtype == tl.bfloat16:
            b_x = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=f,=f,r",
                [b_x],
                dtype=tl.float32,
                is_pure=True,
                pack=2,
            )
        return b_x.to(tl.float32)

    @triton.jit
    def trap():
        """End the launch with an error."""
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
