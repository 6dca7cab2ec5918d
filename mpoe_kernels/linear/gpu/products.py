"""The products of a program as launches of a GPU backend: operands with named axes, for some experts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mpoe_kernels.engine.driver import run
from mpoe_kernels.linear.gpu.cost import experts_at_once, room
from mpoe_kernels.linear.gpu.operands import Operand, activations, block, row_major
from mpoe_kernels.planner.orders import AXES, BlockDims
from mpoe_kernels.planner.program import COMPOSITES, Product, Program, is_block, value_of


class Primitives(Protocol):
    """One launch for each product of a program, and the memory between them."""

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory ``[rows, columns]`` for what is built, or for rows between two operands."""

    def rows_times_block(
        self,
        rows: Operand,
        operand: Operand,
        dims: BlockDims,
        offsets: Tensor,
        slots: int,
        *,
        out: Operand,
        row_index: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str = "none",
        pre: Tensor | None = None,
        tail: bool = True,
    ) -> Operand:
        """Contract rows with every expert's block, or with the one block they share.

        Args:
            rows: activations; with ``row_index`` slot s reads row ``row_index[s]``.
            operand: block; its expert axis matches ``offsets``.
            dims: sizes of the axes.
            offsets: ``[E + 1]`` slots of the experts, or the part of it that belongs to ``operand``'s experts.
            slots: N.
            out: where to: activations whose axes are those that only one operand has.
            row_index: see ``rows``.
            bias, activation: epilogue; ``pre`` receives the pre-activation.
            pre: see ``bias``.
            tail: clear the slots past the last offset.

        Returns:
            ``out``.
        """

    def block_gradient(
        self,
        rows: Operand,
        grads: Operand,
        name: str,
        dims: BlockDims,
        offsets: Tensor,
        *,
        out: Operand,
        row_index: Tensor | None = None,
        add: bool = False,
        room: int | None = None,
    ) -> Operand:
        """Gradient of the block ``name`` from the rows before it and the gradient of the rows after it.

        An ``out`` that the experts share (outer 0) gets the sum over them; ``add``: it holds that over other experts.
        ``room``: bytes that partial sums may take; None: any number.
        """

    def merge_blocks(
        self,
        first: Operand,
        second: Operand,
        out: Operand,
        dims: BlockDims,
        offsets: Tensor,
        *,
        shared: bool = False,
        clear: bool = False,
        room: int | None = None,
    ) -> Operand:
        """Contract two blocks of every busy expert.

        Args:
            first, second: give the rows and the columns.
            out: where to.
            dims, offsets: as in `rows_times_block`.
            shared: ``out`` gets the sum over the experts.
            clear: idle experts' part of ``out`` becomes zero, else it is undefined; what a shared ``out`` held counts
                for nothing, else the sum is added to it.
            room: bytes that partial sums may take; None: any number.
        """

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
        """Build every busy expert's whole weight in one launch; what idle experts get is undefined.

        Args:
            outer, core: make ``half``.
            half, other: make ``out``, the weight.
            out, dims, offsets: as in `merge_blocks`.

        Returns:
            False: nothing was launched, as it takes two launches here.
        """


