"""tools/gpu_floors.py: what it counts, and that it finds kernels that became slower."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import gpu_floors as floors
import machine_code
import pytest
import torch
from mpoe_bench.layers import PHASES
from shipped_kernels import bytes_of

from mpoe_kernels.testing.launches import Launch
from tests.assertions import read_json, refuses, write_json
from tests.cases import ROOT

# A loop in a loop, the endless one behind the end, and what runs once.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R6, RZ ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
        /*0040*/              @!P3 BRA 0x20 ;
        /*0050*/                   BRA.U UP0, 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_instructions_count_as_often_as_their_loops_run():
    found = machine_code.executed("some_kernel", CODE, (2, 5))
    assert found == (3 + 2 * (2 + 5 * 3), 2, 0, 10 * (2 * 16 * 8 * 16 + 2 * 64 * 128 * 16 / 4))
    assert machine_code.executed("some_kernel", CODE, (1, 2, 5)) == found, (
        "a loop that runs once is none"
    )
    assert machine_code.executed("some_kernel", CODE, (2, 5, 4)) == found, (
        "the innermost was unrolled"
    )
    refuses(
        ValueError,
        r"some_kernel has loops of \[5, 3\] instructions; tools/gpu_floors.py says",
        machine_code.executed,
        "some_kernel",
        CODE,
        (2,),
    )


def code_of(*lines):
    return "".join(
        f"\n        /*{16 * at:04x}*/                   {words} ;" for at, words in enumerate(lines)
    )


def loads_of(lines, *trips):
    return machine_code.executed("some_kernel", code_of(*lines), trips).loads


def test_loads_count_where_their_results_are_first_used():
    """Together once, and in a chain each; what is overwritten or never used not at all."""
    ahead = ["LDG.E R2, desc[UR4][R8.64]", "LDG.E.128 R4, desc[UR4][R8.64+0x10]"]
    together = [*ahead, "FADD R0, R7, R1", "FADD R0, R2, R0", "EXIT"]  # R7 is the last of four
    assert loads_of(together) == 1
    chain = [
        "LDG.E.64 R2, desc[UR4][R8.64]",
        "LDG.E R6, desc[UR4][R2.64]",
        "STG.E desc[UR4][R8.64], R6",
        "EXIT",
    ]
    assert loads_of(chain) == 2
    unused = [*ahead, "MOV R2, R1", "EXIT"]
    assert loads_of(unused) == 0
    loop = [*["MOV R1, R3"] * 8, *chain[:3], "@!P0 BRA 0x80", "EXIT"]
    assert loads_of(loop, 5) == 10


@pytest.mark.parametrize("ahead, loads", [("0x0", 6), ("0x1", 3), ("0x2", 2)])
def test_asynchronous_copies_that_were_issued_turns_ahead_wait_for_a_part(ahead, loads):
    turn = [f"DEPBAR.LE SB0, {ahead}", "BAR.SYNC.DEFER_BLOCKING 0x0"]
    turn += [
        "LDGSTS.E.BYPASS.128 [R7], desc[UR8][R8.64]",
        "LDGDEPBAR",
        *["MOV R1, R3"] * 6,
        "@!P5 BRA 0x0",
        "EXIT",
    ]
    assert loads_of(turn, 6) == loads


def test_what_waits_and_what_returns_from_behind_the_end_are_no_loops():
    lines = ["UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR6", "BRA.U !UP0, 0x0"]
    lines += ["SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR31], R4", "@!P4 BRA 0xd0"]  # 0x20: the loop
    lines += [
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR20], idesc[UR21]",
        *["MOV R1, R2"] * 6,
    ]
    lines += ["BRA.U UP3, 0x20", "EXIT"]
    lines += [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR31], R4",
        "@!P4 BRA 0xd0",
        "BRA 0x40",
        "BRA 0x100",
    ]  # from 0xd0 on
    code = code_of(*lines)
    assert machine_code.loops_of(machine_code.code_of(code)) == [(0x20, 0xB0)]
    assert machine_code.executed("some_kernel", code, (7,)) == (2 + 7 * 10 + 5, 0, 0, 0)


def test_bytes_are_those_of_different_tensors():
    x = torch.empty(8, 4, device="meta")
    assert (
        bytes_of([x, x[:2], x.t(), 3, None, torch.empty(2, dtype=torch.int64, device="meta")])
        == 128 + 16
    )
    assert bytes_of([x[:2], x.expand(5, 8, 4)]) == 128


def test_a_call_is_recorded_with_everything_that_it_launches():
    case = floors.CASES["separable d=768 E=8 k=1"]
    started = floors.recorded(case.layer("meta"), case, True)
    names = [each.name for each in started]
    assert {"mm", "logits_kernel", "gate_kernel", "gate_backward_kernel"} <= set(names)
    assert any(isinstance(each, Launch) for each in started)
    assert "gate_kernel" in [each.name for each in floors.recorded(case.layer("meta"), case, False)]
    shared = sum(each.flops for each in started if not isinstance(each, Launch))
    assert shared > 3 * 16 * 4096 * 768**2, "products with the shared block are the library's"
    sums = [each.grid[0] * each.grid[1] for each in started if each.name == "grouped_sum_kernel"]
    assert min(sums) >= 128, "a few programs that add all parts would take longer than the product"


def test_the_dense_network():
    """Two products at the card's FLOP/s, in training three times as many; what is between them is
    bound by bytes."""
    case = floors.CASES["hidden d=768 E=8 k=2"]
    product = 2 * 4096 * 768 * 3072 / 800e12
    between = 2 * 4096 * 3072 * 2 / 3e12
    assert floors.dense_seconds(case, False) == pytest.approx(2 * product + between)
    assert floors.dense_seconds(case, True) == pytest.approx(6 * product + 2.5 * between)


def test_programs_run_in_waves_as_long_as_one_of_them():
    few, many = [machine_code.Binary(registers) for registers in (64, 255)]
    assert floors.at_once(few, 4) == 8
    assert floors.at_once(many, 8) == 1
    assert floors.at_once(few._replace(shared=100 << 10), 4) == 2
    assert floors.at_once(few._replace(registers=16), 8) == 8, "64 warps at most"


def test_a_launch_s_floor_counts_barriers_and_loads(monkeypatch):
    text = code_of(
        "LDG.E R2, desc[UR4][R8.64]", "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R0, R2, R1", "EXIT"
    )
    binary = machine_code.Binary(128, code=text)
    monkeypatch.setattr(floors, "job_of", lambda *_: None)
    monkeypatch.setattr(floors, "compiled", lambda _: {"some_kernel": binary})
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="some_kernel"))
    cycles = 4 + floors.BARRIER + floors.LOAD
    for programs, waves in (
        (1, 1),
        (528, 1),
        (529, 2),
    ):  # four at a time on each of 132 multiprocessors
        cost = floors.cost_of(Launch(kernel, (programs,), {"num_warps": 4}), 64)
        assert cost.floor == cost.times[3] == pytest.approx(waves * cycles / 1.755e9), programs
        assert cost.warp == (4, 1, 1, 0)


def test_the_table_has_every_call():
    calls = read_json(floors.TABLE)
    assert set(calls) == {f"{name} {phase}" for name, phase in product(floors.CASES, PHASES)}


def test_the_page_says_the_tables_figures_and_which_miss_their_limits():
    calls, page = (read_json(floors.TABLE), (ROOT / "docs/kernels_triton.md").read_text())
    wanted = []
    for name, case in floors.CASES.items():
        if case.masked:
            continue
        words = []
        for phase, limit in zip(PHASES, case.limits, strict=True):
            x_dense = calls[f"{name} {phase}"]["x_dense"]
            mark = "**" * bool(limit and x_dense > limit)
            words.append(f"{mark}{x_dense:.2f}{mark}")
        wanted.append(" / ".join(words))
    rows = [
        line.split(" | ") for line in page.splitlines() if "k = " in line and line.startswith("|")
    ]
    first, few = (
        [row[1] for row in rows if "T = 64" not in row[0]],
        [row[1] for row in rows if "T = 64" in row[0]],
    )
    large = [row[3] for row in rows if "T = 64" not in row[0]]
    assert [*first[:2], *few, *first[2:], *large] == wanted


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A table that says what a call's figures are."""
    call = "hidden d=768 E=8 k=2 forward"
    kept = {"x_dense": 1.45, "floor_us": 100.0, "launches": 8}
    monkeypatch.setattr(floors, "TABLE", tmp_path / "gpu.json")
    monkeypatch.setattr(floors, "recorded", lambda *_: [])
    monkeypatch.setattr(floors, "figures", lambda *_: dict(kept))
    table = {call: dict(kept)}
    write_json(floors.TABLE, table)
    assert floors.main(["--only", call]) == 0
    return table


