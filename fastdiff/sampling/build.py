"""Builds samplers from settings and checkpoints, and runs sampling jobs with them.

`build_sampler` opens a model's network and returns its sampler, or a `Cascade` that also enlarges the images with a
super-resolution network. `build_upsampler` returns a sampler that enlarges given images. `run` draws with either into
the output folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.config.checkpoint import Checkpoint, Network, open_checkpoint, open_network, preset_of
from fastdiff.config.load import describe
from fastdiff.config.presets import download
from fastdiff.config.sections import Config, SuperResConfig
from fastdiff.diffusion.noise_keys import ENLARGED
from fastdiff.errors import UserError, blaming
from fastdiff.images.unreadable import STEM, naming_all
from fastdiff.models import SuperResSettings
from fastdiff.runtime.processes import Processes, make_writable, output_folder
from fastdiff.sampling.classifiers import OpenClassifier, open_guiding
from fastdiff.sampling.job.chunks import disk
from fastdiff.sampling.job.job import run_job
from fastdiff.sampling.job.manifest import NAME, Job, digest
from fastdiff.sampling.labels import Labels, describe_labels, parse_labels, renumbered
from fastdiff.sampling.low_res import BaseImages, as_low_res
from fastdiff.sampling.pictures import Images
from fastdiff.sampling.sampler import Inputs, Sampler
from fastdiff.sampling.settings import DrawSettings
from fastdiff.settings import validated


def build_sampler(config: Config, checkpoint: Checkpoint, device: torch.device, count: int) -> Sampler | Cascade:
    """Build the sampler that the sections model, diffusion and sample describe, with the checkpoint's weights.

    count is the number of images that this process draws. Raises UserError for networks that don't fit together.
    """
    settings = config.sample
    with blaming("--model_path"):
        network = _network(config, checkpoint, settings, device)
    guide = _guide(config, settings, device)
    with blaming("--classifier_path"):
        classifier = open_guiding(settings, config.classifier, network, device)
    with blaming("--classes"):
        labels = labels_of(network, settings.classes, classifier)
    with _naming_flags():
        base = Sampler(network, settings, device, labels=labels, guide=guide, classifier=classifier, count=count)
    if not (settings.sr_model_path or settings.sr_preset):
        return base
    path = settings.sr_model_path
    if not path:
        preset = preset_of(settings.sr_preset, super_res=True, flag="--sr_preset")
        assert preset
        path = str(download(preset, flag="--sr_preset"))
    with blaming("--sr_model_path"):
        sr_checkpoint = open_checkpoint(path)
        large = describe(sr_checkpoint, settings.sr_preset, super_res=True, preset_flag="--sr_preset")
        respacing = {"timestep_respacing": settings.sr_timestep_respacing}
        with blaming("--sr_timestep_respacing"):
            diffusion = validated(type(large.diffusion), {**large.diffusion.model_dump(), **respacing})
        large = large.model_copy(update={"diffusion": diffusion})
        upsampler = _network(large, sr_checkpoint, settings, device)
        numbers = check_fit(network, upsampler, classifier)
    unguided = {"guidance": 1.0, "guidance_interval": (), "guide_model_path": ""}
    own = {"steps": settings.sr_steps, "batch_size": settings.sr_batch_size}
    enlarging = settings.model_copy(update={**unguided, **own})

    def make(inputs: Inputs) -> Sampler:
        with _naming_flags(prefix="sr_"):
            most = min(count, base.batch_size)
            return Sampler(upsampler, enlarging, device, inputs=inputs, noise_key=ENLARGED, count=most)

    return Cascade(base, make, numbers)


def build_upsampler(
    config: SuperResConfig, checkpoint: Checkpoint, device: torch.device, world_size: int
) -> tuple[Sampler, BaseImages]:
    """Build a sampler that enlarges the images of base_samples. Returns it and those images. Raises UserError."""
    settings = config.sample
    with blaming("--model_path"):
        network = _network(config, checkpoint, settings, device)
    assert isinstance(config.model, SuperResSettings)
    with blaming("--classes"):
        labels = labels_of(network, settings.classes) if settings.classes else None
    with blaming("--base_samples"):
        base = BaseImages(settings.base_samples, config.model, network.class_names, None if labels is None else False)
    count = settings.num_samples if "num_samples" in settings.model_fields_set else len(base)
    guide, share = _guide(config, settings, device), -(-count // world_size)
    with _naming_flags():
        sampler = Sampler(
            network, settings, device, labels=labels, inputs=base, guide=guide, noise_key=ENLARGED, count=share
        )
    return sampler, base


def _network(config: Config, checkpoint: Checkpoint, settings: DrawSettings, device: torch.device) -> Network:
    frozen = settings.kernels != "reference"
    return open_network(config.model, config.diffusion, checkpoint, settings.precision, device, frozen)


def _guide(config: Config, settings: DrawSettings, device: torch.device) -> Network | None:
    """Open the weaker network for autoguidance. A checkpoint without stored settings takes the model's."""
    if not settings.guide_model_path:
        return None
    with blaming("--guide_model_path"):
        checkpoint = open_checkpoint(settings.guide_model_path)
        if checkpoint.info:
            config = describe(checkpoint, super_res=isinstance(config, SuperResConfig))
        return _network(config, checkpoint, settings, device)


