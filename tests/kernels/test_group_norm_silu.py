"""The Triton group norm agrees with float64 and with torch at the same dtype."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastdiff.kernels import launch, reference
from fastdiff.kernels.group_norm_silu import drop_below, group_norm_silu
from fastdiff.kernels.group_norm_silu_kernels import _quotient
from fastdiff.kernels.group_norm_silu_plan import plan
from helpers.kernel_checks import DEVICE, DTYPES, LOW, assert_no_worse, channels_last, error, normal
from helpers.norm_plans import WAYS, planned
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

Inputs = dict[str, Any]


def inputs(
    B: int, C1: int, C2: int, H: int, W: int, dtype: torch.dtype, *, affine: bool = True, offset: bool = True,
    mean: float = 3.0, std: float = 1.0,
) -> Inputs:  # fmt: skip
    C = C1 + C2
    made: Inputs = {
        "x": channels_last(normal(B, C1, H, W, mean=mean, std=std, dtype=dtype)),
        "weight": normal(C, seed=1, mean=1.0),
        "bias": normal(C, seed=2),
    }
    if C2:
        made["skip"] = channels_last(normal(B, C2, H, W, seed=3, mean=-mean, std=2 * std, dtype=dtype))
    if affine:  # halves of one tensor, as the embedding's projection gives them
        made["scale"], made["shift"] = normal(B, 2 * C, seed=4).chunk(2, dim=1)
    if offset:
        made["offset"] = normal(B, C, seed=5)
    return made


def run(function: Any, given: Inputs, upstream: Tensor, dtype: torch.dtype | None = None, **settings: Any) -> Inputs:
    """Return output and gradients by name."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in given.items()}
    y = function(**leaves, **settings)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(given: Inputs, dtype: torch.dtype, **settings: Any) -> Inputs:
    """Assert that output and gradients err at most twice as much as torch's at the same dtype."""
    B, C1, H, W = given["x"].shape
    C = C1 + (given["skip"].shape[1] if "skip" in given else 0)
    upstream = channels_last(normal(B, C, H, W, seed=6, mean=0.5, dtype=dtype))
    exact = run(reference.group_norm_silu, given, upstream, torch.float64, **settings)
    theirs = run(reference.group_norm_silu, given, upstream, **settings)
    ours = run(group_norm_silu, given, upstream, **settings)
    for name in exact:
        assert_no_worse(ours[name], theirs[name], exact[name], name)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    return ours


