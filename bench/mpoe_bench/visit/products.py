"""Every product of every strategy alone, beside the library's GEMM of the same sizes: products.jsonl.

On a GPU each is captured in a CUDA graph, so that the figures are the kernel's and not its launch's. FLOPs are those of
the product; bytes those of its operands, each once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.section import failure_text
from mpoe_bench.timing import Budget, cpu_measure, cuda_measure, interleave
from mpoe_bench.visit.candidates import Case, Operands, plans
from mpoe_bench.visit.lines import Deadline, Lines, finish, parse
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.linear.gpu.products import BlockGradients, Pass, blocks_of, walk
from mpoe_kernels.planner.orders import AXES, BlockDims
from mpoe_kernels.planner.program import KEPT
from mpoe_kernels.registry import backend_reasons
from mpoe_kernels.testing.graphs import CaptureError, graphed

BUDGET = Budget(seconds_each=0.03, sample_seconds=0.001, min_rounds=5, max_rounds=11)


def cases(tiny: bool) -> Iterator[tuple[Case, str]]:
    """Cases with a strategy."""
    sizes, slots, experts = (((48, 96),), (16,), (4,)) if tiny else (((768, 3072), (4096, 16384)), (4096, 64), (8, 64))
    for model, hidden in sizes:
        for count in slots:
            for many in experts:
                for shape, strategy in (
                    ("separable", "separable"),
                    ("paper_6" if tiny else "paper_64", "chain"),
                    ("paper_6" if tiny else "paper_64", "half_left"),
                    ("paper_6" if tiny else "paper_64", "rebuild"),
                ):
                    yield Case(shape, model, hidden, many, count), strategy


@dataclass
class Timed:
    """Primitives of a backend; each product is timed when it is asked for, beside the library's.

    Attributes:
        inner: computes.
        device: of the tensors.
        rows: what was measured.
    """

    inner: Any
    device: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        return like.new_empty(rows, columns)

    def rows_times_block(
        self, rows: Operand, operand: Operand, dims: BlockDims, offsets: Tensor, slots: int, **options: Any
    ) -> Operand:
        m, k, n = _extents(rows.axes, operand.axes, dims)
        library = (
            _grouped(rows.data, slots * m, k, n, offsets, m) if operand.outer else _dense(rows.data, slots * m, k, n)
        )
        what = f"rows {slots * m}x{k} by {'E x ' if operand.outer else ''}{k}x{n}"
        return self._time(
            *(what, 2 * slots * m * k * n, (rows, operand, options["out"]), library),
            lambda: self.inner.rows_times_block(rows, operand, dims, offsets, slots, **options),
        )

    def block_gradient(
        self, rows: Operand, grads: Operand, name: str, dims: BlockDims, offsets: Tensor, **options: Any
    ) -> Operand:
        axes = frozenset(AXES[name])
        shared = dims.elements(rows.axes & grads.axes)
        m, n, slots = dims.elements(axes & rows.axes), dims.elements(axes & grads.axes), grads.data.shape[0]
        what, library = f"gradient {m}x{n} over {slots * shared} rows", _dense(rows.data, m, slots * shared, n)
        return self._time(
            *(what, 2 * slots * shared * m * n, (rows, grads, options["out"]), library),
            lambda: self.inner.block_gradient(rows, grads, name, dims, offsets, **options),
        )

    def merge_blocks(
        self, first: Operand, second: Operand, out: Operand, dims: BlockDims, offsets: Tensor, **options: Any
    ) -> Operand:
        m, k, n = _extents(first.axes, second.axes, dims)
        experts = offsets.shape[0] - 1
        a, b = first.data.new_ones(experts, m, k), first.data.new_ones(experts, k, n)
        return self._time(
            *(f"merge {experts} x {m}x{k} by {k}x{n}", 2 * experts * m * k * n, (first, second, out)),
            *(lambda: torch.bmm(a, b), lambda: self.inner.merge_blocks(first, second, out, dims, offsets, **options)),
        )

    def weight_of_blocks(
        self,
        outer: Operand,
        core: Operand,
        half: Operand,
        other: Operand,
        out: Operand,
        dims: BlockDims,
        offsets: Tensor,
    ) -> bool:
        def build() -> bool:
            return self.inner.weight_of_blocks(outer, core, half, other, out, dims, offsets)

        if not build():
            return False  # two launches, which come as merges
        experts = offsets.shape[0] - 1
        products = (_extents(a.axes, b.axes, dims) for a, b in ((outer, core), (half, other)))
        flops = sum(2 * experts * math.prod(sizes) for sizes in products)
        self._time(f"{experts} weights in one launch", flops, (outer, core, other, out), None, build)
        return True

    def _time(
        self,
        what: str,
        flops: int,
        operands: tuple[Operand, ...],
        library: Callable[[], object] | None,
        function: Callable[[], Any],
    ) -> Any:
        found = function()
        functions: dict[str, Callable[[], object]] = {"ours": function}
        if library is not None:
            functions["library"] = library
        ready, reasons = {}, {}
        for name, each in functions.items():
            try:
                ready[name] = graphed(each) if self.device == "cuda" else each
            except CaptureError:
                raise  # the process is spoilt: nothing after it can be trusted
            except Exception as failure:  # of whatever kind: the other one is timed
                reasons[name] = failure_text(failure)
        timings = interleave(ready, None, BUDGET, cuda_measure() if self.device == "cuda" else cpu_measure())
        row: dict[str, Any] = {"product": what, "seconds": {n: t.seconds for n, t in timings.items()}}
        if "ours" in timings:
            seconds = timings["ours"].seconds
            moved = sum(operand.data.numel() * operand.data.element_size() for operand in operands)
            row |= {"tflops": flops / seconds / 1e12, "gbytes": moved / seconds / 1e9}
        self.rows.append(row | ({"reasons": reasons} if reasons else {}))
        return found


def _extents(one: frozenset[str], other: frozenset[str], dims: BlockDims) -> tuple[int, int, int]:
    """``m, k, n`` of a contraction of two operands."""
    m, k, n = (dims.elements(axes) for axes in (one - other, one & other, other - one))
    return m, k, n


def _dense(like: Tensor, m: int, k: int, n: int) -> Callable[[], object]:
    a, b = like.new_ones(m, k), like.new_ones(k, n)
    return lambda: a @ b


def _grouped(like: Tensor, m: int, k: int, n: int, offsets: Tensor, factor: int) -> Callable[[], object] | None:
    """PyTorch's grouped product of the same rows; it takes bfloat16 and multiples of 16 bytes alone."""
    if like.dtype != torch.bfloat16 or k % 8 or n % 8:
        return None
    a, b = like.new_ones(m, k), like.new_ones(offsets.shape[0] - 1, k, n)
    ends = (offsets[1:] * factor).to(torch.int32)
    return lambda: F.grouped_mm(a, b, offs=ends)


