"""What can compute a contraction: fewest FLOPs first, then the preferred backend; and which of that
is worth timing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from mpoe_kernels.backends import (
    AUTO,
    CONTRACTIONS,
    Candidate,
    Request,
    allowed_backends,
    refusal,
)
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.contract.plan import Contraction, contractions
from mpoe_kernels.contract.precision import may_round_to_tf32
from mpoe_kernels.contract.program import ALL_GRADIENTS, Need

STRATEGIES_TIMED = 2
BACKENDS_TIMED = 2
MOST_TIMED = 5


class Problem(NamedTuple):
    """What a choice is made for.

    Attributes:
        op: one of `CONTRACTIONS`.
        dims: sizes of the blocks.
        num_experts: E.
        slots: rows N.
        dtype: of the activations.
        device: ``cpu``, ``cuda:1``, ...
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

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda``, ..."""
        return self.device.partition(":")[0]

    @property
    def may_round(self) -> bool:
        """Whether products may round to TF32."""
        return self.device_type == "cuda" and may_round_to_tf32(self.dtype)

    def rounded(self) -> Problem:
        """The problem with the next power of two of slots, for which a choice is made."""
        return self._replace(slots=1 << (self.slots - 1).bit_length() if self.slots else 0)

    def plans(self) -> tuple[Contraction, ...]:
        """Every contraction that solves the problem, fewest FLOPs first."""
        sizes = (self.dims, self.num_experts, self.slots, self.dtype, CONTRACTIONS[self.op])
        more = (self.need, self.device, self.keeps)
        strategy = self.strategy
        if self.keeps:
            strategy = "separable"
        if strategy == AUTO:
            return contractions(*sizes, *more)
        return (Contraction(strategy, *sizes, *more),)

    def __str__(self) -> str:
        need = "".join(str(int(n)) for n in self.need)
        keeps = ", keeps" * self.keeps
        sizes = f"{'x'.join(map(str, self.dims))} E{self.num_experts} N{self.slots}"
        kind = str(self.dtype).removeprefix("torch.") + " tf32" * self.may_round
        problem = f"{self.op} {self.device_type} {kind} {sizes} need {need}{keeps}"
        return f"{problem}, {self.backend} {self.strategy}"


def rank(problem: Problem) -> list[Candidate]:
    """All candidates: fewest FLOPs first, then the preferred backend.

    Raises:
        BackendError: with all reasons, when the named backend or every backend can run no
            candidate.
    """
    request = Request(problem.op, problem.device, problem.dtype)
    refused: dict[str, list[str]] = {}
    runnable = []
    for backend in allowed_backends(request, problem.backend):
        refused[backend.name] = backend.unsupported_reasons(request)
        if not refused[backend.name]:
            runnable.append(backend)
    able: list[Candidate] = []
    for plan in problem.plans():
        for backend in runnable:
            reasons = backend.contraction_reasons(plan)
            if not reasons:
                able += backend.candidates(plan)
            for reason in reasons:
                if reason not in refused[backend.name]:
                    refused[backend.name].append(reason)
    if not able:
        raise refusal(request, refused, problem.backend)
    if problem.device_type == "cpu":
        return able
    # Those that wait for the device come last, and only if their backend is named or there are no
    # others.
    going = [candidate for candidate in able if not candidate.waits]
    if going and problem.backend == AUTO:
        return going
    return going + [candidate for candidate in able if candidate.waits]


def shortlist(able: Iterable[Candidate]) -> list[Candidate]:
    """What is timed of a ranking: the first of the first two strategies on the first two backends,
    then variants."""
    groups: dict[tuple[str, str], list[Candidate]] = {}
    strategies: dict[str, None] = {}
    backends: dict[str, None] = {}
    for candidate in able:
        strategies[candidate.strategy] = None
        backends[candidate.backend] = None
        groups.setdefault((candidate.strategy, candidate.backend), []).append(candidate)
    pairs = []
    for strategy in list(strategies)[:STRATEGIES_TIMED]:
        for backend in list(backends)[:BACKENDS_TIMED]:
            if (strategy, backend) in groups:
                pairs.append(groups[strategy, backend])
    listed = []
    for variant in range(max(map(len, pairs))):
        for group in pairs:
            if variant < len(group):
                listed.append(group[variant])
    return listed[:MOST_TIMED]
