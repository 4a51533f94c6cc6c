"""Draws images by number: builds the solver table, chooses compilation and the batch size, and runs the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import precompile
from fastdiff.config.checkpoint import Network
from fastdiff.diffusion import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.samplers import Step
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.diffusion.solvers import SOLVERS, solver_table
from fastdiff.errors import UserError, quoted
from fastdiff.models import BackboneSettings
from fastdiff.models.classifier_settings import ClassifierNetSettings
from fastdiff.models.cost import forward_flops
from fastdiff.models.settings import as_before
from fastdiff.models.unet import dummy_batch
from fastdiff.runtime.machine import (
    best_seconds,
    choose_threads,
    device_name,
    free_memory,
    keep_compiled_code,
    missing_compiler,
    prepare_cudnn,
    share_compile_processes,
    tf32,
)
from fastdiff.sampling.batch_size import best_batch_size
from fastdiff.sampling.classifier_gradient import ClassifierGuidance
from fastdiff.sampling.classifiers import OpenClassifier
from fastdiff.sampling.engine import Engine, sampling_launches
from fastdiff.sampling.guided_network import Guidance, GuidedNetwork
from fastdiff.sampling.labels import Labels
from fastdiff.sampling.pictures import Images, non_finite, to_uint8
from fastdiff.sampling.settings import DrawSettings
from fastdiff.settings import affecting

Inputs = Callable[[Tensor], dict[str, Tensor]]
"""inputs(index [B] int64) → further arguments of the network for the images with these numbers: "low_res", "y"."""

WORTHWHILE_FLOPS = {"cpu": 1e14, "cuda": 1e16}
"""FLOPs per process from which compiling, which takes one or two minutes, saves time. Two CPU cores need 10 to 20
minutes for them, a GPU about one minute (predicted)."""
WORTHWHILE_TRIAL = 100
"""Calls of the network from which numbers of threads are tried, which takes the time of a few, or about a second."""
MOST = {"cpu": 64, "cuda": 4096}
"""The largest batch size that batch_size auto tries."""


class Sampler:
    """Draws any images of a job; image i is a function of the settings and i.

    labels  Returns the classes for a class-conditional network, or for a classifier that guides.
    inputs  Returns the small images (and their classes) for a super-resolution network.
    count   The most images that this process may draw, 0 if unknown. Compiling pays only for many.
    """

    def __init__(
        self,
        network: Network,
        settings: DrawSettings,
        device: torch.device,
        *,
        labels: Labels | None = None,
        inputs: Inputs | None = None,
        guide: Network | None = None,
        classifier: OpenClassifier | None = None,
        noise_key: int = SAMPLES,
        count: int = 0,
    ) -> None:
        """Raises UserError for impossible settings; its message begins with the setting's name."""
        self.network, self.settings, self.device = network, settings, device
        self.labels, self.inputs = labels, inputs
        self.noise_key = noise_key
        if settings.cuda_graph is True and device.type != "cuda":
            raise UserError("cuda_graph True needs a GPU; leave it out")
        self.diffusion = self._diffusion()
        try:
            self.table = solver_table(self.diffusion, settings.solver, settings.eta)
        except ValueError as error:  # the respacing keeps too few steps
            raise UserError(f"solver: {error}") from None
        self.classifier = classifier
        self.guidance = self._guidance(guide)
        self._guide_digest = guide.digest if guide else ""
        keep_compiled_code()
        share_compile_processes()
        self.cuda_graph = settings.cuda_graph if device.type == "cuda" else False
        self.compiled, why = self._compiles(count)
        self.notes = [
            f"{settings.solver}: {self.table.num_evaluations} evaluations of the network per image{self._not_ddim}",
            f"torch.compile: {'yes' if self.compiled else 'no'} ({why}), CUDA graphs: "
            f"{'yes' if self.cuda_graph else 'no'}",
        ]
        if device.type == "cuda":
            self.notes.append(prepare_cudnn(benchmark_limit=settings.cudnn_benchmark_limit))
        self.batch_size = self._batch_size(count)
        self.notes += precompile.start(self._launches, device)

    # --- drawing ---

    def draw(self, index: np.ndarray, on_progress: Callable[[float], None] = lambda images: None) -> Images:
        """Draw images number `index` [n] int64; see `pictures.Draw`. Raises UserError if one is not finite."""
        images, labels = [], []
        for batch in torch.from_numpy(index).split(self.batch_size):
            given = self._given(batch.to(self.device))
            share = len(batch) / int(self.table.complete.sum())

            def report(_: Step, share: float = share) -> None:
                on_progress(share)

            images.append(self._run(given, report))
            if "y" in given:
                labels.append(given["y"].cpu().numpy())
        return Images(np.concatenate(images), np.concatenate(labels) if labels else None)

    def trace(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(predictions of x_0 after every step, the images), each [n, H, W, C] uint8, of images number `index` [n]."""
        frames: list[list[np.ndarray]] = []
        images = []
        for batch in torch.from_numpy(index).split(self.batch_size):
            frames.append([])
            keep = lambda step: frames[-1].append(_pixels(step.pred_xstart))
            images.append(self._run(self._given(batch.to(self.device)), keep))
        return [np.concatenate(each) for each in zip(*frames, strict=True)], np.concatenate(images)

    def identity(self) -> dict[str, Any]:
        """Everything besides i that image i depends on: setting → value."""
        settings, network = self.settings, self.network
        unused: set[str] = set()  # settings that change no image of this job
        if not settings.steps:
            unused |= {"steps", "spacing", "sigma_max"}
        if settings.solver != "ddim":
            unused.add("eta")
        if self.guidance.weight == 1:
            unused |= {"guidance", "guidance_interval", "guide_model_path"}
        if not settings.allow_tf32:
            unused.add("allow_tf32")
        names = affecting(DrawSettings, "images", "network") - unused
        given = {name: getattr(settings, name) for name in sorted(names)}
        named = {"model_path": network.digest, "guide_model_path": self._guide_digest, "spacing": self._spacing}
        found: dict[str, Any] = {**given, **{name: value for name, value in named.items() if name in given}}
        if "guidance_interval" in found:
            found["guidance_interval"] = list(settings.guidance_interval)
        for section in (network.settings, network.diffusion):
            shown = section.model_dump(mode="json", exclude=affecting(type(section), "training"))
            found = {**as_before(shown), **found}
        if self.classifier is not None:
            found["classifier_path"] = self.classifier.digest
            found["classifier_precision"] = self.classifier.precision
            found["classifier_scale"] = self.classifier.scale
            # Equal weights may be those of several depths: flags choose one where a file carries no settings.
            found |= self.classifier.settings.model_dump(mode="json", include=set(ClassifierNetSettings.model_fields))
        if self.labels is not None:
            found["classes"] = {"classes": list(self.labels.chosen), "weights": list(self.labels.weights)}
        return found

    # --- choices ---

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; empty where the checkpoint stores none."""
        return self.network.class_names or (self.classifier.class_names if self.classifier else [])

    @property
    def labelled(self) -> bool:
        """Whether each image has a class."""
        return self.network.settings.class_cond or self.classifier is not None

    @property
    def flops(self) -> float:
        """FLOPs of the network per image."""
        return forward_flops(self.network.settings) * self.table.num_evaluations

    @property
    def _spacing(self) -> str:
        settings = self.settings
        return SOLVERS[settings.solver].spacing if settings.spacing == "auto" else settings.spacing

    @property
    def _not_ddim(self) -> str:
        """A remark for a respacing named after DDIM. As in improved-diffusion, it keeps steps and chooses no solver."""
        respacing, solver = self.network.diffusion.timestep_respacing, self.settings.solver
        if not respacing.startswith("ddim") or solver == "ddim":
            return ""
        return f" (timestep_respacing {respacing} only keeps steps, and {solver} draws with them: solver ddim is DDIM)"

    def _diffusion(self) -> GaussianDiffusion:
        settings, diffusion = self.settings, self.network.diffusion
        try:
            kept = keep_steps(diffusion, settings.steps, self._spacing, settings.sigma_max) if settings.steps else None
        except ValueError as error:
            raise UserError(str(error)) from None
        return create_diffusion(diffusion, self.network.settings.learn_sigma, kept)

    def _guidance(self, guide: Network | None) -> Guidance:
        settings, model = self.settings, self.network.settings
        by_classifier = None
        if self.classifier is not None:
            rescales = self.classifier.trained_with.get("rescale_timesteps")
            by_classifier = ClassifierGuidance(self.classifier.model, self.classifier.scale, rescales)
        if settings.guidance == 1:
            return Guidance(classifier=by_classifier)
        if guide is None and not (model.class_cond and model.null_class):
            raise UserError(
                f"guidance {settings.guidance:g}: the model has no null class to steer away from; train it with "
                "--label_dropout 0.1, or name a weaker checkpoint by --guide_model_path"
            )
        if guide is not None:
            _check_guide(self.network, guide)
        low, high = settings.guidance_interval or (0.0, float("inf"))
        return Guidance(settings.guidance, (low, high), guide.model if guide else None, by_classifier)

    def _compiles(self, count: int) -> tuple[bool, str]:
        if self.settings.compile != "auto":
            return bool(self.settings.compile), f"compile {self.settings.compile}"
        if missing := missing_compiler(self.device):
            return False, missing
        if self.settings.kernels == "reference":
            return False, "kernels reference"
        worthwhile = count * self.flops >= WORTHWHILE_FLOPS[self.device.type]
        return worthwhile, "a long job" if worthwhile else "not worth it for so short a job"

    def _batch_size(self, count: int) -> int:
        wanted = self.settings.batch_size
        if wanted != "auto":
            return min(int(wanted), count or int(wanted))
        most = MOST[self.device.type]
        key = {
            "model": self.network.settings.model_dump(mode="json", exclude=affecting(BackboneSettings, "training")),
            "device": device_name(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "precision": self.settings.precision,
            "allow_tf32": self.settings.allow_tf32,
            "kernels": self.settings.kernels,
            "guided": [self.guidance.weight != 1, self.guidance.guide is not None],
            "torch": torch.__version__,
        }
        if self.classifier is not None:
            key["classifier"] = [self.classifier.settings.model_dump(mode="json"), self.classifier.precision]
        try:
            size, how = best_batch_size(self._seconds, min(count or most, most), key)
        except torch.OutOfMemoryError:
            raise UserError("batch_size auto: not even one image fits in the GPU's memory") from None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.notes.append(f"batch_size auto: {how}")
        return size

    def _seconds(self, size: int) -> float:
        """Seconds of one network call on `size` images, guided if any row is; infinity if it can't fit in memory."""
        settings = self.network.settings
        H, W = settings.size_hw
        if self.device.type == "cpu":
            widest = max(c / 4**level for level, c in enumerate(settings.level_channels)) * 4
            if 12 * size * H * W * widest > free_memory(self.device) / 2:
                return float("inf")
        work = self._dummy_call(size)
        with torch.no_grad(), tf32(self.settings.allow_tf32):
            return best_seconds(work, self.device, rounds=2)

    def _dummy_call(self, size: int) -> Callable[[], Tensor]:
        """A call of the network on `size` black images, guided if any row is, for timing."""
        settings = self.network.settings
        C, (H, W) = settings.in_channels, settings.size_hw
        network = self._guided_network()
        dummy = dummy_batch(settings, size, self.device)
        given = network.conditioning(**{"y": dummy.t, **dummy.model_kwargs} if self.labelled else dummy.model_kwargs)
        x = torch.zeros(size, C, H, W, device=self.device)
        row = torch.zeros(1, dtype=torch.int64, device=self.device)

        def call() -> Tensor:
            network.gradient(x, row, given)
            return network(x, row, given, any(network.guided))

        return call

    def try_threads(self, count: int) -> str:
        """On a CPU, choose the number of threads by timing the network, if it is called often for `count` images.

        Returns a line for the log, empty if nothing was timed.
        """
        calls = -(-count // self.batch_size) * self.table.num_evaluations
        if self.device.type != "cpu" or calls < WORTHWHILE_TRIAL:
            return ""
        with torch.no_grad():
            return choose_threads(self._dummy_call(self.batch_size))

    def _launches(self) -> list[Any]:
        """Kernel launches of the engine."""
        return sampling_launches(
            *(self.network.settings, self.diffusion, self.table, self.batch_size, self.network.model.dtype),
            guidance=self.guidance,
            clip=self.settings.clip_denoised,
        )

    def _guided_network(self, compiled: bool = False) -> GuidedNetwork:
        return GuidedNetwork(self.network.model, self.table, self.diffusion, self.guidance, compiled)

    def _run(self, given: dict[str, Tensor], on_step: Callable[[Step], None]) -> np.ndarray:
        """Draw a batch: images [n, H, W, C] uint8. UserError if one is not finite."""
        with tf32(self.settings.allow_tf32):
            for step in self._engine.steps(**given):
                on_step(step)
        # This waits for the device once per batch, as fetching the images does anyway.
        if bad := given["index"][~self._engine.finite(len(given["index"]))].tolist():
            raise UserError(self._refusal(bad))
        return _pixels(step.sample)

    def _refusal(self, bad: list[int]) -> str:
        """The error message for images that are not finite."""
        advice = ["another checkpoint or average of its weights as model_path"]
        if self.settings.precision != "fp32":
            advice.append("precision fp32")
        if self.guidance.weight != 1:
            advice.append(f"a guidance nearer 1 than {self.guidance.weight:g}")
        if self.classifier is not None:
            advice.append(f"a classifier_scale below {self.classifier.scale:g}")
            if self.classifier.precision == "fp16":
                advice.append("classifier_precision bf16")
        return f"{non_finite(bad)}, and are not written; try {', or '.join(advice)}"

    @cached_property
    def _engine(self) -> Engine:
        """The engine, built when the first image is drawn."""
        return Engine(
            self._guided_network(self.compiled),
            batch_size=self.batch_size,
            seed_and_key=self.settings.seed | self.noise_key,
            clip=self.settings.clip_denoised,
            fixed_shape=self.compiled,
            cuda_graph=self.cuda_graph,
        )

    def _given(self, index: Tensor) -> dict[str, Tensor]:
        """Arguments of `Engine.steps` for the images with numbers `index`."""
        given = {"index": index, **(self.inputs(index) if self.inputs else {})}
        if self.labelled and "y" not in given:
            assert self.labels is not None
            given["y"] = self.labels(index, self.settings.seed)
        return given


def _pixels(samples: Tensor) -> np.ndarray:
    return to_uint8(samples).cpu().numpy()


def _check_guide(network: Network, guide: Network) -> None:
    """Raise UserError unless the guide has the inputs and outputs of the network."""
    model = ["class_cond", "learn_sigma", "in_channels", "image_size", "large_size", "small_size"]
    if network.settings.class_cond:
        model.insert(1, "num_classes")
    named = network.class_names and guide.class_names
    if network.settings.class_cond and named and network.class_names != guide.class_names:
        raise UserError(
            f"--guide_model_path: {guide.file} has the classes {quoted(guide.class_names)}, the model "
            f"{quoted(network.class_names)}; a guide needs the same classes in the same order"
        )
    process = ["diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps"]
    for section, names in (("settings", model), ("diffusion", process)):
        for name in names:
            ours, theirs = (getattr(getattr(each, section), name, None) for each in (network, guide))
            if ours != theirs:
                raise UserError(
                    f"--guide_model_path: {guide.file} has {name} {theirs}, the model {ours}; a guide is a weaker "
                    "version of the same model"
                )
