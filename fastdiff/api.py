"""The Python API: load a checkpoint and draw from it in three lines.

model = fastdiff.load("runs/NAME")
samples = model.sample(16, classes="cat,dog", solver="dpmpp_2m", steps=20)
samples.save("grid.png")
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdiff.config.aliases import advice
from fastdiff.config.checkpoint import Network, open_checkpoint, open_network
from fastdiff.config.load import describe
from fastdiff.config.presets import download, find_preset, is_preset
from fastdiff.diffusion import create_diffusion
from fastdiff.diffusion.noise_keys import ENLARGED, SAMPLES
from fastdiff.diffusion.samplers import ddim_reverse_loop
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.errors import UserError, blaming, quoted
from fastdiff.models import BackboneSettings, SuperResSettings
from fastdiff.models.classifier_settings import ClassifierNetSettings
from fastdiff.ops import Kernels, using
from fastdiff.runtime.caller import default_device, undisturbed
from fastdiff.runtime.paths import expand_path
from fastdiff.sampling.classifiers import OpenClassifier, open_guiding
from fastdiff.sampling.labels import Labels, label_numbers, labels_in_python
from fastdiff.sampling.low_res import as_low_res
from fastdiff.sampling.pictures import grid, non_finite, save_grid
from fastdiff.sampling.sampler import Inputs, Sampler
from fastdiff.sampling.settings import SampleSettings
from fastdiff.settings import affecting, validated

SOLVER, STEPS = "dpmpp_2m_sde", 20
"""The default solver and its steps. Of all solvers with 20 evaluations, its images came nearest to real ones, measured
on a briefly trained network (benchmarks/results/quality_digits.md): added noise corrects its errors."""

DRAWING = affecting(SampleSettings, "images", "batch")
"""Settings that a call may give. The other settings of sample.py belong to `load`, or to jobs and their files."""
_BAR = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass(frozen=True)
class Samples:
    """Images [n, H, W, C] uint8, their labels [n] int64 (None without classes), and the seed and numbers [n] that
    identify them. class_names are the names of the classes by label, empty where the checkpoint stores none."""

    images: np.ndarray
    labels: np.ndarray | None
    seed: int
    index: np.ndarray
    class_names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def grid(self, columns: int | None = None) -> Image.Image:
        """Arrange all images in one picture."""
        return grid(self.images, columns)

    def save(self, path: str | Path, columns: int | None = None) -> None:
        """Write an .npz with the arrays of sample.py's, or the grid as a PNG picture."""
        with _blaming("save"):
            path = Path(expand_path(str(path)))
            if path.suffix.lower() not in (".npz", ".png", ""):
                raise UserError(f"{path.name} must end in .npz or .png")
        if path.suffix != ".npz":
            save_grid(path, self.images, columns)
            return
        labels = {} if self.labels is None else {"arr_1": self.labels}
        names = {"class_names": np.array(self.class_names, dtype=np.str_)} if labels and self.class_names else {}
        arrays = {"arr_0": self.images, **labels, **names, "seed": np.int64(self.seed), "index": self.index}
        np.savez(path, **arrays)  # type: ignore[arg-type]


