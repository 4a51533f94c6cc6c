"""The kernels that draw timesteps and sum up losses equal their definitions."""

from __future__ import annotations

import pytest
import torch
from fastdiff.kernels import reference_diffusion, timesteps
from helpers.kernel_checks import DEVICE, normal

SIZES = [(1, 1), (3, 1), (64, 7), (300, 250), (700, 4000)]
"""(images, timesteps): one and several programs, numbers of timesteps that are no powers of two."""


def table(T: int, seed: int) -> torch.Tensor:
    """Cumulative probabilities of T timesteps, of which every third is never drawn."""
    shares = torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shares[1::3] = 0.0
    return (shares / shares.sum() * 2.0**48).round().long().cumsum(0).to(DEVICE)


@pytest.mark.parametrize(("B", "T"), SIZES)
def test_timesteps_at(B: int, T: int) -> None:
    """They are equal, for the smallest and the largest random number as well."""
    uniform = torch.rand(B, dtype=torch.float64, generator=torch.Generator().manual_seed(B))
    uniform[0], uniform[-1] = 2.0**-33, 1 - 2.0**-33
    given = (uniform.to(DEVICE), table(T, B), normal(T).abs())
    t, weights = timesteps.timesteps_at(*given)
    expected_t, expected_weights = reference_diffusion.timesteps_at(*given)
    assert torch.equal(t, expected_t)
    assert torch.equal(weights, expected_weights)


def test_no_timesteps() -> None:
    t, weights = timesteps.timesteps_at(torch.empty(0, dtype=torch.float64, device=DEVICE), table(5, 0), normal(5))
    assert t.shape == weights.shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("B", "T"), SIZES)
def test_add_losses(B: int, T: int, count: int) -> None:
    """Sums agree to float64 rounding and counts are equal; rows of absent kinds stay as they are."""
    losses = list(normal(count, B, mean=1.0, std=3.0))
    if B > 2:
        losses[-1][1], losses[0][2] = float("nan"), float("-inf")
    t = torch.randint(T, (B,), generator=torch.Generator().manual_seed(T)).to(DEVICE)
    before = normal(3, 5, 3).double()
    got, expected = before.clone(), before.clone()
    given = (losses, t, normal(B, seed=1).abs(), T)
    timesteps.add_losses_(got, *given)
    reference_diffusion.add_losses_(expected, *given)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[count:], before[count:])


def test_refused_arguments() -> None:
    """Whatever the kernels would read wrongly is refused."""
    uniform, t, weights = torch.rand(4, dtype=torch.float64, device=DEVICE), torch.arange(4, device=DEVICE), normal(4)
    sums = torch.zeros(3, 5, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"timesteps_at needs uniform of shape \(4,\) in torch.float64; got .*float32"):
        timesteps.timesteps_at(uniform.float(), table(5, 0), normal(5))
    with pytest.raises(ValueError, match=r"timesteps_at needs importance of shape \(5,\)"):
        timesteps.timesteps_at(uniform, table(5, 0), normal(4))
    with pytest.raises(ValueError, match="needs one to three losses; got 4"):
        timesteps.add_losses_(sums, [normal(4)] * 4, t, weights, 10)
    with pytest.raises(ValueError, match=r"needs weights of shape \(4,\)"):
        timesteps.add_losses_(sums, [normal(4)], t, weights[:1], 10)
    with pytest.raises(ValueError, match=r"needs t of shape \(4,\) in torch.int64"):
        timesteps.add_losses_(sums, [normal(4)], t.int(), weights, 10)
    with pytest.raises(ValueError, match="needs contiguous sums"):
        timesteps.add_losses_(sums.transpose(0, 2), [normal(4)], t, weights, 10)
