"""`python -m mpoe_bench.rates`: FLOP/s of native products and of the library's, on one thread and on more.

A native product is one call of `grouped_mpo_linear` with a forced strategy, so its rate includes copies, routing and
sums; its FLOPs are those of the strategy. The library's is `F.linear` of a dense matrix of the same size. Forward and
backward (all gradients) are timed apart, in turns in one process; medians. The clock is the process's CPU time for one
thread, so that other processes disturb less, and the wall's for more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpoe_bench.machine import describe, pinned, title_of, usable_cores
from mpoe_bench.timing import CLOCKS, Budget, cpu_measure, interleave
from mpoe_kernels import grouped_mpo_linear
from mpoe_kernels.planner import BlockDims
from mpoe_kernels.planner.contraction import contraction
from mpoe_kernels.testing.cases import random_blocks, workload_shape

LIBRARY = "library"
STRATEGIES = {"separable": "separable", "paper_64": "rebuild"}  # by shape
Timed = tuple[Callable[[], Tensor], dict[str, Tensor], dict[str, float]]  # call, what gets gradients, FLOPs by phase


def _dense(x: Tensor, width: int) -> Timed:
    weight = torch.randn(width, x.shape[1], dtype=x.dtype).requires_grad_()
    flops = 2.0 * x.shape[0] * weight.numel()
    return lambda: F.linear(x, weight), {"x": x, "weight": weight}, {"forward": flops, "backward": 2 * flops}


def _native(x: Tensor, width: int, experts: int, name: str) -> Timed:
    shape, strategy = workload_shape(name, x.shape[1], width), STRATEGIES[name]
    blocks = random_blocks(shape, experts, x.dtype)
    parts = {key: getattr(blocks, key).requires_grad_() for key in ("left", "central", "right")}
    offsets = torch.tensor([x.shape[0] * e // experts for e in range(experts + 1)], dtype=torch.int32)
    dims = BlockDims.of_shape(shape)
    flops = {
        phase: float(contraction(strategy, dims, experts, x.shape[0], x.dtype, phase, keeps=True).flops)
        for phase in ("forward", "backward")
    }

    def call() -> Tensor:
        return grouped_mpo_linear(x, blocks, offsets, backend="native", strategy=strategy)

    return call, {"x": x, **parts}, flops


def measure(
    sizes: tuple[int, int, int], experts: int, dtype: torch.dtype, threads: int, budget: Budget
) -> list[dict[str, Any]]:
    """Two rows, forward and backward: GFLOP/s by product."""
    tokens, rows, columns = sizes
    torch.manual_seed(0)
    x = torch.randn(tokens, rows, dtype=dtype).requires_grad_()
    grad = torch.randn(tokens, columns, dtype=dtype)
    timed = {LIBRARY: _dense(x, columns), **{name: _native(x, columns, experts, name) for name in STRATEGIES}}

    def forward(call: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return call()

    def backward(y: Tensor, inputs: dict[str, Tensor]) -> object:
        return torch.autograd.grad(y, list(inputs.values()), grad, retain_graph=True)

    found = []
    with pinned(threads):
        saved = {name: call() for name, (call, _, _) in timed.items()}
        phases: dict[str, dict[str, Callable[[], object]]] = {
            "forward": {name: lambda call=call: forward(call) for name, (call, _, _) in timed.items()},
            "backward": {
                name: lambda y=saved[name], inputs=inputs: backward(y, inputs) for name, (_, inputs, _) in timed.items()
            },
        }
        for phase, functions in phases.items():
            clock = cpu_measure(CLOCKS["cpu" if threads == 1 else "wall"])
            times = interleave(functions, LIBRARY, budget, clock)
            rates = {name: timed[name][2][phase] / times[name].seconds / 1e9 for name in functions}
            dtype_name = str(dtype).removeprefix("torch.")
            found.append({"dtype": dtype_name, "threads": threads, "phase": phase, "GFLOP/s": rates})
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.rates", description=__doc__)
    parser.add_argument("--sizes", default="2048,768,3072", help="tokens, input and output features")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--threads", default="", help="separated by commas; default: one, and as many as there are cores"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="spent on one product in one phase")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    tokens, rows, columns = map(int, chosen.sizes.split(","))
    counts = [int(n) for n in chosen.threads.split(",") if n] or sorted({1, len(usable_cores())})
    machine = describe("cpu", counts[-1], "wall")
    names = [LIBRARY, *STRATEGIES]
    print(
        title_of(machine),
        f"{tokens} x {rows} x {columns}, {chosen.experts} experts, GFLOP/s (of the library's)",
        sep="\n",
    )
    print(f"{'dtype':<10}{'threads':>8}  {'phase':<10}" + "".join(f"{name:>24}" for name in names))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for threads in counts:
            for row in measure((tokens, rows, columns), chosen.experts, dtype, threads, Budget(chosen.seconds)):
                found.append(row)
                rates = row["GFLOP/s"]
                cells = [f"{rates[name]:,.0f} ({rates[name] / rates[LIBRARY]:.2f})" for name in names]
                print(
                    f"{row['dtype']:<10}{threads:>8}  {row['phase']:<10}" + "".join(f"{cell:>24}" for cell in cells),
                    flush=True,
                )
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
