"""The UNet of "Improved Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2102.09672).

`build_model` builds a network from settings, and `body_dtype` chooses the dtype of its body for a precision. `freeze`
prepares a network for inference. `dummy_batch` makes inputs for measuring time and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.blocks import (
    Conv2d,
    InputConv,
    Map,
    OutputLayer,
    PointwiseConv,
    QKVConv,
    Upsample,
    UpsampleConv,
    embedding_weights,
    value,
)
from fastdiff.models.classifier_settings import NetworkSettings
from fastdiff.models.encoder import Encoder, Stage
from fastdiff.models.settings import BackboneSettings, SuperResSettings
from fastdiff.ops import CounterNoise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N = TypeVar("N", bound=Encoder)


class UNet(Encoder):
    """Predicts the noise (or x_0), and the variances with learn_sigma, from a noised image.

    forward: x [B, in_channels, H, W] float32, timesteps [B] int64 or float32, y [B] int64 labels of a
    class-conditional model → [B, out_channels, H, W] float32. The last layer is always float32 (see `OutputLayer`).
    """

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        channels, skips = settings.level_channels, list(self.input_widths)
        heads_up = settings.num_heads if settings.num_heads_upsample == -1 else settings.num_heads_upsample
        c = channels[-1]
        self.output_blocks = nn.ModuleList()
        for level, c_level in reversed(list(enumerate(channels))):
            for i in range(settings.num_res_blocks + 1):
                layers: list[nn.Module] = [self.res_block(c + skips.pop(), c_level)]
                c = c_level
                if level in settings.attending_levels:
                    layers.append(self.attention(c, heads_up))
                if level > 0 and i == settings.num_res_blocks:
                    layers.append(self.res_block(c, c, "up") if settings.resblock_updown else Upsample(c))
                self.output_blocks.append(Stage(*layers))

        self.out = OutputLayer(c, settings.out_channels)

    def start_map(self, x: Tensor, low_res: Tensor | None = None) -> Tensor:
        """The input of the first layer, as in `Encoder`, with the small images of a super-resolution model."""
        return super().start_map(self._with_low_res(x, low_res))

    def _walk(self, h: Tensor, projected: Sequence[Tensor]) -> tuple[list[Map], Map, list[Map]]:
        """Outputs of the input blocks, the middle block and the output blocks."""
        emb_outs = iter(projected)
        down = self.run_stages(self.input_blocks, h, emb_outs)
        (middle,) = self.run_stages([self.middle_block], down[-1], emb_outs)
        return down, middle, self.run_stages(self.output_blocks, middle, emb_outs, down)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        return self.body(x, self.project(self.embed(timesteps, y)), low_res)

    def body(self, x: Tensor, projected: Sequence[Tensor], low_res: Tensor | None = None) -> Tensor:
        """The network after `project`, whose result is an argument so that samplers can compute it in advance."""
        return self.out(self._walk(self.start_map(x, low_res), projected)[2][-1])

    def _with_low_res(self, x: Tensor, low_res: Tensor | None) -> Tensor:
        if low_res is not None:
            raise ValueError("low_res is for super-resolution models")
        return x

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> dict[str, list[Tensor] | Tensor]:
        """The output of every block: {"down": [...], "middle": map, "up": [...]}, each [B, C, H, W] in x's dtype."""
        down, middle, up = self._walk(self.start_map(x, low_res), self.project(self.embed(timesteps, y)))
        as_given = lambda h: value(h).to(x.dtype)
        return {"down": [as_given(h) for h in down], "middle": as_given(middle), "up": [as_given(h) for h in up]}


class SuperResUNet(UNet):
    """A UNet that also takes a small image, low_res [B, in_channels, h, w] float32, which it enlarges bilinearly."""

    def _with_low_res(self, x: Tensor, low_res: Tensor | None) -> Tensor:
        if low_res is None:
            raise ValueError("a super-resolution model needs the small images as low_res")
        return torch.cat([x, enlarged(low_res, x.shape[2:])], dim=1)


def enlarged(low_res: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Enlarge small images [B, C, h, w] bilinearly to the given size; images of that size are returned unchanged."""
    if tuple(low_res.shape[2:]) == tuple(size_hw):
        return low_res
    return F.interpolate(low_res, tuple(size_hw), mode="bilinear", align_corners=False)


def build_model(settings: BackboneSettings) -> UNet:
    """Build the network that the settings describe."""
    return SuperResUNet(settings) if isinstance(settings, SuperResSettings) else UNet(settings)


def body_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a network's body for a precision on a device.

    It is float32 for bf16 on a CPU without bf16 instructions, where bf16 convolutions take ten times as long.
    """
    if precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        return torch.float32
    return DTYPES[precision]


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def freeze(model: N) -> N:
    """Prepare a network for inference: convert the weights for `model.dtype` in place. The outputs stay bit-identical.

    The weights of convolutions get the maps' layout and the body's dtype, those of upsampling convolutions become 4x4
    taps. The first convolution's are padded to 8 channels if `input_format` is set, and the embedding layers of all
    blocks become one matrix. Norms, the time embedding and the last layer stay float32. Afterwards the state_dict does
    not fit checkpoints, and the ops' mode "reference" can't run the network.
    """
    model.eval().requires_grad_(False)
    padded = model.input_format
    for name, module in model.named_modules():
        dtype = torch.float32 if name.startswith("out.") else model.dtype
        if isinstance(module, QKVConv):
            module.store_by_head()
        if isinstance(module, UpsampleConv):
            _replace(module, ops.upsample_taps(module.weight), dtype)
        elif isinstance(module, InputConv) and padded:
            missing = padded[1] - module.weight.shape[1]
            _replace(module, nn.functional.pad(module.weight, (0, 0, 0, 0, 0, missing)), dtype)
        elif isinstance(module, (Conv2d, PointwiseConv)):
            _replace(module, module.weight, dtype)
    model.projection = embedding_weights(model.res_blocks)
    return model


def _replace(module: nn.Conv1d | nn.Conv2d, weight: Tensor, dtype: torch.dtype) -> None:
    layout = ops.map_layout(weight) if weight.dim() == 4 else torch.contiguous_format
    module.weight = nn.Parameter(weight.to(dtype, memory_format=layout), requires_grad=False)


class DummyBatch(NamedTuple):
    """The arguments of `GaussianDiffusion.training_losses` after the network."""

    images: Tensor  # [B, H, W, C] uint8
    t: Tensor  # [B] int64
    model_kwargs: dict[str, Tensor]  # "y" [B] int64 and "low_res" [B, C, h, w] float32, if the network takes them
    noise: CounterNoise  # of images 0 to B - 1


def dummy_batch(settings: NetworkSettings, size: int, device: torch.device) -> DummyBatch:
    """A batch of `size` black images at timestep 0, for measuring time and memory."""
    C, (H, W) = settings.in_channels, settings.size_hw
    images = torch.zeros(size, H, W, C, dtype=torch.uint8, device=device)
    positions = torch.arange(size, device=device)
    model_kwargs = {"y": positions % settings.num_classes} if settings.class_cond else {}
    if isinstance(settings, SuperResSettings):
        model_kwargs["low_res"] = torch.zeros(size, C, *settings.small_size, device=device)
    return DummyBatch(images, torch.zeros_like(positions), model_kwargs, CounterNoise(0, positions, (C, H, W)))
