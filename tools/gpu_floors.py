"""How fast the GPU kernels can be at best, from their machine code; needs no GPU. Bounds, nothing is measured.

A layer is called on tensors without memory, forward and with its backward; every launch is recorded as it would be made
(with PyTorch's own operations), and every kernel is compiled. Its floor is the largest of three times: to *issue* its
instructions (4 a cycle and multiprocessor), to move each of its tensors once (*memory*), and to multiply, padding
included (*tensor*). A warp executes Triton's instructions as often as the loops around them run, `TRIPS`, with tokens
spread evenly over the experts. ``x_dense``, which has the limits, divides the largest of a call's three sums by the
time for the dense network's FLOPs or bytes, the larger; ``x_own`` by that for the FLOPs that a chain needs itself.

bench/results/ahead-of-time/gpu.json keeps the figures. The tool fails where a kernel has more instructions, barriers or
bytes, or a call more launches or a larger ``x_dense`` than there, where a limit that was kept is exceeded, and where a
call is not there; limits that are missed are named; ``--write`` keeps the new figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_compile import compiled, job_of
from machine_code import executed
from mpoe_bench.layers import PHASES, TOKENS, Case, cases
from shipped_kernels import Library, as_on_gpu, bytes_of
from torch import nn

from mpoe.layers import router
from mpoe_kernels.contract import BlockDims, contraction
from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.routing import gating
from mpoe_kernels.testing.launches import Launch
from mpoe_kernels.triton.start import cdiv

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results" / "ahead-of-time"
TABLE, DOCUMENT = FOLDER / "gpu.json", FOLDER / "gpu.md"
MORE = 1.02  # a kernel may have this many times the table's figures


class Card(NamedTuple):
    """Multiprocessors, cycles a second, FLOP/s that good 16-bit products reach, and bytes a second."""

    units: int
    clock: float
    flops: float
    bandwidth: float


CARDS = {  # A100, H100 and B200, all with SXM
    "sm_80": Card(108, 1.41e9, 250e12, 1.8e12),
    "sm_90": Card(132, 1.755e9, 800e12, 3e12),
    "sm_100": Card(148, 1.85e9, 1800e12, 7e12),
}
CASES = {case.name: case for case in cases()}


def launches(layer: nn.Module, model: int, training: bool, architecture: str) -> list[Any]:
    """What a call of a layer without memory launches, in order."""
    x = torch.empty(TOKENS, model, dtype=torch.bfloat16, device="meta", requires_grad=training)
    with ExitStack() as patches, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing balances the experts of a single layer
        for each in (
            patch.object(router, "_on_gpu", lambda _: True),
            patch.object(gating, "requested_backend", lambda _: "triton"),
            patch.object(gating, "is_plain_call", lambda _: True),
        ):
            patches.enter_context(each)
        log = patches.enter_context(as_on_gpu(architecture))
        with torch.set_grad_enabled(training):
            y = layer.train(training)(x)
            if training:
                y.backward(torch.empty_like(y))
    return log


def _rows(a: dict[str, Any]) -> float:
    """Slots of an expert, of all choices where pairs are sorted."""
    pairs = TOKENS if a.get("order") is None else a["order"].shape[0] - a["EXPERTS"] - 2
    return pairs / a["EXPERTS"]


def _parts(a: dict[str, Any]) -> int:
    """In which a program each sums over an expert's rows."""
    return math.ceil(_rows(a) * a["P"] / a["size"]) if a.get("IN_PARTS", True) else 1


def _steps(a: dict[str, Any], parts: int) -> float:
    """Tiles of a weight that a program sums over: digits of the central core, and of the side that is summed."""
    side, k, n = (0, "KL", "NL") if a["OF_RIGHT"] else (2, "KR", "NR")
    tiles = cdiv(a["K_SIZES"][side], a[k]) * cdiv(a["N_SIZES"][side], a[n])
    return a["K_SIZES"][1] * a["N_SIZES"][1] / parts * tiles


