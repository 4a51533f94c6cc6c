"""Settings of training, and their agreement with the user's section of DeepSpeed's JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError, did_you_mean, quoted
from fastdiff.evaluation.settings import known_metrics
from fastdiff.models.settings import BackboneSettings, SuperResSettings, UNetSettings
from fastdiff.ops import Kernels
from fastdiff.settings import (
    Affects,
    Count,
    FilePath,
    Floats,
    Interval,
    Settings,
    Switch,
    Words,
    affecting,
    is_true,
    what_is_wrong,
)

RUN = Affects("run")
"""Marks settings that say where and how to run. Changing them doesn't change a run's results, except for rounding."""
STREAM = Affects("stream")
"""Marks training settings that decide which images, timesteps and noise each step sees. A run may change them only by
allow_change."""
T = TypeVar("T", bound="RunSettings")
FOREVER = 1_000_000  # steps of a run that names no end


class RunSettings(Settings):
    """What the trainings of diffusion models and of classifiers have in common."""

    run_dir: Annotated[FilePath, RUN] = ""
    """Folder of the run; empty: the folder in OPENAI_LOGDIR, else runs/NAME. The same folder again resumes."""
    name: Annotated[str, RUN] = ""
    """NAME in runs/NAME; empty: the JSON file's name, else the script's."""
    resume_checkpoint: Annotated[FilePath, RUN] = ""
    """A checkpoint to start from: a step folder, or a .pt file with its ema_ and opt files beside it."""
    init_from: Annotated[FilePath, RUN] = ""
    """Weights to start a new run from: a .pt file, or a run's folder, whose newest average is taken. The classes, the
    image size and the diffusion process may be others."""
    max_steps: Annotated[int, RUN] = Field(0, ge=0)
    """Optimiser steps of the whole run; 0: lr_anneal_steps if that is set, else 1,000,000."""
    batch_size: Annotated[int, STREAM] = Field(1, ge=1)
    """Images per optimiser step, over all processes."""
    microbatch: Annotated[Count, RUN] = -1
    """Largest number of images that a process computes at once; -1: its whole share of the batch; auto: the fastest
    size that fits, measured at the start."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW, on every parameter."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly."""
    lr_anneal_steps: int = Field(0, ge=0)
    """Steps over which the learning rate falls linearly to 0; 0: never."""
    grad_clip: float = Field(0.0, ge=0)
    """Greatest norm of the gradient; 0: no limit."""
    ema_rate: Floats = (0.9999,)
    """Rates of the averages of the weights, e.g. 0.9999,0.999."""
    schedule_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    """How timesteps are drawn (Nichol & Dhariwal 2021, section 3.3)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network's body; master weights are fp32 always."""
    use_fp16: bool = False
    """The same as precision fp16."""
    allow_tf32: bool = False
    """On a GPU, round the factors of float32 products to TF32 (10 bits of mantissa), which is faster: of all matrix
    products and convolutions at precision fp32, else of the time embedding, and without kernels of the last layer."""
    fp16_scale_growth: float = Field(1e-3, gt=0, le=1)
    """Growth of log2 of the fp16 loss scale per step."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], RUN] = 0
    """What DeepSpeed's ZeRO partitions over the processes: 1 optimiser state, 2 gradients too, 3 weights too."""
    compile: Annotated[Switch, RUN] = "auto"
    """Compile the network with torch.compile. auto: on a GPU unless weights are partitioned (zero_stage 3), on a CPU
    for runs long enough to win back the minutes it takes."""
    cuda_graph: Annotated[Switch, RUN] = "auto"
    """Replay the whole step as CUDA graphs, so that it costs the host almost no time: on one GPU, without ZeRO or with
    its stage 1. auto: where that is possible."""
    cudnn_benchmark_limit: Annotated[int, RUN] = Field(10, ge=0)
    """On a GPU: how many plans cuDNN times for each shape of a convolution, at every start, to take the fastest; 0: all
    of them, for which the first step takes longer and later ones may be faster."""
    kernels: Annotated[Kernels, RUN] = "auto"
    """What computes the ops: auto takes Triton kernels on a GPU where they are fast, triton takes them wherever they
    run, reference keeps to PyTorch."""
    seed: Annotated[int, STREAM] = Field(0, ge=0, lt=2**32)
    """Seed of the initial weights, the order of the images, timesteps, noise and dropout."""
    profile: Annotated[int, RUN] = Field(0, ge=0)
    """Steps to profile, once the first ones are over: a trace and a table of where their time went; 0: none."""
    log_interval: Annotated[int, RUN] = Field(10, ge=1)
    """Steps between log lines."""
    save_interval: Annotated[Interval, RUN] = 10000
    """Steps between checkpoints, or minutes (30min); one is written at the end as well."""
    keep_last: Annotated[int, RUN] = Field(0, ge=0)
    """Number of newest checkpoints to keep, while older ones are removed; 0: keep all."""
    keep_every: Annotated[int, RUN] = Field(0, ge=0)
    """Keep the checkpoints of all steps that are multiples of this number, too; 0: none."""
    save_in_background: Annotated[Switch, RUN] = "auto"
    """Write checkpoints while training goes on, from a copy in memory. auto: if the copy fits."""
    allow_change: Annotated[Words, RUN] = ()
    """Settings that may differ from those of the checkpoint that the run continues from: batch_size, seed, and those of
    model and diffusion that leave the shapes of the weights alone, such as noise_schedule."""
    deterministic: Annotated[bool, RUN] = False
    """Compute the same numbers, bit for bit, in every run on the same GPUs: with slower algorithms where necessary, and
    none chosen by timing. On a CPU that is always so."""
    stall_minutes: Annotated[float, RUN] = Field(10.0, gt=0)
    """End the run, and say where it hangs, when a rank has made no progress for so many minutes."""
    max_bad_steps: int = Field(50, ge=0)
    """After so many steps in a row with a non-finite loss or gradient, which are skipped, return to the last good
    checkpoint, the first time, and end the run with a diagnosis, the second time; 0: never."""
    detect_anomaly: Annotated[bool, RUN] = False
    """Look for the first operation with a non-finite result, in forward and backward pass: slow."""

    @property
    def last_step(self) -> int:
        return self.max_steps or self.lr_anneal_steps or FOREVER

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value

    @field_validator("ema_rate")
    @classmethod
    def _rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not rates or any(not 0 <= rate < 1 for rate in rates):
            raise ValueError(f"every rate must be at least 0 and below 1, not {','.join(map(str, rates)) or 'empty'}")
        if len(set(rates)) != len(rates):
            raise ValueError(f"{','.join(map(str, rates))} names a rate twice")
        return rates

    @field_validator("microbatch")
    @classmethod
    def _microbatch(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1 and value != -1:
            raise ValueError(f"must be at least 1, -1 for the whole share of the batch, or auto, not {value}")
        return value

    @field_validator("allow_change")
    @classmethod
    def _changes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in CHANGES]:
            near = did_you_mean(unknown[0], CHANGES)
            raise ValueError(f"must be among {', '.join(CHANGES)}, not {unknown[0]!r}{near}")
        return names

    @model_validator(mode="after")
    def _combinations(self) -> RunSettings:
        if self.keep_every and not self.keep_last:
            raise ValueError(f"keep_every {self.keep_every} needs keep_last, without which all checkpoints stay")
        if self.use_fp16 and self.precision != "fp16":
            raise ValueError(f"use_fp16 True contradicts precision {self.precision}")
        if self.init_from and self.resume_checkpoint:
            raise ValueError(
                f"init_from {self.init_from} starts a new run from weights, but resume_checkpoint "
                f"{self.resume_checkpoint} goes on with a run; give only one of them"
            )
        if self.cuda_graph is True and self.zero_stage > 1:
            raise ValueError(f"cuda_graph True needs zero_stage 0 or 1, not {self.zero_stage}")
        return self


