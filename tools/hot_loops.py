"""Checks the compiled hot loop of every CPU micro-kernel: multiply-adds, loads and loop control, and nothing else.

    python tools/hot_loops.py [LIBRARY]    default: mpoe_kernels/_C.abi3.so; needs binutils (objdump, c++filt)

One line per loop: file, kernel, instructions per multiply-add. Exits with 1 if a loop of an x86-64 vector extension
touches the stack or contains an instruction that is not allowed, or if a kernel was not found. The limits are what GCC
12 reaches; the compilers that built the library are printed. The baseline's loops (gemm_generic.cpp) are printed but
not checked: SSE2 has neither multiply-adds nor broadcasts from memory.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).resolve().parent.parent / "mpoe_kernels" / "_C.abi3.so"
MULTIPLY_ADD = re.compile(r"vfmadd\d+ps|vdpbf16ps|tdpbf16ps|mulps")
LOAD = re.compile(r"v?(movdq|movup|movap|movss|pbroadcast|broadcast)\w*|tileloadd")
CONTROL = re.compile(r"add|sub|inc|dec|cmp|test|lea|j\w+")
MOST_CONTROL = 6  # three pointers, the count, a comparison, the jump
COPY = re.compile(r"%r\w+,%r\w+")  # of a mov between general registers, which renaming makes free
UNPACK = re.compile(r"vp(slld|andd?)|vandps")  # splits a pair of bfloat16 numbers where no instruction multiplies them
# Number of loops per instruction set, float32 and bfloat16: one per number of rows, reading in place and from a packed
# panel; with 16 floats per vector also one for half a panel. AMX: tiles of up to 16 and up to 32 rows.
LOOPS = {"avx2": (12, 10), "avx512": (42, 39), "avx512bf16": (42, 42), "amx": (0, 2)}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tiles(library: Path) -> dict[int, tuple[str, str]]:
    """Address of every function with a micro-kernel's loop -> its source file and its demangled name."""
    found, source = {}, ""
    for line in output("objdump", "-t", "-C", str(library)).splitlines():
        match = re.match(r"([0-9a-f]+) (.{7}) \S+\s+[0-9a-f]+\s+(.*)", line)
        if match is None:
            continue
        address, flags, name = match.groups()
        if "f" in flags:
            source = Path(name).name
        elif "F" in flags and re.search(r"\b(register_tile|tile_of|multiply_tiles)<", name):
            found[int(address, 16)] = source, name
    return found


def functions(library: Path) -> dict[int, list[Instruction]]:
    bodies: dict[int, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in output("objdump", "-d", "--no-show-raw-insn", str(library)).splitlines():
        if match := re.match(r"([0-9a-f]+) <", line):
            body = bodies.setdefault(int(match[1], 16), [])
        elif match := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            body.append(Instruction(int(match[1], 16), match[2], match[3]))
    return bodies


def hot_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that contain a multiply-add."""
    place = {instruction.address: i for i, instruction in enumerate(body)}
    spans = []
    for i, (_, name, operands) in enumerate(body):
        target = re.match(r"[0-9a-f]+", operands)
        if name.startswith("j") and target and (start := place.get(int(target[0], 16), i + 1)) <= i:
            spans.append((start, i))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    loops = [body[start : end + 1] for start, end in inner]
    return [loop for loop in loops if any(MULTIPLY_ADD.fullmatch(instruction.name) for instruction in loop)]


def complaints(loop: list[Instruction], unpacks: bool) -> list[str]:
    wrong = [f"{i.name} {i.operands} touches the stack" for i in loop if re.search(r"%[re][sb]p\b", i.operands)]
    control = 0
    for _, name, operands in loop:
        if name == "mov" and COPY.fullmatch(operands):
            continue
        if MULTIPLY_ADD.fullmatch(name) or (LOAD.fullmatch(name) and ("(" in operands or (unpacks and "ap" in name))):
            continue
        if CONTROL.fullmatch(name):
            control += 1
        elif not (unpacks and UNPACK.fullmatch(name)):
            wrong.append(f"{name} {operands} is no multiply-add, load or loop control")
    if control > MOST_CONTROL:
        wrong.append(f"{control} instructions of loop control, at most {MOST_CONTROL} allowed")
    return wrong


def main() -> int:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    compilers = set(re.findall(r"\]\s+(.*)", output("readelf", "-p", ".comment", str(library))))
    print(f"{library.name}, built by {', '.join(sorted(compilers))}")
    failed, seen, bodies = False, Counter[tuple[str, bool]](), functions(library)
    for address, (source, name) in sorted(tiles(library).items(), key=lambda item: item[1]):
        isa, half = source.removeprefix("gemm_").removesuffix(".cpp"), "BFloat16" in name or source == "gemm_amx.cpp"
        kernel = re.sub(r"\(anonymous namespace\)::|mpoe::|void |>\((?!anon).*", "", name) + ">"
        for loop in hot_loops(bodies.get(address, [])):  # none: the function calls the one with the loop
            count = sum(bool(MULTIPLY_ADD.fullmatch(i.name)) for i in loop)
            print(f"{source:20} {kernel:50} {len(loop):4} instructions, {len(loop) / count:.2f} per multiply-add")
            if isa not in LOOPS:
                continue
            seen[isa, half] += 1
            for complaint in complaints(loop, unpacks=half and isa in ("avx2", "avx512")):
                failed = True
                print(f"    {complaint}")
    if platform.machine() in ("x86_64", "AMD64"):
        for isa, expected in LOOPS.items():
            for half in (False, True):
                if seen[isa, half] != expected[half]:
                    failed = True
                    print(f"gemm_{isa}.cpp: {seen[isa, half]} loops, expected {expected[half]} (bfloat16: {half})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
