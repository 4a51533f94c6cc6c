"""Feature networks: Inception as torch-fidelity computes it, and files of the user's."""

from __future__ import annotations

import importlib
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.inception import torch_fidelitys_inception
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.evaluation import fidelity
from fastdiff.evaluation.classifier import read_classifier, train_classifier, write_classifier
from fastdiff.evaluation.features import INCEPTION, FeatureNetwork, open_features

CPU = torch.device("cpu")


def images(count: int, size: int = 20, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, size, size + 3, channels), generator=torch.Generator().manual_seed(seed)
    ).byte()


def opened(name: str | Path, weights: str | Path = "", precision: Any = "fp32", **how: Any) -> FeatureNetwork:
    return open_features(str(name), str(weights), precision, CPU, **how)


# --- Inception ---


def test_inception_equals_torch_fidelity(inception_weights: Path) -> None:
    x = images(3)
    net = opened(INCEPTION, inception_weights)
    found = net(x, ("pool", "logits"))
    pool, logits = torch_fidelitys_inception(inception_weights, ("2048", "logits_unbiased"))(x.permute(0, 3, 1, 2))
    scale = pool.abs().max()  # 1e-5 of it is 84 times float32's rounding, after 94 convolutions that are merged here
    assert found["pool"].std() > 0.01 * scale
    torch.testing.assert_close(found["pool"], pool, rtol=0, atol=1e-5 * float(scale))
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert {name: net.widths[name] for name in found} == {name: value.shape[1] for name, value in found.items()}
    assert net.is_inception
    assert net.notes == [
        "the weights in random.pth are not those of weights-inception-2015-12-05-6726825d.pth, so the scores can't be "
        "compared with published ones"
    ]


def test_spatial_features_in_float64(inception_weights: Path) -> None:
    """sFID's features are 7 channels of the first branch of the 17x17 block that TensorFlow calls mixed_6."""
    x = images(2)
    net = torch_fidelitys_inception(inception_weights)
    net.feature_extractor_internal_dtype = torch.float64
    net.double()
    seen: list[Tensor] = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: seen.append(output))
    net(x.permute(0, 3, 1, 2))
    known = seen[0][:, :7].reshape(2, -1)
    found = opened(INCEPTION, inception_weights)(x, ("spatial",))["spatial"]
    assert found.shape == (2, 2023)
    torch.testing.assert_close(found.double(), known, rtol=0, atol=1e-5 * float(known.abs().max()))


