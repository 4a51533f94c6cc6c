"""What is wrong with a run whose losses or gradients stay non-finite: a fresh network on the last step's images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.images.loader import Batch
from fastdiff.models import UNet, build_model
from fastdiff.models.blocks import Sum, value
from fastdiff.training.optimizer import learning_rate
from fastdiff.training.trainer import Trainer

WORST = 8
"""Images named, those with the greatest losses."""
NAMED = 10
"""Parameters named at most."""

Numbers = dict[str, float]


@dataclass
class _Found:
    """What a rank finds in its share of the last batch."""

    samples: list[dict[str, float]] = field(default_factory=list)
    activations: Numbers = field(default_factory=dict)
    gradients: Numbers = field(default_factory=dict)
    bad_gradients: list[str] = field(default_factory=list)
    without: int = 0
    left_out: str = ""


def diagnose(trainer: Trainer) -> tuple[list[str], dict[str, Any]]:
    """(lines for the log, the same as JSON): loss scale, learning rate, weights, activations, gradients, worst images.

    The last step is taken once more by a network in which no gradient is sharded, whatever the ZeRO stage: its losses,
    and the gradients of the images whose loss is finite (of all, if none is). With timesteps drawn by losses these may
    be others than in the step itself. Every rank gets the same. Collective.
    """
    weights = _everyones(trainer, trainer.masters.gather(trainer.masters.flats))
    found = _Found()
    try:
        _look(trainer, weights, found)
    except torch.OutOfMemoryError:
        found.left_out = "the GPU's memory was too small for a second network"
        torch.cuda.empty_cache()
    all_found = [found]
    if trainer.processes.world_size > 1:
        all_found = [_Found() for _ in range(trainer.processes.world_size)]
        dist.all_gather_object(all_found, found)
    content = _content(trainer, weights, all_found)
    return _lines(content), _as_json(content)


def block_of(name: str) -> str:
    """The block that a parameter belongs to: time_embed, input_blocks.3, middle_block, out, …"""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first in ("input_blocks", "output_blocks") else first


# --- on each rank ---


def _everyones(trainer: Trainer, whole: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Rank 0's weights, on every rank."""
    if trainer.processes.world_size == 1:
        assert whole is not None
        return whole
    weights = {}
    for name, shape in trainer.masters.shapes.items():
        there = torch.empty(shape, device=trainer.device) if whole is None else whole[name].to(trainer.device)
        dist.broadcast(there, src=0)
        weights[name] = there.cpu()
    return weights


def _look(trainer: Trainer, weights: dict[str, Tensor], found: _Found) -> None:
    model = build_model(trainer.model_settings)
    model.load_state_dict(weights)
    model.to(trainer.device).train().set_precision(trainer.model.dtype)
    batch = trainer.last_batch
    cuts = [slice(i * trainer.micro, (i + 1) * trainer.micro) for i in range(trainer.accumulation)]
    with _recording(trainer) as recorder:
        with torch.no_grad(), _watching(model, found.activations):
            for i, cut in enumerate(cuts):
                _losses(trainer, model, _part(batch, cut), i)
        found.samples = recorder.samples(batch.positions)
        finite = torch.tensor([math.isfinite(sample["loss"]) for sample in found.samples], device=trainer.device)
        if not finite.any():
            finite[:] = True
        found.without = int((~finite).sum())
        loss_scale = trainer.stepper.scaler_state().get("cur_scale", 1.0)
        for i, cut in enumerate(cuts):
            if finite[cut].any():
                part = _part(_part(batch, cut), finite[cut].nonzero().flatten())
                share = len(part.positions) / int(finite.sum())
                (_losses(trainer, model, part, i) * share * loss_scale).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squared = float(parameter.grad.double().square().sum()) / loss_scale**2
            found.gradients[block_of(name)] = found.gradients.get(block_of(name), 0.0) + squared
            if not math.isfinite(squared):
                found.bad_gradients.append(name)
    found.gradients = {block: math.sqrt(squared) for block, squared in found.gradients.items()}


def _part(batch: Batch, rows: Any) -> Batch:
    return Batch(batch.images[rows], batch.labels[rows], batch.positions[rows])


def _losses(trainer: Trainer, model: UNet, batch: Batch, micro: int) -> Tensor:
    """The loss of a micro-batch as the last step had it, dropout included where the images are the same."""
    trainer.seed_dropout(trainer.step - 1, micro)
    return trainer.losses(model, batch)