class TrainSettings(RunSettings):
    """The optimiser, the batch, and what is written when."""

    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of labels replaced by the null class in training, for guidance (0.1 is usual)."""
    sample_interval: Annotated[int, RUN] = Field(0, ge=0)
    """Steps between grids of samples from the first EMA; 0: none."""
    sample_count: Annotated[int, RUN] = Field(16, ge=1)
    """Images in such a grid."""
    sample_respacing: Annotated[str, RUN] = "ddim25"
    """Timesteps of such a grid: ddim25 takes 25 DDIM steps, 250 as many ancestral ones."""
    eval_interval: Annotated[int, RUN] = Field(0, ge=0)
    """Steps between scores of all averages, which go into progress.csv; the best average is kept in checkpoints/best.
    0: none."""
    eval_reference: Annotated[FilePath, RUN] = ""
    """What the averages' images are compared with: images of the model's size or their statistics, as in the
    `reference` of evaluate.py."""
    eval_samples: Annotated[int, RUN] = Field(5000, ge=10)
    """Images that each average draws for that, with dpmpp_2m_sde in 20 steps."""
    eval_metrics: Annotated[Words, RUN] = ("fid",)
    """Of fid, sfid, is, precision, recall, kid, several separated by commas; the first says which average is best."""
    eval_features: Annotated[FilePath, RUN] = "inception-v3-compat"
    """The network whose features are compared, as in the `features` of evaluate.py."""
    eval_feature_weights: Annotated[FilePath, RUN] = ""
    """The file of Inception's weights, for machines without a network; empty: torch-fidelity's are fetched once."""

    @field_validator("eval_metrics")
    @classmethod
    def _eval_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return known_metrics(names)

    @model_validator(mode="after")
    def _evaluation(self) -> TrainSettings:
        fields = type(self).model_fields
        given = [name for name in fields if name.startswith("eval_") and getattr(self, name) != fields[name].default]
        if given and not self.eval_interval:
            raise ValueError(f"{given[0]} needs eval_interval, the steps between evaluations")
        needing = [metric for metric in self.eval_metrics if metric != "is"]
        if self.eval_interval and needing and not self.eval_reference:
            raise ValueError(
                f"eval_interval {self.eval_interval} needs eval_reference, which {needing[0]} compares with"
            )
        return self


class ClassifierTrainSettings(RunSettings):
    """The optimiser, the batch, the validation, and what is written when."""

    label_dropout: ClassVar[float] = 0.0
    sample_interval: ClassVar[int] = 0

    max_steps: Annotated[int, RUN] = Field(150_000, ge=1)
    """Optimiser steps of the whole run."""
    iterations: Annotated[int, RUN] = Field(0, ge=0)
    """The same as max_steps, unless it is 0."""
    batch_size: Annotated[int, STREAM] = Field(4, ge=1)
    """Images per optimiser step, over all processes."""
    lr: float = Field(3e-4, gt=0)
    """Learning rate of AdamW."""
    anneal_lr: bool = False
    """Let the learning rate fall linearly to 0 over the whole run, as lr_anneal_steps of max_steps does."""
    classifier_use_fp16: bool = False
    """The same as precision fp16."""
    noised: Annotated[bool, STREAM] = True
    """Train on noised images, as guidance needs it; otherwise on the images themselves, at timestep 0."""
    val_data_dir: Annotated[FilePath, RUN] = ""
    """Folder with images for validation, in the same classes as data_dir; empty: no validation."""
    eval_interval: Annotated[int, RUN] = Field(5, ge=1)
    """Steps between batches of validation, whose losses and accuracies progress.csv has as val_loss, val_acc@1, ..."""

    @model_validator(mode="before")
    @classmethod
    def _annealed(cls, values: Any) -> Any:
        """Turn anneal_lr into lr_anneal_steps, which needs the number of steps from whatever source gives it."""
        if not isinstance(values, dict) or not is_true(values.get("anneal_lr")):
            return values
        steps = values.get("max_steps", cls.model_fields["max_steps"].default)
        if str(other := values.get("lr_anneal_steps", 0)) not in ("0", str(steps)):
            raise ValueError(f"anneal_lr True over {steps} steps contradicts lr_anneal_steps {other}; give one of them")
        return {**values, "lr_anneal_steps": steps}

    @model_validator(mode="after")
    def _agree(self) -> ClassifierTrainSettings:
        if self.classifier_use_fp16 and self.precision != "fp16":
            raise ValueError(f"classifier_use_fp16 True contradicts precision {self.precision}; give one of them")
        if self.iterations not in (0, self.max_steps):
            raise ValueError(f"iterations {self.iterations} contradicts max_steps {self.max_steps}; give one of them")
        return self


ALWAYS_FREE = "use_checkpoint"
"""The one setting of a model that decides only how it is computed."""
STREAM_SETTINGS = tuple(sorted(affecting(RunSettings, "stream") | affecting(ClassifierTrainSettings, "stream")))
_SECTIONS = (UNetSettings, SuperResSettings, DiffusionSettings)
_PROCESS = {name for section in _SECTIONS for name in section.model_fields} - affecting(BackboneSettings, "shapes")
CHANGES = (*STREAM_SETTINGS, *sorted(_PROCESS - {ALWAYS_FREE}))
"""The settings that allow_change may name: those of the stream, and of the network and the diffusion process those that
don't decide the shapes of the weights."""
# Sections of DeepSpeed's JSON that would replace what the trainer itself does.
_OURS = {
    "optimizer": "the optimiser is AdamW by train.lr and train.weight_decay, also where it is offloaded",
    "scheduler": "the learning rate follows train.lr_warmup_steps and train.lr_anneal_steps",
    "amp": "use train.precision",
    "torch_autocast": "use train.precision",
}
# Section → the switch that makes DeepSpeed detect non-finite gradients.
_CHECKS = {"bf16": "check_grad_overflow", "zero_optimization": "compute_grad_norm"}
# Switch → the value without which DeepSpeed refuses our optimiser.
_NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
# Sections of zero_optimization → the stages that DeepSpeed has them for.
_OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
# Our settings → DeepSpeed's names for them.
_NAMES = {
    "batch_size": "train_batch_size",
    "microbatch": "train_micro_batch_size_per_gpu",
    "grad_clip": "gradient_clipping",
}


