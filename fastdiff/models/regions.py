"""The forward pass of a UNet in four regions, each of which is compiled by itself.

Autograd sees a compiled graph as one node, which returns all its gradients at the end of its backward pass. If the
whole network were one graph, no gradient could be sent to other processes before the last one is computed. With
regions, the gradients of one are sent while the backward pass of the regions before it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.blocks import project_embedding, value
from fastdiff.models.encoder import res_blocks
from fastdiff.models.unet import UNet


class Regions:
    """A UNet's forward pass, cut where the maps leave the upper half of the levels and where they come back.

    The upper levels have most of the work and few parameters, the lower ones most parameters. So when nearly all
    gradients are known, the backward pass of the upper input blocks is still to come, and takes a fifth of the time.
    Residual sums are added up at the borders; only the one after the middle block could have been left to a norm.
    """

    def __init__(self, model: UNet) -> None:
        self.model = model
        settings = model.settings
        # The upper input blocks end before the Downsample, so that the lower output blocks end with the Upsample.
        upper = max(1, len(settings.level_channels) // 2 * (settings.num_res_blocks + 1))
        self.upper_inputs, self.lower_inputs = model.input_blocks[:upper], model.input_blocks[upper:]
        self.lower_outputs, self.upper_outputs = model.output_blocks[:-upper], model.output_blocks[-upper:]

    def compile(self, **kwargs: Any) -> Regions:
        """Compile the regions with torch.compile and these arguments; returns self.

        Each has a function of its own, because Dynamo would take the second use of a function for a recompilation.
        """
        for name in ("_descend_upper", "_descend_lower", "_ascend_lower", "_ascend_upper"):
            setattr(self, name, torch.compile(getattr(self, name), **kwargs))
        return self

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """As `UNet.forward`."""
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
