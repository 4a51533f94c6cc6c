"""The networks, beyond what improved-diffusion's recorded outputs cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import MODEL, SUPER_RES, info_for, random_model, relative_error, save_bare, super_res, unet
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.errors import UserError
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, UNetSettings, build_model, weights
from fastdiff.models.unet import freeze


def inputs(model: UNet, batch: int = 2) -> dict[str, Tensor]:
    """Make x, timesteps, and labels and small images if the model takes them."""
    settings = model.settings
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Tensor] = {
        "x": torch.randn(batch, settings.in_channels, *settings.size_hw, generator=generator),
        "timesteps": torch.rand(batch, generator=generator) * 1000,
    }
    if settings.class_cond:
        given["y"] = torch.arange(batch) % settings.num_classes
    if isinstance(settings, SuperResSettings):
        given["low_res"] = torch.randn(batch, settings.in_channels, *settings.small_size, generator=generator)
    return given


EXTENSIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "not square": {"image_size": "8x12"},
    "tall": {"image_size": "16x4", "attention_resolutions": "4,2"},
    "gray": {"in_channels": 1},
    "rgba": {"in_channels": 4, "learn_sigma": True},
    "fractions": {"num_channels": 64, "channel_mult": "0.5,1.5"},
    "one level": {"channel_mult": "1"},
    "head channels": {"num_head_channels": 16},
    "other heads up": {"num_heads": 2, "num_heads_upsample": 8},
    "everywhere": {"attention_resolutions": "8,4"},
    "nowhere": {"attention_resolutions": ""},
    "blocks": {"num_res_blocks": 3},
    "added embedding": {"use_scale_shift_norm": False},
    "classes": {"class_cond": True, "num_classes": 3, "learn_sigma": True},
    "resampling blocks": {"resblock_updown": True, "use_new_attention_order": True, "num_res_blocks": 2},
    "resampling, not square": {"resblock_updown": True, "image_size": "8x12", "channel_mult": "1,2,2"},
    "scaled stem": {"num_channels": 64, "channel_mult": "0.5,1.5", "scale_stem": True, "resblock_updown": True},
}
by_extension = pytest.mark.parametrize("name", EXTENSIONS)


@by_extension
def test_shapes_and_gradients(name: str) -> None:
    """The output has the input's size, depends on every input and every parameter, and is float32."""
    model = unet(**EXTENSIONS[name])
    given = inputs(model)
    given["x"].requires_grad_()
    out = model(**given)
    settings = model.settings
    assert out.shape == (2, settings.out_channels, *settings.size_hw)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    out.square().sum().backward()
    assert (given["x"].grad != 0).all()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
    later = model(**{**given, "timesteps": given["timesteps"] + 100})
    assert not torch.equal(out, later)


@by_extension
def test_images_do_not_mix(name: str) -> None:
    """The output for an image does not depend on the others, except for the order of float32 sums."""
    model = unet(**EXTENSIONS[name])
    given = inputs(model, batch=3)
    with torch.no_grad():
        together = model(**given)
        for i in range(3):
            alone = model(**{key: value[i : i + 1] for key, value in given.items()})
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_widths_and_heads() -> None:
    model = unet(num_channels=64, channel_mult="0.5,1.5", num_head_channels=16)
    assert model.input_blocks[1][0].out_layers[3].out_channels == 32
    assert model.middle_block[0].out_layers[3].out_channels == 96
    assert model.middle_block[1].num_heads == 6
    model = unet(num_heads=2, num_heads_upsample=8)
    assert model.middle_block[1].num_heads == model.input_blocks[3][1].num_heads == 2
    assert model.output_blocks[0][1].num_heads == 8


def test_attention_order() -> None:
    """Grouped rows of the projection give the network whose rows are head by head, also when it is frozen."""
    grouped = unet(use_new_attention_order=True, num_heads=4)
    by_head = unet(num_heads=4)
    state = grouped.state_dict()
    for name, rows in state.items():
        if ".qkv." in name:  # [3, heads, D, ...] → [heads, 3, D, ...]
            state[name] = rows.unflatten(0, (3, 4, -1)).movedim(1, 0).flatten(0, 2)
    by_head.load_state_dict(state)
    given = inputs(grouped)
    with torch.no_grad():
        expected = by_head(**given)
        assert torch.equal(grouped(**given), expected)
        assert not torch.equal(unet(num_heads=4)(**given), expected)
        assert torch.equal(freeze(grouped)(**given), expected)


def test_other_sizes_than_trained() -> None:
    """The network is convolutional and takes any size that is divisible by its factor."""
    model = unet()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 6, 20), torch.zeros(1)).shape == (1, 3, 6, 20)