def load(
    path_or_preset: str | Path,
    *,
    preset: str = "",
    precision: str = "",
    device: torch.device | str | None = None,
    kernels: Kernels = "auto",
    compile: bool | str = "auto",
    cuda_graph: bool | str = "auto",
    allow_tf32: bool = False,
    **unknown: Any,
) -> Model:
    """Load a checkpoint for drawing.

    path_or_preset  a .pt file, a run's folder, or the name of a published checkpoint (`fastdiff.config.presets`),
                    which is downloaded once.
    preset          settings for a .pt file that carries none.
    precision       fp32, bf16 or fp16; the default is bf16 on a GPU that has it, else fp32.
    device          cpu, cuda or cuda:N; the default is the current CUDA GPU, or the CPU where there is none. Other
                    accelerators, such as Apple's (mps), are not used.
    allow_tf32      on a GPU, whether float32 products may round their factors to TF32. By default they are exact,
                    whatever the process has set for other networks.
    Neither this nor the model's methods change settings of the calling process (`fastdiff.runtime.caller`).
    Raises UserError for a checkpoint that can't be read or doesn't fit the settings.
    """
    with _blaming("load"):
        _refuse(unknown, load)
        place = _device(device)
        path = expand_path(str(path_or_preset))
        if not Path(path).exists() and is_preset(path):
            preset, path = path, str(download(find_preset(path)))
        if not precision:
            precision = "bf16" if place.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        given = {"precision": precision, "kernels": kernels, "compile": compile, "cuda_graph": cuda_graph}
        settings = validated(SampleSettings, {**given, "allow_tf32": allow_tf32})
        with _undisturbed(place, kernels, settings.allow_tf32):
            checkpoint = open_checkpoint(path)
            config = describe(checkpoint, preset)
            network = open_network(
                config.model, config.diffusion, checkpoint, precision, place, frozen=kernels != "reference"
            )
    return Model(network, place, {name: getattr(settings, name) for name in (*given, "allow_tf32")})


def _device(given: torch.device | str | int | None) -> torch.device:
    """The device that a caller names, or the default one. UserError for one that this machine doesn't have."""
    if given is None:
        return default_device()
    try:
        device = torch.device(given)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
            return device
    except (RuntimeError, TypeError):
        pass
    gpus = torch.cuda.device_count()
    here = "cpu or cuda:0" + f" to cuda:{gpus - 1}" * (gpus > 1) if gpus else "cpu"
    raise UserError(f"device must be {here}, not {quoted(given)}{'' if gpus else '; there is no CUDA GPU here'}")


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Put the method's name before the message of a UserError, and name settings as in Python, without dashes."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix('--')}") from error


@contextmanager
def _undisturbed(device: torch.device, kernels: Kernels, allow_tf32: bool) -> Iterator[None]:
    """Compute on `device` with these kernels, and leave the settings of the calling program as they were."""
    with undisturbed(device, allow_tf32), ExitStack() as chosen:
        try:
            chosen.enter_context(using(kernels))
        except ValueError as error:
            raise UserError(str(error)) from None
        yield


