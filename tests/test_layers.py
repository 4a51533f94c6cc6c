"""Dependencies run one way: a table says which part of fastdiff may import which, and which outside packages."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdiff

PACKAGE = Path(fastdiff.__file__).parent
BESIDE = [folder for name in ("kernels", "datasets") if (folder := PACKAGE.parent / name).is_dir()]
"""The folders that belong to the package and lie beside it in a checkout."""

# Part → the other parts that it may import. A folder's settings.py is a part of its own, "settings". Scripts, which are
# not listed, may import everything.
BELOW = {"errors", "runtime", "settings"}
LAYERS: dict[str, set[str]] = {
    "kernels": set(),
    "errors": set(),
    "runtime": {"errors"},
    "attention_choices": {"errors", "runtime"},
    "ops": {"attention_choices", "errors", "kernels", "runtime"},
    "settings": {"diffusion", "errors", "ops", "runtime"},
    "diffusion": {"ops", *BELOW},
    "models": {"ops", *BELOW},
    "images": BELOW,
    "precompile": {"kernels", "ops", "runtime"},
    "config": {"diffusion", "models", *BELOW},
    "sampling": {"config", "diffusion", "images", "models", "ops", "precompile", *BELOW},
    "conversion": {"config", "diffusion", "models", "sampling", *BELOW},
    "evaluation": {"config", "diffusion", "images", "models", "ops", "precompile", "sampling", *BELOW},
    "training": {
        *("config", "diffusion", "evaluation", "images", "models", "ops", "precompile", "sampling"),
        *BELOW,
    },
    "datasets": {"config", "images", *BELOW},
    "inspection": {"config", "diffusion", "evaluation", "images", "models", "sampling", "training", *BELOW},
    "scoring": {"diffusion", "images", "ops", *BELOW},
    "api": {"config", "diffusion", "models", "ops", "sampling", *BELOW},
    "command_table": set(),
    "completion": {"command_table", "config", "runtime"},
    "command": {"command_table", "completion", "datasets", "errors", "runtime"},
    "__main__": {"command"},
}
# Outside package → the only files that may import it.
OUTSIDE = {
    "deepspeed": ("training/",),
    "nvidia": ("images/",),
    "triton": ("kernels/", "ops.py"),
    "tensorboard": ("training/reporting.py",),
    "PIL": ("api.py", "datasets/", "evaluation/curve_files.py", "images/", "sampling/"),
    "shtab": ("completion.py",),
    "diffusers": ("conversion/pipeline.py",),
    "matplotlib": ("evaluation/curve_files.py",),
    "pydantic": ("settings.py", "config/", "datasets/", "/settings.py", "models/classifier", "training/"),
}


def modules() -> dict[str, Path]:
    """Return path below the package → file, kernels/ and datasets/ included, wherever these folders are."""
    found = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    return found | {str(path.relative_to(PACKAGE.parent)): path for beside in BESIDE for path in beside.rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which fails in a script"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_script(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text()


def part_of(name: str) -> str:
    """Return the first folder or module of a path such as training/loop.py, and "settings" for every settings.py."""
    return "settings" if Path(name).name == "settings.py" else Path(name).parts[0].removesuffix(".py")


MODULES = modules()
SCRIPTS = {part_of(name) for name, path in MODULES.items() if path.parent == PACKAGE and is_script(path)}


def test_every_part_has_its_place() -> None:
    parts = {part_of(name) for name in MODULES} - SCRIPTS - {"__init__"}
    assert parts == set(LAYERS), "a new part of fastdiff needs its row in LAYERS"
    assert {"train", "super_res_train", "classifier_train", "sample", "super_res_sample", "nll"} <= SCRIPTS


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    part = part_of(name)
    allowed = set(LAYERS) if part in SCRIPTS or part == "__init__" else LAYERS[part] | {part}
    for imported in imports(MODULES[name]):
        words = imported.split(".")
        assert words[0] != "kernels", f"{name}: kernels goes by its full name, fastdiff.kernels"
        if words[0] == "fastdiff" and len(words) > 1:
            assert words[1] not in SCRIPTS, f"{name} imports the script {words[1]}.py"
            of_settings = words[2:3] == ["settings"] or words[-1].endswith("Settings")
            assert ("settings" if of_settings else words[1]) in allowed, f"{name} imports {imported}"
        elif words[0] in OUTSIDE:
            places = OUTSIDE[words[0]]
            assert any(name.startswith(p) or (p[0] == "/" and name.endswith(p)) for p in places), f"{name}: {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("kernels/")])
def test_kernels_know_torch_and_triton_only(name: str) -> None:
    for imported in imports(MODULES[name]):
        first = imported.split(".")[0]
        assert first in {"torch", "triton"} | sys.stdlib_module_names or imported.startswith("fastdiff.kernels.")
