"""GPUs are found by their names, this machine's rates are measured, and compiled code is stored where it is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.runtime import machine


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_found_by_its_device_name(device: str, key: str) -> None:
    assert machine.find(device) is machine.GPUS[key]


@pytest.mark.parametrize("key", machine.GPUS)
def test_found_by_its_own_name(key: str) -> None:
    assert machine.find(key) is machine.GPUS[key]
    assert machine.find(machine.GPUS[key].name) is machine.GPUS[key]


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA GB200",
        "AMD EPYC 9655P",
        "",
    ],
)
def test_others_are_not_taken_for_it(device: str) -> None:
    """A slower board with a faster one's figures would make every share of the peak wrong."""
    assert machine.find(device) is None


def test_rates_are_below_datasheets() -> None:
    for gpu in machine.GPUS.values():
        assert 0.7 < gpu.matmul_flops / gpu.peak_flops < 0.9
        assert 0.8 < gpu.copy_bytes / gpu.bandwidth < 1
    assert machine.GPUS["H200"].matmul_flops == pytest.approx(788e12)
    assert machine.GPUS["H200"].copy_bytes == pytest.approx(4.3e12)


def test_a_cpu_is_no_gpu() -> None:
    name = machine.device_name(torch.device("cpu"))
    assert name
    assert machine.find(name) is None


def test_rates_of_this_machine() -> None:
    """Any machine reaches more than a gigaflop and 100 MB per second, and less than the upper bounds."""
    rates = machine.measure_rates(torch.device("cpu"), size=128, copy_size=1 << 22, repeats=2)
    assert 1e9 < rates.matmul_flops < 1e15
    assert 1e8 < rates.copy_bytes < 1e14


def test_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variables that are set below
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.keep_compiled_code() == tmp_path / "fastdiff" / "inductor"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "fastdiff" / "inductor" / "triton")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/triton")
    assert machine.keep_compiled_code() == Path("/elsewhere")
    assert os.environ["TRITON_CACHE_DIR"] == "/triton"


@pytest.mark.parametrize("folder", ["/proc/none", "a space"])
def test_unusable_place_for_compiled_code(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that can't be written to, or that g++ would take for two words, is left alone."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/somewhere")
    assert machine.keep_compiled_code() == Path(f"/somewhere/fastdiff_{os.getuid()}/inductor")


def test_numbers_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    assert machine.number_from_environment("RANK", 3) == 3
    monkeypatch.setenv("RANK", "1")
    assert machine.number_from_environment("RANK", 3) == 1
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UserError, match="the environment variable RANK is one, not a whole number"):
        machine.number_from_environment("RANK", 3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inductor_knows_the_options(device: str) -> None:
    """torch.compile refuses an option of another name before it compiles anything."""
    torch.compile(lambda x: x, **machine.compile_kwargs(torch.device(device), frozen=True))


@pytest.mark.parametrize(("accepts", "given"), [(True, True), (False, False), (None, False)])
def test_flag_for_compilers_that_have_it(
    accepts: bool | None, given: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Code for a CPU is compiled with KEEPS_STORES, unless the compiler refuses that flag or is missing."""
    compiler = tmp_path / "compiler"
    if accepts is not None:
        compiler.write_text(f"#!/bin/sh\ncase $* in *{machine.KEEPS_STORES}*) exit {int(not accepts)};; esac\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    options = machine.compile_kwargs(torch.device("cpu")).get("options", {})
    assert any(str(value).endswith(f" {machine.KEEPS_STORES}") for value in options.values()) is given
    assert machine.KEEPS_STORES not in str(machine.compile_kwargs(torch.device("cuda")))


def test_ranks_share_the_cores_to_compile_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "allowed_cores", lambda: 24)
    for ranks, processes in (("1", 24), ("8", 3), ("48", 1)):
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")  # so that monkeypatch restores it
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert machine.share_compile_processes() == processes
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(processes)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    assert machine.share_compile_processes() == 5


def test_free_memory_is_read() -> None:
    assert 10**6 < machine.free_memory(torch.device("cpu")) < 10**14
