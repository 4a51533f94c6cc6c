"""What machine code executes is counted exactly, and the prediction of a kernel's time is the arithmetic it states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton
from fastdiff.kernels import adamw_ema
from fastdiff.kernels.aot import Compiled
from helpers import TESTS, tritons

from benchmarks import kernel_cost
from benchmarks.aot import broken_rules
from benchmarks.kernel_cost import CLOCK, RAMP, Cost, Counts, Row, predict
from benchmarks.load_waits import Wait, stalls, waits
from benchmarks.machine_code import Code, Instruction
from benchmarks.python_source import in_this_checkout
from fastdiff.errors import UserError

# --- reading machine code ---


@pytest.fixture(scope="module", params=["", tritons.OLDEST], ids=["Triton", f"Triton {tritons.OLDEST}"])
def counted(request: pytest.FixtureRequest) -> dict[str, Any]:
    done = tritons.run(request.param, TESTS / "helpers" / "counted_kernels.py")
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_code_that_was_compiled_in_another_folder() -> None:
    """Triton's cache holds the paths of the folder where equal code was compiled first."""
    assert in_this_checkout("/gone/kernels/adamw_ema.py", adamw_ema.__file__) == adamw_ema.__file__
    assert (
        in_this_checkout("/gone/triton/language/standard.py", adamw_ema.__file__) == triton.language.standard.__file__
    )
    assert in_this_checkout("/gone/other.py", adamw_ema.__file__) == "/gone/other.py"


@pytest.mark.slow
def test_passes_of_a_loop_within_a_loop(counted: dict[str, Any]) -> None:
    """The inner range has constants that the caller gives by name, the outer one an argument."""
    size = 10 * 7 * 8192 * 4
    assert counted["copy"]["moved"] == {"_copy_chunk loaded": size, "_copy_chunk stored": size}


@pytest.mark.slow
def test_an_unrolled_loop(counted: dict[str, Any]) -> None:
    """A thousand passes over 512 bytes; the copies of the loop for passes left over, which are none, don't count."""
    for name in ("_sum_short", "_sum_groups"):
        assert counted[name[1:]]["moved"] == {f"{name} loaded": 1000 * 512, f"{name} stored": 512}


@pytest.mark.slow
def test_functions_under_conditions(counted: dict[str, Any]) -> None:
    """A loop over tickets, in which functions run as often as the kernel's WORK says, or its loops within them do."""
    parts, slabs, rows, width, lanes = 4096, 4096 // 32, 128, 64, 128
    moved = counted["tickets"]["moved"]
    part = parts * rows * width * 2
    assert moved["_sum_part loaded"] == moved["_apply_part stored"] == part
    assert moved["_apply_part loaded"] == part + parts * lanes * 32  # each thread loads 8 of the totals
    assert moved["_merge_slab loaded"] == parts * lanes * 4
    assert moved["_merge_slab stored"] == slabs * lanes * 4
    assert moved["_await loaded"] == parts * lanes * 4


@pytest.mark.slow
def test_products_on_tensor_cores(counted: dict[str, Any]) -> None:
    """Forward two products of 2 L^2 D per head; backward three for dQ, and four for dK and dV."""
    expected = {"_forward_long": 4, "_delta": 0, "_backward_long False": 6, "_backward_long True": 8}
    assert counted["tensor flops"] == pytest.approx(expected)


@pytest.mark.slow
def test_ranges_that_depend_on_data(counted: dict[str, Any]) -> None:
    assert counted["unknown"].startswith("_by_data, line ")
    assert "range(0, length, BLOCK)" in counted["unknown"]
    few, many = counted["by data"]
    assert few < many < 2 * few


LOOP = """
_f:
	//## File "/f.py", line 3
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0020*/                   FADD R0, R0, R4 ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FADD R0, R0, R8 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   CALL.REL.NOINC `($_slow) ;
.L_x_2:
        /*0080*/                   EXIT ;
$_slow:
.L_x_3:
        /*0090*/                   FMUL R0, R0, R0 ;
        /*00a0*/               @P0 BRA `(.L_x_3) ;
        /*00b0*/                   RET.REL.NODEC R28 `(_f) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4) ;
"""


