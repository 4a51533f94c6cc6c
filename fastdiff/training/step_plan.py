"""The plan of an optimiser step, and the code that a run compiles for it.

`plan_step` derives the plan from the settings, once; everything that depends on it is given the plan. `decide_compile`
and `compile_network` deal with torch.compile, and `training_launches` lists the Triton kernels that a step launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings
from fastdiff.diffusion.noise_keys import NOISE, TIMESTEPS
from fastdiff.diffusion.timesteps import UniformSampler
from fastdiff.errors import UserError
from fastdiff.models import UNet
from fastdiff.models.arrangement import arrange_weights
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.models.classifier_settings import NetworkSettings
from fastdiff.models.regions import regions_of
from fastdiff.models.unet import body_dtype, dummy_batch
from fastdiff.precompile import META, Launch, launches_of
from fastdiff.runtime.machine import compile_kwargs, missing_compiler
from fastdiff.runtime.processes import Processes
from fastdiff.settings import merge
from fastdiff.training.metrics import LossMeter
from fastdiff.training.microbatch import bucket_size, overlaps, split_batch
from fastdiff.training.objective import create_objective
from fastdiff.training.settings import TrainSettings

WORTHWHILE_STEPS = 20_000
"""Steps from which compiling pays on a CPU: it takes one to two minutes and makes a step 5 to 10% faster."""
# Sections of DeepSpeed's JSON that hold nothing beyond our own settings.
_KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "zero_allow_untested_optimizer",
}


@dataclass(frozen=True)
class StepPlan:
    """The settings that an optimiser step depends on, and the values derived from them for these processes.

    train          the training settings; `resolved` replaces an auto in them
    deepspeed      the user's section of DeepSpeed's JSON
    world_size     number of processes
    dtype          dtype of the network's body
    engine_reason  why a step goes through DeepSpeed's engine; empty: one process takes it alone (`DeviceStep`)
    micro          images that a process computes at once
    """

    train: TrainSettings
    deepspeed: dict[str, Any]
    world_size: int
    dtype: torch.dtype
    engine_reason: str
    micro: int

    def __post_init__(self) -> None:
        given = self.deepspeed.get("gradient_accumulation_steps", "auto")
        if given not in ("auto", self.accumulation):
            raise UserError(
                f"deepspeed.gradient_accumulation_steps {given} contradicts batch_size {self.train.batch_size}, "
                f"microbatch {self.train.microbatch} and {self.world_size} processes, which make {self.accumulation}"
            )

    @property
    def share(self) -> int:
        """Images per process and optimiser step."""
        return self.train.batch_size // self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.share // self.micro

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced over the processes while the backward pass computes."""
        return overlaps(self.train.zero_stage, self.world_size)

    @property
    def in_regions(self) -> bool:
        """Whether the network is compiled in regions, whose gradients can be reduced before the backward pass ends."""
        return self.overlaps and self.train.compile is True

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are multiplied by a number before the update, to clip them or to undo a loss scale."""
        return self.train.precision == "fp16" or self.train.grad_clip > 0

    @property
    def offloads_optimizer(self) -> bool:
        """Whether DeepSpeed keeps master weights and moments on the CPU."""
        return "offload_optimizer" in self.deepspeed.get("zero_optimization", {})

    def resolved(self, micro: int, compiles: bool, cuda_graph: bool | Literal["auto"]) -> StepPlan:
        """The plan with the values chosen for settings that may have been auto.

        cuda_graph "auto" now means graphs that the step can do without, where a capture fails.
        """
        train = self.train.model_copy(update={"microbatch": micro, "compile": compiles, "cuda_graph": cuda_graph})
        return replace(self, train=train, micro=micro)

    def deepspeed_json(self, parameters: int) -> dict[str, Any]:
        """DeepSpeed's JSON for a network with this many parameters.

        It holds values derived from the settings, overridden by those in the user's section.
        """
        train = self.train
        bucket = bucket_size(train.zero_stage, self.world_size, parameters)
        derived: dict[str, Any] = {
            "train_batch_size": train.batch_size,
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": train.grad_clip,
            "zero_optimization": {
                "stage": train.zero_stage,
                **({"reduce_bucket_size": bucket} if train.zero_stage else {}),
                **({"overlap_comm": True} if self.overlaps else {}),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # else optimisers other than DeepSpeed's can't be offloaded
            "steps_per_print": None,
        }
        if train.precision == "bf16":
            derived["bf16"] = {"enabled": True}
        if train.precision == "fp16":
            # improved-diffusion's scaler: 2^20 at first, log2 grows steadily, halves at once when a gradient overflows.
            window = max(1, round(1 / train.fp16_scale_growth))
            derived["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": window, "hysteresis": 1}
        result = merge(derived, {key: value for key, value in self.deepspeed.items() if value != "auto"})
        result["train_micro_batch_size_per_gpu"] = self.micro  # the user's is a limit, as microbatch is
        return result


def plan_step(train: TrainSettings, deepspeed: dict[str, Any], processes: Processes) -> StepPlan:
    """The plan of a step. Until `resolved`, an auto micro-batch is the whole share of a process.

    Raises UserError for a batch that can't be shared out evenly and for settings that contradict each other.
    """
    micro = split_batch(train, processes.world_size)
    reason = needs_engine(train, deepspeed, processes.world_size)
    plan = StepPlan(
        train, deepspeed, processes.world_size, body_dtype(train.precision, processes.device), reason, micro
    )
    if train.cuda_graph is True and reason:
        raise UserError(f"--cuda_graph True can't be combined with {reason}; leave one of them out")
    return plan


def needs_engine(train: TrainSettings, deepspeed: dict[str, Any], world_size: int) -> str:
    """Why a step must go through DeepSpeed; empty where one process can take it alone (`DeviceStep`).

    A lone process has nothing to shard, and DeepSpeed's 16-bit optimisers would wait for the GPU in every step.
    """
    if world_size > 1:
        return f"{world_size} processes"
    if train.zero_stage > 1:
        return f"zero_stage {train.zero_stage}"
    followed = {"zero_optimization": {"stage"}, "fp16": {"enabled"}, "bf16": {"enabled"}}
    for section, value in deepspeed.items():
        if section in followed:
            others = sorted(set(value) - followed[section])
            if others:
                return f"deepspeed.{section}.{others[0]}"
        elif section not in _KNOWN:
            return f"deepspeed.{section}"
    return ""


def decide_compile(
    train: TrainSettings, device: torch.device, steps_left: int, before: bool | None = None
) -> tuple[bool, str]:
    """(whether to compile the network, why). before: whether the run that is resumed compiled it."""
    if train.compile != "auto":
        return bool(train.compile), f"compile {train.compile}"
    if train.zero_stage == 3:
        return False, "zero_stage 3 gathers weights block by block, which a compiled network can't"
    if device.type == "cuda":
        return True, "a GPU"
    if before is False:
        return False, "as the run began"
    if steps_left < WORTHWHILE_STEPS and not before:
        return False, f"on a CPU not worth it for fewer than {WORTHWHILE_STEPS} steps"
    if missing := missing_compiler(device):
        return False, missing
    return True, "as the run began" if before else f"{steps_left} steps to go"


def decide_cuda_graph(plan: StepPlan, device: torch.device) -> tuple[bool | Literal["auto"], str]:
    """(value of `StepPlan.resolved`, why) of cuda_graph."""
    if plan.train.cuda_graph != "auto":
        return bool(plan.train.cuda_graph), f"cuda_graph {plan.train.cuda_graph}"
    if device.type != "cuda":
        return False, "no GPU"
    if plan.engine_reason:
        return False, plan.engine_reason
    if plan.train.detect_anomaly:
        return False, "detect_anomaly looks at single operations"
    return "auto", "one GPU"


def compile_network(model: UNet | Classifier, zero_stage: int, in_regions: bool = False) -> None:
    """Compile the network's forward pass, as one graph or in regions, and nothing around it.

    DeepSpeed's `engine.compile` would include the hooks that it adds to the module, which count micro-batches: Dynamo
    would recompile them at every count.
    """
    device = next(model.parameters()).device
    kwargs = compile_kwargs(device, fullgraph=zero_stage < 3)
    if device.type == "cuda":
        kwargs["options"]["post_grad_custom_pre_pass"] = ops.sums_in_norms()
    compiled = regions_of(model).compile(**kwargs) if in_regions else torch.compile(model.forward, **kwargs)
    model.forward = compiled  # type: ignore[method-assign]


def training_launches(
    settings: NetworkSettings,
    diffusion: DiffusionSettings,
    micro: int,
    precision: torch.dtype,
    *,
    more: bool = False,
    rates: Sequence[float] = (0.9999,),
    scaled: bool = False,
    through_engine: bool = False,
    in_regions: bool = False,
    compiled: bool = True,
    noised: bool = True,
) -> list[Launch]:
    """The kernel launches of an optimiser step on micro-batches of `micro` images, with a body in `precision`.

    more            Whether a step has more than one micro-batch.
    rates           Decay rates of the averages of the weights.
    scaled          Whether gradients are clipped or carry a loss scale.
    through_engine  Whether DeepSpeed takes the step instead of `DeviceStep`; then weights are in `precision`, too.
    in_regions      Whether the network is compiled in regions, at whose borders no norm adds up a residual sum.
    compiled        Whether it is compiled at all, so that norms add up gradients (see `ops.sums_in_norms`).
    noised          Whether a classifier sees noised images.
    """

    def work() -> None:
        given = (settings, diffusion, micro, precision, more, through_engine, in_regions, compiled, noised)
        model = forward_and_backward(*given)
        _update(model, rates, scaled, through_engine, more)

    return launches_of(work)


def forward_and_backward(
    settings: NetworkSettings,
    diffusion: DiffusionSettings,
    micro: int,
    precision: torch.dtype,
    more: bool = False,
    through_engine: bool = False,
    in_regions: bool = False,
    compiled: bool = True,
    noised: bool = True,
) -> UNet | Classifier:
    """Run a training step up to its gradients on the meta device; returns the network. See `training_launches`."""
    with META:
        model = build_network(settings).train().set_precision(precision)
    if through_engine:
        model.to(precision)
    else:
        arrange_weights(model)
    if in_regions:
        model.forward = regions_of(model)  # type: ignore[method-assign]
    objective = create_objective(settings, diffusion, noised)
    timesteps = UniformSampler(objective.num_timesteps, META)
    meter = LossMeter(objective.num_timesteps, META, objective.loss_terms)
    step, batch = dummy_batch(settings, 2 * micro, META), dummy_batch(settings, micro, META)
    # A second micro-batch lies behind the first one, perhaps not at a multiple of 16 bytes.
    for cut in (slice(micro), slice(micro, 2 * micro))[: 1 + more]:
        positions = step.noise.index[cut]
        t, weights = timesteps.sample(ops.image_uniform(TIMESTEPS, positions, 0))
        noise = replace(batch.noise, seed=NOISE, index=positions)
        given = batch._replace(images=step.images[cut], noise=noise)
        terms = objective.training_losses(model, *given)
        meter.add(t, weights, terms)
        with ops.eager_sums() if compiled else nullcontext():
            terms["loss"].mean().backward()
    return model


def _update(model: UNet | Classifier, rates: Sequence[float], scaled: bool, through_engine: bool, more: bool) -> None:
    """Launch the kernels of the optimiser's update."""
    weights: list[Tensor] = list(model.parameters())
    copies = [] if through_engine else [p for p in weights if p.dtype != torch.float32]
    plain = [p for p in weights if through_engine or p.dtype == torch.float32]

    def like(tensors: list[Tensor], dtype: torch.dtype | None = torch.float32, count: int = 1) -> list[Tensor]:
        return [torch.empty_like(p, dtype=dtype) for p in tensors for _ in range(count)]

    parts = [(plain, like(plain), []), (copies, like(copies, torch.float32 if more else None), copies)]
    squared = ops.squared_norm([grad for _, gradients, _ in parts for grad in gradients])
    given: dict[str, Any] = {"lr": 1e-4}
    if not through_engine:
        grad_scale, found_inf = ops.grad_scale_and_overflow(squared)
        given = {"lr": squared, "grad_scale": grad_scale if scaled else None, "found_inf": found_inf}
    for part, gradients, halves in parts:
        if part:
            lists, averages = [like(part) for _ in range(3)], like(part, count=len(rates))
            steps = [squared] * len(part)
            update = ops.AdamWLists(*lists, steps=steps, averages=averages, rates=list(rates), halves=halves)
            update.step(gradients, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, **given)
