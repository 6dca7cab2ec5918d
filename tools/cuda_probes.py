"""Compares the emulator's instructions with a GPU's: `python tools/cuda_probes.py [--arch 90a] [--compile-only]`.

tests/emulator/instructions_main.cu runs every instruction that the emulator imitates (mma.sync, ldmatrix, cp.async,
roundings, shuffles and votes). It is compiled with the emulator and with nvcc, and both must print the same lines.
Exit status: 0 equal (or compiled, with --compile-only), 1 different, 2 no compiler or no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_check
import cuda_emulate

SOURCE = cuda_emulate.EMULATION / "instructions_main.cu"


def lines_of(program: Path) -> dict[str, str]:
    """What a program prints: instruction name -> results."""
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program.name}: {done.stderr.strip()}")
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def compile_for_gpu(nvcc: str, arch: str, target: Path) -> None:
    command = [
        nvcc,
        *cuda_check.FLAGS,
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        str(SOURCE),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed\n{done.stdout}{done.stderr}")


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """One sentence for every instruction whose results differ."""
    problems = []
    for name, results in expected.items():
        ours, theirs = results.split(), found.get(name, "").split()
        wrong = [k for k, (p, q) in enumerate(zip(ours, theirs, strict=False)) if p != q]
        if len(ours) != len(theirs):
            problems.append(f"{name}: {len(theirs)} words instead of {len(ours)}")
        elif wrong:
            k = wrong[0]
            problems.append(
                f"{name}: {len(wrong)} of {len(ours)} words differ, first word {k}: {ours[k]}, GPU {theirs[k]}"
            )
    return problems


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80", help="compute capability, e.g. 90a")
    parser.add_argument("--compile-only", action="store_true", help="compile both, run only the emulated form")
    chosen = parser.parse_args(words)
    nvcc = os.environ.get("CUDACXX") or cuda_check.find("nvcc")
    if nvcc is None or cuda_emulate.compiler() is None:
        print("nvcc or the C++ compiler was not found: set CUDACXX, CXX", file=sys.stderr)
        return 2
    emulated = lines_of(cuda_emulate.build("instructions", [cuda_emulate.EMULATOR, SOURCE]))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "instructions"
        compile_for_gpu(nvcc, chosen.arch, program)
        if chosen.compile_only:
            print(f"compiled {len(emulated)} instructions for sm_{chosen.arch}; not compared")
            return 0
        try:
            problems = differences(emulated, lines_of(program))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(emulated) - len(problems)} of {len(emulated)} instructions as emulated")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
