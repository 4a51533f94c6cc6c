"""AdamW whose every step also moves the averages of the weights, in the same pass over memory where a kernel does it.

DeepSpeed steps it in its own ways: at once (ZeRO stage 0), once per parameter group (1 and 2), or once per sub-group
with `param_groups` rewritten to a single tensor (3), and not at all when gradients overflowed. Averages are therefore
found by the identity of the float32 tensor that is stepped, and a skipped step leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastdiff import ops
from fastdiff.training.settings import TrainSettings


@dataclass(frozen=True)
class OnDevice:
    """What a step that never waits for the GPU takes from there: float32 scalars.

    lr          takes the place of the groups' own.
    grad_scale  what the gradients are multiplied by; None: 1.
    found_inf   the step changes nothing unless it is 0; None: 0.
    """

    lr: Tensor
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW, state and all, which moves attached averages.

    fused_kernel  one Triton launch for everything; False: torch's fused AdamW, then `ops.update_ema`.
    overflow      set before a call of `step`, it makes that change nothing; under the name by which DeepSpeed's engine
                  asks whether its optimiser did.
    averages      rate → the averages, in the order in which they were attached.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused_kernel: bool,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # A GradScaler then unscales and skips by itself, and `step` need not know of it.
        self._step_supports_amp_scaling = False
        self.fused_kernel = fused_kernel
        self.overflow = False
        self.averages: dict[float, list[Tensor]] = {}
        self._of: dict[int, tuple[Tensor, list[Tensor]]] = {}  # id → the tensor, which keeps the id taken; its averages
        self._lists: dict[tuple[int, ...], tuple[list[list[Tensor]], Any]] = {}

    def attach_averages(self, masters: Iterable[Tensor], averages: Mapping[float, Iterable[Tensor]]) -> None:
        """From now on `averages`, one for each of the masters under every rate, follow them at each step.

        masters are the tensors that `step` will find: `MasterWeights.flats`, once DeepSpeed has put them in place.
        """
        masters = list(masters)
        self.averages = {rate: list(tensors) for rate, tensors in averages.items()}
        for rate, tensors in self.averages.items():
            if [tensor.shape for tensor in tensors] != [master.shape for master in masters]:
                raise ValueError(
                    f"attach_averages needs an average of rate {rate} in the shape of each of {len(masters)} masters; "
                    f"got {len(tensors)} tensors: make them with MasterWeights.clone()"
                )
        columns = list(self.averages.values())
        self._of = {id(master): (master, [c[i] for c in columns]) for i, master in enumerate(masters)}
        self._lists.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient, and of the averages of all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.overflow:
            self._step_all(None)
        return loss

    @torch.no_grad()
    def step_on_device(self, given: OnDevice) -> None:
        """`step` without a number from the host, so that a CUDA graph can replay it."""
        self._step_all(given)

    def _step_all(self, given: OnDevice | None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, given)
            self._follow([p for p in group["params"] if p.grad is None], given)

    def prepare(self) -> None:
        """Bring to the device what a step with the gradients of now needs there beside them."""
        if not self.fused_kernel:
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in params]
            columns = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            if params:
                self._kernel_lists(params, *columns).prepare([laid_out_as(p, p.grad) for p in params])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Any AdamW's state, whichever of torch's implementations it ran."""
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._lists.clear()

    def _update(self, group: dict[str, Any], params: list[Tensor], given: OnDevice | None) -> None:
        """Steps parameters that have gradients."""
        if group["amsgrad"] or group["maximize"]:
            raise ValueError(
                "AdamWEMA knows neither amsgrad nor maximize; got a group that sets one: set them to False"
            )
        grads = [laid_out_as(p, p.grad) for p in params]
        beta1, beta2 = group["betas"]
        numbers: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        numbers |= {"weight_decay": group["weight_decay"], "lr": given.lr if given else float(group["lr"])}
        grad_scale, found_inf = (given.grad_scale, given.found_inf) if given else (None, None)
        states = [self._state_of(p) for p in params]
        exp_avgs, exp_avg_sqs, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        if self.fused_kernel:
            if found_inf is None:
                torch._foreach_add_(steps, 1)
            else:  # a list of tensors, because one tensor alone would be read by the host and taken as a number
                torch._foreach_add_(steps, [(found_inf == 0).to(steps[0])] * len(steps))
            self._kernel_lists(params, exp_avgs, exp_avg_sqs, steps).step(
                grads, **numbers, grad_scale=grad_scale, found_inf=found_inf
            )
            torch.autograd.graph.increment_version(params)
            return
        if grad_scale is not None:
            grads = list(torch._foreach_mul(grads, grad_scale))
        adamw(
            *(params, grads, exp_avgs, exp_avg_sqs, [], steps),
            **{"fused": True, "amsgrad": False, "maximize": False, "found_inf": found_inf, **numbers},
        )
        self._follow(params, given)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _kernel_lists(self, *columns: list[Tensor]) -> Any:
        """What the kernel has checked of these parameters, moments and steps; anew when one is another object."""
        key = tuple(map(id, columns[0]))
        known, lists = self._lists.get(key, ([], None))
        if lists is None or not all(all(map(is_, a, b)) for a, b in zip(columns, known, strict=True)):
            averages = [average for p in columns[0] for average in self._averages_of(p)]
            lists = ops.AdamWLists(*columns, averages=averages, rates=list(self.averages), halves=[])
            if len(self._lists) > 1000:  # another set of parameters at every step, so nothing worth keeping
                self._lists.clear()
            self._lists[key] = (list(columns), lists)
        return lists

    def _averages_of(self, p: Tensor) -> list[Tensor]:
        if not self.averages:
            return []
        if id(p) not in self._of:
            raise ValueError(
                f"AdamWEMA was given averages, but none of a parameter {tuple(p.shape)} that it steps: attach those of "
                "MasterWeights.flats, after deepspeed.initialize"
            )
        return self._of[id(p)][1]

    def _follow(self, params: list[Tensor], given: OnDevice | None) -> None:
        for i, rate in enumerate(self.averages):
            averages = [self._averages_of(p)[i] for p in params]
            if params and given is not None and given.found_inf is not None:
                share = (1 - rate) * (given.found_inf == 0).to(params[0])
                torch._foreach_lerp_(averages, params, [share] * len(params))
            elif params:
                ops.update_ema(averages, params, rate)


def laid_out_as(p: Tensor, grad: Tensor | None) -> Tensor:
    """The gradient, in memory as its parameter is; autograd sees to that, but not everyone who sets .grad."""
    assert grad is not None
    if grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous()):
        return grad
    return torch.empty_like(p).copy_(grad)


def learning_rate(train: TrainSettings, updates: int) -> float:
    """Of the update that follows `updates` others: a linear rise over lr_warmup_steps, a linear fall to 0."""
    rate = train.lr
    if train.lr_warmup_steps:
        rate *= min(1.0, (updates + 1) / train.lr_warmup_steps)
    if train.lr_anneal_steps:
        rate *= max(0.0, 1 - updates / train.lr_anneal_steps)
    return rate


def learning_rate_on_device(train: TrainSettings, updates: Tensor) -> Tensor:
    """`learning_rate` of an int64 scalar on the device, to the last bit: a float64 scalar there."""
    rate = torch.full_like(updates, train.lr, dtype=torch.float64)
    if train.lr_warmup_steps:
        rate = rate * ((updates + 1).double() / train.lr_warmup_steps).clamp(max=1.0)
    if train.lr_anneal_steps:
        rate = rate * (1 - updates.double() / train.lr_anneal_steps).clamp(min=0.0)
    return rate
