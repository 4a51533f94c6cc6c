"""Images that are not finite are refused by their numbers, and no image of their chunk is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import DIFFUSION, flags, pictures, refusal, save, super_res, unet

import fastdiff
from fastdiff import nll, sample, super_res_sample
from fastdiff.diffusion import DiffusionSettings, create_diffusion
from fastdiff.diffusion.solvers import solver_table
from fastdiff.errors import UserError
from fastdiff.models.unet import freeze
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import GuidedNetwork

CLASSES = ["ape", "bee", "cat"]
OPTIONS: dict[str, Any] = {"num_samples": 6, "batch_size": 6, "grid_images": 0, "seed": 3}


def overflowing(path: Path, make: Any = unet, bee_only: bool = False, **settings: Any) -> Path:
    """Save a checkpoint with finite weights and outputs that are not finite, for all classes or for the class bee."""
    model = make(class_cond=True, num_classes=3, **settings)
    with torch.no_grad():
        if bee_only:
            model.label_emb.weight[1] = 3e38
        else:
            model.out[2].weight.fill_(3e38)
    return save(model, path, CLASSES, predict_xstart=True)


def outputs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".npz", ".png")]


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_sample_names_the_images(solver: str, tmp_path: Path) -> None:
    """Images from infinite predictions are refused although clipping makes them finite."""
    given = {**OPTIONS, "solver": solver, "classes": "ape,bee,cat", "out_dir": tmp_path / "out"}
    model_path = overflowing(tmp_path / "model.pt", bee_only=True)
    message = refusal(sample.main, flags({"model_path": model_path, **given}))
    sample.main(flags({"model_path": model_path, **given, "classes": "ape,cat", "out_dir": tmp_path / "good"}))
    twin = fastdiff.load(save(unet(class_cond=True, num_classes=3), tmp_path / "twin.pt", CLASSES), device="cpu")
    bees = np.flatnonzero(twin.sample(6, classes="ape,bee,cat", steps=2, seed=3).labels == 1)
    assert message.startswith(f"images {bees[0]} and {bees[1]} came out with values that are not finite, and are not")
    assert message.endswith("try another checkpoint or average of its weights as model_path")
    assert "precision" not in message
    assert "guidance" not in message
    assert not outputs(tmp_path / "out")
    assert outputs(tmp_path / "good")


def test_all_images(tmp_path: Path) -> None:
    model_path = overflowing(tmp_path / "model.pt")
    message = refusal(sample.main, flags({**OPTIONS, "model_path": model_path, "out_dir": tmp_path / "out"}))
    assert message.startswith("images 0, 1, 2, 3, 4 and 1 other came out")
    assert not outputs(tmp_path / "out")


def test_advice(tmp_path: Path) -> None:
    model_path = overflowing(tmp_path / "model.pt", null_class=True)
    given = {**OPTIONS, "model_path": model_path, "out_dir": tmp_path / "out", "guidance": 4, "precision": "bf16"}
    message = refusal(sample.main, flags(given))
    assert message.endswith(", or precision fp32, or a guidance nearer 1 than 4")


def test_enlarging_and_cascades(tmp_path: Path) -> None:
    base = save(unet(class_cond=True, num_classes=3), tmp_path / "base.pt", CLASSES, predict_xstart=True)
    large = overflowing(tmp_path / "large.pt", super_res)
    small = tmp_path / "small.npz"
    np.savez(small, np.zeros((2, 8, 8, 3), dtype=np.uint8), np.zeros(2, dtype=np.int64))
    alone = {"model_path": large, "base_samples": small, "out_dir": tmp_path / "one", "batch_size": 2}
    assert refusal(super_res_sample.main, flags(alone)).startswith("images 0 and 1 came out")
    both = {**OPTIONS, "model_path": base, "sr_model_path": large, "out_dir": tmp_path / "two", "precision": "bf16"}
    message = refusal(sample.main, flags(both))
    assert message.startswith("enlarging: images 0,")
    assert message.endswith("or average of its weights as model_path, or precision fp32")
    assert not outputs(tmp_path / "one") + outputs(tmp_path / "two")


def test_the_api(tmp_path: Path) -> None:
    model = fastdiff.load(overflowing(tmp_path / "model.pt"), device="cpu")
    with pytest.raises(
        UserError,
        match="^sample: images 0 and 1 came out.*; try another checkpoint or average of its weights as model_path$",
    ):
        model.sample(2, steps=2)
    other = fastdiff.load(save(unet(), tmp_path / "noise.pt"), device="cpu")
    with torch.no_grad():
        other.network.model.out[2].bias.fill_(math.nan)
    with pytest.raises(UserError, match="^encode: images 0 and 1 came out"):
        other.encode(np.zeros((2, 8, 8, 3), dtype=np.uint8), steps=2)


def test_nll(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pictures(data, ["ape_0", "bee_1", "bee_2", "cat_3"])
    out = tmp_path / "out"
    given = {"data_dir": data, "num_samples": 4, "batch_size": 4, "out_dir": out, "precision": "bf16"}
    message = refusal(nll.main, flags({"model_path": overflowing(tmp_path / "model.pt", bee_only=True), **given}))
    assert message == (
        "--model_path: the bound of image 1 of the listing is not finite, and nothing is written; try another "
        "checkpoint or average of its weights, or --precision fp32"
    )
    assert not outputs(out)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_of_a_batch(value: float) -> None:
    """One non-finite output marks its image, and the next batch starts anew."""
    model = unet()
    diffusion = create_diffusion(DiffusionSettings(**DIFFUSION), model.settings.learn_sigma)
    plan = solver_table(diffusion, "ddim")
    network = GuidedNetwork(freeze(model), plan, diffusion)
    engine = Engine(network, batch_size=3, seed_and_key=5, fixed_shape=True)
    index = torch.tensor([4, 9])
    wanted = engine.draw(index).clone()
    assert engine.finite(2).tolist() == [True, True]
    body, calls = network.network.body, iter(range(100))

    def spoilt(*args: Any) -> torch.Tensor:
        output = body(*args)
        if next(calls) == 2:
            output[1, 0, 0, 0] = value
        return output

    network.network.body = spoilt
    engine.draw(index)
    assert engine.finite(2).tolist() == [True, False]
    network.network.body = body
    assert torch.equal(engine.draw(index), wanted)
    assert engine.finite(2).tolist() == [True, True]
