"""The attention kernels err no more than PyTorch at the same dtype, forward and backward, against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fastdiff.kernels import attention as kernels
from fastdiff.kernels import launch, reference
from helpers.kernel_checks import DEVICE, DTYPES, LOW, assert_no_worse, error, normal, results
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (B, L, N, D). Up to 128 positions the backward is one kernel (in 16-bit types), up to 256 two; then block by block.
SHAPES = {
    "one position": (2, 1, 3, 8),
    "length and head size no powers of two": (2, 17, 3, 24),
    "heads that fill no step of channels": (1, 33, 2, 40),
    "three heads of 96": (1, 16, 3, 96),
    "a head of 144": (1, 64, 1, 144),
    "the widest head": (1, 20, 1, 512),
    "the longest whole matrix": (1, 128, 1, 64),
    "a row past the whole matrix": (1, 129, 2, 24),
    "the longest row": (1, 256, 1, 32),
    "one past the longest row": (1, 257, 1, 24),
}


def inputs(B: int, L: int, N: int, D: int, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    """Make qkv and an upstream gradient."""
    return normal(B, L, 3 * N * D, dtype=dtype, **options), normal(B, L, N * D, seed=1, dtype=dtype)


def check(qkv: Tensor, upstream: Tensor, N: int) -> None:
    by = [lambda x: kernels.attention(x, N), lambda x: reference.attention(x, N)]
    got, torchs = (results(function, [qkv], upstream) for function in by)
    exact = results(by[1], [qkv], upstream, torch.float64)
    for name, *values in zip(("out", "dqkv"), got, torchs, exact, strict=True):
        assert_no_worse(*values, what=name)


# --- results ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_out_and_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(*inputs(*shape, dtype, mean=0.5), shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [24, 140, 260])
def test_inputs_around_three(L: int, dtype: torch.dtype) -> None:
    """Scores are around 9 * sqrt(D), and only their differences matter."""
    check(*inputs(1, L, 1, 16, dtype, mean=3.0), 1)


@pytest.mark.parametrize("L", [20, 140, 260])
def test_scores_far_below_zero(L: int) -> None:
    """exp(-lse) overflows here, and positions that only fill up a block must not become inf * 0.

    float32 is not tested: it rounds lse = -300 by 2e-5, and P relatively as much if no program has a whole row.
    """
    qkv, upstream = inputs(1, L, 1, 24, torch.bfloat16, mean=8.0)
    qkv[:, :, 24:48].neg_()
    check(qkv, upstream, 1)


def test_products_past_the_range_of_float16() -> None:
    """q . k exceeds 65504 before it is scaled, so it must be held in float32."""
    qkv, upstream = inputs(1, 32, 1, 64, torch.float16)
    qkv[:, :, :128] *= 60
    k = qkv[0, :, 64:128].float()
    assert (qkv[0, :, :64].float() @ k.T).abs().max() > 65504
    check(qkv, upstream, 1)


def test_result_in_chunks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program writes 16 of 24 channels, as with head sizes of 264 and more, and the last one writes 8."""
    choose = kernels.config_for
    monkeypatch.setattr(
        kernels, "config_for", lambda *args, **options: dataclasses.replace(choose(*args, **options), block_out=16)
    )
    check(*inputs(1, 257, 1, 24, torch.bfloat16), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [17, 64, 140, 257])
def test_bias_of_the_projection(L: int, dtype: torch.dtype) -> None:
    """Its gradient is the sum of dqkv, up to 256 positions before that is rounded; all else stays as it is.

    That of k's bias would be 0 without rounding, because the softmax does not depend on it.
    """
    N, D = 2, 24
    qkv, upstream = inputs(3, L, N, D, dtype, mean=0.5)
    bias = normal(3 * N * D, seed=2).requires_grad_()
    out, dqkv = results(lambda x: kernels.attention(x, N), [qkv], upstream)
    _, exact = results(lambda x: reference.attention(x, N), [qkv], upstream, torch.float64)
    x = qkv.detach().requires_grad_()
    y = kernels.attention(x, N, bias)
    dx, dbias = torch.autograd.grad(y, [x, bias], upstream)
    assert torch.equal(y, out)
    assert torch.equal(dx, dqkv)
    of_map = dqkv.double().sum(dim=(0, 1)).float()
    assert_no_worse(dbias, of_map, exact.sum(dim=(0, 1)), "dbias")


@pytest.mark.parametrize("L", [20, 257])
def test_log_sum_exp(L: int) -> None:
    N = 2 if L < 100 else 1
    qkv = normal(1, L, 3 * N * 16, mean=0.5).requires_grad_()
    out, lse = torch.ops.fastdiff.attention(qkv, N)
    q, k, _ = qkv.detach().double().view(1, L, N, 3, 16).permute(3, 0, 2, 1, 4).unbind(0)
    exact = (q @ k.mT / 4).logsumexp(dim=-1)
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.dtype == torch.float32
    assert error(lse, exact) <= 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


