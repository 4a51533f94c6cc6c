"""On a CPU, PyTorch gets as many threads as there are free cores."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch

from fastdiff.runtime import machine as threads


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate sixteen cores, of which five are idle."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(threads, "allowed_cores", lambda: 16)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 16)
    idle(monkeypatch, 5.2)
    return monkeypatch


def idle(machine: pytest.MonkeyPatch, cores: float) -> None:
    """Let that many of the sixteen cores be idle."""
    machine.setattr(psutil, "cpu_percent", lambda interval: 100 * (1 - cores / 16))


def test_takes_the_idle_cores(machine: pytest.MonkeyPatch) -> None:
    assert threads.use_free_cores() == torch.get_num_threads() == 5
    idle(machine, 15.7)
    assert threads.free_cores() == 16
    idle(machine, 0.1)
    assert threads.free_cores() == 1


def test_a_system_that_does_not_tell(machine: pytest.MonkeyPatch) -> None:
    """Where the load can't be read, as in some sandboxes, all allowed cores count as idle."""

    def refused(interval: float) -> float:
        raise FileNotFoundError("/proc/stat")

    machine.setattr(psutil, "cpu_percent", refused)
    assert threads.free_cores() == 16


def test_shares_cores_with_other_processes_of_the_run(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads.free_cores() == 5
    machine.setenv("LOCAL_WORLD_SIZE", "40")
    assert threads.free_cores() == 1


def test_a_given_number_stands(machine: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    machine.setenv("OMP_NUM_THREADS", "2")
    assert threads.use_free_cores() == 2


def test_a_run_that_goes_on_has_as_many_as_before(machine: pytest.MonkeyPatch) -> None:
    assert threads.use_free_cores(before=12) == 12
    for before in (17, 0, None):  # more than there are cores, or not known
        assert threads.use_free_cores(before=before) == 5
    machine.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.use_free_cores(before=12) == 8


@pytest.mark.parametrize(
    ("first", "seconds", "calls", "chosen"),
    [
        (8, {16: 0.25, 8: 0.47}, {8: 2, 16: 3}, 16),
        (8, {16: 1.0, 8: 0.5, 4: 0.25, 2: 0.35, 1: 9.0}, {8: 2, 16: 1, 4: 3, 2: 3}, 4),
        (8, {16: 0.25, 8: 0.26}, {8: 3, 16: 3}, 8),  # 5% more is as fast
        (5, {5: 0.25, 10: 1.0, 2: 0.8}, {5: 3, 10: 1, 2: 2}, 5),
        (16, {16: 0.25, 8: 0.125, 4: 0.22}, {16: 2, 8: 5, 4: 2}, 8),
        (8, {16: 50.0, 8: 60.0}, {8: 1, 16: 1}, 16),  # of slow calls one is enough
    ],
)
def test_takes_the_number_that_is_fast(
    machine: pytest.MonkeyPatch, first: int, seconds: dict[int, float], calls: dict[int, int], chosen: int
) -> None:
    """The first call of each number is a warm-up unless it is slow; the fastest are timed again."""
    clock = [0.0]
    made: list[int] = []

    def work() -> None:
        made.append(torch.get_num_threads())
        clock[0] += seconds[made[-1]]

    machine.setattr(threads.time, "perf_counter", lambda: clock[0])
    torch.set_num_threads(first)
    line = threads.choose_threads(work)
    assert torch.get_num_threads() == chosen
    assert line.startswith(f"threads: {chosen} from here on, by trial (the network takes ")
    assert f"{seconds[first]:.2g} s with {first}" in line
    assert {count: made.count(count) for count in made} == calls


@pytest.mark.parametrize("given", ["OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "one core"])
def test_nothing_to_try(machine: pytest.MonkeyPatch, given: str) -> None:
    before = torch.get_num_threads()
    if given == "one core":
        machine.setattr(threads, "allowed_cores", lambda: 1)
    else:
        machine.setenv(given, "2")
    assert threads.choose_threads(lambda: pytest.fail("timed")) == ""
    assert torch.get_num_threads() == before


def test_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert 1 <= threads.free_cores() <= threads.allowed_cores()
