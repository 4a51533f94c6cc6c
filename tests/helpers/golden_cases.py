"""Finds the golden cases (recorded inputs and results) and compares against them at their stated tolerances."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, UNetSettings, build_model
from fastdiff.models.classifier import Classifier, build_classifier
from fastdiff.models.classifier_settings import HEAD_CHANNELS, ClassifierSettings
from helpers import TESTS

# Constructor arguments that settings of the same name stand for: of both families, and of guided-diffusion alone.
_SAME_NAMES = ("num_res_blocks", "dropout", "channel_mult", "use_checkpoint", "num_heads", "num_heads_upsample")
_SAME_NAMES += ("use_scale_shift_norm",)
_GUIDED_NAMES = ("num_head_channels", "resblock_updown", "use_new_attention_order")

DEVICE = os.environ.get("FASTDIFF_DEVICE", "cpu")  # with cuda, a GPU must reproduce the numbers recorded on a CPU
FOLDER = Path(os.environ.get("FASTDIFF_GOLDEN") or TESTS / "golden")


@dataclass
class Case:
    """One folder of recorded numbers."""

    folder: Path
    spec: dict[str, Any] = field(repr=False)
    slack: Callable[[str], float] = lambda name: 1.0  # array name → factor of its tolerance

    @cached_property
    def data(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "arrays.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    @property
    def config(self) -> dict[str, Any]:
        return self.spec["config"]

    @property
    def expected(self) -> dict[str, Any]:
        return self.spec["expected"]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.data[name]).to(DEVICE)

    def has(self, name: str) -> bool:
        return name in self.data

    @cached_property
    def shapes(self) -> dict[str, dict[str, list[int]]]:
        """Configuration → key → shape, in the order of the state_dicts."""
        content = (self.folder / self.expected["shapes_file"]).read_bytes()
        return json.loads(lzma.decompress(content) if self.expected["shapes_file"].endswith(".xz") else content)

    def weights(self, name: str = "weights.pt") -> dict[str, torch.Tensor]:
        return torch.load(self.folder / name, weights_only=True)

    def check(self, name: str, got: Any) -> None:
        """Assert that `got` equals the recorded array `name` within its tolerance."""
        spec, want = self.spec["arrays"][name], self.data[name]
        got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
        assert got.shape == want.shape, f"{name}: shape {got.shape}, recorded {want.shape}"
        if spec.get("exact"):
            np.testing.assert_array_equal(got, want, err_msg=name)
            return
        a, b = want.astype(np.float64), got.astype(np.float64)
        if spec.get("compare") == "exp":
            a, b = np.exp(a), np.exp(b)
        if spec.get("skip_rows"):
            a, b = (np.delete(values, spec["skip_rows"], 0) for values in (a, b))
        size = np.abs(np.nan_to_num(a))
        if spec["scale"] == "row" and a.ndim:
            size = np.broadcast_to(size.reshape(len(a), -1).max(1).reshape((-1,) + (1,) * (a.ndim - 1)), a.shape)
        elif spec["scale"] == "all":
            size = np.full(a.shape, size.max())
        bound = self.slack(name) * (spec["atol"] + spec["rtol"] * size)
        bad = ~((np.abs(a - b) <= bound) | (np.isnan(a) & np.isnan(b)))
        worst = np.nanmax(np.abs(a - b) / np.maximum(bound, 1e-300))
        assert not bad.any(), f"{name}: {bad.sum()} of {bad.size} values off, worst {worst:.3g} times the tolerance"

    def check_gradients(self, model: torch.nn.Module) -> None:
        """Assert that the parameters' gradients equal the recorded ones: some entry by entry, all by their norms."""
        parameters = dict(model.named_parameters())
        recorded = [name for name in self.config["grad_params"] if self.has(f"out_grad__{name}")]
        assert recorded
        for name in recorded:
            self.check(f"out_grad__{name}", parameters[name].grad)
        order = self.expected["grad_norms_order"]
        self.check("out_grad_norms", [parameters[name].grad.double().norm().item() for name in order])

    def conditioning(self, model: UNet) -> dict[str, torch.Tensor]:
        """Return the network's arguments besides images and timesteps: labels, and small images to enlarge."""
        takes = {"y": model.settings.class_cond, "low_res": isinstance(model.settings, SuperResSettings)}
        return {name: self.tensor(f"in_{name}") for name, needed in takes.items() if needed}

    def run_model(self, weights: str, hw: tuple[int, int]) -> UNet:
        """Return the network of a case whose config lists `models` by the name of the weights file."""
        return load_model(self.config["models"][weights], self.weights(weights), hw)

    def run_classifier(self) -> Classifier:
        """Return the classifier of a case whose config names it by its weights file."""
        [(weights, spec)] = self.config["classifier"].items()
        return load_classifier(spec, self.weights(weights))


