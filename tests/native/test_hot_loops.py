"""The compiled hot loop of every CPU micro-kernel: multiply-adds, loads and loop control, and
nothing else.

Read with binutils (objdump, c++filt) from the built library. The limits are what GCC 12 and GCC 14
reach. The baseline's loops (*_generic.cpp) are told but not checked: SSE2 has neither multiply-adds
nor broadcasts from memory.
"""

import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from mpoe_kernels.native_library import NATIVE_LIBRARY

# Functions with a micro-kernel's loop: rows times a packed panel, dots of rows, few rows of a
# hidden-side expert.
KERNEL = re.compile(r"\b(register_tile|tile_of|multiply_tiles|dot_tile|few_columns)<")
MULTIPLY_ADD = re.compile(r"vfmadd\d+ps|vdpbf16ps|tdpbf16ps|mulps")
LOAD = re.compile(r"v?(movdq|movup|movap|movss|pbroadcast|broadcast|pmovzxwd)\w*|tileloadd")
CONTROL = re.compile(r"add|sub|inc|dec|cmp|test|lea|j\w+")  # in registers
MOST_CONTROL = 6  # three pointers, the count, a comparison, the jump
COPY = re.compile(r"%r\w+,%r\w+")  # of a mov between general registers, which renaming makes free
UNPACK = re.compile(
    r"vp(slld|andd?)|vandps"
)  # splits a pair of bfloat16 numbers where no instruction multiplies them
# Number of loops per file, float32 and bfloat16. Tiles: one per number of rows, reading in place
# and from a packed panel; with 16 floats per vector also one for half a panel; AMX: tiles of up to
# 16 and up to 32 rows. Dots: of whole tiles and of the last rows and columns.
TILES = {
    "gemm_avx2": (12, 10),
    "gemm_avx512": (42, 39),
    "gemm_avx512bf16": (42, 42),
    "gemm_amx": (0, 2),
}
LOOPS = {
    **{(name, "tile"): counts for name, counts in TILES.items()},
    **{(f"gemm_{isa}", "dot_tile"): (4, 4) for isa in ("avx2", "avx512", "avx512bf16")},
    **{(f"experts_{isa}", "few_columns"): (2, 2) for isa in ("avx2", "avx512", "avx512bf16")},
}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


class Loop(NamedTuple):
    """The loop of a micro-kernel: its source file without suffix, its function as written, and what
    is in it."""

    file: str
    kernel: str
    instructions: list[Instruction]

    @property
    def kind(self) -> str:
        found = re.match(r"dot_tile|few_columns", self.kernel)
        return found[0] if found else "tile"

    @property
    def half(self) -> bool:
        return "BFloat16" in self.kernel or self.file == "gemm_amx"

    @property
    def unpacks(self) -> bool:
        """Whether numbers of bfloat16 become floats in the loop."""
        return self.half and (
            self.kind == "few_columns" or self.file in ("gemm_avx2", "gemm_avx512")
        )

    def most_loads(self):
        """Operands of the loop, each loaded once in every step; None: not known from the function's
        name."""
        numbers = [int(n) for n in re.findall(r"(?<=[ ,])\d+(?=[,>])", self.kernel)]
        steps = 2 if self.unpacks and self.kind != "few_columns" else 1
        if self.kernel.startswith("multiply_tiles"):
            return None
        if self.kind == "few_columns":
            return 1 + numbers[0]
        return steps * sum(numbers)  # rows and vectors, or rows and columns


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(library):
    """Address of every function with a micro-kernel's loop -> its source file and its demangled
    name."""
    found, source = {}, ""
    for line in output("objdump", "-t", "-C", str(library)).splitlines():
        match = re.match(r"([0-9a-f]+) (.{7}) \S+\s+[0-9a-f]+\s+(.*)", line)
        if match is None:
            continue
        address, flags, name = match.groups()
        if "f" in flags:
            source = Path(name).stem
        elif "F" in flags and KERNEL.search(name):
            found[int(address, 16)] = source, name
    return found


def functions(library):
    bodies = {}
    body = []
    for line in output("objdump", "-d", "--no-show-raw-insn", str(library)).splitlines():
        if match := re.match(r"([0-9a-f]+) <", line):
            body = bodies.setdefault(int(match[1], 16), [])
        elif match := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            body.append(Instruction(int(match[1], 16), match[2], match[3]))
    return bodies


