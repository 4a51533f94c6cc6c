"""Whole jobs with every op computed by its kernel (on a CPU in Triton's interpreter) equal those of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures_folder import make_pictures
from helpers.tiny import DIFFUSION, MODEL, flags, save, unet

from fastdiff import sample, train
from fastdiff.errors import UserError

pytestmark = pytest.mark.slow


SMALL = {**MODEL, "channel_mult": "1", "attention_resolutions": "8"}


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses, weights and averages of two steps are equal to rounding, and the log says what computed them."""
    data = make_pictures(tmp_path / "pictures")
    made = {}
    for kernels in ("reference", "triton"):
        folder = tmp_path / kernels
        settings = {**SMALL, **DIFFUSION, "learn_sigma": True, "data_dir": data, "run_dir": folder, "kernels": kernels}
        settings |= {"batch_size": 2, "max_steps": 2, "log_interval": 1, "lr": 1e-3, "loader": "pillow"}
        train.main(flags(settings))
        shown = capsys.readouterr().out
        step = folder / "checkpoints" / "step_000002"
        files = ("model000002.pt", "ema_0.9999_000002.pt")
        made[kernels] = [torch.load(step / file, weights_only=True) for file in files]
        rows = np.genfromtxt(folder / "progress.csv", delimiter=",", names=True)
        made[kernels].append({name: rows[name] for name in ("loss", "mse", "vb", "grad_norm")})
    assert "norm_and_shortcut, q_sample, diffusion_loss, sampler_step: Triton (kernels triton)" in shown
    for ours, plain in zip(made["triton"], made["reference"], strict=True):
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            # AdamW's first steps move by lr whatever the gradient's size: where it is rounding, they differ.
            got, want = torch.as_tensor(ours[name]), torch.as_tensor(value)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=3e-4, msg=name)


def test_sampling(tmp_path: Path) -> None:
    """The images differ by one level at most."""
    model = save(unet(**SMALL, learn_sigma=True), tmp_path / "ema_0.9999_000001.pt")
    images = {}
    for kernels in ("reference", "triton"):
        folder = tmp_path / kernels
        settings = {"model_path": model, "num_samples": 2, "batch_size": 2, "out_dir": folder, "kernels": kernels}
        sample.main(flags({**settings, "timestep_respacing": "2"}))
        images[kernels] = np.load(folder / "samples_2x8x8x3.npz")["arr_0"].astype(int)
    assert abs(images["triton"] - images["reference"]).max() <= 1


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(unet(), tmp_path / "ema_0.9999_000001.pt")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--kernels triton needs a GPU"):
            sample.main(flags({"model_path": model, "kernels": "triton"}))
    with pytest.raises(UserError, match="--kernels"):
        sample.main(flags({"model_path": model, "kernels": "fast"}))
