"""What the machine code of a GPU kernel shows: resources, instructions and loops."""

import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from mpoe_kernels.triton.architecture import SHARED_MEMORY

# Matrix instructions. NVIDIA: warp (HMMA), warpgroup (HGMMA), fifth generation (UTC..MMA). AMD:
# mfma.
_MATRIX_OF_NVIDIA = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_MATRIX_OF_AMD = re.compile(r"\bv_(?:mfma|smfmac)_")
_LOCAL = re.compile(r"\b(?:STL|LDL)\b")
# Kernels of csrc/cuda that multiply in types of tensor cores, by the compiler's name.
_PRODUCT = re.compile(r"(?:gradient|rebuilt)_kernelI.*(?:__nv_bfloat16|__half)")
_TENSOR_MEMORY_COLUMNS = 512  # on sm_100
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BACK = re.compile(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)")
_BARRIER = re.compile(r"\bBAR\.(?:SYNC|RED)")
_REGISTER = re.compile(r"\bR(\d+)")
_LOAD = re.compile(r"\b(?:LDG|LD|ATOMG)\.E(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)* R")
_PLACE = re.compile(r"\[.*?\]")  # where an instruction reads or writes
_COPIES_WAIT = re.compile(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)")
_WAIT = re.compile(r"\.TRYWAIT|\.FIND_AND_SET")
_PRODUCT_SIZES = re.compile(r"\b(?:HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16|8))")


Code = list[tuple[int, str]]  # address and words of every instruction


class Binary(NamedTuple):
    """What the machine code of a kernel shows.

    Attributes:
        registers: registers per thread.
        spills: instructions (NVIDIA) or registers (AMD) that go through local memory.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory per program; of csrc/cuda's kernels without what a launch
            asks for.
        tensor_memory: columns of tensor memory; sm_100 only.
        matrix_instructions: number of instructions for tensor or matrix cores.
        wants_matrix: whether it multiplies types that those cores take: 16-bit floats, or float32
            as TF32.
        code: the instructions.
    """

    registers: int
    spills: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix_instructions: int = 0
    wants_matrix: bool = False
    code: str = ""

    def problems(self, architecture: str) -> list[str]:
        """Reasons why it must not be shipped; empty if it may be."""
        reasons = []
        limit = SHARED_MEMORY[architecture]
        if self.spills or self.stack:
            reasons.append(f"spills: {self.spills} accesses, {self.stack} bytes of local memory")
        if self.shared > limit:
            reasons.append(
                f"needs {self.shared} bytes of shared memory; {architecture} has {limit}"
            )
        if self.tensor_memory > _TENSOR_MEMORY_COLUMNS:
            reasons.append(
                f"needs {self.tensor_memory} columns of tensor memory; there are "
                f"{_TENSOR_MEMORY_COLUMNS}"
            )
        if self.wants_matrix and not self.matrix_instructions:
            reasons.append("multiplies matrices without a tensor-core instruction")
        return reasons


