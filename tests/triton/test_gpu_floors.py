"""tools/gpu_floors.py: what it counts, and that it finds kernels that became slower."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import gpu_floors as floors
import machine_code
import pytest
import torch
from mpoe_bench.layers import PHASES
from shipped_kernels import bytes_of

from mpoe_kernels.testing.launches import Launch

ROOT = Path(__file__).resolve().parents[2]
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


def test_instructions_count_as_often_as_their_loops_run() -> None:
    found = machine_code.executed("some_kernel", CODE, (2, 5))
    assert found == (3 + 2 * (2 + 5 * 3), 2, 10 * (2 * 16 * 8 * 16 + 2 * 64 * 128 * 16 / 4))
    assert machine_code.executed("some_kernel", CODE, (1, 2, 5)) == found, "a loop that runs once is none"
    assert machine_code.executed("some_kernel", CODE, (2, 5, 4)) == found, "the innermost was unrolled"
    with pytest.raises(ValueError, match=r"some_kernel has loops of \[5, 3\] instructions; tools/gpu_floors.py says"):
        machine_code.executed("some_kernel", CODE, (2,))


def test_what_waits_and_what_returns_from_behind_the_end_are_no_loops() -> None:
    lines = ["UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR6", "BRA.U !UP0, 0x0"]
    lines += ["SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR31], R4", "@!P4 BRA 0xd0"]  # 0x20: the loop
    lines += ["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR20], idesc[UR21]", *["MOV R1, R2"] * 6]
    lines += ["BRA.U UP3, 0x20", "EXIT"]
    lines += ["SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR31], R4", "@!P4 BRA 0xd0", "BRA 0x40", "BRA 0x100"]  # from 0xd0 on
    code = "".join(f"\n        /*{16 * at:04x}*/                   {words} ;" for at, words in enumerate(lines))
    assert machine_code.loops_of(machine_code.code_of(code)) == [(0x20, 0xB0)]
    assert machine_code.executed("some_kernel", code, (7,)) == (2 + 7 * 10 + 5, 0, 0)


def test_a_chain_has_flops_of_its_own() -> None:
    """Of products with the weights, which take as many as the dense network's, and of what rebuilds and masks."""
    names = "paper max_bond 64", "paper max_bond 64 masked", "hidden"
    layers = [floors.CASES[f"{name} d=768 E=8 k={1 + (name == 'hidden')}"].layer("meta") for name in names]
    paper, masked, hidden = ([floors.own_flops(layer, more) for more in (False, True)] for layer in layers)
    assert 16 * 4096 * 768**2 < masked[0] == paper[0] < masked[1] < paper[1]
    assert hidden == [0, 0]


def test_bytes_are_those_of_different_tensors() -> None:
    x = torch.empty(8, 4, device="meta")
    assert bytes_of([x, x[:2], x.t(), 3, None, torch.empty(2, dtype=torch.int64, device="meta")]) == 128 + 16
    assert bytes_of([x[:2], x.expand(5, 8, 4)]) == 128


def test_a_call_is_recorded_with_everything_that_it_launches() -> None:
    layer = floors.CASES["separable d=768 E=8 k=1"].layer("meta")
    started = floors.launches(layer, 768, True, "sm_90")
    names = [each.name for each in started]
    assert {"mm", "logits_kernel", "gate_kernel", "gate_backward_kernel"} <= set(names)
    assert any(isinstance(each, Launch) for each in started)
    assert "gate_kernel" in [each.name for each in floors.launches(layer, 768, False, "sm_90")]
    shared = sum(each.flops for each in started if not isinstance(each, Launch))
    assert shared > 3 * 16 * 4096 * 768**2, "products with the shared block are the library's"
    sums = [each.grid[0] * each.grid[1] for each in started if each.name == "grouped_sum_kernel"]
    assert min(sums) >= 128, "a few programs that add all parts would take longer than the product"


def test_the_dense_network() -> None:
    """Two products, in training three times as many."""
    forward = floors.dense_seconds(768, False, "sm_90")
    assert forward == pytest.approx(4 * 4096 * 768 * 3072 / 800e12)
    assert floors.dense_seconds(768, True, "sm_90") == 3 * forward


