"""No map of the network changes its layout on the way, forward or backward: everything is channels-last."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.models import BackboneSettings, SuperResSettings, UNetSettings, build_model
from fastdiff.models.blocks import UpsampleConv
from fastdiff.training.trainer import low_res_of

BATCH = 3
SMALL: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1, "learn_sigma": True, "dropout": 0.1}
NETWORKS: dict[str, BackboneSettings] = {
    "unet": UNetSettings(image_size=32, **SMALL),
    "class-conditional": UNetSettings(image_size=32, class_cond=True, **SMALL),
    "added embedding": UNetSettings(image_size=32, use_scale_shift_norm=False, **SMALL),
    "checkpointed": UNetSettings(image_size=32, use_checkpoint=True, **SMALL),
    "super-resolution": SuperResSettings(large_size=64, small_size=16, **SMALL),
}
COPIES = ("clone", "copy_", "_to_copy", "contiguous")


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


class Layouts(TorchDispatchMode):
    """Records maps that are not channels-last, and copies that change a layout.

    On the meta device convolutions return channels-first maps; here they return the layout of their inputs, as cuDNN
    does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.weights: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("convolution", "convolution_backward"):
            assert any(_channels_last(x) for x in args[:3] if isinstance(x, Tensor) and x.dim() == 4)
            out = _as_cudnn(out) if isinstance(out, Tensor) else tuple(map(_as_cudnn, out))
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not func.is_view:
            maps = [x for x in outs if x.dim() == 4 and x.shape[0] == BATCH and min(x.shape[1:]) > 1]
            self.wrong += [f"{name} {tuple(x.shape)}" for x in maps if not _channels_last(x)]
        if name in COPIES:
            source, made = (args[1], args[0]) if name == "copy_" else (args[0], outs[0])
            if source.shape == made.shape and source.stride() != made.stride() and made.dim() > 2:
                if made.shape[0] == BATCH:
                    self.wrong.append(f"{name} copies {tuple(made.shape)} to another layout")
                else:
                    self.weights[tuple(made.shape)] += 1
        return out


def _as_cudnn(x: Tensor | None) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.channels_last) if x is not None and x.dim() == 4 else x


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_every_map_is_channels_last(settings: BackboneSettings) -> None:
    """Each weight also changes its layout only once forward, in its cast, and once backward, in its gradient's."""
    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=True)
    with torch.device("meta"), ops.using("triton", anywhere=True):
        network = build_model(settings).train().set_precision(torch.bfloat16)
        images = torch.empty(BATCH, *settings.size_hw, 3, dtype=torch.uint8)
        index = torch.empty(BATCH, dtype=torch.int64)
        kwargs: dict[str, Tensor] = {"y": index} if settings.class_cond else {}
        if isinstance(settings, SuperResSettings):
            kwargs["low_res"] = low_res_of(ops.start_map(images), settings.small_size)
        noise = ops.CounterNoise(0, index, (3, *settings.size_hw))
        with Layouts() as layouts:
            diffusion.training_losses(network, images, index, kwargs, noise)["loss"].mean().backward()
    assert not layouts.wrong
    convolutions = sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules())
    upsampling = sum(isinstance(m, UpsampleConv) for m in network.modules())  # converts its taps back to 3x3
    passes = 3 if settings.use_checkpoint else 2
    assert 2 * convolutions <= sum(layouts.weights.values()) <= passes * convolutions + upsampling


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "super-resolution"])
def test_compiled_graphs_keep_the_layout(name: str) -> None:
    """The compiled network's graphs, forward and backward, copy no map to another layout.

    Copies of small images to be enlarged don't count, because Inductor fuses them with the interpolation.
    """
    settings = NETWORKS[name]
    wrong: list[str] = []
    convolutions = Counter[bool]()

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            made = node.meta.get("val")
            if node.op != "call_function" or not isinstance(made, Tensor) or made.dim() != 4:
                continue
            operation = str(node.target).removeprefix("aten.").split(".")[0]
            if made.shape[0] == BATCH and operation == "convolution":
                convolutions[_channels_last(made)] += 1
            if made.shape[0] == BATCH and made.shape[1] > 4 and operation in COPIES:
                source = node.args[0].meta["val"]
                if source.shape == made.shape and source.stride() != made.stride():
                    wrong.append(f"{operation} {tuple(made.shape)}")
        return make_boxed_func(graph.forward)

    diffusion = create_diffusion(DiffusionSettings(diffusion_steps=50), learn_sigma=True)
    network = build_model(settings).train()
    torch._dynamo.reset()
    network.forward = torch.compile(  # type: ignore[method-assign]
        network.forward, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=look, bw_compiler=look)
    )
    images, index = torch.zeros(BATCH, *settings.size_hw, 3, dtype=torch.uint8), torch.arange(BATCH)
    kwargs: dict[str, Tensor] = {}
    if isinstance(settings, SuperResSettings):
        kwargs["low_res"] = low_res_of(ops.start_map(images), settings.small_size)
    noise = ops.CounterNoise(0, index, (3, *settings.size_hw))
    diffusion.training_losses(network, images, index, kwargs, noise)["loss"].mean().backward()
    assert convolutions[True] > 20
    assert not convolutions[False]
    assert not wrong


def test_a_wrong_layout_is_seen() -> None:
    with torch.device("meta"), Layouts() as layouts:
        x = torch.empty(BATCH, 16, 8, 8).to(memory_format=torch.channels_last)
        x.contiguous()
        x + 1
    made, to_channels_last, back = "empty", "_to_copy", "clone"
    assert [line.split()[0] for line in layouts.wrong] == [made, to_channels_last, back, back]
