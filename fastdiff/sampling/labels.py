"""The classes of a sampling job's images: read from --classes or from Python, and assigned to image numbers.

In Python, whole numbers are labels and texts are names. In a command line's text a word is a name if the model has a
class of that name, else a number, but for models with names that are numbers: there 0,1,2 would mix both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.noise_keys import CLASSES
from fastdiff.errors import UserError, did_you_mean, quoted
from fastdiff.images.labels import NAMED
from fastdiff.images.listing import same_to_readers


@dataclass(frozen=True)
class Labels:
    """Assigns classes to image numbers: in turn, or, if they have weights, at random by the seed."""

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

    A class is a number below num_classes or one of class_names; where some names are numbers themselves, it is a name.
    Raises UserError for anything else.
    """
    classes, class_names = same_to_readers(classes), [same_to_readers(name) for name in class_names]
    if classes.strip() == "balanced" and "balanced" not in class_names:
        return Labels(tuple(range(num_classes)))
    if classes.strip() in class_names:  # a name may have commas
        return Labels((class_names.index(classes.strip()),))
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
    near = did_you_mean(word, class_names)
    if word.isdecimal() and any(name.isdecimal() for name in class_names):
        names = f"{_first(class_names)}{near}"
        raise UserError(f"{word} is not a class; give names, some of which are numbers themselves: {names}")
    if word.isdecimal() and int(word) < num_classes:
        return int(word)
    raise UserError(f"{word} is not a class; give numbers from 0 to {num_classes - 1}{_known(class_names)}{near}")


def _known(class_names: list[str]) -> str:
    if not class_names:
        return ""
    return f" or one of {_first(class_names)}"


def _first(class_names: list[str]) -> str:
    return f"{', '.join(class_names[:NAMED])}{', ...' if len(class_names) > NAMED else ''}"


def _weight(text: str, word: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{word} has no weight above 0 after its colon; write CLASS:WEIGHT, as in 0:3")
    return weight


def labels_in_python(classes: Any, class_names: list[str], num_classes: int) -> Labels:
    """Read a class, or a list or array of classes that are used in turn: whole numbers are labels, texts are names.

    A single text is read by `parse_labels`, and so is an empty list. Raises UserError for anything else.
    """
    if isinstance(classes, str):
        return parse_labels(classes, class_names, num_classes)
    chosen = label_numbers(classes, class_names, num_classes)
    return Labels(tuple(chosen)) if chosen else parse_labels("", class_names, num_classes)


def label_numbers(classes: Any, class_names: list[str], num_classes: int) -> list[int]:
    """The labels of a class or of a list or array [n] of classes: whole numbers are labels, texts are names."""
    if isinstance(classes, (np.ndarray, Tensor)):
        classes = classes.tolist()
    class_names = [same_to_readers(name) for name in class_names]
    listed = list(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else [classes]
    chosen = []
    for each in listed:
        if isinstance(each, str):
            chosen.append(_number(same_to_readers(each.strip()), class_names, num_classes))
        elif not isinstance(each, (int, np.integer)) or isinstance(each, bool):
            known = f"{num_classes - 1}{_known(class_names)}"
            raise UserError(f"{quoted(each)} is not a class; give numbers from 0 to {known}")
        elif not 0 <= each < num_classes:
            raise UserError(f"{each} is not a class; give numbers from 0 to {num_classes - 1}")
        else:
            chosen.append(int(each))
    return chosen


def renumbered(ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
    """The number in `ours` of each class of `theirs`, int64 [len(theirs)]; -1 for one that is not in `ours`."""
    number = {same_to_readers(name): i for i, name in enumerate(ours)}
    return np.array([number.get(same_to_readers(name), -1) for name in theirs], dtype=np.int64)


def describe_labels(labels: Labels, class_names: list[str]) -> str:
    """The line that says which numbers the chosen classes have; empty where all are drawn or none has a name."""
    chosen = list(dict.fromkeys(labels.chosen))
    if not class_names or len(chosen) >= len(class_names):
        return ""
    shown = ", ".join(f"{class_names[label]} {label}" for label in chosen[:NAMED] if label < len(class_names))
    return f"classes, with their numbers: {shown}{', ...' if len(chosen) > NAMED else ''}"
