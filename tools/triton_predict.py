"""Predicts how long the Triton kernels take on an H100, compared with the roofline. Nothing here was measured.

For every kernel that a grouped product of T5-base's feed-forward layer launches: launches, FLOPs, bytes, and the time
predicted by the planner's model. ``--doc`` writes the sums into bench/results/ahead-of-time/triton.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from triton_compile import DOC, write_between

from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.backends.triton_work import FLOP_OVERHEAD, PRODUCTS
from mpoe_kernels.linear.gpu.work import Work, rate, weight_work
from mpoe_kernels.linear.triton.cost import ways
from mpoe_kernels.contract import HARDWARE, BlockDims, Step, contractions
from mpoe_kernels.planner.contraction import expected_busy_experts
from mpoe_kernels.planner.cost import step_time
from mpoe_kernels.contract.program import PHASES
from mpoe_kernels.triton.architecture import HARDWARE_NAMES, target_named
from mpoe_kernels.triton.start import Launch, recorded

CARD = HARDWARE["h100"]
ARCHITECTURE = "sm_90"
DTYPE = torch.bfloat16
EXPERTS, TOKENS = (8, 64), (64, 4096, 32768)
# Kernels that compute a program's products tile by tile.
STEPS = ("rows_kernel", "pairs_kernel", "outer_kernel", "blocks_kernel", "weights_kernel")
ACTIVATIONS = {"up": "relu", "down": "none"}


@dataclass(frozen=True)
class Prediction:
    """One launch, or several of the same kernel.

    Attributes:
        kernel: name of the kernel.
        launches: number of launches.
        flops: executed FLOPs, including tile padding and repeated work.
        bytes: bytes moved. Every tensor is moved once; with an expert axis, only the busy experts' part; of rows, only
            those of the launch's experts.
        seconds: from the backend's tile model (`mpoe_kernels.linear.gpu.work`); for other kernels, the planner's.
        roofline: seconds for the product's useful FLOPs and bytes at the data sheet's peak rates; launches are free.
    """

    kernel: str
    launches: int
    flops: float
    bytes: float
    seconds: float
    roofline: float

    def __add__(self, other: Prediction) -> Prediction:
        kernel = self.kernel if self.kernel == other.kernel else "all"
        return Prediction(
            kernel,
            self.launches + other.launches,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.roofline + other.roofline,
        )


def predict(launch: Launch, experts: int, slots: int) -> Prediction:
    """Predict one of the launches of a product of ``slots`` rows with ``experts`` experts."""
    name, arguments = launch.kernel.fn.__name__, launch.arguments
    busy = expected_busy_experts(experts, slots)
    tensors = {id(value): value for value in arguments.values() if isinstance(value, torch.Tensor)}
    together = arguments["offsets"].shape[0] - 1 if "offsets" in arguments else experts
    moved = 0.0
    for tensor in tensors.values():
        part = 1.0
        if tensor.dim() > 1 and tensor.shape[0] == together:
            part = busy / experts
        elif tensor.dim() > 1 and tensor.shape[0] == slots:  # other launches take the other experts' rows
            part = together / experts
        moved += tensor.numel() * tensor.element_size() * part
    step, useful = Step(name, "copy", 0, 0, 0, 1, round(moved), 0), 0.0
    if name in PRODUCTS:
        m, n, k, batch = PRODUCTS[name](arguments, slots / busy)
        alive = max(1, round(batch * busy / experts)) if batch > 1 else 1
        useful = 2.0 * m * n * k * alive
        overhead = FLOP_OVERHEAD[name](arguments) if name in FLOP_OVERHEAD else 1.0
        # The overhead is modelled as extra rows.
        step = Step(name, "grouped_gemm" if batch > 1 else "gemm", m * overhead, n, k, alive, round(moved), 0)
    roofline = max(useful / CARD.peak_flops.of(DTYPE), moved / CARD.bandwidth)
    seconds = step_time(step, DTYPE, CARD).total
    if name in STEPS:
        columns = 2 if name == "pairs_kernel" and arguments["SHARED"] else 1  # else each product reads its own rows
        tile = arguments["BM"], arguments["BN"] * columns, arguments["BK"]
        shared = step.batch > 1 and name == "blocks_kernel" and arguments["SUM"]
        work = Work(ceil(m), n, k * step.batch if shared else k, 1 if shared else step.batch, 0, DTYPE)
        if name == "weights_kernel":
            sizes = (arguments[size] for size in ("M", "CELLS", "K", "S", "N"))
            work = weight_work(*sizes, step.batch, tile[1], DTYPE)
        computing = work.computing(tile, arguments.get("SPLITS", 1), CARD)
        seconds = max(computing, moved / CARD.bandwidth) + CARD.launch_seconds
    return Prediction(name, 1, step.flops, moved, seconds, roofline)


class Choice(NamedTuple):
    """What the backend would run in one phase.

    Attributes:
        phase: ``forward`` or ``backward``.
        strategy: name in the catalogue: one of the planner's, or rebuilding on chip.
        seconds: the backend's prediction when it chooses; pointwise kernels are not included.
    """

    phase: str
    strategy: str
    seconds: float


def choice(dims: BlockDims, experts: int, tokens: int, phase: str) -> Choice:
    """The fastest strategy on the card according to the backend's own prediction."""
    found = []
    for plan in contractions(dims, experts, tokens, DTYPE, phase):
        found += [Choice(phase, *way) for way in ways(plan, target_named(ARCHITECTURE), CARD).items()]
    return min(found, key=lambda each: each.seconds)


