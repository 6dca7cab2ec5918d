"""`python -m mpoe_bench.embedding`: rows of an MPO table against a gather from the full one, and the tied head.

The table is T5's, 32,128 x 768. "x gather" divides by the time of `F.embedding` of the full table, "x linear" by that
of `F.linear` with it (the tied head's logits), forward and backward with their own; the weights' gradients are
computed in both. "x bound" divides by the FLOPs of the cheapest order at the rate of a large product of the same
dtype; of the backward, each product's two gradients count. Medians of interleaved calls in one process, one thread, its
CPU time. Results are compared with float64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpoe_bench.machine import describe
from mpoe_bench.timing import Budget, cpu_measure, interleave
from mpoe_kernels import MPOBlocks, MPOShape, mpo_embedding, mpo_linear
from mpoe_kernels.linear.reference import weight_reference
from mpoe_kernels.planner import BlockDims
from mpoe_kernels.planner.contraction import contractions
from mpoe_kernels.testing.assertions import relative_error
from mpoe_kernels.testing.cases import random_blocks


def embedding_flops(ids: Tensor, dims: BlockDims) -> int:
    """Of the cheaper order for these ids, with every product that rows share computed once."""
    d, ids = dims, ids.unique()
    lefts, rights = (ids // d.iR).unique().numel(), (ids % (d.iC * d.iR)).unique().numel()
    left_first = d.jL * d.jC * d.b * (d.a * lefts + d.jR * ids.numel())
    right_first = d.jC * d.jR * d.a * (d.b * rights + d.jL * ids.numel())
    return 2 * min(left_first, right_first)


def head_flops(rows: int, dims: BlockDims, dtype: torch.dtype, phase: str) -> int:
    """Of the planner's strategy with the fewest."""
    return min(found.flops for found in contractions(dims, 1, rows, dtype, phase))


class Case:
    """One number of rows in one dtype: what both sides compute."""

    def __init__(self, head: bool, rows: int, dtype: torch.dtype, blocks: MPOBlocks) -> None:
        torch.manual_seed(0)
        self.head, self.rows, self.dtype = head, rows, dtype
        sizes, parts = (blocks.in_features, blocks.out_features), (blocks.left, blocks.central, blocks.right)
        self.parts = [part.to(dtype).requires_grad_() for part in parts]
        self.blocks = MPOBlocks(*self.parts, *sizes)
        full = weight_reference(MPOBlocks(*(part.detach().double() for part in self.parts), *sizes), 0)
        self.table = full.to(dtype).requires_grad_()
        self.input = torch.randint(0, blocks.in_features, (rows,))
        if head:
            self.input = torch.randn(rows, blocks.out_features).to(dtype).requires_grad_()
        self.truth = self.input.detach().double() @ full.T if head else full[self.input]
        self.grad = torch.randn(rows, self.truth.shape[1]).to(dtype)
        used = self.blocks.transposed() if head else self.blocks
        dims = BlockDims.of_blocks(used.left, used.central, used.right, used.in_features, used.out_features)
        if head:
            forward, backward = (head_flops(rows, dims, dtype, phase) for phase in ("forward", "backward"))
            self.flops = {"forward": forward, "both": forward + backward}
        else:
            forward = embedding_flops(self.input, dims)
            self.flops = {"forward": forward, "both": 3 * forward}

    def peer(self) -> Tensor:
        return (functional.linear if self.head else functional.embedding)(self.input, self.table)

    def ours(self, backend: str | None) -> Tensor:
        if self.head:
            return mpo_linear(self.input, self.blocks.transposed(), backend=backend)
        return mpo_embedding(self.input, self.blocks, backend=backend)

    def work(self, phase: str, function: Callable[[], Tensor], weights: list[Tensor]) -> Callable[[], object]:
        """A call of ``function``, with its gradients if they are asked for."""

        def forward() -> object:
            with torch.no_grad():
                return function()

        wanted = [*weights, self.input] if self.head else weights
        return forward if phase == "forward" else lambda: torch.autograd.grad(function(), wanted, self.grad)

    def measure(self, backends: list[str], budget: Budget, scale: int) -> Iterator[dict[str, Any]]:
        """A row per backend and phase."""
        square = torch.randn(scale, scale).to(self.dtype)
        for name in backends:
            error = relative_error(self.ours(name), self.truth)
            if error > (1e-5 if self.dtype == torch.float32 else 3e-2):
                raise ValueError(f"{name}, {self.rows} rows of {self.dtype}: the result is off by {error:.1e}")
        for phase in ("forward", "both"):
            functions = {name: self.work(phase, lambda n=name: self.ours(n), self.parts) for name in backends}
            functions |= {
                "full table": self.work(phase, self.peer, [self.table]),
                "large product": lambda: square @ square,
            }
            found = interleave(functions, "full table", budget, cpu_measure(time.thread_time))
            bound = found["large product"].x * self.flops[phase] / (2 * scale**3)  # in times of the full table
            for name in backends:
                yield {
                    "op": "head" if self.head else "embedding",
                    "rows": self.rows,
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "backend": name,
                    "phase": phase,
                    "x_full": found[name].x,
                    "x_bound": found[name].x / bound,
                    "ms": 1e3 * found[name].seconds,
                    "full_ms": 1e3 * found["full table"].seconds,
                    "GFLOP": self.flops[phase] / 1e9,
                }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.embedding", description=__doc__)
    parser.add_argument("--table", default="32128,768", help="rows and columns")
    parser.add_argument("--bond", type=int, default=64)
    parser.add_argument("--rows", default="1,64,512,4096,16384", help="looked up; separated by commas")
    parser.add_argument("--head_rows", default="1,64,512", help="rows of hidden states; empty: no head")
    parser.add_argument("--backends", default="native,eager")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=1.5, help="measured per function")
    parser.add_argument("--scale", type=int, default=2048, help="edge of the large product")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = [int(n) for n in chosen.table.split(",")]
    blocks = random_blocks(MPOShape.paper(*size, max_bond=chosen.bond), 1, torch.float32)
    cases = [(False, int(n)) for n in chosen.rows.split(",") if n]
    cases += [(True, int(n)) for n in chosen.head_rows.split(",") if n]
    measured = []
    print(f"{'':38}{'x gather or linear':>20}{'x bound':>10}{'ms':>10}{'of full table':>15}")
    for head, rows in cases:
        for dtype in chosen.dtypes.split(","):
            case = Case(head, rows, getattr(torch, dtype), blocks)
            for row in case.measure(chosen.backends.split(","), Budget(seconds_each=chosen.seconds), chosen.scale):
                measured.append(row)
                print(
                    f"{row['op']:<10}{rows:>6} {dtype:<9}{row['backend']:<7}{row['phase']:<8}"
                    f"{row['x_full']:>17.2f}{row['x_bound']:>10.2f}{row['ms']:>10.3f}{row['full_ms']:>15.3f}",
                    flush=True,
                )
    if chosen.out is not None:
        result = {"machine": describe("cpu", 1, "cpu"), "rows": measured}
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
