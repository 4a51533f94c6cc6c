"""Training steps to compare: ours, ours with one lever off, and the reference. `peers.py` has the other ones.

Every factory gives a function that takes one whole optimiser step: forward and backward pass, AdamW, moving average.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from fastdiff.kernels import reference
from torch import Tensor, nn

from benchmarks.seed_step import SeedStep, SeedUNet
from fastdiff import ops
from fastdiff.config.sections import Config
from fastdiff.diffusion import create_diffusion
from fastdiff.errors import UserError
from fastdiff.images.loader import Batch
from fastdiff.models import BackboneSettings, SuperResSettings, blocks, build_model, unet
from fastdiff.models.cost import train_flops
from fastdiff.models.unet import DTYPES
from fastdiff.runtime import machine
from fastdiff.runtime.machine import device_name, find
from fastdiff.runtime.processes import Processes
from fastdiff.training import optimizer
from fastdiff.training.step_plan import plan_step
from fastdiff.training.trainer import Trainer, low_res_of

Step = Callable[[], None]
Network = TypeVar("Network", bound=nn.Module)
Result = TypeVar("Result")


class SameBatch:
    """A loader that returns one batch again and again, so that reading images is not timed."""

    class_names: list[str] = []

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.position = images, labels, 0

    def __next__(self) -> Batch:
        count = len(self.images)
        positions = torch.arange(self.position, self.position + count)
        self.position += count
        return Batch(self.images, self.labels, positions)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}


@dataclass
class Case:
    """A configuration at a batch and a precision; all variants see the same images and start from the same weights.

    Images and weights are made on the device, from one seed: a few hundred million random numbers take seconds on a
    CPU and milliseconds on a GPU. Separate processes on the same kind of device make the same ones.
    """

    config: Config
    batch: int
    precision: str
    processes: Processes

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        model, device = self.config.model, self.processes.device
        self.images = torch.randint(0, 256, (self.batch, *model.size_hw, model.in_channels), dtype=torch.uint8).to(
            device
        )
        self.labels = torch.randint(0, model.num_classes, (self.batch,)).to(device)
        self.kwargs: dict[str, Tensor] = {"y": self.labels} if model.class_cond else {}
        if isinstance(model, SuperResSettings):
            self.kwargs["low_res"] = low_res_of(ops.start_map(self.images), model.small_size)
        with device:
            made = build_model(model).state_dict()
        # A new network has layers of zeros, which would make half of all products zero.
        self.weights = {name: value + 0.02 * torch.randn_like(value) for name, value in made.items()}

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def diffusion(self) -> Any:
        return create_diffusion(self.config.diffusion, self.config.model.learn_sigma)

    def filled(self, make: Callable[[BackboneSettings], Network]) -> Network:
        """make(settings of the model) with the case's weights, on its device, without initialising it first."""
        with torch.device("meta"):
            model = make(self.config.model)
        model.load_state_dict({name: value.clone() for name, value in self.weights.items()}, assign=True)
        return model

    def rates(self, seconds: float) -> dict[str, float | None]:
        """Images per second, and the share of the GPU's peak FLOP/s (None if unknown), of a step of `seconds`."""
        images = self.batch / seconds
        return {"images_per_second": images, "mfu": self.share_of_peak(train_flops(self.config.model) * images)}

    def share_of_peak(self, flops: float) -> float | None:
        """FLOP/s as a share of the device's peak; None for a device whose peak is not known."""
        gpu = find(device_name(self.device))
        return flops / gpu.peak_flops if gpu else None


# --- the reference ---


def without_our_ops(make: Callable[..., Callable[[], Result]]) -> Callable[..., Callable[[], Result]]:
    """A factory of a variant that is not ours: neither its making nor any step of it uses one of our kernels.

    Such variants call `fastdiff.diffusion` for their noising and their loss, whose ops would use our kernels on a GPU;
    here PyTorch computes them. The previous mode of `fastdiff.ops` is restored after every step.
    """

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Callable[[], Result]:
        with ops.using("reference"):
            step = make(*args, **kwargs)

        def run() -> Result:
            with ops.using("reference"):
                return step()

        return run

    return made


