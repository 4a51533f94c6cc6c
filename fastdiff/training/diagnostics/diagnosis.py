"""Diagnoses losses or gradients that stay non-finite, by computing the last step again with a second network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.images.loader import Batch
from fastdiff.models import UNet
from fastdiff.models.blocks import Sum, value
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.training.metrics import LossResult
from fastdiff.training.optimizer import learning_rate
from fastdiff.training.trainer import Trainer, rows_of

WORST = 8
"""Number of images named: those with the greatest losses."""
NAMED = 10
"""Largest number of parameters named."""

Numbers = dict[str, float]


@dataclass
class _Found:
    """Results of one rank for its share of the last batch."""

    samples: list[dict[str, float]] = field(default_factory=list)
    activations: Numbers = field(default_factory=dict)
    gradients: Numbers = field(default_factory=dict)
    bad_gradients: list[str] = field(default_factory=list)
    without: int = 0
    """Images that the gradients leave out, because their losses are not finite."""
    left_out: str = ""
    """Why the step could not be computed again."""


def diagnose(trainer: Trainer) -> tuple[list[str], dict[str, Any]]:
    """(lines for the log, the same as JSON): loss scale, learning rate, weights, activations, gradients, worst images.

    A network in which no gradient is sharded, whatever the ZeRO stage, takes the last step again: its losses, and the
    gradients of the images whose loss is finite (of all, if none is). If timesteps are drawn by losses, they may differ
    from those of the step. The trainer is not changed. Every rank gets the same result. Collective.
    """
    weights = _on_all_ranks(trainer, trainer.master_weights.gather(trainer.master_weights.shards))
    found = _Found()
    try:
        _examine(trainer, weights, found)
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


def _on_all_ranks(trainer: Trainer, whole: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Broadcast the weights that rank 0 has to every rank. Collective."""
    if trainer.processes.world_size == 1:
        assert whole is not None
        return whole
    weights = {}
    for name, shape in trainer.master_weights.shapes.items():
        there = torch.empty(shape, device=trainer.device) if whole is None else whole[name].to(trainer.device)
        dist.broadcast(there, src=0)
        weights[name] = there.cpu()
    return weights


def _examine(trainer: Trainer, weights: dict[str, Tensor], found: _Found) -> None:
    """Compute the last step again with a second network, and put the results into `found`."""
    model = build_network(trainer.model_settings)
    model.load_state_dict(weights)
    model.to(trainer.device).train().set_precision(trainer.model.dtype)
    micro_batches = trainer.micro_batches(trainer.last_batch)
    with torch.no_grad(), _watching(model, found.activations):
        for i, batch in enumerate(micro_batches):
            result = _losses(trainer, model, batch, i)
            rows = (batch.positions, result.t, result.terms["loss"] * result.weights)
            for position, t, loss in zip(*(row.tolist() for row in rows), strict=True):
                found.samples.append({"position": position, "timestep": t, "loss": loss})
    finite = torch.tensor([math.isfinite(sample["loss"]) for sample in found.samples], device=trainer.device)
    if not finite.any():
        finite[:] = True
    found.without = int((~finite).sum())
    loss_scale = trainer.stepper.scaler_state().get("cur_scale", 1.0)
    for i, (batch, chosen) in enumerate(zip(micro_batches, finite.split(trainer.plan.micro), strict=True)):
        if chosen.any():
            share = int(chosen.sum()) / int(finite.sum())
            result = _losses(trainer, model, rows_of(batch, chosen.nonzero().flatten()), i)
            (result.loss * share * loss_scale).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squared = float(parameter.grad.double().square().sum()) / loss_scale**2
            found.gradients[block_of(name)] = found.gradients.get(block_of(name), 0.0) + squared
            if not math.isfinite(squared):
                found.bad_gradients.append(name)
    found.gradients = {block: math.sqrt(squared) for block, squared in found.gradients.items()}


def _losses(trainer: Trainer, model: UNet | Classifier, batch: Batch, micro: int) -> LossResult:
    """The losses of a micro-batch as the last step had them, with the same dropout if the images are the same."""
    trainer.seed_dropout(trainer.step - 1, micro)
    return trainer.losses(model, batch)


@contextmanager
def _watching(model: UNet | Classifier, greatest: Numbers) -> Iterator[None]:
    """Put the greatest magnitude of each block's output into `greatest`; nan if an output contains nan."""

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor | Sum) -> None:
            most = float(value(output).detach().abs().max())
            before = greatest.get(name, 0.0)
            greatest[name] = most if math.isnan(most) else max(before, most)

        return hook

    blocks = {"time_embed": model.time_embed, "middle_block": model.middle_block, "out": model.out}
    for kind in ("input_blocks", "output_blocks"):
        blocks |= {f"{kind}.{i}": block for i, block in enumerate(getattr(model, kind, ()))}
    with ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.callback(block.register_forward_hook(look(name)).remove)
        yield


# --- over all ranks ---


def _content(trainer: Trainer, weights: dict[str, Tensor], all_found: list[_Found]) -> dict[str, Any]:
    """The diagnosis as a dictionary, with the worst rank's numbers for each block."""
    skipped = trainer.stepper.skipped_steps
    greatest = _worst((block_of(name), float(weight.abs().max())) for name, weight in weights.items())
    activations = _worst(item for found in all_found for item in found.activations.items())
    gradients = _worst(item for found in all_found for item in found.gradients.items())
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
                "greatest_weight": weight,
                "greatest_activation": activations.get(block),
                "gradient_norm": gradients.get(block),
            }
            for block, weight in greatest.items()
        },
        "gradients_without": sum(found.without for found in all_found),
        "images": len(samples),
        "bad_losses": sum(not math.isfinite(sample["loss"]) for sample in samples),
        "worst": sorted(samples, key=lambda sample: -_size(sample["loss"]))[:WORST],
        "left_out": next((found.left_out for found in all_found if found.left_out), ""),
    }


def _size(number: float) -> float:
    return math.inf if math.isnan(number) else abs(number)


def _worst(numbers: Iterable[tuple[str, float]]) -> Numbers:
    """The number of greatest magnitude of each block, in the order in which blocks come; nan counts as infinite."""
    worst: Numbers = {}
    for block, number in numbers:
        worst[block] = max(worst.get(block, 0.0), number, key=_size)
    return worst


def _lines(content: dict[str, Any]) -> list[str]:
    scale = "" if content["loss_scale"] is None else f", loss scale {content['loss_scale']:g}"
    lines = [
        f"diagnosis after step {content['step']}: {content['skipped_steps']} steps skipped, the last "
        f"{content['skipped_in_a_row']} in a row; {content['precision']}, lr {content['lr']:g}{scale}",
        f"non-finite weights: {_listed(content['bad_weights'])}; gradients: {_listed(content['bad_gradients'])}",
    ]
    if content["left_out"]:
        lines.append(f"incomplete: {content['left_out']}")
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
    """The content with nan and infinities as strings, because JSON doesn't have them."""
    if isinstance(content, dict):
        return {name: _as_json(each) for name, each in content.items()}
    if isinstance(content, list):
        return [_as_json(each) for each in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
