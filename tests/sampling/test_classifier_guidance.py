"""A classifier guides every solver, in the engine and through sample.py, and misfits are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import (
    DIFFUSION,
    classifier,
    flags,
    info_for,
    nothing_written,
    refusal,
    relative_error,
    save,
    save_bare,
    super_res,
    unet,
)
from torch import Tensor

import fastdiff
from fastdiff import ops, sample
from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.samplers import Step, ddim_sample_loop, p_sample_loop, solve
from fastdiff.diffusion.solvers import SOLVERS, solver_table
from fastdiff.errors import UserError
from fastdiff.models import weights
from fastdiff.models.classifier import Classifier
from fastdiff.models.unet import freeze
from fastdiff.sampling.classifier_gradient import ClassifierGradient, ClassifierGuidance
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import Guidance, GuidedNetwork

SEED = 5 | SAMPLES
INDEX = torch.tensor([3, 0, 11])
LABELS = torch.tensor([1, 2, 0])
CLASSES = ["ape", "bee", "cat"]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned variances": {"learn_sigma": True},
    "classes": {"class_cond": True, "num_classes": 3, "learn_sigma": True},
    "gray": {"in_channels": 1},
}


def process(learn_sigma: bool, **settings: Any) -> GaussianDiffusion:
    return create_diffusion(DiffusionSettings(**{**DIFFUSION, **settings}), learn_sigma)


def gradient_of(classifier: Classifier, diffusion: GaussianDiffusion, y: Tensor, scale: float) -> Any:
    """Return a function from x and a kept step to the gradient, by the definition."""

    def gradient(x: Tensor, step: int) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = classifier(x, diffusion.model_timesteps(torch.full((len(x),), step)))
            chosen = F.log_softmax(logits, dim=-1)[torch.arange(len(x)), y].sum()
            return scale * torch.autograd.grad(chosen, x)[0]

    return gradient


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", MODELS)
def test_engine_is_the_solver(name: str, solver: str) -> None:
    """The engine draws what the solver's table gives with the whole networks; guidance changes the images."""
    model = unet(**MODELS[name])
    guide = classifier(in_channels=model.settings.in_channels)
    kwargs = {"y": LABELS} if model.settings.class_cond else {}
    diffusion = process(model.settings.learn_sigma)
    table = solver_table(diffusion, solver)
    shape = (model.settings.in_channels, 8, 8)

    def predict(x: Tensor, step: int) -> Tensor:
        return model(x, diffusion.model_timesteps(torch.full((len(x),), step)), **kwargs)

    def images(scale: float) -> Tensor:
        noise = lambda step: ops.image_noise(SEED, INDEX, step + 1, shape)
        gradient = gradient_of(guide, diffusion, LABELS, scale) if scale else None
        *_, last = solve(predict, ops.image_noise(SEED, INDEX, 0, shape), table, noise, gradient=gradient)
        return last.sample

    want = images(3.0)
    assert relative_error(want, images(0.0)) > 1e-3
    guidance = Guidance(classifier=ClassifierGuidance(freeze(guide), 3.0))
    engine = Engine(GuidedNetwork(freeze(model), table, diffusion, guidance), batch_size=4, seed_and_key=SEED)
    for _ in range(2):  # nothing of the first batch is left
        assert relative_error(engine.draw(INDEX, LABELS), want) < 5e-5


def test_the_classifier_sees_its_own_timesteps() -> None:
    """A classifier that was trained on unscaled timesteps guides a network that sees scaled ones, and the reverse."""
    guide, scaled = freeze(classifier()), process(learn_sigma=False, rescale_timesteps=True)
    unscaled = process(learn_sigma=False, rescale_timesteps=False)
    x, row = torch.randn(3, 3, 8, 8), torch.tensor([2])
    tables = [solver_table(diffusion, "ddim") for diffusion in (scaled, unscaled)]

    def gradient(own: bool | None, which: int) -> Tensor:
        return ClassifierGradient(ClassifierGuidance(guide, 1.0, own), tables[which], (scaled, unscaled)[which])(
            x, row, LABELS
        )

    assert torch.equal(gradient(None, 0), gradient(True, 1))
    assert torch.equal(gradient(False, 0), gradient(None, 1))
    assert not torch.equal(gradient(None, 0), gradient(None, 1))


