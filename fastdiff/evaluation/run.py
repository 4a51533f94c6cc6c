"""An evaluation from its settings to its results, as evaluate.py starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.config.checkpoint import Checkpoint, named
from fastdiff.config.sections import Config, EvaluateConfig
from fastdiff.errors import UserError, blaming
from fastdiff.evaluation.classifier import train_classifier, write_classifier
from fastdiff.evaluation.collect import NEED_REFERENCE, Batches, Wanted, check_count, check_metrics, collect
from fastdiff.evaluation.curves import Curves
from fastdiff.evaluation.drawing import Drawn, DrawnImages, knows_classes, share_of_its_class
from fastdiff.evaluation.features import FeatureNetwork, open_features
from fastdiff.evaluation.image_sets import ImageSet, open_image_set
from fastdiff.evaluation.judge import Judge
from fastdiff.evaluation.report import lines_of, result_of, write_result, writing_to
from fastdiff.evaluation.settings import EvaluateSettings
from fastdiff.evaluation.statistics import (
    KEPT,
    Described,
    holds_images,
    holds_statistics,
    lossy_note,
    read_statistics,
    write_statistics,
)
from fastdiff.images.labels import describe_classes, index_images
from fastdiff.ops import choose_kernels
from fastdiff.runtime.machine import keep_compiled_code
from fastdiff.runtime.processes import Processes, current, join, make_writable, output_folder
from fastdiff.runtime.untrusted import is_there
from fastdiff.sampling.build import Cascade, build_sampler, run
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import SampleSettings

WORTHWHILE = 2000
"""Images per process from which the feature network is compiled on a GPU, which takes about a minute (predicted)."""

BATCH_SIZE = {"cpu": 64, "cuda": 256}
"""Images that the feature network sees at a time, if feature_batch_size is auto."""


def evaluate(config: EvaluateConfig, checkpoint: Checkpoint | None) -> None:
    """Compare samples with a reference, and write and print the results; or only make the reference's statistics.

    config is what `fastdiff.config.load` returns. Raises UserError.
    """
    settings = config.evaluate
    variants = config.sample.variants() if checkpoint else []
    _check(settings, variants)
    if len(variants) > 1 and config.sample.out_dir:
        raise UserError("--out_dir is for the images of one solver, steps, spacing and guidance; leave it out for more")
    with blaming("--results_dir"):
        folder = make_writable(output_folder(settings.results_dir, "runs/evaluations"))
    processes = current()
    samples = None
    if settings.samples:
        given = "num_samples" in config.sample.model_fields_set
        with blaming("--samples"):
            samples = _open(settings, settings.samples, processes, config.sample.num_samples if given else None)
        unused = sorted(config.sample.model_fields_set - {"num_samples", "model_path"})
        if unused and processes.is_main:
            print(f"not used, because the images are given: {', '.join(unused)}")
    if samples or checkpoint:
        check_count(settings, samples.count if samples else config.sample.num_samples, "samples")
    processes = join()
    count = samples.count if samples else config.sample.num_samples if checkpoint else 0
    shape = samples.shape if samples else None
    if checkpoint and not (config.sample.sr_model_path or config.sample.sr_preset):
        shape = (*config.model.size_hw, config.model.in_channels)
    evaluation = Evaluation(settings, processes, count, shape=shape, judges=count > 0)
    if settings.reference_out and processes.is_main and evaluation.reference:
        write_statistics(Path(settings.reference_out), evaluation.reference, evaluation.network)
        print(f"statistics of {evaluation.reference.count} images in {settings.reference_out}")
    if samples:
        evaluation.report(folder, evaluation.see(samples), None)
    elif checkpoint:
        checkpoint = named(checkpoint)
        kernels = choose_kernels(config.sample.kernels, processes.device)
        curves = Curves(folder, config, checkpoint, evaluation.judge, processes) if len(variants) > 1 else None
        for each in variants:
            sampler = evaluation.build(config, each, checkpoint)
            if curves and curves.holds(sampler):
                continue
            drawn = evaluation.draw(sampler, each, checkpoint, kernels)
            result = evaluation.report(folder, drawn.described, sampler.identity())
            if curves:
                curves.add(sampler, drawn, result)
        if curves and processes.is_main:
            print("\n".join(curves.finish()), flush=True)


def _check(settings: EvaluateSettings, variants: list[SampleSettings]) -> None:
    if settings.samples and variants:
        raise UserError("--samples contradicts --model_path; give the images or the model that draws them")
    if not settings.samples and not variants and not settings.reference_out:
        raise UserError("--samples is missing: give the images to judge, or the model that draws them by --model_path")
    needing = [name for name in settings.metrics if name in NEED_REFERENCE]
    if needing and not settings.reference:
        raise UserError(f"--reference is missing, which {', '.join(needing)} needs: give images or statistics")
    if settings.reference_out and not settings.reference:
        raise UserError("--reference_out needs the images of --reference")
    if settings.reference_out:
        _check_output(settings, Path(settings.reference_out))


def _check_output(settings: EvaluateSettings, path: Path) -> None:
    """Raise UserError for a file of statistics that would be empty, can't be written, or replaces what is compared."""
    if not any(name in NEED_REFERENCE for name in settings.metrics):
        raise UserError(f"--reference_out: {', '.join(settings.metrics)} needs no reference; give other --metrics")
    with blaming("--reference_out"):
        if is_there(path, "dir"):
            raise UserError(f"{path} is a folder; name a file in it")
        for name in ("samples", "reference"):
            source = Path(getattr(settings, name))
            if is_there(path, "file") and is_there(source, "file") and path.samefile(source):
                raise UserError(f"--reference_out names the file of --{name}, which it would replace; name another")
        make_writable(path.parent)