@without_our_ops
def seed(case: Case, checkout: Path | None = None) -> Step:
    """improved-diffusion's step: its operations written out, or with a checkout its own network and losses."""
    diffusion = case.diffusion()
    model: nn.Module
    if checkout is None:
        check_same_function(case.config.model)
        model = case.filled(SeedUNet)
        losses = lambda network, x, t, kwargs: diffusion.training_losses(network, x, t, kwargs, torch.randn_like(x))
    else:
        model, theirs = from_checkout(case, checkout)
        losses = lambda network, x, t, kwargs: theirs.training_losses(network, x, t, model_kwargs=kwargs)
    fp16 = case.precision != "fp32" and case.device.type == "cuda"  # there is no bf16, and on a CPU no fp16
    step = SeedStep(model.to(case.device), losses, diffusion.num_timesteps, fp16=fp16)
    return lambda: step(case.images, case.kwargs)


def from_checkout(case: Case, checkout: Path) -> tuple[nn.Module, Any]:
    """The network, with the case's weights, and the process of a checkout of improved-diffusion.

    The original's functions build networks for some sizes only, with one channel_mult each; its classes build any.
    """
    sys.path.insert(0, str(checkout))
    from improved_diffusion import script_util, unet

    s, diffusion = case.config.model, case.config.diffusion
    make = unet.SuperResModel if isinstance(s, SuperResSettings) else unet.UNetModel
    network = make(
        in_channels=s.in_channels,
        model_channels=s.num_channels,
        out_channels=s.out_channels,
        num_res_blocks=s.num_res_blocks,
        attention_resolutions=tuple(s.attention_factors),
        dropout=s.dropout,
        channel_mult=tuple(int(mult) if mult == int(mult) else mult for mult in s.level_mult),
        num_classes=s.num_classes if s.class_cond else None,
        num_heads=s.num_heads,
        num_heads_upsample=s.num_heads_upsample,
        use_scale_shift_norm=s.use_scale_shift_norm,
    )
    names = ("sigma_small", "noise_schedule", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas")
    given = {name: getattr(diffusion, name) for name in (*names, "timestep_respacing")}
    process = script_util.create_gaussian_diffusion(steps=diffusion.diffusion_steps, learn_sigma=s.learn_sigma, **given)
    try:
        network.load_state_dict(case.weights)
    except RuntimeError as error:
        raise UserError(
            "--seed_checkout: the original has no network of these settings (it lacks num_head_channels, for one); "
            "leave the flag out"
        ) from error
    return network, process


@functools.cache
def check_same_function(settings: BackboneSettings, make: Callable[[BackboneSettings], nn.Module] = SeedUNet) -> None:
    """Raise AssertionError unless the reference's network, built by `make`, and ours compute the same function.

    They are checked on a CPU at the fewest channels that the settings allow: the full width would test nothing more.
    """
    unit = math.lcm(32, settings.num_heads, max(1, settings.num_head_channels))  # 32 groups of a norm
    fits = lambda width: all(int(mult * width) % unit == 0 for mult in settings.level_mult)
    width = next(filter(fits, range(32, settings.num_channels, 32)), settings.num_channels)
    narrow = settings.model_copy(update={"num_channels": width})
    ours, theirs = build_model(narrow).eval(), make(narrow).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)  # a new network has layers of zeros
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(1, narrow.in_channels, *narrow.size_hw), torch.tensor([3.0])
    kwargs = {"y": torch.tensor([0])} if narrow.class_cond else {}
    if isinstance(narrow, SuperResSettings):
        kwargs["low_res"] = low_res_of(x, narrow.small_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, **kwargs), theirs(x, t, **kwargs), atol=1e-3, rtol=1e-3)


# --- ours ---


def ours(case: Case, **changes: Any) -> Step:
    """The trainer's step as train.py takes it on this device: counter-based noise, metrics and averages included."""
    return exact(trainer_of(case, **{**usual(case), **changes}).take_step)


