"""Predicts the compiled hot loops of the CPU kernels on processors that are not here, from LLVM's models of them.

    python tools/predict_loops.py [--processors icelake-server,haswell] [--kernels REGEX] [--llvm_mca PROGRAM] [LIBRARY]

One line per loop and processor: multiply-adds per cycle as a share of that model's rate without loads, and, below
85 %, what limits the loop. Operands come from the L1 cache. What to know about the models (LLVM 19): icelake-server and
sapphirerapids count one unit for multiply-adds of 512 bits, as in desktop processors; the servers have two, as
skylake-avx512 and cooperlake count. znver4 lets a broadcast from memory wait for a vector pipeline, which the
processor does not. AMX tiles are in no model. Tiles of one to three rows have too few sums to hide their latency.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hot_loops import LIBRARY, Loop, find_loops

# Instruction sets, as in the files' names: llvm-mca itself takes any instruction for any processor.
AVX512 = ("avx2", "avx512")
PROCESSORS = {
    "haswell": ("avx2",),
    "skylake-avx512": AVX512,
    "cooperlake": (*AVX512, "avx512bf16"),
    "icelake-server": AVX512,
    "sapphirerapids": (*AVX512, "avx512bf16"),
    "znver3": ("avx2",),
    "znver4": (*AVX512, "avx512bf16"),
}
PROGRAMS = ("llvm-mca", *(f"llvm-mca-{version}" for version in range(22, 15, -1)))
ITERATIONS = 100
LOW = 0.85
# Of what is reported as the limit, how much of the time it must take.
EXPLAINS = 0.9


class Prediction(NamedTuple):
    cycles: float  # per iteration
    limit: str


def simulated(program: str, processor: str, text: str) -> Prediction | None:
    """None: the model does not describe these instructions."""
    command = [program, f"-mcpu={processor}", f"-iterations={ITERATIONS}", "-json", "-"]
    run = subprocess.run(command, input=text, capture_output=True, text=True)
    if run.returncode:
        return None
    answer: dict[str, Any] = json.loads(run.stdout)
    (region,) = answer["CodeRegions"]
    summary, names = region["SummaryView"], answer["TargetInfo"]["Resources"]
    cycles = summary["TotalCycles"] / ITERATIONS
    pressure = {"instructions started per cycle": summary["TotaluOps"] / ITERATIONS / summary["DispatchWidth"]}
    rows = region["ResourcePressureView"]["ResourcePressureInfo"]
    last = max(row["InstructionIndex"] for row in rows)  # of all instructions together
    for row in rows:
        if row["InstructionIndex"] == last:
            pressure[names[row["ResourceIndex"]]] = row["ResourceUsage"]
    most = max(pressure, key=lambda name: pressure[name])
    return Prediction(cycles, most if pressure[most] > EXPLAINS * cycles else "latency of the sums")


def assembly(loop: Loop) -> str:
    """The loop as llvm-mca reads it: without addresses and the disassembler's remarks."""
    lines = []
    for _, name, operands in loop.instructions:
        lines.append(f"{name} top" if name.startswith("j") else f"{name} {re.split(r'[#<]', operands)[0].strip()}")
    return "\n".join(lines) + "\n"


def multiply_add(loop: Loop) -> tuple[str, str] | None:
    """Its instruction and register kind; None: a tile of AMX or a multiplication of SSE2."""
    for _, name, operands in loop.instructions:
        if name.startswith(("vfmadd", "vdpbf16ps")):
            return re.sub(r"\d+", "231", name) if name.startswith("vfmadd") else name, operands.split("%")[-1][:3]
    return None


@cache
def best_cycles(program: str, processor: str, name: str, registers: str) -> float | None:
    """Cycles of one multiply-add of registers in a long sequence of independent ones."""
    count = 12
    found = simulated(
        program, processor, "".join(f"{name} %{registers}0,%{registers}1,%{registers}{i + 2}\n" for i in range(count))
    )
    return None if found is None else found.cycles / count


def predict(program: str, processors: list[str], loops: list[Loop]) -> int:
    """Prints the predictions; the number of loops that are below LOW."""
    low = 0
    for loop in loops:
        kind = multiply_add(loop)
        if kind is None:
            print(f"{loop.file:26} {loop.kernel:50} AMX tiles: in no model, not predicted")
            continue
        for processor in processors:
            if loop.file.rsplit("_", 1)[1] not in PROCESSORS[processor]:
                continue
            best, found = best_cycles(program, processor, *kind), simulated(program, processor, assembly(loop))
            if best is None or found is None:
                print(f"{loop.file:26} {loop.kernel:50} {processor:15} not in the model")
                continue
            share = loop.multiply_adds * best / found.cycles
            low += share < LOW
            why = f"  limit: {found.limit}" if share < LOW else ""
            print(f"{loop.file:26} {loop.kernel:50} {processor:15} {share:4.0%}{why}")
    return low


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--processors", default=",".join(PROCESSORS), help="some of %(default)s")
    parser.add_argument("--kernels", default="", help="only those whose file and name contain this regular expression")
    parser.add_argument("--llvm_mca", default="", help="the program; default: the newest one on PATH")
    options = parser.parse_args()
    processors = options.processors.split(",")
    if unknown := set(processors) - set(PROCESSORS):
        parser.error(f"--processors: {', '.join(sorted(unknown))} is none of {', '.join(PROCESSORS)}")
    candidates = [options.llvm_mca] if options.llvm_mca else [*PROGRAMS[1:], PROGRAMS[0]]
    program = next(filter(None, map(shutil.which, candidates)), None)
    if program is None:
        print("llvm-mca was not found; on Debian and Ubuntu: apt-get install llvm", file=sys.stderr)
        return 1
    loops = [loop for loop in find_loops(options.library) if not loop.file.endswith("_generic")]
    loops = [loop for loop in loops if re.search(options.kernels, f"{loop.file} {loop.kernel}")]
    low = predict(program, processors, loops)
    print(f"{low} predictions below {LOW:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
