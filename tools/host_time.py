"""How long the host takes to start the Triton kernels of a feed-forward layer, with stand-ins for a GPU.

    python tools/host_time.py [--experts 8] [--tokens 4096] [--doc]

Tensors have no memory (device ``meta``), nothing is compiled, and the stand-in for the driver's launch does nothing:
what remains is Python's part of a call. *Bare* is the time of ``compiled[grid](*arguments)`` alone, Triton's own way to
launch a compiled kernel. Times cover the up and down projections together, each with the strategy that the backend
would choose on an H100.

A second table times whole calls of the op for the up projection alone, including choice, checks and autograd. There
the tensors are on the CPU, because PyTorch dispatches ``meta`` tensors differently; nothing reads them. ``--doc``
writes both tables into bench/results/ahead-of-time/triton.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton_compile import DOC, write_between
from triton_predict import ACTIVATIONS, ARCHITECTURE, CARD, DTYPE, choice

from mpoe_kernels import grouped_mpo_linear, registry
from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.backends.triton import TRITON
from mpoe_kernels.linear import op
from mpoe_kernels.linear.triton import cost, plan
from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.contract import machine
from mpoe_kernels.contract.program import PHASES
from mpoe_kernels.triton import start
from mpoe_kernels.triton.architecture import target_named

ROUNDS, REPEATS = 60, 20
CALL_TOKENS = 1024  # larger CPU results get new memory from the system every time; on a GPU, PyTorch caches it


class Driver:
    """Stands in for Triton's GPU driver."""

    utils = SimpleNamespace(unload_module=lambda module: None)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(CompiledKernel):  # type: ignore[misc]
    """A compiled kernel whose launch does nothing."""

    def __init__(self) -> None:
        self.module, self.function, self.packed_metadata, self.name, self.src = None, 0, (), "", None
        self._run = lambda *arguments: None

    def _init_handles(self) -> None:
        pass


@contextmanager
def stand_ins() -> Iterator[None]:
    """Stands in for a missing GPU: its driver, its compiler and its properties."""

    def compiled(jit: JITFunction, key: str, signature: Any, device: int, *_: Any) -> Compiled:
        return jit.device_caches[device][0].setdefault(key, Compiled())

    triton.runtime.driver.set_active(Driver())
    with (
        patch.object(JITFunction, "_do_compile", compiled),
        patch.object(start.architecture, "target_of", lambda _: target_named(ARCHITECTURE)),
    ):
        yield


