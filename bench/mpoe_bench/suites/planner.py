"""The planner judged: its choice against every strategy on every backend, measured in one process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.contender import grad_of
from mpoe_bench.section import Setup
from mpoe_bench.timing import interleave
from mpoe_kernels import BackendError, MPOBlocks, available_backends, grouped_mpo_linear, route
from mpoe_kernels.backends.registry import resolve_contraction
from mpoe_kernels.planner import ContractionPlan, contractions, plan_contraction
from mpoe_kernels.reference import grouped_mpo_linear_reference
from mpoe_kernels.testing.assertions import relative_error
from mpoe_kernels.testing.cases import Workload, expert_choice, random_blocks

AUTO = "auto"
SLOWEST_TIMED = 5.0  # strategies predicted slower than this many times the chosen one are not timed
TOLERANCE = 1.15
WANTED_SHARE = 0.9
# Relative error that passes, in units of rounding, but never more than the second number. What is wrong here is wrong
# by far; tests hold the kernels to much less.
ERROR_UNITS, LARGEST_ERROR = 64.0, 0.06
PARTS = ("left", "central", "right")


@dataclass
class _Call:
    """The op on one case, forward or forward + backward, with a forced choice or none."""

    x: Tensor
    blocks: MPOBlocks
    offsets: Tensor
    rows: Tensor
    grad_y: Tensor
    training: bool

    def forward(self, backend: str, strategy: str) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return grouped_mpo_linear(
                self.x,
                self.blocks,
                self.offsets,
                row_index=self.rows,
                backend=None if backend == AUTO else backend,
                strategy=None if strategy == AUTO else strategy,
            )

    def train(self, backend: str, strategy: str) -> Tensor:
        for leaf in self.leaves().values():
            leaf.grad = None
        y = self.forward(backend, strategy)
        y.backward(self.grad_y)
        return y.detach()

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x} | {name: getattr(self.blocks, name) for name in PARTS}


def _make_call(case: Workload) -> _Call:
    torch.manual_seed(8)
    blocks = random_blocks(case.shape, case.num_experts, case.dtype, requires_grad=case.training)
    x = torch.randn(case.num_tokens, case.in_features).to(case.dtype).requires_grad_(case.training)
    routing = route(expert_choice(case.load, case.num_tokens, case.num_experts), case.num_experts)
    grad_y = torch.randn(case.num_tokens, case.out_features).to(case.dtype)
    return _Call(x, blocks, routing.expert_offsets, routing.token_of_slot, grad_y, case.training)


def _exact(call: _Call) -> Tensor:
    """y in float64."""
    parts = (getattr(call.blocks, name).detach().double() for name in PARTS)
    blocks = MPOBlocks(*parts, call.blocks.in_features, call.blocks.out_features)
    return grouped_mpo_linear_reference(call.x.detach().double(), blocks, call.offsets, row_index=call.rows)


def _faults(call: _Call, exact: Tensor, backend: str, strategy: str) -> list[str]:
    """What is wrong with one choice's result and gradients.

    y is compared as it is. y is linear in x and in every block, so by Euler's theorem each gradient's inner product
    with its own tensor is ``<grad_y, y>``: that checks all four without a second reference.
    """
    y = call.train(backend, strategy) if call.training else call.forward(backend, strategy)
    allowed = min(ERROR_UNITS * torch.finfo(y.dtype).eps, LARGEST_ERROR)
    error = relative_error(y, exact)
    found = [] if error <= allowed else [f"error of y is {error:.1e}, allowed {allowed:.1e}"]
    if call.training:
        products = call.grad_y.double() * exact
        for name, leaf in call.leaves().items():
            product = float((grad_of(leaf).double() * leaf.detach().double()).sum())
            error = abs(product - float(products.sum())) / float(products.norm())
            if not error <= 5 * allowed:  # NaN is not
                found.append(f"<d{name}, {name}> misses <dy, y> by {error:.1e} of its size")
            leaf.grad = None
    return found


def chosen(case: Workload, plan: ContractionPlan) -> dict[str, str]:
    """Strategy and backend that an unforced call runs, by phase."""
    result = {}
    for contraction in plan.phases:
        # A forward for training keeps what the separable backward reads.
        saves = case.training and case.shape.is_separable and contraction.phase == "forward"
        choice = resolve_contraction(
            "grouped_mpo_linear" + ("_backward" if contraction.phase == "backward" else ""),
            contraction.dims,
            case.num_experts,
            case.num_tokens,
            case.dtype,
            contraction.phase,
            "cpu",
            strategy_name="separable" if saves else AUTO,
        )
        result[contraction.phase] = f"{choice.strategy} [{choice.backend}]"
    return result


def _candidates(plan: ContractionPlan) -> tuple[list[str], dict[str, float]]:
    """Strategies to time, and those that are predicted too slow with their predicted ratio."""
    seconds: dict[str, float] = {}
    for phase in plan.phases:
        for candidate in contractions(phase.dims, plan.num_experts, phase.slots, plan.dtype, phase.phase):
            seconds[candidate.strategy] = seconds.get(candidate.strategy, 0.0) + candidate.seconds(plan.hardware)
    ratios = {strategy: value / max(plan.seconds, 1e-12) for strategy, value in seconds.items()}
    timed = [strategy for strategy, ratio in ratios.items() if ratio <= SLOWEST_TIMED]
    return timed, {strategy: ratio for strategy, ratio in ratios.items() if ratio > SLOWEST_TIMED}


def judge(case: Workload, setup: Setup) -> dict[str, Any]:
    """Time the planner's choice and every other candidate of one case.

    The best is the fastest forward plus the fastest backward, whoever computes them; a backward's time is that of
    forward + backward less that of the same forward.
    """
    plan = plan_contraction(case.shape, case.num_experts, case.num_tokens, case.dtype, training=case.training)
    call = _make_call(case)
    exact = _exact(call)
    strategies, slow = _candidates(plan)
    row: dict[str, Any] = {"name": case.name, "chosen": chosen(case, plan), "faults": {}, "not_timed": slow}
    choices = {AUTO: (AUTO, AUTO)}
    for backend in available_backends():
        for strategy in strategies:
            name = f"{strategy} [{backend}]"
            try:
                faults = _faults(call, exact, backend, strategy)
            except BackendError:
                continue  # it has no kernel for this strategy: no candidate
            if faults:
                row["faults"][name] = "; ".join(faults)
            else:
                choices[name] = (backend, strategy)
    faults = _faults(call, exact, AUTO, AUTO)
    if faults:
        return row | {"ratio": None, "reason": f"wrong result, not timed: {'; '.join(faults)}"}
    del exact
    forward = {name: lambda c=choice: call.forward(*c) for name, choice in choices.items()}
    timed = interleave(forward, AUTO, setup.budget, setup.measure)
    base = timed[AUTO].seconds
    times = {name: {"forward": timing.x * base} for name, timing in timed.items()}
    if case.training:
        train = {name: lambda c=choice: call.train(*c) for name, choice in choices.items()}
        timed = interleave(train, AUTO, setup.budget, setup.measure)
        base = timed[AUTO].seconds
        for name, timing in timed.items():
            times[name]["backward"] = max(timing.x * base - times[name]["forward"], 0.0)
    row["seconds"] = times
    row["best"] = {phase: min(times, key=lambda n, p=phase: times[n][p]) for phase in times[AUTO]}
    best = sum(times[name][phase] for phase, name in row["best"].items())
    row["ratio"] = sum(times[AUTO].values()) / max(best, 1e-12)
    return row


def planner_section(cases: Iterable[Workload], setup: Setup) -> dict[str, Any]:
    """Judge the planner on cases; the summary counts those within `TOLERANCE` of the best measured."""
    rows = []
    for case in cases:
        setup.log(f"judging the planner: {case.name}")
        rows.append(judge(case, setup))
    return {
        "key": "planner",
        "title": f"planner's choice against the best measured strategy ({len(rows)} cases)",
        "rows": rows,
        "within": sum(row["ratio"] is not None and row["ratio"] <= TOLERANCE for row in rows),
        "tolerance": TOLERANCE,
        "wanted_share": WANTED_SHARE,
    }
