"""A trainer of a tiny network on random images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.images.loader import Batch, to_device
from fastdiff.models import SuperResSettings, UNetSettings, build_model
from fastdiff.training.checkpoints.format import Snapshot
from fastdiff.training.deepspeed_engine import start_processes
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import plan_step
from fastdiff.training.trainer import Trainer

MODEL: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "learn_sigma": True,
    "dropout": 0.1,
}


THROUGH_ENGINE = {"wall_clock_breakdown": False}
"""A DeepSpeed configuration that makes DeepSpeed take the step and changes no number."""


class MadeUp:
    """A loader of random images [B, size, size, C] that depend only on their position, on the GPU if there is one."""

    class_names = ["only"]
    num_images = 1000
    loader_name = "made up"
    unreadable: list[Any] = []

    def __init__(self, batch_size: int, size: int = 8, channels: int = 3) -> None:
        self.batch_size, self.shape, self.position, self.seed = batch_size, (size, size, channels), 0, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __next__(self) -> Batch:
        positions = torch.arange(self.position, self.position + self.batch_size)
        generator = torch.Generator().manual_seed(self.position + self.seed)
        images = torch.randint(0, 256, (self.batch_size, *self.shape), dtype=torch.uint8, generator=generator)
        self.position += self.batch_size
        labels = torch.zeros(self.batch_size, dtype=torch.int64)
        return Batch(to_device(images, self.device), to_device(labels, self.device), positions)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "num_images": 1000, "fingerprint": "made up"}

    def reseed(self, seed: int) -> None:
        self.seed = seed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def small_trainer(
    snapshot: Snapshot | None = None,
    model: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
    diffusion: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Trainer:
    """Make a trainer with four images per step in two micro-batches by default; no weight starts at zero.

    CUDA graphs are off by default, because a replayed step doesn't see what a test replaces. `dtype` is that of the
    network's body where it shall not follow from the precision.
    """
    given = {"batch_size": 4, "microbatch": 2, "lr": 1e-3, "ema_rate": "0.9,0.99", "seed": 3, "cuda_graph": False}
    given |= settings
    train = TrainSettings(**given)
    kind, left_out = (SuperResSettings, "image_size") if "large_size" in (model or {}) else (UNetSettings, "")
    given_model = {name: value for name, value in {**MODEL, **(model or {})}.items() if name != left_out}
    network_settings = kind(**given_model)
    torch.manual_seed(0)
    network = build_model(network_settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    process_settings = DiffusionSettings(**{"diffusion_steps": 50, "noise_schedule": "cosine", **(diffusion or {})})
    process = create_diffusion(process_settings, network_settings.learn_sigma)
    loader = MadeUp(train.batch_size, network_settings.size_hw[0], network_settings.in_channels)
    processes = start_processes()
    plan = plan_step(train, deepspeed or {}, processes)
    if dtype is not None:
        plan = replace(plan, dtype=dtype)
    return Trainer(plan, network, process, loader, processes, snapshot)  # type: ignore[arg-type]


def start_deepspeed() -> None:
    """Set up DeepSpeed and its group, as a lone process does for its first engine."""
    small_trainer(deepspeed=THROUGH_ENGINE)


def losses_of(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Take `steps` steps, and return the metrics of each."""
    made = []
    for _ in range(steps):
        trainer.take_step()
        made.append(trainer.read_metrics())
    return made


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of weights, averages, moments and the number of updates, from a checkpoint's files. Collective.

    The keys are "model/NAME", "0.9/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" and "updates"; only the last on ranks other
    than 0.
    """
    files, step = dict(trainer.checkpoint_files({})), f"{trainer.step:06d}.pt"
    model, optimizer = files[f"model{step}"], files[f"opt{step}"]
    sets = {"model": model, **{rate: files[f"ema_{rate}_{step}"] for rate in trainer.ema}} if model else {}
    for key in ("exp_avg", "exp_avg_sq") if optimizer else ():
        sets[key] = {name: optimizer["state"][i][key] for i, name in enumerate(model)}
    state = {f"{kind}/{name}": value for kind, tensors in sets.items() for name, value in tensors.items()}
    return {**state, "updates": torch.tensor(files["state.pt"]["updates"])}


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return `state_of` without the number of updates. Collective."""
    return {name: value for name, value in state_of(trainer).items() if name != "updates"}
