"""What a variant's step consists of: operations, the precision that it computes in, launches, and memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from fastdiff.kernels import launch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import diffusers_unet
from benchmarks.seed_step import SeedUNet
from fastdiff.config.sections import Config
from fastdiff.models import BackboneSettings, SuperResSettings
from fastdiff.models.cost import executed_flops, forward_flops, operations, saved_bytes, train_flops
from fastdiff.models.unet import DTYPES, body_dtype
from fastdiff.precompile import META, Recorder
from fastdiff.training.step_plan import training_launches

EAGER = ("reference", "reference+channels-last", "ours eager")
"""Variants that no CUDA graph replays."""
STATE_BYTES = 24
"""Bytes per parameter: weights, gradients, two moments and an average in float32, 16-bit copies, buffers."""


def precision_of(variant: str, precision: str, device: torch.device) -> str:
    """The precision in which a variant computes its products where `precision` is asked for.

    improved-diffusion has fp16 on a GPU alone, and no bf16. On a GPU its float32 convolutions are TF32, PyTorch's
    default, like those of all variants but ours. A CPU without bf16 instructions computes ours in fp32.
    """
    gpu = device.type == "cuda"
    if variant.startswith("ours"):
        dtype = body_dtype(precision, device)
        return next(name for name, value in DTYPES.items() if value == dtype)
    if variant == "reference" and precision != "fp32":
        return "fp16" if gpu else "fp32"
    return "tf32" if gpu and precision == "fp32" and torch.backends.cudnn.allow_tf32 else precision


# --- operations ---


def executed_share(variant: str, settings: BackboneSettings, training: bool) -> float:
    """Operations that a variant executes per image, as a share of those of the network of improved-diffusion.

    Ours executes fewer for upsampling, and more with use_checkpoint; diffusers' network is another one.
    """
    if variant.startswith("ours"):
        direct = "upsampling" in variant or variant == "ours -kernels"  # the levers with which upsampling is a 3x3 one
        if direct and not settings.use_checkpoint:
            return 1.0
        return executed_flops(settings, training) / (train_flops(settings) if training else forward_flops(settings))
    return _diffusers_share(settings) if variant.startswith("diffusers") else 1.0


@functools.cache
def _diffusers_share(settings: BackboneSettings) -> float:
    network = diffusers_unet(settings, META)
    x = torch.zeros(1, settings.network_in_channels, *settings.size_hw, device=META)
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64, device=META)} if settings.class_cond else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.zeros(1, device=META), **labels)
    return counter.get_total_flops() / forward_flops(settings)


# --- launches ---


def recorded_launches(config: Config, batch: int, precision: str) -> dict[str, int]:
    """Launches in a training step of ours, counted on tensors without memory, on any machine.

    fastdiff kernels  launches of our Triton kernels: forward, backward, optimiser and averages
    library products  convolutions and matrix products, which cuDNN and cuBLAS compute; a convolution's backward pass
                      has one for each gradient. What torch.compile makes of the rest isn't counted.
    """
    products_of_ours = r"aten::(mm|addmm_?|bmm)$"
    with Recorder(f"fastdiff::|aten::(convolution|convolution_backward)$|{products_of_ours}") as seen:
        launches = training_launches(
            config.model,
            config.diffusion,
            batch,
            DTYPES[precision],
            rates=config.train.ema_rate,
            scaled=precision == "fp16",
        )
    products = 0
    for call in seen.calls.values():
        if call.op.startswith("fastdiff::"):  # `training_launches` has computed each kind of call once
            with launch.record(), Recorder(products_of_ours) as inside:
                launch.IMPLEMENTATIONS[call.op.removeprefix("fastdiff::")](*call.args)
            products += sum(each.count for each in inside.calls.values()) * (call.count - 1)
        elif call.op == "aten::convolution_backward":
            products += call.count * sum(call.args[-1][:2])
        else:
            products += call.count
    return {"fastdiff kernels": len(launches), "library products": products}


# --- memory ---


def memory_of(variant: str, settings: BackboneSettings, batch: int) -> tuple[float, float]:
    """Predicted bytes of (the state, the activations) of a variant's training step; of compiled peers at most these."""
    ops = operations(settings)
    state = STATE_BYTES * sum(op.parameters for op in ops)
    ours = variant.startswith("ours")
    each = saved_bytes(ops) if ours else reference_activations(settings, fused=variant != "reference")
    return state, batch * each


@functools.cache
def reference_activations(settings: BackboneSettings, fused: bool = False) -> float:
    """Bytes per image that the reference's network keeps for its backward pass, in half precision.

    fused  by PyTorch's fused operations
    """
    with META:
        network = SeedUNet(settings)
        network.convert_to_fp16()
    if fused:
        network.strengthen()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    x = torch.zeros(1, settings.in_channels, *settings.size_hw, device=META)
    kwargs: dict[str, Any] = {}
    if settings.class_cond:
        kwargs["y"] = torch.zeros(1, dtype=torch.int64, device=META)
    if isinstance(settings, SuperResSettings):
        kwargs["low_res"] = torch.zeros(1, settings.in_channels, *settings.small_size, device=META)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = network(x, torch.zeros(1, device=META), **kwargs)
    assert result.requires_grad
    return float(sum(size for storage, size in kept.items() if storage not in weights))


def memory_together(variants: Sequence[str], settings: BackboneSettings, batch: int, gpu: bool) -> float:
    """Predicted bytes of all variants in one process: every state, the activations that CUDA graphs keep, and one more.

    Eager variants, and all of a CPU, give their activations back, so that only the largest counts.
    """
    eager = [name for name in variants if not gpu or name in EAGER]
    needs = {name: memory_of(name, settings, batch) for name in variants}
    kept = sum(activations for name, (_, activations) in needs.items() if name not in eager)
    return sum(state for state, _ in needs.values()) + kept + max((needs[name][1] for name in eager), default=0.0)
