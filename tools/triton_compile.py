"""Compiles every Triton kernel that the ops launch, ahead of time and without a GPU, and checks the machine code.

No kernel may spill registers, use more shared memory than the architecture has, or multiply matrices without
tensor-core instructions. ``--quick`` compiles one configuration of every kernel; without it, everything that ships is
compiled, for T5-base's sizes or, with ``--large``, the hardest cases of a wider layer and of many experts. Prints a
table of registers and shared memory. ``--keep FILE`` appends every result to FILE and reuses those with the same kernel
source, specialisation and Triton. What ships: tools/shipped_kernels.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import shipped_kernels as shipped
from triton_binary import BLOCK_SIZES, TARGETS, Binary, Job, compile_job, identity, job_of

QUICK_DTYPES = ("bfloat16",)


def _difficulty(job: Job) -> tuple[int, int, int]:
    """Tile size, number of extras, variety of sizes and strides: the most difficult job is the likeliest to spill."""
    extras = sum(value is True for _, value in job.constants)
    tile = math.prod(value for name, value in job.constants if name in BLOCK_SIZES)
    numbers = {number for _, value in job.constants for number in (value if isinstance(value, tuple) else (value,))}
    return tile, extras, len(numbers)


def shipped_jobs(
    architectures: Iterable[str],
    dtypes: Iterable[str],
    quick: bool = False,
    each: int = 1,
    sizes: Iterable[shipped.Sizes] = (shipped.T5_BASE,),
) -> dict[Job, str]:
    """The ``each`` most difficult jobs for every kernel, architecture, dtype and configuration.

    For sizes other than T5-base's, the most difficult jobs of all configurations together. With ``quick``, one job per
    kernel and architecture. Every job comes with the first problem that launches it.
    """
    groups: dict[tuple[str, ...], dict[Job, str]] = {}
    for size, dtype in product(sizes, dtypes):
        for problem in shipped.problems(shipped.DTYPES[dtype], quick, size):
            where = ", ".join(filter(None, (problem.name, dtype, size.name)))
            for architecture in architectures:
                for launch in problem.launches(architecture):
                    job = job_of(launch, architecture)
                    group = (job.name, architecture, *(() if quick else (dtype, size.name or job.configuration)))
                    groups.setdefault(group, {}).setdefault(job, where)
    found = {}
    for group in groups.values():
        hardest = sorted(group, key=_difficulty, reverse=True)[: 1 if quick else each]
        found.update({job: group[job] for job in hardest})
    return found


class Kept:
    """Results in a file, one per line, keyed by what they depend on; without a file, nothing is kept."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._found: dict[str, Binary] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                self._found[entry["of"]] = Binary(**entry["binary"])

    @staticmethod
    def _key(job: Job) -> str:
        return hashlib.sha256(identity(job).encode()).hexdigest()

    def get(self, job: Job) -> Binary | None:
        return self._found.get(self._key(job)) if self.file is not None else None

    def add(self, job: Job, binary: Binary) -> None:
        if self.file is not None:
            line = json.dumps({"of": self._key(job), "name": job.name, "binary": asdict(binary)})
            with self.file.open("a") as file:
                file.write(line + "\n")


def compile_all(
    jobs: Iterable[Job], processes: int, log: Callable[[str], None] = lambda _: None, kept: Kept | None = None
) -> dict[Job, Binary | str]:
    """Compile the jobs that are not kept, in worker processes; a job that fails gets its error's text."""
    wanted, began, kept = list(jobs), time.monotonic(), kept or Kept(None)
    results: dict[Job, Binary | str] = {job: found for job in wanted if (found := kept.get(job)) is not None}
    waiting = [job for job in wanted if job not in results]
    log(f"{len(results)} of {len(wanted)} were kept")
    with ProcessPoolExecutor(max(1, min(processes, len(waiting))), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_job, job): job for job in waiting}
        for future in as_completed(futures):
            try:
                binary = future.result()
                kept.add(futures[future], binary)
                results[futures[future]] = binary
            except BrokenProcessPool:
                results[futures[future]] = "the compiler's process died, over this kernel or one beside it"
            except Exception as error:  # a compiler fails in many ways; the other jobs still run, all are reported
                results[futures[future]] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if len(results) % 100 == 0:
                log(f"{len(results)} of {len(wanted)} compiled, {time.monotonic() - began:.0f} s")
    return {job: results[job] for job in wanted}


