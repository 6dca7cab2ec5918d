"""Does `auto` pick the faster backend on other processors? Tested with every instruction set of this one.

    python tools/auto_choice.py [--isas avx2,avx512] [--only TEXT,TEXT] [--threads 1] [--built_in] [--out FILE]

The native kernels are forced to each instruction set (MPOE_CPU_ISA); PyTorch keeps its own. One process per set
measures the processor, as the first use does (--built_in: plans with the table's constants instead), then times the
public op on planner cases: `auto`, eager and native in turns, each choosing its own strategy. A case's figure is auto's
time divided by that of the backend with the lower median, as the median over rounds. Cases above 1.05 are timed once
more, with twice the rounds. With one thread, times are the thread's CPU time, otherwise wall time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mpoe_bench.choice import chosen_contractions, describe_choice
from mpoe_bench.suites.planner import _make_call

from mpoe_kernels import measure_machine
from mpoe_kernels.info import collect, processor_summary
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.contract import machine
from mpoe_kernels.testing.cases import FITTED_WORKLOADS, JUDGED_WORKLOADS, Workload

SUBSET = "E8-T8-,E8-T64-,E8-T512-,E64-T8-,E64-T64-,paper_64-768x3072-E8-T2048-,separable-768x3072-E8-T2048-"
RIVALS = ("eager", "native")
TOLERANCE, ROUNDS, SAMPLE_SECONDS = 1.05, 7, 0.01


def timed(case: Workload, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of auto and the two backends, and auto's time divided by the better backend's."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call = _make_call(case)
    run: Callable[[str, str], object] = call.train if case.training else call.forward
    names = ("auto", *RIVALS)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        run(name, "auto")
    start = clock()
    run("auto", "auto")
    repeats = max(1, min(200, int(SAMPLE_SECONDS / max(clock() - start, 1e-6))))
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            for _ in range(repeats):
                run(name, "auto")
            samples[name].append((clock() - start) / repeats)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    better = min(RIVALS, key=lambda name: medians[name])
    ratios = (auto / best for auto, best in zip(samples["auto"], samples[better], strict=True))
    return medians, statistics.median(ratios)


def cases_of(only: str) -> list[Workload]:
    """Planner cases, fitted and judged, whose name contains one of these texts; masked ones are left out.

    Raises:
        ValueError: no name contains any of them.
    """
    found = [
        case
        for case in (*FITTED_WORKLOADS, *JUDGED_WORKLOADS)
        if not case.mask_central and any(text in case.name for text in only.split(","))
    ]
    if not found:
        raise ValueError(f"only must be texts in names of planner cases; no name contains one of {only}")
    return found


def judge(cases: list[Workload], threads: int) -> None:
    """Time the cases in this process and print their table."""
    torch.set_num_threads(threads)
    measure_machine()
    constants = "measured" if machine.constants() else "the table's"
    print(f"\n## {NATIVE_LIBRARY.info['isa_used']}, {threads} thread{'s' * (threads > 1)}, {constants} constants\n")
    print(f"{processor_summary(collect(()))}.\n")
    print("| case | auto took | auto, ms | eager, ms | native, ms | auto / better |\n|---|---|---:|---:|---:|---:|")
    found = []
    for case in cases:
        sizes = (case.shape, case.num_experts, case.num_tokens, case.dtype)
        took = ", ".join(describe_choice(chosen_contractions(*sizes, case.training)).values())
        medians, ratio = timed(case, ROUNDS)
        if ratio > TOLERANCE:
            medians, ratio = timed(case, 2 * ROUNDS)
        found.append(ratio)
        times = " | ".join(f"{seconds * 1e3:.3g}" for seconds in medians.values())
        print(f"| {case.name} | {took} | {times} | {ratio:.2f} |", flush=True)
    within = sum(ratio <= TOLERANCE for ratio in found)
    print(f"\nWithin {TOLERANCE:g}x of the better backend: {within} of {len(found)}; {max(found):.2f}x at worst.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", default=NATIVE_LIBRARY.info.get("isa_detected"), help="separated by commas")
    parser.add_argument("--only", default=SUBSET, help="cases whose name contains one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--built_in", action="store_true", help="plan with the table's constants")
    parser.add_argument("--out", type=Path, help="append to this file instead of printing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        cases = cases_of(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.here:
        judge(cases, options.threads)
        return
    for isa in options.isas.split(","):
        with tempfile.TemporaryDirectory() as cache:
            setting = {machine.SETTING: "0" if options.built_in else "1"}
            environment = {**os.environ, **setting, "MPOE_CPU_ISA": isa, "XDG_CACHE_HOME": cache}
            command = [sys.executable, __file__, "--here", "--only", options.only, "--threads", str(options.threads)]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        if options.out is None:
            print(done.stdout, end="")
        else:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(done.stdout)


if __name__ == "__main__":
    main()
