"""Networks reproduce recorded outputs and gradients."""

import pytest
import torch
from helpers.golden_cases import Case, cases, load_model, model_settings
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import ops
from fastdiff.config.load import load
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.models import SuperResSettings, build_model
from fastdiff.models.blocks import timestep_embedding
from fastdiff.training.trainer import low_res_of


@cases("unet_forward")
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["", "checkpointed"])
def test_forward_and_gradients(case: Case, use_checkpoint: bool) -> None:
    x = case.tensor("in_x")
    model = load_model(case.config["model"], case.weights(), tuple(x.shape[2:]))
    model.settings = model.settings.model_copy(update={"use_checkpoint": use_checkpoint})
    stride = case.config.get("store_stride", 1)
    kwargs = case.conditioning(model)
    with torch.no_grad():
        case.check("out_int", model(x, case.tensor("in_t_int"), **kwargs)[..., ::stride, ::stride])
        if case.has("in_x_small"):
            case.check("out_small", model(case.tensor("in_x_small"), case.tensor("in_t_frac"), **kwargs))
    x.requires_grad_()
    out = model(x, case.tensor("in_t_frac"), **kwargs)
    case.check("out_frac", out[..., ::stride, ::stride])
    loss = (case.tensor("in_loss_weight") * out).sum()
    case.check("out_loss", loss)
    loss.backward()
    case.check("out_grad_x", x.grad[..., ::stride, ::stride])
    case.check_gradients(model)


@cases("unet_forward", array="out_feature_rms_down")
def test_feature_vectors(case: Case) -> None:
    x = case.tensor("in_x")
    model = load_model(case.config["model"], case.weights(), tuple(x.shape[2:]))
    with torch.no_grad():
        features = model.get_feature_vectors(x, case.tensor("in_t_frac"), **case.conditioning(model))
    for place, maps in features.items():
        maps = [maps] if isinstance(maps, torch.Tensor) else maps
        case.check(f"out_feature_rms_{place}", [m.double().square().mean().sqrt().item() for m in maps])


@cases("unet_forward", array="in_large")
def test_area_averaging(case: Case) -> None:
    size = case.config["area_small_size"]
    case.check("out_area_low_res", low_res_of(case.tensor("in_large"), (size, size)))


@cases("timestep_embedding")
def test_timestep_embedding(case: Case) -> None:
    checked = 0
    for name in case.data:
        if not name.startswith("out_dim"):
            continue
        parts = name.removeprefix("out_dim").split("__")
        period = case.config["default_max_period"]
        if len(parts) > 2:
            period = int(parts[2].removeprefix("max_period"))
        case.check(name, timestep_embedding(case.tensor(f"in_{parts[1]}"), int(parts[0]), period))
        checked += 1
    assert checked


@cases("reference_configs")
def test_published_configurations(case: Case) -> None:
    networks = {name: spec for name, spec in case.config["configs"].items() if spec["builder"] != "create_classifier"}
    for name, spec in networks.items():
        settings = model_settings(spec)
        with torch.device("meta"):
            model = build_model(settings).eval()
        state = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert state == case.shapes[name], name
        assert list(state) == list(case.shapes[name]), name
        expected = case.expected["configs"][name]
        assert sum(p.numel() for p in model.parameters()) == expected["param_count"]
        assert len(list(model.parameters())) == expected["num_tensors"]
        inputs = {"x": torch.empty(1, settings.in_channels, *settings.size_hw, device="meta")}
        inputs["timesteps"] = torch.zeros(1, device="meta")
        if settings.class_cond:
            inputs["y"] = torch.zeros(1, dtype=torch.int64, device="meta")
        if isinstance(settings, SuperResSettings):
            inputs["low_res"] = torch.empty(1, settings.in_channels, *settings.small_size, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad(), ops.using("reference"):
            out = model(**inputs)
        assert list(out.shape) == expected["output_shape"]
        assert counter.get_total_flops() == pytest.approx(expected["forward_flops_per_image"], rel=1e-9)


@cases("reference_configs")
def test_flags_and_defaults(case: Case) -> None:
    """Every flag of the originals' scripts is a flag of ours with the same default.

    One has no meaning: a classifier predicts no variances. One sets another setting.
    """
    scripts = {
        "image_train": (Config, ("model", "diffusion", "data", "train")),
        "image_sample": (Config, ("model", "diffusion", "sample")),
        "image_nll": (Config, ("model", "diffusion", "data", "nll")),
        "super_res_train": (SuperResConfig, ("model", "diffusion", "data", "train")),
        "super_res_sample": (SuperResConfig, ("model", "diffusion", "sample")),
        "classifier_train": (ClassifierConfig, ("model", "diffusion", "data", "train")),
        "classifier_sample": (Config, ("model", "diffusion", "classifier", "sample")),
    }
    family = ["--family", case.config.get("family", "improved")]
    for script, flags in case.expected["script_flag_defaults"].items():
        kind, sections = scripts[script]
        flags = {name: value for name, value in flags.items() if (script, name) != ("classifier_train", "learn_sigma")}
        argv = [word for name, value in flags.items() if value != "" for word in (f"--{name}", str(value))]
        given = load([*family, *argv], description="", sections=sections, kind=kind).config
        bare = load(family, description="", sections=sections, kind=kind).config
        assert given.model_dump() == bare.model_dump(), script
        stored = {name: value for s in sections for name, value in getattr(bare, s).model_dump(mode="json").items()}
        for name, value in flags.items():
            kept = stored["max_steps" if name == "iterations" else name]
            assert type(value)(kept) == value, (script, name)
