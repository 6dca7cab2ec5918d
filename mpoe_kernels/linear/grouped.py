"""The grouped product on a GPU: a program's products for all experts at once, and what surrounds
them.

Nothing here waits for the GPU. A product with the shared block is one `torch.mm`; a product of
every expert's rows with its own block is one grouped product, see `Grouped`; blocks are merged by
`torch.bmm`. Weights are built for as many experts at a time as `experts_at_once` allows. It also
runs on CPUs, in tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_kernels.contract.orders import applications
from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.contract.precision import float32_mm
from mpoe_kernels.contract.program import KEPT, ROWS, Product, Program, program_of, run, value_of
from mpoe_kernels.linear.eager.activation import ACTIVATION
from mpoe_kernels.linear.gradients import (
    Backward,
    Forward,
    Gradients,
    Slots,
    around_gradients,
    experts_at_once,
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
    rows = max((step.m * plan.slots for step in applications(plan.dims, plan.order)), default=0)
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
        last: the call whose bias, activation and ``out_index`` are applied, or None.
        out: dense ``[N, p, m]`` to write these experts' rows to, or None: new memory.
        turned: rows are read in the order ``[N, m, p]``, and new memory had better have it.
    """

    rows: Tensor
    row_index: Tensor | None
    blocks: Tensor
    slots: Slots
    last: ForwardCall | None = None
    out: Tensor | None = None
    turned: bool = False


class BlocksProduct(NamedTuple):
    """``out[e] = sum of rows[row_index[s]]^T grads[s]`` over the expert's slots and p, ``[E, k,
    m]``; zeros for an expert without slots.

    Attributes:
        rows, row_index, slots: see `RowsProduct`.
        grads: ``[N, p, m]``; with an activation, of its output.
        blocks: None, or from the same reading, where `Grouped.shares`, the gradients of the rows go
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
    """The two products of rows with blocks that every expert has for itself: the library's, or
    Triton's."""

    shares: bool  # `blocks` takes blocks too

    def rows(self, given: RowsProduct) -> tuple[Tensor, Tensor | None]:
        """``[N, p, m]``, and the same before the activation if ``last`` saves it."""

    def blocks(self, given: BlocksProduct) -> Tensor:
        """``[E, k, m]``."""


def finished(call: ForwardCall, z: Tensor, owned: Tensor) -> tuple[Tensor, Tensor | None]:
    """y, and z with the bias if it is saved, from the products ``[N, F]``, which are zero where not
    ``owned``."""
    if call.bias is not None:
        z = torch.where(owned[:, None], z + call.bias, 0)
    return ACTIVATION[call.activation](z), z if call.saves_z else None


def _split(axes: Axes, other: Axes) -> tuple[Axes, Axes]:
    """Axes that ``other`` lacks, and those that it has."""
    return tuple(a for a in axes if a not in other), tuple(a for a in axes if a in other)


@dataclass(frozen=True)
class Named:
    """A tensor ``[n, axes...]`` of rows or experts (n = 1: shared by the experts), of any strides.

    Attributes: row_index: the row that each slot reads, if it is not its own.
    """

    data: Tensor
    axes: Axes
    row_index: Tensor | None = None

    def arranged(self, axes: Axes) -> Tensor:
        """A view ``[n, axes...]`` in another order."""
        return self.data.permute(0, *(1 + self.axes.index(axis) for axis in axes))

    def matrices(self, first: Axes, second: Axes) -> Tensor:
        """``[n, first, second]``, each group of axes merged into one; a view if possible."""
        found = self.arranged((*first, *second))
        split = 1 + len(first)
        return found.reshape(
            found.shape[0], math.prod(found.shape[1:split]), math.prod(found.shape[split:])
        )


