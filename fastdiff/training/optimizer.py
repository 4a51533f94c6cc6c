"""AdamW that also updates the averages of the weights, with a Triton kernel in the same pass over memory.

DeepSpeed steps the optimiser at once (ZeRO stage 0), once per parameter group (1 and 2), or once per sub-group with
`param_groups` rewritten to a single tensor (3), and not at all when gradients overflowed. Averages are therefore found
by the identity of the float32 tensor that is stepped, and a skipped step leaves them alone.
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
from fastdiff.models.arrangement import arrange_weights
from fastdiff.models.encoder import Encoder
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import StepPlan


@dataclass(frozen=True)
class OnDevice:
    """The numbers of a step as float32 scalars on the device, so that the host need not wait for a GPU.

    lr          learning rate, in place of the one in the groups
    grad_scale  factor of the gradients; None: 1
    found_inf   the step changes nothing unless this is 0; None: 0
    """

    lr: Tensor
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW with the same state, which also updates the attached averages.

    fused_kernel  update everything in one Triton launch; False: torch's fused AdamW, then `ops.update_ema`
    overflow      if True, `step` changes nothing; DeepSpeed's engine reads it to learn whether a step was skipped
    averages      rate → averages, in the order in which they were attached
    copies        (master weight, its 16-bit copy), as they were attached
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
        # A GradScaler then unscales gradients and skips steps itself, without arguments to `step`.
        self._step_supports_amp_scaling = False
        self.fused_kernel = fused_kernel
        self.overflow = False
        self.averages: dict[float, list[Tensor]] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._copy_of: dict[int, Tensor] = {}  # by the id of the master weight
        # id of a tensor → its averages, and the tensor itself, so that no other can get this id
        self._of: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._lists: dict[tuple[int, ...], tuple[list[list[Tensor]], Any]] = {}

    def attach_averages(self, stepped: Iterable[Tensor], averages: Mapping[float, Iterable[Tensor]]) -> None:
        """Update these averages in every step from now on.

        stepped   the float32 tensors that `step` will update: `MasterWeights.shards`, once DeepSpeed has made them
        averages  rate → one average for each of them
        """
        stepped = list(stepped)
        self.averages = {rate: list(tensors) for rate, tensors in averages.items()}
        for rate, tensors in self.averages.items():
            if [tensor.shape for tensor in tensors] != [p.shape for p in stepped]:
                raise ValueError(
                    f"attach_averages needs an average of rate {rate} in the shape of each of {len(stepped)} master "
                    f"weights; got {len(tensors)} tensors: make them with MasterWeights.clone()"
                )
        columns = list(self.averages.values())
        self._of = {id(p): (p, [column[i] for column in columns]) for i, p in enumerate(stepped)}
        self._lists.clear()

    def attach_copies(self, masters: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
        """Write the 16-bit copies of master weights in every step from now on, and take their gradients.

        masters  float32 tensors that `step` updates
        weights  one for each, in its shape and memory layout, with which a network computes; a master that is its own
                 weight has no copy

        If the masters have gradients of their own, all of them, these are taken: float32 sums over micro-batches.
        """
        self.copies = [
            (master, weight) for master, weight in zip(masters, weights, strict=True) if master is not weight
        ]
        if self.copies and not self.fused_kernel:
            raise ValueError("AdamWEMA writes copies of master weights only with fused_kernel; got fused_kernel False")
        self._copy_of = {id(master): weight for master, weight in self.copies}
        self._lists.clear()

    def squared_norm(self) -> Tensor:
        """The sum of squares of the gradients that `step` will read, a scalar; not finite if one of them isn't."""
        found = (self._gradient_of(p) for group in self.param_groups for p in group["params"])
        return ops.squared_norm([grad for grad in found if grad is not None])

    def _gradient_of(self, p: Tensor) -> Tensor | None:
        """The gradient of a parameter, or of its 16-bit copy, in the parameter's memory layout."""
        copy = self._copy_of.get(id(p))
        grad = copy.grad if p.grad is None and copy is not None else p.grad
        return None if grad is None else laid_out_as(p, grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and the averages of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.overflow:
            self._step_all(None)
        return loss

    @torch.no_grad()
    def step_on_device(self, given: OnDevice) -> None:
        """`step` with numbers that lie on the device, so that a CUDA graph can replay it."""
        self._step_all(given)

    def _step_all(self, given: OnDevice | None) -> None:
        for group in self.param_groups:
            updated: set[int] = set()
            for params, grads in self._parts(group):
                self._update(group, params, grads, given)
                updated.update(map(id, params))
            self._move_averages([p for p in group["params"] if id(p) not in updated], given)

    def _parts(self, group: dict[str, Any]) -> list[tuple[list[Tensor], list[Tensor]]]:
        """[(parameters, their gradients)] of a group's parameters without a 16-bit copy, and of those with one.

        Those without a gradient are left out. A part is updated in one launch.
        """
        parts: tuple[tuple[list[Tensor], list[Tensor]], ...] = (([], []), ([], []))
        for p in group["params"]:
            grad = self._gradient_of(p)
            if grad is not None:
                params, grads = parts[id(p) in self._copy_of]
                params.append(p)
                grads.append(grad)
        return [part for part in parts if part[0]]

    def prepare(self) -> None:
        """Copy to the device the tables with which kernels find the current gradients, those of their norm, too."""
        if not self.fused_kernel:
            return
        for group in self.param_groups:
            for params, grads in self._parts(group):
                self._kernel_lists(params, *self._states_of(params)).prepare(grads)
        self.squared_norm()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any AdamW, whichever of torch's implementations it used."""
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._lists.clear()

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], given: OnDevice | None) -> None:
        """Update parameters that have gradients, and their averages."""
        if group["amsgrad"] or group["maximize"]:
            raise ValueError(
                "AdamWEMA supports neither amsgrad nor maximize; got a group that sets one: set them to False"
            )
        beta1, beta2 = group["betas"]
        numbers: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        numbers |= {"weight_decay": group["weight_decay"], "lr": given.lr if given else float(group["lr"])}
        grad_scale, found_inf = (given.grad_scale, given.found_inf) if given else (None, None)
        exp_avgs, exp_avg_sqs, steps = self._states_of(params)
        if self.fused_kernel:
            if found_inf is None:
                torch._foreach_add_(steps, 1)
            else:  # a list of tensors, because the host would read a single tensor as a number
                torch._foreach_add_(steps, [(found_inf == 0).to(steps[0])] * len(steps))
            self._kernel_lists(params, exp_avgs, exp_avg_sqs, steps).step(
                grads, **numbers, grad_scale=grad_scale, found_inf=found_inf
            )
            torch.autograd.graph.increment_version([*params, *self._copies_of(params)])
            return
        if grad_scale is not None:
            grads = list(torch._foreach_mul(grads, grad_scale))
        adamw(
            *(params, grads, exp_avgs, exp_avg_sqs, [], steps),
            **{"fused": True, "amsgrad": False, "maximize": False, "found_inf": found_inf, **numbers},
        )
        self._move_averages(params, given)

    def _states_of(self, params: list[Tensor]) -> list[list[Tensor]]:
        """[exp_avgs, exp_avg_sqs, steps] of these parameters; zeros in their first step."""
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [[self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")]

    def _kernel_lists(self, *columns: list[Tensor]) -> Any:
        """The kernel's lists for these parameters, moments and steps, kept until one of them is a new object."""
        key = tuple(map(id, columns[0]))
        known, lists = self._lists.get(key, ([], None))
        if lists is None or not all(all(map(is_, a, b)) for a, b in zip(columns, known, strict=True)):
            averages = [average for p in columns[0] for average in self._averages_of(p)]
            halves = self._copies_of(columns[0])
            lists = ops.AdamWLists(*columns, averages=averages, rates=list(self.averages), halves=halves)
            if len(self._lists) > 1000:  # every step has other tensors, so the cache is useless
                self._lists.clear()
            self._lists[key] = (list(columns), lists)
        return lists

    def _copies_of(self, params: list[Tensor]) -> list[Tensor]:
        return [self._copy_of[id(p)] for p in params if id(p) in self._copy_of]

    def _averages_of(self, p: Tensor) -> list[Tensor]:
        if not self.averages:
            return []
        if id(p) not in self._of:
            raise ValueError(
                f"AdamWEMA was given averages, but none of a parameter {tuple(p.shape)} that it updates: attach those "
                "of MasterWeights.shards, after deepspeed.initialize"
            )
        return self._of[id(p)][1]

    def _move_averages(self, params: list[Tensor], given: OnDevice | None) -> None:
        for i, rate in enumerate(self.averages):
            averages = [self._averages_of(p)[i] for p in params]
            if params and given is not None and given.found_inf is not None:
                share = (1 - rate) * (given.found_inf == 0).to(params[0])
                torch._foreach_lerp_(averages, params, [share] * len(params))
            elif params:
                ops.update_ema(averages, params, rate)


def create_optimizer(model: Encoder, plan: StepPlan) -> AdamWEMA:
    """The optimiser of a model that is on its device. It updates by the kernel where its tensors are on a GPU."""
    fused_kernel = ops.uses_kernels(next(model.parameters())) and not plan.offloads_optimizer
    train = plan.train
    # DeepSpeed makes master weights of its own, in flat buffers of contiguous parameters.
    arranges = fused_kernel and not plan.engine_reason
    masters = arrange_weights(model) if arranges else list(model.parameters())
    optimizer = AdamWEMA(masters, lr=train.lr, weight_decay=train.weight_decay, fused_kernel=fused_kernel)
    optimizer.attach_copies(masters, model.parameters())
    return optimizer


def laid_out_as(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout. Autograd's gradients have it; code that sets .grad may not."""
    if grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous()):
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)


def learning_rate(train: TrainSettings, updates: int) -> float:
    """Learning rate after `updates` updates: a linear rise over lr_warmup_steps, a linear fall over lr_anneal_steps."""
    rate = train.lr
    if train.lr_warmup_steps:
        rate *= min(1.0, (updates + 1) / train.lr_warmup_steps)
    if train.lr_anneal_steps:
        rate *= max(0.0, 1 - updates / train.lr_anneal_steps)
    return rate


def learning_rate_on_device(train: TrainSettings, updates: Tensor) -> Tensor:
    """`learning_rate`, to the last bit, for an int64 scalar on the device: a float64 scalar there."""
    rate = torch.full_like(updates, train.lr, dtype=torch.float64)
    if train.lr_warmup_steps:
        rate = rate * ((updates + 1).double() / train.lr_warmup_steps).clamp(max=1.0)
    if train.lr_anneal_steps:
        rate = rate * (1 - updates.double() / train.lr_anneal_steps).clamp(min=0.0)
    return rate
