"""Runs the tests of native kernels, forced to every instruction set of this processor, with one thread and with two.

    python tools/native_isas.py                            # all instruction sets
    python tools/native_isas.py --isas avx2 --threads 1    # one of them
    python tools/native_isas.py --errors                   # no tests: accuracy of long sums compared with PyTorch's

The tests are those below tests/native, tests/kernels and tests/layers, and every other test file that contains the word
``native``; model tests reach the same kernels through the layers. Instruction sets that the processor lacks are
reported and skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
LENGTHS = (1024, 4096, 16384, 65536)


def tests_of_native_kernels() -> list[str]:
    """Test files chosen by the rule above, relative to the root."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    folders = [ROOT / "tests" / name for name in ("native", "kernels", "layers")]
    chosen = [f for f in files if any(f.is_relative_to(folder) for folder in folders)]
    chosen += [f for f in files if f not in chosen and re.search(r"\bnative\b", f.read_text(encoding="utf-8"))]
    return [f.relative_to(ROOT).as_posix() for f in chosen]


def environment(isa: str, threads: int) -> dict[str, str]:
    """Environment of a process that is forced to an instruction set."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "MPOE_CPU_ISA": isa, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def is_here(isa: str) -> bool:
    """Whether this processor has it, according to the library, which falls back to what the processor supports."""
    code = "from mpoe_kernels.native_library import NATIVE_LIBRARY as n; print(n.info['isa_used'])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment(isa, 1), capture_output=True, text=True, check=True)
    return found.stdout.strip() == isa


def errors() -> dict[str, dict[str, float]]:
    """Per sum length and result: the largest native error as a multiple of PyTorch's. Runs in this process."""
    import torch

    sys.path.append(str(ROOT / "bench"))
    from mpoe_bench.cases import expert_choice, random_blocks, relative_error

    from mpoe_kernels import MPOBlocks, MPOShape, grouped_mpo_linear, route
    from mpoe_kernels.reference import grouped_mpo_linear_reference

    found: dict[str, dict[str, float]] = {}
    for length in LENGTHS:
        shape = MPOShape((64, length // 64, 1), (1, 3, 8))
        worst: dict[str, float] = {}
        for tokens in (3, 148):
            torch.manual_seed(tokens)
            blocks, x = random_blocks(shape, 5, torch.float32), torch.randn(tokens, shape.in_features)
            routing = route(expert_choice("uniform", tokens, 5), 5)

            def results(function: object, dtype: torch.dtype, **options: object) -> list[torch.Tensor]:
                leaves = [
                    t.detach().to(dtype).requires_grad_()
                    for t in (x, blocks.left, blocks.central, blocks.right)  # noqa: B023
                ]
                moved = MPOBlocks(*leaves[1:], shape.in_features, shape.out_features)  # noqa: B023
                y = function(  # type: ignore[operator]
                    leaves[0],
                    moved,
                    routing.expert_offsets,  # noqa: B023
                    row_index=routing.token_of_slot,  # noqa: B023
                    **options,
                )
                grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(dtype)
                return [y, *torch.autograd.grad(y, leaves, grad)]

            truth = results(grouped_mpo_linear_reference, torch.float64)
            library = results(grouped_mpo_linear_reference, torch.float32)
            native = results(grouped_mpo_linear, torch.float32, backend="native", strategy="separable")
            for name, t, p, n in zip(("y", "dx", "dleft", "dcentral", "dright"), truth, library, native, strict=True):
                worst[name] = max(worst.get(name, 0.0), relative_error(n, t) / relative_error(p, t))
        found[str(length)] = worst
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=ISAS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--errors_here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("pytest", nargs="*", help="pytest arguments instead of the chosen tests")
    options = parser.parse_args()
    if options.errors_here:
        print(json.dumps(errors()))
        return 0
    failed = []
    for isa in options.isas:
        if not is_here(isa):
            print(f"{isa}: this processor lacks it", flush=True)
            continue
        for threads in options.threads:
            command = [sys.executable, __file__, "--errors_here"]
            if not options.errors:
                command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
                command += options.pytest or tests_of_native_kernels()
            done = subprocess.run(
                command, cwd=ROOT, env=environment(isa, threads), stdout=subprocess.PIPE, text=True, check=False
            )
            lines = done.stdout.strip().splitlines() or [""]
            print(f"{isa}, {threads} threads: status {done.returncode}, {lines[-1]}", flush=True)
            if done.returncode:
                failed.append((isa, threads))
                print("\n".join(lines[-40:]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