class _Recorder:
    """In the places of the loss meter and of the timestep sampler's memory: keeps what each image had."""

    def __init__(self, sampler: Any) -> None:
        self.sample = sampler.sample
        self.rows: list[tuple[float, float]] = []

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learns nothing."""

    def add(self, t: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        losses = terms["loss"].detach() * weights
        self.rows += zip(t.tolist(), losses.tolist(), strict=True)

    def samples(self, positions: Tensor) -> list[dict[str, float]]:
        found = zip(positions.tolist(), self.rows, strict=True)
        return [{"position": position, "timestep": t, "loss": loss} for position, (t, loss) in found]


@contextmanager
def _recording(trainer: Trainer) -> Iterator[_Recorder]:
    kept = trainer.meter, trainer.sampler
    recorder = _Recorder(trainer.sampler)
    trainer.meter, trainer.sampler = recorder, recorder  # type: ignore[assignment]
    try:
        yield recorder
    finally:
        trainer.meter, trainer.sampler = kept


@contextmanager
def _watching(model: UNet, greatest: Numbers) -> Iterator[None]:
    """Puts the greatest magnitude of each block's output into `greatest`; nan where one is."""

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor | Sum) -> None:
            most = float(value(output).detach().abs().max())
            before = greatest.get(name, 0.0)
            greatest[name] = most if math.isnan(most) else max(before, most)

        return hook

    blocks = {"time_embed": model.time_embed, "middle_block": model.middle_block, "out": model.out[2]}
    for kind in ("input_blocks", "output_blocks"):
        blocks |= {f"{kind}.{i}": block for i, block in enumerate(getattr(model, kind))}
    handles = [block.register_forward_hook(look(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- put together ---


def _content(trainer: Trainer, weights: dict[str, Tensor], all_found: list[_Found]) -> dict[str, Any]:
    skipped = trainer.stepper.skipped_steps
    greatest: Numbers = {}
    for name, weight in weights.items():
        most = float(weight.abs().max())
        greatest[block_of(name)] = _worse(greatest.get(block_of(name), 0.0), most)
    activations: Numbers = {}
    gradients: Numbers = {}
    for found in all_found:
        for mine, theirs in ((activations, found.activations), (gradients, found.gradients)):
            for block, number in theirs.items():
                mine[block] = _worse(mine.get(block, 0.0), number)
    order = list(dict.fromkeys(block_of(name) for name in weights))
    samples = [sample for found in all_found for sample in found.samples]
    return {
        "step": trainer.step,
        "skipped_steps": skipped,
        "skipped_in_a_row": trainer.stepper.bad_streak(),
        "precision": trainer.train.precision,
        "loss_scale": trainer.stepper.scaler_state().get("cur_scale") if trainer.train.precision == "fp16" else None,
        "lr": learning_rate(trainer.train, max(0, trainer.step - skipped)),
        "bad_weights": [name for name, weight in weights.items() if not weight.isfinite().all()],
        "bad_gradients": list(dict.fromkeys(name for found in all_found for name in found.bad_gradients)),
        "blocks": {
            block: {
                "greatest_weight": greatest[block],
                "greatest_activation": activations.get(block),
                "gradient_norm": gradients.get(block),
            }
            for block in order
        },
        "gradients_without": sum(found.without for found in all_found),
        "images": len(samples),
        "bad_losses": sum(not math.isfinite(sample["loss"]) for sample in samples),
        "worst": sorted(samples, key=lambda sample: -_size(sample["loss"]))[:WORST],
        "left_out": next((found.left_out for found in all_found if found.left_out), ""),
    }


def _size(number: float) -> float:
    return math.inf if math.isnan(number) else abs(number)


def _worse(a: float, b: float) -> float:
    return max(a, b, key=_size)


def _lines(content: dict[str, Any]) -> list[str]:
    scale = "" if content["loss_scale"] is None else f", loss scale {content['loss_scale']:g}"
    lines = [
        f"diagnosis after step {content['step']}: {content['skipped_steps']} steps skipped, the last "
        f"{content['skipped_in_a_row']} in a row; {content['precision']}, lr {content['lr']:g}{scale}",
        f"non-finite weights: {_listed(content['bad_weights'])}; gradients: {_listed(content['bad_gradients'])}",
    ]
    if content["left_out"]:
        lines.append(f"less is known: {content['left_out']}")
    without = content["gradients_without"]
    of = f" without the {without} images whose loss is not finite" if without else ""
    lines.append(f"block: greatest weight, greatest activation, norm of the gradient (the worst rank's{of})")
    for block, numbers in content["blocks"].items():
        lines.append(f"  {block}: " + ", ".join("-" if n is None else f"{n:.3g}" for n in numbers.values()))
    if content["worst"]:
        lines.append(
            f"{content['bad_losses']} of the last step's {content['images']} images have a non-finite loss; the worst:"
        )
    for each in content["worst"]:
        lines.append(f"  image {each['position']} of the stream, timestep {each['timestep']}: loss {each['loss']:.4g}")
    return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more if names else "none"


def _as_json(content: Any) -> Any:
    """With words for the numbers that JSON doesn't have."""
    if isinstance(content, dict):
        return {name: _as_json(each) for name, each in content.items()}
    if isinstance(content, list):
        return [_as_json(each) for each in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
