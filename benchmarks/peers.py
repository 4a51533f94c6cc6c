"""Training steps that ours is compared with: the reference's network run as an expert would today, and diffusers'.

All are channels-last, use scaled_dot_product_attention, and have a well-written loop around them: autocast, fused
AdamW, averages by foreach, no wait for the device. The compiled ones compile everything from the image to the loss as
one graph, and on a GPU replay the whole step, optimiser and averages included, as one CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.seed_step import SeedUNet
from benchmarks.train_variants import Case, Step, check_same_function, without_our_ops
from fastdiff.errors import UserError
from fastdiff.evaluation.fidelity import prepare_torchvision
from fastdiff.models import BackboneSettings, SuperResSettings
from fastdiff.runtime import machine
from fastdiff.runtime.cuda_graphs import GraphRunner

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss(x_start [B, C, H, W] float32, t [B], noise) → a scalar"""
WARM_UP = 3
"""Steps before the capture of a CUDA graph, in which code is compiled and cuDNN chooses its kernels."""


def compile_kwargs(device: torch.device, autotune: bool) -> dict[str, Any]:
    """Arguments of torch.compile: ours, so that no side has better ones, and with `autotune` those of max-autotune.

    Inductor's own CUDA graphs stay off, because the whole step becomes one.
    """
    kwargs = machine.compile_kwargs(device)
    if autotune:
        tuned = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
        kwargs["options"] = {**tuned, **kwargs.get("options", {})}
    return kwargs


def fast_step(case: Case, model: nn.Module, loss: Loss, *, compiled: bool, autotune: bool = False) -> Step:
    """A well-written loop around any network and its loss."""
    model.to(case.device, memory_format=torch.channels_last).train()
    parameters = list(model.parameters())
    graphs = GraphRunner(case.device, compiled)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=graphs.enabled)
    averages = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler(case.device.type, enabled=case.precision == "fp16", init_scale=2.0**12)
    computed = torch.compile(loss, **compile_kwargs(case.device, autotune)) if compiled else loss
    taken = 0

    def work() -> None:
        x = (case.images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        t = torch.randint(0, case.config.diffusion.diffusion_steps, (case.batch,), device=case.device)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(computed(x, t, torch.randn_like(x))).backward()
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-4)

    def step() -> None:
        nonlocal taken
        graphs.run("step", work, warming_up=taken < WARM_UP)
        taken += 1

    return step


@without_our_ops
def strong_seed(case: Case, compiled: bool = True, autotune: bool = False) -> Step:
    """The reference's network with PyTorch's fused operations and the reference's loss, under autocast."""
    check_same_function(case.config.model, strengthened)
    diffusion, model = with_tables(case), case.filled(strengthened)

    def called(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with case.autocast:
            return model(x, t, **kwargs).float()

    def loss(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return diffusion.training_losses(called, x, t, case.kwargs, noise)["loss"].mean()

    return fast_step(case, model, loss, compiled=compiled, autotune=autotune)


def with_tables(case: Case) -> Any:
    """The case's diffusion with its tables on the device, because Dynamo can't trace how they are made."""
    model, diffusion = case.config.model, case.diffusion()
    x = torch.zeros(1, model.in_channels, *model.size_hw, device=case.device)
    output = torch.zeros(1, model.out_channels, *model.size_hw, device=case.device)
    diffusion.training_losses(lambda x, t: output, x, torch.zeros(1, dtype=torch.int64, device=case.device), {}, x)
    return diffusion


def strengthened(settings: BackboneSettings) -> SeedUNet:
    return SeedUNet(settings).strengthen()


def diffusers_unet(settings: BackboneSettings, device: torch.device) -> nn.Module:
    """diffusers' UNet2DModel of the same widths, depths, places of attention and outputs.

    Its attention is scaled_dot_product_attention already.
    """
    if isinstance(settings, SuperResSettings):
        raise UserError("the variant diffusers has no super-resolution network; leave it out")
    prepare_torchvision()  # diffusers imports it where it is installed
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UserError(f"the variant diffusers needs diffusers ({error}); pip install -e '.[peers]'") from error
    s = settings
    channels = s.level_channels
    attends = [2**level in s.attention_factors for level in range(len(channels))]
    kind = lambda way, level: ("Attn" if attends[level] else "") + f"{way}Block2D"
    torch.manual_seed(0)
    with device:
        return UNet2DModel(
            sample_size=s.size_hw,
            in_channels=s.network_in_channels,
            out_channels=s.out_channels,
            layers_per_block=s.num_res_blocks,
            block_out_channels=channels,
            down_block_types=tuple(kind("Down", level) for level in range(len(channels))),
            up_block_types=tuple(kind("Up", level) for level in reversed(range(len(channels)))),
            attention_head_dim=channels[-1] // s.num_heads,
            norm_num_groups=32,
            resnet_time_scale_shift="scale_shift" if s.use_scale_shift_norm else "default",
            dropout=s.dropout,
            num_class_embeds=s.num_labels if s.class_cond else None,
        )


@without_our_ops
def diffusers(case: Case, autotune: bool = False) -> Step:
    """diffusers' network under autocast, compiled, on the plain squared error of its examples."""
    model, process = diffusers_unet(case.config.model, case.device), with_tables(case)
    labels = {"class_labels": case.labels} if case.config.model.class_cond else {}

    def loss(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_t = process.q_sample(x, t, noise)
        with case.autocast:
            output = model(x_t, t, **labels).sample
        return F.mse_loss(output[:, : x.shape[1]].float(), noise)

    return fast_step(case, model, loss, compiled=True, autotune=autotune)


VARIANTS: dict[str, Callable[[Case], Step]] = {
    "reference+channels-last": functools.partial(strong_seed, compiled=False),
    "reference+compile": strong_seed,
    "reference+max-autotune": functools.partial(strong_seed, autotune=True),
    "diffusers": diffusers,
    "diffusers+max-autotune": functools.partial(diffusers, autotune=True),
}