_WEIGHTS = ("NEED_UP", "NEED_DOWN", "NEED_GATE_UP", "NEED_BIAS")
# Kernel -> how often its loops run (see `executed`), of the launch's arguments and its grid.
TRIPS: dict[str, Callable[[dict[str, Any], tuple[int, ...]], Sequence[float]]] = {
    "histogram_kernel": lambda a, _: (a["size"] / a["BLOCK"],),
    "drop_kernel": lambda a, g: (cdiv(g[0], a["CHUNK"]), a["size"] / a["BLOCK"]),
    "scatter_kernel": lambda a, g: (cdiv(g[0], a["CHUNK"]), a["size"] / a["BLOCK"]),
    "sort_kernel": lambda a, _: 2 * (cdiv(a["slots"], a["BLOCK"]),),
    "logits_kernel": lambda a, _: (cdiv(min(a["share"], a["width"]), a["BK"]),),
    "combine_backward_kernel": lambda a, _: (cdiv(a["F"], a["BN"]),),
    "grouped_rows_kernel": lambda a, _: (cdiv(a["K"], a["BK"]),),
    "grouped_blocks_kernel": lambda a, _: (_rows(a) * a["P"] / _parts(a) / a["BK"],),
    "grouped_sum_kernel": lambda a, _: divmod(_parts(a), 4),  # the compiler unrolls the loop
    "fused_kernel": lambda a, _: (cdiv(a["K_SIZES"][2], a["KR"]), cdiv(a["K_SIZES"][0], a["KL"]) * a["K_SIZES"][1]),
    "gradient_kernel": lambda a, g: (_steps(a, g[1]), TOKENS / g[2] / a["BT"]),
    # Loops for tokens without an expert count not at all.
    "neurons_fused_kernel": lambda a, g: (
        0,
        cdiv(a["width"], a["BK"]),
        cdiv(cdiv(a["last"] - a["first"], a["BK"]), g[1]),
    ),
    "neurons_hidden_kernel": lambda a, _: [cdiv(a[n], a["BK"]) for n in ("width", "out_width")[: 1 + a["BACKWARD"]]],
    "neurons_rows_kernel": lambda a, _: (1 + a["GATED"]) * (cdiv(a["neurons"], a["BK"]),),
    "neurons_few_kernel": lambda a, _: (a["TOP_K"], cdiv(a["neurons"], a["BK"])),
    # A loop over slots for each of the gradients; a program runs one of the four, or none.
    "neurons_weights_kernel": lambda a, _: [math.ceil(_rows(a) / a["BK"]) / 4 for name in _WEIGHTS if a[name]],
    "hidden_rows_kernel": lambda a, _: (0, a["share"]),
    "hidden_blocks_kernel": lambda a, _: (a["share"], math.ceil(_rows(a) / a["BM"])),
}
# Kernels with a program for every tile of BM rows of an expert; the grid has more, which return at once.
TILED = {"neurons_fused_kernel", "neurons_hidden_kernel", "neurons_rows_kernel"}
TILED |= {"hidden_rows_kernel", "grouped_rows_kernel", "fused_kernel"}


def busy_programs(launch: Launch) -> float:
    """Programs that do not return at once; `fused_kernel` has its tiles of columns in the first axis too."""
    programs, a = math.prod(launch.grid), launch.arguments
    if launch.name == "grouped_blocks_kernel":
        return launch.grid[0] * a["EXPERTS"] * _parts(a)
    if launch.name not in TILED:
        return programs
    columns = launch.grid[0] / (cdiv(TOKENS, a["BM"]) + a["EXPERTS"] + 1) if launch.name == "fused_kernel" else 1
    tiles = a["EXPERTS"] * math.ceil(_rows(a) * a.get("P", 1) / a["BM"])
    return programs / launch.grid[0] * columns * min(launch.grid[0], tiles)


class Cost(NamedTuple):
    """Of one launch: see the module; ``instructions``, ``barriers``: of a warp, 0 for PyTorch's operations."""

    kernel: str
    programs: float
    warps: int
    instructions: float
    barriers: float
    bytes: int
    times: tuple[float, float, float]  # to issue, to move and to multiply

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.times)