def test_blocks_and_waits() -> None:
    code = Code(LOOP, test_blocks_and_waits)
    assert len(code.instructions) == 13
    assert [len(code.inside(loop)) for loop in code.loops] == [5]  # those of the slow path are not reached
    times = [1.0, 8, 8, 8, 8, 8, 1, 1, 1, 0, 0, 0, 0]
    found = waits(code, times)
    # R4 is loaded in the pass before; R8 in this one, so that the other load, which came later, stays under way.
    assert [(wait.executions, wait.bytes, wait.in_flight) for wait in found] == [(8, 512, 640), (8, 128, 640)]
    assert [[list(part) for part in wait.since] for wait in found] == [[[4, 5], [1]], [[2, 3]]]
    # The first wait is over when the second one began: 100 - (2 + 1 + the other stall of 16), 2 cycles each.
    assert stalls(found[:1], 100, 2) == 8 * (100 - 6)


PARTS = """
def parts(n):
    while n:
        n = before(n)
        for i in range(3):
            inside(i)
"""
SPILLS = """
parts:
	//## File "{0}", line 4
.L_x_1:
        /*0000*/                   LDL R4, [R1] ;
	//## File "{0}", line 6
.L_x_2:
        /*0010*/                   STL [R1], R8 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
	//## File "{0}", line 4
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
"""


def test_spills_once_per_part_are_rare(tmp_path: Path) -> None:
    """What a `while` loop around others spills does not count, but it does where there is no such loop."""
    file, made = tmp_path / "parts.py", dict[str, Any]()
    file.write_text(PARTS)
    exec(compile(PARTS, file, "exec"), made)
    assert Code(SPILLS.format(file), made["parts"]).spills() == 1
    unknown = Code(SPILLS.format("/f.py"), made["parts"])
    assert unknown.spills() == 2
    launch = Compiled("sampler_step", "", 90, 64, 3, 0, 4, {}, {}, {}, {})
    assert broken_rules(launch, unknown) == ["3 spills"]
    assert broken_rules(launch, None) == []


def test_loads_that_are_issued_together_take_one_latency() -> None:
    pair = [Wait(10, 1, 512, 1024, (range(9, 10),)), Wait(12, 1, 512, 512, (range(10, 12),))]
    assert stalls(pair, 100, 2) == 98 + 0
    assert stalls([replace(pair[1], since=(range(11, 12),)), pair[0]], 100, 2) == 2 * 98


# --- the prediction ---

COUNTS = Counts(
    programs=1320,
    warps=4,
    registers=64,
    shared=0,
    instructions=1000.0,
    pipes={"special functions": 100.0},
    accessed=32768.0,
    waits=[],
    elements=1e6,
    least_bytes=200e6,
    dram_bytes=200e6,
    l2_bytes=300e6,
)


def test_memory_is_the_limit() -> None:
    cost = predict(COUNTS)
    assert cost.instructions == pytest.approx(32 * 1320 * 4 * 1000 / 1e6)
    assert cost.resident_warps == 32  # 64 registers leave 32 warps: 8 of the 10 programs
    assert cost.limit == "L2"
    assert cost.busy_us == pytest.approx(1e6 * 300e6 / 5.5e12)
    assert cost.seconds(3e12) == pytest.approx(RAMP + 200e6 / 3e12)
    assert cost.share(3e12) == pytest.approx((200e6 / 3e12) / (RAMP + 200e6 / 3e12))
    assert cost.limit_at(3e12) == "memory"


