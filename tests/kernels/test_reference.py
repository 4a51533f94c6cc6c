"""The definitions of the ops agree with known answers and with float64 re-statements."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastdiff.kernels import reference
from helpers.kernel_checks import error
from helpers.waits import Waits
from torch import Tensor

from fastdiff import ops

# --- noise from counters ---

# "kat_vectors" of Random123 (Salmon et al. 2011): philox4x32 with 10 rounds; counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    counters = [torch.tensor([[c]]) for c in words(counter)]
    found = reference.philox(k0 | k1 << 32, *counters)
    assert [int(word) for word in found] == words(expected)


def test_image_noise_is_standard_normal() -> None:
    """Mean, variance, skewness and kurtosis of 2^20 values are within 5 standard errors."""
    x = ops.image_noise(1, torch.arange(64), 0, (4, 64, 64)).double().flatten()
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    # Of a million, about 0.6 lie beyond 5; Box-Muller on 32 bits ends at 6.66.
    assert 4 < x.abs().max() < 6.7


def test_image_noise_is_independent() -> None:
    """Images, draws, seeds, keys and neighbours within an image are uncorrelated to within 2^16 values' error."""
    shape = (1, 256, 256)
    n = math.prod(shape)
    index = torch.tensor([0, 1, 2**32, 2**32 + 1])
    fields = [ops.image_noise(seed, index, draw, shape).flatten(1) for seed in (0, 1, 1 << 32) for draw in (0, 1)]
    rows = torch.cat(fields).double()
    correlation = rows @ rows.T / n
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / n**0.5  # the largest of 276
    for lag in (1, 2, 3, 4, 256):
        assert abs((rows[:, lag:] * rows[:, :-lag]).mean()) < 5 / (rows.shape[0] * n) ** 0.5


def test_image_noise_does_not_depend_on_the_batch() -> None:
    """The noise of a smaller image is a prefix of that of a larger one."""
    index = torch.tensor([5, 0, 2**33 + 7, 5])
    together = ops.image_noise(3, index, 2, (3, 5, 7))
    for row, i in enumerate(index):
        assert torch.equal(ops.image_noise(3, i[None], 2, (3, 5, 7))[0], together[row])
    assert torch.equal(together[0], together[3])
    assert torch.equal(ops.image_noise(3, index, 2, (3, 5, 2)).flatten(1), together.flatten(1)[:, : 3 * 5 * 2])
    assert together.dtype == torch.float32
    assert ops.image_noise(3, index[:0], 2, (3, 5, 7)).shape == (0, 3, 5, 7)


def test_counters_copy_nothing_to_the_device() -> None:
    """A training step draws timesteps inside a CUDA graph, which refuses copies of the host's numbers."""
    with Waits() as waits:
        reference.image_uniform(0, torch.arange(3), 1)
        reference.image_noise(0, torch.arange(3), 1, (3, 4, 4))
        reference.image_noise(0, torch.arange(3), torch.arange(3), (3, 4, 4))
    assert not waits.seen


