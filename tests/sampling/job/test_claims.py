"""Each claim goes to one process, claims of ended processes are free, and no process waits for another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_jobs import check_npz, context, drawing, hold, job, names, place, run, start
from helpers.polling import wait_until

from fastdiff.runtime.files import ProcessId
from fastdiff.sampling.job import claims, progress
from fastdiff.sampling.job.claims import SILENT, Claims, Held
from fastdiff.sampling.job.job import run_job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def stopping() -> Iterator[list[int]]:
    """A list of process numbers, which are killed at the end of the test, even if they are stopped."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def claimed(folder: Path) -> list[str]:
    """Return the claims on images that contain their owner's name."""
    found = []
    for path in (folder / "claims").glob("0*-*.0"):
        with suppress(FileNotFoundError):  # released just now
            found += [path.name] if path.stat().st_size else []
    return found


def silence(claim: Path) -> None:
    """Make a claim look as if its owner had sent no heartbeat for long."""
    past = time.time() - SILENT - 10
    os.utime(claim, (past, past))


# --- claims ---


def test_only_one_gets_a_claim(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: claims.take("000-005", 0), range(40)))
    assert sum(claim is not None for claim in got) == 1
    assert claims.held() == {"000-005": Held(0, False)}
    assert claims.take("000-005", 1) is not None
    assert claims.held() == {"000-005": Held(1, False)}
    assert ProcessId.parse((tmp_path / "claims" / "000-005.1").read_text()) == ProcessId.own()


def test_owners(tmp_path: Path) -> None:
    """A claim is free if its owner has ended, or is on another host and has long been silent."""
    owner = ProcessId.own()._replace(started=ProcessId.own().started + 1)  # has ended
    (tmp_path / "a.0").write_text(owner.tag)
    (tmp_path / "b.0").write_text(owner._replace(host="elsewhere").tag)
    (tmp_path / "c.0").write_text("")  # created, not written yet
    (tmp_path / "e.0").write_text(owner._replace(host="elsewhere").tag)
    silence(tmp_path / "e.0")
    (tmp_path / "d.0").write_text(owner.tag)
    (tmp_path / "d.1").write_text(ProcessId.own().tag)
    assert Claims(tmp_path).held() == {
        "a": Held(0, True),
        "b": Held(0, False),
        "c": Held(0, False),
        "d": Held(1, False),
        "e": Held(0, True),
    }


def test_alone(tmp_path: Path) -> None:
    """A claim for one process alone goes to another when its owner has ended or has no heartbeat."""
    first = Claims(tmp_path).take_alone("merge")
    assert first is not None
    assert Claims(tmp_path).take_alone("merge") is None
    silence(first.path)
    second = Claims(tmp_path).take_alone("merge")
    assert second is not None
    assert second.path.name == "merge.1"
    ended = ProcessId.own()._replace(started=ProcessId.own().started + 1)
    second.path.write_text(ended.tag)
    third = Claims(tmp_path).take_alone("merge")
    assert third is not None
    assert names(tmp_path) == ["merge.0", "merge.1", "merge.2"]
    for claim in (first, second, third):
        claim.release()
    assert names(tmp_path) == []


def test_a_claim_without_a_name(tmp_path: Path) -> None:
    """A process that ended before it wrote its name into the file does not hold the claim for long."""
    nameless = tmp_path / "merge.0"
    nameless.touch()
    others = Claims(tmp_path)
    assert others.held() == {"merge": Held(0, False)}
    assert others.take_alone("merge") is None
    silence(nameless)
    assert others.held() == {"merge": Held(0, True)}
    others.tidy(lambda name: False)
    assert not nameless.exists()
    assert others.take_alone("merge") is not None


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held claim's file stays new, and is removed when it is released."""
    monkeypatch.setattr(claims, "BEAT", 0.01)
    claim = Claims(tmp_path).take("merge", 0)
    assert claim is not None
    with claim:
        os.utime(claim.path, (0, 0))
        wait_until(lambda: claim.path.stat().st_mtime > time.time() - 60)
        assert Claims(tmp_path).take_alone("merge") is None
    assert names(tmp_path) == []


def test_a_claim_that_others_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.01)
    claim = Claims(tmp_path / "claims").take("merge", 0)
    assert claim is not None
    claim.path.unlink()
    claim.path.parent.rmdir()
    time.sleep(0.05)
    claim.release()
    assert names(tmp_path) == []


# --- jobs of several processes ---


@pytest.mark.parametrize("launched", [True, False], ids=["one launch", "a job array"])
def test_processes_share_a_job(launched: bool, folder: Path, tmp_path: Path) -> None:
    """Three processes draw a job of 40 chunks; each takes its share, and few chunks are drawn twice."""
    logs = [tmp_path / f"{rank}.log" for rank in range(3)]
    processes = [
        start(
            folder,
            job(200, grid_images=9),
            rank=rank if launched else 0,
            world_size=3 if launched else 1,
            pause=0.003,
            log=str(logs[rank]),
        )
        for rank in range(3)
    ]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0, [log.read_text() for log in logs]
    drawn = [[line for line in log.read_text().splitlines() if line.startswith("draws")] for log in logs]
    assert all(len(lines) >= 5 for lines in drawn), drawn
    assert 40 <= sum(map(len, drawn)) <= 40 + 6  # at the end, each may draw a chunk that another is just finishing
    check_npz(folder, 200)
    assert names(folder) == ["job.json", "samples_200x4x6x3.npz", "samples_200x4x6x3.png"]
    said = "".join(log.read_text() for log in logs)
    assert said.count("200 images in ") == 1


