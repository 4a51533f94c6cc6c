"""Chooses the class of each image of a job."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.noise_keys import CLASSES
from fastdiff.errors import UserError


@dataclass(frozen=True)
class Labels:
    """Classes as a function of the seed and the image's number: in turn, or at random if they have weights."""

    chosen: tuple[int, ...]
    weights: tuple[float, ...] = ()

    @property
    def in_turn(self) -> bool:
        return not self.weights

    def __call__(self, index: Tensor, seed: int) -> Tensor:
        """Labels [B] int64 of images `index` [B] int64."""
        chosen = torch.tensor(self.chosen, device=index.device)
        if self.in_turn:
            return chosen[index % len(chosen)]
        uniform = ops.image_uniform(seed | CLASSES, index, 0)
        ends = torch.tensor(self.weights, dtype=torch.float64, device=index.device).cumsum(0)
        place = torch.searchsorted(ends / ends[-1], uniform.double(), right=True)
        return chosen[place.clamp(max=len(chosen) - 1)]


def parse_labels(classes: str, class_names: list[str], num_classes: int) -> Labels:
    """Read '0,5,cat' (in turn), 'cat:3,dog:1' (at random with weights), 'balanced' (all in turn) or '' (all at random).

    A class is a number below num_classes or one of class_names. UserError for anything else.
    """
    if classes.strip() == "balanced" and "balanced" not in class_names:
        return Labels(tuple(range(num_classes)))
    words = [word.strip() for word in classes.split(",") if word.strip()]
    if not words:
        return Labels(tuple(range(num_classes)), (1.0,) * num_classes)
    chosen, weights = [], []
    for word in words:
        name, colon, weight = word.rpartition(":")
        if not colon or word in class_names:
            name, weight = word, ""
        chosen.append(_number(name.strip(), class_names, num_classes))
        weights.append(_weight(weight, word) if weight or colon and name != word else None)
    given = [weight for weight in weights if weight is not None]
    if not given:
        return Labels(tuple(chosen))
    if len(given) < len(weights):
        raise UserError(f"{classes} gives weights to some classes only; give every class one, as in 0:3,5:1")
    return Labels(tuple(chosen), tuple(given))


def _number(word: str, class_names: list[str], num_classes: int) -> int:
    if word in class_names:
        return class_names.index(word)
    if word.isdecimal() and int(word) < num_classes:
        return int(word)
    known = f" or one of {', '.join(class_names[:10])}" if class_names else ""
    raise UserError(f"{word} is not a class; give numbers from 0 to {num_classes - 1}{known}")


def _weight(text: str, word: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{word} has no weight above 0 after its colon; write CLASS:WEIGHT, as in 0:3")
    return weight
