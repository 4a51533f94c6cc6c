"""The format of the golden cases, for the scripts that record them: weights, tolerances and files (README.md)."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

GRID = 64  # random inputs are multiples of 1 / GRID: they compress, and float16 holds most of them
SMALLEST_RTOL = 2e-5
WORST_DEVIATION = 1e-3  # of a well-conditioned result


class Result(NamedTuple):
    """A recorded result, its meaning, and what its relative tolerance multiplies (README.md: element, row or all)."""

    value: Tensor | float | list[float]
    doc: str
    scale: str = "row"


@dataclass(frozen=True)
class Arithmetic:
    """The floating-point arithmetic of one recording: its format, the layout of images and the convolutions."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mkldnn: bool = True

    def tensor(self, value: Tensor) -> Tensor:
        """Return a copy in this dtype, if it is a floating-point tensor, and in this layout, if it has four axes."""
        value = value.clone()
        if value.is_floating_point():
            value = value.to(self.dtype)
        return value.contiguous(memory_format=torch.channels_last) if self.channels_last and value.ndim == 4 else value

    def network(self, model: nn.Module) -> nn.Module:
        """Return a copy of a network in this dtype and layout, without dropout, whose `dtype` attribute agrees."""
        model = copy.deepcopy(model).to(self.dtype).eval()
        model.dtype = self.dtype  # type: ignore[assignment]
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make .float() keep float64, which the recorded code would round to float32, and choose the convolutions."""
        float_method = torch.Tensor.double if self.dtype == torch.float64 else torch.Tensor.float
        wide = mock.patch.object(torch.Tensor, "float", float_method)
        with torch.backends.mkldnn.flags(enabled=self.mkldnn), wide:
            yield


RECORDED = Arithmetic()
OTHERS = (Arithmetic(torch.float64), Arithmetic(channels_last=True, mkldnn=False))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal numbers, float32, rounded to multiples of 1 / GRID."""
    return (torch.randn(*shape, generator=generator) * GRID).round() / GRID


def randomise(
    model: nn.Module, generator: torch.Generator, gains: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Give every parameter of a network random values. Returns its state_dict, float32, as overlapping views.

    Weights have a standard deviation near 1 / sqrt(fan-in), rounded to a power of two, times their gain if `gains` has
    their name; all tensors of one deviation are views at random offsets into one vector, and their rows overlap. Biases
    have deviation 0.1, the scales of norms mean 1 and deviation 0.15.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.GroupNorm)}
    views, pools = {}, {}
    for name, parameter in model.named_parameters():
        rows, tail = parameter.shape[0], parameter[0].numel()
        if parameter.ndim == 1:
            mean, deviation = (1.0, 0.15) if id(parameter) in norms else (0.0, 0.1)
        else:
            table = "_emb" in name  # of labels or positions: fan-in says nothing
            mean, deviation = 0.0, gains.get(name, 1.0) * (0.25 if table else 2.0 ** -round(math.log2(tail) / 2))
        step = min(tail, 13 if rows <= 256 else 7)
        offset = int(torch.randint(97, (), generator=generator))
        inner = parameter[0].contiguous().stride()
        views[name] = ((mean, deviation), offset, parameter.shape, (step, *inner))
        needed = offset + (rows - 1) * step + tail
        pools[mean, deviation] = max(needed, pools.get((mean, deviation), 0))
    vectors = {key: key[0] + key[1] * torch.randn(size, generator=generator) for key, size in pools.items()}
    state = {name: vectors[key].as_strided(shape, step, offset) for name, (key, offset, shape, step) in views.items()}
    model.load_state_dict(state)
    return state


