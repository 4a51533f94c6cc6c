"""Networks that convert.py writes for diffusers compute the same outputs and samples there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusers_peer import given_noise, import_diffusers, load_pipeline, network_of
from helpers.tiny import random_model, refusal, relative_error, save
from torch import Tensor

from fastdiff import convert
from fastdiff.config.presets import RELEASED, find_preset
from fastdiff.conversion.to_diffusers import head_size, needs_pipeline, unet_config, unet_weights
from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.diffusion.samplers import ddim_sample_loop, p_sample_loop
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, UNetSettings, build_model

FLOAT32 = 5e-6
"""Relative error of outputs: both compute in float32, with other orders of summation; 1e-6 is measured."""
SAMPLES = 2e-4
"""Largest difference of samples in [0, 1]: diffusers' schedulers have float32 tables, whose cumulative products lose
about 1e-5, and the steps that follow enlarge a difference; 5e-5 is measured."""
SMALL: dict[str, Any] = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1}
# What the released networks have, in small: name → (settings of the model, of the diffusion process).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cifar10": (
        {**SMALL, "attention_resolutions": "8", "learn_sigma": True},
        {"diffusion_steps": 400, "noise_schedule": "cosine"},
    ),
    "lsun": (
        {**SMALL, "attention_resolutions": "8", "learn_sigma": True, "num_heads": 1, "use_scale_shift_norm": False},
        {"rescale_timesteps": False},
    ),
    "imagenet64": (
        {**SMALL, "channel_mult": "1,2,3", "attention_resolutions": "8,4", "learn_sigma": True},
        {"diffusion_steps": 400, "noise_schedule": "cosine"},
    ),
    "class-conditional": (
        {**SMALL, "channel_mult": "1,2,3", "attention_resolutions": "8,4", "class_cond": True, "num_classes": 5},
        {"diffusion_steps": 400, "rescale_timesteps": False, "sigma_small": True},
    ),
    "guided": (
        {
            **{**SMALL, "channel_mult": "1,2,2", "attention_resolutions": "8,4", "resblock_updown": True},
            **{"use_new_attention_order": True, "num_head_channels": 16, "learn_sigma": True, "class_cond": True},
            **{"num_classes": 5},
        },
        {"rescale_timesteps": False},
    ),
    "unconditional": ({**SMALL, "attention_resolutions": "8"}, {}),
    "no attention but in the middle": ({**SMALL, "attention_resolutions": "", "resblock_updown": True}, {}),
    "512 pixels": (
        {
            **{**SMALL, "channel_mult": "0.5,1", "num_channels": 256, "scale_stem": True, "num_head_channels": 64},
            **{"attention_resolutions": "8", "resblock_updown": True, "learn_sigma": True},
        },
        {"rescale_timesteps": False},
    ),
    "wide first level": (
        {**SMALL, "channel_mult": "2,4", "scale_stem": True, "attention_resolutions": "8"},
        {"noise_schedule": "cosine"},
    ),
    "gray, x_0, not square": (
        {**SMALL, "image_size": "16x8", "attention_resolutions": "8,4", "in_channels": 1, "num_res_blocks": 2},
        {"predict_xstart": True, "noise_schedule": "cosine"},
    ),
    "upsampler": (
        {
            **{name: value for name, value in SMALL.items() if name != "image_size"},
            **{"large_size": 16, "small_size": 4, "attention_resolutions": "8,4", "learn_sigma": True},
            **{"class_cond": True, "num_classes": 5},
        },
        {"rescale_timesteps": False},
    ),
}
B, STEPS = 2, 8


class Written:
    """A network of a case, and the folder that convert.py has written of it."""

    def __init__(self, name: str, folder: Path) -> None:
        model, process = CASES[name]
        kind = SuperResSettings if "large_size" in model else UNetSettings
        self.settings: BackboneSettings = kind(**model)
        self.process = DiffusionSettings(**process)
        self.model: UNet = random_model(self.settings)
        defaults = {"noise_schedule": "linear", "diffusion_steps": 1000}
        file = save(self.model, folder / "model000001.pt", **{**defaults, **process})
        self.folder = folder / "written"
        convert.main(["--model_path", str(file), "--to", "diffusers", str(self.folder)])
        generator = torch.Generator().manual_seed(1)
        shape = (self.settings.in_channels, *self.settings.size_hw)
        self.noises = [torch.randn(B, *shape, generator=generator) for _ in range(STEPS)]
        self.inputs: dict[str, Tensor] = {}
        if self.settings.class_cond:
            self.inputs["y"] = torch.tensor([0, 4])
        if isinstance(self.settings, SuperResSettings):
            self.inputs["low_res"] = torch.rand(B, 3, *self.settings.small_size, generator=generator) * 2 - 1

    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline is called with."""
        theirs = {"y": "class_labels", "low_res": "low_res"}
        given = {theirs[name]: value for name, value in self.inputs.items()}
        return {"batch_size": B, "num_inference_steps": STEPS, "output_type": "pt", **given}

    def ours(self, ddim: bool) -> Tensor:
        """Our samples in [0, 1] on the steps that diffusers keeps."""
        T = self.process.diffusion_steps
        settings = self.process.model_copy(update={"timestep_respacing": ""})
        diffusion = create_diffusion(settings, self.settings.learn_sigma, kept=range(0, T, T // STEPS)[:STEPS])
        loop = ddim_sample_loop if ddim else p_sample_loop
        noise = lambda step: self.noises[STEPS - step]
        *_, last = loop(diffusion, self.model, self.noises[0], noise, model_kwargs=self.inputs)
        return (last.sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, tmp_path: Path) -> None:
    """UNet2DModel gives our outputs; with heads of several sizes it fails by itself, and works in our pipeline."""
    case = Written(name, tmp_path)
    timesteps = torch.tensor([3, case.process.diffusion_steps - 1])
    scale = 1000 / case.process.diffusion_steps if case.process.rescale_timesteps else 1
    x, y = case.noises[0], case.inputs.get("y")
    with torch.no_grad():
        want = case.model(x, timesteps * scale, **case.inputs)
    if "low_res" in case.inputs:
        large = torch.nn.functional.interpolate(case.inputs["low_res"], case.settings.size_hw, mode="bilinear")
        x = torch.cat([x, large], dim=1)
    network = network_of(case.folder)
    if head_size(case.settings) < 0:
        with pytest.raises(RuntimeError, match="shape"):
            network(x, timesteps, y)
        unet = load_pipeline(case.folder).unet.eval()
        network = lambda *given: unet(*given).sample
    with torch.no_grad():
        assert relative_error(network(x, timesteps, y), want) < FLOAT32


@pytest.mark.parametrize("ddim", [False, True], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("name", CASES)
def test_samples(name: str, ddim: bool, tmp_path: Path) -> None:
    case = Written(name, tmp_path)
    plain = not needs_pipeline(case.settings) and not (ddim and case.settings.learn_sigma)
    pipe = load_pipeline(case.folder, ("DDIMPipeline" if ddim else "DDPMPipeline") if plain else "DiffusionPipeline")
    if ddim and not plain:
        pipe.scheduler = import_diffusers().DDIMScheduler.from_config(pipe.scheduler.config)
    noises = case.noises[:1] if ddim else case.noises
    with given_noise(pipe, noises):
        # By default DDIM's scheduler doesn't compute the noise again after it has clipped x_0.
        images = pipe(**case.arguments, **({"use_clipped_model_output": True} if ddim else {})).images
    assert (images - case.ours(ddim)).abs().max() < SAMPLES


@pytest.mark.parametrize("name", ["cifar10", "guided", "unconditional", "upsampler"])
def test_the_code_of_the_model_card(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where the folder lies, in fewer steps here."""
    case = Written(name, tmp_path)
    code = (case.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"low_res": torch.zeros(4, 3, 4, 4)}
    import_diffusers()
    exec(re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code), names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 4


def test_pictures_of_our_pipeline(tmp_path: Path) -> None:
    pipe = load_pipeline(Written("guided", tmp_path).folder)
    images = pipe(batch_size=3, class_labels=2, num_inference_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 3


@pytest.mark.parametrize("name", [name for name in RELEASED if find_preset(name).kind != "classifier"])
def test_released_configurations(name: str) -> None:
    """UNet2DModel has the names and shapes of the tensors that are written, for every configuration."""
    preset = find_preset(name)
    settings = (SuperResSettings if preset.kind == "super_res" else UNetSettings)(**preset.model)
    diffusion = DiffusionSettings(**preset.diffusion)
    with torch.device("meta"):
        state = build_model(settings).state_dict()
        unet = import_diffusers().UNet2DModel.from_config(unet_config(settings, diffusion))
    want = {name: value.shape for name, value in unet.state_dict().items()}
    assert {name: value.shape for name, value in unet_weights(state, settings, diffusion).items()} == want


def test_chains_are_the_same(tmp_path: Path) -> None:
    """The scheduler's betas are ours to float32's precision, for chains of all lengths."""
    for name in ("cifar10", "lsun", "class-conditional"):
        case = Written(name, tmp_path / name)
        scheduler = load_pipeline(case.folder).scheduler
        betas = torch.from_numpy(create_diffusion(case.process, False).schedule.betas.copy())
        assert (scheduler.betas.double() / betas - 1).abs().max() < 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stem": (
        {"channel_mult": "2,4"},
        "diffusers' UNet2DModel has one width for its first convolution and its first level, and this network has 32 "
        "and 64 channels there (channel_mult 2,...)",
    ),
    "heads": (
        {"num_heads_upsample": 2},
        "diffusers' UNet2DModel has as many attention heads on the way up as on the way down, and this network has "
        "num_heads 4 and num_heads_upsample 2",
    ),
    "time": (
        {"num_channels": 128, "channel_mult": "0.25,1", "scale_stem": True},
        "diffusers' UNet2DModel has one width for its timestep embedding and its first level, and this network's "
        "embedding of 128 numbers can't be expressed by 32",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_expressed(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = random_model(UNetSettings(**{**SMALL, "attention_resolutions": "8", **changes}))
    file = save(model, tmp_path / "net.pt", diffusion_steps=1000)
    message = refusal(convert.main, ["--model_path", file, "--to", "diffusers", tmp_path / "out"])
    assert message == f"--to diffusers: {reason}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt"]
