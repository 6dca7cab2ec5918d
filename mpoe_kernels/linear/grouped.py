"""The walk through a program's products: what multiplies rows by blocks, and blocks by one another.

A product with the shared block is one `torch.mm`; a product of every expert's rows with its own
block is one grouped product, by a backend's `Grouped`; blocks are merged by `torch.bmm`. Weights
are built for as many experts at a time as `experts_at_once` allows. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_kernels.contract.orders import BlockDims, applications
from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.contract.precision import float32_mm
from mpoe_kernels.contract.program import (
    GRADIENT,
    KEPT,
    ROWS,
    Product,
    Program,
    program_of,
    value_of,
)
from mpoe_kernels.linear.activation import ACTIVATION
from mpoe_kernels.linear.gradients import (
    Backward,
    Forward,
    Gradients,
    Slots,
    around_gradients,
    experts_at_once,
    parts_of,
)

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall

ON_CHIP = "rebuild on chip"  # name of a candidate whose weights stay on chip
Axes = tuple[str, ...]
LARGEST_INDEX = 2**31 - 1  # rows and columns are counted in 32 bits, addresses in 64
LARGEST_SHARED = 64  # side of a block that one program of Triton's holds beside its gradient


def counting_reasons(plan: Contraction) -> list[str]:
    """Reasons if a contraction has too many rows or columns for 32-bit indices."""
    reasons = []
    steps = applications(plan.dims, plan.order)
    rows = plan.slots * max((step.m for step in steps), default=0)
    if rows > LARGEST_INDEX:
        reasons.append(
            f"strategy {plan.strategy!r} would count {rows} rows; it counts to {LARGEST_INDEX}"
        )
    if plan.dims.weight_elements > LARGEST_INDEX:
        reasons.append(
            f"a weight of {plan.dims.weight_elements} elements is too large; at most "
            f"{LARGEST_INDEX}"
        )
    return reasons


class RowsProduct(NamedTuple):
    """``out[s] = rows[row_index[s]] blocks[e]``; zero for slots after the last expert's, undefined
    for those of experts that are not among these.

    Attributes:
        rows: ``[T or N, p, k]`` of any strides.
        row_index: ``[N]``, or None: slot s reads row s.
        blocks: ``[E, k, m]`` of any strides.
        slots: of these experts.
        out: dense ``[N, p, m]`` to write these experts' rows to, or None: new memory.
        last: the call whose bias, activation and ``out_index`` are applied, or None; like the next
            one only where `Grouped.fuses`.
        turned: rows are read in the order ``[N, m, p]``, and new memory had better have it.
    """

    rows: Tensor
    row_index: Tensor | None
    blocks: Tensor
    slots: Slots
    out: Tensor | None = None
    last: ForwardCall | None = None
    turned: bool = False


class BlocksProduct(NamedTuple):
    """``out[e] = sum of rows[row_index[s]]^T grads[s]`` over the expert's slots and p, ``[E, k,
    m]``; zeros for an expert without slots.

    Attributes:
        rows, row_index, slots: see `RowsProduct`.
        grads: ``[N, p, m]``; with an activation, of its output.
        blocks: None, or from the same reading, where `Grouped.fuses`, the gradients of the rows go
            into ``drows``, and ``rows blocks`` into ``again``. Their sides are `LARGEST_SHARED` at
            most.
        drows: ``[N, p, k]``, with blocks.
        again: ``[N, p, m]``, or None.
        activation: of ``rows blocks``.
    """

    rows: Tensor
    row_index: Tensor | None
    grads: Tensor
    slots: Slots
    blocks: Tensor | None = None
    drows: Tensor | None = None
    again: Tensor | None = None
    activation: str = "none"


class Grouped(Protocol):
    """The two products of rows with blocks that every expert has for itself: by a loop, PyTorch's
    own kernel, or Triton's."""

    fuses: bool  # `rows` applies what comes last, and `blocks` takes blocks too

    def rows(self, product: RowsProduct) -> tuple[Tensor, Tensor | None]:
        """``[N, p, m]``, and the same before the activation if ``last`` saves it."""

    def blocks(self, product: BlocksProduct) -> Tensor:
        """``[E, k, m]``."""


@lru_cache(maxsize=4096)
def _split(axes: Axes, other: Axes) -> tuple[Axes, Axes]:
    """Axes that ``other`` lacks, and those that it has."""
    lacking = tuple(axis for axis in axes if axis not in other)
    common = tuple(axis for axis in axes if axis in other)
    return lacking, common


