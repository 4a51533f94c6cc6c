"""The classifier of noised images: its heads, precisions, kernels and gradients, and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import fill_randomly, refusal, relative_error, save_bare, super_res, unet
from pydantic import ValidationError
from torch import Tensor, nn

from fastdiff import nll, ops, sample, super_res_sample
from fastdiff.config.checkpoint import open_checkpoint
from fastdiff.config.classifier import classifier_settings_of, open_classifier
from fastdiff.errors import UserError
from fastdiff.models import weights
from fastdiff.models.classifier import AttentionPool, Classifier, build_classifier
from fastdiff.models.classifier_settings import ClassifierSettings
from fastdiff.models.classifier_weights import infer_classifier_settings
from fastdiff.models.unet import freeze
from fastdiff.settings import what_is_wrong

SMALL: dict[str, Any] = {
    "image_size": 16,
    "num_classes": 10,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_channel_mult": "1,2",
    "classifier_attention_resolutions": "8",
}
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
# The released classifiers (README of guided-diffusion): the image size and the depth, all else by default.
RELEASED = {"64x64": (64, 4), "128x128": (128, 2), "256x256": (256, 2), "512x512": (512, 2)}


def small(**changes: Any) -> Classifier:
    return fill_randomly(build_classifier(ClassifierSettings(**{**SMALL, **changes})))


def on_meta(**settings: Any) -> Classifier:
    with torch.device("meta"):
        return build_classifier(ClassifierSettings(**settings))


def inputs(model: Classifier, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.settings.in_channels, *model.settings.size_hw, generator=generator)
    return x, torch.tensor([0, 400, 999])[:batch]


def gradient(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient by x of the sum of log p(y | x) for labels 0, 1, …"""
    x = x.clone().requires_grad_()
    logits = model(x, t)
    labels = torch.arange(len(x))
    return logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[labels, labels].sum(), x)[0]


def pooled_in_float64(pool: AttentionPool, x: Tensor) -> Tensor:
    """Attention of the mean's query over all tokens, [B, C, H, W] → [B, out_features] float64, head by head."""
    C = x.shape[1]
    tokens = torch.cat([x.mean((2, 3))[:, None], x.flatten(2).mT], 1).double() + pool.positional_embedding.double().T
    q, k, v = (tokens @ pool.qkv_proj.weight[..., 0].double().T + pool.qkv_proj.bias.double()).split(C, dim=2)
    heads = []
    for head in range(C // 64):
        part = slice(64 * head, 64 * (head + 1))
        scores = (q[:, :1, part] @ k[:, :, part].mT / math.sqrt(64)).softmax(-1)
        heads.append((scores @ v[:, :, part])[:, 0])
    return torch.cat(heads, 1) @ pool.c_proj.weight[..., 0].double().T + pool.c_proj.bias.double()


def test_attention_pooling_is_that_of_the_mean_in_float64() -> None:
    pool = fill_randomly(AttentionPool(128, 1 + 6, 5))
    x = torch.randn(2, 128, 2, 3) + 1
    assert relative_error(pool(x), pooled_in_float64(pool, x)) < 1e-6


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_float32_and_the_same_in_bf16_frozen_and_without_pairs_of_images(pool: str) -> None:
    model = small(classifier_pool=pool).eval()
    x, t = inputs(model)
    logits, by_x = gradient(model, x, t)
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32
    assert torch.allclose(model(x[1:2], t[1:2]), logits[1:2], atol=1e-5)
    rounded, _ = gradient(model.set_precision(torch.bfloat16), x, t)
    assert rounded.dtype == torch.float32
    assert relative_error(rounded, logits) < 0.03  # several times 2^-9, which is what one rounding adds
    frozen, frozen_by_x = gradient(freeze(model.set_precision(torch.float32)), x, t)
    assert torch.equal(frozen, logits)
    assert torch.equal(frozen_by_x, by_x)


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_kernels_compute_the_same_logits_and_gradients(pool: str) -> None:
    model = small(image_size=8, classifier_width=32, classifier_attention_resolutions=4, classifier_pool=pool).eval()
    x, t = inputs(model, batch=2)
    logits, by_x = gradient(model, x, t)
    with ops.using("triton"):
        with_kernels = gradient(model, x, t)
        frozen = gradient(freeze(model), x, t)
    for got, by in (with_kernels, frozen):
        assert relative_error(got, logits) < 1e-5
        assert relative_error(by, by_x) < 1e-5


@pytest.mark.parametrize("sizes", [(16, 24), (24, 16)])
def test_images_that_are_no_squares(sizes: tuple[int, int]) -> None:
    model = small(image_size=sizes)
    assert model(*inputs(model)).shape == (3, 10)


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("pool", POOLS)
def test_settings_of_a_bare_file_are_inferred(name: str, pool: str) -> None:
    size, depth = RELEASED[name]
    model = on_meta(image_size=size, classifier_depth=depth, classifier_pool=pool)
    assert ClassifierSettings(**infer_classifier_settings(model.state_dict())) == model.settings


@pytest.mark.parametrize("changes", [
    {},
    {"classifier_resblock_updown": False, "classifier_depth": 3},
    {"classifier_use_scale_shift_norm": False, "in_channels": 1},
    {"classifier_attention_resolutions": ""},
    {"classifier_width": 32, "classifier_channel_mult": "2,2,4"},
])  # fmt: skip
def test_other_settings_of_a_bare_file_are_inferred(changes: dict[str, Any]) -> None:
    model = on_meta(**{**SMALL, **changes})
    assert ClassifierSettings(**infer_classifier_settings(model.state_dict())) == model.settings


def test_an_image_size_that_does_not_show_must_be_given() -> None:
    state = on_meta(**SMALL, classifier_pool="spatial").state_dict()
    with pytest.raises(UserError, match="give --image_size"):
        infer_classifier_settings(state)
    assert infer_classifier_settings(state, (16, 16))["image_size"] == 16


def test_the_pixels_that_attention_pools_are_those_of_the_given_size_or_of_a_square() -> None:
    state = on_meta(**{**SMALL, "image_size": "16x64"}).state_dict()
    assert infer_classifier_settings(state, (16, 64))["image_size"] == "16x64"
    assert infer_classifier_settings(state)["image_size"] == 32
    assert infer_classifier_settings(state, (8, 8))["image_size"] == 32  # it can't be that


def test_a_bare_checkpoint_opens_without_settings(tmp_path: Path) -> None:
    model = small()
    checkpoint = open_checkpoint(str(save_bare(model, tmp_path / "classifier.pt")))
    _, layer = classifier_settings_of(checkpoint)
    opened = open_classifier(checkpoint, ClassifierSettings(**layer["model"]), "fp32", torch.device("cpu"))
    x, t = inputs(model)
    assert torch.equal(opened(x, t), model.eval()(x, t))


def test_a_checkpoint_that_does_not_fit_names_the_flags(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_bare(small(), tmp_path / "c.pt")))
    other = ClassifierSettings(**{**SMALL, "classifier_depth": 2, "classifier_pool": "spatial", "image_size": 32})
    flags = "--classifier_depth 1 --classifier_pool attention --image_size 16"
    with pytest.raises(UserError, match=f"it was trained with {flags}"):
        open_classifier(checkpoint, other, "fp32", torch.device("cpu"))


