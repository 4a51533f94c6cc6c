"""Records when the backward pass of each compiled region begins and ends, and when gradients are sent.

python overlap_run.py OUT.json STAGE:regions|whole ...

test_overlap.py runs it under torchrun. OUT.json holds one object per case: "events" of a step of two micro-batches,
in order: "begin NAME", "end NAME" and "send"; and "losses" of all steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff.models.regions import Regions
from fastdiff.training import step_plan
from helpers.small_trainer import losses_of, small_trainer

SMALLEST = {"attention_resolutions": "", "dropout": 0.0}
COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")


def watched(name: str, function: Callable[..., Any], events: list[str]) -> Callable[..., Any]:
    """Return the compiled function, noting the beginning and the end of its node in each backward pass."""

    def call(*args: Any) -> Any:
        result = function(*args)
        node = next(leaf.grad_fn for leaf in tree_leaves(result) if leaf.requires_grad)
        node.register_prehook(lambda gradients: events.append(f"begin {name}"))
        node.register_hook(lambda inputs, outputs: events.append(f"end {name}"))
        return result

    return call


def watch(network: Any, events: list[str]) -> None:
    if isinstance(network.forward, Regions):
        for name, function in list(vars(network.forward).items()):
            if callable(function) and name.startswith("_"):
                setattr(network.forward, name, watched(name.strip("_"), function, events))
    else:
        network.forward = watched("whole", network.forward, events)


def sending(collective: Callable[..., Any], events: list[str]) -> Callable[..., Any]:
    """Return the collective, noting its calls with gradients; overflow and norms are single numbers."""

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > 1:
            events.append("send")
        return collective(tensor, *args, **kwargs)

    return call


def case(stage: int, in_regions: bool) -> dict[str, Any]:
    """Take three steps, the last of which is recorded; after the first nothing may be compiled again."""
    torch._dynamo.reset()
    settings: dict[str, Any] = {"zero_stage": stage, "precision": "bf16", "batch_size": 8, "model": SMALLEST}
    with ExitStack() as stack:
        if not in_regions:
            stack.enter_context(mock.patch.object(step_plan.StepPlan, "in_regions", False))
        trainer = small_trainer(compile=True, **settings)
    events: list[str] = []
    watch(trainer.model, events)
    losses = losses_of(trainer, 1)
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
        losses += losses_of(trainer, 1)
        comm = sys.modules["deepspeed.comm"]
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(comm, name, sending(getattr(comm, name), events)))
        events.clear()
        losses += losses_of(trainer, 1)
    return {"events": events, "losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = step_plan.compile_kwargs
    step_plan.compile_kwargs = lambda *a, **k: {**chosen(*a, **k), "backend": "aot_eager"}  # type: ignore[assignment]
    made = []
    for words in sys.argv[2:]:
        stage, how = words.split(":")
        made.append(case(int(stage), how == "regions"))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(made))