@lru_cache(maxsize=4096)
def _sizes(dims: BlockDims, axes: Axes) -> tuple[int, ...]:
    return tuple(getattr(dims, axis) for axis in axes)


@lru_cache(maxsize=4096)
def _order(axes: Axes, wanted: Axes) -> tuple[int, ...]:
    """The permutation that brings a tensor ``[n, axes...]`` into another order of its axes."""
    return (0, *[1 + axes.index(axis) for axis in wanted])


@dataclass
class Named:
    """A tensor ``[n, axes...]`` of rows or experts (n = 1: shared by the experts), of any strides.

    Attributes: row_index: the row that each slot reads, if it is not its own.
    """

    data: Tensor
    axes: Axes
    row_index: Tensor | None = None

    def __post_init__(self) -> None:
        self._merged: tuple[tuple[Axes, Axes], Tensor] | None = None

    def arranged(self, axes: Axes) -> Tensor:
        """A view ``[n, axes...]`` in another order."""
        if axes == self.axes:
            return self.data
        return self.data.permute(_order(self.axes, axes))

    def matrices(self, first: Axes, second: Axes) -> Tensor:
        """``[n, first, second]``, each group of axes merged into one; a view if possible. The last
        one is kept: a backward reads a built block twice."""
        if self._merged is None or self._merged[0] != (first, second):
            tensor = self.arranged((*first, *second))
            n, *sizes = tensor.shape
            rows = math.prod(sizes[: len(first)])
            columns = math.prod(sizes[len(first) :])
            merged = tensor.reshape(n, rows, columns)
            self._merged = ((first, second), merged)
        return self._merged[1]

    def factors(self, first: Axes, second: Axes) -> Tensor:
        """`matrices` for a product that takes both layouts: a copy has runs as the block has."""
        if self.axes[-1] in first:
            return self.matrices(second, first).mT
        return self.matrices(first, second)


