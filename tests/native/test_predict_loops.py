"""`tools/predict_loops.py`: what it hands to llvm-mca, and what it says of loops whose limit is known."""

from __future__ import annotations

import shutil

import predict_loops
import pytest
from hot_loops import Instruction, Loop

PROGRAM = next(filter(None, map(shutil.which, predict_loops.PROGRAMS)), None)
needs_llvm_mca = pytest.mark.skipif(PROGRAM is None, reason="llvm-mca is not installed")


def loop(sums: int, file: str = "gemm_avx512") -> Loop:
    """Multiply-adds into `sums` registers: four cycles of latency, two units."""
    lines = [("vfmadd231ps", f"%zmm0,%zmm1,%zmm{i + 2}") for i in range(sums)]
    lines += [("add", "$0x1,%rax"), ("cmp", "%rdi,%rax"), ("jne", "40 <tile+0x40>")]
    return Loop(file, "register_tile<float>", [Instruction(i, *line) for i, line in enumerate(lines)])


def test_addresses_and_names_are_left_out() -> None:
    assert predict_loops.assembly(loop(1)).splitlines() == [
        "vfmadd231ps %zmm0,%zmm1,%zmm2",
        "add $0x1,%rax",
        "cmp %rdi,%rax",
        "jne top",
    ]


@needs_llvm_mca
def test_few_sums_wait_for_their_latency_and_many_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAM is not None
    assert predict_loops.predict(PROGRAM, ["skylake-avx512"], [loop(2), loop(16)]) == 1
    few, many = capsys.readouterr().out.splitlines()
    assert few.endswith("25%  limit: latency of the sums")
    assert "limit" not in many


@needs_llvm_mca
def test_only_processors_with_the_instructions_are_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAM is not None
    assert predict_loops.predict(PROGRAM, ["haswell"], [loop(2)]) == 0
    assert capsys.readouterr().out == ""


def test_tiles_of_amx_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    amx = Loop("gemm_amx", "multiply_tiles<true>", [Instruction(0, "tdpbf16ps", "%tmm1,%tmm2,%tmm0")])
    assert predict_loops.predict("llvm-mca", ["sapphirerapids"], [amx]) == 0
    assert "in no model, not predicted" in capsys.readouterr().out


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["predict_loops.py", "--llvm_mca", "no-such-program"])
    assert predict_loops.main() == 1
    assert "apt-get install llvm" in capsys.readouterr().err
