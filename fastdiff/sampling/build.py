"""Samplers from settings: the networks that they name, and what they do together."""

from __future__ import annotations

import torch

from fastdiff.config.load import Config, SuperResConfig, describe
from fastdiff.config.presets import download, find_preset
from fastdiff.diffusion.noise_keys import ENLARGED
from fastdiff.models import SuperResSettings, weights
from fastdiff.sampling.cascade import Cascade, check_fit
from fastdiff.sampling.labels import Labels, parse_labels
from fastdiff.sampling.low_res import BaseImages
from fastdiff.sampling.network import Network, open_network
from fastdiff.sampling.sampler import Inputs, Sampler
from fastdiff.sampling.settings import DrawSettings
from fastdiff.settings import UserError


def build_sampler(config: Config, device: torch.device, count: int) -> Sampler | Cascade:
    """What the sections model, diffusion and sample describe; count as for `Sampler`. Raises UserError."""
    settings = config.sample
    network = _open(config, settings, device)
    labels = labels_of(network, settings.classes)
    base = Sampler(network, settings, device, labels=labels, guide=_guide(config, settings, device), count=count)
    if not (settings.sr_model_path or settings.sr_preset):
        return base
    sr_path = settings.sr_model_path
    if not sr_path:
        sr_path = str(download(find_preset(settings.sr_preset, "--sr_preset"), flag="--sr_preset"))
    large = describe("sr_model_path", sr_path, SuperResConfig, settings.sr_preset)
    process = large.diffusion.model_copy(update={"timestep_respacing": settings.sr_timestep_respacing})
    enlarging = settings.model_copy(
        update={
            "steps": settings.sr_steps,
            "batch_size": settings.sr_batch_size,
            **{"guidance": 1.0, "guidance_interval": (), "guide_model_path": ""},
        }
    )
    frozen = settings.kernels != "reference"
    upsampler = open_network(large.model, process, sr_path, settings.precision, device, "--sr_model_path", frozen)
    check_fit(network, upsampler)

    def make(inputs: Inputs) -> Sampler:
        return Sampler(
            upsampler,
            enlarging,
            device,
            inputs=inputs,
            stream=ENLARGED,
            count=min(count, base.batch_size),
            flag="--sr_",
        )

    return Cascade(base, make)


def build_upsampler(config: SuperResConfig, device: torch.device, world_size: int) -> tuple[Sampler, BaseImages]:
    """The sampler that enlarges the settings' base_samples, and those. Raises UserError."""
    settings = config.sample
    network = _open(config, settings, device)
    assert isinstance(config.model, SuperResSettings)
    base = BaseImages(settings.base_samples, config.model, network.class_names)
    count = settings.num_samples if "num_samples" in settings.model_fields_set else len(base)
    guide = _guide(config, settings, device)
    share = -(-count // world_size)
    return Sampler(network, settings, device, inputs=base, guide=guide, stream=ENLARGED, count=share), base


def _open(config: Config, settings: DrawSettings, device: torch.device) -> Network:
    frozen = settings.kernels != "reference"
    return open_network(config.model, config.diffusion, settings.model_path, settings.precision, device, frozen=frozen)


def _guide(config: Config, settings: DrawSettings, device: torch.device) -> Network | None:
    """The weaker network; a file that carries no settings has the model's own."""
    path, flag = settings.guide_model_path, "--guide_model_path"
    if not path:
        return None
    if weights.info_of(weights.read_state_dict(weights.find(path, flag), flag)):
        config = describe(flag.removeprefix("--"), path, type(config))
    frozen = settings.kernels != "reference"
    return open_network(config.model, config.diffusion, path, settings.precision, device, flag, frozen)


def labels_of(network: Network, classes: str) -> Labels | None:
    """The classes that the setting `classes` stands for; None of a network without classes. Raises UserError."""
    if not network.settings.class_cond:
        if classes:
            raise UserError("--classes: the model is not class-conditional")
        return None
    return parse_labels(classes, network.class_names, network.known_classes)
