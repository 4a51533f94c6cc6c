"""Draws batches of images: a network call and one fused update per row of a solver's table, optionally as CUDA graphs.

All state has fixed addresses, so a graph that is captured once serves every row and every batch: the row number, the
image numbers and the conditioning are copied in place, and the graph is replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.samplers import Step
from fastdiff.diffusion.solvers import SolverTable
from fastdiff.models import BackboneSettings, UNet, build_model
from fastdiff.models.classifier import build_classifier
from fastdiff.models.unet import dummy_batch, freeze
from fastdiff.precompile import META, Launch, launches_of
from fastdiff.runtime.cuda_graphs import GraphRunner
from fastdiff.sampling.classifier_gradient import ClassifierGuidance
from fastdiff.sampling.guided_network import Guidance, GuidedNetwork

WARM_UP = 2
"""Rows computed before a graph is captured. During these, code is compiled and cuDNN chooses its kernels."""


@dataclass
class _State:
    """The state of a batch. Maps are channels-last; `input` is x itself if the network takes x without conversion."""

    x: Tensor  # [B, C, H, W] float32
    input: Tensor  # as GuidedNetwork.input_format says
    pred_xstart: Tensor  # [B, C, H, W] float32
    history: list[Tensor]  # earlier predictions, the latest first
    row: Tensor  # [1] int64
    index: Tensor  # [B] int64
    watch: Tensor  # [B] float32, the sum of each image's network outputs and gradients: finite only if all of them are
    given: dict[str, Tensor]  # GuidedNetwork.conditioning


class Engine:
    """Draws batches of at most `batch_size` images with the network's solver table.

    seed_and_key  The seed or-ed with one of `diffusion.noise_keys`. It and an image's number determine all noise of
                  the image.
    clip          Clip the predicted x_0 to [-1, 1].
    fixed_shape   Pad smaller batches, because compiled code is specialised to one shape; cuda_graph implies it.
    """

    def __init__(
        self,
        network: GuidedNetwork,
        *,
        batch_size: int,
        seed_and_key: int,
        clip: bool = True,
        fixed_shape: bool = False,
        cuda_graph: bool | Literal["auto"] = False,
    ) -> None:
        settings, table, device = network.settings, network.table, network.device
        self.network, self.table, self.device = network, table, device
        self.batch_size, self.seed_and_key, self.clip = batch_size, seed_and_key, clip
        self.shape = (settings.in_channels, *settings.size_hw)
        self.fixed_shape = fixed_shape or cuda_graph is not False
        self._coefficients = torch.from_numpy(table.coefficients).to(device, torch.float32)
        self._rows = torch.arange(table.num_evaluations, device=device)
        self._draws = torch.from_numpy(table.steps).to(device) + 1
        self._noisy = (table.column("sigma") != 0).tolist()
        self._state: _State | None = None
        self._graphs = GraphRunner(device, cuda_graph)
        self._warm = {False: 0, True: 0}

    @torch.no_grad()
    def steps(self, index: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Iterator[Step]:
        """Draw the images with numbers `index` [n] int64, n <= batch_size. Yields a Step after every complete step.

        y [n] int64 holds their classes, low_res [n, C, h, w] float32 the images to enlarge. The next step overwrites
        the tensors of a Step.
        """
        count = len(index)
        if count > self.batch_size:
            raise ValueError(f"{count} images at once, but the engine takes {self.batch_size}")
        if self.fixed_shape and count < self.batch_size:
            index = _filled(index, self.batch_size)
            y = y if y is None else _filled(y, self.batch_size)
            low_res = low_res if low_res is None else _filled(low_res, self.batch_size)
        state = self._begin(index, y, low_res)
        steps = zip(self.table.steps.tolist(), self.table.complete.tolist(), strict=True)
        for row, (step, complete) in enumerate(steps):
            self._advance(state, row)
            if complete:
                yield Step(step, state.x[:count], state.pred_xstart[:count])

    def finite(self, count: int) -> Tensor:
        """Whether each of the first `count` images of the last batch and its network outputs are finite, [n] bool.

        The image alone does not show it, because clipping turns an infinite prediction into 1.
        """
        assert self._state is not None
        return (self._state.watch + self._state.x.sum(dim=(1, 2, 3))).isfinite()[:count]

    def draw(self, index: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """The images [n, C, H, W] float32 in about [-1, 1]."""
        *_, last = self.steps(index, y, low_res)
        return last.sample

    def _begin(self, index: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> _State:
        """Initialise the state with x_T and the conditioning of a batch."""
        x = ops.image_noise(self.seed_and_key, index, 0, self.shape)
        given = self.network.conditioning(y, low_res)
        if self._state is None or not self._graphs.enabled:
            self._state = self._allocate(x, index, given)
        state = self._state
        state.x.copy_(x)
        if state.input is not state.x:
            state.input.zero_()
            state.input[:, : x.shape[1]].copy_(x)
        state.watch.zero_()
        for earlier in state.history:
            earlier.zero_()
        state.index.copy_(index)
        for name, value in given.items():
            state.given[name].copy_(value)
        return state

    def _allocate(self, x: Tensor, index: Tensor, given: dict[str, Tensor]) -> _State:
        B, C, H, W = x.shape

        def zeros(channels: int, dtype: torch.dtype) -> Tensor:  # channels-last also where C, H or W is 1
            return torch.zeros(B, H, W, channels, dtype=dtype, device=self.device).permute(0, 3, 1, 2)

        own_x = zeros(C, torch.float32)
        form = self.network.input_format
        return _State(
            x=own_x,
            input=own_x if form is None else zeros(form[1], form[0]),
            pred_xstart=zeros(C, torch.float32),
            history=[zeros(C, torch.float32) for _ in range(self.table.history)],
            row=self._rows[:1].clone(),
            index=index.clone(),
            watch=torch.zeros(B, device=self.device),
            given={name: value.clone() for name, value in given.items()},
        )

    def _advance(self, state: _State, row: int) -> None:
        """Compute a row of the table: a network call and a step."""
        state.row.copy_(self._rows[row : row + 1])
        guided = self.network.guided[row]
        # One graph serves all guided rows and another all other rows, so both add noise if any row does.
        noisy = self.table.stochastic if self._graphs.enabled else self._noisy[row]
        work = functools.partial(self._work, state, guided, noisy)
        self._graphs.run(guided, work, warming_up=self._warm[guided] < WARM_UP)
        self._warm[guided] += 1

    def _work(self, state: _State, guided: bool, noisy: bool) -> None:
        """Compute the row `state.row` in place. Noise has no effect in a row whose sigma is 0."""
        B = len(state.x)
        output = self.network(state.input, state.row, state.given, guided)
        gradient = self.network.gradient(state.x, state.row, state.given)
        for each in (output, gradient):
            if each is not None:
                state.watch += each.sum(dim=(1, 2, 3), dtype=torch.float32)
        noise = None
        if noisy:
            draws = self._draws.index_select(0, state.row).expand(B).contiguous()
            noise = ops.CounterNoise(self.seed_and_key, state.index, self.shape, draws)
        x, pred_xstart, network_input = ops.sampler_step(
            output,
            state.x,
            self._coefficients.index_select(0, state.row).expand(B, -1),
            noise,
            gradient=gradient,
            history=tuple(state.history),
            epsilon=self.network.epsilon,
            clip=self.clip,
            variance=self.table.variance if noisy or gradient is not None else "fixed",
            input_dtype=None if state.input is state.x else state.input.dtype,
        )
        state.x.copy_(x)
        state.pred_xstart.copy_(pred_xstart)
        if state.input is not state.x:
            state.input.copy_(network_input)
        for i in reversed(range(1, len(state.history))):
            state.history[i].copy_(state.history[i - 1])
        if state.history:
            state.history[0].copy_(pred_xstart)


def _filled(x: Tensor, size: int) -> Tensor:
    """x with its last row repeated up to `size` rows."""
    return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])


def sampling_launches(
    settings: BackboneSettings,
    diffusion: GaussianDiffusion,
    table: SolverTable,
    batch: int,
    precision: torch.dtype,
    *,
    guidance: Guidance | None = None,
    clip: bool = True,
) -> list[Launch]:
    """The kernel launches by which `Engine` draws `batch` images at once, with a body in `precision`."""

    def frozen(settings: BackboneSettings) -> UNet:
        with META:
            return freeze(build_model(settings).set_precision(precision))

    def frozen_classifier(of: ClassifierGuidance) -> ClassifierGuidance:
        with META:
            classifier = build_classifier(of.classifier.settings).set_precision(of.classifier.dtype)
            return replace(of, classifier=freeze(classifier))

    def work() -> None:
        chosen = guidance or Guidance()
        guide = None if chosen.guide is None else frozen(chosen.guide.settings)
        classifier = None if chosen.classifier is None else frozen_classifier(chosen.classifier)
        given = replace(chosen, guide=guide, classifier=classifier)
        network = GuidedNetwork(frozen(settings), table, diffusion, given)
        engine = Engine(network, batch_size=batch, seed_and_key=SAMPLES, clip=clip)
        dummy = dummy_batch(settings, batch, META)
        labels = {} if classifier is None else {"y": dummy.t}
        state = engine._begin(dummy.noise.index, **{**labels, **dummy.model_kwargs})
        kinds = zip(network.guided, engine._noisy, strict=True)
        for row in {kind: row for row, kind in enumerate(kinds)}.values():
            engine._advance(state, row)

    return launches_of(work)
