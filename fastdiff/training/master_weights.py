"""The fp32 master weights wherever ZeRO keeps them, and tensors laid out like them (EMA, moments).

On each rank the masters are a few flat tensors (whole parameters at stage 0, partitions from stage 1 on). `pieces`
says which stretch of which parameter lies where, so that any such set of tensors can be gathered into a state_dict
that knows nothing of the world size, and filled from one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """numel elements from `start` of the flattened parameter `name` lie from `offset` of flat tensor `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


class MasterWeights:
    """The master weights of a DeepSpeed engine: `flats` on this rank, laid out as `pieces` says."""

    def __init__(self, engine: Any, module: nn.Module, rank: int, world_size: int) -> None:
        self.shapes = {name: _shape(p) for name, p in module.named_parameters()}
        self.rank, self.world_size = rank, world_size
        names = {id(p): name for name, p in module.named_parameters()}
        self.flats, self.pieces, self.replicated = _layout(engine, module, names)
        self._all_pieces: list[list[Piece]] | None = None

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(flat, requires_grad=False) for flat in self.flats]

    def clone(self) -> list[Tensor]:
        return [flat.detach().clone() for flat in self.flats]

    def detached(self) -> list[Tensor]:
        """The masters themselves, outside autograd."""
        return [flat.detach() for flat in self.flats]

    def gather(self, tensors: list[Tensor]) -> dict[str, Tensor] | None:
        """Whole parameters on the CPU from tensors laid out like the masters: on rank 0; None elsewhere. Collective."""
        local = [tensors[p.flat].detach().flatten()[p.offset : p.offset + p.numel] for p in self.pieces]
        if self.replicated or self.world_size == 1:
            return self._assemble([(self.pieces, local)]) if self.rank == 0 else None
        if self._all_pieces is None:
            self._all_pieces = [[] for _ in range(self.world_size)]
            dist.all_gather_object(self._all_pieces, self.pieces)
        if self.rank != 0:
            if local:
                dist.send(torch.cat(local).contiguous(), dst=0)
            return None
        parts = [(self.pieces, local)]
        for source in range(1, self.world_size):
            pieces = self._all_pieces[source]
            if pieces:
                received = torch.empty(sum(p.numel for p in pieces), device=tensors[0].device)
                dist.recv(received, src=source)
                parts.append((pieces, list(received.split([p.numel for p in pieces]))))
        return self._assemble(parts)

    def _assemble(self, parts: list[tuple[list[Piece], list[Tensor]]]) -> dict[str, Tensor]:
        whole = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        for pieces, values in parts:
            for piece, value in zip(pieces, values, strict=True):
                whole[piece.name].view(-1)[piece.start : piece.start + piece.numel].copy_(value)
        return whole

    @torch.no_grad()
    def fill(self, tensors: list[Tensor], state: dict[str, Tensor]) -> None:
        """Copy this rank's stretches of a state_dict into tensors laid out like the masters."""
        for p in self.pieces:
            part = state[p.name].reshape(-1)[p.start : p.start + p.numel]
            tensors[p.flat].view(-1)[p.offset : p.offset + p.numel].copy_(part)

    @torch.no_grad()
    def load(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Take up weights on this rank: into the masters, and into what the network computes with."""
        self.fill(self.detached(), state)
        for name, parameter in module.named_parameters():
            if parameter.numel() == state[name].numel():  # else ZeRO-3 holds it in parts only
                parameter.copy_(state[name])
            share = getattr(parameter, "ds_tensor", None)  # its part on this rank, the last rank's padded
            if share is not None:
                part = state[name].reshape(-1)[self.rank * share.numel() :][: share.numel()]
                share.view(-1)[: part.numel()].copy_(part)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in place


def _parameters(module: nn.Module) -> Iterator[Any]:
    """Parameters with the attributes that DeepSpeed hangs on them."""
    return iter(module.parameters())


def _layout(engine: Any, module: nn.Module, names: dict[int, str]) -> tuple[list[Tensor], list[Piece], bool]:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        flats = list(optimizer.fp32_partitioned_groups_flat)
        pieces = []
        for parameter in _parameters(module):
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * parameter.partition_numel()
            numel = min(int(numel), parameter.ds_numel - start)  # the last partition is padded
            if numel > 0:
                pieces.append(Piece(names[id(parameter)], start, numel, group, int(offset)))
        return flats, pieces, False
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1 and 2
        if hasattr(optimizer, attribute):
            flats = list(getattr(optimizer, attribute))
            pieces = []
            for parameter in _parameters(module):
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    group = mapping.param_group_index
                    pieces.append(Piece(names[id(parameter)], low.start, low.numel, group, high.start))
            return flats, pieces, False
    if hasattr(optimizer, "fp32_groups"):  # 16-bit without ZeRO: a master per parameter
        pairs = [
            (master, names[id(parameter)])
            for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
            for master, parameter in zip(masters, parameters, strict=True)
        ]
    else:
        pairs = [(parameter, name) for name, parameter in module.named_parameters()]
    flats = [master for master, _ in pairs]
    return flats, [Piece(name, 0, flat.numel(), i, 0) for i, (flat, name) in enumerate(pairs)], True
