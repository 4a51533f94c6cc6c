"""Device code that the diffusion kernels share: maps of a few channels, four neighbouring pixels at a time.

An image is seen as HW pixels of C channels at any pixel and channel stride, so that [B, H, W, C] bytes,
channels-last and channels-first floats are all read in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdiff.kernels.noise import check_counters, counter_noise
from fastdiff.kernels.reference import CounterNoise
from torch import Tensor

QUADS = 128  # groups of four pixels per program


def strides(x: Tensor) -> tuple[Tensor, int, int]:
    """(x, channel stride, pixel stride) of a map [B, C, H, W], dense in channels-first or -last memory.

    Any other view, such as half of the channels of a network's output, is copied: such views are rare, and a copy of at
    most four channels costs little compared with the network.
    """
    if not (x.is_contiguous() or x.permute(0, 2, 3, 1).is_contiguous()):
        x = x.contiguous()
    _, C, H, W = x.shape
    return (x, 1, C) if x.permute(0, 2, 3, 1).is_contiguous() else (x, H * W, 1)


def noise_strides(noise: Tensor | None) -> tuple[Tensor | None, int, int]:
    """As `strides`; (None, 0, 0) for noise that is computed from its counters."""
    return (None, 0, 0) if noise is None else strides(noise)


def start_map(x_start: Tensor, op: str) -> Tensor:
    """x_start as a map [B, C, H, W]: float32 unchanged, or bytes [B, H, W, C] as a view."""
    if x_start.dim() != 4:
        raise ValueError(f"{op} needs x_start with 4 axes; got {tuple(x_start.shape)}")
    if x_start.dtype == torch.uint8:
        return x_start.permute(0, 3, 1, 2)
    if x_start.dtype != torch.float32:
        raise ValueError(f"{op} needs x_start as uint8 [B, H, W, C] or float32 [B, C, H, W]; got {x_start.dtype}")
    return x_start


def check_coefficients(coefficients: Tensor, B: int, columns: int, op: str) -> None:
    """Raise ValueError unless coefficients are [B, columns] float32; the rows may have any stride."""
    if coefficients.shape != (B, columns) or coefficients.dtype != torch.float32 or coefficients.stride(1) != 1:
        raise ValueError(
            f"{op} needs coefficients of shape {(B, columns)}, one row of float32 per image; got "
            f"{tuple(coefficients.shape)} {coefficients.dtype}"
        )


def noise_args(
    noise: Tensor | CounterNoise | None, shape: torch.Size, op: str
) -> tuple[Tensor | None, int, Tensor | None, Tensor | None]:
    """(given noise, seed, index, draw), for a noise of `shape` [B, C, H, W]."""
    if noise is None:
        return None, 0, None, None
    if isinstance(noise, CounterNoise):
        check_counters(noise.index, noise.draw)
        if (len(noise.index), *noise.shape) != tuple(shape):
            raise ValueError(f"{op} needs noise for {tuple(shape)}; got {(len(noise.index), *noise.shape)}")
        return None, noise.seed, noise.index.contiguous(), None if noise.draw is None else noise.draw.contiguous()
    if noise.shape != shape or noise.dtype != torch.float32:
        raise ValueError(f"{op} needs noise {tuple(shape)} float32; got {tuple(noise.shape)} {noise.dtype}")
    return noise, 0, None, None


@triton.jit
def load_start(x_ptr, flip_ptr, i_b, i_c: tl.constexpr, o_p, m, C, HW, W, channel_stride, pixel_stride):
    """x_start of one channel as fp32; bytes become [-1, 1], and a flipped image is read from right to left."""
    if flip_ptr is not None:
        i_w = o_p % W
        o_p = tl.where(tl.load(flip_ptr + i_b), o_p - i_w + (W - 1 - i_w), o_p)
    b_x = tl.load(x_ptr + i_b * HW * C + i_c * channel_stride + o_p * pixel_stride, mask=m, other=0)
    if x_ptr.dtype.element_ty == tl.uint8:
        return b_x.to(tl.float32) / 127.5 - 1.0
    else:
        return b_x.to(tl.float32)


@triton.jit
def load_noise(
    noise_ptr, index_ptr, draw_ptr, seed, i_b, i_c: tl.constexpr, o_p, m, C, HW, channel_stride, pixel_stride,
    Q: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Noise of one channel at pixels o_p [Q, 4]: read, or computed from its counters."""
    if noise_ptr is not None:
        return tl.load(noise_ptr + i_b * HW * C + i_c * channel_stride + o_p * pixel_stride, mask=m, other=0.0)
    else:
        i_draw = i_b * 0
        if draw_ptr is not None:
            i_draw = tl.load(draw_ptr + i_b)
        return counter_noise(seed, tl.load(index_ptr + i_b), i_draw, i_c * HW + o_p, Q, ALIGNED)


@triton.jit
def store_padded(out_ptr, i_b, o_p, m, HW, v0, v1, v2, v3, PAD: tl.constexpr):
    """Store channels v0 .. v3 of every pixel into a channels-last map of PAD (4 or 8) channels, the rest zero."""
    b_even, b_odd = tl.join(v0, v2), tl.join(v1, v3)  # [Q, 4, 2]
    b_four = tl.join(b_even, b_odd)  # [Q, 4, 2, 2]: channel 2i + j
    Q: tl.constexpr = v0.shape[0]
    if PAD == 8:
        b_four = tl.reshape(b_four, (Q, 4, 4))
        b_eight = tl.permute(tl.join(b_four, tl.zeros_like(b_four)), (0, 1, 3, 2))
        b_all = tl.reshape(b_eight, (Q * 4, 8))
    else:
        b_all = tl.reshape(b_four, (Q * 4, 4))
    o_p, m = tl.reshape(o_p, (Q * 4, 1)), tl.reshape(m, (Q * 4, 1))
    p_out = out_ptr + (i_b * HW + o_p) * PAD + tl.arange(0, PAD)[None, :]
    tl.store(p_out, b_all.to(out_ptr.dtype.element_ty), mask=m)
