"""Compiles the Triton kernels of a GPU visit beforehand, where time costs nothing, into a cache to take along.

    python tools/warm_triton.py --architecture sm_90                  # into build/warm_triton, where bench/gpu.sh looks
    python tools/warm_triton.py --architecture sm_90 --kernel rows    # only kernels whose name contains this

Triton finds them under its own keys if the visit uses the same versions of Triton and Python. Run again, it compiles
only what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from shipped_kernels import problems
from triton_binary import TARGETS, Job, job_of

from mpoe_kernels.testing.launches import Launch

ROOT = Path(__file__).resolve().parents[1]
DTYPE = torch.bfloat16


def different(architecture: str, name: str) -> dict[Job, Launch]:
    """One launch per specialisation of the shipped kernels whose name contains ``name``."""
    found: dict[Job, Launch] = {}
    for problem in problems(DTYPE):
        for launch in replace(problem, every_tile=False).launches(architecture):
            if name in launch.name:
                found.setdefault(job_of(launch, architecture), launch)
    return found


class _Absent:
    """Stands in for the driver of a missing GPU."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        return TARGETS[self.architecture]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def _alike(value: Any) -> Any:
    """For a tensor, one that Triton specialises in the same way: same dtype, address a multiple of 16 or not."""
    if not isinstance(value, torch.Tensor):
        return value
    aligned = value.storage_offset() * value.element_size() % 16 == 0
    return torch.empty(64, dtype=value.dtype)[0 if aligned else 1 :]


def _warm(architecture: str, name: str, part: int, parts: int) -> int:
    """Compile every ``parts``-th kernel that is not in the cache; returns how many kernels that covers."""
    import triton

    triton.runtime.driver.set_active(_Absent(architecture))
    mine = list(different(architecture, name).values())[part::parts]
    for launch in mine:
        launch.kernel.warmup(grid=launch.grid, **{key: _alike(value) for key, value in launch.arguments.items()})
    return len(mine)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=tuple(TARGETS), default="sm_90")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "warm_triton", help="cache folder")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    chosen = parser.parse_args(words)
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(chosen.out.resolve())  # inherited by the workers
    before = len(list(chosen.out.iterdir()))
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        parts = [
            pool.submit(_warm, chosen.architecture, chosen.kernel, part, chosen.jobs) for part in range(chosen.jobs)
        ]
        kernels = sum(part.result() for part in parts)
    compiled = len(list(chosen.out.iterdir())) - before
    size = sum(file.stat().st_size for file in chosen.out.rglob("*") if file.is_file()) / 2**20
    print(f"{kernels} kernels for {chosen.architecture}: {compiled} new entries of the cache, {size:.1f} MiB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
