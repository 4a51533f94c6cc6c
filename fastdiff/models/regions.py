"""The forward pass of a network in regions, each of which is compiled by itself: four of a UNet, two of a classifier.

Autograd sees a compiled graph as one node, which returns all its gradients at the end of its backward pass. If the
whole network were one graph, no gradient could be sent to other processes before the last one is computed. With
regions, the gradients of one are sent while the backward pass of the regions before it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.models.blocks import project_embedding, value
from fastdiff.models.classifier import Classifier
from fastdiff.models.encoder import Encoder, res_blocks
from fastdiff.models.unet import UNet

if TYPE_CHECKING:
    from typing_extensions import Self


class Regions(ABC):
    """A forward pass that is cut into the methods with the names `parts`."""

    parts: tuple[str, ...]

    def compile(self, **kwargs: Any) -> Self:
        """Compile the regions with torch.compile and these arguments; returns self.

        Each has a function of its own, because Dynamo would take the second use of a function for a recompilation.
        """
        for name in self.parts:
            setattr(self, name, torch.compile(getattr(self, name), **kwargs))
        return self

    @abstractmethod
    def __call__(self, x: Tensor, timesteps: Tensor, *others: Any, **named: Any) -> Tensor:
        """As the network's `forward`."""


class ClassifierRegions(Regions):
    """A classifier's forward pass, cut where the maps leave the upper half of the levels (see `UNetRegions`)."""

    parts = ("_upper", "_lower")

    def __init__(self, model: Classifier) -> None:
        self.model = model
        upper = _upper_blocks(model)
        self.upper, self.lower = model.input_blocks[:upper], [*model.input_blocks[upper:], model.middle_block]

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:  # type: ignore[override]
        return self._lower(*self._upper(x, timesteps))

    def _upper(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The embedding, and the outputs of the upper input blocks."""
        emb = self.model.embed(timesteps, None)
        maps = self.model.run_stages(self.upper, self.model.start_map(x), _projections(self.upper, emb))
        return emb, [value(h) for h in maps]

    def _lower(self, emb: Tensor, upper: list[Tensor]) -> Tensor:
        """The logits."""
        return self.model.head([*upper, *self.model.run_stages(self.lower, upper[-1], _projections(self.lower, emb))])


class UNetRegions(Regions):
    """A UNet's forward pass, cut where the maps leave the upper half of the levels and where they come back.

    The upper levels have most of the work and few parameters, the lower ones most parameters. So when nearly all
    gradients are known, the backward pass of the upper input blocks is still to come, and takes a fifth of the time.
    Residual sums are added up at the borders; only the one after the middle block could have been left to a norm.
    """

    parts = ("_descend_upper", "_descend_lower", "_ascend_lower", "_ascend_upper")

    def __init__(self, model: UNet) -> None:
        self.model = model
        upper = _upper_blocks(model)
        self.upper_inputs, self.lower_inputs = model.input_blocks[:upper], model.input_blocks[upper:]
        self.lower_outputs, self.upper_outputs = model.output_blocks[:-upper], model.output_blocks[-upper:]

    def __call__(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        emb, upper = self._descend_upper(x, timesteps, y, low_res)
        lower, h = self._descend_lower(upper[-1], emb)
        h = self._ascend_lower(h, emb, lower)
        return self._ascend_upper(h, emb, upper)

    def _descend_upper(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, low_res: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The embedding, and the outputs of the upper input blocks."""
        emb = self.model.embed(timesteps, y)
        h = self.model.start_map(x, low_res)
        maps = self.model.run_stages(self.upper_inputs, h, _projections(self.upper_inputs, emb))
        return emb, [value(h) for h in maps]

    def _descend_lower(self, h: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """Outputs of the lower input blocks, and of the middle block."""
        stages = [*self.lower_inputs, self.model.middle_block]
        *maps, middle = self.model.run_stages(stages, h, _projections(stages, emb))
        return [value(h) for h in maps], value(middle)

    def _ascend_lower(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Output of the lower output blocks."""
        maps = self.model.run_stages(self.lower_outputs, h, _projections(self.lower_outputs, emb), skips)
        return value(maps[-1])

    def _ascend_upper(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Output of the network."""
        maps = self.model.run_stages(self.upper_outputs, h, _projections(self.upper_outputs, emb), skips)
        return self.model.out(maps[-1])


def _projections(stages: Iterable[nn.Module], emb: Tensor) -> Iterator[Tensor]:
    """The projections of the embedding for the residual blocks of these stages, as one product.

    The network's single product for all blocks would belong to the first region, and so would all its gradients.
    """
    blocks = res_blocks(stages)
    return iter(project_embedding(blocks, emb) if blocks else [])


def _upper_blocks(model: Encoder) -> int:
    """The number of input blocks in the upper half of the levels.

    They end before the block that halves the map, so that the lower output blocks end with the one that doubles it.
    """
    settings = model.backbone
    return max(1, len(settings.level_channels) // 2 * (settings.num_res_blocks + 1))


def regions_of(model: UNet | Classifier) -> Regions:
    """The regions of a network."""
    return ClassifierRegions(model) if isinstance(model, Classifier) else UNetRegions(model)