def test_image_uniform() -> None:
    n = 2**16
    u = ops.image_uniform(0, torch.arange(n), 0)
    assert u.dtype == torch.float64
    assert 0 < u.min() < 5 / n
    assert 1 - 5 / n < u.max() < 1
    u_sorted = u.sort().values
    distance = (u_sorted - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert distance < 2 / n**0.5  # Kolmogorov-Smirnov: exceeded with probability 2 exp(-2 * 2²) = 7e-4
    assert torch.equal(ops.image_uniform(0, torch.arange(7), 0), u[:7])


# --- group norm and SiLU ---


def exact_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    groups: int = 32,
    eps: float = 1e-5,
) -> Tensor:
    """Compute the definition in float64."""
    x = x.double()
    B, C, H, W = x.shape
    grouped = x.reshape(B, groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    variance = (grouped - mean).square().mean(dim=2, keepdim=True)
    h = ((grouped - mean) / (variance + eps).sqrt()).reshape(B, C, H, W)
    h = h * weight.double()[None, :, None, None] + bias.double()[None, :, None, None]
    if scale is not None and shift is not None:
        h = h * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    return h / (1 + (-h).exp()) if silu else h


def normal(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Norm = Callable[..., Tensor]


@pytest.fixture(params=[reference.group_norm_silu, ops.group_norm_silu], ids=["reference", "ops"])
def group_norm_silu(request: pytest.FixtureRequest) -> Norm:
    """The definition, and the op that models use."""
    return request.param


NORM_SHAPES = {"one pixel": (2, 64, 1, 1), "not square": (3, 96, 5, 7), "one channel a group": (1, 32, 4, 4)}


@pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES)
@pytest.mark.parametrize("modulated", [False, True], ids=["", "modulated"])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
def test_group_norm(group_norm_silu: Norm, shape: tuple[int, ...], modulated: bool, silu: bool) -> None:
    """For off-centre input, results err by 1e-5 of their size and the parameters' gradients, which are sums, by 2e-5.

    The input's gradient is a difference of terms of size d = (1 + |mean| / std) / std times the upstream gradient,
    where mean and std are the group's: each is rounded to 2^-24 of itself. (A group of two pixels may have a std far
    below 1.)
    """
    x = normal(*shape, mean=3.0).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(shape[1], seed=1, mean=1.0), normal(shape[1], seed=2)
    scale, shift = (normal(*shape[:2], seed=s) if modulated else None for s in (3, 4))
    inputs = [t for t in (x, weight, bias, scale, shift) if t is not None]
    upstream = normal(*shape, seed=5)
    results = []
    for function, dtype in ((group_norm_silu, torch.float32), (exact_norm, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        extra = {"scale": leaves[3], "shift": leaves[4]} if modulated else {}
        y = function(*leaves[:3], silu=silu, **extra)
        results.append((y, torch.autograd.grad(y, leaves, upstream.to(dtype))))
    (ours, our_gradients), (exact, exact_gradients) = results
    assert ours.dtype == torch.float32
    assert error(ours, exact) < 1e-5 * max(1, exact.abs().max().item())
    for got, want in zip(our_gradients[1:], exact_gradients[1:], strict=True):
        assert error(got, want) < 2e-5 * max(1, want.abs().max().item())
    groups = x.double().reshape(shape[0], 32, -1)
    spread = (groups.var(dim=2, correction=0) + 1e-5).sqrt()
    size = (1 + groups.mean(dim=2).abs() / spread) / spread * upstream.abs().max() * weight.abs().max()
    if modulated:
        size = size * (1 + inputs[3]).abs().max()
    bound = 16 * 2**-24 * size.repeat_interleave(shape[1] // 32, dim=1)[:, :, None, None]
    assert ((our_gradients[0].double() - exact_gradients[0]).abs() < bound).all()


def test_group_norm_far_off_centre(group_norm_silu: Norm) -> None:
    """With mean 100 and spread 0.1, E[x²] - E[x]² in float32 would lose all but one digit of the variance.

    The input's own rounding, 2^-24 * 100 / 0.1 = 6e-5 of a spread, affects both results alike. The bound is for the
    rounding of the mean: a few times 100 * 2^-24 over the spread.
    """
    x = normal(2, 64, 8, 8, mean=100.0, std=0.1)
    weight, bias = torch.ones(64), torch.zeros(64)
    exact = exact_norm(x, weight, bias, silu=False)
    assert error(group_norm_silu(x, weight, bias, silu=False), exact) < 5 * 100 * 2**-24 / 0.1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_group_norm_of_two_maps(group_norm_silu: Norm, layout: torch.memory_format) -> None:
    """A skip counts as if it were concatenated, and groups may contain channels of both maps."""
    x, skip = normal(2, 64, 4, 6, mean=3.0), normal(2, 32, 4, 6, seed=1)
    x, skip = x.contiguous(memory_format=layout), skip.contiguous(memory_format=layout)
    weight, bias = normal(96, seed=2), normal(96, seed=3)
    together = group_norm_silu(torch.cat([x, skip], dim=1), weight, bias)
    assert torch.equal(group_norm_silu(x, weight, bias, skip=skip), together)
    assert error(together, exact_norm(torch.cat([x, skip], dim=1), weight, bias)) < 1e-5 * 10
    assert together.is_contiguous(memory_format=layout)
    conv, offset = normal(48, 96, 1, 1, seed=4), normal(48, seed=5)
    expected = F.conv2d(torch.cat([x, skip], dim=1), conv, offset)
    torch.testing.assert_close(ops.skip_conv1x1(x, skip, conv, offset), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision(group_norm_silu: Norm, dtype: torch.dtype) -> None:
    """Arithmetic is in float32, so that the result errs by one rounding: half a unit in the last place."""
    x = normal(2, 64, 8, 8, mean=3.0).to(dtype)
    weight, bias = normal(64, seed=1), normal(64, seed=2)
    y = group_norm_silu(x, weight, bias)
    exact = exact_norm(x, weight, bias)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_group_norm_dropout(group_norm_silu: Norm, p: float) -> None:
    """Elements are zero with probability p, and otherwise multiplied by 1 / (1 - p)."""
    x = normal(4, 64, 16, 16, mean=3.0)
    weight, bias = torch.ones(64), torch.zeros(64)
    torch.manual_seed(0)
    dropped = group_norm_silu(x, weight, bias, dropout=p)
    whole = group_norm_silu(x, weight, bias)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (whole / (1 - p))[kept])
    share = kept.double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert torch.equal(group_norm_silu(x, weight, bias, dropout=0.0), whole)


# --- attention ---


def exact_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Compute attention head by head in float64, from the layout [head][q, k, v][channel]."""
    qkv = qkv.double()
    D = qkv.shape[2] // (3 * num_heads)
    outputs = []
    for head in range(num_heads):
        q, k, v = (qkv[..., (3 * head + i) * D : (3 * head + i + 1) * D] for i in range(3))
        scores = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(D)
        outputs.append(torch.einsum("bij,bjd->bid", scores.softmax(dim=-1), v))
    return torch.cat(outputs, dim=2)


ATTENTION = {"reference": reference.attention, "ops": ops.attention}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("L", "heads", "D"), [(1, 1, 32), (16, 4, 16), (35, 2, 24), (64, 1, 160)])
def test_attention(name: str, L: int, heads: int, D: int) -> None:
    """Sums of D and L terms in float32 err by 1e-5 of values of order 1."""
    qkv = normal(2, L, 3 * heads * D, std=1.5)
    upstream = normal(2, L, heads * D, seed=1)
    results = []
    for function, dtype in ((ATTENTION[name], torch.float32), (exact_attention, torch.float64)):
        leaf = qkv.detach().to(dtype).requires_grad_()
        y = function(leaf, heads)
        results.append((y, torch.autograd.grad(y, leaf, upstream.to(dtype))[0]))
    (ours, our_gradient), (exact, exact_gradient) = results
    assert error(ours, exact) < 1e-5 * max(1, exact.abs().max().item())
    assert error(our_gradient, exact_gradient) < 2e-5 * max(1, exact_gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_half_precision(dtype: torch.dtype) -> None:
    """The fused op errs at most twice as much as the definition at the same dtype, or by one rounding of the result."""
    qkv = normal(2, 49, 3 * 4 * 16, std=2.0).to(dtype)
    exact = exact_attention(qkv, 4)
    budget = 2 * error(reference.attention(qkv, 4), exact) + torch.finfo(dtype).eps * exact.abs().max().item()
    assert error(ops.attention(qkv, 4), exact) <= budget
    assert ops.attention(qkv, 4).dtype == dtype


def test_attention_of_large_scores() -> None:
    """The softmax of scores in the thousands neither overflows nor spreads."""
    qkv = normal(1, 8, 3 * 32, std=40.0)
    for function in ATTENTION.values():
        y = function(qkv, 1)
        assert y.isfinite().all()
        assert error(y, exact_attention(qkv, 1)) < 1e-2 * 40


# --- upsampling, averages ---


def test_upsample_conv() -> None:
    """Each pixel becomes four, followed by a 3x3 convolution; results and gradients agree with float64."""
    x, weight, bias = normal(2, 5, 3, 4), normal(7, 5, 3, 3, seed=1), normal(7, seed=2)
    upstream = normal(2, 7, 6, 8, seed=3)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        large = F.pad(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), (1, 1, 1, 1))
        total = bias[None, :, None, None].expand(2, 7, 6, 8)
        for i in range(3):
            for j in range(3):
                total = total + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], large[:, :, i : i + 6, j : j + 8])
        return total

    results = []
    for function, dtype in ((ops.upsample_conv, torch.float32), (exact, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, upstream.to(dtype))))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert error(got, want) < 1e-5 * want.abs().max().item()


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9999])
def test_update_ema(rate: float) -> None:
    shapes = [(3,), (2, 5), (4, 3, 3, 3)]
    averages = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    sources = [normal(*shape, seed=9 + i) for i, shape in enumerate(shapes)]
    before = [a.double() for a in averages]
    places = [a.data_ptr() for a in averages]
    ops.update_ema(averages, sources, rate)
    assert [a.data_ptr() for a in averages] == places
    for got, old, source in zip(averages, before, sources, strict=True):
        want = rate * old + (1 - rate) * source.double()
        assert error(got, want) <= 2 * 2**-24 * (old.abs() + source.abs()).max().item()


def test_many_small_updates_of_an_average() -> None:
    """10,000 steps at 0.9999 leave 0.9999^10000 of the start, with a rounding error of at most 2^-24 per step."""
    average = [torch.zeros(16)]
    for _ in range(10_000):
        ops.update_ema(average, [torch.ones(16)], 0.9999)
    assert error(average[0], torch.full((16,), 1 - 0.9999**10_000, dtype=torch.float64)) < 10_000 * 2**-24
