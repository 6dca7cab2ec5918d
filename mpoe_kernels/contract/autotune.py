"""Chooses how a contraction is computed: few FLOPs first, then time the best of them once, and keep
the fastest.

The strategies of a contraction are ranked by their exact FLOPs, and the backends that can run it by
a fixed order of preference. The first time a problem is seen, the two best strategies are timed
with the two best backends on tensors of the same sizes; the fastest is kept in memory and in a file
(`mpoe_kernels.contract.kept`).

Nothing is timed, and the first of the ranking runs, where results must not depend on a clock: after
``torch.use_deterministic_algorithms(True)``, while a graph is traced, exported or captured, with
several ranks of ``torch.distributed``, and with ``MPOE_AUTOTUNE=0``. `choices` gives what was
chosen to a checkpoint or to other ranks; `adopt` takes it over, before any timing. A deterministic
program ranks alone, whatever was adopted.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mpoe_kernels.backends import BACKENDS, Candidate
from mpoe_kernels.contract.kept import add_choices, processor_name, read_choices
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.contract.program import Need
from mpoe_kernels.contract.ranking import Problem, rank, shortlist
from mpoe_kernels.contract.timing import SETTING, has_ranks, is_traced, several_ranks
from mpoe_kernels.cuda_library import CUDA_LIBRARY
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.version import __version__

# Most rows and FLOPs of a timed call, of each CPU thread and of a GPU. The FLOPs are the best
# strategy's.
ROWS = {"cpu": 256, "cuda": 16384}
FLOPS = {"cpu": 2e9, "cuda": 2e12}
SECONDS = 0.2  # of all interleaved repetitions together
MOST_ROUNDS = 20
# A strategy of this many times the fewest FLOPs is not timed, a candidate this many times as slow
# is not repeated.
MOST_FLOPS = 8
HOPELESS = 2.5
MOST_BYTES = (
    1 << 28
)  # of rebuilt weights and rows of a timed candidate, unless the first of the ranking holds more
_LOG = logging.getLogger(__name__)


# op -> a call of it on made-up tensors; entered by the ops' modules, which lie above this one.
Example = Callable[[Problem, int, int], Any]
EXAMPLES: dict[str, Example] = {}

# Keyed by everything a choice depends on, with the sizes of the blocks: repeated calls look up
# once.
_CHOSEN: dict[tuple[Any, ...], tuple[Candidate, BlockDims]] = {}
_MOST_CHOSEN = 8192
_MADE: dict[str, str] = {}  # key text -> "backend name": what `choices` returns
_TIMED: dict[str, str] = {}
_ADOPTED: dict[str, str] = {}
_ADOPTED_BY_RANKS: dict[
    str, str
] = {}  # by the problem alone: ranks on unlike machines must not differ
_LOCK = threading.RLock()


def _new_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):  # another thread of the parent may have been timing
    os.register_at_fork(after_in_child=_new_lock)


def choices() -> dict[str, str]:
    """Everything that this process has chosen or adopted so far: what was solved where ->
    ``"backend candidate"``."""
    with _LOCK:
        return {**_ADOPTED, **_MADE}


def adopt(choices: Mapping[str, str]) -> None:
    """Take over choices of another process, before any timing; those that cannot run here are
    ignored.

    Args:
        choices: as `choices` returned them.

    Raises:
        TypeError: no mapping of strings to strings.
    """
    if not isinstance(choices, Mapping):
        raise TypeError(
            f"choices must be a mapping of strings to strings; got {type(choices).__name__}"
        )
    for key, value in choices.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"choices must map strings to strings; got {key!r}: {value!r}")
    with _LOCK:
        _ADOPTED.update(choices)
        for key, value in choices.items():
            _ADOPTED_BY_RANKS[key.rpartition(" | ")[2]] = value
        _CHOSEN.clear()


def forget() -> None:
    """Choose everything again; the file stays."""
    with _LOCK:
        for table in (_CHOSEN, _MADE, _TIMED, _ADOPTED, _ADOPTED_BY_RANKS):
            table.clear()


def _key(problem: Problem) -> str:
    """Everything that a time depends on, as text: the machine, the versions, the kernels' build,
    the problem."""
    if problem.device_type == "cuda":
        library = CUDA_LIBRARY
        capability = torch.cuda.get_device_capability(problem.device)
        machine = f"{torch.cuda.get_device_name(problem.device)} {capability}"
    else:
        library = NATIVE_LIBRARY
        isa = library.info.get("isa_used", "no native kernels")
        threads = torch.get_num_threads()
        machine = (
            f"{processor_name()}, {isa}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{threads} threads"
        )
    build = library.info.get("build", "")
    return f"{machine} | torch {torch.__version__}, mpoe {__version__} {build} | {problem}"


def _may_time(problem: Problem) -> bool:
    return (
        problem.op in EXAMPLES
        and problem.slots > 0
        and problem.device_type in ("cpu", "cuda")
        and os.environ.get(SETTING, "1") != "0"
        and not several_ranks()
    )


def _timed_sizes(problem: Problem) -> tuple[int, int]:
    """Experts and slots of a timed call: so few experts that it is short, with all their rows up to
    a limit.

    At least as many experts as threads, over which some kernels divide their work.
    """
    kind = problem.device_type
    experts = problem.num_experts
    threads = 1
    if kind == "cpu":
        threads = torch.get_num_threads()
    most_rows = ROWS[kind] * threads
    most_flops = FLOPS[kind] * threads
    share = min(
        1.0,
        most_flops / max(1, problem.plans()[0].flops),
        most_rows / problem.slots,
    )
    fewer = min(experts, max(threads, int(experts * share)))
    slots = math.ceil(problem.slots * fewer / experts)
    return fewer, min(slots, max(most_rows, fewer))


def _seconds(runs: Sequence[Callable[[], object]], device: str) -> list[float]:
    """The shortest time of each, interleaved; infinite for what fails."""
    shortest = [math.inf] * len(runs)
    on_gpu = device.startswith("cuda")
    # One thread's own clock does not count what other processes do on its core.
    alone = not on_gpu and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter

    def sample(k: int) -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = clock()
        runs[k]()
        if on_gpu:
            torch.cuda.synchronize(device)
        return clock() - start

    able = []
    for k in range(len(runs)):
        try:
            shortest[k] = sample(k)  # compiles, and brings in memory what later ones find there
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # too little memory, or a kernel that this device refuses
            _LOG.info("a candidate failed when it was timed: %s", error)
        else:
            able.append(k)
    spent = 0.0
    rounds = 0
    while len(able) > 1 and rounds < MOST_ROUNDS and spent < SECONDS:
        if rounds or not on_gpu:  # a GPU's first call may have compiled
            able = [k for k in able if shortest[k] < HOPELESS * min(shortest)]
        for k in able:
            took = sample(k)
            shortest[k] = min(shortest[k], took)
            spent += took
        rounds += 1
    return shortest


def _fastest(problem: Problem, able: list[Candidate]) -> Candidate:
    """Times the shortlist. A time on fewer rows counts in proportion to the strategy's FLOPs."""
    plans = {plan.strategy: plan for plan in problem.plans()}
    first = plans[able[0].strategy]
    memory = max(MOST_BYTES, first.held_bytes)
    listed = []
    for candidate in shortlist(able):
        plan = plans[candidate.strategy]
        if plan.flops <= MOST_FLOPS * first.flops and plan.held_bytes <= memory:
            listed.append(candidate)
    if len(listed) == 1:
        return listed[0]
    experts, slots = _timed_sizes(problem)
    sample = problem._replace(num_experts=experts, slots=slots)
    with torch.no_grad():
        call = EXAMPLES[problem.op](problem, experts, slots)
        runs = []
        for candidate in listed:
            runs.append(partial(candidate.run, replace(call, strategy=candidate.strategy)))
        seconds = _seconds(runs, problem.device)
    timed = {plan.strategy: max(1, plan.flops) for plan in sample.plans()}
    scaled = []
    for candidate, took in zip(listed, seconds, strict=True):
        scaled.append(took * plans[candidate.strategy].flops / timed[candidate.strategy])
    return listed[scaled.index(min(scaled))]


