"""The hot loops of the built library, and that faults in loops written here are found."""

from __future__ import annotations

import platform
import shutil

import pytest

from mpoe_kernels.native_library import NATIVE_LIBRARY

from .hot_loops import Instruction, Loop, complaints, faults, find_loops, hot_loops

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


@pytest.mark.slow  # of GCC; other compilers may need more
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the counts are of x86-64")
def test_loops_of_the_built_library(native_library: None) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("binutils is not installed")
    assert faults(find_loops(NATIVE_LIBRARY.path)) == []


def body(text: str) -> list[Instruction]:
    lines = (line.partition(" ") for line in text.splitlines())
    return [Instruction(address, name, operands) for address, (name, _, operands) in enumerate(lines)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", None),
        ("%zmm0,%zmm2,%zmm3", "-0x40(%rsp),%zmm2,%zmm3", "touches the stack"),
        ("%zmm0,%zmm2,%zmm5", "(%rcx),%zmm2,%zmm5", "5 loads of 4 operands"),
        ("vbroadcastss (%rax),%zmm2", "vbroadcastss %xmm7,%zmm2", "is no multiply-add, load or loop control"),
        ("cmp %rdi,%rsi", "cmp %rdi,(%rsi)", "is no multiply-add, load or loop control"),
        ("add $0x4,%rax", "vpslld $0x10,%zmm0,%zmm0", "is no multiply-add, load or loop control"),
        ("add $0x4,%rax", "\n".join(["add $0x4,%rax"] * 5), "7 instructions of loop control, at most 6 allowed"),
    ],
)
def test_each_fault_is_named(old: str, new: str, said: str | None) -> None:
    (loop,) = hot_loops(body(TILE))
    assert loop == body(TILE)
    found = complaints(
        Loop("gemm_avx512", "register_tile<float, 2, 2, RowOffsets<2> >", body(TILE.replace(old, new) if old else TILE))
    )
    assert any(fault.endswith(said) for fault in found) if said else found == []
