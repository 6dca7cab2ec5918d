"""`tools/hot_loops.py`: what it finds in loops written here, and in the built library."""

from __future__ import annotations

import platform
import shutil

import hot_loops
import pytest
from hot_loops import Instruction, Loop

from mpoe_kernels.native_library import NATIVE_LIBRARY

# Two rows times two vectors.
TILE = """\
vmovups (%rcx),%zmm0
vmovups 0x40(%rcx),%zmm1
vbroadcastss (%rax),%zmm2
vfmadd231ps %zmm0,%zmm2,%zmm3
vfmadd231ps %zmm1,%zmm2,%zmm4
vbroadcastss (%rax,%rdx,1),%zmm2
vfmadd231ps %zmm0,%zmm2,%zmm5
vfmadd231ps %zmm1,%zmm2,%zmm6
add $0x4,%rax
cmp %rdi,%rsi
jne 0 <loop>"""


def body(text: str) -> list[Instruction]:
    lines = (line.partition(" ") for line in text.splitlines())
    return [Instruction(address, name, operands) for address, (name, _, operands) in enumerate(lines)]


def faults(
    text: str, kernel: str = "register_tile<float, 2, 2, RowOffsets<2> >", file: str = "gemm_avx512"
) -> list[str]:
    return hot_loops.complaints(Loop(file, kernel, body(text)))


def test_nothing_is_said_about_a_good_loop() -> None:
    assert faults(TILE) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("%zmm0,%zmm2,%zmm3", "-0x40(%rsp),%zmm2,%zmm3", "touches the stack"),
        ("%zmm0,%zmm2,%zmm5", "(%rcx),%zmm2,%zmm5", "5 loads of 4 operands"),
        ("vbroadcastss (%rax),%zmm2", "vbroadcastss %xmm7,%zmm2", "is no multiply-add, load or loop control"),
        ("cmp %rdi,%rsi", "cmp %rdi,(%rsi)", "is no multiply-add, load or loop control"),
        ("add $0x4,%rax", "vpslld $0x10,%zmm0,%zmm0", "is no multiply-add, load or loop control"),
        ("add $0x4,%rax", "\n".join(["add $0x4,%rax"] * 5), "7 instructions of loop control, at most 6 allowed"),
    ],
)
def test_each_fault_is_named(old: str, new: str, said: str) -> None:
    assert any(fault.endswith(said) for fault in faults(TILE.replace(old, new)))


def test_what_splits_pairs_is_allowed_where_no_instruction_multiplies_them() -> None:
    text = TILE.replace("add $0x4,%rax", "vpslld $0x10,%zmm0,%zmm0")
    kernel = "register_tile<BFloat16, 2, 2, RowOffsets<2> >"
    assert faults(text, kernel) == []
    assert len(faults(text, kernel, "gemm_avx512bf16")) == 1


@pytest.mark.parametrize(
    ("file", "kernel", "most"),
    [
        ("gemm_avx512", "register_tile<float, 14, 2, RowOffsets<14> >", 16),
        ("gemm_avx2", "tile_of<BFloat16, true, 2, 5>", 14),
        ("gemm_avx512bf16", "tile_of<BFloat16, true, 2, 5>", 7),
        ("gemm_avx2", "dot_tile<float, 2, 4>", 6),
        ("gemm_avx2", "dot_tile<BFloat16, 2, 4>", 12),
        ("hidden_experts_avx2", "few_columns<BFloat16, 4>", 5),
        ("gemm_amx", "multiply_tiles<2>", None),
    ],
)
def test_operands_are_known_from_the_name(file: str, kernel: str, most: int | None) -> None:
    assert Loop(file, kernel, []).most_loads() == most


def test_a_jump_back_from_code_aside_is_no_loop() -> None:
    assert len(hot_loops.hot_loops(body(TILE))) == 1
    assert hot_loops.hot_loops(body(TILE.replace("add $0x4,%rax", "call 40 <memcpy@plt>"))) == []


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the counts are of x86-64")
def test_a_kernel_that_is_not_found_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    expected = sum(count > 0 for counts in hot_loops.LOOPS.values() for count in counts)
    assert hot_loops.check([]) == expected
    assert "gemm_avx2.cpp: 0 loops of dot_tile, expected 4 (bfloat16: False)" in capsys.readouterr().out


@pytest.mark.skipif(NATIVE_LIBRARY.functions is None, reason="the native kernels are not built")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
def test_loops_of_the_built_library_are_found() -> None:
    found = {loop.kind for loop in hot_loops.find_loops(hot_loops.LIBRARY)}
    assert found == {"tile", "dot_tile", "few_columns"}