def usual(case: Case) -> dict[str, bool]:
    """The settings of a long run on the case's device: compiled, and on a GPU replayed as CUDA graphs."""
    return {"compile": True, "cuda_graph": case.device.type == "cuda"}


def exact(step: Callable[[], Result]) -> Callable[[], Result]:
    """The step with exact float32 products, as our scripts take it.

    The baselines keep PyTorch's default, by which cuDNN may use TF32.
    """

    def run() -> Result:
        if not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
            return step()  # TF32 is off already, and switching takes tens of microseconds
        with machine.tf32(False):
            return step()

    return run


def trainer_of(case: Case, **changes: Any) -> Trainer:
    """The trainer as train.py makes it."""
    train = case.config.train
    update = {"batch_size": case.batch, "microbatch": -1, "precision": case.precision, "grad_clip": 0.0}
    update |= {"compile": False, "cuda_graph": False, "zero_stage": min(train.zero_stage, 1), "lr": 1e-4}
    if case.precision == "fp32":
        update["zero_stage"] = 0
    model = case.filled(build_model)
    settings = train.model_copy(update={**update, **changes})
    plan, images = plan_step(settings, {}, case.processes), SameBatch(case.images, case.labels)
    trainer = Trainer(plan, model, case.diffusion(), images, case.processes)  # type: ignore[arg-type]
    if case.precision == "fp16":
        trainer.stepper.load_scaler_state({"cur_scale": 2.0**12})  # else its first steps would be skipped
    return trainer


@dataclass(frozen=True)
class Lever:
    """An optimisation of ours that can be switched off."""

    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the trainer with the lever off."""
    patches: tuple[tuple[Any, str, Any], ...] = ()
    """(object, attribute, its value with the lever off), replaced while a step runs."""
    gpu_only: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        undo = [mock.patch.object(owner, name, value) for owner, name, value in self.patches]
        for patch in undo:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(undo):
                patch.stop()


def _one_by_one(model: unet.UNet, emb: Tensor) -> list[Tensor]:
    return [block.emb_layers(emb) for block in model.res_blocks]


def _as_they_are(model: unet.UNet) -> list[nn.Parameter]:
    return list(model.parameters())


def _never(*_: Any) -> str:
    return "switched off"


LEVERS: dict[str, Lever] = {
    "compile": Lever(changes={"compile": False}, gpu_only=False),
    "cuda graph": Lever(changes={"cuda_graph": False}),
    "kernels": Lever(patches=((ops, "_mode", "reference"),)),
    "group norm kernel": Lever(patches=((ops, "_norm_unsupported", _never),)),
    "attention kernel": Lever(patches=((ops, "attention_way", lambda *_: "sdpa"),)),
    "noising and loss kernels": Lever(patches=((ops, "_map_unsupported", _never),)),
    "transposed upsampling": Lever(patches=((ops, "upsample_conv", reference.upsample_conv),)),
    "virtual concat of skips": Lever(
        patches=((ops, "skip_conv1x1", reference.skip_conv1x1), (ops, "fuses_shortcut", lambda *_: False))
    ),
    "shortcut with the norm": Lever(patches=((ops, "fuses_shortcut", lambda *_: False),)),
    "weights laid out once": Lever(patches=((optimizer, "arrange_weights", _as_they_are),)),
    "one embedding product": Lever(patches=((unet.UNet, "project", _one_by_one),), gpu_only=False),
    "residual sum in the norm": Lever(patches=((blocks, "_leaves_sum", lambda *_: False),)),
    "optimiser kernel": Lever(patches=((optimizer, "arrange_weights", _as_they_are),)),
}


def without(case: Case, lever: str) -> Step:
    """Ours with one lever off, both when it is compiled and when it runs."""
    chosen = LEVERS[lever]
    with chosen.off():
        trainer = trainer_of(case, **{**usual(case), **chosen.changes})
    if lever == "optimiser kernel":
        trainer.optimizer.fused_kernel = False

    def run() -> None:
        with chosen.off():
            trainer.take_step()

    return exact(run)