@pytest.mark.parametrize(
    "change, line",
    [
        ({"launches": 7}, "launches 8; at most 7"),
        ({"floor_us": 90.0}, "floor_us 100.0; at most 91.8"),
        ({"x_dense": 1.4, "limit": 1.44}, "x_dense 1.45; at most 1.44"),
    ],
)
def test_what_is_worse_than_the_table_fails(planted, change, line, capsys, monkeypatch):
    (call,) = planted
    if "limit" in change:
        limits = (change.pop("limit"), None)
        name = call.rpartition(" ")[0]
        monkeypatch.setitem(floors.CASES, name, replace(floors.CASES[name], limits=limits))
    planted[call] |= change
    write_json(floors.TABLE, planted)
    assert floors.main(["--only", call]) == 1
    assert capsys.readouterr().err == f"{call}: {line}\n"


def test_a_call_that_the_table_lacks_fails(planted, capsys):
    (call,) = planted
    write_json(floors.TABLE, {})
    assert floors.main(["--only", call]) == 1
    assert capsys.readouterr().err == f"{call}: not in gpu.json\n"
    assert floors.main(["--only", call, "--write"]) == 0
    assert floors.main(["--only", call]) == 0


def test_a_limit_that_was_kept_must_be_kept_and_one_that_is_missed_is_named(
    planted, capsys, monkeypatch
):
    (call,) = planted
    kept = {"x_dense": 1.3, "floor_us": 10.0, "launches": 3}
    assert floors.worse("a call", {**kept, "x_dense": 1.31}, kept, 1.3) == [
        "a call: x_dense 1.31; at most 1.3"
    ]
    missed = {**kept, "x_dense": 1.31}
    assert floors.worse("a call", missed, missed, 1.3) == []
    assert floors.worse("a call", {**kept, "x_dense": 1.35}, missed, 1.3) == [
        "a call: x_dense 1.35; at most 1.3362"
    ]
    monkeypatch.setattr(floors, "figures", lambda *_: {**planted[call], "x_dense": 1.51})
    assert floors.main(["--only", call, "--write"]) == 0
    assert "at most 1.5: missed" in capsys.readouterr().out
