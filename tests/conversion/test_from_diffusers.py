"""Networks of diffusers' UNet2DModel become ours, with the same outputs, or are refused with the reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusers_peer import import_diffusers
from helpers.tiny import nothing_written, refusal, relative_error
from torch import Tensor, nn

import fastdiff
from fastdiff import convert
from fastdiff.config.checkpoint import open_checkpoint

FLOAT32 = 5e-6  # both compute in float32, with other orders of summation
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 32,
}
FURTHER: dict[str, Any] = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESNET: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


def written(folder: Path, scheduler: dict[str, Any] | None = None, **changes: Any) -> nn.Module:
    """Write a pipeline of random weights into a folder, as diffusers does, and return its network."""
    diffusers = import_diffusers()
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**UNET, **changes}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**(scheduler or {}))).save_pretrained(folder)
    return unet


def converted(source: Path, target: Path) -> nn.Module:
    convert.main(["--model_path", str(source), "--to", "pt", str(target)])
    return fastdiff.load(target, kernels="reference").network.model


@torch.no_grad()
def outputs(model: nn.Module, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 90])
    y = torch.tensor([0, 4]) if settings.get("num_class_embeds") else None
    result = model(x, t, y)
    return result if isinstance(result, Tensor) else result.sample


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"attention_head_dim": None},
    "three levels": FURTHER,
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "residual blocks resample": {**RESNET, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "classes": {"num_class_embeds": 5},
    "sines first": {"flip_sin_to_cos": False},
    "two layers": {"layers_per_block": 2, "dropout": 0.1},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
def test_outputs(changes: dict[str, Any], tmp_path: Path) -> None:
    unet = written(tmp_path / "theirs", **changes)
    ours = converted(tmp_path / "theirs", tmp_path / "ours.pt")
    assert relative_error(outputs(ours, **changes), outputs(unet, **changes)) < FLOAT32


def test_the_diffusion_process(tmp_path: Path) -> None:
    scheduler = {"num_train_timesteps": 200, "beta_start": 0.0005, "beta_end": 0.1, "variance_type": "learned_range"}
    written(tmp_path / "theirs", {**scheduler, "prediction_type": "sample"}, out_channels=6)
    converted(tmp_path / "theirs", tmp_path / "ours.pt")
    info = open_checkpoint(str(tmp_path / "ours.pt")).info
    process = info["diffusion"]
    assert (process["diffusion_steps"], process["noise_schedule"]) == (200, "linear")
    assert (process["predict_xstart"], process["rescale_timesteps"], info["model"]["learn_sigma"]) == (
        True,
        False,
        True,
    )
    written(tmp_path / "cosine", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small"})
    converted(tmp_path / "cosine", tmp_path / "cosine.pt")
    process = open_checkpoint(str(tmp_path / "cosine.pt")).info["diffusion"]
    assert (process["noise_schedule"], process["sigma_small"]) == ("cosine", True)


def test_a_scheduler_that_does_not_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path / "theirs", {"clip_sample": False})
    converted(tmp_path / "theirs", tmp_path / "ours.pt")
    assert "draw with --clip_denoised False" in caplog.text


def test_other_layouts_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder of the UNet alone, weights as .bin, and names of older versions are read, too."""
    unet = written(tmp_path / "theirs")
    flat = tmp_path / "theirs" / "unet"
    now = unet.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in now.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = tensor
    torch.save(renamed, flat / "diffusion_pytorch_model.bin")
    (flat / "diffusion_pytorch_model.safetensors").unlink()
    assert relative_error(outputs(converted(flat, tmp_path / "ours.pt")), outputs(unet)) < FLOAT32
    assert "a linear chain of 1000 steps is assumed" in caplog.text