@dataclass
class Pass:
    """The products of a whole call.

    Attributes:
        call: the call.
        program: what is computed.
        grouped: the grouped products.
        rows: rows that are given, by name; ``d y`` before the activation if `late`.
        wanted: names of what is to be kept.
        results: that, of all experts: rows ``[N, axes...]``, gradients ``[E, axes...]``.
        memory: wanted rows that one part after another writes, by name.
        finished: y after bias and activation, and before, if its product did that.
        shared: results of products that were computed with an earlier one, by name.
        slots: those of the part that is computed.
    """

    call: ForwardCall | BackwardCall
    program: Program
    grouped: Grouped
    rows: dict[str, Tensor]
    wanted: list[str]
    results: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    finished: tuple[Tensor, Tensor | None] | None = None
    shared: dict[str, Named] = field(default_factory=dict)
    slots: Slots = field(init=False)

    def run(self, parts: Sequence[Slots] | None) -> None:
        """Compute all products, for one part of the experts after the other; see `forward`."""
        call = self.call
        size = experts_at_once(call.dims, self.program.built, call.num_experts)
        for part in parts_of(call, size) if parts is None else parts:
            self.slots = part
            self._run_part()

    def shares(self, product: Product) -> bool:
        """Whether one launch gives gradients of rows that are given and of the block that
        multiplied them."""
        if not self.grouped.fuses:
            return False
        program = self.program
        before = value_of(product.result)
        block = product.second
        if product.result == before or before not in self.rows:
            return False
        if block == "C" or program.built:
            return False
        if self.call.x.element_size() != 2:  # without tensor cores, the kernel spills registers
            return False
        if all(other.result != f"d {block}" for other in program.products):
            return False
        for name in (before, product.first):
            _, side = _split(program.axes[block], program.axes[name])
            if math.prod(_sizes(self.call.dims, side)) > LARGEST_SHARED:
                return False
        return True

    @property
    def late(self) -> bool:
        """Whether a product that `shares` applies the activation's gradient, whose input it
        computes again."""
        if self.call.bias is not None or not self.grouped.fuses:
            return False
        for product in self.program.products:
            if product.first == "d y" and product.kind == ROWS:
                return self.shares(product)
        return False

    def result(self, name: str, columns: int) -> Tensor:
        """Rows ``[N, columns]``."""
        rows = self.results.get(name)
        if rows is None:
            return self.call.x.new_zeros(self.call.slots, columns)
        return rows.flatten(1)[:, :columns]

    def block(self, name: str, like: Tensor) -> Tensor | None:
        """The gradient of a block if it was wanted."""
        gradient = f"d {name}"
        if gradient not in self.wanted:
            return None
        if gradient not in self.results:
            return torch.zeros_like(like)
        return self.results[gradient].reshape(like.shape).to(like.dtype)

    def _keep(self, name: str, result: Named) -> None:
        """Puts a part's result to those of the others."""
        axes = self.program.axes[name]
        part = result.arranged(axes)
        whole = self.results.get(name)
        if not self.slots.is_part:
            whole = part
        elif name in self.memory:
            whole = self._named(self.memory[name], result.axes).arranged(axes)
        elif name == "d C":
            whole = part if whole is None else whole.add_(part)
        else:
            if whole is None:
                whole = part.new_zeros(self.call.num_experts, *part.shape[1:])
            whole[self.slots.experts] = part
        self.results[name] = whole

    def _run_part(self) -> None:
        """A tensor lives until its last reader has run, so no weight of one part is alive when the
        next one's are built."""
        values: dict[str, Named] = {}
        for product in self.program.products:
            for name in (product.first, product.second):
                if name not in values:
                    values[name] = self._given(name)
            first = values[product.first]
            second = values[product.second]
            if product.result in self.shared:
                result = self.shared.pop(product.result)
            elif product.kind == ROWS:
                result = self._rows(product, first, second)
            elif product.kind == GRADIENT:
                result = self._gradient(product, first, second)
            else:
                result = self._merge(product, first, second)
            if product.result in self.wanted:
                self._keep(product.result, result)
            values[product.result] = result
            del first, second, result
            for name in product.last_reads:
                del values[name]

    def _given(self, name: str) -> Named:
        """What is not the result of a product."""
        call = self.call
        axes = self.program.axes[name]
        if name == "C":
            return Named(call.central.unsqueeze(0), axes)
        if name in ("L", "R"):
            blocks = call.left if name == "L" else call.right
            block = blocks[self.slots.experts]
            if self.program.built and self.slots.of_experts is None:
                # What is built from an idle expert's block must be finite: zero times it is added
                # to sums.
                busy = self.slots.busy[:, None, None, None]
                block = torch.where(busy, block, 0)
            return Named(block, axes)
        rows = self.rows[name]
        row_index = None
        if name == "x":
            row_index = call.row_index
        if self.slots.of_experts is not None:
            if row_index is None:
                rows = rows[self.slots.rows]
            else:
                rows = rows.index_select(0, row_index[self.slots.rows])
                row_index = None
        sizes = _sizes(call.dims, axes)
        padding = math.prod(sizes) - rows.shape[1]
        if padding:
            rows = F.pad(rows, (0, padding))
        return Named(rows.view(rows.shape[0], *sizes), axes, row_index)

    def _named(self, data: Tensor, axes: Axes) -> Named:
        sizes = _sizes(self.call.dims, axes)
        return Named(data.reshape(data.shape[0], *sizes), axes)

    def _owned(self, name: str, rows: Named) -> Named:
        """Rows by slot, zero where no expert owns the slot: products' results are, what is given
        need not be."""
        if name not in self.rows:
            return rows
        data = rows.data
        if rows.row_index is not None:
            data = data.index_select(0, rows.row_index)
        return Named(self.slots.clear(data), rows.axes)

    def _rows(self, product: Product, rows: Named, operand: Named) -> Named:
        """Rows meet an operand."""
        if self.shares(product):
            return self._both(product, rows, operand)
        kept, met = _split(rows.axes, operand.axes)
        _, new = _split(self.program.axes[product.result], operand.axes)
        if product.second == "C":
            if self._moves(rows) <= operand.data.numel():
                _, met = _split(operand.axes, met)  # in the order of C, which then is no copy
            _, new = _split(operand.axes, new)
            rows = self._owned(product.first, rows)
            matrix = rows.matrices(kept, met)
            (block,) = operand.matrices(met, new)
            data = matrix.flatten(0, 1) @ block
            data = data.view(*matrix.shape[:2], block.shape[1])
            out = self._part_of_rows(product.result, data, block.shape[1])
            if out is not None:
                out.copy_(data)
            return self._named(data, (*kept, *new))
        matrix = rows.matrices(kept, met)
        blocks = operand.factors(met, new)
        out = self._part_of_rows(product.result, matrix, blocks.shape[2])
        turned = self._turned(product.result, kept, new)
        axes = (*kept, *new)
        last = self._finishing(product, (*new, *kept) if turned else axes)
        data, pre = self.grouped.rows(
            RowsProduct(matrix, rows.row_index, blocks, self.slots, out, last, turned)
        )
        result = self._named(data, axes)
        if last is not None:
            order = self._order(product.result)
            y = result.arranged(order).flatten(1)
            z = None
            if pre is not None:
                z = self._named(pre, axes).arranged(order).flatten(1)
            self.finished = y, z
        return result

    def _part_of_rows(self, name: str, like: Tensor, columns: int) -> Tensor | None:
        """A part's place in wanted rows ``[N, p, columns]`` of all; None for others."""
        if name not in self.wanted or not self.slots.is_part:
            return None
        if name not in self.memory:
            self.memory[name] = like.new_zeros(self.call.slots, like.shape[1], columns)
        return self.memory[name][self.slots.rows]

    def _moves(self, rows: Named) -> int:
        """Elements to be moved if rows are to have the order of C; kernels that fuse write them in
        it."""
        if self.grouped.fuses:
            return 0
        return rows.data.numel()

    def _both(self, product: Product, grads: Named, operand: Named) -> Named:
        """The gradient of rows. That of the block, and the rows after it if they are read, wait for
        their turn."""
        name = value_of(product.result)
        after = value_of(product.first)
        block = product.second
        before = self._given(name)
        shared = self.shared
        kept, met = _split(before.axes, operand.axes)
        _, new = _split(self.program.axes[after], operand.axes)
        rows = before.matrices(kept, met)
        of_rows = grads.matrices(kept, new)
        drows = self._memory(product.result, rows, kept, met)
        again = None
        place = self.program.products.index(product)
        if any(later.result == after for later in self.program.products[place:]):
            again = self._memory(after, rows, kept, new)
            shared[after] = self._named(again, (*kept, *new))
        activation = "none"
        if after == "y" and self.late:
            activation = self.call.activation
        dblocks = self.grouped.blocks(
            BlocksProduct(
                rows,
                before.row_index,
                of_rows,
                self.slots,
                operand.matrices(met, new),
                drows,
                again,
                activation,
            )
        )
        shared[f"d {block}"] = self._named(dblocks, (*met, *new))
        return self._named(drows, (*kept, *met))

    def _memory(self, result: str, like: Tensor, kept: Axes, last: Axes) -> Tensor:
        """``[N, kept, last]``, uninitialised."""
        slots = self.slots.count
        p = like.shape[1]
        m = math.prod(_sizes(self.call.dims, last))
        if self._turned(result, kept, last):
            return like.new_empty(slots, m, p).transpose(1, 2)
        return like.new_empty(slots, p, m)

    def _turned(self, result: str, kept: Axes, new: Axes) -> bool:
        """Whether rows of a result had better be in memory with the axes that are new before those
        that are kept."""
        order = self._order(result)
        if not self.grouped.fuses or self._follows((*kept, *new), order):
            return False
        return self._follows((*new, *kept), order)

    def _order(self, result: str) -> Axes:
        """In which the rows of a result are wanted, or read: by the shared product, which then need
        not copy C."""
        if result in ("y", "d x"):
            return self.program.axes[result]
        return self.program.axes["C"]

    def _follows(self, axes: Axes, order: Axes) -> bool:
        """Whether axes of more than one element are all in an order, and one after the other."""
        wide = [axis for axis in axes if getattr(self.call.dims, axis) > 1]
        return wide == [axis for axis in order if axis in wide]

    def _finishing(self, product: Product, axes: Axes) -> ForwardCall | None:
        """The call if a grouped product gives ``y [N, F]`` as it is, so that it may do what comes
        last."""
        dims = self.call.dims
        if product.result != "y" or self.slots.is_part or not self.grouped.fuses:
            return None
        if dims.out_features != dims.jL * dims.jC * dims.jR:
            return None
        if not self._follows(axes, self._order("y")):
            return None
        return self.call  # type: ignore[return-value]

    def _gradient(self, product: Product, rows: Named, grads: Named) -> Named:
        """An operand's gradient."""
        axes = self.program.axes[product.result]
        shared, m = _split(rows.axes, axes)
        _, n = _split(grads.axes, axes)
        if product.result == "d C":
            rows = self._owned(product.first, rows)
            grads = self._owned(product.second, grads)
            _, in_order_m = _split(axes, m)
            _, in_order_n = _split(axes, n)
            moved = 0
            if m != in_order_m:
                moved += self._moves(rows)
            if n != in_order_n:
                moved += self._moves(grads)
            if moved < math.prod(_sizes(self.call.dims, axes)):
                # As C has them: its gradient is no copy.
                m = in_order_m
                n = in_order_n
            before = rows.matrices(shared, m).flatten(0, 1)
            after = grads.matrices(shared, n).flatten(0, 1)
            data = float32_mm(before.T, after) if self.slots.is_part else before.T @ after
            return self._named(data.unsqueeze(0), (*m, *n))
        before = rows.matrices(shared, m)
        after = grads.matrices(shared, n)
        data = self.grouped.blocks(BlocksProduct(before, rows.row_index, after, self.slots))
        gradient = self._named(data, (*m, *n))
        if product.result == "d W":  # both its readers take it so; now nothing else is built
            return Named(gradient.arranged(axes).contiguous(), axes)
        return gradient

    def _merge(self, product: Product, first: Named, second: Named) -> Named:
        """Two operands make a third."""
        axes = self.program.axes[product.result]
        _, met = _split(first.axes, second.axes)
        _, m = _split(axes, first.axes)
        _, n = _split(axes, second.axes)
        if product.result == "d C":
            before = first.matrices(met, m).flatten(0, 1)
            after = second.matrices(met, n).flatten(0, 1)
            data = float32_mm(before.T, after)
            return self._named(data.unsqueeze(0), (*m, *n))
        p = first.matrices(m, met)
        q = second.matrices(met, n)
        experts = q.shape[0]
        if experts == 1:
            data = p.flatten(0, 1) @ q[0]
            data = data.view(p.shape[0], p.shape[1], -1)
        else:
            data = torch.bmm(p.expand(experts, -1, -1), q)
        return self._named(data, (*m, *n))


