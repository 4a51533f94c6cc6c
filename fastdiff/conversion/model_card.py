"""The model card, README.md in the layout of the Hugging Face hub, with front matter, usage, settings and scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.conversion.originals import command_of, notes_on, program_of
from fastdiff.conversion.run_files import Score
from fastdiff.conversion.to_diffusers import needs_pipeline
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.models import BackboneSettings, SuperResSettings
from fastdiff.models.classifier_settings import ClassifierSettings

PICTURE = "samples.png"
"""The picture beside the card."""
_SHOWN_CLASSES = 20
_PROVENANCE = {
    "file": "converted from",
    "sha256": "its SHA-256",
    "step": "after training step",
    "ema_rate": "average of the weights, rate",
    "fastdiff": "written by fastdiff",
}


@dataclass(frozen=True)
class Card:
    """A model card of the network in a folder, with the metadata of its file, in the format `to`."""

    folder: Path
    to: str
    settings: BackboneSettings | ClassifierSettings
    diffusion: DiffusionSettings
    info: dict[str, Any]
    state: dict[str, Tensor]

    def text(self, scores: list[Score], picture: str) -> str:
        """The content of README.md. picture says what the picture beside it shows; empty without one."""
        return "\n".join([*self._front_matter(), *self._body(scores, picture)]) + "\n"

    @property
    def _name(self) -> str:
        return self.folder.resolve().name

    @property
    def _parameters(self) -> int:
        return sum(value.numel() for value in self.state.values())

    def _front_matter(self) -> Iterator[str]:
        settings = self.settings
        enlarges, classifies = isinstance(settings, SuperResSettings), isinstance(settings, ClassifierSettings)
        classes = isinstance(settings, BackboneSettings) and settings.class_cond
        conditional = ["classifier"] if classifies else ["class-conditional"] if classes else []
        tags = [
            "diffusion",
            "ddpm",
            "pixel-space",
            *conditional,
            *(["super-resolution"] if enlarges else []),
            "fastdiff",
        ]
        yield "---"
        yield f"library_name: {'diffusers' if self.to == 'diffusers' else 'fastdiff'}"
        if not classifies:  # no tag of the hub stands for classifiers of noised images
            yield f"pipeline_tag: {'image-to-image' if enlarges else 'unconditional-image-generation'}"
        yield "tags:"
        yield from (f"- {tag}" for tag in tags)
        yield "---"

    def _body(self, scores: list[Score], picture: str) -> Iterator[str]:
        yield from ("", f"# {_plain(self._name)}", "", self._sentence())
        if picture:
            yield from ("", f"![Samples]({PICTURE})", "", picture)
        yield from ("", "## How do I use it?", "")
        yield from self._usage()
        if scores:
            yield from ("", "## How good is it?", "", "| metric | value | of |", "|---|---|---|")
            yield from (f"| {_plain(each.metric)} | {each.value} | {_plain(each.how)} |" for each in scores)
        yield from ("", "## Which settings does it have?", "", "| setting | value |", "|---|---|")
        dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in self.state.values()})
        yield f"| parameters | {self._parameters:,} in {' and '.join(dtypes)} |"
        empty = {"channel_mult": ",".join(f"{mult:g}" for mult in self.settings.backbone.level_mult)}
        empty |= {f"classifier_{name}": value for name, value in empty.items()}
        empty |= {"attention_resolutions": "in the middle only", "timestep_respacing": "all steps"}
        for section in (self.settings, self.diffusion):
            for name, value in section.model_dump(mode="json").items():
                yield f"| {name} | {empty.get(name, '') if value == '' else value} |"
        if names := self.info["class_names"]:
            shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:_SHOWN_CLASSES]))
            more = ", ..." if len(names) > _SHOWN_CLASSES else ""
            yield f"| classes | {len(names)}: {_plain(shown)}{more} |"
        yield from ("", "## Where does it come from?", "", "| what | value |", "|---|---|")
        for key, what in _PROVENANCE.items():
            if self.info["provenance"].get(key) not in (None, ""):
                yield f"| {what} | {_plain(str(self.info['provenance'][key]))} |"

    def _sentence(self) -> str:
        settings, millions = self.settings, f"{self._parameters / 1e6:.1f} million parameters"
        H, W = settings.size_hw
        kind = {1: "gray", 3: "RGB", 4: "RGBA"}.get(settings.in_channels, f"{settings.in_channels}-channel")
        size = f"{H}x{W} pixels"
        if isinstance(settings, ClassifierSettings):
            return (
                f"A classifier of noised {kind} images of {size} that tells {settings.num_classes} classes apart, to "
                f"guide a diffusion model. It has {millions}."
            )
        if isinstance(settings, SuperResSettings):
            does = f"enlarges {kind} images from {settings.small_size[0]}x{settings.small_size[1]} to {size}"
        else:
            does = f"draws {kind} images of {size}"
        classes = f" of {len(self.info['class_names']) or settings.num_classes} classes" if settings.class_cond else ""
        learned = " and the variances of the steps" if settings.learn_sigma else ""
        predicts = "the image" if self.diffusion.predict_xstart else "the noise"
        return (
            f"A diffusion model in pixel space that {does}{classes}. Its UNet has {millions} and "
            f"predicts {predicts}{learned}, in a {self.diffusion.noise_schedule} chain of "
            f"{self.diffusion.diffusion_steps} steps."
        )

    def _usage(self) -> Iterator[str]:
        if isinstance(self.settings, BackboneSettings) and self.to == "diffusers":
            yield from self._usage_of_diffusers(self.settings)
        elif self.to == "openai":
            command = command_of(self.settings, self.diffusion, Path("model.pt"))
            yield from (
                f"`model.pt` holds the weights alone, for {program_of(self.settings)}:",
                "",
                "```",
                command,
                "```",
            )
            if notes := list(notes_on(self.settings, self.diffusion)):
                yield from ("", *(f"- {note}" for note in notes))
        elif isinstance(self.settings, ClassifierSettings):
            words = f"--model_path NETWORK --classifier_path {shlex.quote(self._name)} --classifier_scale 1"
            yield from ("```", f"python fastdiff/sample.py {words}", "```")
        else:
            enlarges = isinstance(self.settings, SuperResSettings)
            draw = "model.enlarge(images)  # [n, h, w, C] uint8" if enlarges else "model.sample(16)"
            yield from ("```python", "import fastdiff", "", f'model = fastdiff.load("{_plain(self._name)}")')
            yield from (f"samples = {draw}", 'samples.save("grid.png")', "```")

    def _usage_of_diffusers(self, settings: BackboneSettings) -> Iterator[str]:
        steps, name = self.diffusion.diffusion_steps, json.dumps(self._name)
        own = needs_pipeline(settings)
        classes = [number % settings.num_classes for number in range(4)]
        labels = f", class_labels={classes}" if settings.class_cond else ""
        small = ", low_res=low_res" if isinstance(settings, SuperResSettings) else ""
        load = f"{name}, custom_pipeline={name}, trust_remote_code=True" if own else name
        kind = "DiffusionPipeline" if own else "DDPMPipeline"
        yield from ("```python", f"from diffusers import {kind}", "", f"pipe = {kind}.from_pretrained({load})")
        if isinstance(settings, SuperResSettings):
            shape = "x".join(map(str, settings.small_size))
            yield f"# low_res [4, {settings.in_channels}, h, w] are images of {shape} pixels, in [-1, 1]"
        yield f"images = pipe(batch_size=4{labels}{small}, num_inference_steps={steps}).images"
        yield "```"
        yield ""
        if own:
            yield (
                f"`pipeline.py` beside the weights is needed because {own}. `pipe.scheduler` may be replaced by "
                "`DDIMScheduler.from_config(pipe.scheduler.config)`."
            )
        elif settings.learn_sigma:
            yield (
                "`DDPMPipeline` uses the predicted variances. Other schedulers, such as DDIM, need `pipeline.py`: "
                f"`DiffusionPipeline.from_pretrained({name}, custom_pipeline={name}, trust_remote_code=True)`."
            )
        else:
            yield "`DDIMPipeline` loads it, too; `use_clipped_model_output=True` gives the images of fastdiff's DDIM."


def _plain(text: str) -> str:
    """Text without what Markdown's tables and headings would take for marks."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
