"""3x3 convolution (stride 1, padding 1) as an implicit GEMM, with its neighbours in a UNet at sampling. Forward only.

    y = conv(silu((cat(x, skip) - mean) * gain + offset), weight) + bias + residual,  and the moments of y

Shapes   x [B, C1, H, W], skip [B, C2, H, W], residual, y [B, C_out, H, W], all channels-last; C_in = C1 + C2;
         weight [C_out, 3, 3, C_in], from `pack_weight`; mean, gain, offset [B, C_in] fp32; moments [B, C_out, 2] fp32.
         Products are summed in fp32, the norm's arithmetic is fp32, the result has x's dtype.
FLOPs    18 * B * H * W * C_in * C_out (what the benchmark divides by).
GEMM     A row is a pixel, a column an output channel; the sum runs over 9 taps x C_in channels. A tap's operand is the
         tile of pixels shifted by (dy, dx), so nothing is unfolded in memory.
Source   Chetlur et al. 2014, section 3 (https://arxiv.org/abs/1410.0759); merged moments: Chan et al. 1979.

Two kernels: `_pointers` runs everywhere; `_boxes` uses tensor maps (TMA, compute capability 9 and above), where the
hardware's zero fill is the padding. A tile passes the prologue once per tap, so silu is computed nine times per element
and block of output channels: that saves a pass over the map, and pays for it in exponentials.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import channels_last, empty_map, kernel_op, launch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret  # read when kernels are defined, as Triton does
_INTERPRETED = tl.constexpr(INTERPRETED)

# --- kernels ---
# A tile is BM rows of the GEMM: BL pixels of each of BM / BL images. T tiles cover an image (one, if BL pixels do).


@triton.jit
def _dot(b_x, b_w, b_acc):
    if _INTERPRETED:  # it holds bf16 as bits, and would multiply those
        b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
    return tl.dot(b_x, b_w, b_acc, input_precision="ieee")


@triton.jit
def _add_taps(
    b_acc, x_ptr, w_ptr, mean_ptr, gain_ptr, offset_ptr, C, C_in, H, W, o_pixel, o_norm, o_h, o_w, o_n, m_n,
    BL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """b_acc [BM, BN] + the nine taps of an input with C channels; w_ptr and the norm's pointers start at its first."""
    p_x = x_ptr + o_pixel[:, None] * C
    p_w = w_ptr + o_n[None, :] * (9 * C_in)
    for i in range(0, 9 * tl.cdiv(C, BK)):  # taps innermost: eight of nine loads of a pixel come from L2
        dy = i % 9 // 3 - 1
        dx = i % 3 - 1
        o_c = i // 9 * BK + tl.arange(0, BK)
        m_c = o_c < C
        m_h = (o_h + dy >= 0) & (o_h + dy < H)
        m_w = (o_w + dx >= 0) & (o_w + dx < W)
        m_x = (m_h & m_w)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + ((dy * W + dx) * C + o_c[None, :]), mask=m_x, other=0.0)  # [BM, BK]
        b_w = tl.load(p_w + (i % 9 * C_in + o_c[:, None]), mask=m_c[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        if mean_ptr is not None:
            p_norm = o_norm[:, None] + o_c[None, :]  # [images, BK]
            b_mean = tl.load(mean_ptr + p_norm, mask=m_c[None, :], other=0.0)[:, None, :]
            b_gain = tl.load(gain_ptr + p_norm, mask=m_c[None, :], other=0.0)[:, None, :]
            b_offset = tl.load(offset_ptr + p_norm, mask=m_c[None, :], other=0.0)[:, None, :]
            b_h = tl.reshape(b_x.to(tl.float32), (BM // BL, BL, BK))
            b_h = (b_h - b_mean) * b_gain + b_offset
            b_h = tl.reshape(b_h * tl.sigmoid(b_h), (BM, BK))
            b_x = tl.where(m_x, b_h, 0.0).to(b_x.dtype)  # the padding is of the map that silu leaves
        b_acc = _dot(b_x, b_w, b_acc)
    return b_acc


@triton.jit
def _store_moments(moments_ptr, b_y, m_y, i_b, i_t, n, o_n, m_n, B, T, C_out, BL: tl.constexpr):
    """Mean and squared deviations over each image's rows of b_y [BM, BN] go to moments [B, T, C_out, 2] at tile i_t.

    n  how many of an image's BL rows are pixels.
    """
    BM: tl.constexpr = b_y.shape[0]
    BN: tl.constexpr = b_y.shape[1]
    b_v = tl.reshape(tl.where(m_y[:, None], b_y.to(tl.float32), 0.0), (BM // BL, BL, BN))
    b_mean = tl.sum(b_v, axis=1) / n  # [BM / BL, BN]
    b_off = tl.where(tl.reshape(m_y, (BM // BL, BL))[:, :, None], b_v - b_mean[:, None, :], 0.0)
    b_rest = tl.sum(b_off, axis=1) / n  # what rounding left of the mean: with |mean| >> std, much of a deviation
    b_mean += b_rest
    b_m2 = tl.sum(b_off * b_off, axis=1) - n * b_rest * b_rest
    o_b = i_b + tl.arange(0, BM // BL)  # [images of the tile]
    p = moments_ptr + ((o_b * T + i_t)[:, None] * C_out + o_n[None, :]) * 2
    m = (o_b < B)[:, None] & m_n[None, :]
    tl.store(p, b_mean, mask=m)
    tl.store(p + 1, b_m2, mask=m)


@triton.jit
def _pointers(
    x_ptr, skip_ptr, w_ptr, bias_ptr, mean_ptr, gain_ptr, offset_ptr, residual_ptr, y_ptr, moments_ptr,
    B, H, W, C1, C2, C_out, T,
    BL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    C1, C2, C_out = 8 * C1, 8 * C2, 8 * C_out  # come in eighths, so that the compiler sees 16-byte accesses
    tiles_n = tl.cdiv(C_out, BN)
    i_m = tl.program_id(0) // tiles_n  # neighbouring programs share their pixels, the larger operand
    o_n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    m_n = o_n < C_out
    i_b = (i_m // T).to(tl.int64) * (BM // BL)
    i_pixel = i_b * H * W  # of all images; times C, it passes 2^31
    o_m = tl.arange(0, BM)
    o_l = i_m % T * BL + o_m % BL
    m_m = (o_l < H * W) & (i_b + o_m // BL < B)
    o_h = tl.where(m_m, o_l // W, -2)  # rows without a pixel: no tap is inside the map
    o_w = o_l % W
    o_pixel = o_m // BL * (H * W) + o_l  # from i_pixel
    C_in = C1 + C2
    o_norm = tl.minimum(i_b + tl.arange(0, BM // BL), B - 1) * C_in  # [images of the tile]

    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    b_acc = _add_taps(
        b_acc, x_ptr + i_pixel * C1, w_ptr, mean_ptr, gain_ptr, offset_ptr, C1, C_in, H, W, o_pixel, o_norm,
        o_h, o_w, o_n, m_n, BL, BM, BK,
    )  # fmt: skip
    if skip_ptr is not None:
        b_acc = _add_taps(
            b_acc, skip_ptr + i_pixel * C2, w_ptr + C1, mean_ptr, gain_ptr, offset_ptr, C2, C_in, H, W, o_pixel,
            o_norm + C1, o_h, o_w, o_n, m_n, BL, BM, BK,
        )  # fmt: skip
    if bias_ptr is not None:
        b_acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_y = o_pixel[:, None] * C_out + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if residual_ptr is not None:
        b_acc += tl.load(residual_ptr + i_pixel * C_out + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_y = b_acc.to(y_ptr.dtype.element_ty)
    p_y = y_ptr + i_pixel * C_out + o_y
    tl.store(p_y, b_y, mask=m_y)
    if moments_ptr is not None:
        tl.debug_barrier()
        b_y = tl.load(p_y, mask=m_y, other=0.0)  # spread as for the store: sums over rows take fewer registers so
        n = tl.minimum(H * W - i_m % T * BL, BL)
        _store_moments(moments_ptr, b_y, m_m, i_b, i_m % T, n, o_n, m_n, B, T, C_out, BL)


@triton.jit
def _add_boxes(b_acc, x_map, w_map, C, C_in, o_c0, i_b, i_h, i_w, i_n, BM: tl.constexpr, BK: tl.constexpr):
    """b_acc [BM, BN] + the nine taps of an input with C channels, the weight's o_c0 .. o_c0 + C - 1."""
    for i in range(0, 9 * (C // BK)):
        i_c = i // 9 * BK
        b_x = x_map.load([i_b, i_h + (i % 9 // 3 - 1), i_w + (i % 3 - 1), i_c])  # zero outside of the map
        b_w = w_map.load([i_n, i % 9 * C_in + o_c0 + i_c])  # [BN, BK]
        b_acc = _dot(tl.reshape(b_x, (BM, BK)), b_w.T, b_acc)
    return b_acc


@triton.jit
def _boxes(
    x_map, skip_map, w_map, bias_ptr, residual_map, y_map, moments_ptr,
    B, C1, C2, C_out, tiles_w, T,
    BB: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = BB * BH * BW
    tiles_n = tl.cdiv(C_out, BN)
    i_m = tl.program_id(0) // tiles_n
    i_n = tl.program_id(0) % tiles_n * BN
    i_b = i_m // T * BB
    i_h = i_m % T // tiles_w * BH
    i_w = i_m % T % tiles_w * BW

    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    b_acc = _add_boxes(b_acc, x_map, w_map, C1, C1 + C2, 0, i_b, i_h, i_w, i_n, BM, BK)
    if skip_map is not None:
        b_acc = _add_boxes(b_acc, skip_map, w_map, C2, C1 + C2, C1, i_b, i_h, i_w, i_n, BM, BK)
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < C_out
    if bias_ptr is not None:
        b_acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if residual_map is not None:
        b_acc += tl.reshape(residual_map.load([i_b, i_h, i_w, i_n]), (BM, BN)).to(tl.float32)
    b_y = b_acc.to(y_map.dtype)
    y_map.store([i_b, i_h, i_w, i_n], tl.reshape(b_y, (BB, BH, BW, BN)))  # clipped at B and C_out
    if moments_ptr is not None:
        m_m = tl.full([BM], True, dtype=tl.int1)
        _store_moments(moments_ptr, b_y, m_m, i_b.to(tl.int64), i_m % T, BH * BW, o_n, m_n, B, T, C_out, BH * BW)


@triton.jit
def _merge(part_ptr, moments_ptr, L, T, C, BL: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Parts [B, T, C, 2] of BL pixels each (the last perhaps fewer, L in all) → moments [B, C, 2]."""
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    p_part = part_ptr + (i_b * T * C + o_c)[None, :] * 2
    b_first = tl.load(part_ptr + (i_b * T * C + o_c) * 2, mask=m_c, other=0.0)
    b_sum = tl.zeros([BT, BC], dtype=tl.float32)
    for i in range(0, T, BT):  # relative to the first part's mean: |mean| >> std costs no digits
        o_t = i + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_c[None, :]
        b_mean = tl.load(p_part + o_t[:, None] * C * 2, mask=m, other=0.0)
        b_sum += tl.where(m, tl.minimum(L - o_t * BL, BL)[:, None] * (b_mean - b_first[None, :]), 0.0)
    b_all = tl.sum(b_sum, axis=0) / L  # from b_first
    b_m2 = tl.zeros([BT, BC], dtype=tl.float32)
    for i in range(0, T, BT):
        o_t = i + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_c[None, :]
        b_off = tl.load(p_part + o_t[:, None] * C * 2, mask=m, other=0.0) - b_first[None, :] - b_all[None, :]
        b_part = tl.load(p_part + o_t[:, None] * C * 2 + 1, mask=m, other=0.0)
        b_m2 += tl.where(m, b_part + tl.minimum(L - o_t * BL, BL)[:, None] * b_off * b_off, 0.0)
    p = moments_ptr + (i_b * C + o_c) * 2
    tl.store(p, b_first + b_all, mask=m_c)
    tl.store(p + 1, tl.sum(b_m2, axis=0), mask=m_c)


# --- launch choices ---


class Plan(NamedTuple):
    """A tile is BM pixels (BL of each of its images) by BN output channels, summed BK channels at a time."""

    BM: int
    BN: int
    BK: int
    BL: int
    T: int  # tiles per image
    box: tuple[int, int, int] | None  # images, rows and columns of a tile read through tensor maps
    num_warps: int
    num_stages: int


def plan(B: int, H: int, W: int, C1: int, C2: int, C_out: int, dtype: torch.dtype, prologue: bool, tma: bool) -> Plan:
    """The launch configuration of a shape; with `tma`, through tensor maps if the shape and the op allow it.

    Chosen for what the assembler makes of it on compute capabilities 8, 9 and 10: no spills; not yet timed.
    """
    BM, BN, BK, stages = 128, 128 if C_out % 128 == 0 or C_out > 512 else 64, 64, 3
    if -(-B * H * W // BM) * -(-C_out // BN) < 132:  # fewer programs than an H100 has multiprocessors
        BM, BN = 64, 64
    if prologue or C1 % BK or C2 % BK:
        BK = 32
    warps = 8 if BN == 128 or (prologue and BM == 128) else 4  # the prologue's operand stays in registers
    if dtype == torch.float32:  # exact products need no tensor core and many registers
        BM, BN, BK, warps, stages = 64, 64, 16, 4, 2
    BN = min(BN, max(16, triton.next_power_of_2(C_out)))
    if tma and not prologue and dtype != torch.float32 and C1 % BK == 0 and C2 % BK == 0:
        box = _box(B, H, W, BM)
        if box is not None:
            BL = box[1] * box[2]
            return Plan(BM, BN, BK, BL, H * W // BL, box, warps, 4)
    BL = min(BM, triton.next_power_of_2(H * W))
    return Plan(BM, BN, BK, BL, -(-H * W // BL), None, warps, stages)


def _box(B: int, H: int, W: int, BM: int) -> tuple[int, int, int] | None:
    """Images, rows and columns, powers of two, whose BM pixels tile the maps without a remainder; the squarest."""
    BH, BW = max(
        ((h, w) for h in _powers(H, BM) for w in _powers(W, BM) if h * w <= BM),
        key=lambda size: (size[0] * size[1], min(size)),
    )
    BB = BM // (BH * BW)
    return (BB, BH, BW) if BB == 1 or (BH * BW >= 16 and 2 * B > BB) else None


def _powers(n: int, limit: int) -> list[int]:
    """Powers of two up to limit that divide n."""
    return [1 << i for i in range(limit.bit_length()) if n % (1 << i) == 0]


# --- the op ---


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> int:
    """The compute capability's first digit; 0 where no GPU is."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def supported(x: Tensor, weight: Tensor, skip: Tensor | None = None) -> str:
    """'' if conv3x3 can run this, else a short reason. weight as Conv2d has it or packed."""
    C1, C2, C_out = x.shape[1], 0 if skip is None else skip.shape[1], weight.shape[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "gradients are required, and it has no backward"
    if x.dtype not in DTYPES:
        return f"{x.dtype} is none of bfloat16, float16 and float32"
    if not INTERPRETED and x.device.type != "meta" and _capability(x.device) < 8:
        return f"{x.device} is no NVIDIA GPU of compute capability 8.0 or above"
    if C1 % 8 or C2 % 8 or C_out % 8:
        return f"channels {C1} + {C2} -> {C_out} are not all multiples of 8"
    if x.shape[2] * x.shape[3] * max(C1, C2, C_out) >= 2**31 or weight.numel() >= 2**31:
        return "one image or the weight has 2^31 elements"
    return ""


def pack_weight(weight: Tensor) -> Tensor:
    """Conv2d's weight [C_out, C_in, 3, 3] → [C_out, 3, 3, C_in] as conv3x3 reads it; pack once, not per call."""
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"pack_weight needs a weight [C_out, C_in, 3, 3]; got {tuple(weight.shape)}, perhaps packed")
    return weight.permute(0, 2, 3, 1).contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    norm: dict[str, Tensor | None],
    residual: Tensor | None,
) -> None:
    def refuse(expected: str, got: object) -> None:
        raise ValueError(f"conv3x3 needs {expected}; got {got}")

    if x.dim() != 4 or 0 in x.shape[1:]:
        refuse("a map x [B, C, H, W] with pixels", f"{tuple(x.shape)}; one image wants .unsqueeze(0)")
    if weight.dim() != 4 or weight.shape[1:3] != (3, 3):
        refuse("a weight [C_out, 3, 3, C_in]", f"{tuple(weight.shape)}; pass pack_weight(weight)")
    if skip is not None and skip.dim() != 4:
        refuse("a map as skip", tuple(skip.shape))
    if reason := supported(x, weight, skip):
        refuse("what it supports", f"an input of which {reason}; use F.conv2d")
    B, C1, H, W = x.shape
    C2, C_out = 0 if skip is None else skip.shape[1], weight.shape[0]
    same, single = (x.dtype,), (torch.float32,)
    per_channel = "expand groups to channels, with .float()"
    wanted = {
        "weight": (weight, (C_out, 3, 3, C1 + C2), same, "pack_weight gives that; is skip missing?"),
        "bias": (bias, (C_out,), same + single, "one value per output channel"),
        "skip": (skip, (B, C2, H, W), same, "resize it first, or convert it with .to(x.dtype)"),
        "residual": (residual, (B, C_out, H, W), same, "project it first, or convert it with .to(x.dtype)"),
        **{name: (value, (B, C1 + C2), single, per_channel) for name, value in norm.items()},
    }
    for name, (value, shape, dtypes, remedy) in wanted.items():
        if value is None:
            continue
        if value.shape != shape or value.dtype not in dtypes:
            types = " or ".join(map(str, dict.fromkeys(dtypes)))
            refuse(f"{name} {shape} in {types}", f"{tuple(value.shape)} in {value.dtype}; {remedy}")
        if value.device != x.device:
            refuse(f"{name} on the device of x, {x.device}", f"{value.device}; move it with .to(x.device)")
        if name not in ("skip", "residual") and not value.is_contiguous():
            refuse(f"{name} to be contiguous", f"strides {value.stride()}; call .contiguous() once")
    if len({value is None for value in norm.values()}) == 2:
        refuse("mean, gain and offset together", "some; leave out all three for no norm")


@kernel_op("conv3x3")
def _conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    mean: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    moments: bool,
    tma: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, skip, {"mean": mean, "gain": gain, "offset": offset}, residual)
    x = channels_last(x, "conv3x3", "x")
    skip = None if skip is None else channels_last(skip, "conv3x3", "skip")
    residual = None if residual is None else channels_last(residual, "conv3x3", "residual")
    B, C1, H, W = x.shape
    C2, C_out = 0 if skip is None else skip.shape[1], weight.shape[0]
    y, result = _empty(x, C_out, moments)
    if B == 0:
        return y, result
    tma = tma and all(value.data_ptr() % 16 == 0 for value in (x, weight, skip, residual) if value is not None)
    p = plan(B, H, W, C1, C2, C_out, x.dtype, mean is not None, tma)
    images = p.BM // p.BL
    grid = (-(-B // images) * p.T * -(-C_out // p.BN),)
    parts = None
    if moments:
        parts = result if p.T == 1 else torch.empty(B, p.T, C_out, 2, dtype=torch.float32, device=x.device)
    shared: dict[str, int] = {"BN": p.BN, "BK": p.BK, "num_warps": p.num_warps, "num_stages": p.num_stages}
    if p.box is None:
        tensors = (x, skip, weight, bias, mean, gain, offset, residual, y, parts)
        launch(_pointers, grid, *tensors, B, H, W, C1 // 8, C2 // 8, C_out // 8, p.T, BL=p.BL, BM=p.BM, **shared)
    else:
        BB, BH, BW = p.box
        x_map, skip_map = (_map(value, (*p.box, p.BK)) for value in (x, skip))
        residual_map, y_map = (_map(value, (*p.box, p.BN)) for value in (residual, y))
        w_map = TensorDescriptor(weight, [C_out, 9 * (C1 + C2)], [9 * (C1 + C2), 1], [p.BN, p.BK])
        maps = (x_map, skip_map, w_map, bias, residual_map, y_map, parts)
        launch(_boxes, grid, *maps, B, C1, C2, C_out, W // BW, p.T, BB=BB, BH=BH, BW=BW, **shared)
    if parts is not None and p.T > 1:
        launch(_merge, (B, -(-C_out // 32)), parts, result, H * W, p.T, C_out, BL=p.BL, BT=8, BC=32)
    return y, result


def _empty(x: Tensor, C_out: int, moments: bool) -> tuple[Tensor, Tensor]:
    B, _, H, W = x.shape
    result = torch.empty((B, C_out, 2) if moments else (0,), dtype=torch.float32, device=x.device)
    return empty_map(B, C_out, H, W, x), result


def _map(x: Tensor | None, box: tuple[int, ...]) -> TensorDescriptor | None:
    """A tensor map over a channels-last map; spelt out, as strides of axes of length 1 may say anything."""
    if x is None:
        return None
    B, C, H, W = x.shape
    return TensorDescriptor(x, [B, H, W, C], [H * W * C, W * C, C, 1], list(box))


@_conv3x3.register_fake
def _(x, weight, bias, skip, mean, gain, offset, residual, moments, tma):  # type: ignore[no-untyped-def]
    _check(x, weight, bias, skip, {"mean": mean, "gain": gain, "offset": offset}, residual)
    return _empty(x, weight.shape[0], moments)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    skip: Tensor | None = None,
    mean: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    moments: bool = False,
    tma: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """conv(silu((cat(x, skip) - mean) * gain + offset)) + bias + residual, [B, C1, H, W] → [B, C_out, H, W].

    weight             from `pack_weight`, in x's dtype; bias [C_out] in x's dtype or float32.
    mean, gain, offset [B, C_in] float32, all or none: a group norm as one affine map per image and channel. The
                       convolution's zero padding surrounds what silu returns.
    moments            also return [B, C_out, 2] float32: the mean of each channel of y as stored, and the sum of its
                       squared deviations from that mean.
    tma                whether tensor maps may be used; None: where the GPU has them.
    """
    inputs = (x, weight, bias, skip, mean, gain, offset, residual)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs):
        raise ValueError("conv3x3 needs inputs without gradients, as it has no backward; call it under torch.no_grad()")
    if tma is None:
        tma = _capability(x.device) >= 9
    y, result = _conv3x3(*inputs, moments, tma)
    return (y, result) if moments else y
