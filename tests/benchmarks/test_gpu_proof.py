"""gpu_proof.py runs its parts in order of value and keeps their results; all parts run on tiny inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import gpu_proof, proof_checks, proof_log, proof_speed, report
from benchmarks.gpu_parts import PARTS
from benchmarks.proof_part import ROOT, Context, LeftOut, OutOfTime, Part, run_command
from fastdiff.errors import UserError

pytestmark = pytest.mark.slow


def measured(context: Context) -> None:
    context.emit("fact", value=1)


def broken(context: Context) -> None:
    context.emit("fact", value=2)
    raise ValueError("out of luck")


def endless(context: Context) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.emit("fact", child=child.pid)
    time.sleep(600)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """A function run(parts, *flags) that returns the exit code and the rows on disk."""
    monkeypatch.setattr(gpu_proof, "IMPORTS", ())
    monkeypatch.setattr(gpu_proof, "gpu_is_here", lambda: True)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONPATH", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that monkeypatch restores what the command sets

    def run(parts: list[Part], *flags: str) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setattr(gpu_proof, "PARTS", parts)
        given = ["--commit", "abc", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        code = gpu_proof.main([*given, *flags])
        return code, proof_log.read_rows(tmp_path / "out" / proof_log.FILE)

    return run


def ends(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["part"]: row["verdict"] for row in rows if row["kind"] == "end"}


def test_a_failing_part_costs_itself_alone(run: Any, tmp_path: Path) -> None:
    code, rows = run([Part("a", 1, broken), Part("b", 1, measured)])
    assert code == 1
    assert ends(rows) == {"a": "failed with exit code 1", "b": "ok"}
    assert [row["value"] for row in rows if row["kind"] == "fact"] == [2, 1], "results from before the failure are kept"
    assert "out of luck" in next(row["error"] for row in rows if row["part"] == "a" and "error" in row)
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()
    assert "out of luck" in (tmp_path / "out" / "table.txt").read_text()


def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof, "PATIENCE", -17.0)  # 3 seconds
    code, rows = run([Part("a", 1, endless), Part("b", 1, measured)])
    assert code == 1
    assert ends(rows) == {"a": "stopped at its limit", "b": "ok"}
    child = next(row["child"] for row in rows if "child" in row)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_parts_end_with_the_command(number: int, tmp_path: Path) -> None:
    """Results of parts are kept when the command ends, and SIGTERM leaves it time to write the table."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from benchmarks import gpu_proof
