"""Describes a network and its diffusion process as diffusers does, where UNet2DModel can express them.

Written are JSON and safetensors, so that diffusers needn't be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.conversion.unet_names import heads_of, to_diffusers
from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError
from fastdiff.models.blocks import timestep_embedding
from fastdiff.models.settings import GROUPS, BackboneSettings, SuperResSettings

PIPELINE = "pipeline.py"
TABLE = "time_proj.weight"


def check_expressible(settings: BackboneSettings) -> None:
    """Raise UserError with the reason if UNet2DModel can't compute the network's function."""
    widths = (settings.num_channels, settings.stem_channels, settings.level_channels[0])
    if len(set(widths)) > 1:
        raise UserError(
            "diffusers' UNet2DModel has one width for its timestep embedding, first convolution and first level, and "
            f"this network has {widths[0]}, {widths[1]} and {widths[2]} channels there (channel_mult "
            f"{','.join(f'{mult:g}' for mult in settings.level_mult)})"
        )
    if settings.num_head_channels == -1 and settings.num_heads_upsample not in (-1, settings.num_heads):
        raise UserError(
            "diffusers' UNet2DModel has as many attention heads on the way up as on the way down, and this network has "
            f"num_heads {settings.num_heads} and num_heads_upsample {settings.num_heads_upsample}"
        )


def head_size(settings: BackboneSettings) -> int:
    """UNet2DModel's attention_head_dim: the channels of a head, or minus the number of heads where these differ.

    In that case UNet2DModel alone fails, and our pipeline sets the heads.
    """
    attending = {*settings.attending_levels, len(settings.level_channels) - 1}
    sizes = {settings.level_channels[level] // heads_of(settings, level) for level in attending}
    return sizes.pop() if len(sizes) == 1 else -settings.num_heads


def needs_pipeline(settings: BackboneSettings) -> str:
    """Why DDPMPipeline can't draw with the network and our pipeline is needed; empty where it can."""
    if isinstance(settings, SuperResSettings):
        return "it enlarges images"
    if settings.class_cond:
        return "it is class-conditional"
    return "its attention has heads of several sizes" if head_size(settings) < 0 else ""


def has_table(diffusion: DiffusionSettings) -> bool:
    """Whether the network sees timesteps that are not whole, for which UNet2DModel needs a table of embeddings."""
    return diffusion.rescale_timesteps and diffusion.diffusion_steps != 1000


def timestep_table(settings: BackboneSettings, diffusion: DiffusionSettings) -> Tensor:
    """The embeddings [T, num_channels] float32 of all timesteps of the chain, scaled to 0..1000."""
    T = diffusion.diffusion_steps
    return timestep_embedding(torch.arange(T).float() * (1000.0 / T), settings.num_channels)


def unet_config(settings: BackboneSettings, diffusion: DiffusionSettings) -> dict[str, Any]:
    """The config.json of UNet2DModel."""
    last = len(settings.level_channels) - 1
    attends = [level in settings.attending_levels for level in range(last + 1)]
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if settings.resblock_updown
        else ("DownBlock2D", "UpBlock2D")
    )
    H, W = settings.size_hw
    resampling = "resnet" if settings.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": H if H == W else [H, W],
        "in_channels": settings.network_in_channels,
        "out_channels": settings.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "learned" if has_table(diffusion) else "positional",
        "num_train_timesteps": diffusion.diffusion_steps if has_table(diffusion) else None,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": ["AttnDownBlock2D" if attend else plain[0] for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)],
        "mid_block_type": "UNetMidBlock2D",
        "block_out_channels": list(settings.level_channels),
        "layers_per_block": settings.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": 1,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "dropout": settings.dropout,
        "act_fn": "silu",
        "attention_head_dim": head_size(settings),
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if settings.use_scale_shift_norm else "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": settings.num_labels if settings.class_cond else None,
    }


def scheduler_config(settings: BackboneSettings, diffusion: DiffusionSettings) -> dict[str, Any]:
    """The scheduler_config.json of DDPMScheduler, from which DDIMScheduler and others can be made."""
    scale = 1000 / diffusion.diffusion_steps
    linear = {"beta_schedule": "linear", "beta_start": scale * 0.0001, "beta_end": scale * 0.02}
    fixed = "fixed_small" if diffusion.sigma_small else "fixed_large"
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.diffusion_steps,
        **(linear if diffusion.noise_schedule == "linear" else {"beta_schedule": "squaredcos_cap_v2"}),
        "trained_betas": None,
        "variance_type": "learned_range" if settings.learn_sigma else fixed,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": "sample" if diffusion.predict_xstart else "epsilon",
        "thresholding": False,
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }


def model_index(settings: BackboneSettings) -> dict[str, Any]:
    """The model_index.json, which names the pipeline and its parts."""
    own = {"_class_name": [Path(PIPELINE).stem, "PixelPipeline"], "image_channels": settings.in_channels}
    return {
        **(own if needs_pipeline(settings) else {"_class_name": "DDPMPipeline"}),
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


def unet_weights(
    state: dict[str, Tensor], settings: BackboneSettings, diffusion: DiffusionSettings
) -> dict[str, Tensor]:
    """The weights of UNet2DModel."""
    table = {TABLE: timestep_table(settings, diffusion)} if has_table(diffusion) else {}
    return {**table, **to_diffusers(state, settings)}


def pipeline_source() -> str:
    """The source of our pipeline, which lies beside the weights where DDPMPipeline doesn't suffice."""
    return (Path(__file__).parent / "pipeline.py").read_text()
