"""Imports torch-fidelity, an optional package, also where torchvision's compiled operators can't be loaded."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from functools import cache
from types import ModuleType

import torch

from fastdiff.errors import UserError, first_line

_OPERATORS = ("nms", "qnms")
"""Operators of torchvision that its Python code expects to be there when it is imported."""
_HINT = "run `pip install 'torch-fidelity>=0.4'`, which the extra `evaluation` of fastdiff includes"


def torch_fidelity_module(name: str) -> ModuleType:
    """The module torch_fidelity.NAME. Raises UserError where the package is missing or can't be imported."""
    prepare_torchvision()
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        if error.name and error.name.split(".")[0] in ("torch_fidelity", "torchvision"):
            raise UserError(f"Inception's features and scores need torch-fidelity: {_HINT}") from None
        raise UserError(f"torch-fidelity can't be imported ({first_line(error)}): {_HINT}") from None
    except (OSError, RuntimeError) as error:  # torchvision of another PyTorch
        raise UserError(
            f"torch-fidelity can't be imported ({first_line(error)}): install the torchvision of PyTorch "
            f"{torch.__version__}"
        ) from None


@cache
def prepare_torchvision() -> torch.library.Library | None:
    """Declare torchvision's operators if its library doesn't load beside this build of PyTorch.

    torchvision can't be imported without them, although nothing here calls one: torch-fidelity uses Python code of
    torchvision only. A build of torchvision for CUDA beside one of PyTorch for CPUs, which pip readily installs, is the
    usual case.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        extension = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations))
        torch.ops.load_library(extension.origin if extension else "")
    except OSError:
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