DDPM = {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6, "downsample_padding": 0}  # of google/ddpm-*
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "google/ddpm": (DDPM, "its freq_shift is 1, and our network has 0 there"),
    "eps": ({"norm_eps": 1e-6}, "its norm_eps is 1e-06, and our network has 1e-05 there"),
    "padding": ({"downsample_padding": 0}, "its downsample_padding is 0, and our network has 1 there"),
    "groups": ({"norm_num_groups": 16}, "its norm_num_groups is 16, and our network has 32 there"),
    "fourier": (
        {"time_embedding_type": "fourier"},
        "its time_embedding_type is 'fourier', and our network has positional or learned there",
    ),
    "learned": (
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        "its embedding of timesteps was learned, and ours are sines and cosines",
    ),
    "blocks": (
        {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")},
        "it has 'SkipDownBlock2D', and our network's blocks are AttnDownBlock2D, DownBlock2D, ResnetDownsampleBlock2D",
    ),
    "levels": (
        {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D")},
        "it has attention at other levels on the way up than on the way down",
    ),
    "mixed resampling": (
        {"downsample_type": "resnet", **FURTHER},
        "some of its levels are resampled by residual blocks, others by convolutions",
    ),
    "norm of the middle": (
        {"resnet_time_scale_shift": "scale_shift"},
        "its attn_norm_num_groups is not 32, so that its middle attention has another norm",
    ),
    "channels": ({"in_channels": 4}, "it has 4 input and 3 output channels, and ours as many or twice as many outputs"),
    "size": ({"sample_size": None}, "it doesn't say the size of its images (sample_size); add it to its config.json"),
}
SCHEDULERS: dict[str, tuple[dict[str, Any], str]] = {
    "ends": (
        {"beta_end": 0.03},
        "its linear chain of 1000 steps goes from beta 0.0001 to 0.03, ours from others",
    ),
    "kind": ({"beta_schedule": "sigmoid"}, "its beta_schedule is 'sigmoid', and ours are linear and squaredcos_cap_v2"),
    "prediction": (
        {"prediction_type": "v_prediction"},
        "it predicts 'v_prediction', and ours predict epsilon or sample",
    ),
    "variance": (
        {"variance_type": "learned_range"},
        "it has 3 output channels for 3, which doesn't fit its scheduler's variance_type 'learned_range'",
    ),
}


def reason(source: Path, target: Path) -> str:
    with nothing_written(target.parent):
        message = refusal(convert.main, ["--model_path", source, "--to", "pt", target])
    return message.removeprefix(f"--model_path: {source} can't be expressed as a network of fastdiff: ")


@pytest.mark.parametrize(("changes", "why"), REFUSED.values(), ids=list(REFUSED))
def test_other_networks(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written(tmp_path / "theirs", **changes)
    assert reason(tmp_path / "theirs", tmp_path / "ours.pt") == why


@pytest.mark.parametrize(("changes", "why"), SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_other_processes(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    written(tmp_path / "theirs", changes)
    assert reason(tmp_path / "theirs", tmp_path / "ours.pt") == why


def test_damaged_folders(tmp_path: Path) -> None:
    written(tmp_path / "theirs")
    unet, target = tmp_path / "theirs" / "unet", tmp_path / "ours.pt"
    file, config = unet / "diffusion_pytorch_model.safetensors", unet / "config.json"
    whole, settings = file.read_bytes(), json.loads(config.read_text())
    file.write_bytes(whole[:-100])
    assert reason(tmp_path / "theirs", target).endswith("is not a checkpoint, or is damaged")
    file.unlink()
    assert "holds no diffusion_pytorch_model.safetensors or " in reason(tmp_path / "theirs", target)
    file.write_bytes(whole)
    config.write_text(json.dumps({**settings, "block_out_channels": [32, 96]}))
    assert reason(tmp_path / "theirs", target) == "its tensors have other shapes than its configuration says"
    config.write_text(json.dumps({**settings, "block_out_channels": "wide"}))
    assert "has a damaged configuration" in reason(tmp_path / "theirs", target)
    config.write_text(json.dumps({**settings, "layers_per_block": 2}))
    assert reason(tmp_path / "theirs", target) == "it has no down_blocks.0.resnets.1.norm1.weight"
    config.write_text(json.dumps({**settings, "_class_name": "UNet2DConditionModel"}))
    assert reason(tmp_path / "theirs", target).endswith("'UNet2DConditionModel'; only UNet2DModel is read")
    config.unlink()
    assert reason(tmp_path / "theirs", target).endswith("(no unet/config.json); only networks of UNet2DModel are read")