def test_images_of_a_batch_do_not_meet(inception_weights: Path) -> None:
    x = images(4)
    net = opened(INCEPTION, inception_weights)
    together = net(x, ("pool", "spatial"))
    backwards = net(x.flip(0), ("pool", "spatial"))
    for name, value in together.items():
        torch.testing.assert_close(backwards[name].flip(0), value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_gray_images_are_three_equal_channels(inception_weights: Path) -> None:
    x = images(2, channels=1)
    net = opened(INCEPTION, inception_weights)
    assert torch.equal(net(x, ("pool",))["pool"], net(x.expand(-1, -1, -1, 3), ("pool",))["pool"])
    with pytest.raises(UserError, match="takes images of 3 channels, these have 4"):
        net(images(2, channels=4), ("pool",))


def test_bf16_is_near(inception_weights: Path) -> None:
    x = images(2)
    exact = opened(INCEPTION, inception_weights)
    rounded = exact.at("bf16")
    a, b = (net(x, ("pool", "spatial", "logits")) for net in (exact, rounded))
    for name in a:
        assert b[name].dtype == torch.float32
        error = float((a[name] - b[name]).norm() / a[name].norm())
        assert 1e-5 < error < 0.05, name
    with pytest.raises(UserError, match="--feature_precision fp16 needs a GPU"):
        opened(INCEPTION, inception_weights, "fp16")


@pytest.mark.slow
def test_traced_inception(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces it with all outputs. Inductor, which takes a minute for it, is left out here."""
    monkeypatch.setattr("fastdiff.evaluation.features.compile_kwargs", lambda *_, **__: {"backend": "eager"})
    x = images(2)
    plain = opened(INCEPTION, inception_weights)(x, ("pool", "spatial"))
    compiled = opened(INCEPTION, inception_weights, compiled=True)
    for again in (x, x):
        found = compiled(again, ("pool", "spatial"))
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_weights_that_are_none(inception_weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"--feature_weights: .*other.pth doesn't hold the weights of torch-fidelity's"):
        opened(INCEPTION, other)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(inception_weights.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match=r"--feature_weights: .*cut.pth is not a checkpoint, or is damaged"):
        opened(INCEPTION, cut)
    with pytest.raises(UserError, match=r"--feature_weights: .*missing.pth does not exist"):
        opened(INCEPTION, tmp_path / "missing.pth")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


def test_weights_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity loads weights with everything that a pickle can do; fastdiff lets no such file get there."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError, match="would run code"):
        opened(INCEPTION, tmp_path / "harmful.pth")
    assert not (tmp_path / "harm").exists()


def test_released_weights(inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched once, compared with the hash in their name, and taken from PyTorch's cache if they are there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    module = fidelity.torch_fidelity_module("feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "URL_INCEPTION_V3", (tmp_path / "none" / "weights-00000000.pth").as_uri())
    with pytest.raises(UserError, match=r"can't be fetched into .*name the file with --feature_weights"):
        opened(INCEPTION)
    served = tmp_path / "weights-00000000.pth"
    served.write_bytes(inception_weights.read_bytes())
    monkeypatch.setattr(module, "URL_INCEPTION_V3", served.as_uri())
    with pytest.raises(UserError, match="the download is incomplete"):
        opened(INCEPTION)
    from fastdiff.runtime.files import checksum

    right = served.rename(tmp_path / f"weights-{checksum(served)[:8]}.pth")
    monkeypatch.setattr(module, "URL_INCEPTION_V3", right.as_uri())
    assert opened(INCEPTION).notes == []
    right.unlink()
    assert opened(INCEPTION).notes == []  # kept
    kept = tmp_path / "cache" / "fastdiff" / "features" / right.name
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    kept.rename(tmp_path / "torch" / "hub" / "checkpoints" / right.name)
    assert opened(INCEPTION).notes == []


def test_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="need torch-fidelity: run `pip install 'torch-fidelity>=0.4'`"):
        opened(INCEPTION)


# --- DINOv2 ---


def test_dinov2(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1:] == (3, 224, 224)
            return x.mean(dim=(2, 3)) * 2

    monkeypatch.setattr(torch.hub, "load", lambda repository, name: Small())
    net = opened("dinov2-vit-b-14")
    assert net.widths == {"pool": 3}
    assert not net.is_inception
    assert net(images(2), ("pool",))["pool"].shape == (2, 3)

    def unreachable(repository: str, name: str) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load", unreachable)
    with pytest.raises(UserError, match=r"--features: dinov2-vit-b-14 can't be fetched .*Network is unreachable"):
        opened("dinov2-vit-b-14")


# --- files ---


class Means(nn.Module):
    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3)) / 100


class MeansAndLogits(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = x.float().mean(dim=(2, 3)) / 100
        return pool, torch.cat([pool, pool], dim=1)


class OnRequest(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        pool = x.float().mean(dim=(2, 3)) / 100
        return pool if return_features else pool.softmax(dim=1)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 999, "wrong size"
        return x.float()


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def test_torchscript(tmp_path: Path) -> None:
    x = images(5)
    known = x.float().mean(dim=(1, 2)) / 100
    for module in (Means(), MeansAndLogits(), OnRequest()):
        path = script(module, tmp_path / f"{type(module).__name__}.pt")
        net = opened(path)
        torch.testing.assert_close(net(x, ("pool",))["pool"], known)
        assert net.widths == {"pool": 3, **({"logits": 6} if isinstance(module, MeansAndLogits) else {})}
        assert net.name == path.name
    with pytest.raises(UserError, match=r"Maps.pt must map uint8 \[B, 3, H, W\] to features \[B, D\]"):
        opened(script(Maps(), tmp_path / "Maps.pt"))
    with pytest.raises(UserError, match=r"Picky.pt fails on uint8 images \[2, 3, 64, 64\]"):
        opened(script(Picky(), tmp_path / "Picky.pt"))


def test_what_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(UserError, match="text.pt is neither TorchScript nor a classifier of --train_features"):
        opened(tmp_path / "text.pt")
    with pytest.raises(UserError, match="--features: .*did you mean inception-v3-compat"):
        opened("inception-v3")
    with pytest.raises(UserError, match="--feature_weights is for --features inception-v3-compat"):
        opened(tmp_path / "text.pt", "weights.pth")


def test_classifier(tmp_path: Path) -> None:
    """It tells bright from dark images, keeps its weights in a file, and leaves the caller's random state alone."""
    x = images(60, 12, 1).numpy() // 4
    y = np.arange(60) % 2
    x[y == 1] += 150
    before = torch.get_rng_state()
    model = train_classifier(x, y, 2, CPU, steps=30)
    assert torch.equal(torch.get_rng_state(), before)
    write_classifier(model, tmp_path / "bright.pt")
    net = opened(tmp_path / "bright.pt")
    found = net(torch.from_numpy(x), ("pool", "logits"))
    assert net.widths == {"pool": 64, "logits": 2}
    assert (found["logits"] + model.last.bias).argmax(dim=1).tolist() == y.tolist()
    assert net.name == "classifier bright"
    with pytest.raises(UserError, match="classifier bright takes images of 1 channels, these have 3"):
        net(images(2), ("pool",))
    content = torch.load(tmp_path / "bright.pt")
    for broken in ({**content, "classes": 3}, {**content, "size_hw": 3}, {**content, "state": {}}):
        torch.save(broken, tmp_path / "broken.pt")
        with pytest.raises(UserError, match="broken.pt is no classifier of --train_features, or is damaged"):
            read_classifier(tmp_path / "broken.pt")


def test_torchvision_without_its_library() -> None:
    """torch-fidelity can be imported, whether or not torchvision's compiled operators can be."""
    assert fidelity.torch_fidelity_module("metric_fid") is importlib.import_module("torch_fidelity.metric_fid")


class _Rows(nn.Module):
    """As many features as an image has columns."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()[:, 0, 0]


class _Large(nn.Module):
    """Features of images of 64x64 only."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 64
        return x.float().mean(dim=(2, 3))


class _None(nn.Module):
    """No features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()[:, :0, 0, 0]


class _Other(nn.Module):
    """A method of another name."""

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_Rows(), "gives [8] features and logits for images of 8x8, but [64] for those of 64x64"),
        (_Large(), "fails on uint8 images [2, 3, 8, 8]"),
        (_None(), "must map uint8 [B, 3, H, W] to features [B, D]"),
        (_Other(), "must map uint8 [B, 3, H, W] to features [B, D]"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_that_does_not_fit(tmp_path: Path, module: nn.Module, reason: str) -> None:
    torch.jit.script(module).save(str(tmp_path / "own.pt"))
    with pytest.raises(UserError, match=re.escape(reason)):
        open_features(str(tmp_path / "own.pt"), "", "fp32", CPU)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["pool"])


def test_classifier_of_endless_size(tmp_path: Path) -> None:
    torch.save(
        {"kind": "fastdiff classifier", "channels": math.inf, "size_hw": [8, 8], "classes": 3}, tmp_path / "c.pt"
    )
    with pytest.raises(UserError, match="is no classifier of --train_features"):
        open_features(str(tmp_path / "c.pt"), "", "fp32", CPU)