@dataclass
class Pass:
    """A whole call, or rather its products.

    Attributes:
        call: the call.
        program: what is computed.
        grouped: the grouped products.
        rows: rows that are given, by name; ``d y`` before the activation if `late`.
        found: what is wanted, of every chunk of experts; all of them write to the same rows.
        finished: y after bias and activation, and before, if its product did that.
        memory: wanted rows that one chunk after another writes, by name.
        shared: results of products that were computed with an earlier one, by name.
    """

    call: ForwardCall | BackwardCall
    program: Program
    grouped: Grouped
    rows: dict[str, Tensor]
    found: dict[str, list[Tensor]] = field(default_factory=dict)
    finished: tuple[Tensor, Tensor | None] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Named] = field(default_factory=dict)

    def shares(self, product: Product) -> bool:
        """Whether one launch gives gradients of rows that are given and of the block that
        multiplied them."""
        program, before, block = self.program, value_of(product.result), product.second
        if product.result == before or before not in self.rows or block == "C" or program.built:
            return False
        if self.call.x.element_size() != 2:  # without tensor cores, the kernel spills registers
            return False
        sides = [
            _split(program.axes[block], program.axes[name])[1] for name in (before, product.first)
        ]
        largest = max(math.prod(getattr(self.call.dims, axis) for axis in side) for side in sides)
        wanted = any(each.result == f"d {block}" for each in program.products)
        return wanted and largest <= LARGEST_SHARED and self.grouped.shares

    @property
    def late(self) -> bool:
        """Whether a product that `shares` applies the activation's gradient, whose input it
        computes again."""
        last = [each for each in self.program.products if each.first == "d y" and each.kind == ROWS]
        return self.call.bias is None and any(map(self.shares, last))

    def chunks(self) -> Iterator[Chunk]:
        """Ranges of experts whose built weights are alive together."""
        experts, offsets = self.call.num_experts, self.call.expert_offsets
        size = experts_at_once(self.call.dims, self.program.built, experts)
        for first in range(0, experts, size):
            last = min(first + size, experts)
            yield Chunk(
                self, first, last, Slots(offsets[first : last + 1], self.call.slots, size < experts)
            )

    def keep(self, name: str, result: Named) -> Named:
        """Keeps what is wanted of a chunk's results."""
        if name in self.found:
            self.found[name].append(result.arranged(self.program.axes[name]))
        return result

    def rows_of_parts(self, name: str, like: Tensor, *size: int) -> Tensor | None:
        """Memory for wanted rows to which one chunk after another writes; None for others."""
        if name not in self.found:
            return None
        if name not in self.memory:
            self.memory[name] = like.new_zeros(size)
        return self.memory[name]

    def result(self, name: str, columns: int) -> Tensor:
        """Rows ``[N, columns]``."""
        rows = self.found[name][-1]
        return rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))[:, :columns]

    def block(self, name: str, like: Tensor) -> Tensor | None:
        """The gradient of a block if it was wanted."""
        parts = self.found.get(f"d {name}")
        if parts is None:
            return None
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (
            (whole.sum(0) if name == "C" and len(parts) > 1 else whole)
            .view(like.shape)
            .to(like.dtype)
            .contiguous()
        )