LONG_BLOCKS = {"whole": {"rows": 64, "block_l": 64}, "parts": {"whole": False, "rows": 64, "block_l": 64}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_through_memory(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """5x3 pixels fill no block in any way, and groups contain channels of both maps."""
    planned(monkeypatch, **WAYS[way])
    check(inputs(2, 64, 32, 5, 3, dtype), dtype)


SHAPES = {
    "one pixel": (2, 128, 0, 1, 1),
    "batch of one": (1, 32, 0, 4, 4),
    "6 channels per group": (1, 192, 0, 2, 3),
    "18 channels per group": (1, 576, 0, 2, 2),
    "42 channels per group": (1, 896, 448, 1, 2),
    "a group across both maps": (1, 40, 24, 3, 2),
    "not square": (1, 64, 0, 2, 9),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    check(inputs(*SHAPES[shape], torch.float32), torch.float32)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("affine", [True, False], ids=["scale", "no scale"])
def test_options(silu: bool, affine: bool) -> None:
    given = inputs(2, 64, 0, 3, 3, torch.bfloat16, affine=affine, offset=not silu)
    check(given, torch.bfloat16, silu=silu)


def test_vectors_with_gaps() -> None:
    """Vectors per channel need not lie close together."""
    given = inputs(2, 64, 0, 4, 3, torch.float32)
    given["weight"], given["bias"] = normal(128, seed=1, mean=1.0)[::2], normal(1, seed=2).expand(64)
    check(given, torch.float32)


@pytest.mark.parametrize("num_groups", [8, 16])
def test_other_group_counts(num_groups: int) -> None:
    check(inputs(1, 64, 0, 3, 3, torch.float32), torch.float32, num_groups=num_groups, eps=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_far_off_centre(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mean 100 and spread 0.1, E[x²] - E[x]² in float32 would leave one digit of the variance."""
    planned(monkeypatch, **WAYS[way])
    given = inputs(1, 64, 0, 4, 5, torch.float32, affine=False, offset=False, mean=100.0, std=0.1)
    check(given, torch.float32, silu=False)


def test_an_outlier_in_the_first_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums relative to the first value stay accurate when that value is the outlier."""
    planned(monkeypatch, **WAYS["parts"])
    given = inputs(1, 32, 0, 4, 5, torch.float32, affine=False, offset=False)
    given["x"][:, :, 0, 0] = 1e4
    check(given, torch.float32, silu=False)


def test_squares_that_overflow() -> None:
    """They give NaN, as PyTorch's do, which the guards of a run see, and no numbers that look like results."""
    given = inputs(1, 32, 0, 4, 4, torch.float32, affine=False, offset=False)
    given["x"] = given["x"] * 1e30
    assert group_norm_silu(**given).isnan().all()


def test_offset_gradient_is_the_sum_of_dx() -> None:
    """The gradient of the offset is that of a convolution's bias, from sums of the backward pass."""
    ours = check(inputs(2, 64, 0, 4, 4, torch.float32), torch.float32)
    assert error(ours["offset"], ours["x"].double().sum(dim=(2, 3))) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_one_offset_for_all_images(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset [C] gives what its expansion gives, and a gradient [C]."""
    planned(monkeypatch, **WAYS[way])
    given = inputs(3, 64, 0, 4, 3, torch.bfloat16)
    given["offset"] = given["offset"][0].bfloat16()
    ours = check(given, torch.bfloat16)
    wide = group_norm_silu(**{**given, "offset": given["offset"].expand(3, -1)})
    assert torch.equal(ours["y"], wide)
    assert ours["offset"].shape == (64,)
    assert ours["offset"].dtype == torch.bfloat16


def exact_dropout(given: Inputs, p: float, seed: Tensor) -> Tensor:
    """Apply dropout by the published generator, philox-4x32-7, with 16 bits per element."""
    y = reference.group_norm_silu(**{name: value.double() for name, value in given.items()})
    B, C, H, W = y.shape
    call = torch.arange(H * W * C // 8)[None].expand(B, -1)
    image = torch.arange(B)[:, None].expand_as(call)
    zero = torch.zeros_like(call)
    words = reference.philox(int(seed), call, image, zero, zero, rounds=7)
    bits = torch.stack([half for shift in (0, 16) for half in ((w >> shift) & 0xFFFF for w in words)], dim=-1)
    keep = (bits.view(B, H, W, C).permute(0, 3, 1, 2) >= drop_below(p)).to(y.device)
    return y * keep / (1 - drop_below(p) / 2**16)


def check_dropout(given: Inputs) -> Inputs:
    """Assert that forward and backward pass use the mask of the definition."""
    B, C1, H, W = given["x"].shape
    upstream = channels_last(normal(B, given["weight"].shape[0], H, W, seed=6))
    seed = torch.tensor([123456789123], device=DEVICE)
    ours = run(group_norm_silu, given, upstream, dropout=0.3, seed=seed)
    exact = run(lambda **kw: exact_dropout(kw, 0.3, seed), given, upstream, torch.float64)
    for name in exact:
        assert error(ours[name], exact[name]) < 2e-5 * max(1.0, exact[name].abs().max().item()), name
    return ours


@pytest.mark.parametrize("way", WAYS)
def test_dropout(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, **WAYS[way])
    ours = check_dropout(inputs(2, 64, 32, 3, 5, torch.float32))
    dropped = (ours["y"] == 0).double().mean().item()
    assert abs(dropped - 0.3) < 5 * (0.21 / ours["y"].numel()) ** 0.5


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (6, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("way", LONG_BLOCKS)
def test_a_block_longer_than_the_map(
    way: str, size: tuple[int, int], dropout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows of the block have no pixel; their empty sums must not reach the result as 0 / 0."""
    planned(monkeypatch, **LONG_BLOCKS[way])
    given = inputs(2, 64, 32, *size, torch.float32)
    if dropout:
        check_dropout(given)
    else:
        check(given, torch.float32)


def test_dropout_with_the_real_plan() -> None:
    """Pixels that fill no block, channels that fill no power of two."""
    check_dropout(inputs(3, 576, 0, 7, 7, torch.float32))


def test_dropout_seeds() -> None:
    """Without a seed torch's generator gives one, and a probability that rounds to 0 drops nothing."""
    given = inputs(1, 64, 0, 2, 2, torch.float32)
    torch.manual_seed(7)
    first, second = (group_norm_silu(**given, dropout=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(first, group_norm_silu(**given, dropout=0.5))
    assert not torch.equal(first, second)
    assert torch.equal(group_norm_silu(**given, dropout=1e-6), group_norm_silu(**given))


@pytest.mark.parametrize("way", WAYS)
def test_equal_results_twice(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, **WAYS[way])
    given = inputs(2, 64, 32, 3, 3, torch.bfloat16)
    upstream = channels_last(normal(2, 96, 3, 3, seed=6, dtype=torch.bfloat16))
    first, second = (run(group_norm_silu, given, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_batch() -> None:
    ours = run(group_norm_silu, inputs(0, 64, 0, 2, 2, torch.float32), torch.empty(0, 64, 2, 2, device=DEVICE))
    assert ours["y"].shape == (0, 64, 2, 2)
    assert not ours["weight"].any()


@pytest.mark.parametrize("L", [16, 64, 256, 1024, 4096, 65536])
@pytest.mark.parametrize("C", [128, 192, 384, 576, 1152, 1344, 1536])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_plans(L: int, C: int, backward: bool) -> None:
    """Every shipped width and size gets whole groups, no lane without a channel or a pixel, and a full GPU."""
    for B in (1, 128):
        p = plan(B, L, C, 0, C // 32, 2, backward, 132)
        channels = p.tiles * p.block_c
        assert channels % (C // 32) == 0
        assert channels * p.chunks == C
        assert p.even
        assert p.splits * p.rows == L
        assert p.rows % p.block_l == 0
        assert p.block_c == 64
        assert p.whole or p.lag >= p.per_slab, "a ticket waits for parts of lower tickets only"
        assert p.programs >= min(132, B * L * C // 2**17)


@triton.jit
def _quotients(n_ptr, result_ptr, reciprocal, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result_ptr + o, _quotient(tl.load(n_ptr + o), reciprocal))


@pytest.mark.parametrize("divisor", [1, 3, 7, 48, 64, 513])
def test_quotient(divisor: int) -> None:
    """It is exact for all numbers below 2^22, the greatest and those next to multiples among them."""
    n = torch.arange(2**22, dtype=torch.int32, device=DEVICE)
    result = torch.empty_like(n)
    _quotients[(256,)](n, result, 1 / divisor, BLOCK=2**14)
    assert torch.equal(result, n // divisor)


@pytest.mark.parametrize("B", [1, 2**12, 2**16])
def test_parts_can_be_numbered(B: int) -> None:
    """A plan has fewer than the 2^22 tickets that `_quotient` divides exactly."""
    p = plan(B, 4096, 24, 0, 1, 2, False, 132)
    assert p.parts + p.lag < 2**22


def test_a_plan_is_made_once() -> None:
    """Without the cache a compiled step would spend a third of the host's time on plans."""
    arguments = (256, 1024, 128, 128, 8, 2, True, 132)
    assert plan(*arguments) is plan(*arguments)


def test_offsets_beyond_2_31() -> None:
    """No argument of a kernel exceeds 32 bits for 3 * 2^30 elements: offsets come from an int64 image number."""
    B, L, C = 3 * 2**14, 1024, 64
    meta = torch.empty(B, 32, 32, C, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    one = torch.empty(C, device="meta")
    assert meta.numel() > 2**31
    with launch.record() as launches:
        launch.IMPLEMENTATIONS["group_norm_silu"](meta, None, one, one, None, None, None, None, 32, 1e-5, True, 0.0)
    assert all(abs(arg) < 2**31 for each in launches for arg in each.args if isinstance(arg, int))
    assert B * L * C > 2**31


@pytest.mark.filterwarnings("ignore:.*another layout")  # opcheck's own gradients are channels-first
def test_torch_checks() -> None:
    """Schema, fake implementation and autograd registration agree with what the op does."""
    given = inputs(1, 32, 32, 2, 2, torch.float32)
    for name in given:
        given[name].requires_grad_()
    args = [given.get(n) for n in ("x", "skip", "weight", "bias", "scale", "shift", "offset")]
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, (*args, None, 32, 1e-5, True, 0.0))


def test_compiles_whole() -> None:
    """The op compiles in one graph and gives the same results and gradients."""
    given = inputs(1, 64, 0, 2, 3, torch.float32)
    upstream = channels_last(normal(1, 64, 2, 3, seed=6))
    whole = torch.compile(lambda **kw: group_norm_silu(**kw) * 2, fullgraph=True, backend="aot_eager")
    ours = run(whole, given, upstream)
    plain = run(lambda **kw: group_norm_silu(**kw) * 2, given, upstream)
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_layout_is_converted_with_one_warning() -> None:
    launch._warn_once.cache_clear()
    given = inputs(1, 64, 0, 3, 2, torch.float32)
    expected = group_norm_silu(**given)
    given["x"] = given["x"].contiguous()
    with pytest.warns(UserWarning, match="group_norm_silu: x came in another layout than channels-last"):
        assert torch.equal(group_norm_silu(**given), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_norm_silu(**given)


BAD = {
    "float64": (
        {"x": torch.zeros(1, 64, 2, 2, dtype=torch.float64)},
        "float32, bfloat16 or float16; got torch.float64",
    ),
    "sequence": ({"x": torch.zeros(1, 64, 4)}, r"a map x \[B, C, H, W\]; got x \(1, 64, 4\)"),
    "groups": ({"x": torch.zeros(1, 72, 2, 2)}, "channels divisible by 32 groups; got 72"),
    "multiples of 8": ({"x": torch.zeros(1, 36, 2, 2), "skip": torch.zeros(1, 28, 2, 2)}, "multiples of 8; got 36"),
    "skip's size": ({"skip": torch.zeros(1, 32, 3, 2)}, r"skip with the batch and size of x"),
    "skip's dtype": ({"skip": torch.zeros(1, 32, 2, 2).half()}, "skip in the dtype of x, torch.float32"),
    "weight": ({"weight": torch.zeros(32)}, r"weight of shape \(64,\), one per channel; got \(32,\)"),
    "scale": ({"scale": torch.zeros(1, 64, 1, 1), "shift": torch.zeros(1, 64)}, r"scale of shape \(B, C\) = \(1, 64\)"),
    "half": ({"scale": torch.zeros(1, 64)}, "scale and shift together; got only one"),
    "offset": ({"offset": torch.zeros(32)}, r"offset of shape \(B, C\) = \(1, 64\); got \(32,\)"),
    "one group": ({"x": torch.zeros(1, 4096 + 1024, 1, 1)}, "at most 128 channels in a group; got 160"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    changes, message = BAD[what]
    changes = {name: value.to(DEVICE) for name, value in changes.items()}
    x = changes.get("x", torch.zeros(1, 64, 2, 2, device=DEVICE))
    given = {"x": x, "weight": torch.ones(64, device=DEVICE), "bias": torch.zeros(64, device=DEVICE), **changes}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**given)


def test_low_precision_gradients_of_parameters_stay_float32() -> None:
    for dtype in LOW:
        ours = check(inputs(1, 32, 0, 3, 3, dtype), dtype)
        assert ours["weight"].dtype == ours["offset"].dtype == torch.float32
        assert ours["x"].dtype == dtype


def test_parameters_in_half_precision() -> None:
    """DeepSpeed keeps parameters like this in bf16 training; a bias is one row for all images."""
    given = inputs(2, 32, 0, 3, 3, torch.bfloat16)
    for name in ("weight", "bias", "offset"):
        given[name] = given[name].bfloat16()
    ours = check(given, torch.bfloat16)
    assert ours["weight"].dtype == ours["offset"].dtype == torch.bfloat16
    given["offset"] = given["offset"][:1].expand(2, -1)
    check(given, torch.bfloat16)
