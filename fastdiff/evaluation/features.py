"""Networks whose features the metrics compare: Inception and DINOv2 of torch-fidelity, or a file of the user's.

`open_features` returns a `FeatureNetwork`, which turns uint8 images into up to three outputs:

    pool      [B, D] float32, the features of FID, KID, precision and recall; Inception's pool_3, D = 2048
    spatial   [B, 2023] float32, the first 7 channels of Inception's mixed_6/conv at 17x17 places, for sFID
    logits    [B, K] float32 without the last layer's bias, for the Inception score
"""

from __future__ import annotations

import copy
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastdiff.errors import UserError, blaming, did_you_mean, first_line, quoted
from fastdiff.evaluation.classifier import Classifier, is_classifier, read_classifier
from fastdiff.evaluation.fidelity import torch_fidelity_module
from fastdiff.runtime.download import download
from fastdiff.runtime.files import checksum
from fastdiff.runtime.machine import cache_folder, compile_kwargs, tf32
from fastdiff.runtime.untrusted import is_there, read

Output = Literal["pool", "spatial", "logits"]
Precision = Literal["fp32", "bf16", "fp16"]
INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of its port of the Inception network of 2015, on which published FIDs rest."""
DINOV2 = ("dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14", "dinov2-vit-g-14")
_SPATIAL_CHANNELS = 7
_TRIED = (64, 32, 16, 8, 28, 128, 224, 256, 299, 512)
"""Sides of the images on which a TorchScript module is tried: it may take one size only."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class FeatureNetwork:
    """A network that maps images to features, on its device."""

    name: str
    """What results call it."""
    weights: str
    """A hash of its weights."""
    widths: dict[Output, int]
    """The outputs that it has, and their numbers of features."""
    run: Callable[[Tensor, Collection[Output], Precision], dict[Output, Tensor]]
    """run(images uint8 [B, C, H, W], outputs, precision) → the outputs, computed in that precision."""
    device: torch.device
    channels: int = 3
    precision: Precision = "fp32"
    input: str = ""
    """How images reach the size that the network takes."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the result."""
    bias: Tensor | None = None
    """The bias [K] that the logits lack; None where the last layer has none, or where they have it."""

    def classes(self, logits: Tensor) -> Tensor:
        """The classes [N] int64 that the network assigns to images with these logits [N, K]."""
        return (logits if self.bias is None else logits + self.bias.to(logits)).argmax(dim=1)

    def __call__(self, images: Tensor, outputs: Collection[Output]) -> dict[Output, Tensor]:
        """The outputs, float32 on the device, of images uint8 [B, H, W, C]; gray ones become three equal channels."""
        x = images.to(self.device).permute(0, 3, 1, 2)
        if x.shape[1] == 1 and self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[1] != self.channels:
            raise UserError(f"{self.name} takes images of {self.channels} channels, these have {x.shape[1]}")
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), tf32(False):
            return {name: output.float() for name, output in self.run(x, outputs, self.precision).items()}

    @property
    def is_inception(self) -> bool:
        """Whether results may be compared with published ones."""
        return self.name == INCEPTION

    def at(self, precision: Precision) -> FeatureNetwork:
        """The same network, computing in another precision."""
        return FeatureNetwork(**{**self.__dict__, "precision": precision})

    def describe(self) -> dict[str, Any]:
        """The entries of a result that say how features were computed."""
        return {"network": self.name, "weights": self.weights, "input": self.input, "precision": self.precision}


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context in which PyTorch chooses which operations compute in the precision; for fp32 it does nothing."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=_DTYPES[precision])