def info_for(model: Classifier) -> dict[str, Any]:
    return {"kind": "classifier", "model": model.settings.model_dump(mode="json"), "diffusion": {}, "class_names": []}


@pytest.mark.parametrize("main", [sample.main, nll.main, super_res_sample.main])
@pytest.mark.parametrize("bare", [True, False])
def test_other_scripts_refuse_a_classifier(main: Callable[[list[str]], None], bare: bool, tmp_path: Path) -> None:
    model, file = small(), tmp_path / "model.pt"
    torch.save(model.state_dict() if bare else weights.with_info(model.state_dict(), info_for(model)), file)
    assert "is a classifier, which sample.py takes as --classifier_path" in refusal(main, ["--model_path", file])


@pytest.mark.parametrize("model", [unet(), super_res()], ids=["diffusion", "super-resolution"])
def test_a_diffusion_model_is_refused_as_a_classifier(model: nn.Module, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_bare(model, tmp_path / "model.pt")))
    with pytest.raises(UserError, match="is a .* model, not a classifier"):
        classifier_settings_of(checkpoint)


@pytest.mark.parametrize("damage", ["first", "time", "rows", "block", "axes"])
def test_a_damaged_file_is_refused(damage: str) -> None:
    state = small().state_dict()
    if damage == "first":
        state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:32]
    elif damage == "time":
        del state["time_embed.0.weight"]
    elif damage == "rows":
        state["out.2.c_proj.weight"] = state["out.2.c_proj.weight"][:7]
    elif damage == "block":
        del state["input_blocks.2.0.in_layers.0.weight"]
    else:
        state["time_embed.0.weight"] = state["time_embed.0.weight"][0]
    with pytest.raises(UserError, match=r"^(it has no|its tensors|no classifier)"):
        infer_classifier_settings(state)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"classifier_width": 40}, "classifier_width 40 is not divisible by the 32 groups"),
    ({"image_size": 17}, "image_size 17x17 is not divisible by 2, which 2 levels (classifier_channel_mult) need"),
    ({"classifier_channel_mult": ""}, "classifier_channel_mult has no default for images of 16 pixels"),
    ({"classifier_width": 32, "classifier_channel_mult": "1,3"},
     "a head's width of 64 does not divide the 96 channels of an attention block"),
    ({"classifier_attention_resolutions": "0"}, "classifier_attention_resolutions 0 is no size"),
    ({"classifier_pool": "max"}, "must be 'attention', 'adaptive', 'spatial' or 'spatial_v2'"),
])  # fmt: skip
def test_settings_that_contradict_each_other(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as found:
        ClassifierSettings(**{**SMALL, **changes})
    assert sentence in what_is_wrong(found.value)
