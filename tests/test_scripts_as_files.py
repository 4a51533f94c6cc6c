"""Scripts can be run as files, as `deepspeed` and `torchrun` do, also from a checkout that isn't installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

MAIN = 'if __name__ == "__main__":'
SCRIPTS = [
    path
    for folder in ("fastdiff", "datasets", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if MAIN in (text := path.read_text()) and ("from fastdiff" in text or "import fastdiff" in text)
]
LOADED = "import json, sys\nprint(json.dumps([__file__, sys.path]))\nsys.exit()\n"


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.parent.name == "fastdiff"])
def test_from_a_bare_checkout(script: str, tmp_path: Path) -> None:
    """The script finds the package beside it, and the package's modules aren't importable by their bare names."""
    package = tmp_path / "fastdiff"
    package.mkdir()
    for name in ("__init__.py", "errors.py", script):
        shutil.copy(ROOT / "fastdiff" / name, package)
    for name in ("config.py", "runtime.py"):  # one of them is imported first
        (package / name).write_text(LOADED)
    command = [sys.executable, "-S", "-E", str(package / script)]  # without installed packages
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, path = json.loads(done.stdout)
    assert Path(found).parent == package
    assert path[0] == str(tmp_path)
    assert str(package) not in path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_finds_the_package(script: Path) -> None:
    """The path is set before anything outside the standard library is imported."""
    text = script.read_text()
    head = "if not __package__:  # run as a file, perhaps of a checkout that isn't installed\n    sys.path.insert(0, "
    assert text.count(head) == 1
    before = [line.split() for line in text[: text.index(head)].splitlines() if line.startswith(("from ", "import "))]
    assert {words[1].split(".")[0] for words in before} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.parent.name == "fastdiff"], ids=lambda path: path.name
)
def test_ctrl_c_during_the_imports(script: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    sentence = f"{script.name}: stopped by Ctrl-C; the same command starts again\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", sentence)
