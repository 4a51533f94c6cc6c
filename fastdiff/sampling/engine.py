"""Runs a sampler's plan: a network evaluation and one fused step per row, as CUDA graphs where they are wanted.

All state lies in fixed places, so that a graph captured once serves every row, every batch and every image: the row's
number, the images' numbers and their conditioning are copied in, and graphs are replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.diffusion.noise_keys import SAMPLES
from fastdiff.diffusion.process import ModelMeanType
from fastdiff.diffusion.samplers import Step
from fastdiff.diffusion.solvers import Plan
from fastdiff.models import BackboneSettings, SuperResSettings, UNet, build_model
from fastdiff.models.freeze import freeze
from fastdiff.precompile import META, Launch, launches_of
from fastdiff.sampling.guided_network import Guidance, GuidedNetwork, coefficient_rows

WARM_UP = 2
"""Rows taken before a graph is captured: code is compiled in them, and cuDNN chooses its kernels."""


@dataclass
class _State:
    """A batch on its way. Maps are channels-last; `input` is x itself where the network takes it as it is."""

    x: Tensor  # [B, C, H, W] float32
    input: Tensor  # as GuidedNetwork.input_format says
    pred_xstart: Tensor  # [B, C, H, W] float32
    history: list[Tensor]  # earlier predictions, the latest first
    row: Tensor  # [1] int64
    index: Tensor  # [B] int64
    watch: Tensor  # [B] float32, the sum of all outputs: finite as long as they are
    given: dict[str, Tensor]  # GuidedNetwork.conditioning


class Engine:
    """Draws batches of one size by one plan.

    seed_stream is the seed with its stream in the high half (`diffusion.streams`): with it and the image's number all
    noise of an image is fixed. With fixed_shape a smaller batch is filled up, for compiled code and graphs know one.
    """

    def __init__(
        self,
        evaluation: GuidedNetwork,
        plan: Plan,
        diffusion: GaussianDiffusion,
        device: torch.device,
        *,
        batch_size: int,
        seed_stream: int,
        clip: bool = True,
        fixed_shape: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        settings = evaluation.settings
        self.evaluation, self.plan, self.batch_size, self.clip = evaluation, plan, batch_size, clip
        self.shape = (settings.in_channels, *settings.size_hw)
        self.epsilon = diffusion.mean_type is ModelMeanType.EPSILON
        self.seed_stream, self.device = seed_stream, device
        self.fixed_shape = fixed_shape or cuda_graph
        self._coefficients = coefficient_rows(plan, device)
        self._rows = torch.arange(plan.num_evaluations, device=device)
        self._draws = torch.from_numpy(plan.steps).to(device) + 1
        self._noisy = [bool(sigma) for sigma in plan.coefficients[:, ops.STEP_COLUMNS.index("sigma")]]
        self._stream = torch.cuda.Stream(device) if cuda_graph else None
        self._state: _State | None = None
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._warm = {False: 0, True: 0}

    @torch.no_grad()
    def steps(self, index: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Iterator[Step]:
        """Draw images `index` [n] int64, n at most batch_size; yields after every complete step.

        y [n] int64 are their classes, low_res [n, C, h, w] float32 the images to enlarge. What a Step holds is valid
        until the next one.
        """
        count = len(index)
        if count > self.batch_size:
            raise ValueError(f"{count} images at once, the engine takes {self.batch_size}")
        if self.fixed_shape and count < self.batch_size:
            index = _filled(index, self.batch_size)
            y = y if y is None else _filled(y, self.batch_size)
            low_res = low_res if low_res is None else _filled(low_res, self.batch_size)
        state = self._begin(index, y, low_res)
        for e, (step, complete) in enumerate(zip(self.plan.steps.tolist(), self.plan.complete.tolist(), strict=True)):
            self._advance(state, e)
            if complete:
                yield Step(step, state.x[:count], state.pred_xstart[:count])

    def finite(self, count: int) -> Tensor:
        """Whether each of the first `count` images of the last batch is finite, and all that made it was, [n] bool.

        An image shows it only in part: clipping makes 1 of an infinite prediction.
        """
        assert self._state is not None
        return (self._state.watch + self._state.x.sum(dim=(1, 2, 3))).isfinite()[:count]

    def draw(self, index: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """The images [n, C, H, W] float32 in about [-1, 1]."""
        for step in self.steps(index, y, low_res):
            drawn = step.sample
        return drawn

    def _begin(self, index: Tensor, y: Tensor | None, low_res: Tensor | None) -> _State:
        x = ops.image_noise(self.seed_stream, index, 0, self.shape)
        given = self.evaluation.conditioning(y, low_res)
        if self._state is None or self._stream is None:
            self._state = self._places(x, index, given)
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

    def _places(self, x: Tensor, index: Tensor, given: dict[str, Tensor]) -> _State:
        B, C, H, W = x.shape

        def place(channels: int, dtype: torch.dtype) -> Tensor:  # channels-last also where C, H or W is 1
            return torch.zeros(B, H, W, channels, dtype=dtype, device=self.device).permute(0, 3, 1, 2)

        own = place(C, torch.float32)
        form = self.evaluation.input_format
        return _State(
            x=own,
            input=own if form is None else place(form[1], form[0]),
            pred_xstart=place(C, torch.float32),
            history=[place(C, torch.float32) for _ in range(self.plan.history)],
            row=self._rows[:1].clone(),
            index=index.clone(),
            watch=torch.zeros(B, device=self.device),
            given={name: value.clone() for name, value in given.items()},
        )

    def _advance(self, state: _State, e: int) -> None:
        """Row e of the plan: an evaluation and a step."""
        state.row.copy_(self._rows[e : e + 1])
        guided = self.evaluation.guided[e]
        if self._stream is None:
            self._work(state, guided, self._noisy[e])
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._warm[guided] < WARM_UP:
                self._warm[guided] += 1
                self._work(state, guided, self.plan.stochastic)
            else:
                if guided not in self._graphs:
                    self._capture(state, guided)
                self._graphs[guided].replay()
        current.wait_stream(self._stream)

    def _capture(self, state: _State, guided: bool) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # thread_local: the thread that writes files goes on with CUDA calls of its own.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            self._work(state, guided, self.plan.stochastic)
        self._graphs[guided] = graph

    def _work(self, state: _State, guided: bool, noisy: bool) -> None:
        """A row of the plan, in place. A row whose sigma is 0 comes out the same with noise and without."""
        B = len(state.x)
        output = self.evaluation(state.input, state.row, state.given, guided)
        state.watch += output.sum(dim=(1, 2, 3), dtype=torch.float32)
        noise = None
        if noisy:
            draws = self._draws.index_select(0, state.row).expand(B).contiguous()
            noise = ops.CounterNoise(self.seed_stream, state.index, self.shape, draws)
        x, pred_xstart, network_input = ops.sampler_step(
            output,
            state.x,
            self._coefficients.index_select(0, state.row).expand(B, -1),
            noise,
            history=tuple(state.history),
            epsilon=self.epsilon,
            clip=self.clip,
            variance=self.plan.variance if noisy else "fixed",
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
    plan: Plan,
    batch: int,
    precision: torch.dtype,
    *,
    guidance: Guidance | None = None,
    clip: bool = True,
) -> list[Launch]:
    """Launches of drawing `batch` images at once by `Engine`, with a body in `precision`."""

    def network(settings: BackboneSettings) -> UNet:
        with META:
            return freeze(build_model(settings).set_precision(precision))

    def work() -> None:
        chosen = guidance or Guidance()
        guide = None if chosen.guide is None else network(chosen.guide.settings)
        evaluation = GuidedNetwork(network(settings), plan, diffusion, replace(chosen, guide=guide), META)
        engine = Engine(evaluation, plan, diffusion, META, batch_size=batch, seed_stream=SAMPLES, clip=clip)
        index = torch.empty(batch, dtype=torch.int64, device=META)
        small = None
        if isinstance(settings, SuperResSettings):
            small = torch.empty(batch, settings.in_channels, *settings.small_size, device=META)
        state = engine._begin(index, index if settings.class_cond else None, small)
        kinds = zip(evaluation.guided, engine._noisy, strict=True)
        for row in {kind: row for row, kind in enumerate(kinds)}.values():
            engine._advance(state, row)

    return launches_of(work)
