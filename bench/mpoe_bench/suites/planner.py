"""Judge the planner: its choice against every strategy on every backend, measured in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.choice import chosen_contractions, describe_choice
from mpoe_bench.contender import grad_of
from mpoe_bench.section import NOT_HERE, Setup, failure_text
from mpoe_bench.timing import interleave
from mpoe_kernels import BackendError, MPOBlocks, available_backends, grouped_mpo_linear, route
from mpoe_kernels.planner import ContractionPlan, contractions, plan_contraction
from mpoe_kernels.reference import grouped_mpo_linear_reference
from mpoe_kernels.registry import AUTO
from mpoe_kernels.testing.assertions import relative_error
from mpoe_kernels.testing.cases import Workload, expert_choice, random_blocks

SLOWEST_TIMED = 5.0  # strategies predicted to take more than this many times as long as the chosen one are not timed
TOLERANCE = 1.15
WANTED_SHARE = 0.9
# Allowed relative error in units of rounding, capped at the second number. Wrong results here are far off; the tests
# hold the kernels to much tighter limits.
ERROR_UNITS, LARGEST_ERROR = 64.0, 0.06
PARTS = ("left", "central", "right")


@dataclass
class _Call:
    """The op on one case, forward or forward + backward, with or without a forced choice."""

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

    def backward_of(self, y: Tensor) -> Callable[[], object]:
        """Only the backward pass, repeatable; no tensor keeps gradients."""
        leaves = tuple(self.leaves().values())
        return lambda: torch.autograd.grad(y, leaves, self.grad_y, retain_graph=True)

    def train(self, backend: str, strategy: str) -> Tensor:
        for leaf in self.leaves().values():
            leaf.grad = None
        y = self.forward(backend, strategy)
        y.backward(self.grad_y)
        return y.detach()

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        tensors = {"x": self.x} | {name: getattr(self.blocks, name) for name in PARTS}
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def _make_call(case: Workload) -> _Call:
    torch.manual_seed(8)
    blocks = random_blocks(case.shape, case.num_experts, case.dtype, requires_grad=case.training)
    blocks.central.requires_grad_(case.training and not case.mask_central)
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
    """What is wrong with a choice's result and gradients.

    y is compared directly. y is linear in x and in every block, so by Euler's theorem each gradient's inner product
    with its own tensor is ``<grad_y, y>``; this checks all gradients without a second reference.
    """
    try:
        y = call.train(backend, strategy) if call.training else call.forward(backend, strategy)
    except BackendError:
        raise  # the backend has no kernel for this: the caller decides what that means
    except Exception as error:  # any failure: the other candidates are measured, and the report states the reason
        return [failure_text(error)]
    allowed = min(ERROR_UNITS * torch.finfo(y.dtype).eps, LARGEST_ERROR)
    error = relative_error(y, exact)
    found = [] if error <= allowed else [f"error of y is {error:.1e}, allowed {allowed:.1e}"]
    if call.training:
        products = call.grad_y.double() * exact
        for name, leaf in call.leaves().items():
            product = float((grad_of(leaf).double() * leaf.detach().double()).sum())
            error = abs(product - float(products.sum())) / float(products.norm())
            if not error <= 5 * allowed:  # true for NaN
                found.append(f"<d{name}, {name}> misses <dy, y> by {error:.1e} of its size")
            leaf.grad = None
    return found


def strategies_to_time(plan: ContractionPlan, chosen: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """By phase, the strategies worth timing, with their predicted time relative to the chosen strategy's.

    Strategies beyond `SLOWEST_TIMED` times the chosen one are left out; the planner itself drops those that need too
    much memory.
    """
    found = {}
    for phase in plan.phases:
        sizes = (phase.dims, plan.num_experts, phase.slots, plan.dtype, phase.phase)
        every = contractions(*sizes, mask_central=plan.mask_central)
        seconds = {c.strategy: c.seconds(plan.hardware) for c in every}
        base = max(seconds[chosen[phase.phase]], 1e-12)
        found[phase.phase] = {s: value / base for s, value in seconds.items() if value / base <= SLOWEST_TIMED}
    return found


def _choices(call: _Call, exact: Tensor, strategies: Mapping[str, object], backends: Iterable[str]) -> tuple:
    """``{name: (backend, strategy)}`` of the choices that are right, and the faults of those that are wrong."""
    choices, faults = {}, {}
    for backend in backends:
        for strategy in strategies:
            name = f"{strategy} [{backend}]"
            try:
                found = _faults(call, exact, backend, strategy)
            except BackendError:
                continue  # the backend has no kernel for this strategy: no candidate
            if found:
                faults[name] = "; ".join(found)
            else:
                choices[name] = (backend, strategy)
    return choices, faults


def judge(case: Workload, setup: Setup, backend: str = AUTO) -> dict[str, Any]:
    """Time the choice and every other candidate of a case, forward and backward separately.

    Args:
        case: what to compute.
        setup: how to measure.
        backend: whose choice is judged: the choice among all backends, or one backend's among its own strategies.

    Returns:
        A row: ``chosen`` and ``best`` by phase, ``seconds`` by candidate and phase, and ``ratio``, the time of the
        choice divided by that of the fastest forward plus the fastest backward of all candidates.
    """
    sizes = (case.shape, case.num_experts, case.num_tokens, case.dtype)
    plan = plan_contraction(*sizes, training=case.training, mask_central=case.mask_central)
    found = chosen_contractions(*sizes, case.training, backend=backend, mask_central=case.mask_central)
    chosen = {phase: contraction.strategy for phase, (contraction, _) in found.items()}
    timed = strategies_to_time(plan, chosen)
    call = _make_call(case)
    exact = _exact(call)
    row: dict[str, Any] = {"name": case.name, "chosen": describe_choice(found), "faults": {}}
    faults = _faults(call, exact, backend, AUTO)
    if faults:
        return row | {"ratio": None, "reason": f"not timed: {'; '.join(faults)}"}
    rivals = available_backends() if backend == AUTO else (backend,)
    names = dict.fromkeys(strategy for phase in timed.values() for strategy in phase)
    choices, row["faults"] = _choices(call, exact, names, rivals)
    del exact
    row["seconds"] = {
        phase: _seconds(call, phase, (backend, AUTO), row["chosen"][phase], choices, timed[phase], setup)
        for phase in timed
    }
    row["best"] = {phase: min(times, key=times.__getitem__) for phase, times in row["seconds"].items()}
    best = sum(times[row["best"][phase]] for phase, times in row["seconds"].items())
    took = sum(times[row["chosen"][phase]] for phase, times in row["seconds"].items())
    return row | {"ratio": took / max(best, 1e-12), "best_seconds": best, "chosen_seconds": took}


def _seconds(
    call: _Call,
    phase: str,
    judged: tuple[str, str],
    judged_name: str,
    choices: Mapping[str, tuple[str, str]],
    strategies: Mapping[str, float],
    setup: Setup,
) -> dict[str, float]:
    """Seconds, by name, of the judged choice, run as users run it, and of its rivals in one phase."""
    rivals = {name: c for name, c in choices.items() if c[1] in strategies and name != judged_name}
    calls = {judged_name: judged, **rivals}
    if phase == "backward":
        functions = {name: call.backward_of(call.forward(*c)) for name, c in calls.items()}
    else:
        functions = {name: lambda c=c: call.forward(*c) for name, c in calls.items()}
    timings = interleave(functions, judged_name, setup.budget, setup.measure)
    base = timings[judged_name].seconds
    return {name: timing.x * base for name, timing in timings.items()}


def planner_section(cases: Iterable[Workload], setup: Setup, backend: str = AUTO) -> dict[str, Any]:
    """Judge the choice on all cases; the summary counts those within `TOLERANCE` of the best measured."""
    rows = []
    for case in cases:
        setup.log(f"judging the planner: {case.name}")
        try:
            rows.append(judge(case, setup, backend))
        except BackendError as error:
            missing = {"chosen": {}, "faults": {}, "ratio": None, "reason": f"{NOT_HERE}: {error}"}
            rows.append({"name": case.name, **missing})
    whose = "planner's choice" if backend == AUTO else f"planner's choice on {backend}"
    return {
        "key": "planner",
        "title": f"{whose} against the best measured strategy ({len(rows)} cases)",
        "backend": backend,
        "rows": rows,
        "within": sum(row["ratio"] is not None and row["ratio"] <= TOLERANCE for row in rows),
        "tolerance": TOLERANCE,
        "wanted_share": WANTED_SHARE,
    }
