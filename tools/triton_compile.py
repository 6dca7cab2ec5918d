"""Compiles every Triton kernel that the ops launch, ahead of time and without a GPU, and checks the machine code.

No kernel may spill registers, use more shared memory than the architecture has, or multiply matrices without
tensor-core instructions. ``--quick`` compiles one configuration of every kernel; without it, everything that ships is
compiled, for T5-base's sizes or, with ``--large``, the hardest cases of a wider layer and of many experts. ``--doc``
writes the table of bench/results/ahead-of-time/triton.md. ``--keep FILE`` appends every result to FILE and reuses those
with the same kernel source, specialisation and Triton. What ships: mpoe_kernels/backends/triton_catalogue.py.
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
from dataclasses import asdict, dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from documents import write_between
from triton_binary import BLOCK_SIZES, TARGETS, Binary, Job, compile_job, identity, job_of

from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.backends.triton_work import FLOP_OVERHEAD

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "bench" / "results" / "ahead-of-time" / "triton.md"
QUICK_DTYPES = ("bfloat16",)


@dataclass
class Use:
    """Where a job comes from: the first problem that launches it, and its ratios of executed to useful FLOPs."""

    problem: str
    overheads: set[float] = field(default_factory=set)


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
    sizes: Iterable[catalogue.Sizes] = (catalogue.T5_BASE,),
) -> dict[Job, Use]:
    """The ``each`` most difficult jobs for every kernel, architecture, dtype and configuration.

    For sizes other than T5-base's, the most difficult jobs of all configurations together. With ``quick``, one job per
    kernel and architecture.
    """
    groups: dict[tuple[str, ...], dict[Job, Use]] = {}
    for size, dtype in product(sizes, dtypes):
        for problem in catalogue.problems(catalogue.DTYPES[dtype], quick, size):
            for architecture in architectures:
                for launch in catalogue.launches(problem, architecture):
                    job = job_of(launch, architecture)
                    group = (job.name, architecture, *(() if quick else (dtype, size.name or job.configuration)))
                    where = ", ".join(filter(None, (problem.name, dtype, size.name)))
                    use = groups.setdefault(group, {}).setdefault(job, Use(where))
                    overhead = FLOP_OVERHEAD.get(job.name)
                    if overhead is not None:
                        use.overheads.add(overhead(launch.arguments))
    found = {}
    for group in groups.values():
        chosen = sorted(group, key=_difficulty, reverse=True)[: 1 if quick else each]
        overheads = set().union(*(use.overheads for use in group.values()))
        found.update({job: Use(group[job].problem, overheads) for job in chosen})
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


def failures(results: Mapping[Job, Binary | str], uses: Mapping[Job, Use]) -> list[str]:
    """One line for each problem that forbids shipping."""
    lines = []
    for job, result in results.items():
        problems = [result] if isinstance(result, str) else result.problems(job.architecture)
        where = f"{job.name} {job.configuration} on {job.architecture} ({uses[job].problem})"
        lines += [f"{where}: {problem}" for problem in problems]
    return lines


def _span(values: Iterable[float], form: Callable[[float], str]) -> str:
    """``low`` or ``low-high``."""
    ordered = sorted(values)
    ends = dict.fromkeys([form(ordered[0]), form(ordered[-1])]) if ordered else ["-"]
    return "-".join(ends)


def resource_table(results: Mapping[Job, Binary | str], uses: Mapping[Job, Use]) -> str:
    """A Markdown row per kernel, element type and configuration: the range or maximum over all problems."""
    architectures = list(dict.fromkeys(job.architecture for job in results))
    rows: dict[tuple[str, str, str], list[Job]] = {}
    for job in results:
        rows.setdefault((job.name, job.elements, job.configuration), []).append(job)
    lines = [
        f"| kernel | elements | configuration | FLOPs | {' | '.join(architectures)} |",
        f"|---|---|---|---|{'---|' * len(architectures)}",
    ]
    for (name, elements, configuration), jobs in sorted(rows.items()):
        cells = []
        for architecture in architectures:
            here = [results[job] for job in jobs if job.architecture == architecture]
            built = [binary for binary in here if isinstance(binary, Binary)]
            most = max((binary.registers for binary in built), default=0)
            shared = max((binary.shared for binary in built), default=0)
            cells.append(f"{most}, {shared / 1024:.3g}" if built else "-" if not here else "fails")
        overhead = _span({value for job in jobs for value in uses[job].overheads}, lambda value: f"{value:.2f}")
        lines.append(f"| {name} | {elements} | {configuration} | {overhead} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(sizes: Iterable[catalogue.Sizes]) -> str:
    return " and ".join(size.name for size in sizes)


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel")
    parser.add_argument("--large", action="store_true", help=f"other sizes: {_names(catalogue.LARGE_SIZES)}")
    parser.add_argument("--each", type=int, default=1, help="problems per configuration, the most difficult first")
    parser.add_argument("--arch", default=",".join(TARGETS), help="comma-separated names; default all")
    parser.add_argument("--dtype", default=None, help=f"default all; --quick: {','.join(QUICK_DTYPES)}")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--keep", type=Path, default=None, metavar="FILE", help="file of results that later runs can reuse"
    )
    parser.add_argument("--doc", action="store_true", help="write the tables into bench/results")
    chosen = parser.parse_args(words)
    chosen.arch = chosen.arch.split(",")
    names = catalogue.DTYPES if chosen.dtype is None else chosen.dtype.split(",")
    chosen.dtype = QUICK_DTYPES if chosen.quick and chosen.dtype is None else tuple(names)
    for option, values, known in (("arch", chosen.arch, TARGETS), ("dtype", chosen.dtype, catalogue.DTYPES)):
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{option} must be among {', '.join(known)}; got {', '.join(unknown)}")
    if chosen.doc and (chosen.quick or chosen.only or set(chosen.arch) != set(TARGETS)):
        parser.error("--doc describes everything that is shipped: it goes with neither --quick, --only nor --arch")
    return chosen


def main(words: list[str] | None = None) -> int:
    chosen = _options(words)
    sizes = catalogue.LARGE_SIZES if chosen.large else (catalogue.T5_BASE,)
    uses = shipped_jobs(chosen.arch, chosen.dtype, chosen.quick, chosen.each, sizes)
    jobs = [job for job in uses if chosen.only in job.name]
    print(f"{len(jobs)} configurations to compile, {chosen.jobs} at a time", file=sys.stderr, flush=True)
    results = compile_all(jobs, chosen.jobs, lambda line: print(line, file=sys.stderr, flush=True), Kept(chosen.keep))
    table, wrong = resource_table(results, uses), failures(results, uses)
    if chosen.doc:
        write_between(DOC, "large" if chosen.large else "resources", table)
    else:
        print(table)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len({job.kernel for job in jobs})} kernels, {len(jobs)} configurations, {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
