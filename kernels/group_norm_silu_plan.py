"""Checks the inputs of `group_norm_silu` and chooses the launch configuration for their shape."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NoReturn

import torch
import triton
from torch import Tensor

L2_BYTES = 32 << 20  # of slabs, for all programs together, that an L2 of 40 to 60 MB keeps until they are read again
ONE_BLOCK = {False: 16384, True: 8192}  # elements of a slab kept in registers, forward and backward
MAX_GROUP = 128  # channels


@dataclass(frozen=True)
class Tile:
    """Whole groups of one image: `channels` of them, `padded` to a power of two."""

    channels: int
    padded: int

    @staticmethod
    def of(C: int, group: int, align: int, wanted: int, limit: int) -> Tile:
        """Whole groups in multiples of `align`: the fewest channels from `wanted` on, or the most below `limit`."""
        unit = math.lcm(group, align)
        sizes = [size for size in range(unit, C + 1, unit) if C % size == 0] or [C]
        fitting = [size for size in sizes if triton.next_power_of_2(size) <= limit] or sizes[:1]
        size = next((size for size in fitting if size >= wanted), fitting[-1])
        return Tile(size, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Plan:
    """How one call runs: with `slab` in one launch, else in three, with ROWS pixels of BLOCK_C channels per program."""

    slab: bool
    tile: Tile
    finish: Tile  # of the programs that merge partial statistics
    block_l: int
    one_block: bool
    num_warps: int
    programs: int
    rows: int
    splits: int
    block_c: int


@functools.cache  # a step needs about a hundred plans of a few dozen shapes, each as costly as several launches
def plan(
    B: int,
    L: int,
    C1: int,
    C2: int,
    group: int,
    itemsize: int,
    backward: bool,
    units: int,
    dropout: bool,
    summed: bool = False,
) -> Plan:
    """The launch configuration for a shape, on a GPU with `units` multiprocessors. `summed`: x is a sum of two maps."""
    C = C1 + C2
    maps = 2 if backward else 1
    padded_l = triton.next_power_of_2(L)
    limit = ONE_BLOCK[backward] // (2 if dropout or (summed and itemsize > 2) else 1)
    # 64 bytes of a pixel fill a DRAM burst; 32 fill a sector, and the neighbouring program takes the other one.
    tile = Tile.of(C, group, 8, 64 // itemsize, max(limit // padded_l, 1))
    if tile.padded > 32 and padded_l * tile.padded > limit // 2:
        tile = Tile.of(C, group, 8, 32 // itemsize, max(limit // padded_l, 1))
    # The [K, K] table of groups needs registers, too.
    room = limit if tile.padded <= 32 else limit // 2 if tile.padded <= 64 or not backward else 0
    one_block = padded_l * tile.padded <= room and tile.channels >= min(32 // itemsize, C)
    if not one_block:
        tile = Tile.of(C, group, 8, 32 // itemsize, 64)
    slabs = B * (C // tile.channels)
    in_l2 = maps * L * tile.channels * itemsize * units <= L2_BYTES and slabs >= units
    slab = (one_block or in_l2) and tile.padded <= 128
    few = backward or (summed and tile.padded > 64)  # a second map and the table leave few registers
    block_l = padded_l if one_block else (4096 if few else 8192) // tile.padded
    # 32 values of 16 bits per thread, at least 8; the [K, K] table of groups needs threads, too.
    size = block_l * tile.padded * itemsize
    warps = min(16, max(1, size // 2048, min(tile.padded // 8, size // 512))) if one_block else 16
    # If not a slab: enough programs to fill the GPU, and at most 128 parts to merge.
    common = math.gcd(C1, C2) if C2 else C1
    block_c = next(size for size in (128, 64, 32, 16, 8) if common % size == 0)
    rows = max(64, triton.next_power_of_2(-(-L // 128)))
    while rows < min(1024, L) and B * -(-L // (2 * rows)) * (C // block_c) >= 8 * units:
        rows *= 2
    return Plan(
        slab=slab,
        tile=tile,
        finish=Tile.of(C, group, 1, 16, 128),
        block_l=block_l if slab else min(rows, 2048 // block_c),
        one_block=one_block,
        num_warps=warps if slab else 4,
        programs=min(slabs, units) if slab and not one_block else slabs,
        rows=rows,
        splits=-(-L // rows),
        block_c=block_c,
    )


# --- accepted inputs ---


def _refuse(op: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op} needs {expected}; got {got}")


def check_sum(op: str, a: Tensor, b: Tensor, b_bias: Tensor | None) -> None:
    if b.shape != a.shape:
        _refuse(op, f"b of the shape of a, {tuple(a.shape)}", tuple(b.shape))
    if b.dtype != a.dtype:
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
        if given is not None and given.shape != (B, C):
            refuse(
                f"{what} of shape (B, C) = {(B, C)}",
                f"{tuple(given.shape)}; a [B, C, 1, 1] embedding wants .flatten(1)",
            )
    others = {"skip": skip, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "offset": offset}
    for what, given in others.items():
        if given is not None and given.device != x.device:
            refuse(f"{what} on the device of {name}, {x.device}", f"{given.device}; move it with .to({name}.device)")