def test_a_stopped_process_delays_no_other(folder: Path, stopping: list[int]) -> None:
    """Other processes draw its images; when it continues, it notices that and ends."""
    stalled = start(folder, job(), pause=0.02, rank=1, world_size=2)
    stopping.append(stalled.pid)
    wait_until(lambda: claimed(folder))
    os.kill(stalled.pid, signal.SIGSTOP)
    first = claimed(folder)[0]
    drawn = [part.start for part in run(folder, job())]
    check_npz(folder, 23)
    assert int(first[:9]) == drawn[-1]  # its chunk comes last
    before = (folder / "samples_23x4x6x3.npz").stat().st_mtime_ns
    os.kill(stalled.pid, signal.SIGCONT)
    stalled.join(20)
    assert stalled.exitcode == 0
    assert names(folder) == ["job.json", "samples_23x4x6x3.npz"]
    assert (folder / "samples_23x4x6x3.npz").stat().st_mtime_ns == before


def test_claims_of_killed_processes_are_free(folder: Path) -> None:
    """Images of a killed process are drawn in their order, not last."""
    process = start(folder, job(), pause=0.05)
    wait_until(lambda: claimed(folder))
    process.kill()
    process.join()
    drawn = [part.start for part in run(folder, job())]
    assert drawn == [0, 5, 10, 15, 20]
    check_npz(folder, 23)
    assert names(folder) == ["job.json", "samples_23x4x6x3.npz"]


def test_claims_of_others_come_last_the_least_drawn_first(folder: Path) -> None:
    run(folder, job(1))
    for name in ("000000005-000000010.0", "000000010-000000015.0", "000000010-000000015.1"):
        (folder / "claims").mkdir(exist_ok=True)
        (folder / "claims" / name).write_text(ProcessId("elsewhere", 1, 2).tag)
    drawn = [part.start for part in run(folder, job())]
    assert drawn == [1, 15, 20, 5, 10]
    check_npz(folder, 23)
    assert names(folder) == ["job.json", "samples_1x4x6x3.npz", "samples_23x4x6x3.npz"]


def test_claims_without_a_heartbeat_are_free(folder: Path) -> None:
    """Images that a process of another host left long ago are drawn in their order, not last."""
    run(folder, job(1))
    (folder / "claims").mkdir()
    claim = folder / "claims" / "000000005-000000010.0"
    claim.write_text(ProcessId("elsewhere", 1, 2).tag)
    silence(claim)
    drawn = [part.start for part in run(folder, job())]
    assert drawn == [1, 5, 10, 15, 20]
    assert names(folder) == ["job.json", "samples_1x4x6x3.npz", "samples_23x4x6x3.npz"]


def test_heartbeat_while_drawing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.01)

    def told(index: np.ndarray) -> None:
        claim = folder / "claims" / f"{index[0]:09d}-{index[-1] + 1:09d}.0"
        os.utime(claim, (0, 0))
        wait_until(lambda: claim.stat().st_mtime > 0)

    run_job(drawing(told=told), job(), place(), folder)
    check_npz(folder, 23)


def test_gives_up_what_another_has_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK", 0.0)
    steps = 0

    def told(index: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:  # while this process draws its first chunk, another draws everything
            run(folder, job())

    run_job(drawing(told=told), job(), place(), folder)
    assert steps == 1
    check_npz(folder, 23)
    assert names(folder) == ["job.json", "samples_23x4x6x3.npz"]


def test_one_process_merges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process ends while another merges; when that one is killed, the same command merges at once."""
    folder.mkdir()
    other = context.Process(target=hold, args=(str(folder / "claims"), "merge-23-npz-0-0"), daemon=True)
    other.start()
    wait_until(lambda: Claims(folder / "claims").held())
    run_job(drawing(), job(), place(1, 2), folder)
    assert "process 1: all images are drawn; another process merges them" in capsys.readouterr().out
    assert not list(folder.glob("*.npz"))
    other.kill()
    other.join()
    run(folder, job())
    check_npz(folder, 23)
    assert names(folder) == ["job.json", "samples_23x4x6x3.npz"]


def test_starting_at_the_same_moment(tmp_path: Path) -> None:
    """All processes use one chunk size, and the folder then contains one job's images."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        logs = [tmp_path / f"{attempt}.{rank}" for rank in range(4)]
        processes = [start(folder, job(60, chunk_size=3 + rank), log=str(log)) for rank, log in enumerate(logs)]
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0] * 4
        check_npz(folder, 60)
        assert names(folder) == ["job.json", "samples_60x4x6x3.npz"]


def test_overwriting_at_the_same_moment(folder: Path) -> None:
    """Another job's files are removed once, but not the chunks that the first process has drawn since."""
    run(folder, job(30, identity={"seed": 1}, seed=1))
    processes = [start(folder, job(60), overwrite=True, pause=0.001) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    check_npz(folder, 60)
    assert names(folder) == ["job.json", "samples_60x4x6x3.npz"]
