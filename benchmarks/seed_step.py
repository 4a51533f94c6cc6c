"""The baseline of fastdiff's benchmarks: improved-diffusion's training step, its operations written out one by one.

It is eager and channels-first, and has group norm through float32, x * sigmoid(x) as two operations, scale and shift
apart, concatenated skips, attention as two einsums with a float32 softmax, a loss that keeps all its intermediate maps,
the gradient norm read parameter by parameter, AdamW, and then the average parameter by parameter. In fp16 the
convolutions' weights are in half precision, with float32 master weights in one flat tensor. Parameters have the same
names as ours, so both sides start from the same weights, and improved-diffusion's own network can be used as well.

`SeedUNet.strengthen` gives the same network PyTorch's fused operations, for the variants that are the reference's
network as an expert would run it today.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import BackboneSettings, SuperResSettings


class Norm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Swish(nn.Module):
    fused = False

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.fused else x * torch.sigmoid(x)


class Residual(nn.Module):
    def __init__(self, c_in: int, emb: int, c_out: int, dropout: float, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(Norm(c_in), Swish(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(Swish(), nn.Linear(emb, 2 * c_out if scale_shift else c_out))
        self.out_layers = nn.Sequential(
            Norm(c_out), Swish(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        e = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    fused = False

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = Norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self._fused(x)
        b, c, *size = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x)).reshape(b * self.heads, -1, x.shape[2])
        d = qkv.shape[1] // 3
        q, k, v = qkv.split(d, dim=1)
        weight = torch.einsum("bct,bcs->bts", q / d**0.25, k / d**0.25)
        weight = weight.float().softmax(dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, x.shape[2])
        return (x + self.proj_out(h)).reshape(b, c, *size)

    def _fused(self, x: Tensor) -> Tensor:
        """The same with scaled_dot_product_attention. Of a channels-last map every rearrangement is a view.

        Queries, keys and values are [B, heads, L, D], contiguous in D, as flash attention needs them.
        """
        b, c, *size = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = F.linear(tokens, self.qkv.weight[..., 0], self.qkv.bias)
        q, k, v = qkv.view(b, tokens.shape[1], self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape)
        h = F.linear(h, self.proj_out.weight[..., 0], self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(b, c, *size)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Block(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Residual) else layer(x)
        return x


class SeedUNet(nn.Module):
    """The network, for the settings of ours: unconditional, class-conditional or super-resolution."""

    fused = False

    def __init__(self, s: BackboneSettings) -> None:
        super().__init__()
        self.width, emb = s.num_channels, 4 * s.num_channels
        self.time_embed = nn.Sequential(nn.Linear(self.width, emb), Swish(), nn.Linear(emb, emb))
        if s.class_cond:
            self.label_emb = nn.Embedding(s.num_labels, emb)
        self.enlarged = s.size_hw if isinstance(s, SuperResSettings) else None

        def stage(c_in: int, c_out: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [Residual(c_in, emb, c_out, s.dropout, s.use_scale_shift_norm)]
            return [*layers, Attention(c_out, s.num_heads)] if 2**level in s.attention_factors else layers

        c = self.width
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(s.network_in_channels, c, 3, padding=1))])
        skips = [c]
        for level, c_level in enumerate(s.level_channels):
            for _ in range(s.num_res_blocks):
                self.input_blocks.append(Block(*stage(c, c_level, level)))
                c = c_level
                skips.append(c)
            if level < len(s.level_channels) - 1:
                self.input_blocks.append(Block(Down(c)))
                skips.append(c)
        middle = [Residual(c, emb, c, s.dropout, s.use_scale_shift_norm) for _ in range(2)]
        self.middle_block = Block(middle[0], Attention(c, s.num_heads), middle[1])
        self.output_blocks = nn.ModuleList()
        for level, c_level in reversed(list(enumerate(s.level_channels))):
            for i in range(s.num_res_blocks + 1):
                layers = stage(c + skips.pop(), c_level, level)
                c = c_level
                if level and i == s.num_res_blocks:
                    layers.append(Up(c))
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(Norm(c), Swish(), nn.Conv2d(c, s.out_channels, 3, padding=1))

    def convert_to_fp16(self) -> None:
        """Convert the convolutions between the embedding and the last layer to half precision."""
        self.convert_convolutions(torch.float16)

    def convert_convolutions(self, dtype: torch.dtype) -> None:
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in blocks.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)

    def strengthen(self) -> SeedUNet:
        """Compute the same function by PyTorch's fused operations: SiLU, and scaled_dot_product_attention."""
        for module in self.modules():
            if isinstance(module, (Swish, Attention, SeedUNet)):
                module.fused = True
        return self

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        if low_res is not None and self.enlarged:
            x = torch.cat([x, F.interpolate(low_res, self.enlarged, mode="bilinear")], dim=1)
        half = self.width // 2
        made_on = x.device if self.fused else None  # the copy from the host waits for the GPU
        steps = torch.arange(half, dtype=torch.float32, device=made_on)
        frequencies = torch.exp(-math.log(10000) * steps / half).to(x.device)
        angles = timesteps[:, None].float() * frequencies[None]
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, kept = x.type(next(self.input_blocks.parameters()).dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            kept.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, kept.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


Losses = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""losses(network, x_start, t, what it is conditioned on) → {"loss": [B], …}"""


class SeedStep:
    """Takes one optimiser step: forward, loss, logging, backward, gradient norm, AdamW, average."""

    def __init__(
        self,
        model: Any,
        losses: Losses,
        num_timesteps: int,
        lr: float = 1e-4,
        ema_rate: float = 0.9999,
        fp16: bool = False,
    ) -> None:
        self.model, self.losses, self.num_timesteps, self.ema_rate = model.train(), losses, num_timesteps, ema_rate
        self.parameters = list(model.parameters())
        self.fp16 = fp16
        self.loss_scale = 2.0**12 if fp16 else 1.0
        self.masters = [p.detach().float() for p in self.parameters] if fp16 else self.parameters
        if fp16:
            self.masters = [nn.Parameter(torch.cat([p.flatten() for p in self.masters]))]
            model.convert_to_fp16()
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr)
        self.averages = [p.detach().clone() for p in self.masters]

    def __call__(self, images: Tensor, kwargs: dict[str, Tensor]) -> None:
        x_start = images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        t = torch.from_numpy(np.random.choice(self.num_timesteps, size=len(x_start))).to(images.device)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()
        terms = self.losses(self.model, x_start, t, kwargs)
        for values in terms.values():  # the log takes means, and every image's value for its quartile
            values.mean().item()
            zip(t.cpu().numpy(), values.detach().cpu().numpy(), strict=True)
        (terms["loss"].mean() * self.loss_scale).backward()
        if self.fp16:
            self._gradients_to_masters()
        math.sqrt(sum((p.grad**2).sum().item() for p in self.masters if p.grad is not None))
        self.optimizer.step()
        for average, p in zip(self.averages, self.masters, strict=True):
            average.detach().mul_(self.ema_rate).add_(p.detach(), alpha=1 - self.ema_rate)
        if self.fp16:
            self._masters_to_weights()

    def _gradients_to_masters(self) -> None:
        """Copy the gradients to the master weights. Gradients that overflowed halve the loss scale.

        improved-diffusion then skips the step; here it is taken with zeros for them, so that every step is timed whole.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        overflowed = any(not torch.isfinite(gradient).all() for gradient in gradients)
        self.masters[0].grad = torch.cat([gradient.detach().float().flatten() for gradient in gradients])
        self.masters[0].grad.mul_(1.0 / self.loss_scale)
        if overflowed:
            self.loss_scale /= 2
            self.masters[0].grad.nan_to_num_(0.0, 0.0, 0.0)

    def _masters_to_weights(self) -> None:
        parts = self.masters[0].detach().split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.detach().copy_(part.view_as(p))