@dataclass
class Chunk:
    """The products for experts ``first:last``; see `mpoe_kernels.contract.program.run`."""

    whole: Pass
    first: int
    last: int
    slots: Slots

    def given(self, name: str) -> Named:
        call, axes = self.whole.call, self.whole.program.axes[name]
        if name == "C":
            return Named(call.central.unsqueeze(0), axes)
        if name in ("L", "R"):
            block = (call.left if name == "L" else call.right)[self.first : self.last]
            # What is built from an idle expert's block must be finite: zero times it is added to
            # sums.
            return Named(
                torch.where(self.slots.busy[:, None, None, None], block, 0)
                if self._builds
                else block,
                axes,
            )
        rows, sizes = self.whole.rows[name], [getattr(call.dims, axis) for axis in axes]
        if rows.shape[1] != math.prod(sizes):
            rows = F.pad(rows, (0, math.prod(sizes) - rows.shape[1]))
        return Named(
            rows.view(rows.shape[0], *sizes), axes, call.row_index if name == "x" else None
        )

    @property
    def _builds(self) -> bool:
        return bool(self.whole.program.built)

    def _named(self, data: Tensor, axes: Axes) -> Named:
        return Named(
            data.reshape(data.shape[0], *(getattr(self.whole.call.dims, axis) for axis in axes)),
            axes,
        )

    def _only(self, name: str, rows: Named) -> Named:
        """Rows by slot, zero where no expert owns the slot: products' results are, what is given
        need not be."""
        if name not in self.whole.rows:
            return rows
        data = rows.data if rows.row_index is None else rows.data.index_select(0, rows.row_index)
        return Named(
            torch.where(self.slots.owned.view(-1, *[1] * len(rows.axes)), data, 0), rows.axes
        )

    def rows(self, product: Product, rows: Named, operand: Named) -> Named:
        if product.result in self.whole.shared:
            return self.whole.shared.pop(product.result)
        if self.whole.shares(product):
            return self._both(product, rows, operand)
        kept, met = _split(rows.axes, operand.axes)
        new = _split(self.whole.program.axes[product.result], operand.axes)[1]
        if product.second == "C":
            met, new = (
                tuple(a for a in operand.axes if a in axes) for axes in (met, new)
            )  # so that C is no copy
            matrix, blocks = (
                self._only(product.first, rows).matrices(kept, met),
                operand.matrices(met, new),
            )
            found = (matrix.flatten(0, 1) @ blocks[0]).view(*matrix.shape[:2], blocks.shape[2])
            return self.whole.keep(product.result, self._named(found, (*kept, *new)))
        matrix, blocks, out = rows.matrices(kept, met), operand.matrices(met, new), None
        if self.slots.is_part:
            out = self.whole.rows_of_parts(
                product.result, matrix, self.slots.count, matrix.shape[1], blocks.shape[2]
            )
        order, turned = self._order(product.result), self._turned(product.result, kept, new)
        last = self._finishing(product, (*new, *kept) if turned else (*kept, *new))
        given = RowsProduct(matrix, rows.row_index, blocks, self.slots, last, out, turned)
        found, pre = self.whole.grouped.rows(given)
        result = self._named(found, (*kept, *new))
        if last is not None:
            z = pre if pre is None else self._named(pre, result.axes).arranged(order).flatten(1)
            self.whole.finished = result.arranged(order).flatten(1), z
        return self.whole.keep(product.result, result)

    def _both(self, product: Product, grads: Named, operand: Named) -> Named:
        """The gradient of rows. That of the block, and the rows after it if they are read, wait for
        their turn."""
        name, after, block = value_of(product.result), value_of(product.first), product.second
        before, shared = self.given(name), self.whole.shared
        kept, met = _split(before.axes, operand.axes)
        new = _split(self.whole.program.axes[after], operand.axes)[1]
        rows, blocks, of_rows = (
            before.matrices(kept, met),
            operand.matrices(met, new),
            grads.matrices(kept, new),
        )

        def memory(result: str, last: Axes) -> Tensor:
            n, p, m = (
                self.slots.count,
                of_rows.shape[1],
                math.prod(getattr(self.whole.call.dims, a) for a in last),
            )
            turned = self._turned(result, kept, last)
            return rows.new_empty(n, m, p).transpose(1, 2) if turned else rows.new_empty(n, p, m)

        found, again = memory(product.result, met), None
        products = self.whole.program.products
        if any(each.result == after for each in products[products.index(product) :]):
            again = memory(after, new)
            shared[after] = self._named(again, (*kept, *new))
        activation = self.whole.call.activation if after == "y" and self.whole.late else "none"
        given = BlocksProduct(
            rows, before.row_index, of_rows, self.slots, blocks, found, again, activation
        )
        shared[f"d {block}"] = self._named(self.whole.grouped.blocks(given), (*met, *new))
        return self.whole.keep(product.result, self._named(found, (*kept, *met)))

    def _turned(self, result: str, kept: Axes, new: Axes) -> bool:
        """Whether rows of a result had better be in memory with the axes that are new before those
        that are kept."""
        order = self._order(result)
        return not self._follows((*kept, *new), order) and self._follows((*new, *kept), order)

    def _order(self, result: str) -> Axes:
        """In which the rows of a result are wanted, or read: by the shared product, which then need
        not copy C."""
        return self.whole.program.axes[result if result in ("y", "d x") else "C"]

    def _follows(self, axes: Axes, order: Axes) -> bool:
        """Whether axes of more than one element are all in an order, and one after the other."""
        places = [
            order.index(a) if a in order else -1
            for a in axes
            if getattr(self.whole.call.dims, a) > 1
        ]
        return -1 not in places and places == sorted(places)

    def _finishing(self, product: Product, axes: Axes) -> Any:
        """The call if a grouped product gives ``y [N, F]`` as it is, so that it may do what comes
        last."""
        call, dims = self.whole.call, self.whole.call.dims
        is_whole = (
            product.result == "y"
            and not self.slots.is_part
            and self._follows(axes, self._order("y"))
        )
        return call if is_whole and dims.out_features == dims.jL * dims.jC * dims.jR else None

    def gradient(self, product: Product, rows: Named, grads: Named) -> Named:
        if product.result in self.whole.shared:
            return self.whole.keep(product.result, self.whole.shared.pop(product.result))
        axes = self.whole.program.axes[product.result]
        shared, m = _split(rows.axes, axes)
        n = _split(grads.axes, axes)[1]
        if product.result == "d C":
            rows, grads = self._only(product.first, rows), self._only(product.second, grads)
            m, n = (
                tuple(a for a in axes if a in some) for some in (m, n)
            )  # as C has them: nothing is copied
            a, g = rows.matrices(shared, m).flatten(0, 1), grads.matrices(shared, n).flatten(0, 1)
            found = (float32_mm(a.T, g) if self.slots.is_part else a.T @ g).unsqueeze(0)
        else:
            before, after = rows.matrices(shared, m), grads.matrices(shared, n)
            found = self.whole.grouped.blocks(
                BlocksProduct(before, rows.row_index, after, self.slots)
            )
        return self.whole.keep(product.result, self._named(found, (*m, *n)))

    def merge(self, product: Product, first: Named, second: Named) -> Named:
        axes = self.whole.program.axes[product.result]
        met, m, n = (
            _split(first.axes, second.axes)[1],
            _split(axes, first.axes)[1],
            _split(axes, second.axes)[1],
        )
        if product.result == "d C":
            p, q = first.matrices(met, m).flatten(0, 1), second.matrices(met, n).flatten(0, 1)
            found = float32_mm(p.T, q).unsqueeze(0)
        else:
            p, q = first.matrices(m, met), second.matrices(met, n)
            if q.shape[0] == 1:
                found = (p.flatten(0, 1) @ q[0]).view(p.shape[0], p.shape[1], -1)
            else:
                found = torch.bmm(p.expand(q.shape[0], *p.shape[1:]), q)
        return self.whole.keep(product.result, self._named(found, (*m, *n)))


