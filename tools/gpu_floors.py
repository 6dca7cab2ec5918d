"""How fast the GPU kernels can be at best, from their machine code; needs no GPU. Bounds, nothing
is measured.

A layer is called on tensors without memory, forward and with its backward; every launch is recorded
as it would be made (with PyTorch's own operations), and every kernel is compiled for an H100. A
launch's floor is the largest of four times: to *issue* its instructions (4 a cycle and
multiprocessor), to move each of its tensors once (*memory*), to multiply, padding included
(*tensor*), and to *wait*: its programs run in waves, as many at once as registers and shared memory
allow, and a wave lasts as long as one program's instructions, barriers, waits and dependent loads,
at the cycles of `BARRIER` and `LOAD`. A warp executes Triton's instructions as often as the loops
around them run, `TRIPS`, with tokens spread evenly over the experts. Launches follow one another.
``x_dense`` divides the sum of a call's floors by that of the dense network's own launches, by the
same rules; it has the limits.

bench/results/ahead-of-time/gpu.json keeps the figures. The tool fails where a call has more
launches, a larger floor or a larger ``x_dense`` than there, where a limit that was kept is
exceeded, and where a call is not there; limits that are missed are named; ``--kernels`` prints
every launch; ``--write`` keeps the new figures.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from gpu_compile import compiled, job_of
from machine_code import Binary, Executed, executed
from mpoe_bench.layers import PHASES, Case, Dense, cases
from shipped_kernels import Library, as_on_gpu, bytes_of
from torch import nn

from mpoe.layers import router
from mpoe_kernels import define
from mpoe_kernels.routing import gating
from mpoe_kernels.testing.launches import Launch
from mpoe_kernels.triton.start import cdiv

TABLE = Path(__file__).resolve().parents[1] / "bench/results/ahead-of-time/gpu.json"
MORE = 1.02  # a kernel may have this many times the table's figures
ARCHITECTURE = "sm_90"
# An H100 with SXM: multiprocessors, cycles a second, FLOP/s that good 16-bit products reach, bytes
# a second; registers, bytes of shared memory, of which every program takes some more, and warps of
# a multiprocessor.
UNITS = 132
CLOCK = 1.755e9
FLOPS = 800e12
BANDWIDTH = 3e12
REGISTERS = 65536
SHARED = 228 << 10
SHARED_MORE = 1 << 10
WARPS = 64
# Cycles, fixed before any figure was seen. Of a load: an H100's L2 cache, 200 (table 3 of
# PMC10448217, which says 400
# for its memory). Of a barrier: 20, the table's shared memory, through which a barrier goes at
# least once.
LOAD = 200
BARRIER = 20
CASES = {case.name: case for case in cases(few=True)}


def recorded(layer: nn.Module, case: Case, training: bool) -> list[Launch | Library]:
    """What a call of a layer without memory launches, in order."""
    x = torch.empty(
        case.tokens, case.model, dtype=torch.bfloat16, device="meta", requires_grad=training
    )
    # As it is without this recording.
    plain = {"is_plain_call": lambda _: True}
    with (
        warnings.catch_warnings(),
        patch.object(router, "_on_gpu", lambda _: True),
        patch.multiple(gating, requested_backend=lambda _: "triton", **plain),
        patch.multiple(define, **plain),
        as_on_gpu(ARCHITECTURE) as log,
        torch.set_grad_enabled(training),
    ):
        warnings.simplefilter("ignore")  # nothing balances the experts of a single layer
        y = layer.train(training)(x)
        if training:
            y.backward(torch.empty_like(y))
    return log


Arguments = SimpleNamespace  # of a launch, with the call's TOKENS and the grid


def _rows(a: Arguments) -> float:
    """Slots of an expert, of all choices where pairs are sorted."""
    pairs = a.TOKENS
    if getattr(a, "order", None) is not None:
        pairs = a.order.shape[0] - a.EXPERTS - 2
    return pairs / a.EXPERTS


def _parts(a: Arguments) -> int:
    """In which a program each sums over an expert's rows."""
    if not getattr(a, "IN_PARTS", True):
        return 1
    return math.ceil(_rows(a) * a.P / a.size)