def deviation(want: np.ndarray, got: np.ndarray, scale: str) -> tuple[float, float]:
    """Return the largest relative deviation, and the absolute one to allow near zero if `scale` is "element"."""
    difference, size = np.abs(want.astype(np.float64) - got), np.abs(want.astype(np.float64))
    absolute = 0.0
    if scale == "element" and want.ndim:
        small = size < 1e-5 * size.max()
        absolute = difference[small].max(initial=0.0)
        difference, size = difference[~small], size[~small]
    elif scale == "row" and want.ndim:
        difference, size = (values.reshape(len(want), -1).max(1) for values in (difference, size))
    else:
        difference, size = difference.max(), size.max()
    return float(np.max(difference / np.maximum(size, 1e-300))), float(absolute)


def rounded_up(value: float) -> float:
    """Round up to one digit."""
    if value == 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.0e}")


def record(
    folder: Path,
    *,
    kind: str,
    description: str,
    seed: int,
    config: dict[str, Any],
    compute: Callable[[Arithmetic], dict[str, Result]] = lambda arithmetic: {},
    inputs: dict[str, tuple[Tensor, str]] | None = None,
    weights: dict[str, tuple[dict[str, Tensor], str]] | None = None,
    expected: dict[str, Any] | None = None,
) -> None:
    """Write a case. `inputs` gives tensors and their meanings, `weights` files' state_dicts and their meanings.

    Every floating-point result is computed in float32, which is recorded, in float64, and in float32 with the sums in
    another order. The tolerance is five times the largest deviation from what is recorded, and no less than
    SMALLEST_RTOL. Raises ValueError if a result is so ill-conditioned that a comparison would say little.
    """
    folder.mkdir(exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    specs: dict[str, dict[str, Any]] = {}
    for name, (value, doc) in (inputs or {}).items():
        arrays[f"in_{name}"] = value.numpy()
        specs[f"in_{name}"] = {"role": "input", **_form(value.numpy()), "doc": doc}
    with RECORDED.active():
        results = compute(RECORDED)
    others = []
    for arithmetic in OTHERS:
        with arithmetic.active():
            others.append(compute(arithmetic))
    for name, result in results.items():
        want, other = _array(result.value), [_array(results[name].value) for results in others]
        arrays[f"out_{name}"] = want
        spec = specs[f"out_{name}"] = {"role": "expected", **_form(want), "doc": result.doc}
        if not np.issubdtype(want.dtype, np.floating):
            assert all((want == got).all() for got in other), name
            spec["exact"] = True
            continue
        found = [deviation(want, got, result.scale) for got in other]
        relative, absolute = (max(values) for values in zip(*found, strict=True))
        if relative > WORST_DEVIATION:
            raise ValueError(f"{folder.name}: {name} deviates by {relative:.1e} from itself")
        spec |= {"atol": rounded_up(5 * absolute) or 1e-30, "rtol": max(SMALLEST_RTOL, rounded_up(5 * relative))}
        spec |= {"scale": result.scale, "observed_rel_dev": float(f"{relative:.1e}")}
    if arrays:
        np.savez_compressed(folder / "arrays.npz", **arrays)
    for name, (state, _) in (weights or {}).items():
        torch.save(state, folder / name)
    case = {
        "name": folder.name,
        "kind": kind,
        "description": description,
        "seed": seed,
        "config": config,
        "weights": {name: doc for name, (_, doc) in (weights or {}).items()},
        "expected": expected or {},
        "generated_with": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": "cpu",
            "dtype": "float32",
        },
        "arrays": specs,
    }
    text = re.sub(r"\[[^\[\]{}]*\]", _one_line, json.dumps(case, indent=1))
    (folder / "case.json").write_text(text + "\n")


def _one_line(match: re.Match[str]) -> str:
    """Return the same JSON list of numbers or words without line breaks."""
    return json.dumps(json.loads(match[0]))


def _array(value: Tensor | float | list[float]) -> np.ndarray:
    """Return the numbers contiguous in NCHW order; lists and numbers are float64."""
    return np.array(value.detach().numpy() if isinstance(value, Tensor) else value, order="C")


def _form(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}