def test_super_resolution_input() -> None:
    """The output depends on the small image, which may have any size."""
    model = super_res(large_size="16x24", small_size="4x6")
    given = inputs(model)
    with torch.no_grad():
        out = model(**given)
        assert out.shape == (2, 3, 16, 24)
        assert not torch.equal(out, model(**{**given, "low_res": -given["low_res"]}))
        enlarged = nn.functional.interpolate(given["low_res"], (16, 24), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(**{**given, "low_res": enlarged}), out)
        features = model.get_feature_vectors(**given)
    assert [len(features[place]) for place in ("down", "up")] == [4, 4]
    with pytest.raises(ValueError, match="low_res"):
        model(given["x"], given["timesteps"])


def test_wrong_arguments() -> None:
    plain, conditional = unet(), unet(class_cond=True, num_classes=3)
    given = inputs(plain)
    with pytest.raises(ValueError, match="labels y"):
        plain(**given, y=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels y"):
        conditional(**given)
    with pytest.raises(ValueError, match="super-resolution"):
        plain(**given, low_res=torch.zeros(2, 3, 4, 4))


def test_labels_count() -> None:
    model = unet(class_cond=True, num_classes=3)
    given = inputs(model)
    with torch.no_grad():
        out = model(**given)
        other = model(**{**given, "y": torch.tensor([0, 2])})
    assert torch.equal(out[0], other[0])
    assert not torch.equal(out[1], other[1])


# --- computation ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "changes", [{}, {"use_scale_shift_norm": False}, {"class_cond": True, "num_classes": 3}], ids=str
)
def test_checkpointing_changes_no_gradient(dropout: float, changes: dict[str, Any]) -> None:
    """Recomputed gradients are bit-identical, also with dropout."""
    results = []
    for use_checkpoint in (False, True):
        model = unet(dropout=dropout, use_checkpoint=use_checkpoint, **changes).train()
        given = inputs(model)
        torch.manual_seed(7)
        out = model(**given)
        out.square().sum().backward()
        results.append({"out": out, **{name: p.grad for name, p in model.named_parameters()}})
    plain, recomputed = results
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name
    torch.manual_seed(8)
    assert torch.equal(model(**given), out) == (dropout == 0)


def test_seeds_of_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, each block gets a seed of its own, drawn with others, and all are aligned alike."""
    seeds: list[Tensor] = []
    model = unet(num_res_blocks=1, dropout=0.3).train()
    norm, randint, drawn = ops.triton_norm.group_norm_silu, torch.randint, list[Any]()

    def spy(*args: Any, **options: Any) -> Tensor:
        seeds.extend([options["seed"]] if options.get("dropout") else [])
        return norm(*args, **options)

    monkeypatch.setattr(ops.triton_norm, "group_norm_silu", spy)
    monkeypatch.setattr(torch, "randint", lambda *args, **options: drawn.append(args) or randint(*args, **options))
    with ops.using("triton"):
        model(**inputs(model))
    assert len(seeds) == len(model.res_blocks)
    assert len({int(seed) for seed in seeds}) == len(seeds)
    assert all(seed.shape == (1,) and seed.data_ptr() % 16 == 0 for seed in seeds)
    assert len(drawn) == 3


def test_dropout_is_for_training() -> None:
    model = unet(dropout=0.5)
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**given), model(**given))
        model.train()
        assert not torch.equal(model(**given), model(**given))


@pytest.mark.parametrize("build", [unet, super_res])
def test_bf16_body(build: Any) -> None:
    """Output and gradients are float32 and close to those of a float32 body.

    bf16 has 8 bits of mantissa: each stored activation errs by up to 2^-9 = 0.2%, about 0.1% in the mean square. Errors
    of 30 successive activations add up to 0.1% · sqrt(30) = 0.6%, which a norm after a sum can magnify a few times. The
    bound of 3% allows a factor of five; timesteps or outputs in bf16 would exceed it (at 1000, bf16 numbers are 4
    apart).
    """
    model = build()
    given = inputs(model)
    exact = model(**given)
    exact_gradient = torch.autograd.grad(exact.square().sum(), model.out[2].weight)[0]
    model.set_precision(torch.bfloat16)
    out = model(**given)
    gradient = torch.autograd.grad(out.square().sum(), model.out[2].weight)[0]
    assert out.dtype == gradient.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert 1e-4 < relative_error(out, exact) < 0.03
    assert relative_error(gradient, exact_gradient) < 0.03
    features = model.get_feature_vectors(**given)
    assert features["middle"].dtype == torch.float32  # in x's dtype


def test_bf16_keeps_the_timesteps() -> None:
    """998.4 would be 1000 in bf16, so the embedding does not use the body's precision."""
    model = unet()
    t = torch.tensor([998.4, 1000.0])
    full = model.embed(t, None)
    assert torch.equal(model.set_precision(torch.bfloat16).embed(t, None), full)
    assert not torch.equal(full[0], full[1])


