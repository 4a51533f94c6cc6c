"""A residual sum that waits for the norm which follows it, so that the two are one pass over memory."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from fastdiff import ops


class Sum:
    """a + b + bias of a residual block, [B, C, H, W] channels-last, found by whoever first needs it.

    bias [C] is that of the convolution that made b, which ran without it.
    """

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor) -> None:
        self.parts: tuple[Tensor, Tensor, Tensor] | None = (a, b, bias)
        self.total: Tensor | None = None

    def value(self) -> Tensor:
        """The sum: the norm's, where one came first."""
        if self.parts is not None:
            a, b, bias = self.parts
            self._keep(a + (b + bias.to(b.dtype)[:, None, None]))
        assert self.total is not None
        return self.total

    def _keep(self, total: Tensor) -> None:
        self.total, self.parts = total, None  # the parts' memory can go

    def normed(
        self, weight: Tensor, bias: Tensor, skip: Tensor | None, silu: bool, num_groups: int, eps: float
    ) -> Tensor:
        """group_norm_silu of cat(sum, skip); keeps the sum, which it finds on the way."""
        if self.parts is None:
            return ops.group_norm_silu(self.value(), weight, bias, skip=skip, silu=silu, num_groups=num_groups, eps=eps)
        a, b, b_bias = self.parts
        total, y = ops.add_group_norm_silu(
            a, b, weight, bias, b_bias=b_bias, skip=skip, silu=silu, num_groups=num_groups, eps=eps
        )
        self._keep(total)
        return y


Map: TypeAlias = Tensor | Sum
"""What goes from layer to layer."""


def value(x: Map) -> Tensor:
    """A map's tensor."""
    return x.value() if isinstance(x, Sum) else x