def hot_loops(body):
    """The innermost loops that contain a multiply-add; what calls or returns is a jump back from
    code aside."""
    place = {instruction.address: i for i, instruction in enumerate(body)}
    spans = []
    for i, (_, name, operands) in enumerate(body):
        target = re.match(r"[0-9a-f]+", operands)
        if name.startswith("j") and target and (start := place.get(int(target[0], 16), i + 1)) <= i:
            spans.append((start, i))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    loops = [body[start : end + 1] for start, end in inner]
    return [
        loop
        for loop in loops
        if any(MULTIPLY_ADD.fullmatch(i.name) for i in loop)
        and not any(i.name in ("call", "ret") for i in loop)
    ]


def find_loops(library):
    bodies, loops = functions(library), []
    for address, (file, name) in sorted(kernels(library).items(), key=lambda item: item[1]):
        kernel = re.sub(r"\(anonymous namespace\)::|mpoe::|void |>\((?!anon).*", "", name) + ">"
        # None: the function calls the one with the loop.
        loops += [
            Loop(file, kernel, instructions) for instructions in hot_loops(bodies.get(address, []))
        ]
    return loops


def complaints(loop):
    wrong = []
    control = loads = 0
    for _, name, operands in loop.instructions:
        if re.search(r"%[re][sb]p\b", operands):
            wrong.append(f"{name} {operands} touches the stack")
        if name == "mov" and COPY.fullmatch(operands):
            continue
        if CONTROL.fullmatch(name) and (name == "lea" or "(" not in operands):
            control += 1
            continue
        loads += "(" in operands
        allowed = MULTIPLY_ADD.fullmatch(name) or (loop.unpacks and UNPACK.fullmatch(name))
        # Between registers: a copy before a multiply-add that overwrites its operand.
        if not allowed and not (
            LOAD.fullmatch(name) and ("(" in operands or (loop.unpacks and "ap" in name))
        ):
            wrong.append(f"{name} {operands} is no multiply-add, load or loop control")
    if control > MOST_CONTROL:
        wrong.append(f"{control} instructions of loop control, at most {MOST_CONTROL} allowed")
    most = loop.most_loads()
    if most is not None and loads > most:
        wrong.append(f"{loads} loads of {most} operands")
    return wrong


def faults(loops):
    """What is wrong with each, and kernels of which there are not as many as there must be."""
    found, seen = [], Counter[tuple[str, str, bool]]()
    for loop in loops:
        if (loop.file, loop.kind) in LOOPS:
            seen[loop.file, loop.kind, loop.half] += 1
            found += [f"{loop.file} {loop.kernel}: {complaint}" for complaint in complaints(loop)]
    for (file, kind), expected in LOOPS.items():
        for half in (False, True):
            if (count := seen[file, kind, half]) != expected[half]:
                found.append(
                    f"{file}.cpp: {count} loops of {kind}, expected {expected[half]} (bfloat16: "
                    f"{half})"
                )
    return found


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
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the counts are of x86-64"
)
def test_loops_of_the_built_library():
    if shutil.which("objdump") is None:
        pytest.skip("binutils is not installed")
    assert faults(find_loops(NATIVE_LIBRARY.path)) == []


def body(text):
    lines = (line.partition(" ") for line in text.splitlines())
    return [
        Instruction(address, name, operands) for address, (name, _, operands) in enumerate(lines)
    ]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("", "", None),
        ("%zmm0,%zmm2,%zmm3", "-0x40(%rsp),%zmm2,%zmm3", "touches the stack"),
        ("%zmm0,%zmm2,%zmm5", "(%rcx),%zmm2,%zmm5", "5 loads of 4 operands"),
        (
            "vbroadcastss (%rax),%zmm2",
            "vbroadcastss %xmm7,%zmm2",
            "is no multiply-add, load or loop control",
        ),
        ("cmp %rdi,%rsi", "cmp %rdi,(%rsi)", "is no multiply-add, load or loop control"),
        ("add $0x4,%rax", "vpslld $0x10,%zmm0,%zmm0", "is no multiply-add, load or loop control"),
        (
            "add $0x4,%rax",
            "\n".join(["add $0x4,%rax"] * 5),
            "7 instructions of loop control, at most 6 allowed",
        ),
    ],
)
def test_each_fault_is_named(old, new, said):
    (loop,) = hot_loops(body(TILE))
    assert loop == body(TILE)
    found = complaints(
        Loop(
            "gemm_avx512",
            "register_tile<float, 2, 2, RowOffsets<2> >",
            body(TILE.replace(old, new) if old else TILE),
        )
    )
    assert any(fault.endswith(said) for fault in found) if said else found == []