class Launches(Protocol):
    """What a GPU backend supplies to `mpoe_kernels.linear.gpu.steps`."""

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """Memory for the gradient of a block that the experts share; ``grows``: not by one gradient of rows alone."""

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """That memory, as the gradient's dtype."""

    def compute(self, whole: Pass) -> None:
        """All products of a program: by `walk`, or as an earlier walk of the same sizes did it."""

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(dz [N, F], dbias [F] or None)`` from the gradient of the result and what the activation saved."""

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        """``out[t] = sum of rows[s] over the slots s with row_index[s] = t``, ``[T, F]``; deterministic, no atomics."""

    def collect_rows(self, rows: Tensor, slot_of_token: Tensor) -> Tensor:
        """``out[t] = sum over k of rows[slot_of_token[t, k]]``, ``[T, F]``, of those that are not -1; likewise."""


@dataclass
class Pass:
    """Tensors of a whole call, by the program's names.

    Attributes:
        program: what is computed.
        dims: sizes of the blocks.
        offsets: ``[E + 1]`` slots of the experts.
        slots: N.
        values: what is given, and where results go that a caller wants, see `BlockGradients`.
        row_index: row of x that each slot reads.
        bias, activation, pre: epilogue of y; ``pre`` receives the pre-activation.
    """

    program: Program
    dims: BlockDims
    offsets: Tensor
    slots: int
    values: dict[str, Tensor]
    row_index: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    pre: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    def operand(self, name: str) -> Operand:
        """One of the values with its axes."""
        data, value = self.values[name], value_of(name)
        if value in COMPOSITES:
            return Operand(data, row_major(AXES[value], self.dims), data.stride(0))
        if is_block(name):
            return block(data, value)
        columns = {"x": self.dims.in_features, "y": self.dims.out_features}.get(value, 0)
        return activations(data, self.program.axes[name], self.dims, columns)

    def chunks(self, primitives: Primitives) -> Iterator[GpuChunk]:
        """Ranges of experts whose built weights fit the budget of `experts_at_once`."""
        size = experts_at_once(self.dims, self.program.built, self.experts) or max(self.experts, 1)
        for first in range(0, self.experts, size):
            yield GpuChunk(self, primitives, first, min(first + size, self.experts))


@dataclass
class GpuChunk:
    """The products for experts ``first:last``; see `mpoe_kernels.engine.driver.Chunk`."""

    whole: Pass
    primitives: Primitives
    first: int
    last: int
    offsets: Tensor = field(init=False)
    # A half that is to be built together with the weight: its product and operands.
    waiting: tuple[Product, Operand, Operand] | None = None

    def __post_init__(self) -> None:
        offsets = self.whole.offsets
        all_experts = (self.first, self.last) == (0, self.whole.experts)
        self.offsets = offsets if all_experts else offsets[self.first : self.last + 1]

    def _room(self, product: Product) -> int:
        """Bytes that partial sums may take."""
        whole, at_once = self.whole, self.last - self.first
        return whole.values["C"].itemsize * room(whole.dims, product, whole.program.built, at_once, whole.experts)

    def given(self, name: str) -> Operand:
        operand = self.whole.operand(name)
        return operand.experts(self.first, self.last) if is_block(name) else operand

    def _target(self, name: str) -> Operand | None:
        return self.given(name) if name in self.whole.values else None

    def _new(self, name: str, like: Tensor) -> Operand:
        strides = row_major(AXES[value_of(name)], self.whole.dims)
        size = self.whole.dims.elements(frozenset(strides))
        return Operand(self.primitives.empty(self.last - self.first, size, like), strides, size)

    def rows(self, product: Product, rows: Operand, operand: Operand) -> Operand:
        whole, out = self.whole, self._target(product.result)
        if out is None:
            axes = whole.program.axes[product.result]
            data = self.primitives.empty(whole.slots, whole.dims.elements(frozenset(axes)), rows.data)
            out = activations(data, axes, whole.dims)
        last = product.result == "y"
        return self.primitives.rows_times_block(
            rows,
            operand,
            whole.dims,
            self.offsets,
            whole.slots,
            out=out,
            row_index=whole.row_index if product.first == "x" else None,
            bias=whole.bias if last else None,
            activation=whole.activation if last else "none",
            pre=whole.pre if last else None,
            # Nobody reads what lies there in rows between two operands.
            tail=self.last == whole.experts and product.result in whole.values,
        )

    def gradient(self, product: Product, rows: Operand, grads: Operand) -> Operand:
        whole, name = self.whole, value_of(product.result)
        out = self._target(product.result) or self._new(name, rows.data)
        index = whole.row_index if product.first == "x" else None
        return self.primitives.block_gradient(
            *(rows, grads, name, whole.dims, self.offsets),
            row_index=index,
            out=out,
            add=self.first > 0,
            room=self._room(product),
        )

    def _next(self, product: Product) -> Product | None:
        products = self.whole.program.products
        after = products.index(product) + 1
        return products[after] if after < len(products) else None

    def merge(self, product: Product, first: Operand, second: Operand) -> Operand:
        out = self._target(product.result) or self._new(product.result, first.data)
        after, waiting = self._next(product), self.waiting
        if after is not None and after.result == "W" and "W" not in self.whole.values:
            self.waiting = product, first, second
            return out
        if waiting is not None:
            self.waiting = None
            outer, core = waiting[1:] if waiting[0].second == "C" else reversed(waiting[1:])
            half, other = (first, second) if product.first == waiting[0].result else (second, first)
            if self.primitives.weight_of_blocks(outer, core, half, other, out, self.whole.dims, self.offsets):
                return out
            self._merge(*waiting, half)
        return self._merge(product, first, second, out)

    def _merge(self, product: Product, first: Operand, second: Operand, out: Operand) -> Operand:
        # The operand that holds the result's slowest axis gives the rows.
        slowest = max(out.axes, key=lambda axis: out.strides[axis])
        p, q = (first, second) if slowest in first.axes else (second, first)
        shared = product.result == "d C"
        clear = product.result in self.whole.values and not (shared and self.first > 0)
        dims, offsets = self.whole.dims, self.offsets
        free = self._room(product)
        return self.primitives.merge_blocks(p, q, out, dims, offsets, shared=shared, clear=clear, room=free)


def walk(whole: Pass, primitives: Primitives) -> None:
    """Compute the products one after the other."""
    run(whole.program, whole.chunks(primitives))


def blocks_of(left: Tensor, central: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Blocks by their names."""
    return {"L": left, "C": central, "R": right}


@dataclass
class BlockGradients:
    """Where a backward puts the gradients of the blocks that need one; None for the others."""

    launches: Launches
    left: Tensor | None
    central: Tensor | None
    right: Tensor | None

    @classmethod
    def begun(
        cls,
        launches: Launches,
        program: Program,
        blocks: tuple[Tensor, Tensor, Tensor],
        need: tuple[bool, bool, bool] = (True, True, True),
    ) -> BlockGradients:
        left, central, right = blocks
        dleft, dright = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
            for t, needed in ((left, need[0]), (right, need[2]))
        )
        return cls(launches, dleft, launches.begin_sum(central, bool(program.built)) if need[1] else None, dright)

    def values(self) -> dict[str, Tensor]:
        named = {"L": self.left, "C": self.central, "R": self.right}
        return {f"d {name}": data for name, data in named.items() if data is not None}

    def results(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        central = None if self.central is None else self.launches.end_sum(self.central, dtype)
        return self.left, central, self.right
