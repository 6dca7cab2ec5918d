"""Chooses how a contraction is computed, among the candidates that backends offer.

The cheapest candidate runs; the choice is cached for the next call with the same problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch

import mpoe_kernels.measured as measured
import mpoe_kernels.planner.machine as machine
from mpoe_kernels.planner import (
    ALL_GRADIENTS,
    BlockDims,
    Contraction,
    contraction,
    contractions,
    may_round_to_tf32,
    planned_threads,
)
from mpoe_kernels.planner.machine import Constants, Source
from mpoe_kernels.planner.program import Need
from mpoe_kernels.registry import (
    AUTO,
    BACKENDS,
    CONTRACTIONS,
    Backend,
    BackendError,
    Candidate,
    Request,
    registered_backends,
)


def candidates_for(
    backend: Backend, plan: Contraction, table: measured.Table | None = None
) -> tuple[list[Candidate], list[str]]:
    """A backend's candidates for a contraction, with measured times where available; or the reasons why it has none."""
    own = backend.contraction_reasons(plan)
    if own:
        return [], own
    table = measured.table_here(plan.device) if table is None else table
    return [
        found._replace(seconds=measured.seconds_of(table, backend.name, found.name, plan) or found.seconds)
        for found in backend.candidates(plan)
    ], []


def _measurer() -> Callable[[], Constants] | None:
    """`measure` of the first backend that can measure the CPU; None if no choice depends on it."""
    found = (backend for backend in registered_backends() if backend.measure is not None)
    return next((backend.measure for backend in found if not backend.unavailable_reasons()), None)


def measure_machine() -> None:
    """Measure the CPU for the planner (see `planner.machine`), unless this was already done, is turned off or would not
    matter here."""
    measure = _measurer()
    if measure is not None:
        machine.measure_once(measure)


class Problem(NamedTuple):
    """What a choice is made for.

    Attributes:
        op: one of `CONTRACTIONS`.
        dims: sizes of the blocks.
        num_experts: E.
        slots: rows N.
        dtype: of the activations.
        device: ``cpu``, ``cuda:1``, ...; costs are predicted for exactly this device.
        need: which gradients a backward computes: x, left, central, right.
        keeps: the forward of ``separable`` saves its central step's rows for the backward.
        backend, strategy: if given, only this one is considered.
    """

    op: str
    dims: BlockDims
    num_experts: int
    slots: int
    dtype: torch.dtype
    device: str
    need: Need = ALL_GRADIENTS
    keeps: bool = False
    backend: str = AUTO
    strategy: str = AUTO

    def plans(self) -> tuple[Contraction, ...]:
        """Every contraction that solves the problem."""
        phase = CONTRACTIONS[self.op]
        sizes = (self.dims, self.num_experts, self.slots, self.dtype, phase, self.need, False, self.device, self.keeps)
        return contractions(*sizes) if self.strategy == AUTO else (contraction(self.strategy, *sizes),)


class _Circumstances(NamedTuple):
    """What else a choice depends on, apart from the problem; cost functions read the last three themselves."""

    backends: tuple[Backend, ...]
    deterministic: bool
    threads: int
    tf32: bool
    constants: Source | None


def _able(problem: Problem, backends: tuple[Backend, ...]) -> tuple[list[Candidate], dict[str, list[str]]]:
    """All candidates, and for each backend the reasons why it lacks some or all of them."""
    plans, request = problem.plans(), Request(problem.op, problem.device, problem.dtype)
    table = measured.table_here(problem.device)
    refused: dict[str, list[str]] = {}
    able: list[Candidate] = []
    for backend in backends:
        if problem.backend not in (AUTO, backend.name):
            continue
        refused[backend.name] = backend.unsupported_reasons(request)
        if refused[backend.name]:
            continue
        for plan in plans:
            found, reasons = candidates_for(backend, plan, table)
            able += found
            refused[backend.name] += [reason for reason in reasons if reason not in refused[backend.name]]
    return able, refused


# Cache of chosen candidates, keyed by everything the choice depends on, so that repeated calls need one lookup.
_CHOSEN: dict[tuple[Any, ...], Candidate] = {}
_MOST_CHOSEN = 8192
machine.on_change.append(_CHOSEN.clear)


@lru_cache(maxsize=8192)
def strategy_together(alone: Candidate, problem: Problem) -> str | None:
    """The strategy with which a backend should compute both projections of a gated network together; None: separately.

    If a strategy's steps were measured, the predicted time of their pairs is scaled by the same prediction error.

    Args:
        alone: the candidate chosen for each single projection; its backend is asked.
        problem: of one projection.
    """
    backend = next(each for each in registered_backends() if each.name == alone.backend)
    if backend.gated_price is None:
        return None
    able = [plan for plan in problem.plans() if not backend.contraction_reasons(plan)]
    table, found = measured.table_here(problem.device), {}
    for plan in able:
        (predicted,) = (each.seconds for each in backend.candidates(plan) if each.name == plan.strategy)
        price = backend.gated_price(plan)
        times = measured.seconds_of(table, backend.name, plan.strategy, plan) or predicted
        found[plan.strategy] = price.together * times / predicted - price.multiplying
    return cheaper_together(found, alone.seconds)