def _named(value: str | None, able: list[Candidate]) -> Candidate | None:
    for candidate in able:
        if candidate.text == value:
            return candidate
    return None


def resolve_contraction(problem: Problem) -> Candidate:
    """What runs: adopted, kept or timed now, or the first of the ranking where nothing may be
    timed.

    Raises:
        BackendError: with all reasons, when the named backend or every backend can run no
            candidate.
    """
    problem = problem.rounded()
    able = rank(problem)
    if torch.are_deterministic_algorithms_enabled() or is_traced() or len(able) == 1:
        return able[0]
    key = _key(problem)
    with _LOCK:
        adopted = _ADOPTED_BY_RANKS.get(str(problem)) if several_ranks() else _ADOPTED.get(key)
        candidate = _named(adopted, able)
        if candidate is None and _may_time(problem):
            candidate = _named(_TIMED.get(key) or read_choices().get(key), able)
            if candidate is None:
                candidate = _fastest(problem, able)
                add_choices({key: candidate.text})
            _TIMED[key] = candidate.text
        candidate = candidate or able[0]
        _MADE[key] = candidate.text
    return candidate


def chosen_for(op: str, call: Any, slots: int, need: Need, keeps: bool) -> Candidate:
    """The result of `resolve_contraction` for a call of the linear op, whose strategy and dims it
    sets.

    Args:
        op: one of `mpoe_kernels.backends.CONTRACTIONS`.
        call: a `mpoe_kernels.linear.op.LinearCall`.
        slots: N.
        need: which gradients a backward computes.
        keeps: the forward saves rows for its backward, so it is ``separable``.
    """
    x = call.x
    on_gpu = x.device.type == "cuda"
    key = (
        op,
        call.left.shape,
        call.central.shape,
        call.right.shape,
        call.in_features,
        call.out_features,
        slots,
        x.dtype,
        x.device,
        need,
        keeps,
        call.backend,
        call.strategy,
        torch.are_deterministic_algorithms_enabled(),
        has_ranks(),
        torch.get_num_threads(),
        on_gpu and torch.backends.cuda.matmul.fp32_precision,
        *BACKENDS.values(),
    )
    choice = _CHOSEN.get(key)
    if choice is None:
        sizes = (call.dims, call.num_experts, slots, x.dtype, str(x.device))
        problem = Problem(op, *sizes, need, keeps, call.backend, call.strategy)
        choice = (resolve_contraction(problem), call.dims)
        if len(_CHOSEN) >= _MOST_CHOSEN:
            _CHOSEN.clear()
        if not is_traced():
            _CHOSEN[key] = choice
    candidate, call.dims = choice
    call.strategy = candidate.strategy
    return candidate
