"""The table of GPUs, the names under which they are found, and measuring the machine at hand."""

from __future__ import annotations

import pytest
import torch

from fastdiff.runtime import machine as hardware


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
    assert hardware.find(device) is hardware.GPUS[key]


@pytest.mark.parametrize("key", hardware.GPUS)
def test_found_by_its_own_name(key: str) -> None:
    assert hardware.find(key) is hardware.GPUS[key]
    assert hardware.find(hardware.GPUS[key].name) is hardware.GPUS[key]


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
    """A slower board under a faster one's figures would make every share wrong."""
    assert hardware.find(device) is None


def test_rates_are_below_datasheets() -> None:
    for gpu in hardware.GPUS.values():
        assert 0.7 < gpu.matmul_flops / gpu.peak_flops < 0.9
        assert 0.8 < gpu.copy_bytes / gpu.bandwidth < 1
    assert hardware.GPUS["H200"].matmul_flops == pytest.approx(788e12)
    assert hardware.GPUS["H200"].copy_bytes == pytest.approx(4.3e12)


def test_a_cpu_is_no_gpu() -> None:
    name = hardware.device_name(torch.device("cpu"))
    assert name
    assert hardware.find(name) is None


def test_rates_of_this_machine() -> None:
    """Of any machine that runs this: above a gigaflop and 100 MB per second, below any machine of today."""
    rates = hardware.measure_rates(torch.device("cpu"), size=128, copy_size=1 << 22, repeats=2)
    assert 1e9 < rates.matmul_flops < 1e15
    assert 1e8 < rates.copy_bytes < 1e14


def test_free_memory_is_read() -> None:
    assert 10**6 < hardware.free_memory(torch.device("cpu")) < 10**14
