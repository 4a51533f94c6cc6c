"""Times AdamW, one average and the bf16 copy in one launch, against torch's fused AdamW with two more calls.

    pytest benchmarks/bench_adamw_ema.py --benchmark-json out.json

GB/s count the least traffic: 38 bytes per weight for a step, 4 for the norm of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fastdiff.kernels import reference
from torch import Tensor
from torch.optim.adamw import adamw

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a GPU")

RATE, LR, BETA1, BETA2, EPS, DECAY = 0.9999, 1e-4, 0.9, 0.999, 1e-8, 0.01
MILLION = 1_000_000
# Sizes of CIFAR-10's and LSUN's networks, ImageNet-64's and its class-conditional one: flat as in ZeRO, and by module.
SETS: dict[str, list[int]] = {
    "55M flat": [55 * MILLION],
    "121M flat": [121 * MILLION],
    "273M flat": [273 * MILLION],
    "55M in 400": [256] * 200 + [274_744] * 200,
}


class State(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor]
    halves: list[Tensor]
    steps: list[Tensor]


def make(numels: list[int], device: torch.device) -> State:
    torch.manual_seed(0)

    def tensors(std: float) -> list[Tensor]:
        return [torch.randn(numel, device=device) * std for numel in numels]

    params = tensors(1.0)
    return State(
        params=params,
        grads=tensors(1e-3),
        exp_avgs=tensors(1e-4),
        exp_avg_sqs=[v.square_() for v in tensors(1e-3)],
        averages=[p.clone() for p in params],
        halves=[p.bfloat16() for p in params],
        steps=[torch.tensor(100.0, device=device) for _ in numels],
    )


def ours(state: State) -> Callable[[], Any]:
    """The update as the optimiser makes it: it counts up the steps, then makes one launch."""
    from fastdiff.kernels.adamw_ema import Lists

    lists = Lists(
        state.params, state.exp_avgs, state.exp_avg_sqs, state.steps, state.averages, [RATE], state.halves
    )  # fmt: skip

    def step() -> None:
        torch._foreach_add_(state.steps, 1)
        lists.step(state.grads, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY)

    return step


def eager(state: State) -> Callable[[], Any]:
    """The update as three calls, each over all tensors."""

    def step() -> None:
        adamw(
            *(state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, [], state.steps),
            fused=True, amsgrad=False, maximize=False, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY,
        )  # fmt: skip
        reference.update_ema(state.averages, state.params, RATE)
        torch._foreach_copy_(state.halves, state.params)

    return step


def plain(s: State) -> None:
    """The same as foreach operations for torch.compile to fuse; all tensors share one count of steps."""
    torch._foreach_add_(s.steps, 1)
    step_size = LR / (1 - BETA1 ** s.steps[0].double()).float()
    root = (1 - BETA2 ** s.steps[0].double()).sqrt().float()
    torch._foreach_lerp_(s.exp_avgs, s.grads, 1 - BETA1)
    torch._foreach_mul_(s.exp_avg_sqs, BETA2)
    torch._foreach_addcmul_(s.exp_avg_sqs, s.grads, s.grads, 1 - BETA2)
    denominators = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(s.exp_avg_sqs), root), EPS)
    changes = torch._foreach_mul(torch._foreach_div(s.exp_avgs, denominators), step_size)
    torch._foreach_mul_(s.params, 1 - LR * DECAY)
    torch._foreach_sub_(s.params, changes)
    torch._foreach_lerp_(s.averages, s.params, 1 - RATE)
    torch._foreach_copy_(s.halves, s.params)


def compiled(state: State) -> Callable[[], Any]:
    step = torch.compile(plain, fullgraph=True, dynamic=False)
    return lambda: step(state)


STEPS = {"ours": ours, "eager": eager, "compile": compiled}


def rows(names: Any) -> list[Any]:
    return [pytest.param(name, marks=needs_gpu if name == "ours" else ()) for name in names]


@pytest.mark.parametrize("row", rows(STEPS))
@pytest.mark.parametrize("name", SETS)
def bench_update(row: str, name: str, small: bool, gpu_time: Any, benchmark: Any, device: torch.device) -> None:
    """Time AdamW, average and copy. One set of tensors is enough, because each is larger than the L2 cache."""
    numels = [min(numel, 1000) for numel in SETS[name]][:20] if small else SETS[name]
    benchmark.group = f"adamw_ema {name}"
    gpu_time(STEPS[row](make(numels, device)), [()], bytes_moved=38 * sum(numels))


def our_norm(grads: list[Tensor]) -> Tensor:
    from fastdiff.kernels.adamw_ema import squared_norm

    return squared_norm(grads)


NORMS: dict[str, Callable[[list[Tensor]], Tensor]] = {"ours": our_norm, "eager": torch.nn.utils.get_total_norm}


@pytest.mark.parametrize("row", rows(NORMS))
@pytest.mark.parametrize("name", SETS)
def bench_norm(row: str, name: str, small: bool, gpu_time: Any, benchmark: Any, device: torch.device) -> None:
    """Time the norm of the gradients alone; a step with `norm` returns it without another pass."""
    numels = [min(numel, 1000) for numel in SETS[name]][:20] if small else SETS[name]
    benchmark.group = f"squared_norm {name}"
    gpu_time(NORMS[row], [(make(numels, device).grads,)], bytes_moved=4 * sum(numels))