def cheaper_together(prices: Mapping[str, float], alone: float) -> str | None:
    """The strategy with the lowest price, if that is below twice ``alone``.

    Args:
        prices: by strategy, seconds for both projections together, minus those of multiplying two results.
        alone: seconds for each projection computed separately.
    """
    best = min(prices, key=prices.__getitem__, default=None)
    return best if best is not None and prices[best] < 2 * alone else None


Call = TypeVar("Call")


def chosen_for(op: str, call: Call, need: Need, keeps: bool) -> tuple[Candidate, Call]:
    """The result of `resolve_contraction` for a call of the linear op, and the call with that strategy set.

    Args:
        op: one of `CONTRACTIONS`.
        call: a `mpoe_kernels.linear.call.LinearCall`.
        need: which gradients a backward computes.
        keeps: the forward saves rows for its backward, so it is ``separable``.
    """
    given: Any = call
    x, left, central, right = given.x, given.left, given.central, given.right
    slots = (x if given.row_index is None else given.row_index).shape[0]
    on_gpu = x.device.type == "cuda"
    key = (
        *(op, left.shape, central.shape, right.shape, given.in_features, given.out_features, slots, x.dtype, x.device),
        *(need, keeps, given.backend, given.strategy, tuple(BACKENDS.values())),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
        on_gpu and torch.backends.cuda.matmul.fp32_precision,
    )
    found = _CHOSEN.get(key)
    if found is None:
        found = _newly_chosen(op, given, need, keeps, slots, key)
    chosen = object.__new__(type(call))  # `dataclasses.replace` takes ten times as long
    chosen.__dict__.update(given.__dict__, strategy=found.strategy)
    return found, chosen


def _newly_chosen(op: str, call: Any, need: Need, keeps: bool, slots: int, key: tuple[Any, ...]) -> Candidate:
    constants = machine.source()
    strategy = "separable" if keeps else call.strategy
    sizes = (call.dims, call.num_experts, slots, call.x.dtype, str(call.x.device))
    found = resolve_contraction(Problem(op, *sizes, need, keeps, call.backend, strategy))
    if len(_CHOSEN) >= _MOST_CHOSEN:
        _CHOSEN.clear()
    # Do not cache a choice if a measurement, by this call or another thread, has changed the constants meanwhile.
    if call.x.device.type != "cpu" or (machine.is_settled() and machine.source() is constants):
        _CHOSEN[key] = found
    return found


@lru_cache(maxsize=8192)
def _resolve(problem: Problem, circumstances: _Circumstances) -> Candidate:
    """See `resolve_contraction`."""
    op, backends = problem.op, circumstances.backends
    able, refused = _able(problem, backends)
    if circumstances.deterministic:
        same = {backend.name for backend in backends if backend.same_on_any_threads}
        able = [candidate for candidate in able if candidate.backend in same] or able
    if able:
        return min(able, key=lambda candidate: candidate.seconds)
    if problem.backend != AUTO:
        raise BackendError(f"backend {problem.backend!r} cannot run {op}: {'; '.join(refused[problem.backend])}")
    listing = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    raise BackendError(f"no backend can run {op} on {problem.device.partition(':')[0]} {problem.dtype}: {listing}")


def resolve_contraction(problem: Problem) -> Candidate:
    """The runnable candidate with the lowest predicted time; cached for the next call with the same problem.

    After ``torch.use_deterministic_algorithms(True)`` backends whose results do not depend on the number of CPU threads
    are preferred, and the plan does not depend on it either.

    Everything else that the choice depends on is part of the cache key: the registered backends, whether it
    must be deterministic, the number of CPU threads to plan for, whether float32 products may round to TF32, and the
    CPU's constants, which are measured before the first choice (see `planner.machine`).

    Raises:
        BackendError: with all reasons, when the named backend or every backend can run no candidate.
    """
    on_cpu, backends = problem.device == "cpu", registered_backends()
    if on_cpu and machine.is_wanted() and _measurer() is not None and len(_able(problem, backends)[0]) > 1:
        measure_machine()
    circumstances = _Circumstances(
        backends,
        torch.are_deterministic_algorithms_enabled(),
        planned_threads(),
        problem.device.startswith("cuda") and may_round_to_tf32(problem.dtype),
        machine.source() if on_cpu else None,
    )
    return _resolve(problem, circumstances)
