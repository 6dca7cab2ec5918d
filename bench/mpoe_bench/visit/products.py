"""Every product of every strategy alone, compared with the library's GEMM of the same sizes: products.jsonl.

On a GPU each is captured in a CUDA graph, so that the kernel is timed and not its launch. FLOPs are those of the
product; bytes are those of its operands, each counted once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.section import failure_text
from mpoe_bench.timing import Budget, cpu_measure, cuda_measure, interleave
from mpoe_bench.visit.candidates import Case, Operands, plans
from mpoe_bench.visit.lines import Deadline, Lines, finish, parse
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.linear.gpu.primitives import Pair, Rows, Sum
from mpoe_kernels.linear.gpu.products import BlockGradients, Pass, blocks_of, walk
from mpoe_kernels.planner.program import KEPT
from mpoe_kernels.registry import backend_reasons
from mpoe_kernels.testing.graphs import CaptureError, graphed

BUDGET = Budget(seconds_each=0.03, sample_seconds=0.001, min_rounds=5, max_rounds=11)


def cases(tiny: bool) -> Iterator[tuple[Case, str]]:
    """Cases, each with a strategy."""
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
    """Primitives of a backend; each product is timed when it is requested, interleaved with the library's.

    Attributes:
        inner: the primitives that compute.
        device: of the tensors.
        measured: one row for each product.
    """

    inner: Any
    device: str
    measured: list[dict[str, Any]] = field(default_factory=list)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        return like.new_empty(rows, columns)

    def rows(self, product: Rows) -> None:
        (m, k, n), slots, like = _extents(product), product.slots, product.first.data
        grouped = product.second.outer != 0
        library = _grouped(like, slots * m, k, n, product.offsets, m) if grouped else _dense(like, slots * m, k, n)
        what = f"rows {slots * m}x{k} by {'E x ' if grouped else ''}{k}x{n}"
        self._time(what, 2 * slots * m * k * n, _operands(product), library, partial(self.inner.rows, product))

    def gradient(self, product: Sum) -> None:
        out, dims, slots = product.out, product.dims, product.second.data.shape[0]
        rows = slots * dims.elements(product.summed)
        m, n = (dims.elements(out.axes & operand.axes) for operand in (product.first, product.second))
        what, library = f"gradient {m}x{n} over {rows} rows", _dense(product.first.data, m, rows, n)
        self._time(what, 2 * rows * m * n, _operands(product), library, partial(self.inner.gradient, product))

    def merge(self, product: Sum) -> None:
        (m, k, n), experts, like = _extents(product), product.experts, product.first.data
        a, b = like.new_ones(experts, m, k), like.new_ones(experts, k, n)
        what = f"merge {experts} x {m}x{k} by {k}x{n}"
        compute = partial(torch.bmm, a, b), partial(self.inner.merge, product)
        self._time(what, 2 * experts * m * k * n, _operands(product), *compute)

    def weight(self, half: Sum, whole: Sum) -> bool:
        build = partial(self.inner.weight, half, whole)
        if not build():
            return False  # two launches, which are requested as merges
        flops = sum(2 * product.experts * math.prod(_extents(product)) for product in (half, whole))
        operands = (*half.centre_last(), whole.centre_last()[0], whole.out)
        self._time(f"{whole.experts} weights in one launch", flops, operands, None, build)
        return True

    def _time(
        self,
        what: str,
        flops: int,
        operands: tuple[Operand, ...],
        library: Callable[[], object] | None,
        function: Callable[[], object],
    ) -> None:
        function()
        functions: dict[str, Callable[[], object]] = {"ours": function}
        if library is not None:
            functions["library"] = library
        ready, reasons = {}, {}
        for name, each in functions.items():
            try:
                ready[name] = graphed(each) if self.device == "cuda" else each
            except CaptureError:
                raise  # the process is spoilt: no later result can be trusted
            except Exception as failure:  # any failure: the other function is timed
                reasons[name] = failure_text(failure)
        timings = interleave(ready, None, BUDGET, cuda_measure() if self.device == "cuda" else cpu_measure())
        row: dict[str, Any] = {"product": what, "seconds": {n: t.seconds for n, t in timings.items()}}
        if "ours" in timings:
            seconds = timings["ours"].seconds
            moved = sum(operand.data.numel() * operand.data.element_size() for operand in operands)
            row |= {"tflops": flops / seconds / 1e12, "gbytes": moved / seconds / 1e9}
        self.measured.append(row | ({"reasons": reasons} if reasons else {}))


def _operands(product: Pair) -> tuple[Operand, ...]:
    return product.first, product.second, product.out


def _extents(product: Pair) -> tuple[int, int, int]:
    """``m, k, n``."""
    axes = product.first_alone, product.summed, product.second_alone
    m, k, n = (product.dims.elements(each) for each in axes)
    return m, k, n


def _dense(like: Tensor, m: int, k: int, n: int) -> Callable[[], object]:
    a, b = like.new_ones(m, k), like.new_ones(k, n)
    return lambda: a @ b


def _grouped(like: Tensor, m: int, k: int, n: int, offsets: Tensor, factor: int) -> Callable[[], object] | None:
    """PyTorch's grouped product of the same rows; it takes only bfloat16 and rows of a multiple of 16 bytes."""
    if like.dtype != torch.bfloat16 or k % 8 or n % 8:
        return None
    a, b = like.new_ones(m, k), like.new_ones(offsets.shape[0] - 1, k, n)
    ends = (offsets[1:] * factor).to(torch.int32)
    return lambda: F.grouped_mm(a, b, offs=ends)


def backends() -> dict[str, Any]:
    """Primitives by backend that launch on this machine's GPU, or that an interpreter runs here."""
    found = {}
    if not backend_reasons().get("triton", ["not known"]):
        from mpoe_kernels.linear.triton.launch import LAUNCHES

        found["triton"] = LAUNCHES
    return found


def measure(case: Case, strategy: str, device: str, primitives: Any) -> list[dict[str, Any]]:
    """The rows of all products, forward and backward."""
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
        first = len(timed.measured)
        walk(Pass(plan.program, operands.dims, operands.offsets, case.slots, values), timed)
        for row in timed.measured[first:]:
            row["phase"] = phase
    return timed.measured


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
        except Exception as failure:  # any failure: the other cases are measured, and the part fails
            wrong.append(f"{name}: {failure_text(failure)}")
            continue
        lines.add(name, {"products": rows})
        done += 1
        best = max((row.get("tflops", 0.0) for row in rows), default=math.nan)
        print(f"{name}: {len(rows)} products, at most {best:.3f} TFLOP/s", flush=True)
    return finish("products", done, kept, todo[done + len(wrong) :], wrong)


if __name__ == "__main__":
    sys.exit(main())
