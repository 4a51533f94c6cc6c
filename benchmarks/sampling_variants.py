"""Ways to draw a batch: ours, ours with one lever off, the reference, and those of other libraries.

Every factory gives a function that draws one batch from noise to uint8 pixels on the host, with the same number of
evaluations of networks with the same weights (diffusers' has its own).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import WARM_UP, compile_kwargs, diffusers_unet, strengthened
from benchmarks.seed_step import SeedUNet
from benchmarks.train_variants import Case, check_same_function, exact, from_checkout, without_our_ops
from fastdiff.diffusion import GaussianDiffusion, create_diffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.process import ModelMeanType, ModelVarType
from fastdiff.diffusion.schedules import keep_steps
from fastdiff.diffusion.solvers import SolverTable, solver_table
from fastdiff.models import UNet, build_model
from fastdiff.models.cost import forward_flops
from fastdiff.models.unet import DTYPES, body_dtype, freeze
from fastdiff.runtime.cuda_graphs import GraphRunner
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.guided_network import GuidedNetwork
from fastdiff.sampling.pictures import to_uint8

Draw = Callable[[], Tensor]
"""draw() → images [B, H, W, C] uint8 on the host."""
Network = Callable[..., Tensor]
SIGMA_MAX = 160.0


@dataclass
class DrawCase(Case):
    """A configuration at a batch and a precision, and a solver with its steps spread evenly over the chain."""

    solver: str = "ddpm"
    steps: int = 20

    def diffusion(self) -> GaussianDiffusion:
        settings = self.config.diffusion
        return create_diffusion(
            settings, self.config.model.learn_sigma, keep_steps(settings, self.steps, "uniform", SIGMA_MAX)
        )

    def table(self) -> SolverTable:
        return solver_table(self.diffusion(), self.solver)

    @property
    def evaluations(self) -> int:
        return self.table().num_evaluations

    def rates(self, seconds: float) -> dict[str, float | None]:
        """Images and evaluations per second, ms per evaluation and share of the peak, of a batch drawn in `seconds`."""
        evaluations = self.batch * self.evaluations / seconds
        return {
            "images_per_second": self.batch / seconds,
            "evaluations_per_second": evaluations,
            "ms_per_evaluation": 1e3 * seconds / self.evaluations,
            "mfu": self.share_of_peak(forward_flops(self.config.model) * evaluations),
        }

    def with_evaluations(self) -> DrawCase:
        """The same for a solver that evaluates once per step: the reference's own, which has as many steps then."""
        other = copy.copy(self)  # with the same weights
        other.solver, other.steps = "ddim" if self.solver == "ddim" else "ddpm", self.evaluations
        return other


# --- the reference ---