def layer(name: str, experts: int, tokens: int, phase: str) -> tuple[list[str], list[Launch]]:
    """Strategies that the backend chooses for the two projections of a layer, and all their launches.

    Only the first projection gathers its rows.
    """
    strategies, found = [], []
    for (direction, activation), shape in zip(ACTIVATIONS.items(), catalogue.shapes()[name], strict=True):
        dims = catalogue.dims_of(shape)
        strategies.append(choice(dims, experts, tokens, phase).strategy)
        with recorded(ARCHITECTURE) as started:
            work = catalogue.WORK[phase](
                *(dims, experts, tokens, DTYPE, strategies[-1], activation), indexed=direction == "up"
            )
            work()
        found += started
    return strategies, found


def predictions(dims: BlockDims, experts: int, tokens: int, plan: Choice, activation: str) -> list[Prediction]:
    """One prediction per kernel that a choice launches, in the order of first launch."""
    with recorded(ARCHITECTURE) as started:
        catalogue.run(plan.phase, dims, experts, tokens, DTYPE, plan.strategy, activation)
    found: dict[str, Prediction] = {}
    for launch in started:
        one = predict(launch, experts, tokens)
        found[one.kernel] = found[one.kernel] + one if one.kernel in found else one
    return list(found.values())


def cases(shapes: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    for experts in EXPERTS:
        for tokens in TOKENS:
            for shape in shapes:
                yield experts, tokens, shape


def _count(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _cells(found: Prediction) -> str:
    flops = _count(found.flops, "FLOP") if found.flops else "-"
    return (
        f"{found.launches} | {flops} | {_count(found.bytes, 'B')} | {found.seconds * 1e6:.1f} | "
        f"{found.roofline * 1e6:.1f}"
    )


def kernel_table(shapes: Sequence[str], experts: int, tokens: int) -> str:
    """Markdown: one row per kernel."""
    lines = [
        "| shape | | strategy | kernel | launches | FLOPs | bytes | predicted us | roofline us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in shapes:
        for (direction, activation), shape in zip(ACTIVATIONS.items(), catalogue.shapes()[name], strict=True):
            dims = catalogue.dims_of(shape)
            for phase in PHASES:
                plan = choice(dims, experts, tokens, phase)
                for found in predictions(dims, experts, tokens, plan, activation):
                    where = f"{name} | {direction} {phase} | {plan.strategy} | {found.kernel}"
                    lines.append(f"| {where} | {_cells(found)} |")
    return "\n".join(lines)


def summary_table(shapes: Sequence[str]) -> str:
    """Markdown: one row per case and phase, up and down projection together."""
    lines = [
        "| E | tokens | shape | | strategies | kernels | launches | FLOPs | bytes | predicted us | roofline us "
        "| choice us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for experts, tokens, name in cases(shapes):
        for phase in PHASES:
            strategies, found, chosen = [], [], 0.0
            for activation, shape in zip(ACTIVATIONS.values(), catalogue.shapes()[name], strict=True):
                dims = catalogue.dims_of(shape)
                plan = choice(dims, experts, tokens, phase)
                strategies.append(plan.strategy)
                chosen += plan.seconds
                found += predictions(dims, experts, tokens, plan, activation)
            kernels: Counter[str] = Counter()
            for one in found:
                kernels[one.kernel.removesuffix("_kernel")] += one.launches
            together = found[0]
            for one in found[1:]:
                together = together + one
            counted = ", ".join(f"{count} {kernel}" for kernel, count in kernels.items())
            where = f"{experts} | {tokens} | {name} | {phase} | {', '.join(strategies)} | {counted}"
            lines.append(f"| {where} | {_cells(together)} | {chosen * 1e6:.1f} |")
    return "\n".join(lines)


def _dense(tokens: int, phase: str) -> float:
    """Seconds of the layer's two dense products, or of their gradients (two products each)."""
    sizes = [(tokens, catalogue.HIDDEN, catalogue.MODEL), (tokens, catalogue.MODEL, catalogue.HIDDEN)]
    if phase == "backward":
        sizes = [order for m, n, k in sizes for order in ((m, k, n), (n, k, m))]
    itemsize = DTYPE.itemsize
    steps = [Step("dense", "gemm", m, n, k, 1, (m * k + k * n) * itemsize, m * n * itemsize) for m, n, k in sizes]
    return sum(step_time(step, DTYPE, CARD).total for step in steps)


def hidden_table() -> str:
    """Markdown: one row per size of the hidden-side experts, number of tokens and phase."""
    lines = [
        "| experts | own blocks | choices | block | tokens | | launches | FLOPs | bytes | predicted us | roofline us "
        "| dense products us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in catalogue.HIDDEN_SIZES:
        for tokens in TOKENS:
            for phase in PHASES:
                with recorded(ARCHITECTURE) as started:
                    catalogue.run_hidden(size, tokens, DTYPE, False, "gelu", phase)
                found = [predict(launch, size.experts, tokens * size.top_k) for launch in started]
                together = found[0]
                for one in found[1:]:
                    together = together + one
                owner = "of a group" if size.per_group else "shared"
                where = f"{size.experts} | {owner} | {size.top_k} | {size.block} | {tokens} | {phase}"
                lines.append(f"| {where} | {_cells(together)} | {_dense(tokens, phase) * 1e6:.1f} |")
    return "\n".join(lines)


def bounds_table() -> str:
    """Markdown: percentage of a card's 16-bit peak that tiles can reach, by matrix instruction."""
    tiles = ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64), (16, 64))
    lines = [
        f"| card | instruction of a | {' | '.join(f'{m} x {n}' for m, n in tiles)} |",
        "|---" * (len(tiles) + 2) + "|",
    ]
    for name in HARDWARE_NAMES.values():
        card = HARDWARE[name]
        for unit in dict.fromkeys(("warp", card.matrix_unit)):
            reached = [rate((m, n, 32), DTYPE, card, unit) / card.peak_flops.of(DTYPE) for m, n in tiles]
            lines.append(f"| {name} | {unit} | {' | '.join(f'{100 * part:.0f}' for part in reached)} |")
    return "\n".join(dict.fromkeys(lines))


def main(words: list[str] | None = None) -> int:
    names = list(catalogue.shapes())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=names, help="default all")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--doc", action="store_true", help="write the sums of all cases into the documentation")
    chosen = parser.parse_args(words)
    for name in ("experts", "tokens"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(chosen, name)}")
    if chosen.doc:
        write_between(DOC, "predictions", summary_table(names))
        write_between(DOC, "hidden", hidden_table())
        write_between(DOC, "bounds", bounds_table())
    else:
        print(kernel_table([chosen.shape] if chosen.shape else names, chosen.experts, chosen.tokens))
        print(hidden_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