def _open(settings: EvaluateSettings, source: str, processes: Processes, limit: int | None = None) -> ImageSet:
    size = settings.resize_hw
    return open_image_set(source, device=processes.device, resize=size, limit=limit, loader=settings.loader)


class Evaluation:
    """The feature network and the reference of an evaluation, with which sets of samples are judged."""

    def __init__(
        self,
        settings: EvaluateSettings,
        processes: Processes,
        count: int = 0,
        *,
        shape: tuple[int, ...] | None = None,
        judges: bool = True,
    ) -> None:
        """Open the network and describe the reference. Collective; raises UserError.

        count is the number of samples that follow: for few, or if it is 0, the network isn't compiled. shape is that
        of a sample (H, W, C) where it is known already: a reference of another size is refused before its images are
        seen. judges says whether samples follow at all, or only the reference's statistics are wanted.
        """
        self.settings, self.processes = settings, processes
        size = settings.feature_batch_size
        self.batch_size = BATCH_SIZE[processes.device.type] if size == "auto" else int(size)
        features = settings.features
        if settings.train_features:
            features = settings.train_features
            with blaming("--train_features"):
                if is_there(Path(features), "dir"):
                    raise UserError(f"{features} is a folder; name a file in it")
                make_writable(Path(features).parent)
            if processes.is_main and not Path(features).is_file():
                _train(settings, processes.device)
            processes.barrier()
        self.network = self._open_network(features, count)
        check_metrics(settings.metrics, self.network)
        self.reference = self._describe_reference(shape) if settings.reference else None
        self.judge = Judge(settings, self.network, self.reference) if processes.is_main and judges else None

    def see(self, images: ImageSet) -> Described:
        """Collect what the metrics need of samples. Collective."""
        wanted = Wanted.of_samples(self.settings.metrics, self.settings.resamplings > 0)
        return self._collect(images, wanted, "samples")

    def build(self, config: EvaluateConfig, settings: SampleSettings, checkpoint: Checkpoint) -> Sampler | Cascade:
        """Build the sampler of these settings. Raises UserError, also for images of another size than the reference."""
        share = -(-settings.num_samples // self.processes.world_size)
        drawing = Config.model_construct(model=config.model, diffusion=config.diffusion, sample=settings)
        sampler = build_sampler(drawing, checkpoint, self.processes.device, count=share)
        last = sampler.upsampler if isinstance(sampler, Cascade) else sampler
        shape = (*last.network.settings.size_hw, last.network.settings.in_channels)
        _check_sizes(shape, self.reference.size if self.reference else "")
        return sampler

    def draw(
        self, sampler: Sampler | Cascade, settings: SampleSettings, checkpoint: Checkpoint, kernels: list[str]
    ) -> Drawn:
        """Draw images and collect what the metrics need of them, batch by batch. Collective.

        With out_dir a sampling job draws them into that folder first, and goes on with what is there.
        """
        processes, count = self.processes, settings.num_samples
        if settings.out_dir:
            run(sampler, settings, processes, notes=kernels, count=count)
            processes.barrier()
            as_drawn = self.settings.model_copy(update={"resize": ""})
            drawn = Drawn(self.see(_open(as_drawn, settings.out_dir, processes, count)))
        else:
            if processes.is_main:
                print("\n".join([*kernels, *sampler.notes]), flush=True)
            sampler.try_threads(-(-count // processes.world_size))
            wanted = Wanted.of_samples(self.settings.metrics, self.settings.resamplings > 0)
            if known := knows_classes(sampler, self.network):
                wanted = Wanted(wanted.moments, tuple(dict.fromkeys((*wanted.features, "logits"))))
            images = DrawnImages(sampler, count, processes)
            described = self._collect_batches(images, wanted, "samples", count)
            of_its_class = share_of_its_class(sampler, self.network, described) if known and processes.is_main else None
            drawn = Drawn(described, images.first(), images.seconds, of_its_class)
        drawn.described.path = str(checkpoint.file)
        return drawn

    def report(self, folder: Path, samples: Described, drawing: dict[str, Any] | None) -> dict[str, Any] | None:
        """Score samples, print the scores and write them; returns the result on rank 0, None on the others."""
        if self.judge is None:
            return None
        spreads = f", and {self.settings.resamplings} resamplings for their spread" if self.settings.resamplings else ""
        print(f"computing {', '.join(self.settings.metrics)} of {samples.count} samples{spreads}", flush=True)
        verdict = self.judge.score(samples)
        result = result_of(verdict, samples, self.reference, self.network, self.settings, drawing)
        print("\n".join(lines_of(verdict, samples, self.reference, self.network)), flush=True)
        with writing_to(folder):  # the scores are on the screen, should the disk be full
            print(f"result in {write_result(folder, result)}", flush=True)
        return result

    def _open_network(self, features: str, count: int) -> FeatureNetwork:
        settings, processes = self.settings, self.processes
        compiled = processes.device.type == "cuda" and count >= WORTHWHILE * processes.world_size
        if compiled:
            keep_compiled_code()
        if not processes.is_main:
            processes.barrier()  # the first process fetches the weights
        network = open_features(
            features, settings.feature_weights, settings.feature_precision, processes.device, compiled=compiled
        )
        if processes.is_main:
            processes.barrier()
        return network

    def _describe_reference(self, shape: tuple[int, ...] | None) -> Described:
        """The reference's statistics from its file, or from its images. Collective."""
        source, wanted = self.settings.reference, Wanted.of_reference(self.settings.metrics)
        with blaming("--reference"):
            if not holds_statistics(Path(source)):
                images = _open(self.settings, source, self.processes)
                check_count(self.settings, images.count, "reference images")
                _check_sizes(shape, _shown(images.shape))
                return self._collect(images, wanted, "reference")
            found = read_statistics(Path(source), wanted.moments, self.network)
            _check_sizes(shape, found.size)
            if "pool" in wanted.features and "pool" not in found.features:
                if not holds_images(Path(source)):
                    raise UserError(
                        f"{source} holds mean and covariance only, and precision, recall and kid need features of "
                        "images: give images, OpenAI's reference batch, or a file of --reference_out made with them"
                    )
                images = _open(self.settings, source, self.processes)
                check_count(self.settings, min(images.count, KEPT), "reference images")
                found.features = self._collect(images, Wanted(features=("pool",), most=KEPT), "reference").features
                found.size = found.size or _shown(images.shape)
            elif "pool" in wanted.features:
                check_count(self.settings, len(found.features["pool"]), "reference images")
            return found

    def _collect(self, images: ImageSet, wanted: Wanted, what: str) -> Described:
        batches = images.batches(self.batch_size, self.processes.rank, self.processes.world_size)
        found = self._collect_batches(batches, wanted, what, images.count)
        found.path = str(images.path)
        if images.lossy:
            found.notes.append(lossy_note(what, images.lossy))
            found.about["lossy"] = images.lossy
        if images.resized:
            found.about["resized"] = images.resized
            found.notes.append(f"the images of the {what} were {images.resized}")
        return found

    def _collect_batches(self, batches: Batches, wanted: Wanted, what: str, count: int) -> Described:
        size = min(self.batch_size, count)
        return collect(batches, self.network, wanted, self.processes, count=count, batch_size=size, what=what)


def _check_sizes(samples: tuple[int, ...] | None, reference: str) -> None:
    """Raise UserError unless samples [H, W, C] have the height and width of a reference HxWxC, if both are known."""
    if samples and reference and reference.split("x")[:2] != _shown(samples).split("x")[:2]:
        raise UserError(
            f"the samples are images of {_shown(samples)}, those of --reference of {reference}; metrics compare images "
            f"of one size: give --resize {_shown(samples[:2])} where the reference is images, or another reference"
        )


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _train(settings: EvaluateSettings, device: torch.device) -> None:
    """Train a classifier on the labelled pictures of the reference, and write it into the file of train_features."""
    with blaming("--reference"):
        listing = index_images(settings.reference, "auto")
        if not listing.class_names:
            raise UserError(f"{settings.reference} has no classes, which --train_features needs; give --features")
        images = open_image_set(
            settings.reference, device=torch.device("cpu"), resize=settings.resize_hw, loader=settings.loader
        )
        pixels = np.concatenate([batch.numpy() for batch, _ in images.batches(256, 0, 1)])
    print(f"{describe_classes(listing)}\ntraining a classifier on {len(pixels)} images", flush=True)
    model = train_classifier(pixels, listing.labels, len(listing.class_names), device)
    path = Path(settings.train_features)
    write_classifier(model, path)
    print(f"the classifier is in {path}", flush=True)