class SeedLoop:
    """improved-diffusion's sampling, its operations written out one by one.

    Every coefficient is looked up in a numpy table that is copied to the device at every step; with on_device the
    tables are copied once, as in a well-written loop.
    """

    def __init__(self, network: Network, diffusion: GaussianDiffusion, ddim: bool, on_device: bool = False) -> None:
        self.network, self.diffusion, self.ddim, self.on_device = network, diffusion, ddim, on_device
        self.tables: dict[str, Tensor] = {}

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        if not self.on_device:
            values = torch.from_numpy(getattr(self.diffusion.schedule, name)).to(t.device)[t].float()
        else:
            if name not in self.tables:
                self.tables[name] = torch.from_numpy(getattr(self.diffusion.schedule, name)).float().to(t.device)
            values = self.tables[name][t]
        return values[:, None, None, None].expand(x.shape)

    def _shown(self, t: Tensor) -> Tensor:
        if self.on_device:
            return self.diffusion.model_timesteps(t)
        schedule = self.diffusion.schedule
        original = torch.tensor(schedule.timestep_map.tolist(), device=t.device, dtype=t.dtype)[t]
        return original.float() * (1000.0 / schedule.original_steps) if self.diffusion.rescale_timesteps else original

    def _log_variance(self, values: Tensor | None, t: Tensor, x: Tensor) -> Tensor:
        """The log variance of the reverse step; the variance is computed too, as improved-diffusion always does."""
        if values is None:
            small = self.diffusion.var_type is ModelVarType.FIXED_SMALL
            self._at("posterior_variance" if small else "fixed_large_variance", t, x)
            return self._at(self.diffusion.log_variance_table, t, x)
        log_variance = values
        if self.diffusion.var_type is ModelVarType.LEARNED_RANGE:
            low, high = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
            share = (values + 1) / 2
            log_variance = share * high + (1 - share) * low
        log_variance.exp()
        return log_variance

    def step(self, x: Tensor, t: Tensor, noise: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
        """x_{t-1} of x_t [B, C, H, W]; t [B] is the same for all images."""
        output = self.network(x, self._shown(t), **kwargs)
        values = None
        if self.diffusion.learns_variance:
            output, values = output.split(x.shape[1], dim=1)
        log_variance = self._log_variance(values, t, x)
        if self.diffusion.mean_type is ModelMeanType.EPSILON:
            recip, recipm1 = self._at("sqrt_recip_alphas_cumprod", t, x), self._at("sqrt_recipm1_alphas_cumprod", t, x)
            output = recip * x - recipm1 * output
        x_start = output.clamp(-1, 1)
        mean = self._at("posterior_mean_coef1", t, x) * x_start + self._at("posterior_mean_coef2", t, x) * x
        self._at("posterior_variance", t, x)
        self._at("posterior_log_variance_clipped", t, x)
        mask = (t != 0).float().view(-1, 1, 1, 1)
        if not self.ddim:
            return mean + mask * (0.5 * log_variance).exp() * noise
        recip, recipm1 = self._at("sqrt_recip_alphas_cumprod", t, x), self._at("sqrt_recipm1_alphas_cumprod", t, x)
        eps = (recip * x - x_start) / recipm1
        kept, before = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = 0.0 * ((1 - before) / (1 - kept)).sqrt() * (1 - kept / before).sqrt()
        return x_start * before.sqrt() + (1 - before - sigma**2).sqrt() * eps + mask * sigma * noise

    @torch.no_grad()
    def __call__(
        self, x: Tensor, kwargs: dict[str, Tensor], noise: Callable[[Tensor], Tensor] = torch.randn_like
    ) -> Tensor:
        for i in reversed(range(self.diffusion.num_timesteps)):
            x = self.step(x, torch.tensor([i] * len(x), device=x.device), noise(x), kwargs)
        return x


@without_our_ops
def seed(case: DrawCase, checkout: Path | None = None) -> Draw:
    """improved-diffusion's sampler: its operations written out, or with a checkout its own network and loop."""
    case = case.with_evaluations()
    ddim, size = case.solver == "ddim", (case.batch, case.config.model.in_channels, *case.config.model.size_hw)
    fp16 = case.precision != "fp32" and case.device.type == "cuda"  # there is no bf16, and on a CPU no fp16
    model: nn.Module
    if checkout is None:
        check_same_function(case.config.model)
        model = case.filled(SeedUNet)
        loop = SeedLoop(model, case.diffusion(), ddim)
        draw = lambda: loop(torch.randn(*size, device=case.device), case.kwargs)
    else:
        respaced = case.config.diffusion.model_copy(update={"timestep_respacing": str(case.steps)})
        respaced_case = copy.copy(case)
        respaced_case.config = case.config.model_copy(update={"diffusion": respaced})
        model, theirs = from_checkout(respaced_case, checkout)
        method = theirs.ddim_sample_loop if ddim else theirs.p_sample_loop
        draw = lambda: method(model, size, model_kwargs=case.kwargs)
    model.to(case.device).eval()
    if fp16:
        model.convert_to_fp16()
    return lambda: to_uint8(draw()).cpu()


# --- the reference's network as an expert would run it, and other libraries ---


class FastLoop:
    """A well-written loop around any network: tables on the device, channels-last, no wait for the device.

    With `compiled` the network and the arithmetic of a step are compiled as one graph, and on a GPU each step replays
    one CUDA graph.
    """

    def __init__(self, case: DrawCase, network: Network, compiled: bool, autotune: bool = False) -> None:
        self.case = case.with_evaluations()
        self.graphs = GraphRunner(case.device, compiled)
        model = case.config.model
        size = (case.batch, model.in_channels, *model.size_hw)
        self.x = torch.zeros(*size, device=case.device).contiguous(memory_format=torch.channels_last)
        self.t = torch.zeros(case.batch, dtype=torch.int64, device=case.device)
        output = self.x.new_zeros(case.batch, model.out_channels, *model.size_hw)
        self.loop = SeedLoop(lambda *_, **__: output, self.case.diffusion(), self.case.solver == "ddim", on_device=True)
        self.loop.step(self.x, self.t, self.x, {})  # makes the tables, which Dynamo can't trace
        self.loop.network = network
        kwargs = compile_kwargs(case.device, autotune)
        self.compute = torch.compile(self.loop.step, **kwargs) if compiled else self.loop.step
        self.taken = 0

    def _step(self) -> None:
        self.x.copy_(self.compute(self.x, self.t, torch.randn_like(self.x), self.case.kwargs))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.x.normal_()
        for i in reversed(range(self.loop.diffusion.num_timesteps)):
            self.t.fill_(i)
            self.graphs.run("step", self._step, warming_up=self.taken < WARM_UP)
            self.taken += 1
        return to_uint8(self.x).cpu()


def _ready(model: nn.Module, case: DrawCase) -> nn.Module:
    return model.to(case.device, memory_format=torch.channels_last).eval().requires_grad_(False)


@without_our_ops
def strong_seed(case: DrawCase, compiled: bool = True, autotune: bool = False) -> Draw:
    """The reference's network with PyTorch's fused operations, and its convolutions in the case's precision."""
    check_same_function(case.config.model, strengthened)
    model = case.filled(strengthened)
    if case.precision != "fp32":
        model.convert_convolutions(DTYPES[case.precision])
    return FastLoop(case, _ready(model, case), compiled, autotune)


@without_our_ops
def diffusers(case: DrawCase, autotune: bool = False) -> Draw:
    """diffusers' network, all of it in the case's precision, compiled."""
    dtype = torch.float32 if case.precision == "fp32" else DTYPES[case.precision]
    network = _ready(diffusers_unet(case.config.model, case.device).to(dtype), case)

    def called(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        labels = {} if y is None else {"class_labels": y}
        return network(x.to(dtype), t, **labels).sample.float()

    return FastLoop(case, called, compiled=True, autotune=autotune)


# --- ours ---


class _EmbeddedEachTime:
    """A network that computes its conditioning anew in every call."""

    def __init__(
        self, precomputed: Any, table: SolverTable, diffusion: GaussianDiffusion, device: torch.device
    ) -> None:
        self.model, self.body, self.labels = precomputed.model, precomputed.body, precomputed.labels
        self.timesteps = diffusion.model_timesteps(torch.from_numpy(table.steps).to(device))

    def __call__(self, x: Tensor, row: Tensor, classes: Tensor | None, low_res: Tensor | None) -> Tensor:
        emb = self.model.embed_time(self.timesteps.index_select(0, row).expand(len(x)))
        return self.body(x, self.model.project(emb if classes is None else emb + classes), low_res)


def our_network(case: DrawCase, frozen: bool = True) -> UNet:
    model = case.filled(build_model)
    model.eval().requires_grad_(False).set_precision(body_dtype(case.precision, case.device))
    return freeze(model) if frozen else model


@torch.no_grad()
def our_engine(
    case: DrawCase, compiled: bool, cuda_graph: bool, frozen: bool = True, precomputed: bool = True
) -> Engine:
    """The engine as sampling jobs run it."""
    diffusion, table = case.diffusion(), case.table()
    network = GuidedNetwork(our_network(case, frozen), table, diffusion, compiled=compiled)
    if not precomputed:
        network.network = _EmbeddedEachTime(network.network, table, diffusion, case.device)  # type: ignore[assignment]
    return Engine(network, batch_size=case.batch, seed_and_key=SAMPLES, fixed_shape=compiled, cuda_graph=cuda_graph)


def ours(case: DrawCase, compiled: bool = True, cuda_graph: bool = True, **changes: bool) -> Draw:
    """The engine with its noise by counters. Without a GPU there are no graphs."""
    engine = our_engine(case, compiled, cuda_graph and case.device.type == "cuda", **changes)
    return exact(lambda: drawn_by(engine, case))


def drawn_by(engine: Engine, case: DrawCase) -> Tensor:
    """A batch of the engine, as pixels on the host."""
    index = torch.arange(case.batch, device=case.device)
    return to_uint8(engine.draw(index, case.kwargs.get("y"), case.kwargs.get("low_res"))).cpu()


LEVERS: dict[str, dict[str, bool]] = {
    "weights frozen once": {"frozen": False},
    "embeddings precomputed": {"precomputed": False},
    "compile": {"compiled": False},
    "graphs": {"cuda_graph": False},
}
"""The settings of `ours` that leave the lever out."""
GPU_ONLY = ("graphs",)