@pytest.mark.parametrize(
    ("changes", "limit", "cycles"),
    [
        ({"instructions": 10_000.0, "l2_bytes": 0.0}, "issue", 10 * 4 * 10_000 / 3.4),
        ({"pipes": {"special functions": 9000.0}, "l2_bytes": 0.0}, "special functions", 10 * 4 * 9000),
        # Two rounds of programs: 2 cycles an instruction, then the latency of DRAM less one instruction.
        (
            {"waits": [Wait(9, 50.0, 512, 2048, (range(8, 9),))], "l2_bytes": 0.0, "dram_bytes": 1e9},
            "program",
            2 * (2 * 1000 + 50 * (800e-9 * CLOCK - 2)),
        ),
        # A program on a multiprocessor of its own: its 32 warps share the schedulers.
        ({"programs": 100, "warps": 32, "l2_bytes": 0.0, "pipes": {}}, "issue", 32 * 1000 / 3.4),
    ],
)
def test_limits(changes: dict[str, Any], limit: str, cycles: float) -> None:
    cost = predict(replace(COUNTS, **changes))
    assert cost.limit == limit
    assert cost.busy_us == pytest.approx(1e6 * cycles / CLOCK)


@pytest.mark.parametrize(
    ("opcode", "pipe", "flops"),
    [
        ("MUFU.EX2", "special functions", 0),
        ("DFMA", "float64", 0),
        ("F2F.F64.F32", "float64", 0),
        ("IMAD.WIDE.U32", "integer products", 0),
        ("IMAD.MOV.U32", None, 0),
        ("ISETP.GE.AND", "integers", 0),
        ("F2FP.BF16.F32.PACK_AB", "integers", 0),
        ("FFMA", None, 0),
        ("HGMMA.64x128x16.F32.BF16", None, 2 * 64 * 128 * 16 / 4),
        ("HMMA.16816.F32.BF16", None, 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", None, 2 * 16 * 8 * 8),
    ],
)
def test_pipes(opcode: str, pipe: str | None, flops: float) -> None:
    instruction = Instruction("", opcode, "", ())
    assert kernel_cost.pipe_of(instruction) == pipe
    assert kernel_cost.flops_of(instruction) == flops


@pytest.mark.parametrize(
    ("changes", "resident"),
    [
        ({"registers": 255}, 8),
        ({"shared": 100 * 1024}, 8),
        ({"registers": 16, "warps": 1, "programs": 10**5}, 32),
        ({"registers": 16, "programs": 10**5}, 64),
        ({"programs": 5}, 4),
    ],
)
def test_resident_warps(changes: dict[str, Any], resident: int) -> None:
    assert predict(replace(COUNTS, **changes)).resident_warps == resident


def test_bytes_in_flight() -> None:
    """The mean is weighted by the bytes waited for: of 2 KB and 512 bytes, waited for 9 times as often."""
    found = [Wait(5, 1.0, 1024, 2048, (range(4, 5),)), Wait(9, 9.0, 512, 512, (range(8, 9),))]
    mean = (1024 * 2048 + 9 * 512 * 512) / (1024 + 9 * 512)
    assert predict(replace(COUNTS, waits=found)).in_flight == pytest.approx(32 * mean)


# --- the file ---


def test_file(tmp_path: Path) -> None:
    path, row = tmp_path / "costs.json", Row("adamw_ema", "5x8", 3, Cost(1.5, 32, 64, 1024.0, 2e6, 3e6, 1.25, "issue"))
    kernel_cost.write(path, "3.9.0", {"demo 64 bf16": [row]})
    assert kernel_cost.read(path) == {"demo 64 bf16": [row]}
    table = list(kernel_cost.markdown(kernel_cost.read(path), "H100"))
    assert table[0] == "`demo 64 bf16` on an H100, predicted, 0.01 ms in all:"
    assert table[4].startswith("| adamw_ema | 5x8 | 3 | 2 | 32 | 64 | 1 | 1.50 | 2 | 0.30 | issue |")
    path.write_text('{"steps": {"demo 64 bf16": [[1]]}}')
    with pytest.raises(UserError, match="is not what benchmarks/aot.py --cost writes"):
        kernel_cost.read(path)