def backends() -> dict[str, Any]:
    """Primitives that launch on this machine's GPU, or that an interpreter runs here."""
    found = {}
    if not backend_reasons().get("triton", ["not known"]):
        from mpoe_kernels.linear.triton.launch import LAUNCHES

        found["triton"] = LAUNCHES
    return found


def measure(case: Case, strategy: str, device: str, primitives: Any) -> list[dict[str, Any]]:
    """Rows of all products, forward and backward."""
    operands = Operands(case, device)
    timed, h = Timed(primitives, device), None
    for phase in ("forward", "backward"):
        (plan,) = [each for each in plans(operands, phase) if each.strategy == strategy]
        y = operands.grad.new_empty(case.slots, case.rows_out)
        values = {"x": operands.x, **blocks_of(*operands.blocks)}
        if phase == "forward":
            values["y"] = y
            if strategy == "separable":
                h = values[KEPT] = y.new_empty(case.slots, operands.dims.jC * operands.dims.b)
        else:
            gradients = BlockGradients.begun(primitives, plan.program, tuple(operands.blocks))  # type: ignore[arg-type]
            values |= {"d y": operands.grad, "d x": torch.empty_like(operands.x), **gradients.values()}
            values |= {} if h is None else {KEPT: h}
        first = len(timed.rows)
        walk(Pass(plan.program, operands.dims, operands.offsets, case.slots, values), timed)
        for row in timed.rows[first:]:
            row["phase"] = phase
    return timed.rows


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing; see the module."""
    chosen = parse("products", __doc__ or "", words)
    lines, deadline = Lines(chosen.out / "products.jsonl"), Deadline.of_minutes(chosen.minutes)
    kept, done, wrong = len(lines.rows), 0, []
    todo = [
        (f"{backend} {strategy} {case.name}", case, strategy, primitives)
        for case, strategy in cases(chosen.device == "cpu")
        for backend, primitives in backends().items()
    ]
    todo = [each for each in todo if each[0] not in lines.rows]
    for name, case, strategy, primitives in todo:
        if deadline.passed:
            break
        try:
            rows = measure(case, strategy, chosen.device, primitives)
        except CaptureError:
            raise
        except Exception as failure:  # of whatever kind: the other cases are measured, and the part has failed
            wrong.append(f"{name}: {failure_text(failure)}")
            continue
        lines.add(name, {"products": rows})
        done += 1
        best = max((row.get("tflops", 0.0) for row in rows), default=math.nan)
        print(f"{name}: {len(rows)} products, at most {best:.3f} TFLOP/s", flush=True)
    return finish("products", done, kept, todo[done + len(wrong) :], wrong)


if __name__ == "__main__":
    sys.exit(main())
