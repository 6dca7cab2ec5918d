"""Compiles every CUDA source with nvcc; needs no GPU.

Warnings, register spills and local memory are errors; so are products without tensor-core instructions, if a
disassembler (cuobjdump) is found. Prints registers, shared memory and occupancy of every kernel; ``--doc`` writes them
into bench/results/ahead-of-time/cuda.md. nvcc is taken from ``CUDACXX``, PATH or /usr/local/cuda/bin.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from documents import write_between

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a", "100")
DOC = ROOT / "bench" / "results" / "ahead-of-time" / "cuda.md"
# Limits of one multiprocessor, from the technical specifications in NVIDIA's "CUDA C++ Programming Guide".
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
RESERVED_BYTES = 1024  # shared memory that the driver reserves for every block
# Kernels of these types multiply on tensor cores.
ON_TENSOR_CORES = ("__nv_bfloat16", "__half", "tf32")
FLAGS = [
    *("-std=c++20", "-O3", "-lineinfo", "--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"),
    *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage", f"-I{ROOT / 'csrc'}"),
]
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Kernel:
    """What ptxas reported for one kernel; ``shared`` is static shared memory."""

    source: str
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    tensor_instructions: int | None = None

    @property
    def warps(self) -> int:
        """Warps per block: a product's tile is cut into one tile per warp; other kernels have 128 threads."""
        tile = re.search(r"Tile<[\w:]+, (\d+), (\d+), (\d+), (\d+)>", self.name)
        if tile is None:
            return 4
        rows, columns, own_rows, own_columns = map(int, tile.groups())
        return rows // own_rows * (columns // own_columns)

    @property
    def dynamic(self) -> int | None:
        """Dynamic shared memory per block; None if it depends on the product."""
        return _DYNAMIC.get(self.family)

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]

    @property
    def occupancy(self) -> str:
        """Resident warps as a share of the maximum; an upper bound if shared memory depends on the product."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        blocks = min(REGISTERS // registers, WARPS // self.warps, BLOCKS)
        if self.dynamic is None:
            return f"<= {100 * blocks * self.warps // WARPS} %"
        blocks = min(blocks, SHARED_BYTES[self.arch] // (self.shared + self.dynamic + RESERVED_BYTES))
        return f"{100 * blocks * self.warps // WARPS} %"

    @property
    def problems(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of local memory, {self.spills} bytes spilled")
        if self.tensor_instructions == 0 and "_kernel" in self.name and is_product(self.name):
            found.append("no tensor-core instruction")
        return found


# Kernels without dynamic shared memory.
_DYNAMIC = dict.fromkeys(
    (
        *("gate_kernel", "dispatch_kernel", "combine_kernel", "combine_backward_kernel"),
        *("experts_bias_kernel", "parts_sums_kernel"),
    ),
    0,
)


def is_product(name: str) -> bool:
    """Whether a kernel is a matrix product on tensor cores, judged by its readable name."""
    products = ("gradient", "panel", "experts_forward", "experts_rows", "experts_weights")
    is_one = name.partition("<")[0].removesuffix("_kernel") in products
    return is_one and any(kind in name for kind in ON_TENSOR_CORES)


def find(program: str) -> str | None:
    """The program's path: on PATH, in the toolkit's usual folder, or in the triton wheel."""
    triton = importlib.util.find_spec("triton")
    folders = ["/usr/local/cuda/bin"]
    for location in (triton.submodule_search_locations or []) if triton else []:
        folders.append(str(Path(location) / "backends" / "nvidia" / "bin"))
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(folders))


def readable(names: list[str]) -> list[str]:
    """The names demangled, without namespaces and arguments; unchanged if there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = []
    for line in done.stdout.splitlines():
        line = line.removeprefix("void ").replace("mpoe::cuda::", "").replace("dev::", "")
        short.append(line.rsplit("(", 1)[0].replace("(anonymous namespace)::", ""))
    return short


def parse(text: str, source: str) -> list[Kernel]:
    """Kernels in the output of ``nvcc -Xptxas -v``."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(source, entry[1], entry[2]))
        elif kernels and (frame := _FRAME.search(line)):
            kernels[-1].stack = int(frame[1])
            kernels[-1].spills = int(frame[2]) + int(frame[3])
        elif kernels and (used := _USED.search(line)):
            kernels[-1].registers = int(used[1])
            kernels[-1].shared = int(used[2] or 0)
    return kernels


def count_tensor_instructions(disassembler: str, built: Path, kernels: list[Kernel]) -> None:
    """Fill in how many HMMA instructions each kernel has."""
    done = subprocess.run([disassembler, "-sass", str(built)], capture_output=True, text=True, check=True)
    counts: dict[tuple[str, str], int] = {}
    arch = name = ""
    for line in done.stdout.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
            counts[name, arch] = 0
        elif re.search(r"\bHMMA\b|\bHMMA\.", line):
            counts[name, arch] += 1
    for kernel in kernels:
        kernel.tensor_instructions = counts.get((kernel.name, kernel.arch))


def compile_source(nvcc: str, source: Path, architectures: list[str], folder: Path) -> list[Kernel]:
    """Compile one file for all architectures.

    Raises:
        RuntimeError: nvcc failed; warnings and spills count as failures. The message is nvcc's.
    """
    built = folder / f"{source.stem}.o"
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command = [nvcc, *FLAGS, *(word for target in targets for word in ("-gencode", target))]
    done = subprocess.run([*command, "-c", str(source), "-o", str(built)], capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{source.relative_to(ROOT)}: nvcc failed\n{text}")
    kernels = parse(text, source.name)
    disassembler = find("cuobjdump")
    if disassembler and kernels:
        count_tensor_instructions(disassembler, built, kernels)
    return kernels


def table(kernels: list[Kernel]) -> str:
    lines = [
        "| kernel | arch | registers | shared memory | occupancy | tensor-core instructions |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in sorted(kernels, key=lambda k: (k.source, k.name, k.arch)):
        tensor = "-" if kernel.tensor_instructions is None else kernel.tensor_instructions
        shared = "by shape" if kernel.dynamic is None else kernel.shared + kernel.dynamic
        lines.append(
            f"| `{kernel.name}` | {kernel.arch} | {kernel.registers} | {shared} | {kernel.occupancy} | {tensor} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="compute capabilities, e.g. 80,90a")
    parser.add_argument("--only", default="", help="only sources whose name contains this")
    parser.add_argument("--doc", action="store_true", help="write the table into bench/results")
    chosen = parser.parse_args(words)
    if chosen.doc and (chosen.only or chosen.arch != ",".join(ARCHITECTURES)):
        parser.error("--doc describes everything that is shipped: it goes with neither --only nor --arch")
    nvcc = os.environ.get("CUDACXX") or find("nvcc")
    if nvcc is None:
        print("nvcc was not found: set CUDACXX or add it to PATH", file=sys.stderr)
        return 2
    sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*/*.cu")) if chosen.only in str(path)]
    kernels: list[Kernel] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [
            pool.submit(compile_source, nvcc, source, chosen.arch.split(","), Path(folder)) for source in sources
        ]
        for each in compiled:
            try:
                kernels += each.result()
            except RuntimeError as error:
                failures.append(str(error))
    for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels]), strict=True):
        kernel.name = name
    failures += [f"{kernel.name} ({kernel.arch}): {problem}" for kernel in kernels for problem in kernel.problems]
    if chosen.doc and not failures:
        write_between(DOC, "resources", table(kernels))
    else:
        print(table(kernels))
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(sources)} sources, {len(kernels)} kernels, {len(failures)} failures", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