def failures(results: Mapping[Job, Binary | str], uses: Mapping[Job, str]) -> list[str]:
    """One line for each problem that forbids shipping."""
    lines = []
    for job, result in results.items():
        problems = [result] if isinstance(result, str) else result.problems(job.architecture)
        where = f"{job.name} {job.configuration} on {job.architecture} ({uses[job]})"
        lines += [f"{where}: {problem}" for problem in problems]
    return lines


def resource_table(results: Mapping[Job, Binary | str]) -> str:
    """A Markdown row per kernel, element type and configuration: most registers and KiB of shared memory."""
    architectures = list(dict.fromkeys(job.architecture for job in results))
    rows: dict[tuple[str, str, str], list[Job]] = {}
    for job in results:
        rows.setdefault((job.name, job.elements, job.configuration), []).append(job)
    lines = [
        f"| kernel | elements | configuration | {' | '.join(architectures)} |",
        f"|---|---|---|{'---|' * len(architectures)}",
    ]
    for (name, elements, configuration), jobs in sorted(rows.items()):
        cells = []
        for architecture in architectures:
            here = [results[job] for job in jobs if job.architecture == architecture]
            built = [binary for binary in here if isinstance(binary, Binary)]
            most = max((binary.registers for binary in built), default=0)
            shared = max((binary.shared for binary in built), default=0)
            cells.append(f"{most}, {shared / 1024:.3g}" if built else "-" if not here else "fails")
        lines.append(f"| {name} | {elements} | {configuration} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(sizes: Iterable[shipped.Sizes]) -> str:
    return " and ".join(size.name for size in sizes)


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel")
    parser.add_argument("--large", action="store_true", help=f"other sizes: {_names(shipped.LARGE_SIZES)}")
    parser.add_argument("--each", type=int, default=1, help="problems per configuration, the most difficult first")
    parser.add_argument("--arch", default=",".join(TARGETS), help="comma-separated names; default all")
    parser.add_argument("--dtype", default=None, help=f"default all; --quick: {','.join(QUICK_DTYPES)}")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--keep", type=Path, default=None, metavar="FILE", help="file of results that later runs can reuse"
    )
    chosen = parser.parse_args(words)
    chosen.arch = chosen.arch.split(",")
    names = shipped.DTYPES if chosen.dtype is None else chosen.dtype.split(",")
    chosen.dtype = QUICK_DTYPES if chosen.quick and chosen.dtype is None else tuple(names)
    for option, values, known in (("arch", chosen.arch, TARGETS), ("dtype", chosen.dtype, shipped.DTYPES)):
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{option} must be among {', '.join(known)}; got {', '.join(unknown)}")
    return chosen


def main(words: list[str] | None = None) -> int:
    chosen = _options(words)
    sizes = shipped.LARGE_SIZES if chosen.large else (shipped.T5_BASE,)
    uses = shipped_jobs(chosen.arch, chosen.dtype, chosen.quick, chosen.each, sizes)
    jobs = [job for job in uses if chosen.only in job.name]
    print(f"{len(jobs)} configurations to compile, {chosen.jobs} at a time", file=sys.stderr, flush=True)
    results = compile_all(jobs, chosen.jobs, lambda line: print(line, file=sys.stderr, flush=True), Kept(chosen.keep))
    wrong = failures(results, uses)
    print(resource_table(results))
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len({job.kernel for job in jobs})} kernels, {len(jobs)} configurations, {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