@pytest.mark.parametrize("L", [32, 140, 257])
def test_equal_results_twice(L: int) -> None:
    qkv, upstream = inputs(1, L, 1, 16, torch.bfloat16)
    first, second = (results(lambda x: kernels.attention(x, 1), [qkv], upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_images() -> None:
    qkv, bias = normal(0, 16, 48).requires_grad_(), normal(48).requires_grad_()
    out = kernels.attention(qkv, 2, bias)
    out.backward(torch.empty_like(out))
    assert out.shape == (0, 16, 16)
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape
    assert bias.grad is not None
    assert not bias.grad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 15 GB, and too long without a GPU")
def test_more_than_two_billion_numbers() -> None:
    B = 2**31 // (16 * 3 * 64) + 2
    few = normal(3, 16, 3 * 64, dtype=torch.bfloat16)
    many = few[torch.arange(B, device=DEVICE) % 3]
    upstream = normal(3, 16, 64, seed=1, dtype=torch.bfloat16)
    expected = results(lambda x: kernels.attention(x, 1), [few], upstream)
    got = results(lambda x: kernels.attention(x, 1), [many], upstream[torch.arange(B, device=DEVICE) % 3])
    for i in range(B - 3, B):
        assert all(torch.equal(a[i], b[i % 3]) for a, b in zip(got, expected, strict=True))


# --- inputs that are refused or copied ---


@pytest.mark.parametrize(
    ("shape", "N", "dtype", "reason"),
    [
        ((1, 4, 36), 1, torch.float32, "head size 12"),
        ((1, 4, 3 * 520), 1, torch.float32, "head size 520"),
        ((1, 4, 0), 1, torch.float32, "head size 0"),
        ((1, 4, 48), 5, torch.float32, "5 heads"),
        ((1, 4, 48), 0, torch.float32, "0 heads"),
        ((4, 48), 1, torch.float32, "shape"),
        ((1, 4, 48), 1, torch.float64, "float64"),
        ((1, 2**20, 3 * 1024), 2, torch.bfloat16, "2\\^31"),
    ],
)
def test_refused(shape: tuple[int, ...], N: int, dtype: torch.dtype, reason: str) -> None:
    qkv = torch.empty(shape, dtype=dtype, device="meta")
    assert len(shape) < 3 or kernels.unsupported(dtype, *shape[1:], N)
    with pytest.raises(ValueError, match=reason):
        launch.IMPLEMENTATIONS["attention"](qkv, N)


@pytest.mark.parametrize("D", [8, 64, 96, 128, 144, 192, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supported(D: int, dtype: torch.dtype) -> None:
    assert kernels.unsupported(dtype, 64, 3 * 2 * D, 2) == ""


def test_other_layouts_are_copied_with_one_warning() -> None:
    qkv, upstream = inputs(2, 16, 1, 16, torch.float32)
    out, dqkv = results(lambda x: kernels.attention(x, 1), [qkv], upstream)
    launch._warn_once.cache_clear()
    x = qkv.mT.contiguous().mT.requires_grad_()
    with pytest.warns(UserWarning, match="attention: qkv") as warned:
        y = kernels.attention(x, 1)
    with pytest.warns(UserWarning, match="attention: the gradient"):
        (dx,) = torch.autograd.grad(y, x, upstream.mT.contiguous().mT)
    assert len(warned) == 1
    kernels.attention(x, 1)  # a second warning would be an error
    assert torch.equal(y, out)
    assert torch.equal(dx, dqkv)


# --- registration as a torch op ---


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    (qkv, upstream), bias = inputs(1, 16, 2, 8, dtype), normal(48).requires_grad_()
    out, lse = torch.ops.fastdiff.attention(qkv, 2)
    for more in ((), (bias,)):
        torch.library.opcheck(torch.ops.fastdiff.attention.default, (qkv.detach().requires_grad_(), 2, *more))
        given = (upstream, qkv, out, lse, 2, *(each.detach() for each in more))
        torch.library.opcheck(torch.ops.fastdiff.attention_backward.default, given)


def test_compiled() -> None:
    qkv, upstream = inputs(2, 16, 2, 8, torch.bfloat16)

    def twice(x: Tensor) -> Tensor:
        return kernels.attention(x * 2, 2) + 1

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    for got, expected in zip(*(results(f, [qkv], upstream) for f in (compiled, twice)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("L", [64, 256, 1024])
def test_no_score_matrix_in_memory(L: int) -> None:
    """No argument of a kernel is larger than qkv, while the scores would be five times as large."""
    with launch.record() as launches:
        qkv = torch.empty(2, L, 3 * 16, dtype=torch.bfloat16, device="meta")
        out, lse = launch.IMPLEMENTATIONS["attention"](qkv, 2)
        launch.IMPLEMENTATIONS["attention_backward"](out, qkv, out, lse, 2)
    sizes = [x.nbytes for made in launches for x in made.args if isinstance(x, Tensor)]
    assert len(launches) == {64: 2, 256: 3, 1024: 4}[L]
    assert max(sizes) == qkv.nbytes < 2 * 2 * L * L * 4 / 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_choices(dtype: torch.dtype) -> None:
    """Kernels rely on sizes that are powers of two from 16 up, and on whole rows of scores up to SHORT."""
    for L in (1, 16, 17, 64, 100, 128, 129, 256, 257, 4096):
        for D in (*range(8, 200, 8), 256, 264, 512):
            for backward in (False, True):
                c = kernels.config_for(L, D, dtype, backward)
                for size in (c.rows, c.columns, c.block_d, c.block_out or 16):
                    assert size >= 16
                    assert size & (size - 1) == 0
                assert c.columns >= L or L > kernels.SHORT
                assert c.rows <= c.columns or L > kernels.SHORT
