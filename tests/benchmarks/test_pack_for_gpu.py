"""Packages, compiled code and images are packed for a GPU machine without a network."""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks import pack_for_gpu


def made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_compiled_code_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = made(
        tmp_path / "compiled",
        "inductor/fxgraph/ab/graph",
        "inductor/aotautograd/cd/entry",
        "inductor/xy/choice.best_config",
        "inductor/xy/module.py",
        "triton/K1/_norm_forward.cubin",
        "triton/K1/__grp___norm_forward.json",
        "triton/K1/_norm_forward.ptx",
        "triton/K2/triton_poi_fused_add.cubin",
    )
    images = made(tmp_path, "pictures.tar.xz") / "pictures.tar.xz"
    folder = tmp_path / "packed"
    given = ["--packages", "--compiled", str(compiled), "--images", str(images), "--folder", str(folder)]
    pack_for_gpu.main(given)
    with tarfile.open(folder / "compiled.tar.xz") as file:
        assert set(file.getnames()) == {
            "compiled/inductor/fxgraph/ab/graph",
            "compiled/inductor/aotautograd/cd/entry",
            "compiled/triton/K1/_norm_forward.cubin",
            "compiled/triton/K1/__grp___norm_forward.json",
        }
    assert (folder / "images.tar.xz").read_text() == "pictures.tar.xz"
    assert "MiB in" in capsys.readouterr().out


def test_the_newest_compiled_code_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = made(tmp_path / "compiled", *(f"inductor/fxgraph/{name}" for name in ("old", "large", "new")))
    (compiled / "inductor/fxgraph/large").write_bytes(random.Random(0).randbytes(9 << 20))
    for i, name in enumerate(("old", "large", "new")):
        os.utime(compiled / "inductor/fxgraph" / name, (i, i))
    given = ["--packages", "--compiled", str(compiled), "--folder", str(tmp_path / "packed"), "--most", "1"]
    pack_for_gpu.main(given)
    with tarfile.open(tmp_path / "packed/compiled.tar.xz") as file:
        assert [Path(name).name for name in file.getnames()] == ["old", "large"]
    assert "1 files of compiled code are left out, for --most 1 MiB" in capsys.readouterr().out


def test_install_script_is_for_any_folder(tmp_path: Path) -> None:
    pack_for_gpu.main(["--packages", "--folder", str(tmp_path / "a b")])
    script = f'set -eu; export SITE="{tmp_path}/site"; source "{tmp_path}/a b/install.sh"; echo "$PYTHONPATH"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{tmp_path}/site")


@pytest.mark.parametrize(
    ("given", "words"), [("/no/such.tar.xz", "does not exist"), ("setup.py", "must be a .tar.xz file")]
)
def test_wrong_images(given: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pack_for_gpu.main(["--images", given, "--folder", str(tmp_path / "x")])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_folder_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pack_for_gpu.main(["--packages", "--folder", f"{__file__}/x"])
    assert "test_pack_for_gpu.py is a file; give a folder" in capsys.readouterr().err