def open_features(
    name: str, weights: str, precision: Precision, device: torch.device, *, compiled: bool = False
) -> FeatureNetwork:
    """Build the network that `--features` names, with the weights of `--feature_weights` or the released ones.

    Raises UserError for a file that holds no such network, and where released weights can't be fetched.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--feature_precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if name == INCEPTION:
        return _inception(weights, precision, device, compiled)
    if weights:
        raise UserError(f"--feature_weights is for --features {INCEPTION}; leave it out for {name}")
    with blaming("--features"):
        if name in DINOV2:
            return _dinov2(name, precision, device)
        path = Path(name)
        if not is_there(path, "file"):
            near = did_you_mean(name, (INCEPTION, *DINOV2))
            raise UserError(f"{name} is neither a file nor one of {', '.join((INCEPTION, *DINOV2))}{near}")
        if is_classifier(path):
            return _classifier(path, precision, device)
        return _torchscript(path, precision, device)


def _inception(weights: str, precision: Precision, device: torch.device, compiled: bool) -> FeatureNetwork:
    module = torch_fidelity_module("feature_extractor_inceptionv3")
    prefix = re.search(r"-([0-9a-f]{8})\.pth$", module.URL_INCEPTION_V3)
    file = Path(weights) if weights else _released_inception(module.URL_INCEPTION_V3, prefix[1] if prefix else "")
    with blaming("--feature_weights"):
        state = read(file)
        buffer = io.BytesIO()  # torch-fidelity loads files with code; what `read` returns has none
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            net = module.FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=buffer)
        except (RuntimeError, TypeError, AttributeError):
            raise UserError(
                f"{file} doesn't hold the weights of torch-fidelity's Inception network; it is "
                f"{Path(module.URL_INCEPTION_V3).name}"
            ) from None
    digest = checksum(file)
    notes = []
    if prefix and not digest.startswith(prefix[1]):
        notes.append(
            f"the weights in {file.name} are not those of {Path(module.URL_INCEPTION_V3).name}, "
            "so the scores can't be compared with published ones"
        )
    _fuse_norms(net)
    net = net.to(device, memory_format=torch.channels_last)

    @cache
    def forward(at: Precision) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        both = _PoolAndSpatial(net, _DTYPES[at])
        if not compiled or at != precision:  # few images are seen in another precision
            return both
        return torch.compile(both, **compile_kwargs(device, fullgraph=False))

    def run(images: Tensor, outputs: Collection[Output], at: Precision) -> dict[Output, Tensor]:
        pool, spatial = forward(at)(images)
        found: dict[Output, Tensor] = {"pool": pool, "spatial": spatial}
        if "logits" in outputs:
            found["logits"] = pool @ net.fc.weight.T
        return {name: found[name] for name in outputs}

    widths: dict[Output, int] = {"pool": 2048, "spatial": 17 * 17 * _SPATIAL_CHANNELS, "logits": len(net.fc.weight)}
    size = net.INPUT_IMAGE_SIZE
    how = f"resized to {size}x{size} as TensorFlow 1 does (bilinear), of uint8 pixels"
    return FeatureNetwork(
        *(INCEPTION, f"sha256:{digest[:16]}", widths, run, device),
        precision=precision,
        input=how,
        notes=notes,
        bias=net.fc.bias.detach(),
    )


class _PoolAndSpatial(nn.Module):
    """The pool [B, 2048] float32 and spatial [B, 2023] features of torch-fidelity's Inception, whose norms are merged.

    Images are resized and features are averaged in float32. In between, weights and maps are in a dtype.
    """

    def __init__(self, net: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self._seen: dict[str, Tensor] = {}
        net = copy.deepcopy(net)  # each precision has its own weights, so that they aren't cast for every batch
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
        net.AvgPool.register_forward_pre_hook(lambda _, given: (given[0].float(),))
        net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: self._seen.__setitem__("spatial", output))
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        (pool,) = self.net(images)
        return pool, self._seen["spatial"][:, :_SPATIAL_CHANNELS].flatten(1)


def _released_inception(url: str, prefix: str) -> Path:
    """The path of torch-fidelity's weights, which are fetched once. PyTorch's cache is looked at first."""
    name = url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if is_there(cached, "file"):
        return cached

    def check(path: Path) -> None:
        if not checksum(path).startswith(prefix):
            raise UserError("its hash is not the one in its name")

    advice = "fetch it by other means and name the file with --feature_weights"
    return download(url, cache_folder() / "features" / name, check, advice)


def _fuse_norms(net: nn.Module) -> None:
    """Merge each batch norm into the convolution before it."""
    for block in net.modules():
        conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _dinov2(name: str, precision: Precision, device: torch.device) -> FeatureNetwork:
    module = torch_fidelity_module("feature_extractor_dinov2")
    try:
        net = module.FeatureExtractorDinoV2(name, ["dinov2"]).to(device)
    except Exception as error:  # torch.hub raises many types
        raise UserError(
            f"{name} can't be fetched by torch.hub ({first_line(error)}); put facebookresearch/dinov2 and its weights "
            f"into {torch.hub.get_dir()} on a machine with a network, and copy that folder"
        ) from None
    size = net.INPUT_IMAGE_SIZE
    with torch.no_grad():
        width = net(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))[0].shape[1]
    how = f"resized to {size}x{size} as TensorFlow 1 does (bilinear), of uint8 pixels"

    def run(images: Tensor, _: Collection[Output], precision: Precision) -> dict[Output, Tensor]:
        with _autocast(device, precision):
            return {"pool": net(images)[0]}

    return FeatureNetwork(name, _hash_of(net), {"pool": width}, run, device, precision=precision, input=how)


def _classifier(path: Path, precision: Precision, device: torch.device) -> FeatureNetwork:
    net = read_classifier(path).to(device).eval()

    def run(images: Tensor, _: Collection[Output], precision: Precision) -> dict[Output, Tensor]:
        with _autocast(device, precision):
            pool = net.features(Classifier.scaled(images))
        return {"pool": pool, "logits": pool.float() @ net.last.weight.T}

    widths: dict[Output, int] = {"pool": net.last.in_features, "logits": net.last.out_features}
    size = "x".join(map(str, net.size_hw))
    return FeatureNetwork(
        *(f"classifier {path.stem}", f"sha256:{checksum(path)[:16]}", widths, run, device),
        channels=net.channels,
        precision=precision,
        input=f"trained on images of {size}",
        bias=net.last.bias.detach(),
    )


def _torchscript(path: Path, precision: Precision, device: torch.device) -> FeatureNetwork:
    """A TorchScript module that maps uint8 [B, 3, H, W] to features [B, D], or to (features [B, D], logits [B, K]).

    One with an argument return_features, as StyleGAN's Inception has it, is called with True for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch recommends torch.export to those who save
            net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} is neither TorchScript nor a classifier of --train_features ({first_line(error)})"
        ) from None

    wrong = UserError(f"{path} must map uint8 [B, 3, H, W] to features [B, D], or to a tuple of them and logits [B, K]")
    if not hasattr(net, "forward"):
        raise wrong
    arguments = {argument.name for argument in net.forward.schema.arguments}
    given = {"return_features": True} if "return_features" in arguments else {}
    names: tuple[Output, ...] = ("pool", "logits")

    def call(images: Tensor) -> dict[Output, Tensor]:
        try:
            output = net(images, **given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            raise UserError(
                f"--features: {path} fails on uint8 images {list(images.shape)}: {first_line(error)}"
            ) from None
        outputs = output if isinstance(output, tuple) else (output,)
        if not 1 <= len(outputs) <= 2 or any(not isinstance(each, Tensor) or each.is_complex() for each in outputs):
            raise wrong
        shapes = [each.shape for each in outputs]
        if any(len(shape) != 2 or shape[0] != len(images) or not shape[1] for shape in shapes):
            raise wrong
        return dict(zip(names, outputs, strict=False))

    def run(images: Tensor, _: Collection[Output], precision: Precision) -> dict[Output, Tensor]:
        with _autocast(device, precision):
            found = call(images)
        if (now := {name: output.shape[1] for name, output in found.items()}) != widths:
            raise UserError(
                f"{path} gives {quoted(list(now.values()))} features and logits for images of "
                f"{images.shape[2]}x{images.shape[3]}, but {quoted(list(widths.values()))} for those of {side}x{side}; "
                "their number must not depend on the size"
            )
        return found

    with torch.no_grad():
        tried, side = _first_that_works(call, device)
    widths = {name: output.shape[1] for name, output in tried.items()}
    return FeatureNetwork(
        path.name, f"sha256:{checksum(path)[:16]}", widths, run, device, precision=precision, input="its own"
    )


def _first_that_works(
    call: Callable[[Tensor], dict[Output, Tensor]], device: torch.device
) -> tuple[dict[Output, Tensor], int]:
    """The outputs for two black images, and their side: the first that the network takes. Raises UserError."""
    refusals = []
    for side in _TRIED:
        try:
            return call(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device)), side
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


def _hash_of(net: nn.Module) -> str:
    """A hash of a network's parameters and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        found.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{found.hexdigest()[:16]}"