def _steps(a: Arguments, parts: int) -> float:
    """Tiles of a weight that a program sums over: digits of the central core, and of the side that
    is summed."""
    k_left, k_central, k_right = a.K_SIZES
    n_left, n_central, n_right = a.N_SIZES
    tiles = cdiv(k_right, a.KR) * cdiv(n_right, a.NR)
    if a.OF_RIGHT:
        tiles = cdiv(k_left, a.KL) * cdiv(n_left, a.NL)
    return k_central * n_central / parts * tiles


# Kernel -> how often its loops run (see `executed`), of the launch's arguments.
TRIPS: dict[str, Callable[[Arguments], Sequence[float]]] = {
    "histogram_kernel": lambda a: (a.size / a.BLOCK,),
    "scatter_kernel": lambda a: (cdiv(a.grid[0], a.CHUNK), a.size / a.BLOCK),
    "sort_kernel": lambda a: 2 * (cdiv(a.tokens * a.TOP_K, a.BLOCK),),
    "logits_kernel": lambda a: (cdiv(min(a.share, a.width), a.BK),),
    "combine_backward_kernel": lambda a: (cdiv(a.F, a.BN),),
    "grouped_rows_kernel": lambda a: (cdiv(a.K, a.BK),),
    "grouped_blocks_kernel": lambda a: (_rows(a) * a.P / _parts(a) / a.BK,),
    "grouped_sum_kernel": lambda a: divmod(_parts(a), 4),  # the compiler unrolls the loop
    "fused_kernel": lambda a: (
        cdiv(a.K_SIZES[2], a.KR),
        cdiv(a.K_SIZES[0], a.KL) * a.K_SIZES[1],
    ),
    "gradient_kernel": lambda a: (_steps(a, a.grid[1]), a.TOKENS / a.grid[2] / a.BT),
    # Loops for tokens without an expert count not at all.
    "neurons_fused_kernel": lambda a: (
        0,
        cdiv(a.width, a.BK),
        cdiv(cdiv(a.last - a.first, a.BK), a.grid[1]),
    ),
    "neurons_hidden_kernel": lambda a: [
        cdiv(width, a.BK) for width in (a.width, a.out_width)[: 1 + (a.grad is not None)]
    ],
    "neurons_rows_kernel": lambda a: (1 + (a.more_weights is not None)) * (cdiv(a.neurons, a.BK),),
    # A loop over slots for each of the gradients; a program runs one of the four, or none.
    "neurons_weights_kernel": lambda a: [
        math.ceil(_rows(a) / a.BK) / 4
        for gradient in (a.dup, a.ddown, a.dgate_up, a.dbias)
        if gradient is not None
    ],
    "hidden_rows_kernel": lambda a: (0, a.share),
    "hidden_blocks_kernel": lambda a: (a.share, math.ceil(_rows(a) / a.BM)),
}
# Kernels with a program for every tile of BM rows of an expert; the grid has more, which return at
# once.
TILED = {
    "neurons_fused_kernel",
    "neurons_hidden_kernel",
    "neurons_rows_kernel",
    "hidden_rows_kernel",
    "grouped_rows_kernel",
    "fused_kernel",
}


def busy_programs(name: str, a: Arguments) -> float:
    """Programs that do not return at once; `fused_kernel` has its tiles of columns in the first
    axis too."""
    programs = math.prod(a.grid)
    if name == "grouped_blocks_kernel":
        return a.grid[0] * a.EXPERTS * _parts(a)
    if name not in TILED:
        return programs
    first = a.grid[0]
    columns = 1.0
    if name == "fused_kernel":
        columns = first / (cdiv(a.TOKENS, a.BM) + a.EXPERTS + 1)
    rows = _rows(a) * getattr(a, "P", 1)
    tiles = a.EXPERTS * math.ceil(rows / a.BM)
    return programs / first * columns * min(first, tiles)