class Model:
    """A network that draws images. `load` creates it.

    It is for one thread at a time, and so is fastdiff as a whole, because kernels are chosen for the whole process.
    """

    def __init__(self, network: Network, device: torch.device, defaults: dict[str, Any]) -> None:
        self.network, self.device = network, device
        self._defaults = defaults
        self._sampler: tuple[Any, Sampler] | None = None
        self._guiding: tuple[SampleSettings, OpenClassifier | None] | None = None

    @property
    def settings(self) -> BackboneSettings:
        """Settings of the network."""
        return self.network.settings

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; empty where the checkpoint stores none."""
        return self.network.class_names

    def sample(
        self,
        n: int = 16,
        *,
        classes: str | int | Sequence[str | int] | np.ndarray | None = None,
        solver: str = SOLVER,
        steps: int = STEPS,
        seed: int = 0,
        start: int = 0,
        guide: Model | None = None,
        classifier: str | Path | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Samples:
        """Draw images start to start + n - 1 of the job that the settings describe, the same ones as sample.py.

        classes   a class, or a list or array of them that is used in turn: whole numbers are labels, texts are names.
                  A single text may be anything that --classes accepts; None draws them at random.
        steps     0: every step that the checkpoint's timestep_respacing keeps.
        guide     a weaker model, for autoguidance.
        classifier  a .pt file or a run of a classifier of noised images that guides, with the weight classifier_scale;
                  a model without classes then draws the classifier's.
        settings  further settings named in `DRAWING`: spacing, eta, guidance, batch_size, …
        Raises UserError for settings that are not allowed.
        """
        if isinstance(self.settings, SuperResSettings):
            raise UserError("sample: this model enlarges images; call enlarge")
        with _blaming("sample"), self._undisturbed():
            n, start = _whole("n", n, 1), _whole("start", start, 0)
            given = {"solver": solver, "steps": steps, "seed": seed, **settings}
            guiding = self._classifier(classifier, settings.get("classifier_scale", 1.0))
            labels = self._labels(classes, guiding)
            return self._draw(self._sampler_of(given, guide, n, labels=labels, classifier=guiding), start, n, progress)

    def enlarge(
        self,
        images: np.ndarray,
        labels: Sequence[str | int] | np.ndarray | None = None,
        *,
        solver: str = SOLVER,
        steps: int = STEPS,
        seed: int = 0,
        progress: bool = False,
        **settings: Any,
    ) -> Samples:
        """Enlarge small images [n, h, w, C] uint8 with a super-resolution model.

        labels [n] are the classes of the images, by number or name, for a class-conditional model.
        Raises UserError for images of another size and for settings that are not allowed.
        """
        wanted = self.settings
        if not isinstance(wanted, SuperResSettings):
            raise UserError("enlarge: this model draws images; call sample")

        def inputs(index: Tensor) -> dict[str, Tensor]:
            given = {"low_res": as_low_res(images[index.cpu().numpy()], index.device)}
            return given if classes is None else {**given, "y": classes.to(index.device)[index]}

        with _blaming("enlarge"), self._undisturbed():
            images = np.asarray(images)
            classes = self._checked_labels(wanted.small_size, images, labels)
            given = {"solver": solver, "steps": steps, "seed": seed, **settings}
            return self._draw(self._sampler_of(given, None, len(images), inputs=inputs), 0, len(images), progress)

    def encode(
        self,
        images: np.ndarray,
        labels: Sequence[str | int] | np.ndarray | None = None,
        *,
        steps: int = 100,
        **unknown: Any,
    ) -> Tensor:
        """Encode images [n, H, W, C] uint8 into the noise [n, C, H, W] float32 from which DDIM draws them again.

        labels [n] are the classes of the images, by number or name, for a class-conditional model. Raises UserError
        for images and steps that don't fit the model.
        """
        process, settings = self.network.diffusion, self.settings
        if isinstance(settings, SuperResSettings):
            raise UserError("encode: this model enlarges images; give one that draws them")
        with _blaming("encode"), self._undisturbed():
            _refuse(unknown, Model.encode)
            images = np.asarray(images)
            classes = self._checked_labels(settings.size_hw, images, labels)
            steps = _whole("steps", steps, 0)
            try:
                kept = keep_steps(process, steps, "uniform", float("inf")) if steps else None
            except ValueError as error:
                raise UserError(str(error)) from None
            diffusion = create_diffusion(process, settings.learn_sigma, kept)
            x = as_low_res(images, self.device)
            kwargs = {} if classes is None else {"y": classes.to(self.device)}
            for step in ddim_reverse_loop(diffusion, self.network.model, x, model_kwargs=kwargs):
                x = step.sample
            if bad := (~x.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
                raise UserError(f"{non_finite(bad)}; try another checkpoint, or load this one with precision fp32")
            return x

    def _undisturbed(self) -> AbstractContextManager[None]:
        return _undisturbed(self.device, self._defaults["kernels"], self._defaults["allow_tf32"])

    def _sampler_of(
        self,
        given: dict[str, Any],
        guide: Model | None,
        count: int,
        *,
        labels: Labels | None = None,
        inputs: Inputs | None = None,
        classifier: OpenClassifier | None = None,
    ) -> Sampler:
        """The sampler for these settings. It is kept for the next call with the same: it holds compiled code."""
        for name in given:
            if name not in DRAWING:
                of_load = name in (load.__kwdefaults__ or {})
                hint = "; give it to load" if of_load else advice(name, {*DRAWING, "n"}, str)
                names = ", ".join(sorted(DRAWING))
                raise UserError(f"{name} is not a setting here{hint or f'; those are {names}'}")
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        given |= {name: _whole(name, given[name], 0) for name in ("seed", "steps")}
        path = {} if classifier is None else {"classifier_path": str(classifier.file)}
        settings = validated(SampleSettings, {**self._defaults, **path, **given})
        if guide is not None and not isinstance(guide, Model):
            raise UserError(f"guide must be a model that load has returned, not {quoted(guide)}")
        if guide is not None and settings.guidance == 1:
            raise UserError("guide needs a guidance other than 1")
        key = (settings, guide, classifier, count, labels)
        if inputs is None and self._sampler is not None and self._sampler[0] == key:
            return self._sampler[1]
        sampler = Sampler(
            self.network,
            settings,
            self.device,
            labels=labels,
            inputs=inputs,
            guide=guide.network if guide else None,
            classifier=classifier,
            noise_key=ENLARGED if inputs else SAMPLES,
            count=count,
        )
        self._sampler = None if inputs else (key, sampler)
        return sampler

    def _draw(self, sampler: Sampler, start: int, n: int, progress: bool) -> Samples:
        index = np.arange(start, start + n)
        with tqdm(total=n, unit="image", disable=not progress, bar_format=_BAR) as bar:
            on_progress: Callable[[float], Any] = bar.update
            drawn = sampler.draw(index, on_progress)
        return Samples(drawn.images, drawn.labels, sampler.settings.seed, index, tuple(sampler.class_names))

    def _classifier(self, path: str | Path | None, scale: Any) -> OpenClassifier | None:
        """The classifier that guides, which is kept for the next call; None for none."""
        if path is None:
            return None
        settings = validated(
            SampleSettings, {**self._defaults, "classifier_path": str(path), "classifier_scale": scale}
        )
        if self._guiding is None or self._guiding[0] != settings:
            with blaming("classifier"):
                self._guiding = settings, open_guiding(settings, ClassifierNetSettings(), self.network, self.device)
        return self._guiding[1]

    def _labels(self, classes: Any, classifier: OpenClassifier | None) -> Labels | None:
        """The classes to draw; None for a model without classes that no classifier guides."""
        classes = "" if classes is None else classes
        with blaming("classes"):
            if self.settings.class_cond:
                return labels_in_python(classes, self.class_names, self.network.known_classes)
            if classifier is not None:
                return labels_in_python(classes, classifier.class_names, classifier.known_classes)
            if np.size(classes) and not (isinstance(classes, str) and not classes):
                raise UserError("the model is not class-conditional")
        return None

    def _checked_labels(self, size_hw: tuple[int, int], images: np.ndarray, labels: Any) -> Tensor | None:
        """The labels as [n] int64, or None. UserError unless images are [n, *size_hw, C] uint8 and labels fit."""
        settings = self.settings
        shape, count = (*size_hw, settings.in_channels), len(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not count:
            raise UserError(f"images are {images.dtype} {images.shape}, the model takes uint8 (n, {str(shape)[1:]}")
        if (labels is not None) != settings.class_cond:
            says = "needs labels, one for each image" if settings.class_cond else "has no classes; leave labels out"
            raise UserError(f"the model {says}")
        if labels is None:
            return None
        numbers = label_numbers(labels, self.class_names, settings.num_labels)
        if np.shape(labels) != (count,):
            raise UserError(f"labels must be {count} numbers or names, one for each image, not {len(numbers)}")
        return torch.tensor(numbers, dtype=torch.int64)


def _refuse(unknown: dict[str, Any], method: Callable[..., Any]) -> None:
    """UserError for a keyword that a function doesn't have, with those that it has."""
    for name in unknown:
        known = sorted(method.__kwdefaults__ or {})
        hint = advice(name, known, str)
        raise UserError(f"{name} is not a setting here{hint or '; those are ' + ', '.join(known)}")


def _whole(name: str, value: Any, least: int) -> int:
    """The value as an int. UserError for anything but a whole number of at least `least`, such as True or 2.0."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number < 2**62:
        raise UserError(f"{name} must be a whole number of at least {least}, not {quoted(value)}")
    return number