def cost_of(launch: Launch | Library, architecture: str) -> Cost:
    card = CARDS[architecture]
    if isinstance(launch, Library):
        return Cost(
            launch.name, 0, 0, 0, 0, launch.bytes, (0, launch.bytes / card.bandwidth, launch.flops / card.flops)
        )
    programs, warps = busy_programs(launch), launch.arguments.get("num_warps", 4)
    trips = TRIPS.get(launch.name, lambda *_: ())(launch.arguments, launch.grid)
    # The fifth generation's matrix instructions do not show their sizes; the fourth's multiply as much.
    names = [architecture, "sm_90"] if architecture == "sm_100" else [architecture]
    found = [executed(launch.name, compiled(job)[job.name].code, trips) for job in map(partial(job_of, launch), names)]
    (instructions, barriers, _), flops = found[0], found[-1][2]
    moved, total = bytes_of(launch.arguments.values()), programs * warps
    times = total * instructions / (4 * card.units * card.clock), moved / card.bandwidth, total * flops / card.flops
    return Cost(launch.name, programs, warps, round(instructions, 1), round(barriers, 1), moved, times)


def dense_seconds(model: int, training: bool, architecture: str) -> float:
    """Of the dense network: its FLOPs or bytes, the larger."""
    card, passes = CARDS[architecture], 3 if training else 1
    flops, elements = 16 * TOKENS * model**2, 8 * model**2 + 10 * TOKENS * model
    return passes * max(flops / card.flops, 2 * elements / card.bandwidth)


def own_flops(layer: nn.Module, training: bool) -> int:
    """Of a chain of cores whose weights are rebuilt, without padding; 0 for other layers."""
    total = 0
    for module in layer.modules():
        shape = getattr(module, "shape", None)
        if isinstance(shape, MPOShape):
            masked = not module.central.requires_grad
            given = "rebuild", BlockDims.of_shape(shape), module.num_experts, TOKENS, torch.bfloat16
            total += contraction(*given, "forward").flops
            total += contraction(*given, "backward", (True, True, not masked, True)).flops if training else 0
    return total


def figures(case: Case, training: bool, architecture: str) -> dict[str, Any]:
    """Of a call: floor in us, x dense and x own, launches, and our kernels."""
    layer = case.layer("meta")
    log, own = launches(layer, case.model, training, architecture), own_flops(layer, training)
    costs = [cost_of(launch, architecture) for launch in log]
    sums = [sum(times) for times in zip(*(each.times for each in costs), strict=True)]
    kernels = [[*each[:6], *(round(1e6 * seconds, 2) for seconds in each.times)] for each in costs if each.programs]
    return {
        "x_dense": round(max(sums) / dense_seconds(case.model, training, architecture), 3),
        "x_own": round(max(sums) / (own / CARDS[architecture].flops), 3) if own else "-",
        "floor_us": round(1e6 * sum(cost.floor for cost in costs), 1),
        "issue_memory_tensor_us": [round(1e6 * seconds, 1) for seconds in sums],
        "launches": len(costs),
        "ours": len(kernels),
        "kernels": kernels,
    }


def worse(name: str, found: dict[str, Any], kept: dict[str, Any], limit: float | None) -> list[str]:
    """In what a call is worse than the table says: one line each."""
    pairs = [("launches", found["launches"], kept["launches"]), ("us", found["floor_us"], MORE * kept["floor_us"])]
    for ours, theirs in zip(found["kernels"], kept["kernels"], strict=False):
        if ours[0] == theirs[0]:
            names = (f"{what} of {ours[0]}" for what in ("instructions", "barriers", "bytes"))
            pairs += zip(names, ours[3:6], (MORE * each for each in theirs[3:6]), strict=True)
    is_kept = limit is not None and kept["x_dense"] <= limit
    pairs.append(("x dense", found["x_dense"], limit if is_kept else MORE * kept["x_dense"]))
    return [f"{name}: {new} {what}; at most {most:g}" for what, new, most in pairs if new > most]


