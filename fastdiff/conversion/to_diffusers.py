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
_FIRST, _OURS = "time_embedding.linear_1.weight", "time_embed.0.weight"
_EXACT = 1e-6  # of numbers between -1 and 1, in float32


def check_expressible(settings: BackboneSettings, diffusion: DiffusionSettings) -> None:
    """Raise UserError with the reason if UNet2DModel can't compute the network's function."""
    first = settings.level_channels[0]
    if settings.stem_channels != first:
        raise UserError(
            "diffusers' UNet2DModel has one width for its first convolution and its first level, and this network has "
            f"{settings.stem_channels} and {first} channels there (channel_mult {settings.level_mult[0]:g},...)"
        )
    if settings.num_head_channels == -1 and settings.num_heads_upsample not in (-1, settings.num_heads):
        raise UserError(
            "diffusers' UNet2DModel has as many attention heads on the way up as on the way down, and this network has "
            f"num_heads {settings.num_heads} and num_heads_upsample {settings.num_heads_upsample}"
        )
    embedding, basis = embeddings(settings, diffusion), embedding_basis(settings, diffusion)
    if (embedding @ basis @ basis.T - embedding).abs().max() > _EXACT:
        raise UserError(
            "diffusers' UNet2DModel has one width for its timestep embedding and its first level, and this network's "
            f"embedding of {settings.num_channels} numbers can't be expressed by {first}"
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


def has_table(settings: BackboneSettings, diffusion: DiffusionSettings) -> bool:
    """Whether UNet2DModel needs a table of the timesteps' embeddings, as if they were learned.

    Otherwise it sees whole timesteps only, and its embedding has as many numbers as its first level has channels.
    """
    scaled = diffusion.rescale_timesteps and diffusion.diffusion_steps != 1000
    return scaled or settings.num_channels != settings.level_channels[0]


def embeddings(settings: BackboneSettings, diffusion: DiffusionSettings) -> Tensor:
    """Our embeddings [T, num_channels] of all timesteps of the chain as the network sees them, float64."""
    T = diffusion.diffusion_steps
    scale = 1000.0 / T if diffusion.rescale_timesteps else 1.0
    return timestep_embedding(torch.arange(T).float() * scale, settings.num_channels).double()


def embedding_basis(settings: BackboneSettings, diffusion: DiffusionSettings) -> Tensor:
    """Orthonormal columns [num_channels, k] float64 that span the embeddings, k channels of the first level.

    Sines and cosines of neighbouring frequencies are nearly dependent: 104 numbers tell all of the 256 of a chain of
    1000 steps to float32's precision, so that a table of 128 suffices for the 512-pixel network of Dhariwal & Nichol.
    """
    width, k = settings.num_channels, settings.level_channels[0]
    if k >= width:
        return torch.eye(width, k, dtype=torch.float64)
    basis = torch.linalg.svd(embeddings(settings, diffusion), full_matrices=False)[2][:k].T
    return torch.nn.functional.pad(basis, (0, k - basis.shape[1]))


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
    table = has_table(settings, diffusion)
    resampling = "resnet" if settings.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": H if H == W else [H, W],
        "in_channels": settings.network_in_channels,
        "out_channels": settings.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "learned" if table else "positional",
        "time_embedding_dim": 4 * settings.num_channels,
        "num_train_timesteps": diffusion.diffusion_steps if table else None,
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
    """The weights of UNet2DModel, bit for bit but for the first layer of the time embedding where widths differ."""
    found = to_diffusers(state, settings)
    if not has_table(settings, diffusion):
        return found
    basis = embedding_basis(settings, diffusion)
    if basis.shape[0] != basis.shape[1]:
        found[_FIRST] = (state[_OURS].double() @ basis).to(state[_OURS].dtype)
    return {TABLE: (embeddings(settings, diffusion) @ basis).to(state[_OURS].dtype), **found}


def pipeline_source() -> str:
    """The source of our pipeline, which lies beside the weights where DDPMPipeline doesn't suffice."""
    return (Path(__file__).parent / "pipeline.py").read_text()