@by_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_activations_keep_one_layout(
    name: str, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of every convolution is contiguous or channels-last as chosen, whatever the layout of x."""
    monkeypatch.setattr(ops, "_channels_last", channels_last)
    model = unet(**EXTENSIONS[name]).set_precision(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    strange = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if not out.is_contiguous(memory_format=layout):
                strange.append(path)

        return hook

    count = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look(path))
            count += 1
    with torch.no_grad():
        model(**inputs(model))
    assert count > 5
    assert not strange
    assert all(parameter.is_contiguous() for parameter in model.parameters())  # DeepSpeed flattens them in this order


# --- initial weights ---


@pytest.mark.parametrize("kind", [UNetSettings, SuperResSettings])
def test_new_network_draws_zeros(kind: type[BackboneSettings]) -> None:
    """The last layer and the end of every residual branch are initialised to zero."""
    settings = kind(**(MODEL if kind is UNetSettings else SUPER_RES), learn_sigma=True)
    model = build_model(settings)
    with torch.no_grad():
        assert (model(**inputs(model)) == 0).all()
    zero = {name for name, p in model.named_parameters() if not name.endswith("bias") and (p == 0).all()}
    ends = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    assert zero == {name for name in model.state_dict() if name.endswith(ends)}


# --- weights in files ---

BUILDS: dict[str, tuple[type[BackboneSettings], dict[str, Any]]] = {
    **{name: (UNetSettings, {**MODEL, **changes}) for name, changes in EXTENSIONS.items()},
    "four levels": (UNetSettings, {"image_size": 64, "num_channels": 32}),
    "wide": (UNetSettings, {**MODEL, "num_channels": 96, "channel_mult": "1,1,2", "num_res_blocks": 2}),
    "super-resolution": (SuperResSettings, SUPER_RES),
    "gray super-resolution": (SuperResSettings, {**SUPER_RES, "in_channels": 1, "learn_sigma": True}),
    "rgba super-resolution": (SuperResSettings, {**SUPER_RES, "in_channels": 4, "class_cond": True}),
}


@pytest.mark.parametrize("name", BUILDS)
def test_settings_from_shapes(name: str) -> None:
    """The settings that are inferred from a bare state_dict are those of the network."""
    kind, given = BUILDS[name]
    settings = kind(**given)
    with torch.device("meta"):
        state = dict(build_model(settings).state_dict())
    super_res = kind is SuperResSettings
    shown = weights.infer_settings(state, super_res)
    levels = {2**level for level in range(len(settings.level_mult))}
    assert set(shown.pop("attention_factors")) == levels & set(settings.attention_factors)
    assert tuple(shown.pop("channel_mult")) == settings.level_mult
    assert {key: getattr(settings, key) for key in shown} == shown
    assert ("num_classes" in shown) == settings.class_cond
    expected = {"num_channels", "num_res_blocks", "learn_sigma", "in_channels", "use_scale_shift_norm", "class_cond"}
    assert shown.keys() - {"num_classes"} == expected | {"resblock_updown", "scale_stem"}
    assert weights.script_mismatch(state, super_res) == ""
    assert weights.script_mismatch(state, not super_res) != ""


@pytest.mark.parametrize("name", ["as it is", "classes", "super-resolution"])
def test_weights_carry_their_settings(name: str, tmp_path: Path) -> None:
    """A network that is rebuilt from its file alone gives the same outputs."""
    kind, given = BUILDS[name]
    model = random_model(kind(**given))
    info = info_for(model, ["a", "b"])
    path = tmp_path / "model000001.pt"
    torch.save(weights.with_info(model.state_dict(), info), path)
    state = weights.read_state_dict(path)
    assert weights.info_of(state) == info
    assert list(state) == list(model.state_dict())
    again = build_model(kind(**weights.info_of(state)["model"]))
    weights.load_into(again, state, path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs(model)), model(**inputs(model)))
    plain = torch.load(path, weights_only=True)  # as another program reads it
    model.load_state_dict(plain, strict=True)


def test_bare_weights_have_no_settings(tmp_path: Path) -> None:
    path = save_bare(unet(), tmp_path / "model.pt")
    assert weights.info_of(weights.read_state_dict(path)) == {}
    with pytest.raises(UserError, match="does not fit the model"):
        weights.load_into(unet(num_res_blocks=2), weights.read_state_dict(path), path)
