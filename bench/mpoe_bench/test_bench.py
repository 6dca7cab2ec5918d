"""What pytest-benchmark times: every contender of a suite beside its case's dense layer; and the
autotuner's choices.

A choice, made by one timing, is judged against every strategy on every backend in another timing.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mpoe_bench.cases import Workload, expert_choice, random_blocks
from mpoe_bench.contender import Comparison, Named
from mpoe_bench.run import Run, in_turn
from mpoe_kernels import grouped_mpo_linear, route
from mpoe_kernels.backends import AUTO, Candidate
from mpoe_kernels.contract import autotune
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.contract.ranking import Problem, rank

MOST_FLOPS = 5.0  # strategies of more than this many times the fewest FLOPs are not timed


def test_speed(
    benchmark: Any, bench_run: Run, comparison: Comparison, contender: Named, phase: str
) -> None:
    bench_run.measure(benchmark, comparison, contender, phase)


def problem_of(case: Workload, backend: str, phase: str) -> Problem:
    """What the ops choose for."""
    sizes = (BlockDims.of_shape(case.shape), case.num_experts, case.num_tokens, case.dtype, "cpu")
    if phase == "backward":
        need = (True, True, not case.mask_central, True)
        return Problem("grouped_mpo_linear_backward", *sizes, need, backend=backend)
    keeps = case.training and case.shape.is_separable
    return Problem("grouped_mpo_linear", *sizes, keeps=keeps, backend=backend)


def first_use(problem: Problem) -> tuple[Candidate, float]:
    """What is chosen without any kept choice, and the seconds of choosing."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        os.environ.pop(autotune.SETTING, None)
        autotune.forget()
        start = time.perf_counter()
        candidate = autotune.resolve_contraction(problem)
        seconds = time.perf_counter() - start
        autotune.forget()
        return candidate, seconds


def calls_of(case: Workload) -> Callable[[str, str, str], Callable]:
    """``(phase, backend, strategy)`` -> what a call runs."""
    torch.manual_seed(8)
    blocks = random_blocks(case.shape, case.num_experts, case.dtype, requires_grad=case.training)
    blocks.central.requires_grad_(case.training and not case.mask_central)
    x = torch.randn(case.num_tokens, case.in_features).to(case.dtype)
    x.requires_grad_(case.training)
    chosen = expert_choice("uniform", case.num_tokens, case.num_experts)
    routing = route(chosen, case.num_experts)
    slots = {"expert_offsets": routing.expert_offsets, "row_index": routing.token_of_slot}
    grad = torch.randn(case.num_tokens, case.out_features).to(case.dtype)
    inputs = (x, blocks.left, blocks.central, blocks.right)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    def call(phase: str, backend: str, strategy: str) -> Callable:
        @torch.set_grad_enabled(case.training)
        def forward() -> Tensor:
            return grouped_mpo_linear(x, blocks, **slots, backend=backend, strategy=strategy)

        y = forward()
        if phase == "forward":
            return forward
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    return call


def candidates_of(problem: Problem, chosen: Candidate) -> list[Candidate]:
    """The chosen one, and all of at most `MOST_FLOPS` times the fewest FLOPs."""
    problem = problem._replace(keeps=False)
    flops = {plan.strategy: plan.flops for plan in problem.plans()}
    most = MOST_FLOPS * min(flops.values())
    return [chosen, *(other for other in rank(problem) if flops[other.strategy] <= most)]


def seconds_of(samples: Mapping[str, Sequence[float]], chosen: str) -> dict[str, float]:
    """Seconds by name: the median ratio to the choice's in the same round, times the choice's."""
    rounds = samples[chosen]
    seconds = {}
    for name, others in samples.items():
        ratios = [other / one for other, one in zip(others, rounds, strict=True)]
        seconds[name] = median(ratios) * median(rounds)
    return seconds


def add_to_row(section: dict, name: str, phase: str, **facts: Any) -> None:
    """Put a phase's facts into the case's row, which is made if there is none."""
    rows = {row["name"]: row for row in section["rows"]}
    row = rows.get(name, {"name": name})
    if name not in rows:
        section["rows"].append(row)
    for fact, value in facts.items():
        row.setdefault(fact, {})[phase] = value
    took = sum(seconds[row["chosen"][of]] for of, seconds in row["seconds"].items())
    row["ratio"] = took / sum(min(seconds.values()) for seconds in row["seconds"].values())


def test_choice(benchmark: Any, bench_run: Run, backend: str, case: Workload, phase: str) -> None:
    whose = "choice" if backend == AUTO else f"choice on {backend}"
    title = f"{whose} by one timing against the best of another"
    section = bench_run.section(title, key="planner", backend=backend)
    problem = problem_of(case, backend, phase)
    candidate, first = first_use(problem)
    call = calls_of(case)
    functions = {}
    for other in candidates_of(problem, candidate):
        name = f"{other.name} [{other.backend}]"
        functions[name] = call(phase, other.backend, other.strategy)
    chosen, *_ = functions
    whole = bench_run.budget
    budget = replace(whole, seconds=whole.seconds / 3, most=min(9, whole.most))
    samples = in_turn(benchmark, functions, budget, bench_run.timer)
    benchmark.group = title
    benchmark.name = f"{case.name}, {phase}"
    if benchmark.stats is None:
        return
    seconds = seconds_of(samples, chosen)
    best = min(seconds, key=seconds.__getitem__)
    add_to_row(
        section, case.name, phase, chosen=chosen, best=best, seconds=seconds, first_use=first
    )
    x = seconds[chosen] / seconds[best]
    benchmark.extra_info.update({"x": x, "chosen": chosen, "best": best})