def test_the_table_is_that_of_the_document() -> None:
    calls = json.loads(floors.TABLE.read_text())
    every = product(floors.CASES, PHASES, floors.CARDS)
    assert set(calls) == {" ".join(call) for call in every}
    assert floors.document(calls) in floors.DOCUMENT.read_text()


def test_the_page_says_the_tables_figures_and_which_miss_their_limits() -> None:
    calls, page = json.loads(floors.TABLE.read_text()), (ROOT / "docs" / "kernels_triton.md").read_text()
    wanted = []
    for name, case in floors.CASES.items():
        if not case.masked:
            found = [calls[f"{name} {phase} sm_90"] for phase in PHASES]
            limits = [floors.limit_of(case, phase, "sm_90") for phase in PHASES]
            marks = ["**" * bool(floors.missed("", *pair)) for pair in zip(found, limits, strict=True)]
            words = [f"{mark}{each['x_dense']:.2f}{mark}" for mark, each in zip(marks, found, strict=True)]
            wanted.append(" / ".join(words))
    rows = [line.split(" | ") for line in page.splitlines() if "k = " in line and line.startswith("|")]
    assert [row[1] for row in rows] + [row[3] for row in rows] == wanted


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """A table that says that a call is faster than it is."""
    call = "hidden d=768 E=8 k=2 forward sm_90"
    kept = json.loads(floors.TABLE.read_text())[call]
    monkeypatch.setattr(floors, "TABLE", tmp_path / "gpu.json")
    monkeypatch.setattr(floors, "figures", lambda *_: json.loads(json.dumps(kept)))
    table = {call: json.loads(json.dumps(kept))}
    floors.TABLE.write_text(json.dumps(table))
    assert floors.main(["--only", call]) == 0
    return table


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda call: call.update(launches=call["launches"] - 1), " launches; at most "),
        (lambda call: call.update(floor_us=0.9 * call["floor_us"]), " us; at most "),
        (lambda call: call["kernels"][0].__setitem__(3, 1), "instructions of gate_kernel; at most 1.02"),
        (lambda call: call["kernels"][0].__setitem__(5, 1), "bytes of gate_kernel; at most 1.02"),
    ],
)
def test_what_is_worse_than_the_table_fails(planted: dict, change, line: str, capsys) -> None:
    (call,) = planted
    change(planted[call])
    floors.TABLE.write_text(json.dumps(planted))
    assert floors.main(["--only", call]) == 1
    assert line in capsys.readouterr().err


def test_a_call_that_the_table_lacks_fails(planted: dict, capsys) -> None:
    (call,) = planted
    floors.TABLE.write_text(json.dumps({}))
    assert floors.main(["--only", call]) == 1
    assert capsys.readouterr().err == f"{call}: not in gpu.json\n"


def test_a_limit_that_is_missed_is_named(planted: dict, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time that decides; on the other cards there is none."""
    (call,) = planted
    planted[call] |= {"x_dense": 1.51, "issue_memory_tensor_us": [1.0, 3.0, 2.0]}
    floors.TABLE.write_text(json.dumps(planted))
    monkeypatch.setattr(floors, "figures", lambda *_: planted[call])
    assert floors.main(["--only", call]) == 0
    assert f"missed: {call}: 1.51 x dense of at most 1.5, by memory\n" in capsys.readouterr().out
    case = floors.CASES["hidden d=768 E=8 k=2"]
    assert [floors.limit_of(case, "forward", card) for card in floors.CARDS] == [None, 1.5, None]


def test_a_limit_that_was_kept_must_be_kept() -> None:
    kept = {"x_dense": 1.3, "floor_us": 10.0, "launches": 3, "kernels": []}
    assert floors.worse("a call", {**kept, "x_dense": 1.31}, kept, 1.3) == ["a call: 1.31 x dense; at most 1.3"]
    missed = {**kept, "x_dense": 1.31}
    assert floors.worse("a call", missed, missed, 1.3) == []
    assert floors.worse("a call", {**kept, "x_dense": 1.35}, missed, 1.3) == ["a call: 1.35 x dense; at most 1.3362"]
    assert floors.worse("a call", {**kept, "x_dense": 1.35}, kept, None) == ["a call: 1.35 x dense; at most 1.326"]