def adopt(train: T, deepspeed: dict[str, Any]) -> T:
    """Take over the settings that only DeepSpeed's JSON gives. UserError where the two contradict each other."""
    for section, instead in _OURS.items():
        if section in deepspeed:
            raise UserError(f"deepspeed.{section} can't be given: {instead}; leave it out")
    for section in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(deepspeed.get(section, {}), dict):
            raise UserError(f"deepspeed.{section} must be a JSON object, not {deepspeed[section]!r}")
    if all(deepspeed.get(section, {}).get("enabled") for section in ("fp16", "bf16")):
        raise UserError("deepspeed.fp16 and deepspeed.bf16 are both enabled; enable one of them")
    for section, switch in _CHECKS.items():
        if deepspeed.get(section, {}).get(switch) is False:
            raise UserError(f"deepspeed.{section}.{switch} false can't be given: it is needed to skip bad steps")
    for switch, needed in _NEEDED.items():
        if deepspeed.get(switch, needed) is not needed:
            value = json.dumps(deepspeed[switch])
            raise UserError(f"deepspeed.{switch} {value} can't be given: {_OURS['optimizer']}; leave it out")
    zero = deepspeed.get("zero_optimization", {})
    given = {"zero_stage": ("zero_optimization.stage", zero.get("stage", "auto"))}
    given |= {ours: (theirs, deepspeed.get(theirs, "auto")) for ours, theirs in _NAMES.items()}
    for precision in ("fp16", "bf16"):
        if deepspeed.get(precision, {}).get("enabled"):
            given["precision"] = (f"{precision}.enabled", precision)
    named = {ours: (theirs, value) for ours, (theirs, value) in given.items() if value != "auto"}
    for ours, (theirs, value) in named.items():
        if ours in train.model_fields_set and getattr(train, ours) != value:
            raise UserError(f"deepspeed.{theirs} {value} contradicts train.{ours} {getattr(train, ours)}; give one")
    try:
        adopted = type(train).model_validate({**train.model_dump(), **{ours: v for ours, (_, v) in named.items()}})
    except ValidationError as error:
        theirs = next((named[ours][0] for ours in named if ours in error.errors()[0]["loc"]), "fp16")
        raise UserError(f"deepspeed.{theirs}: {what_is_wrong(error)}") from None
    _check_offloading(zero, adopted.zero_stage)
    return adopted


def _check_offloading(zero: dict[str, Any], stage: int) -> None:
    """UserError for what can't be moved out of the GPU's memory. The message says what can."""
    for old, section in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
        if zero.get(old):
            now = f'"{section}": {{"device": "cpu"}}'
            raise UserError(f"deepspeed.zero_optimization.{old} has another name now: write {now}")
    for section, stages in _OFFLOADS.items():
        place = f"deepspeed.zero_optimization.{section}"
        if not (given := zero.get(section)):
            continue
        if not isinstance(given, dict):
            raise UserError(f'{place} must be a JSON object such as {{"device": "cpu"}}, not {quoted(given)}')
        device = given.get("device", "none")
        if device not in ("cpu", "none"):
            raise UserError(f"{place}.device {device} is not possible; cpu is")
        if device == "cpu" and stage not in stages:
            those = " or ".join(map(str, stages))
            raise UserError(f"{place} needs zero_optimization.stage {those}, not {stage}")