@pytest.mark.parametrize("learn_sigma", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("sigma_small", [False, True], ids=["beta", "posterior"])
def test_ancestral_guidance_shifts_the_mean(learn_sigma: bool, sigma_small: bool) -> None:
    """Without noise, x differs by the variance times the gradient, from the variance of `p_mean_variance`."""
    diffusion = process(learn_sigma, sigma_small=sigma_small, diffusion_steps=20)
    output, x, pull = (torch.randn(2, c, 4, 4, generator=torch.Generator().manual_seed(c)) for c in (6, 3, 5))
    pull = pull[:, :3]
    output = output if learn_sigma else output[:, :3]

    def steps(gradient: Any) -> list[Step]:
        none = lambda step: torch.zeros_like(x)
        return list(p_sample_loop(diffusion, lambda *_: output, x, none, gradient=gradient))

    x_t = x
    for guided in steps(lambda x, step: pull):
        p = diffusion.p_mean_variance_from_output(output, x_t, torch.full((2,), guided.t))
        torch.testing.assert_close(guided.sample, p.mean + p.variance * pull, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guided.pred_xstart, p.pred_xstart, rtol=1e-5, atol=1e-5)
        x_t = guided.sample
    assert not torch.equal(steps(None)[-1].sample, x_t)


def test_ddim_guidance_shifts_the_noise() -> None:
    """A step of DDIM follows from the noise less sqrt(1 - abar) times the gradient, which comes after the clipping."""
    diffusion = process(False, diffusion_steps=20)
    output, x, pull = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x_t = x
    for guided in ddim_sample_loop(diffusion, lambda *_: output, x, gradient=lambda x, step: pull):
        t = torch.full((2,), guided.t)
        clipped = diffusion.predict_xstart_from_eps(x_t, t, output).clamp(-1, 1)
        abar, before = (
            diffusion.at(name, t)[:, None, None, None] for name in ("alphas_cumprod", "alphas_cumprod_prev")
        )
        eps = diffusion.predict_eps_from_xstart(x_t, t, clipped) - (1 - abar).sqrt() * pull
        x_start = diffusion.predict_xstart_from_eps(x_t, t, eps)
        want = before.sqrt() * x_start + (1 - before).sqrt() * eps
        torch.testing.assert_close(guided.pred_xstart, x_start, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(guided.sample, want, rtol=1e-4, atol=1e-4)
        x_t = guided.sample


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "heun"])
def test_graphs_replay_the_same_on_a_gpu(solver: str) -> None:
    """The classifier's forward and backward pass are captured with the step, and replayed for every row and batch."""
    device = torch.device("cuda")
    model, guide = unet(**MODELS["classes"]).to(device), classifier().to(device)
    diffusion = process(learn_sigma=True)
    guidance = Guidance(classifier=ClassifierGuidance(freeze(guide), 3.0))
    network = GuidedNetwork(freeze(model), solver_table(diffusion, solver), diffusion, guidance)
    plain, graphed = (Engine(network, batch_size=3, seed_and_key=SEED, cuda_graph=graph) for graph in (False, True))
    index, y = INDEX.to(device), LABELS.to(device)
    want = plain.draw(index, y)
    for _ in range(3):  # warming up, capturing, replaying
        torch.testing.assert_close(graphed.draw(index, y), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(graphed.draw(index[:2], y[:2]), want[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=["bf16", "fp16"])
def test_precision_of_the_gradient(dtype: torch.dtype, bound: float) -> None:
    """The error is a few roundings to 8 or 11 bits of mantissa: 1.8% and 0.22% on a CPU. Nothing underflows in fp16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    diffusion, x = process(learn_sigma=False), torch.randn(3, 3, 8, 8, device=device)
    gradients = []
    for precision in (torch.float32, dtype):
        guide = freeze(classifier().to(device).set_precision(precision))
        compute = ClassifierGradient(ClassifierGuidance(guide), solver_table(diffusion, "ddim"), diffusion)
        gradients.append(compute(x, torch.zeros(1, dtype=torch.int64, device=device), LABELS.to(device)))
    exact, rounded = gradients
    assert relative_error(rounded, exact) < bound
    assert ((rounded == 0) <= (exact == 0)).all()


# --- sample.py ---


def run(out: Path, **settings: Any) -> dict[str, np.ndarray]:
    given = {"out_dir": out, "num_samples": 5, "batch_size": 3, "grid_images": 0, "solver": "ddim", **settings}
    sample.main(flags(given))
    with np.load(next(out.glob("samples_*.npz"))) as content:
        return dict(content)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(unet(), tmp_path / "plain.pt", predict_xstart=True)


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    return save(classifier(), tmp_path / "classifier.pt", CLASSES)


def test_guides_a_model_without_classes(plain: Path, guide: Path, tmp_path: Path) -> None:
    """Images get the classifier's classes, by name, and those of other classes are other images."""
    given = {"model_path": plain, "classifier_path": guide}
    guided = run(tmp_path / "guided", **given, classes="cat,ape")
    assert guided["arr_1"].tolist() == [2, 0, 2, 0, 2]
    other = run(tmp_path / "other", **given, classes="cat,bee")
    differs = (other["arr_0"] != guided["arr_0"]).reshape(5, -1).any(axis=1)
    assert differs.tolist() == [False, True, False, True, False]
    unguided = run(tmp_path / "plain", model_path=plain)
    assert "arr_1" not in unguided
    assert (unguided["arr_0"] != guided["arr_0"]).any()


def test_no_scale_is_no_classifier(plain: Path, tmp_path: Path) -> None:
    """With classifier_scale 0 the file isn't even read, as in guided-diffusion's commands."""
    without = run(tmp_path / "a", model_path=plain)
    scaled = run(tmp_path / "b", model_path=plain, classifier_path=tmp_path / "none.pt", classifier_scale=0)
    np.testing.assert_array_equal(scaled["arr_0"], without["arr_0"])


def test_bare_files(tmp_path: Path, guide: Path, plain: Path) -> None:
    """A file without settings is understood by its shapes; flags that contradict it are refused with the right ones."""
    bare = save_bare(classifier(), tmp_path / "bare.pt")
    given = {"model_path": plain, "seed": 4, "classes": "0,1,2"}
    want = run(tmp_path / "a", classifier_path=guide, **given)
    got = run(tmp_path / "b", classifier_path=bare, classifier_depth=1, **given)
    np.testing.assert_array_equal(got["arr_0"], want["arr_0"])
    wrong = {"model_path": plain, "classifier_path": bare, "classifier_depth": 2, "out_dir": tmp_path / "c"}
    with nothing_written(tmp_path):
        assert "--classifier_depth 1" in refusal(sample.main, flags(wrong))


def test_another_classifier_is_another_job(plain: Path, guide: Path, tmp_path: Path) -> None:
    run(tmp_path / "job", model_path=plain, classifier_path=guide)
    with nothing_written(tmp_path):
        changed = {"model_path": plain, "classifier_path": guide, "classifier_scale": 2}
        message = refusal(sample.main, flags({"out_dir": tmp_path / "job", "num_samples": 5, **changed}))
    assert "--out_dir" in message


def test_another_depth_is_another_job(plain: Path, tmp_path: Path) -> None:
    """A file without settings may have the keys and shapes of several depths, which draw other images."""
    same = {"classifier_pool": "adaptive", "classifier_attention_resolutions": ""}
    deep = {"classifier_depth": 3, "classifier_channel_mult": "1"}
    guide = save_bare(classifier(**same, classifier_channel_mult="1,1"), tmp_path / "bare.pt")
    given = {"model_path": plain, "classifier_path": guide, **same}
    two_levels = run(tmp_path / "job", **given, classifier_depth=1, classifier_channel_mult="1,1")
    assert (run(tmp_path / "deep", **given, **deep)["arr_0"] != two_levels["arr_0"]).any()
    message = refusal(sample.main, flags({"out_dir": tmp_path / "job", "num_samples": 5, **given, **deep}))
    assert "its classifier_depth is 1, now it is 3" in message


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "size": ({"image_size": 16}, {}, "knows images of 16x16 pixels, the model draws 8x8"),
    "channels": ({"in_channels": 1}, {}, "knows images of 1 channels, the model draws 3"),
    "classes": ({"num_classes": 4}, {"class_cond": True, "num_classes": 3}, "knows 4 classes, the model 3"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits(name: str, tmp_path: Path) -> None:
    changes, model, words = MISFITS[name]
    paths = {
        "model_path": save(unet(**model), tmp_path / "model.pt"),
        "classifier_path": save(classifier(**changes), tmp_path / "classifier.pt"),
    }
    with nothing_written(tmp_path):
        message = refusal(sample.main, flags({"out_dir": tmp_path / "out", "num_samples": 2, **paths}))
    assert message.startswith("--classifier_path: ")
    assert words in message


def test_other_files_and_settings(plain: Path, guide: Path, tmp_path: Path) -> None:
    """A classifier is no model, a model no classifier, and other names and another noise are named."""
    named = save(unet(class_cond=True, num_classes=3), tmp_path / "named.pt", ["ape", "cat", "bee"])
    noisy = save(classifier(), tmp_path / "noisy.pt", CLASSES, noise_schedule="linear", diffusion_steps=100)
    conditional = save(unet(class_cond=True, num_classes=3), tmp_path / "conditional.pt", CLASSES)
    cases = [
        ({"model_path": guide}, "is a classifier"),
        ({"model_path": plain, "classifier_path": plain}, "not a classifier"),
        ({"model_path": plain, "classifier_path": tmp_path / "none.pt"}, "none.pt"),
        ({"model_path": plain, "classifier_scale": 3}, "classifier_scale 3 needs a classifier_path"),
        ({"model_path": plain, "classifier_depth": 2}, "--classifier_path: classifier_depth is for the classifier"),
        ({"model_path": plain, "classifier_path": guide, "classifier_scale": -1}, "classifier_scale"),
        ({"model_path": plain, "classifier_path": guide, "classes": "dog"}, "--classes"),
        ({"model_path": named, "classifier_path": guide}, "the same classes in the same order"),
        ({"model_path": conditional, "classifier_path": noisy}, "diffusion_steps 100"),
        (
            {"model_path": plain, "classifier_path": guide, "classifier_use_fp16": True},
            "--classifier_precision fp16 needs a GPU",
        ),
    ]
    for given, words in cases:
        with nothing_written(tmp_path):
            message = refusal(sample.main, flags({"out_dir": tmp_path / "out", "num_samples": 2, **given}))
        assert words in message, given


def test_an_upsampler_takes_the_classifiers_classes(plain: Path, guide: Path, tmp_path: Path) -> None:
    """In a cascade a class-conditional upsampler enlarges images of a model without classes, by the classifier's."""
    large = save(super_res(class_cond=True, num_classes=3), tmp_path / "large.pt", ["cat", "ape", "bee"])
    given = {"model_path": plain, "sr_model_path": large, "sr_timestep_respacing": 2, "num_samples": 2}
    drawn = run(tmp_path / "both", classifier_path=guide, classes="cat,ape", **given)
    assert drawn["arr_0"].shape == (2, 16, 16, 3)
    assert drawn["arr_1"].tolist() == [2, 0]
    with nothing_written(tmp_path):
        message = refusal(sample.main, flags({"out_dir": tmp_path / "out", **given}))
    assert "needs classes, which the model doesn't have" in message


def test_a_classifier_of_clean_images(plain: Path, tmp_path: Path) -> None:
    model = classifier()
    clean = tmp_path / "clean.pt"
    torch.save(weights.with_info(model.state_dict(), {**info_for(model, CLASSES), "noised": False}), clean)
    with nothing_written(tmp_path):
        message = refusal(sample.main, flags({"model_path": plain, "classifier_path": clean, "num_samples": 2}))
    assert message.startswith("--classifier_path: ")
    assert "images without noise" in message


# --- Python ---


def test_the_same_images_in_python(plain: Path, guide: Path, tmp_path: Path) -> None:
    given = {"solver": "dpmpp_2m", "steps": 4, "seed": 2, "classifier_scale": 2.5}
    script = run(tmp_path / "job", model_path=plain, classifier_path=guide, classes="cat,0", **given)
    model = fastdiff.load(plain, precision="fp32")
    samples = model.sample(5, classes=["cat", 0], classifier=guide, **given)
    np.testing.assert_array_equal(samples.labels, script["arr_1"])
    assert np.abs(samples.images.astype(int) - script["arr_0"]).max() <= 1
    assert list(samples.class_names) == CLASSES
    assert model.sample(2, steps=3).labels is None
    with pytest.raises(UserError, match=r"^sample: classifier: .*not a classifier"):
        model.sample(2, classifier=plain)