def forward(call: ForwardCall, grouped: Grouped, parts: Sequence[Slots] | None = None) -> Forward:
    """``(y, h, z)``, see `ForwardCall`.

    Args:
        call: of the op.
        grouped: the products.
        parts: the experts at once and their slots, one part after the other; by default as
            `experts_at_once` allows, without reading the offsets.
    """
    dims = call.dims
    x = call.x
    wanted = ["y"]
    if call.saves_h:
        wanted.append(KEPT)
    program = program_of(dims, call.strategy, "forward")
    whole = Pass(call, program, grouped, {"x": x}, wanted)
    whole.run(parts)
    h = x.new_empty(0)
    if call.saves_h:
        h = whole.result(KEPT, dims.jC * dims.b).reshape(-1, dims.b)
    if whole.finished is not None:
        y, z = whole.finished
    else:
        slots = Slots(call.expert_offsets, call.slots)
        z = whole.result("y", call.out_features)
        if call.bias is not None:
            z += call.bias
            if parts is None or sum(part.count for part in parts) < call.slots:
                z = slots.clear(z)
        y = ACTIVATION[call.activation](z)
        if call.out_index is not None:
            assert call.gates is not None, "out_index comes with gates"
            gates = call.gates[call.out_index][:, None]
            gated = y.float() * gates  # y is rounded first, as in `combine`
            placed = slots.clear(gated.to(y.dtype))
            y = torch.empty_like(y).index_copy_(0, call.out_index, placed)
    if z is None or not call.saves_z:
        z = x.new_empty(0)
    return y.contiguous(), h.contiguous(), z.contiguous()


