"""Host time: how long a call keeps Python busy until it returns, and how long until its result is ready: host.jsonl.

On a GPU the two differ; where the first is as long as the second, the device waits for the host.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward
from mpoe_bench.section import failure_text
from mpoe_bench.suites.layers import Dense, mixture
from mpoe_bench.visit.lines import Deadline, Lines, finish, parse
from mpoe_kernels import MPOBlocks, grouped_mpo_linear, route
from mpoe_kernels.testing.cases import random_blocks, workload_shape

CALLS, BETWEEN = 60, 10  # calls in total, and calls between two waits for the device
MODES = ("eager", "compiled", "reduce-overhead")


def host_and_whole(function: Callable[[], object], device: str, calls: int = CALLS) -> tuple[float, float]:
    """Median seconds until a call returns, and median seconds per call until the device has finished a group."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        function()
    returned, whole = [], []
    for _ in range(max(1, calls // BETWEEN)):
        wait()
        began = time.perf_counter()
        for _ in range(BETWEEN):
            start = time.perf_counter()
            function()
            returned.append(time.perf_counter() - start)
        wait()
        whole.append((time.perf_counter() - began) / BETWEEN)
    return median(returned), median(whole)


def _training(module: nn.Module, x: Tensor) -> Callable[[], object]:
    grad = torch.randn_like(x)

    def step() -> None:
        module(x).backward(grad)
        for parameter in module.parameters():
            parameter.grad = None

    return step


def _forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> object:
        with torch.no_grad():
            return module(x)

    return step


def layers(model: int, hidden: int, device: str) -> Iterator[tuple[str, nn.Module]]:
    """The dense layer and the mixtures that replace it."""
    torch.manual_seed(0)
    dense = Dense(model, hidden, "relu", torch.bfloat16).to(device)
    yield "dense", dense
    for shape in ("separable", "paper", "light"):
        bond = {"max_bond": 64} if shape == "paper" and model > 64 else {}
        config = MPOEConfig(num_experts=8, shape=shape, router=RouterConfig(top_k=1), **bond)
        yield shape, MPOEFeedForward(model, hidden, config, activation="relu").to(device, torch.bfloat16)
    config = MPOEConfig(num_experts=8, shape="hidden", router=RouterConfig(top_k=2))
    yield "hidden, two per token", mixture(dense, config, "relu").to(device)


def ops(model: int, hidden: int, tokens: int, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ops alone: `route`, and the grouped linear with each strategy."""
    torch.manual_seed(0)
    index = torch.randint(0, 8, (tokens, 1), device=device)
    yield "route", lambda: route(index, 8)
    offsets, x = route(index, 8).expert_offsets, torch.randn(tokens, model).to(device, torch.bfloat16)
    found = random_blocks(workload_shape("separable", model, hidden), 8, torch.bfloat16)
    blocks = MPOBlocks(*(t.to(device) for t in (found.left, found.central, found.right)), model, hidden)
    for strategy in ("separable", "rebuild", "half_left", "half_right"):

        def run(strategy: str = strategy) -> object:
            return grouped_mpo_linear(x, blocks, offsets, strategy=strategy)

        yield f"grouped_mpo_linear {strategy}", run


def cases(device: str) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Names, and builders of the functions to be timed."""
    model, hidden = (48, 96) if device == "cpu" else (768, 3072)
    for tokens in (1, 4) if device == "cpu" else (1, 64, 4096):
        for name, function in ops(model, hidden, tokens, device):
            yield f"{name} T={tokens}", lambda function=function: function
        for mode in MODES if device == "cuda" else MODES[:1]:
            for name, module in layers(model, hidden, device):
                x = torch.randn(tokens, model, device=device, dtype=torch.bfloat16)

                def build(make: Any, module: nn.Module = module, x: Tensor = x, mode: str = mode) -> Any:
                    options = {} if mode == "compiled" else {"mode": mode}
                    return make(module if mode == "eager" else torch.compile(module, **options), x)

                yield f"layer {name} T={tokens} forward {mode}", lambda build=build: build(_forward)
                yield f"layer {name} T={tokens} training {mode}", lambda build=build: build(_training)


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing; see the module."""
    chosen = parse("host", __doc__ or "", words)
    lines, deadline = Lines(chosen.out / "host.jsonl"), Deadline.of_minutes(chosen.minutes)
    kept, done, left, wrong = len(lines.rows), 0, [], []
    for name, build in cases(chosen.device):
        if name in lines.rows:
            continue
        if deadline.passed:
            left.append(name)
            continue
        try:
            returned, whole = host_and_whole(build(), chosen.device, CALLS if chosen.device == "cuda" else BETWEEN)
        except Exception as failure:  # any failure: the other calls are measured, and the part fails
            wrong.append(f"{name}: {failure_text(failure)}")
            continue
        lines.add(name, {"host": returned, "whole": whole})
        done += 1
        print(f"{name}: {returned * 1e6:.0f} us of the host, {whole * 1e6:.0f} us in all", flush=True)
    return finish("host", done, kept, left, wrong)


if __name__ == "__main__":
    sys.exit(main())