def microseconds(runs: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """CPU time of each run in its fastest round; every round times all runs, as machines are slow at times."""
    for run in runs:
        run()
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for k, run in enumerate(runs):
            begin = time.thread_time()
            for _ in range(REPEATS):
                run()
            best[k] = min(best[k], time.thread_time() - begin)
    return [seconds / REPEATS * 1e6 for seconds in best]


def bare(launches: list[start.Launch]) -> Callable[[], None]:
    """A function that calls ``compiled[grid](*arguments)`` for every launch."""
    handle = Compiled()
    calls = [(one.grid, [one.arguments[name] for name in one.kernel.arg_names]) for one in launches]

    def run() -> None:
        for grid, arguments in calls:
            handle[(*grid, 1, 1)[:3]](*arguments)

    return run


def together(works: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """A function that runs all of them once."""

    def run() -> None:
        for work in works:
            work()

    return run


def table(experts: int, tokens: int, rounds: int) -> str:
    """Markdown: one row per shape and phase."""
    names: list[str] = []
    counts: list[int] = []
    runs: list[Callable[[], None]] = []
    for name, pair in catalogue.shapes().items():
        for phase in PHASES:
            works = []
            for activation, shape in zip(ACTIVATIONS.values(), pair, strict=True):
                problem = catalogue.dims_of(shape), experts, tokens
                strategy = choice(*problem, phase).strategy
                works.append(catalogue.WORK[phase](*problem, DTYPE, strategy, activation))
            run = together(works)
            with start.recorded(ARCHITECTURE) as launches:
                run()
            names.append(f"{name} | {phase}")
            counts.append(len(launches))
            runs += run, bare(launches)
    times = microseconds(runs, rounds)
    lines = ["| shape | | launches | us | us of a launch | bare us of a launch |", "|---|---|---|---|---|---|"]
    for name, count, total, least in zip(names, counts, times[::2], times[1::2], strict=True):
        lines.append(f"| {name} | {count} | {total:.0f} | {total / count:.1f} | {least / count:.1f} |")
    return "\n".join(lines)


@contextmanager
def card_of_the_cpu() -> Iterator[None]:
    """Sends CPU tensors the way that the card's tensors would go."""
    able = replace(TRITON, unavailable_reasons=list, request_reasons=lambda _: [])
    with (
        stand_ins(),
        patch.dict(registry.BACKENDS, triton=able),
        patch.object(cost, "_here", lambda _: (target_named(ARCHITECTURE), CARD, 0.0)),
        machine.using(machine.TABLE),
    ):
        yield


def launches_of(run: Callable[[], object]) -> int:
    """How many launches one run makes."""
    with patch.object(plan, "start_steps", wraps=plan.start_steps) as started:
        run()
    return sum(len(call.args[0]) for call in started.call_args_list)


class OpCalls(NamedTuple):
    """Whole calls of the op for one shape: how many launches they make, and four functions to time.

    Attributes:
        launches: number of launches of a forward and of a backward.
        runs: forward without and with gradients to record; backward without and with PyTorch's autograd engine.
    """

    launches: tuple[int, int]
    runs: tuple[Callable[[], object], ...]


def op_calls(name: str, experts: int, tokens: int) -> OpCalls:
    """The calls of an up projection."""
    dims = catalogue.dims_of(catalogue.shapes()[name][0])
    left, central, right = (torch.empty(block.shape, dtype=DTYPE) for block in catalogue._blocks(dims, experts, DTYPE))
    x, bias = torch.empty(tokens, dims.in_features, dtype=DTYPE), torch.empty(dims.out_features, dtype=DTYPE)
    blocks, rows = MPOBlocks(left, central, right, dims.in_features, dims.out_features), torch.arange(tokens)
    offsets = torch.arange(experts + 1, dtype=torch.int32) * (tokens // experts)
    slots, leaves = rows[:, None].contiguous(), [leaf.requires_grad_() for leaf in (x, left, central, right, bias)]

    def forward() -> Tensor:
        return grouped_mpo_linear(
            x, blocks, offsets, bias, row_index=rows, slot_of_token=slots, activation="relu", backend="triton"
        )

    y = forward()
    gradients = partial(torch.autograd.grad, y, leaves, torch.empty_like(y), retain_graph=True)
    with patch.object(op, "backward_op", wraps=op.backward_op) as called:
        gradients()
    backward = torch.no_grad()(partial(op.backward_op, *called.call_args.args))
    runs = torch.no_grad()(forward), forward, backward, gradients
    return OpCalls((launches_of(forward), launches_of(backward)), runs)


def op_table(experts: int, tokens: int, rounds: int) -> str:
    """Markdown: one row per shape."""
    lines = [
        "| shape | launches | us | us, gradients to come | launches of the backward | us | us with PyTorch's engine |",
        "|---|---|---|---|---|---|---|",
    ]
    with card_of_the_cpu():
        found = {name: op_calls(name, experts, tokens) for name in catalogue.shapes()}
        times = iter(microseconds([run for calls in found.values() for run in calls.runs], rounds))
    for name, calls in found.items():
        alone, recorded, backward, with_engine = (f"{next(times):.0f}" for _ in calls.runs)
        forwards, backwards = calls.launches
        lines.append(f"| {name} | {forwards} | {alone} | {recorded} | {backwards} | {backward} | {with_engine} |")
    return "\n".join(lines)


def made_on() -> str:
    """Processor and versions behind the times, for a table's last line."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    return f"\nHost: one core of {machine.processor_name()}; {versions}."


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timing rounds; the fastest counts")
    parser.add_argument("--doc", action="store_true", help="write the table into bench/results")
    chosen = parser.parse_args(words)
    with stand_ins():
        found = table(chosen.experts, chosen.tokens, chosen.rounds)
    of_ops = op_table(chosen.experts, min(chosen.tokens, CALL_TOKENS), chosen.rounds)
    if chosen.doc:
        write_between(DOC, "host", f"{found}\n{made_on()}")
        write_between(DOC, "ops", of_ops)
    else:
        print(found, of_ops, made_on(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
