"""Judges the autotuner: what one timing chooses, against every strategy on every backend in another timing.

``mpoe bench --suite planner``, or alone: ``python -m mpoe_bench.suites.planner [PART OF A NAME ...]``.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mpoe_bench.cases import JUDGED_WORKLOADS, Workload, expert_choice, random_blocks
from mpoe_bench.section import Setup
from mpoe_bench.timing import Budget, Measure, cpu_measure, interleave
from mpoe_kernels import BackendError, available_backends, grouped_mpo_linear, route
from mpoe_kernels.backends import AUTO, Candidate
from mpoe_kernels.contract import autotune
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.contract.ranking import Problem

MOST_FLOPS = 5.0  # strategies of more than this many times the fewest FLOPs are not timed
TOLERANCE, WANTED_SHARE = 1.15, 0.9


def problems_of(case: Workload, backend: str = AUTO) -> dict[str, Problem]:
    """What the ops choose for, by phase."""
    sizes = (BlockDims.of_shape(case.shape), case.num_experts, case.num_tokens, case.dtype, "cpu")
    keeps, need = case.training and case.shape.is_separable, (True, True, not case.mask_central, True)
    found = {"forward": Problem("grouped_mpo_linear", *sizes, keeps=keeps, backend=backend)}
    if case.training:
        found["backward"] = Problem("grouped_mpo_linear_backward", *sizes, need, backend=backend)
    return found


def first_use(problems: Mapping[str, Problem]) -> dict[str, tuple[Candidate, float]]:
    """By phase, what is chosen without any kept choice, and the seconds of choosing."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        os.environ.pop(autotune.SETTING, None)
        autotune.forget()
        for phase, problem in problems.items():
            start = time.perf_counter()
            found[phase] = autotune.resolve_contraction(problem), time.perf_counter() - start
    autotune.forget()
    return found


def _runs(case: Workload) -> Callable[[str, str, str], Callable[[], object]]:
    """``(phase, backend, strategy)`` -> what a call runs."""
    torch.manual_seed(8)
    blocks = random_blocks(case.shape, case.num_experts, case.dtype, requires_grad=case.training)
    blocks.central.requires_grad_(case.training and not case.mask_central)
    x = torch.randn(case.num_tokens, case.in_features).to(case.dtype).requires_grad_(case.training)
    routing = route(expert_choice(case.load, case.num_tokens, case.num_experts), case.num_experts)
    grad = torch.randn(case.num_tokens, case.out_features).to(case.dtype)
    leaves = [t for t in (x, blocks.left, blocks.central, blocks.right) if t.requires_grad]
    rows, offsets = routing.token_of_slot, routing.expert_offsets

    def forward(backend: str, strategy: str) -> Tensor:
        with torch.set_grad_enabled(case.training):
            return grouped_mpo_linear(x, blocks, offsets, row_index=rows, backend=backend, strategy=strategy)

    def run(phase: str, backend: str, strategy: str) -> Callable[[], object]:
        y = forward(backend, strategy)  # refuses what has no kernel
        if phase == "forward":
            return lambda: forward(backend, strategy)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    return run


def judge(case: Workload, budget: Budget, measure: Measure | None = None, backend: str = AUTO) -> dict[str, Any]:
    """A row: ``chosen``, ``best`` and ``first_use`` (seconds) by phase, ``seconds`` by phase and candidate, ``ratio``.

    The ratio is the time of what was chosen over that of the fastest, forward and backward together.

    Args:
        case: what to compute.
        budget, measure: of the judging timing, see `interleave`.
        backend: whose choice is judged: the choice among all backends, or one backend's among its own strategies.
    """
    problems = problems_of(case, backend)
    used = first_use(problems)
    run = _runs(case)
    row: dict[str, Any] = {"name": case.name, "chosen": {}, "best": {}, "first_use": {}, "seconds": {}}
    took = best = 0.0
    for phase, problem in problems.items():
        candidate, row["first_use"][phase] = used[phase]
        chosen = f"{candidate.name} [{candidate.backend}]"
        plans = problem._replace(keeps=False).plans()
        strategies = [plan.strategy for plan in plans if plan.flops <= MOST_FLOPS * plans[0].flops]
        functions = {}
        for each in available_backends() if backend == AUTO else (backend,):
            for strategy in dict.fromkeys((*strategies, candidate.strategy)):
                try:
                    functions[f"{strategy} [{each}]"] = run(phase, each, strategy)
                except BackendError:
                    continue  # no kernel for this strategy: no candidate
        timings = interleave(functions, chosen, budget, measure)
        base = timings[chosen].seconds
        times = {name: timing.x * base for name, timing in timings.items()}
        row["chosen"][phase], row["seconds"][phase] = chosen, times
        row["best"][phase] = min(times, key=times.__getitem__)
        took, best = took + times[chosen], best + min(times.values())
    return row | {"ratio": took / best, "best_seconds": best, "chosen_seconds": took}


def planner_section(cases: Iterable[Workload], setup: Setup, backend: str = AUTO) -> dict[str, Any]:
    """Judge the choice on all cases; the summary counts those within `TOLERANCE` of the best measured."""
    rows = []
    for case in cases:
        setup.log(f"judging the choice: {case.name}")
        rows.append(judge(case, setup.budget, setup.measure, backend))
    whose = "choice" if backend == AUTO else f"choice on {backend}"
    return {
        "key": "planner",
        "title": f"{whose} by one timing against the best of another ({len(rows)} cases); {summary(rows)}",
        "backend": backend,
        "rows": rows,
        "within": sum(row["ratio"] <= TOLERANCE for row in rows),
        "tolerance": TOLERANCE,
        "wanted_share": WANTED_SHARE,
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """One line about all cases."""
    ratios, firsts = [row["ratio"] for row in rows], [sum(row["first_use"].values()) for row in rows]
    within = sum(ratio <= TOLERANCE for ratio in ratios)
    return (
        f"{within} of {len(rows)} within {TOLERANCE}, mean {statistics.mean(ratios):.3f}, worst {max(ratios):.2f}; "
        f"first use: median {statistics.median(firsts):.2f} s, worst {max(firsts):.2f} s"
    )


if __name__ == "__main__":
    judged = []
    # One thread's own clock does not count what other processes do on its core.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for workload in JUDGED_WORKLOADS:
        if all(part in workload.name for part in sys.argv[1:]):
            judged.append(judge(workload, Budget(seconds_each=0.5, max_rounds=7), cpu_measure(clock)))
            print(f"{judged[-1]['ratio']:.2f} {workload.name} {judged[-1]['chosen']} {judged[-1]['best']}", flush=True)
    print(f"{torch.get_num_threads()} threads: {summary(judged)}")