def backward(
    call: BackwardCall, grouped: Grouped, parts: Sequence[Slots] | None = None
) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`; ``parts`` as in `forward`."""
    need = call.need_of_plan
    h = call.saved_h
    needs = [need]
    if parts is not None and call.strategy == "rebuild":
        # x's gradient before the others: two weights are never alive beside the half of one, which
        # is built twice.
        needs = [(need[0], False, False, False), (False, *need[1:])]
    programs = []
    for of_pass in needs:
        programs.append(program_of(call.dims, call.strategy, "backward", of_pass, h is not None))
    rows = {"x": call.x}
    if h is not None:
        rows[KEPT] = h.view(call.slots, -1)
    wanted = []
    for name, needed in zip(("d x", "d L", "d C", "d R"), need, strict=True):
        if needed:
            wanted.append(name)
    whole = Pass(call, programs[0], grouped, rows, wanted)

    def gradients(dz: Tensor) -> Gradients:
        rows["d y"] = dz
        for program in programs:
            whole.program = program
            whole.run(parts)
        dx = None
        if need[0]:
            dx = whole.result("d x", call.in_features)
        dleft = whole.block("L", call.left)
        dcentral = whole.block("C", call.central)
        dright = whole.block("R", call.right)
        return dx, dleft, dcentral, dright

    return around_gradients(call, gradients, whole.late)
