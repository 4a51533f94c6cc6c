"""Random weights for torch-fidelity's Inception network, since the released ones can't be fetched everywhere."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from fastdiff.evaluation.fidelity import torch_fidelity_module


def torch_fidelitys_inception(weights: Path | None, outputs: tuple[str, ...] = ("2048",)) -> nn.Module:
    """torch-fidelity's own network, in float32, with the weights in a file; None leaves PyTorch's initial weights."""
    kind = torch_fidelity_module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    if weights is not None:
        return kind("inception", list(outputs), feature_extractor_weights_path=str(weights))

    class Unloaded(kind):  # type: ignore[misc, valid-type]
        def load_state_dict(self, _):  # type: ignore[no-untyped-def]
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Unloaded("inception", list(outputs), feature_extractor_weights_path=empty)


def write_random_weights(path: Path) -> Path:
    """Write weights with which features neither vanish nor explode, and depend on the image."""
    net = torch_fidelitys_inception(None)
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3, generator=generator)
    torch.save(net.state_dict(), path)
    return path