def class_conditional(case: Case, images: int, folder: Path) -> Case:
    """Write a copy of the case with class-conditional networks and labels `in_y`.

    The recorded results stay valid: the embedding of the correct label, the same for all images, is subtracted from the
    last bias of the time embedding. Any other label makes the outputs NaN. Skips the test if the case has labels.
    """
    if case.has("in_y"):
        pytest.skip("recorded with labels")
    label, classes = 5, 7
    spec, arrays = json.loads(json.dumps(case.spec)), {**case.data, "in_y": np.full(images, label)}
    for name, model in spec["config"]["models"].items():
        model["kwargs"]["num_classes"] = classes
        weights = {key: value.clone() for key, value in case.weights(name).items()}
        bias = weights["time_embed.2.bias"]
        weights["label_emb.weight"] = torch.full((classes, len(bias)), torch.nan)
        weights["label_emb.weight"][label] = 0.1 * torch.randn(len(bias), generator=torch.Generator().manual_seed(0))
        bias -= weights["label_emb.weight"][label]
        torch.save(weights, folder / name)
    for name in spec["arrays"]:
        if name.endswith("__grad_norm"):  # the embedding's gradient is that of the bias
            more = case.data[name.removesuffix("norm") + "_time_embed.2.bias"].astype(np.float64)
            arrays[name] = np.hypot(case.data[name], np.linalg.norm(more))
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "case.json").write_text(json.dumps(spec))
    return Case(folder, spec, case.slack)


def cases(kind: str, *, array: str = "", family: str = "") -> Any:
    """Parametrise a test over the cases of a kind: those with an array, or of one family, if either is given."""
    found = []
    for file in sorted(FOLDER.glob("*/case.json")):
        spec = json.loads(file.read_text())
        of_family = not family or spec["config"].get("family", "improved") == family
        if spec["kind"] == kind and of_family and (not array or array in spec["arrays"]):
            found.append(pytest.param(Case(file.parent, spec), id=file.parent.name))
    return pytest.mark.parametrize("case", found or [pytest.param(None, marks=pytest.mark.skip(f"no case of {kind}"))])


def model_settings(spec: dict[str, Any], hw: tuple[int, int] | None = None) -> BackboneSettings:
    """Return the settings of a network that a case describes by its family's flags or constructor arguments."""
    stem = {"scale_stem": spec.get("family") == "guided"}
    if "flags" in spec:
        kind = SuperResSettings if spec["builder"].startswith("sr_") else UNetSettings
        return kind(**{name: value for name, value in spec["flags"].items() if name in kind.model_fields}, **stem)
    kwargs = spec["kwargs"]
    assert hw is not None
    assert kwargs["dims"] == 2
    assert kwargs["conv_resample"]
    common = {
        "num_channels": kwargs["model_channels"],
        "in_channels": kwargs["in_channels"],
        "learn_sigma": kwargs["out_channels"] == 2 * kwargs["in_channels"],
        "attention_resolutions": [min(hw) // f for f in kwargs["attention_resolutions"] if f <= min(hw)],
        "class_cond": kwargs["num_classes"] is not None,
        **({"num_classes": kwargs["num_classes"]} if kwargs["num_classes"] is not None else {}),
    }
    common |= {name: kwargs[name] for name in (*_SAME_NAMES, *_GUIDED_NAMES) if name in kwargs} | stem
    if spec["builder"] == "SuperResModel":
        return SuperResSettings(large_size=hw, small_size=[1, 1], **common)
    return UNetSettings(image_size=hw, **common)


def classifier_settings(spec: dict[str, Any]) -> ClassifierSettings:
    """Return the settings of a classifier that a case describes by flags or constructor arguments."""
    if "flags" in spec:
        known = ClassifierSettings.model_fields
        return ClassifierSettings(**{name: value for name, value in spec["flags"].items() if name in known})
    kwargs = spec["kwargs"]
    assert kwargs["num_head_channels"] == HEAD_CHANNELS
    return ClassifierSettings(
        image_size=kwargs["image_size"],
        in_channels=kwargs["in_channels"],
        num_classes=kwargs["out_channels"],
        classifier_width=kwargs["model_channels"],
        classifier_depth=kwargs["num_res_blocks"],
        classifier_channel_mult=kwargs["channel_mult"],
        classifier_attention_resolutions=[kwargs["image_size"] // f for f in kwargs["attention_resolutions"]],
        classifier_use_scale_shift_norm=kwargs["use_scale_shift_norm"],
        classifier_resblock_updown=kwargs["resblock_updown"],
        classifier_pool=kwargs["pool"],
    )


def load_classifier(spec: dict[str, Any], weights: dict[str, torch.Tensor]) -> Classifier:
    """Return the classifier with a case's weights, ready to run."""
    model = build_classifier(classifier_settings(spec))
    model.load_state_dict(weights)
    return model.to(DEVICE).eval()


def load_model(spec: dict[str, Any], weights: dict[str, torch.Tensor], hw: tuple[int, int]) -> UNet:
    """Return the network with a case's weights, ready to run."""
    model = build_model(model_settings(spec, hw))
    model.load_state_dict(weights)
    return model.to(DEVICE).eval()


def diffusion_for(flags: dict[str, Any]) -> GaussianDiffusion:
    """Return the process that a case describes by improved-diffusion's flags."""
    settings = {name: value for name, value in flags.items() if name in DiffusionSettings.model_fields}
    return create_diffusion(DiffusionSettings(**settings), learn_sigma=flags.get("learn_sigma", False))


def log_prob_gradient(
    classifier: Classifier, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(y | x_t) [B] and its gradient by x_t [B, C, H, W]; t [B] are the timesteps that the network sees."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        chosen = classifier(x, t).log_softmax(1).gather(1, y[:, None])[:, 0]
        return chosen.detach(), torch.autograd.grad(chosen.sum(), x)[0]