def at_once(binary: Binary, warps: int) -> int:
    """Programs that a multiprocessor runs together."""
    by_registers = REGISTERS // (max(binary.registers, 1) * 32 * warps)
    by_memory = SHARED // (binary.shared + SHARED_MORE)
    by_warps = WARPS // warps
    return max(1, min(by_registers, by_memory, by_warps))


class Cost(NamedTuple):
    """Of one launch: see the module; ``warp``: what one of its warps executes, nothing for
    PyTorch's operations."""

    kernel: str
    times: tuple[float, float, float, float]  # to issue, to move, to multiply and to wait
    programs: float = 0
    warps: int = 0
    warp: Executed | None = None

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.times)


def cost_of(launch: Launch | Library, tokens: int) -> Cost:
    if isinstance(launch, Library):
        times = (0.0, launch.bytes / BANDWIDTH, launch.flops / FLOPS, 0.0)
        return Cost(launch.name, times)
    name = launch.name
    a = Arguments(**launch.arguments, TOKENS=tokens, grid=launch.grid)
    programs = busy_programs(name, a)
    warps = getattr(a, "num_warps", 4)
    trips = TRIPS[name](a) if name in TRIPS else ()
    binary = compiled(job_of(launch, ARCHITECTURE))[name]
    warp = executed(name, binary.code, trips)
    waves = math.ceil(programs / (UNITS * at_once(binary, warps)))
    chain = warp.instructions * max(1, warps / 4)
    chain += warp.barriers * BARRIER
    chain += warp.loads * LOAD
    times = (
        programs * warps * warp.instructions / (4 * UNITS * CLOCK),
        bytes_of(launch.arguments.values()) / BANDWIDTH,
        programs * warps * warp.flops / FLOPS,
        waves * chain / CLOCK,
    )
    return Cost(name, times, programs, warps, warp)


def dense_seconds(case: Case, training: bool) -> float:
    """The dense network's floor."""
    dense = Dense(case.model, device="meta", dtype=torch.bfloat16)
    return sum(cost_of(launch, case.tokens).floor for launch in recorded(dense, case, training))


Figures = dict[str, float]


def figures(case: Case, costs: Sequence[Cost], training: bool) -> Figures:
    """Of a call: x dense, its floor in us, launches."""
    floor = sum(cost.floor for cost in costs)
    x_dense = floor / dense_seconds(case, training)
    return {
        "x_dense": round(x_dense, 3),
        "floor_us": round(1e6 * floor, 1),
        "launches": len(costs),
    }


def worse(call: str, bounds: Figures, kept: Figures, limit: float | None) -> list[str]:
    """In what a call is worse than the table says: one line each."""
    most = {name: MORE * value for name, value in kept.items()}
    most["launches"] = kept["launches"]
    if limit is not None and kept["x_dense"] <= limit:
        most["x_dense"] = limit
    return [
        f"{call}: {name} {bounds[name]}; at most {allowed:g}"
        for name, allowed in most.items()
        if bounds[name] > allowed
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Returns 1 if something is worse than the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    parser.add_argument("--kernels", action="store_true", help="print the floors of every launch")
    parser.add_argument(
        "--write", action="store_true", help="keep the figures instead of comparing them"
    )
    chosen = parser.parse_args(words)
    table = json.loads(TABLE.read_text())
    lines = []
    for case, phase in product(CASES.values(), PHASES):
        call = f"{case.name} {phase}"
        if chosen.only not in call:
            continue
        training = phase == "training"
        limit = case.limits[training]
        launches = recorded(case.layer("meta"), case, training)
        costs = [cost_of(launch, case.tokens) for launch in launches]
        if chosen.kernels:
            print(*costs, sep="\n")
        bounds = figures(case, costs, training)
        verdict = ""
        if limit and bounds["x_dense"] > limit:
            verdict = f"at most {limit}: missed"
        print(call, bounds, verdict, flush=True)
        if chosen.write:
            table[call] = bounds
        elif call in table:
            lines += worse(call, bounds, table[call], limit)
        else:
            lines.append(f"{call}: not in {TABLE.name}")
    if chosen.write:
        rows = [f"{json.dumps(call)}: {json.dumps(table[call])}" for call in sorted(table)]
        TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    sys.stderr.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