def disassembled(cubin: bytes) -> dict[str, Binary]:
    """Its kernels by the compiler's names."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(find("cuobjdump")), "-res-usage", "-sass", file.name]
        text = subprocess.check_output(command, text=True)
    usage, *codes = re.split(r"^\s+Function : (\S+)$", text, flags=re.MULTILINE)
    code_of_kernel = dict(zip(codes[::2], codes[1::2], strict=True))
    fields = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    binaries = {}
    for name, registers, stack, shared in re.findall(fields, usage):
        code = code_of_kernel[name]
        binaries[name] = Binary(
            registers=int(registers),
            spills=len(_LOCAL.findall(code)),
            stack=int(stack),
            shared=int(shared),
            matrix_instructions=len(_MATRIX_OF_NVIDIA.findall(code)),
            wants_matrix=bool(_PRODUCT.search(name)),
            code=code,
        )
    return binaries


def of_amd(code: str) -> Binary:
    """The only kernel of a file, from its assembly."""
    # Scalar registers spill into vector registers, not into memory.
    sizes = []
    for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"):
        size = re.findall(rf"\.{name}:\s+(\d+)", code)[0]
        sizes.append(int(size))
    return Binary(*sizes, matrix_instructions=len(_MATRIX_OF_AMD.findall(code)))


def find(program: str) -> str | None:
    """The program's path: on PATH, in the toolkit's usual folder, or in the triton wheel."""
    wheel = Path(triton.__file__).parent / "backends/nvidia/bin"
    on_path = shutil.which(program)
    return on_path or shutil.which(program, path=f"/usr/local/cuda/bin{os.pathsep}{wheel}")


def _flops(words: str) -> float:
    """Of an instruction, for one warp."""
    matrix = _PRODUCT_SIZES.search(words)
    if matrix is None:
        return 0.0
    m, n, k = (int(size) for size in matrix.groups() if size)
    flops = 2 * m * n * k
    return flops / 4 if "HGMMA" in words else flops  # four warps share a warpgroup's


def code_of(text: str) -> Code:
    return [(int(address, 16), words) for address, words in _INSTRUCTION.findall(text)]


def loops_of(code: Code) -> list[tuple[int, int]]:
    """First and last address of every loop, the outer ones first.

    None are the endless one behind the end, what returns from there, and what only waits for a
    barrier in memory.
    """
    last_of_loop: dict[int, int] = {}
    exits = [address for address, text in code if "EXIT" in text]
    end = exits[-1] if exits else math.inf
    for address, text in code:
        back = _BACK.search(text)
        if back is None or (address > end and text.startswith("BRA 0x")):
            continue
        first = int(back[1], 16)
        if first < address:
            last_of_loop[first] = address
    waits = {address for address, text in code if _WAIT.search(text)}
    loops = []
    for first, last in sorted(last_of_loop.items()):
        is_short = last - first <= 128
        if not is_short or waits.isdisjoint(range(first, last, 16)):
            loops.append((first, last))
    return loops


class Executed(NamedTuple):
    """What a warp of a kernel executes.

    Attributes:
        instructions, barriers: how many.
        loads: how often it must wait for global memory: for a loaded number that is used, or for
            asynchronous copies; of copies that are issued n loop turns ahead, an nth of a wait.
        flops: of matrix instructions.
    """

    instructions: float
    barriers: float
    loads: float
    flops: float


def _registers(operand: str, count: int = 1) -> set[int]:
    """Numbers of the registers that begin with the ones that an operand names."""
    registers = set()
    for first in map(int, _REGISTER.findall(operand)):
        registers |= set(range(first, first + count))
    return registers


def _loads(code: Code, times: Sequence[float], loops: Sequence[tuple[int, int]]) -> float:
    """See `Executed`. Loads whose results are first used together count once."""
    total = 0.0
    pending: dict[int, float] = {}  # registers that are loaded -> how often
    for (address, words), often in zip(code, times, strict=True):
        wait = _COPIES_WAIT.search(words)
        if wait:
            first, last = address, address
            for loop in loops:
                if loop[0] <= address <= loop[1]:
                    first, last = loop
            groups = 0
            for other, text in code:
                if first <= other <= last and "LDGDEPBAR" in text:
                    groups += 1
            ahead = int(wait[1], 16) / max(1, groups)
            total += often / (1 + ahead)
        load = _LOAD.search(words)
        destination, _, sources = words.partition(",")
        places = " ".join(_PLACE.findall(words))
        read = _registers(places)
        read |= _registers(sources if load or sources else words)
        awaited = [pending[register] for register in read if register in pending]
        if awaited:
            total += max(awaited)
            pending.clear()
        if load:
            bits = int(load[1] or 32)
            loaded = _registers(destination, bits // 32)
            pending |= dict.fromkeys(loaded, often)
    return total


def executed(name: str, text: str, trips: Sequence[float]) -> Executed:
    """What a warp executes of a kernel's machine code.

    ``trips``: how often each loop runs for each run of the loop around it, in the order of
    `loops_of`. Loops that run once, and inner ones (the last), which the compiler unrolled, may be
    missing in the code. Raises ValueError if it has more.
    """
    code = code_of(text)
    loops = loops_of(code)
    counts = trips
    if len(counts) != len(loops):
        counts = [count for count in trips if count != 1][: len(loops)]
    if len(counts) < len(loops):
        sizes = [sum(first <= address <= last for address, _ in code) for first, last in loops]
        raise ValueError(
            f"{name} has loops of {sizes} instructions; tools/gpu_floors.py says how often {trips} "
            "run"
        )
    times = []
    barriers = 0.0
    flops = 0.0
    for address, words in code:
        often = 1.0
        for (first, last), count in zip(loops, counts, strict=True):
            if first <= address <= last:
                often *= count
        times.append(often)
        flops += often * _flops(words)
        if _BARRIER.search(words):
            barriers += often
    return Executed(sum(times), barriers, _loads(code, times, loops), flops)
