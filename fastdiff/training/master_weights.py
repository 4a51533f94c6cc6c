"""The fp32 master weights, wherever ZeRO keeps them, and tensors laid out like them (averages, moments).

On each rank the master weights are a few flat tensors, the shards: whole parameters at stage 0, partitions from stage
1 on. A slice maps a range of a parameter's elements to its place in a shard. So tensors laid out like the shards can
be gathered into a state_dict that doesn't depend on the world size, and filled from one.

DeepSpeed has no public way to find its master weights: `_layout` reads private attributes of its optimisers, as they
are in DeepSpeed 0.19.8 (constraints.txt). A release that lacks one of them ends in a UserError.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.errors import UserError

TRIED = "0.19.8"
"""The release of DeepSpeed whose private attributes this module knows."""


@dataclass(frozen=True)
class Slice:
    """Elements start … start + numel of the flattened parameter `name`, from `offset` of shard number `shard`."""

    name: str
    start: int
    numel: int
    shard: int
    offset: int


class MasterWeights:
    """The fp32 weights that an optimiser steps: `shards` on this rank, laid out as `slices` says.

    optimizer  that of a DeepSpeed engine; or an AdamW of the float32 master weights of all parameters, in their order,
               which are then the shards
    """

    def __init__(self, optimizer: Any, module: nn.Module, rank: int, world_size: int) -> None:
        # ZeRO-3 leaves an empty tensor in a parameter's place.
        self.shapes: dict[str, torch.Size] = {
            name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in module.named_parameters()
        }
        self.rank, self.world_size = rank, world_size
        self.shards, self.slices, self.replicated = _layout(optimizer, module, rank)
        self._slices_of_ranks: list[list[Slice]] | None = None

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(shard, requires_grad=False) for shard in self.shards]

    def clone(self) -> list[Tensor]:
        return [shard.detach().clone() for shard in self.shards]

    def gather(self, tensors: list[Tensor]) -> dict[str, Tensor] | None:
        """Whole parameters on the CPU, from tensors laid out like the shards: on rank 0; None elsewhere. Collective."""
        local = [tensors[s.shard].detach().flatten()[s.offset : s.offset + s.numel] for s in self.slices]
        if self.replicated or self.world_size == 1:
            return self._assemble([(self.slices, local)]) if self.rank == 0 else None
        if self._slices_of_ranks is None:
            self._slices_of_ranks = [[] for _ in range(self.world_size)]
            dist.all_gather_object(self._slices_of_ranks, self.slices)
        if self.rank != 0:
            if local:
                dist.send(torch.cat(local).contiguous(), dst=0)
            return None
        parts = [(self.slices, local)]
        for source in range(1, self.world_size):
            slices = self._slices_of_ranks[source]
            if slices:
                received = torch.empty(sum(s.numel for s in slices), device=tensors[0].device)
                dist.recv(received, src=source)
                parts.append((slices, list(received.split([s.numel for s in slices]))))
        return self._assemble(parts)

    def _assemble(self, parts: list[tuple[list[Slice], list[Tensor]]]) -> dict[str, Tensor]:
        whole = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        for slices, values in parts:
            for s, value in zip(slices, values, strict=True):
                whole[s.name].view(-1)[s.start : s.start + s.numel].copy_(value)
        return whole

    @torch.no_grad()
    def fill(self, tensors: list[Tensor], state: dict[str, Tensor]) -> None:
        """Copy this rank's slices of a state_dict into tensors laid out like the shards."""
        for s in self.slices:
            part, shard = state[s.name].reshape(-1)[s.start : s.start + s.numel], tensors[s.shard]
            if s.numel == shard.numel():  # a whole shard, which may be channels-last
                shard.copy_(part.view(shard.shape))
            else:
                shard.view(-1)[s.offset : s.offset + s.numel].copy_(part)

    @torch.no_grad()
    def load(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Load weights on this rank: into the shards, and into the weights that the network computes with."""
        self.fill(self.shards, state)
        for name, parameter in module.named_parameters():
            if parameter.numel() == state[name].numel():  # else ZeRO-3 holds a part of it only
                parameter.copy_(state[name])
            part = getattr(parameter, "ds_tensor", None)  # ZeRO-3's part on this rank; the last rank's is padded
            if part is not None:
                values = state[name].reshape(-1)[self.rank * part.numel() :][: part.numel()]
                part.view(-1)[: values.numel()].copy_(values)


def _layout(optimizer: Any, module: nn.Module, rank: int) -> tuple[list[Tensor], list[Slice], bool]:
    """(shards, slices, whether every rank has them all) of an optimiser as `MasterWeights` takes it."""
    parameters: list[tuple[str, Any]] = list(module.named_parameters())
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        slices = []
        for name, parameter in parameters:
            position = _private(optimizer, "grad_position")
            shard, offset, numel = position[_private(optimizer, "get_param_id")(parameter)]
            start = rank * _private(parameter, "partition_numel")()
            numel = min(int(numel), _private(parameter, "ds_numel") - start)  # the last partition is padded
            if numel > 0:
                slices.append(Slice(name, start, numel, shard, int(offset)))
        return list(optimizer.fp32_partitioned_groups_flat), slices, False
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1 and 2, bf16
        if hasattr(optimizer, attribute):
            slices = []
            for name, parameter in parameters:
                mapping = _private(parameter, "_hp_mapping")
                if mapping is not None:  # else no part of it lies on this rank
                    low, high = _private(mapping, "lp_fragment_address"), _private(mapping, "hp_fragment_address")
                    shard = _private(mapping, "param_group_index")
                    slices.append(Slice(name, low.start, low.numel, shard, high.start))
            return list(getattr(optimizer, attribute)), slices, False
    if isinstance(optimizer, torch.optim.Optimizer):  # it steps the masters of the parameters, or these themselves
        shards = [master for group in optimizer.param_groups for master in group["params"]]
        names = [name for name, _ in parameters]
    else:  # 16 bits without ZeRO: one master for each parameter
        shards = [master for group in _private(optimizer, "fp32_groups") for master in group]
        name_of = {id(parameter): name for name, parameter in parameters}
        names = [name_of[id(parameter)] for group in _private(optimizer, "fp16_groups") for parameter in group]
    slices = [Slice(name, 0, shard.numel(), i, 0) for i, (shard, name) in enumerate(zip(shards, names, strict=True))]
    return shards, slices, True


def _private(owner: Any, name: str) -> Any:
    """A private attribute of DeepSpeed's. UserError where this release of DeepSpeed has none of that name."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise UserError(
            f"DeepSpeed {version('deepspeed')} stores its master weights differently from {TRIED} "
            f"({type(owner).__name__} has no {name}); install deepspeed=={TRIED}"
        ) from None