from benchmarks.proof_part import Part
from benchmarks.test_gpu_proof import endless
gpu_proof.IMPORTS, gpu_proof.PARTS = (), [Part("a", 100, endless)]
gpu_proof.gpu_is_here = lambda: True
gpu_proof.main(["--out", {str(tmp_path / "out")!r}, "--work", {str(tmp_path / "work")!r}])
""")
    command = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    file = tmp_path / "out" / proof_log.FILE
    children: list[int] = []
    until = time.monotonic() + 60
    while not children and time.monotonic() < until:
        time.sleep(0.1)
        children = [row["child"] for row in proof_log.read_rows(file) if "child" in row] if file.exists() else []
    command.send_signal(number)
    said = command.communicate()[0]
    assert ('"child"' in said.splitlines()[-1]) == (number == signal.SIGTERM)
    while psutil.pid_exists(children[0]) and psutil.Process(children[0]).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the part's own process still runs"
        time.sleep(0.1)


def test_again_does_what_is_left(run: Any) -> None:
    parts = [Part("a", 1, measured), Part("b", 1, broken), Part("c", 500, measured), Part("d", 1, measured)]
    code, rows = run(parts, "--seconds", "60")
    assert code == 1
    assert ends(rows) == {"a": "ok", "b": "failed with exit code 1", "d": "ok"}, "there is too little time for c"
    parts[1] = Part("b", 1, measured)
    code, rows = run(parts)
    assert code == 0
    assert ends(rows) == dict.fromkeys("abcd", "ok")
    assert sum(row["part"] == "a" and row["kind"] == "fact" for row in rows) == 1, "a was done already"


def test_results_of_another_folder_are_taken_over(run: Any, tmp_path: Path) -> None:
    run([Part("a", 1, measured)])
    before = tmp_path / "before.jsonl"
    (tmp_path / "out" / proof_log.FILE).rename(before)
    code, rows = run([Part("a", 1, broken), Part("b", 1, measured)], "--done_in", str(before))
    assert code == 0
    assert ends(rows) == {"a": "ok", "b": "ok"}
    code, rows = run([Part("a", 1, broken)], "--again")
    assert code == 1


def test_results_of_other_commits_and_modes_do_not_count(run: Any, tmp_path: Path) -> None:
    run([Part("a", 1, measured)])
    code, rows = run([Part("a", 1, broken)], "--commit", "def")
    assert code == 1, "at another commit a is not done"
    assert "out of luck" in (tmp_path / "out" / "table.txt").read_text()
    assert [row["value"] for row in proof_log.of_one_kind(rows, "real", "abc") if row["kind"] == "fact"] == [1]
    code, _ = run([Part("a", 1, broken)], "--rehearsal")
    assert code == 1, "a result of another mode does not count"
    code, _ = run([Part("a", 1, broken)])
    assert code == 0, "at this commit a is done"


def lacks(context: Context) -> None:
    raise LeftOut("there is no such tool")


def slow(context: Context) -> None:
    code = run_command(context, [sys.executable, "-c", "import time; time.sleep(600)"])
    raise OutOfTime if code == 124 else AssertionError


def test_what_is_left_is_neither_done_nor_failed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, rows = run([Part("a", 1, lacks), Part("b", 1, slow)], "--seconds", "16")
    assert code == 3
    assert ends(rows) == {"a": "left out", "b": "out of time: --seconds were over"}
    assert any(row.get("reason") == "there is no such tool" for row in rows)
    monkeypatch.setattr(gpu_proof, "PATIENCE", -14.0)  # 6 seconds
    code, rows = run([Part("a", 1, lacks), Part("b", 1, slow)])
    assert code == 1
    assert ends(rows) == {"a": "left out", "b": "stopped at its limit"}


def test_a_batch_that_does_not_fit_is_followed_by_a_smaller_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(context: Context, config: str, batch: int, *_: Any) -> None:
        if batch > 16:
            raise torch.OutOfMemoryError("no room")
        context.emit("fact", batch=batch)

    monkeypatch.setattr(proof_speed, "measure_variant", measured)
    small = proof_speed.throughput("cifar10_uncond", [64, 32, 16, 8], "reference")
    none = proof_speed.throughput("cifar10_uncond", [64, 32], "reference")
    code, rows = run([Part("a", 1, small), Part("b", 1, none)])
    assert code == 1
    assert ends(rows) == {"a": "ok", "b": "failed with exit code 1"}
    assert [row["batch"] for row in rows if row["kind"] == "fact"] == [16]
    assert [row["reason"] for row in rows if "reason" in row][:2] == [
        "batch 64 does not fit: no room",
        "batch 32 does not fit: no room",
    ]


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_proof.main([]) == 2
    assert "--tiny" in capsys.readouterr().out


def test_parts_are_listed_without_pydantic() -> None:
    """A GPU machine may lack pydantic: parts that need it report that, and the others run."""
    script = str(Path(gpu_proof.__file__))
    program = f"import runpy, sys; sys.modules['pydantic'] = None; sys.argv[1:] = ['--list']; runpy.run_path({script!r}"
    argv = [sys.executable, "-c", program + ", run_name='__main__')"]
    assert "levers" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_parts_that_share_the_gpu_overlap_and_others_wait(run: Any) -> None:
    def slow(context: Context) -> None:
        time.sleep(0.8)
        context.emit("fact", done=time.monotonic())

    def begun(context: Context) -> None:
        context.emit("fact", begun=time.monotonic())

    parts = [Part("a", 1, slow, alone=False), Part("b", 1, begun, alone=False), Part("c", 1, begun)]
    code, rows = run(parts)
    assert code == 0
    found = {row["part"]: row.get("done", row.get("begun")) for row in rows if row["kind"] == "fact"}
    assert found["b"] < found["a"] < found["c"]


def test_a_half_written_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / proof_log.FILE
    whole = {"part": "a", "kind": "end", "verdict": "ok", "at": 1.0, "seconds": 2.0}
    file.write_text(json.dumps(whole) + '\n{"part": "b", "ki')
    assert proof_log.read_rows(file) == [whole]
    log = proof_log.Log((tmp_path,), 0.0)
    log.cut_half_lines()
    log.write("c", "note")
    assert [row["part"] for row in proof_log.read_rows(file)] == ["a", "c"], "the next row is not joined to it"
    file.write_text('{"part": "b", "ki\n' + json.dumps(whole) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        proof_log.read_rows(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "nothing"], "no part is called nothing"),
        (["--done_in", "/no/file"], "there is no file /no/file"),
        (["--out", __file__], "test_gpu_proof.py is a file; give a folder"),
        (["--seconds", "nan"], "greater than 0"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_proof.main(flags)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]\n", b'{"part": "a", "kind": "end"}\n{}\n', b"x\ny\n"], ids=str)
def test_files_of_something_else(content: bytes, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.jsonl").write_bytes(content)
    flags = ["--out", str(tmp_path / "o"), "--work", str(tmp_path / "w"), "--done_in", str(tmp_path / "other.jsonl")]
    assert gpu_proof.main(flags) == 2
    assert "other.jsonl" in capsys.readouterr().out


def test_one_command_at_a_time(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with gpu_proof.locked(tmp_path / "out"), pytest.raises(FileNotFoundError):
        run([Part("a", 1, measured)])
    assert "another gpu_proof.py runs" in capsys.readouterr().out
    assert run([Part("a", 1, measured)])[0] == 0


def reported(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that report_tests.py writes of the tests in a folder."""
    file = folder / "report.jsonl"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.report_tests", *options, str(folder)]
    env = {**os.environ, "FASTDIFF_TEST_REPORT": str(file), "PYTHONPATH": str(ROOT)}
    env["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
    subprocess.run([*argv, "--rootdir", str(folder)], env=env, cwd=folder, capture_output=True, check=False)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_failure_is_reported_once(tmp_path: Path) -> None:
    """A failure is reported once also under xdist, and a file that can't be imported is reported too."""
    (tmp_path / "test_a.py").write_text("def test_a():\n    assert 1 == 2, 'unequal'\n\ndef test_b():\n    pass\n")
    (tmp_path / "test_b.py").write_text("import no_such_module\n")
    rows = reported(tmp_path, "-n", "2")
    reasons = [row["reason"] for row in rows if "test" in row]
    assert sum("unequal" in reason for reason in reasons) <= 1
    assert any("no_such_module" in reason for reason in reasons)
    assert len([row for row in rows if "passed" in row]) == 1


def test_a_rehearsal_judges_exceptions_only(run: Any, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_a():\n    assert 1 == 2\n")
    (tmp_path / "test_b.py").write_text("def test_b():\n    assert 1 / 0 == 2\n")
    parts = [
        Part(name, 30, proof_checks.native_tests(str(tmp_path / f"test_{name}.py"), tiny=(), workers=1))
        for name in ("a", "b")
    ]
    assert ends(run(parts, "--rehearsal")[1]) == {"a": "ok", "b": "failed with exit code 1"}


def test_rehearsed_comparisons_are_evaluated_but_fail_nothing(tmp_path: Path) -> None:
    compared = "import torch\n\ndef test_a():\n    torch.testing.assert_close(torch.ones(1), torch.zeros(1))\n"
    (tmp_path / "test_a.py").write_text(f"{compared}    assert 1 == 2\n\ndef test_b():\n    assert 1 / 0 == 2\n")
    rows = reported(tmp_path, "-p", "benchmarks.rehearsal.no_comparisons")
    assert [row["reason"] for row in rows if "test" in row] == ["ZeroDivisionError: division by zero"]
    assert (rows[-1]["passed"], rows[-1]["failed"]) == (1, 1)


def throughput(
    variant: str, rate: float, precision: str = "bf16", batch: int = 128, draw: bool = False
) -> dict[str, Any]:
    spread = [0.9 * rate, rate, 1.1 * rate]
    row = {"part": variant, "kind": "throughput", "at": 1.0, "config": "imagenet64_270M", "variant": variant}
    row |= {"precision": precision, "batch": batch, "ratio": None, "images_per_second": spread, "mfu": 0.25}
    row |= {"ms": [1e3 * batch / r for r in reversed(spread)], "peak_memory_gb": 20.0, "start_seconds": 9.0}
    return row | ({"evaluations_per_second": spread, "solver": "ddpm", "steps": 10} if draw else {})


HEAD = [
    {
        "part": "all",
        "kind": "start",
        "command": "python benchmarks/gpu_proof.py",
        "commit": "0123",
        "date": "2026-01-02",
        "mode": "real",
    },
    {"part": "machine", "kind": "machine", "device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0"}
    | {"matmul_tflops": 700.0, "copy_gbs": 3000.0},
    {"part": "machine", "kind": "end", "verdict": "ok", "seconds": 4.2},
]


def test_ratios_name_what_differs() -> None:
    rows = [throughput("ours", 900.0), throughput("reference", 300.0, "fp16", 64), throughput("diffusers", 600.0)]
    assert proof_log.ratios(rows) == [
        "imagenet64_270M, images/s: ours, bf16, batch 128, is 3.00 times reference (fp16, batch 64)",
        "imagenet64_270M, images/s: ours, bf16, batch 128, is 1.50 times diffusers",
    ]
    rows.append(throughput("ours", 1200.0))
    assert "is 4.00 times reference" in proof_log.ratios(rows)[0], "the last measurement counts"
    rows.append(throughput("ours", 2000.0, batch=256, draw=True))
    assert not any("evaluations" in line for line in proof_log.ratios(rows)), "drawing is compared with drawing"


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*HEAD, throughput("ours", 900.0), throughput("reference", 300.0, "fp16", 64)]
    rows += [throughput("ours", 2000.0, batch=256, draw=True), throughput("reference", 800.0, "fp16", 256, draw=True)]
    rows.append({"part": "kernels", "kind": "tests", "passed": 700, "verdict": "passed"})
    rows.append({"part": "kernels", "kind": "end", "verdict": "ok", "seconds": 100.0})
    norm = {"part": "norms", "kind": "figure", "section": "norms", "direction": "forward", "way": "split"}
    rows.append(
        {**norm, "shape": "128x192x64x64", "count": 9, "microseconds": 200.04, "GB/s": 2500.0, "share of copy": 0.8}
    )
    rows.append({**norm, "config": "imagenet64_270M", "ms_per_step": 1.8, "calls": 9, "of": 71})
    file = tmp_path / "gpu.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = tmp_path / "kept"
    report.main([str(file), "--keep", str(kept)])
    base = "gpu_h100_2026-01-02"
    assert {path.name for path in kept.iterdir()} == {
        f"{base}{end}" for end in (".jsonl", ".md", ".svg", "_sampling.svg")
    }
    assert (kept / f"{base}.jsonl").read_text() == file.read_text()
    text = (kept / f"{base}.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    assert "NVIDIA H100 80GB HBM3" in text
    assert "reference (fp16, batch 64)" in text
    assert "3.00 (2.45 to 3.67)" in text, "900 over 300, and the spread of both"
    assert "Sampling throughput" in text
    assert "| kernels | ok | 100 | passed 700, verdict passed |" in text
    assert "| imagenet64_270M | forward | split | 1.800 | 9 of 71 |" in text
    assert "| 128x192x64x64 | forward | split | 9 | 200.0 | 2500.0 | 0.8 | – | – |" in text
    assert "reference (fp16, batch 64)" in (kept / f"{base}.svg").read_text()
    file.write_text(json.dumps(HEAD[0]) + "\n")
    with pytest.raises(UserError, match="--only machine"):
        report.main([str(file)])


def test_every_part_runs_tiny(tmp_path: Path) -> None:
    """All parts run to their end on a CPU, so that none is broken when a GPU is available."""
    argv = [sys.executable, "benchmarks/gpu_proof.py", "--tiny", "--stretch", "5"]
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**around, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    argv += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    made = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode in (0, 3), made.stdout + (tmp_path / "out" / "log.txt").read_text()[-20_000:]
    rows = proof_log.read_rows(tmp_path / "out" / proof_log.FILE)
    verdicts = ends(rows)
    assert verdicts.keys() == {part.name for part in PARTS}
    assert {name for name, verdict in verdicts.items() if verdict != "ok"} <= {"sanitizer", "dali"}
    assert set(verdicts.values()) <= {"ok", "left out"}
    timed = [row for row in rows if row["kind"] == "throughput"]
    assert all(row["images_per_second"][1] > 0 for row in timed)
    assert len(timed) >= 20
    assert (tmp_path / "out" / "samples.png").stat().st_size > 100
    assert "is" in (tmp_path / "out" / "table.txt").read_text()
