"""The kept steps of a chain have the right number and ends, and are nearest to the levels of the spacing."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.diffusion import DiffusionSettings, create_diffusion, keep_steps
from fastdiff.diffusion.schedules import Schedule, spaced_steps

SPACINGS = ("uniform", "quadratic", "logsnr", "karras")


def chain(schedule: str, length: int) -> np.ndarray:
    return Schedule.create(schedule, length).alphas_cumprod


def noise(alphas_cumprod: np.ndarray) -> np.ndarray:
    return np.sqrt(1 / alphas_cumprod - 1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("schedule", "length"), [("linear", 1000), ("linear", 30), ("cosine", 4000), ("cosine", 12)])
def test_so_many_distinct_steps_from_0_to_sigma_max(schedule: str, length: int, spacing: str) -> None:
    a = chain(schedule, length)
    for sigma_max in (1.0, 80.0, 160.0, 1e9):
        available = int((noise(a) <= sigma_max).sum())
        for steps in {2, 3, 5, 10, 50, available - 1, available} & set(range(2, available + 1)):
            kept = spaced_steps(a, steps, spacing, sigma_max)
            assert len(kept) == steps
            assert kept == sorted(set(kept))
            assert (kept[0], kept[-1]) == (0, available - 1)
            assert all(isinstance(t, int) for t in kept)
        assert spaced_steps(a, 1, spacing, sigma_max) == [available - 1]


def test_the_noise_to_start_from() -> None:
    """The linear chain starts at its last step; the cosine chain, whose noise reaches 80,000, starts earlier."""
    linear, cosine = chain("linear", 1000), chain("cosine", 4000)
    assert spaced_steps(linear, 10, "uniform", 160.0)[-1] == 999
    last = spaced_steps(cosine, 10, "uniform", 160.0)[-1]
    assert noise(cosine)[last] <= 160 < noise(cosine)[last + 1]
    assert noise(cosine)[-1] > 80000
    assert spaced_steps(linear, 3, "uniform", float(noise(linear)[200]))[-1] == 200


def test_even_in_t_and_in_its_root() -> None:
    a = chain("linear", 1000)
    assert spaced_steps(a, 4, "uniform", 1e9) == [0, 333, 666, 999]
    assert spaced_steps(a, 4, "quadratic", 1e9) == [0, 111, 444, 999]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_nearest_noise_levels(schedule: str) -> None:
    """Steps even in log SNR or by EDM's equation 5 are rounded to the nearest level of the chain in log noise."""
    a = chain(schedule, 4000)
    levels = noise(a)
    levels = levels[levels <= 100]
    for spacing, towards, back in (
        ("logsnr", np.log, np.exp),
        ("karras", lambda level: level ** (1 / 7), lambda u: u**7),
    ):
        wanted = back(np.linspace(towards(levels[0]), towards(levels[-1]), 9))
        nearest = [int(np.abs(np.log(levels / level)).argmin()) for level in wanted]
        assert spaced_steps(a, 9, spacing, 100.0) == nearest


def test_steps_that_coincide_move_to_the_next() -> None:
    """Levels are sparse in log SNR at low noise, where a step that is taken is replaced by the next."""
    a = chain("linear", 1000)
    kept = spaced_steps(a, 60, "logsnr", 1e9)
    assert kept[:8] == list(range(8))
    gaps = np.diff(np.log(noise(a)[kept]))
    assert gaps[-20:].max() < 1.3 * gaps[-20:].min()
    assert spaced_steps(a, 999, "karras", 1e9)[-1] == 999


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 51}, r"^steps 51 is not possible: the chain has 1 to 50 up to noise 1e\+09$"),
        ({"steps": 0}, r"^steps 0 is not possible"),
        ({"steps": 30, "sigma_max": 0.5}, r"^steps 30 is not possible: the chain has 1 to \d\d? up to noise 0.5$"),
        ({"spacing": "log"}, r"^spacing 'log' is not known; use one of uniform, quadratic, logsnr, karras$"),
        ({"sigma_max": 0.001}, r"^sigma_max 0.001 is below the chain's least noise, 0.0\d+$"),
        ({"sigma_max": 0.0}, r"^sigma_max 0 is below the chain's least noise"),
    ],
)
def test_errors(given: dict[str, object], message: str) -> None:
    settings = {"steps": 5, "spacing": "uniform", "sigma_max": 1e9, **given}
    with pytest.raises(ValueError, match=message):
        spaced_steps(chain("linear", 50), **settings)  # type: ignore[arg-type]


def test_keeping_steps() -> None:
    settings = DiffusionSettings(diffusion_steps=1000, noise_schedule="cosine")
    kept = keep_steps(settings, 7, "karras", 40.0)
    assert kept == spaced_steps(chain("cosine", 1000), 7, "karras", 40.0)
    diffusion = create_diffusion(settings, True, kept)
    assert diffusion.schedule.timestep_map.tolist() == kept
    assert diffusion.schedule.original_steps == 1000
    np.testing.assert_allclose(diffusion.schedule.alphas_cumprod, chain("cosine", 1000)[kept], rtol=1e-12)
    respaced = settings.model_copy(update={"timestep_respacing": "ddim50"})
    with pytest.raises(ValueError, match=r"^steps 7 and timestep_respacing ddim50: give one of them$"):
        keep_steps(respaced, 7, "karras", 40.0)
    with pytest.raises(ValueError, match=r"^timestep_respacing ddim50 and kept steps: give one of them$"):
        create_diffusion(respaced, True, kept)
    same = create_diffusion(settings, True, create_diffusion(respaced, True).schedule.timestep_map.tolist())
    assert (same.schedule.betas == create_diffusion(respaced, True).schedule.betas).all()


@pytest.mark.parametrize("kept", [[], [3, 2], [1, 1], [-1, 4], [0, 50]])
def test_kept_steps_must_ascend(kept: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^kept steps must ascend within 0\.\.49, not "):
        Schedule.create("linear", 50, kept=kept)
