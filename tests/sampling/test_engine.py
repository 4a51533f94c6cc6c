"""The engine draws what the solvers' generators draw with the same network, and guidance changes the output rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import DIFFUSION, relative_error, super_res, unet
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import DiffusionSettings, GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.samplers import ddim_sample_loop, p_sample_loop, solve
from fastdiff.diffusion.solvers import SOLVERS, SolverTable, solver_table
from fastdiff.models import UNet
from fastdiff.models.unet import freeze
from fastdiff.sampling import guided_network
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import Guidance, GuidedNetwork
from fastdiff.sampling.pictures import to_uint8

CPU = torch.device("cpu")
SEED = 5 | SAMPLES
INDEX = torch.tensor([3, 0, 11])
CLASSES = torch.tensor([1, 4, 2])
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned variances": {"learn_sigma": True},
    "classes": {"class_cond": True, "num_classes": 5, "learn_sigma": True},
    "gray": {"in_channels": 1},
}


def process(model: UNet, **settings: Any) -> GaussianDiffusion:
    return create_diffusion(DiffusionSettings(**{**DIFFUSION, **settings}), model.settings.learn_sigma)


def plainly(model: UNet, diffusion: GaussianDiffusion, plan: SolverTable, index: Tensor, **kwargs: Tensor) -> Tensor:
    """Draw the images by the generator, with the whole network in every step."""
    shape = (model.settings.in_channels, *model.settings.size_hw)

    def predict(x: Tensor, step: int) -> Tensor:
        return model(x, diffusion.model_timesteps(torch.full((len(x),), step)), **kwargs)

    def noise(step: int) -> Tensor:
        return ops.image_noise(SEED, index, step + 1, shape)

    with torch.no_grad():
        for step in solve(predict, ops.image_noise(SEED, index, 0, shape), plan, noise):
            images = step.sample
    return images


def engine(
    model: UNet, diffusion: GaussianDiffusion, plan: SolverTable, guidance: Guidance | None = None, **settings: Any
) -> Engine:
    network = GuidedNetwork(freeze(model), plan, diffusion, guidance)
    return Engine(network, **{"batch_size": 3, "seed_and_key": SEED, **settings})


def assert_close(got: Tensor, want: Tensor) -> None:
    """Assert that both agree in float32: the engine embeds all steps in one product, which rounds differently."""
    assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", MODELS)
def test_engine_is_the_solver(name: str, solver: str) -> None:
    model = unet(**MODELS[name])
    kwargs = {"y": CLASSES} if model.settings.class_cond else {}
    diffusion = process(model)
    plan = solver_table(diffusion, solver)
    want = plainly(model, diffusion, plan, INDEX, **kwargs)
    drawer = engine(model, diffusion, plan)
    assert_close(drawer.draw(INDEX, **kwargs), want)
    assert_close(drawer.draw(INDEX, **kwargs), want)  # nothing of the first batch is left


@pytest.mark.parametrize("respacing", ["ddim25", ""], ids=["ddim25", "ancestral"])
@pytest.mark.parametrize("name", ["learned variances", "classes"])
def test_same_pixels_as_the_loops(name: str, respacing: str) -> None:
    """A network in training, which is not frozen, draws the same previews as the library's sample loops."""
    model = unet(**MODELS[name])
    kwargs = {"y": CLASSES} if model.settings.class_cond else {}
    diffusion = process(model, diffusion_steps=50, timestep_respacing=respacing)
    loop, solver = (ddim_sample_loop, "ddim") if respacing else (p_sample_loop, "ddpm")
    noise = lambda step: ops.CounterNoise(SEED, INDEX, (3, 8, 8), torch.full_like(INDEX, step + 1))
    x = ops.image_noise(SEED, INDEX, 0, (3, 8, 8))
    *_, want = loop(diffusion, model, x, noise, model_kwargs=kwargs)
    network = GuidedNetwork(model, solver_table(diffusion, solver), diffusion)
    got = Engine(network, batch_size=3, seed_and_key=SEED).draw(INDEX, **kwargs)
    assert torch.equal(to_uint8(got), to_uint8(want.sample))


def test_super_resolution() -> None:
    model = super_res(class_cond=True, num_classes=5)
    diffusion = process(model)
    plan = solver_table(diffusion, "ddim")
    small = torch.rand(3, 3, 8, 8) * 2 - 1
    want = plainly(model, diffusion, plan, INDEX, y=CLASSES, low_res=small)
    assert_close(engine(model, diffusion, plan).draw(INDEX, CLASSES, small), want)


def test_a_smaller_batch_is_filled_up() -> None:
    model = unet(class_cond=True, num_classes=5)
    diffusion = process(model)
    plan = solver_table(diffusion, "ddpm")
    want = plainly(model, diffusion, plan, INDEX, y=CLASSES)
    seen: list[int] = []
    drawer = engine(model, diffusion, plan, batch_size=8, fixed_shape=True)
    network = drawer.network.network
    body = network.body
    network.body = lambda x, *rest: (seen.append(len(x)), body(x, *rest))[1]
    got = drawer.draw(INDEX, CLASSES)
    assert got.shape == want.shape
    assert_close(got, want)
    assert seen == [8] * plan.num_evaluations
    with pytest.raises(ValueError, match="9 images"):
        drawer.draw(torch.arange(9), torch.zeros(9, dtype=torch.int64))


def test_steps_that_are_no_trials() -> None:
    model = unet()
    diffusion = process(model)
    plan = solver_table(diffusion, "heun")
    steps = list(engine(model, diffusion, plan).steps(INDEX))
    assert [step.t for step in steps] == plan.steps[plan.complete].tolist()
    assert len(steps) == diffusion.num_timesteps < plan.num_evaluations


