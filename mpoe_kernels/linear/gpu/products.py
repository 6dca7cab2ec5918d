"""The products of a program as launches of a GPU backend: operands with named axes, for some experts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import AXES, BlockDims
from mpoe_kernels.contract.program import COMPOSITES, Product, Program, is_block, value_of
from mpoe_kernels.linear.eager.rows import run
from mpoe_kernels.linear.gpu.budget import experts_at_once, room
from mpoe_kernels.linear.gpu.operands import Operand, activations, block, row_major
from mpoe_kernels.linear.gpu.primitives import Primitives, Rows, Sum, Surrounding


class Launches(Surrounding, Protocol):
    """The interface of a GPU backend for `mpoe_kernels.linear.gpu.steps`."""

    def compute(self, whole: Pass) -> None:
        """Compute all products of a program: with `walk`, or by replaying an earlier walk with the same sizes."""


@dataclass
class Pass:
    """Tensors of a whole call, by the program's names.

    Attributes:
        program: what is computed.
        dims: sizes of the blocks.
        offsets: ``[E + 1]`` slots of the experts.
        slots: N.
        values: inputs, and memory for the caller's results, see `BlockGradients`.
        row_index: row of x that each slot reads.
        bias, activation, pre: epilogue of y; ``pre`` receives the pre-activation.
        out_index, gates: see `mpoe_kernels.linear.op.ForwardCall`.
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
    out_index: Tensor | None = None
    gates: Tensor | None = None

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
    """The products for experts ``first:last``; see `mpoe_kernels.linear.eager.rows.run`."""

    whole: Pass
    primitives: Primitives
    first: int
    last: int
    offsets: Tensor = field(init=False)

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
        made = Rows(
            *(rows, operand, out, whole.dims, self.offsets, self._index(product)),
            bias=whole.bias if last else None,
            activation=whole.activation if last else "none",
            pre=whole.pre if last else None,
            out_index=whole.out_index if last else None,
            gates=whole.gates if last else None,
            # In rows between two operands this memory is never read.
            tail=self.last == whole.experts and product.result in whole.values,
        )
        self.primitives.rows(made)
        return out

    def _index(self, product: Product) -> Tensor | None:
        return self.whole.row_index if product.first == "x" else None

    def gradient(self, product: Product, rows: Operand, grads: Operand) -> Operand:
        out = self._target(product.result) or self._new(value_of(product.result), rows.data)
        sizes = out, self.whole.dims, self.offsets, self._index(product)
        self.primitives.gradient(Sum(rows, grads, *sizes, add=self.first > 0, room=self._room(product)))
        return out

    def merge(self, product: Product, first: Operand, second: Operand) -> Operand:
        out = self._target(product.result) or self._new(product.result, first.data)
        # The operand with the result's slowest axis supplies the rows.
        slowest = max(out.axes, key=lambda axis: out.strides[axis])
        p, q = (first, second) if slowest in first.axes else (second, first)
        wanted = product.result in self.whole.values
        sizes = self.whole.dims, self.offsets
        made = Sum(p, q, out, *sizes, add=self.first > 0, clear=wanted, room=self._room(product))
        self.primitives.merge(made)
        return out


def walk(whole: Pass, primitives: Primitives) -> None:
    """Compute the products one after the other."""
    run(whole.program, whole.chunks(primitives))


def blocks_of(left: Tensor, central: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Blocks by their names."""
    return {"L": left, "C": central, "R": right}


@dataclass
class BlockGradients:
    """Memory for the gradients of the blocks that need one; None for the others."""

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