def missed(name: str, found: dict[str, Any], limit: float | None) -> list[str]:
    """A line if a call is above its limit: by how much, and which time decides."""
    if limit is None or found["x_dense"] <= limit:
        return []
    times = dict(zip(("issue", "memory", "tensor"), found["issue_memory_tensor_us"], strict=True))
    return [f"missed: {name}: {found['x_dense']} x dense of at most {limit}, by {max(times, key=times.__getitem__)}"]


def limit_of(case: Case, phase: str, architecture: str) -> float | None:
    return case.limits[PHASES.index(phase)] if architecture == "sm_90" else None


def document(calls: dict[str, Any]) -> str:
    """Markdown: the calls on an H100 with x dense on the others, the limits that are missed, and the kernels."""
    columns = ("x_own", "floor_us", "launches", "ours")
    heads = ["layer, forward / with backward", "limit", *(f"x_dense {name}" for name in CARDS), *columns]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    misses, kernels = [], []
    for name, case in CASES.items():
        every = [[calls[f"{name} {phase} {card}"] for phase in PHASES] for card in CARDS]
        pairs = [[most or "-" for most in case.limits], *([each["x_dense"] for each in both] for both in every)]
        pairs += [[each[key] for each in every[1]] for key in columns]
        lines.append(f"| {name} | {' | '.join(f'{first} / {second}' for first, second in pairs)} |")
        for phase, each in zip(PHASES, every[1], strict=True):
            misses += missed(f"{name} {phase}", each, limit_of(case, phase, "sm_90"))
        if case.model == min(each.model for each in CASES.values()):
            for kernel, programs, warps, instructions, barriers, moved, *times in every[1][1]["kernels"]:
                per_token = (round(programs * warps * instructions / TOKENS, 1), barriers, round(moved / TOKENS))
                kernels.append(f"| {name} | `{kernel}` | {' | '.join(map(str, (*per_token, *times)))} |")
    lines += ["", *(f"- {line}" for line in misses), ""]
    heads = ["layer with backward, sm_90", "kernel", "instructions a token", "barriers", "bytes a token"]
    heads += [f"{what} us" for what in ("issue", "memory", "tensor")]
    return "\n".join([*lines, f"| {' | '.join(heads)} |", f"|---|---|{'---:|' * 6}", *kernels])


def main(words: Sequence[str] | None = None) -> int:
    """Returns 1 if something is worse than the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(CARDS), help="separated by commas; default all")
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    parser.add_argument("--write", action="store_true", help="keep the figures instead of comparing them")
    chosen = parser.parse_args(words)
    calls = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    worse_lines: list[str] = []
    for architecture, (name, case), phase in product(chosen.arch.split(","), CASES.items(), PHASES):
        call, limit = f"{name} {phase} {architecture}", limit_of(case, phase, architecture)
        if chosen.only not in call:
            continue
        found = figures(case, phase == "training", architecture)
        print(call, *(f"{key} {value}" for key, value in found.items() if key != "kernels"), sep=", ", flush=True)
        for line in missed(call, found, limit):
            print(line, flush=True)
        if chosen.write:
            calls[call] = found
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in sorted(calls.items()))
            TABLE.write_text(f"{{\n{lines}\n}}\n")
        else:
            kept = calls.get(call)
            worse_lines += worse(call, found, kept, limit) if kept else [f"{call}: not in {TABLE.name}"]
    if chosen.write:
        begin, end, old = "<!-- floors -->\n", "<!-- end of floors -->", DOCUMENT.read_text()
        DOCUMENT.write_text(f"{old.partition(begin)[0]}{begin}{document(calls)}\n{end}{old.partition(end)[2]}")
    sys.stderr.writelines(f"{line}\n" for line in worse_lines)
    return 1 if worse_lines else 0


if __name__ == "__main__":
    sys.exit(main())