def guided_output(weight: float, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the guided, conditional and unconditional output at one row of the table."""
    model = unet(class_cond=True, num_classes=5, null_class=True, learn_sigma=True)
    diffusion = process(model)
    plan = solver_table(diffusion, "ddim")
    x, row = torch.randn(3, 3, 8, 8), torch.tensor([2])
    t = diffusion.model_timesteps(torch.from_numpy(plan.steps)[row]).expand(3)
    with torch.no_grad():
        outputs = [model(x, t, y=y) for y in (CLASSES, torch.full_like(CLASSES, 5))]
        guided = GuidedNetwork(freeze(model), plan, diffusion, Guidance(weight, **settings))
        given = guided.conditioning(CLASSES, None)
        return guided(x, row, given, guided.guided[2]), *outputs


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_classifier_free_guidance(weight: float) -> None:
    got, conditional, unconditional = guided_output(weight)
    noise = unconditional[:, :3] + weight * (conditional[:, :3] - unconditional[:, :3])
    assert_close(got[:, :3], noise)
    assert_close(got[:, 3:], conditional[:, 3:])  # the variances aren't guided


def test_outside_the_interval_half_the_work() -> None:
    got, conditional, _ = guided_output(3.0, interval=(0.0, 1e-6))
    assert_close(got, conditional)
    model = unet(class_cond=True, num_classes=5, null_class=True)
    diffusion = process(model)
    plan = solver_table(diffusion, "ddim")
    sigma = ((1 - diffusion.schedule.alphas_cumprod) / diffusion.schedule.alphas_cumprod) ** 0.5
    low, high = sigma[1] * 1.01, sigma[3] * 1.01  # between the second and the fifth of the six levels
    drawer = engine(model, diffusion, plan, Guidance(2.0, (low, high)))
    sizes: list[int] = []
    body = drawer.network.network.body
    drawer.network.network.body = lambda x, *rest: (sizes.append(len(x)), body(x, *rest))[1]
    drawer.draw(INDEX, CLASSES)
    assert sizes == [3, 3, 6, 6, 3, 3]


def test_autoguidance() -> None:
    strong, weak = unet(learn_sigma=True), unet(learn_sigma=True, num_channels=64)
    diffusion = process(strong)
    plan = solver_table(diffusion, "ddim")
    x, row = torch.randn(3, 3, 8, 8), torch.tensor([1])
    t = diffusion.model_timesteps(torch.from_numpy(plan.steps)[row]).expand(3)
    with torch.no_grad():
        ours, theirs = strong(x, t), weak(x, t)
        guided = GuidedNetwork(freeze(strong), plan, diffusion, Guidance(2.0, guide=freeze(weak)))
        got = guided(x, row, guided.conditioning(None, None), True)
    assert_close(got[:, :3], 2 * ours[:, :3] - theirs[:, :3])
    assert_close(got[:, 3:], ours[:, 3:])


@pytest.mark.slow
def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided rows share one graph without breaks, and so do the others, for every row, batch and batch size."""
    kwargs = guided_network.compile_kwargs
    monkeypatch.setattr(
        guided_network,
        "compile_kwargs",
        lambda *a, **k: {"fullgraph": kwargs(*a, **k)["fullgraph"], "backend": "aot_eager"},
    )
    model = unet(class_cond=True, num_classes=5, null_class=True, learn_sigma=True)
    diffusion = process(model)
    plan = solver_table(diffusion, "dpmpp_2m")
    guidance = Guidance(2.0, (0.3, 3.0))
    want = engine(model, diffusion, plan, guidance).draw(INDEX, CLASSES)
    torch._dynamo.reset()
    compiled = GuidedNetwork(model, plan, diffusion, guidance, compiled=True)
    drawer = Engine(compiled, batch_size=3, seed_and_key=SEED, fixed_shape=True)
    assert_close(drawer.draw(INDEX, CLASSES), want)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(drawer.draw(INDEX, CLASSES), want)
        assert_close(drawer.draw(INDEX[:2], CLASSES[:2]), want[:2])


@pytest.mark.parametrize("name", MODELS)
def test_frozen_networks_compute_the_same(name: str) -> None:
    kwargs = {"y": CLASSES} if "class_cond" in MODELS[name] else {}
    x = torch.randn(3, MODELS[name].get("in_channels", 3), 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        model = unet(**MODELS[name]).set_precision(dtype)
        with torch.no_grad():
            want = model(x, torch.tensor([1, 5, 3]), **kwargs)
            got = freeze(model)(x, torch.tensor([1, 5, 3]), **kwargs)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_graphs_replay_the_same_on_a_gpu(solver: str) -> None:
    device = torch.device("cuda")
    model = unet(class_cond=True, num_classes=5, null_class=True, learn_sigma=True).to(device)
    diffusion = process(model)
    plan = solver_table(diffusion, solver)
    guidance = Guidance(2.0, (0.5, 5.0))
    network = GuidedNetwork(freeze(model), plan, diffusion, guidance)
    plain, graphed = (Engine(network, batch_size=3, seed_and_key=SEED, cuda_graph=graph) for graph in (False, True))
    index, y = INDEX.to(device), CLASSES.to(device)
    want = plain.draw(index, y)
    for _ in range(3):  # warming up, capturing, replaying
        torch.testing.assert_close(graphed.draw(index, y), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(graphed.draw(index[:2], y[:2]), want[:2], rtol=1e-4, atol=1e-4)
