"""Judge the backends' cost models: measure every strategy on a set of workloads, then judge what they would choose.

    python tools/judge_costs.py measure FILE [--fitted] [--only TEXT] [--backends eager,native] [--missing]
    python tools/judge_costs.py judge FILE [--fitted] [--only TEXT] [--backends eager]

``measure`` calls the kernels directly, forward and backward separately, interleaved. It stores 10th percentiles in
FILE, since other processes can only add time: wall time, or with --threads 1 the thread's CPU time. Earlier
measurements are replaced, or with --missing kept. ``judge`` reads FILE, so that a changed model can be judged again in
seconds. Predictions use the constants measured here (``MPOE_MEASURE=0``: the table's). `mpoe bench` judges the same
choices through the public ops.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpoe_bench.timing import Budget, cpu_measure, interleave

from mpoe_kernels import available_backends, route
from mpoe_kernels.contract.autotune import candidates_for, measure_machine
from mpoe_kernels.linear.call import BackwardCall, ForwardCall, LinearCall
from mpoe_kernels.linear.eager.kernels import linear_forward
from mpoe_kernels.contract import STRATEGIES, BlockDims, Contraction, contractions
from mpoe_kernels.registry import BACKENDS, CONTRACTIONS, Candidate, Request
from mpoe_kernels.testing.cases import FITTED_WORKLOADS, JUDGED_WORKLOADS, Workload, expert_choice, random_blocks

SLOWEST_MEASURED = 2.0  # candidates predicted to take longer than this times their backend's best are left out
TOLERANCE = 1.15
OPS = {phase: op for op, phase in CONTRACTIONS.items()}


def plans_of(case: Workload, phase: str) -> list[Contraction]:
    """Contractions for a phase; a training forward of a separable shape has no choice."""
    shape = case.shape
    dims = BlockDims.of_shape(shape)
    found = contractions(dims, case.num_experts, case.num_tokens, case.dtype, phase, mask_central=case.mask_central)
    if phase == "forward" and case.training and dims.is_separable:
        return [plan for plan in found if plan.strategy == "separable"]
    return list(found)


def candidates(case: Workload, phase: str, backends: list[str]) -> dict[str, Candidate]:
    """Every candidate, keyed by ``name [backend]``."""
    request = Request(OPS[phase], "cpu", case.dtype)
    return {
        f"{found.name} [{name}]": found
        for name in backends
        if not BACKENDS[name].unsupported_reasons(request)
        for plan in plans_of(case, phase)
        for found in candidates_for(BACKENDS[name], plan)[0]
    }


def calls_of(case: Workload, backends: list[str]) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls to time, by phase and candidate name."""
    torch.manual_seed(8)
    blocks = random_blocks(case.shape, case.num_experts, case.dtype)
    x = torch.randn(case.num_tokens, case.in_features).to(case.dtype)
    grad = torch.randn(case.num_tokens, case.out_features).to(case.dtype)
    routing = route(expert_choice(case.load, case.num_tokens, case.num_experts), case.num_experts)
    given = (x, blocks.left, blocks.central, blocks.right, routing.expert_offsets, None, routing.token_of_slot)
    sizes = (case.in_features, case.out_features, "none")
    need = [True, True, not case.mask_central, True, False]
    h = x.new_empty(0)
    if case.training and case.shape.is_separable:
        _, h, _ = linear_forward(ForwardCall(*given, *sizes, "separable", "eager", True))
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for phase in ("forward", "backward") if case.training else ("forward",):
        found = candidates(case, phase, backends)
        calls[phase] = {}
        for name, candidate in found.items():
            best = min(other.seconds for other in found.values() if other.backend == candidate.backend)
            if candidate.seconds > SLOWEST_MEASURED * best:
                continue
            common = (*given, *sizes, candidate.strategy, candidate.backend)
            if phase == "forward":
                call: LinearCall = ForwardCall(*common, case.training)
            else:
                call = BackwardCall(*common, grad, h, x.new_empty(0), need)
            calls[phase][name] = partial(candidate.run, call)
    return calls


def measure(
    cases: Sequence[Workload],
    file: Path,
    backends: list[str],
    strategies: list[str],
    seconds: float,
    missing: bool,
    stop_after: float,
) -> None:
    start = time.perf_counter()
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    budget = Budget(seconds_each=seconds, min_rounds=3, max_rounds=15)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for number, case in enumerate(cases):
        for phase, functions in calls_of(case, backends).items():
            if time.perf_counter() - start > stop_after:
                return
            known = kept.setdefault(case.name, {}).setdefault(phase, {})
            wanted = {
                name: function
                for name, function in functions.items()
                if name.split()[0] in strategies and not (missing and name in known)
            }
            timed = interleave(wanted, None, budget, cpu_measure(clock))
            known |= {name: timing.low for name, timing in timed.items()}
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            os.replace(partial, file)
        print(f"{number + 1}/{len(cases)} {case.name}", flush=True)


def judge(cases: Sequence[Workload], file: Path, backends: list[str]) -> None:
    kept = json.loads(file.read_text(encoding="utf-8"))
    within = total = 0
    for case in cases:
        if case.name not in kept:
            continue
        chosen = best = 0.0
        lines = []
        for phase, measured in kept[case.name].items():
            every = candidates(case, phase, backends)
            found = {name: candidate.seconds for name, candidate in every.items() if name in measured}
            if not found:
                continue
            choice = min(found, key=lambda name: found[name])
            chosen += measured[choice]
            best += min(measured[name] for name in found)
            table = ", ".join(
                f"{'*' if name == choice else ''}{name} {measured[name] * 1e3:.3g} ({found[name] / measured[name]:.2f})"
                for name in sorted(found, key=lambda name: measured[name])
            )
            lines.append(f"    {phase}: {table}")
        if not lines:
            continue
        total += 1
        within += chosen <= TOLERANCE * best
        print(f"{'  ' if chosen <= TOLERANCE * best else '! '}{chosen / best:.2f} {case.name}")
        print("\n".join(lines))
    print(f"within {TOLERANCE:g}x of the best: {within} of {total}; in ms measured (predicted / measured); * chosen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "judge"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--fitted", action="store_true", help="use the workloads that the models were fitted to")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--backends", default=",".join(available_backends()))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--missing", action="store_true", help="measure only what FILE lacks")
    parser.add_argument("--seconds", type=float, default=0.5, help="per strategy and phase")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="seconds; --missing goes on from there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure_machine()
    backends = options.backends.split(",")
    every = FITTED_WORKLOADS if options.fitted else JUDGED_WORKLOADS
    cases = [case for case in every if options.only in case.name]
    if options.action == "measure":
        strategies = options.strategies.split(",")
        rest = (options.seconds, options.missing, options.stop_after)
        measure(cases, options.file, backends, strategies, *rest)
    else:
        judge(cases, options.file, backends)


if __name__ == "__main__":
    main()
