"""Checks the inputs of `group_norm_silu` and chooses the launch configuration for their shape."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton
from torch import Tensor

MAX_GROUP = 128  # channels
RESIDENT, REGISTERS = 4, 128
"""Programs of 4 warps that a multiprocessor's 65,536 registers hold at once, and what each thread may then have."""
ROWS = {False: 256, True: 128}
"""Pixels of a part, where there are enough parts, forward and backward. With more, what a part costs besides its
elements is shared by more of them; with fewer, less has to stay in the L2 cache between the two reads: 20 to 25 MB."""
WHOLE_BYTES = 48 << 10
"""Maps of a slab that one program reads twice, the second time from its L1 cache, of which there are 256 KB for a
multiprocessor's programs together."""
MOST_PARTS = 1 << 21
"""The most parts: tickets count parts and the lag, which is at most as great, and `_quotient` divides below 2^22."""
STREAM_BYTES = 24 << 20
"""A larger map would not stay in the L2 cache until the next layer reads it."""


@dataclass(frozen=True)
class Plan:
    """How one call runs; `group_norm_silu_kernels.py` explains slabs, parts, tiles, tickets and the lag."""

    whole: bool
    """Whether a slab is one part, for which no program waits."""
    rows: int
    """Pixels of a part, which a program reads in blocks of `block_l`."""
    block_l: int
    block_c: int
    """Channels of a tile."""
    splits: int
    """Parts of a slab above each other."""
    tiles: int
    """Tiles of a slab side by side, and `span` of them in a part."""
    span: int
    chunks: int
    """Slabs of an image."""
    slabs: int
    """Slabs, parts and programs of the whole launch; `lag` is 0 if `whole`."""
    parts: int
    lag: int
    programs: int
    num_warps: int
    group: int
    """Channels of a group, `padded` to a power of two where a slab's sums are merged."""
    padded: int
    stream: bool
    """Whether the map is too large to stay in the L2 cache until the next layer reads it."""
    even: bool
    """Whether no part has pixels beyond the image's last."""

    @property
    def per_row(self) -> int:
        return self.tiles // self.span

    @property
    def per_slab(self) -> int:
        return self.splits * self.per_row

    @property
    def groups(self) -> int:
        """Groups of a slab."""
        return self.tiles * self.block_c // self.group

    @property
    def numbers(self) -> tuple[float, ...]:
        """The first numbers that both kernels take."""
        return (
            *(self.parts, self.lag, self.splits, self.tiles, self.span, self.per_slab, self.per_row, self.chunks),
            *(1 / self.per_slab, 1 / self.per_row, 1 / self.chunks, self.groups, self.group),
        )

    @property
    def constexprs(self) -> dict[str, Any]:
        """Both kernels' constexprs and compiler options."""
        return {
            "ROWS": self.rows,
            "BLOCK_L": self.block_l,
            "BLOCK_C": self.block_c,
            "BLOCK_S": min(4, triton.next_power_of_2(self.splits)),
            "NG": min(max(1, 128 // self.padded), triton.next_power_of_2(self.groups)),
            "PADDED": self.padded,
            "EVEN": self.even,
            "WHOLE": self.whole,
            "STREAM": self.stream,
            "num_warps": self.num_warps,
            "maxnreg": REGISTERS,
        }


@functools.cache  # a step needs about a hundred plans of a few dozen shapes, each as costly as several launches
def plan(B: int, L: int, C1: int, C2: int, group: int, itemsize: int, backward: bool, units: int) -> Plan:
    """The launch configuration for a shape, on a GPU with `units` multiprocessors."""
    C, maps = C1 + C2, 2 if backward else 1
    block_c = next(size for size in (64, 32, 16, 8) if math.gcd(C1, C2) % size == 0)
    slab = math.lcm(group, block_c)
    # As many pixels as the registers of 4 warps hold.
    block_l = min(32 if backward or itemsize == 4 else 64, triton.next_power_of_2(L))
    rows = triton.cdiv(L, block_l) * block_l
    whole = rows * slab * itemsize * maps <= WHOLE_BYTES
    while (
        not whole
        and rows > block_l
        and (rows > ROWS[backward] or B * triton.cdiv(L, rows) * (C // block_c) < 4 * units)
    ):
        rows = max(block_l, triton.next_power_of_2(rows) // 2)
    while not whole and rows < L and B * triton.cdiv(L, rows) * (C // block_c) > MOST_PARTS:
        rows *= 2
    return arranged(B, L, C, group, itemsize, RESIDENT * units, block_c, block_l, rows, whole)


def arranged(
    B: int, L: int, C: int, group: int, itemsize: int, resident: int, block_c: int, block_l: int, rows: int, whole: bool
) -> Plan:
    """The plan with these blocks, for a GPU that holds `resident` programs at once."""
    slab = math.lcm(group, block_c)
    tiles, chunks, splits = slab // block_c, C // slab, triton.cdiv(L, rows)
    span = tiles if whole else 1
    per_slab = splits * tiles // span
    parts = B * chunks * per_slab
    # By then all parts of the slab have been summed, unless a program is a whole ticket behind the others.
    lag = 0 if whole else min(parts, per_slab + resident)
    return Plan(
        whole=whole,
        rows=rows,
        block_l=block_l,
        block_c=block_c,
        splits=splits,
        tiles=tiles,
        span=span,
        chunks=chunks,
        slabs=B * chunks,
        parts=parts,
        lag=lag,
        programs=min(parts + lag, resident),
        num_warps=max(1, min(4, block_l * block_c // 256)),
        group=group,
        padded=triton.next_power_of_2(group),
        stream=B * L * C * itemsize > STREAM_BYTES,
        even=L % rows == 0,
    )


# --- accepted inputs ---


def _refuse(op: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op} needs {expected}; got {got}")


def check_sum(op: str, a: Tensor, b: Tensor | None, b_bias: Tensor | None) -> None:
    if b is not None and b.shape != a.shape:
        _refuse(op, f"b of the shape of a, {tuple(a.shape)}", tuple(b.shape))
    if b is not None and b.dtype != a.dtype:
        _refuse(op, f"b in the dtype of a, {a.dtype}", f"{b.dtype}; convert it with .to(a.dtype)")
    if b_bias is not None and b_bias.shape != a.shape[1:2]:
        _refuse(op, f"b_bias of shape ({a.shape[1]},), one per channel", tuple(b_bias.shape))
    for name, given in (("b", b), ("b_bias", b_bias)):
        if given is not None and given.device != a.device:
            _refuse(op, f"{name} on the device of a, {a.device}", f"{given.device}; move it with .to(a.device)")


def check_norm(
    op: str,
    name: str,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    num_groups: int,
) -> None:
    """Raise ValueError unless the norm's inputs fit together and a kernel can compute it; `name` is that of x."""
    refuse = functools.partial(_refuse, op)
    if x.dim() != 4:
        refuse(f"a map {name} [B, C, H, W]", f"{name} {tuple(x.shape)}; a sequence wants .unsqueeze(-1)")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        refuse(f"{name} in float32, bfloat16 or float16", f"{x.dtype}; convert it with .float()")
    B, C = x.shape[0], x.shape[1]
    if skip is not None:
        if skip.dim() != 4 or skip.shape[0] != B or skip.shape[2:] != x.shape[2:]:
            refuse(f"skip with the batch and size of {name} {tuple(x.shape)}", f"{tuple(skip.shape)}; resize it first")
        if skip.dtype != x.dtype:
            refuse(f"skip in the dtype of {name}, {x.dtype}", f"{skip.dtype}; convert it with .to({name}.dtype)")
        C += skip.shape[1]
    if num_groups < 1 or C % num_groups:
        refuse(f"channels divisible by {num_groups} groups", f"{C}; change num_groups or the width")
    if C // num_groups > MAX_GROUP:
        refuse(f"at most {MAX_GROUP} channels in a group", f"{C // num_groups}; use more groups, or the reference")
    if x.shape[1] % 8 or C % 8:
        refuse(
            f"channels of {name} and skip in multiples of 8", f"{x.shape[1]} and {C - x.shape[1]}; use the reference"
        )
    for what, value in (("weight", weight), ("bias", bias)):
        if value.shape != (C,):
            refuse(f"{what} of shape ({C},), one per channel", tuple(value.shape))
    if (scale is None) != (shift is None):
        refuse("scale and shift together", "only one; give zeros for the other")
    for what, given in (("scale", scale), ("shift", shift), ("offset", offset)):
        if given is not None and given.shape != (B, C) and (what != "offset" or given.shape != (C,)):
            refuse(
                f"{what} of shape (B, C) = {(B, C)}",
                f"{tuple(given.shape)}; a [B, C, 1, 1] embedding wants .flatten(1)",
            )
    others = {"skip": skip, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "offset": offset}
    for what, given in others.items():
        if given is not None and given.device != x.device:
            refuse(f"{what} on the device of {name}, {x.device}", f"{given.device}; move it with .to({name}.device)")