def forward(call: ForwardCall, grouped: Grouped) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    dims, x = call.dims, call.x
    program = program_of(dims, call.strategy, "forward")
    whole = Pass(
        call, program, grouped, {"x": x}, {"y": [], **({KEPT: []} if call.saves_h else {})}
    )
    run(program, whole.chunks())
    h = whole.result(KEPT, dims.jC * dims.b).reshape(-1, dims.b) if call.saves_h else x.new_empty(0)
    if whole.finished is None:
        owned = Slots(call.expert_offsets, call.slots).owned
        y, z = finished(call, whole.result("y", call.out_features), owned)
        if call.out_index is not None:
            assert call.gates is not None, "out_index comes with gates"
            gated = (y.float() * call.gates[call.out_index][:, None]).to(
                y.dtype
            )  # rounded first, as in `combine`
            y = torch.empty_like(y).index_copy_(
                0, call.out_index, torch.where(owned[:, None], gated, 0)
            )
    else:
        y, z = whole.finished
    return y.contiguous(), h.contiguous(), x.new_empty(0) if z is None else z.contiguous()


def backward(call: BackwardCall, grouped: Grouped) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    dims, need, h = call.dims, call.need_of_plan, call.saved_h
    program = program_of(dims, call.strategy, "backward", need, kept=h is not None)
    rows = {"x": call.x, **({} if h is None else {KEPT: h.view(call.slots, -1)})}
    wanted = [
        name for name, needed in zip(("d x", "d L", "d C", "d R"), need, strict=True) if needed
    ]
    whole = Pass(call, program, grouped, rows, {name: [] for name in wanted})

    def gradients(dz: Tensor) -> Gradients:
        rows["d y"] = dz
        run(program, whole.chunks())
        dx = whole.result("d x", call.in_features) if need[0] else None
        return (
            dx,
            whole.block("L", call.left),
            whole.block("C", call.central),
            whole.block("R", call.right),
        )

    return around_gradients(call, gradients, whole.late)