@contextmanager
def _naming_flags(prefix: str = "") -> Iterator[None]:
    """Turn the setting's name at the start of a UserError into a flag: "steps 7: ..." into "--steps 7: ...".

    `prefix` comes before steps and batch_size, which the second network of a cascade has separately.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        if text.startswith("--"):
            raise
        separate = text.startswith(("steps", "batch_size"))
        raise UserError(f"--{prefix if separate else ''}{text}") from error


def labels_of(network: Network, classes: str, classifier: OpenClassifier | None = None) -> Labels | None:
    """The classes that the setting `classes` describes; None for a network without classes. Raises UserError.

    A classifier that guides has classes for a network without.
    """
    if network.settings.class_cond:
        return parse_labels(classes, network.class_names, network.known_classes)
    if classifier is not None:
        return parse_labels(classes, classifier.class_names, classifier.known_classes)
    if classes:
        raise UserError("the model is not class-conditional")
    return None


class Cascade:
    """Draws images with a base sampler and enlarges them with another, without files in between.

    The result equals a job of the base model followed by a super-resolution job on its npz.
    """

    def __init__(
        self, base: Sampler, make_upsampler: Callable[[Inputs], Sampler], numbers: np.ndarray | None = None
    ) -> None:
        """numbers [K] are the second network's numbers of the first one's classes, None where they are the same."""
        self.base, self.numbers = base, numbers
        self._index = np.zeros(0, dtype=np.int64)
        self._small = Images(np.zeros(0, dtype=np.uint8), None)
        self.upsampler = make_upsampler(self._inputs)
        self.notes = [*base.notes, *(f"enlarging: {note}" for note in self.upsampler.notes)]

    def draw(self, index: np.ndarray, on_progress: Callable[[float], None] = lambda images: None) -> Images:
        """Draw large images `index` [n] int64, with the base images' labels; a `pictures.Draw`."""
        share = self.base.flops / (self.base.flops + self.upsampler.flops)
        self._index, self._small = index, self.base.draw(index, lambda images: on_progress(images * share))
        with blaming("enlarging"):
            large = self.upsampler.draw(index, lambda images: on_progress(images * (1 - share)))
        return Images(large.images, self._small.labels)

    def trace(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The same as `Sampler.trace`, for the steps of the second sampler."""
        self._index, self._small = index, self.base.draw(index)
        return self.upsampler.trace(index)

    def try_threads(self, count: int) -> str:
        """The same as `Sampler.try_threads`, by the sampler with more work."""
        return max(self.base, self.upsampler, key=lambda sampler: sampler.flops).try_threads(count)

    def identity(self) -> dict[str, Any]:
        """The identities of both samplers, with sr_ before the names of the second."""
        return {**self.base.identity(), **{f"sr_{name}": value for name, value in self.upsampler.identity().items()}}

    def _inputs(self, index: Tensor) -> dict[str, Tensor]:
        rows = np.searchsorted(self._index, index.cpu().numpy())
        given = {"low_res": as_low_res(self._small.images[rows], index.device)}
        if self.upsampler.network.settings.class_cond:
            assert self._small.labels is not None
            labels = self._small.labels[rows]
            given["y"] = torch.from_numpy(labels if self.numbers is None else self.numbers[labels]).to(index.device)
        return given


def check_fit(base: Network, upsampler: Network, classifier: OpenClassifier | None = None) -> np.ndarray | None:
    """UserError unless the second network can enlarge what the first one draws, perhaps guided by a classifier.

    Returns the second network's number of each class of the first one, int64 [K]; None where they are the same.
    """
    small, large = base.settings, upsampler.settings
    assert isinstance(large, SuperResSettings)
    who = upsampler.file
    if large.small_size != small.size_hw:
        sizes = ["x".join(map(str, size)) for size in (large.small_size, small.size_hw)]
        raise UserError(f"{who} enlarges images of {sizes[0]} pixels, the model draws {sizes[1]}")
    if large.in_channels != small.in_channels:
        raise UserError(f"{who} takes images of {large.in_channels} channels, the model draws {small.in_channels}")
    if not large.class_cond:
        return None
    labelled = base if small.class_cond else classifier
    if labelled is None:
        raise UserError(f"{who} needs classes, which the model doesn't have")
    if upsampler.class_names and labelled.class_names:
        numbers = renumbered(upsampler.class_names, labelled.class_names)
        if (numbers < 0).any():
            lacking = [name for name, number in zip(labelled.class_names, numbers, strict=True) if number < 0]
            raise UserError(f"{who} doesn't know the model's class {lacking[0]!r}; its classes are other ones")
        return numbers
    if upsampler.known_classes != labelled.known_classes:
        raise UserError(f"{who} knows {upsampler.known_classes} classes, the model {labelled.known_classes}")
    return None


def run(
    sampler: Sampler | Cascade,
    settings: DrawSettings,
    processes: Processes,
    *,
    notes: list[str],
    count: int,
    identity: dict[str, Any] | None = None,
    names: Sequence[str] = (),
    note: str = "",
) -> list[Path]:
    """Draw images 0 to count - 1 into the settings' output folder. Returns the paths of the files.

    identity  Values besides the sampler's that the images depend on.
    names     Names for the picture files, of the small images in turn; empty for names by class and number.
    note      Text at the end of the last line printed.
    """
    identity = {**sampler.identity(), **(identity or {})}
    first, last = (sampler.base, sampler.upsampler) if isinstance(sampler, Cascade) else (sampler, sampler)
    labels, folder = first.labels, _folder(settings, first, identity)
    with disk(folder), blaming("--out_dir"):
        if not (folder / NAME).is_file():
            make_writable(folder)
    if processes.is_main:
        classes = [line] if labels is not None and (line := describe_labels(labels, first.class_names)) else []
        print("\n".join([*classes, *notes, *sampler.notes]), flush=True)
    shape = last.network.settings
    job = Job(
        identity=identity,
        count=count,
        shape=(*shape.size_hw, shape.in_channels),
        labelled=first.labelled,
        seed=settings.seed,
        chunk_size=max(1, min(first.batch_size, -(-count // processes.world_size))),
        save_as=settings.save_as,
        grid_images=settings.grid_images,
        grid_classes=len(set(labels.chosen)) if labels is not None and labels.in_turn else 0,
        class_names=first.class_names,
        names=tuple(names),
        trajectory=min(settings.trajectory, count),
        note=note,
    )

    @functools.cache
    def try_threads() -> None:
        if (line := sampler.try_threads(-(-count // processes.world_size))) and processes.is_main:
            print(line, flush=True)

    def draw(*args: Any, **kwargs: Any) -> Images:
        try_threads()  # only now, because nothing may be missing
        return sampler.draw(*args, **kwargs)

    with naming_all(folder / STEM):
        return run_job(draw, job, processes, folder, overwrite=settings.overwrite, trace=sampler.trace)


def _folder(settings: DrawSettings, sampler: Sampler, identity: dict[str, Any]) -> Path:
    """The folder of --out_dir or OPENAI_LOGDIR, else one named after the job."""
    return output_folder(settings.out_dir, f"runs/samples/{sampler.network.file.stem}-{digest(identity)[:8]}")
