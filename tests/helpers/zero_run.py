"""Counts what DeepSpeed sends and stores at a ZeRO stage, for a tiny network. test_scaling.py runs it under torchrun.

python zero_run.py OUT.json STAGE:PRECISION[:REUSE] ...

REUSE is stage3_max_reuse_distance.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import UNetSettings, build_model
from fastdiff.runtime.processes import Processes
from fastdiff.training.deepspeed_engine import create_engine, start_processes
from fastdiff.training.master_weights import MasterWeights
from fastdiff.training.optimizer import create_optimizer
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import plan_step

MODEL = UNetSettings(
    image_size=8, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="4", learn_sigma=True
)
ACCUMULATION = 2
PERSISTENT = 3000
"""Largest number of elements of tensors that stage 3 does not partition; the default would exceed all tensors."""


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the tensors' storages by address."""
    made = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.numel():
            made[storage.data_ptr()] = storage.nbytes()
    return made


def logged(engine_log: dict[str, dict[int, list[Any]]], world_size: int) -> dict[str, int]:
    """Return the bytes of whole tensors by collective. For an all-gather, DeepSpeed logs the part of one rank."""
    totals: dict[str, int] = defaultdict(int)
    for name, sizes in engine_log.items():
        kind = next((k for k in ("all_gather", "reduce_scatter", "all_reduce") if name.startswith(k)), name)
        whole = world_size if kind == "all_gather" else 1
        totals[kind] += sum(size * entry[0] * whole for size, entry in sizes.items())
    return dict(totals)


def gradients(engine: Any, parameters: list[Tensor], stage: int) -> int:
    """Return the bytes of averaged gradients that are stored until the step."""
    if stage == 0:
        return sum(p.grad.nbytes for p in parameters if p.grad is not None)
    if stage == 3:
        return engine.optimizer.grad_partitions_flat_buffer.nbytes
    return sum(t.nbytes for kept in engine.optimizer.averaged_gradients.values() for t in kept)


def count(processes: Processes, stage: int, precision: str, reuse: int = 1_000_000_000) -> dict[str, Any]:
    """Build an engine, take two optimiser steps, and count the second one."""
    from deepspeed.comm import comms_logger

    torch.manual_seed(0)
    model = build_model(MODEL)
    world_size = processes.world_size
    train = TrainSettings(
        batch_size=2 * ACCUMULATION * world_size,
        microbatch=2,
        precision=precision,
        zero_stage=stage,
        ema_rate="0.9,0.99",
    )
    section: dict[str, Any] = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}
    if stage == 3:
        section["zero_optimization"] = {
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_reuse_distance": reuse,
            "stage3_prefetch_bucket_size": min(reuse, 50_000_000),  # prefetched weights are not released either
            "reduce_bucket_size": 1_000_000,
        }
    plan = plan_step(train, section, processes)
    optimizer = create_optimizer(model, plan)
    engine = create_engine(model, optimizer, plan)
    master_weights = MasterWeights(engine.optimizer, model, processes.rank, world_size)
    parameters = list(model.parameters())
    counted: dict[str, Any] = {"stage": stage, "precision": precision, "reuse": reuse}
    for _ in range(2):
        comms_logger.reset_data()
        for i in range(ACCUMULATION):
            out = engine(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
            counted["whole"] = sum(p.nbytes for p in parameters)  # a partitioned weight has no elements
            engine.backward(out.float().square().mean())
            if i == 0:
                counted["accumulated"] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            else:
                counted["gradients"] = gradients(engine, parameters, stage)
            engine.step()
    counted["messages"] = logged(comms_logger.comms_dict, world_size)
    weights = storages([p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")])
    counted["weights"] = sum(weights.values())
    shards = storages(master_weights.shards)
    counted["masters"] = sum(size for address, size in shards.items() if address not in weights)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    counted["moments"] = sum(storages(moments).values())
    counted["averages"] = sum(sum(storages(master_weights.clone()).values()) for _ in train.ema_rate)
    return counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = start_processes()
    results = []
    for case in sys.argv[2:]:
        zero_stage, dtype, *distance = case.split(":")
        results.append(count(joined, int(zero_stage), dtype, *map(int, distance)))
    if joined.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
