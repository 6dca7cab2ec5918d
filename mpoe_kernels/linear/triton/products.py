"""The products of a program as Triton launches: operands with named axes, for some experts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpoe_kernels.linear.triton.cost import experts_at_once
from mpoe_kernels.linear.triton.launch import block_gradient, merge_blocks, rows_times_block
from mpoe_kernels.linear.triton.operands import Operand, activations, block, scratch
from mpoe_kernels.planner.orders import BlockDims
from mpoe_kernels.planner.program import Product, Program, is_block, value_of


@dataclass
class Pass:
    """Tensors of a whole call, by the program's names.

    Attributes:
        program: what is computed.
        dims: sizes of the blocks.
        offsets: ``[E + 1]`` slots of the experts.
        slots: N.
        values: what is given, and where results go that a caller wants. Idle experts' gradients are never written, the
            central one (float32) is added to: both begin as zeros.
        row_index: row of x that each slot reads.
        bias, activation, pre: epilogue of y; ``pre`` receives the pre-activation.
    """

    program: Program
    dims: BlockDims
    offsets: Tensor
    slots: int
    values: dict[str, Operand]
    row_index: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    pre: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    def chunks(self) -> Iterator[TritonChunk]:
        """Ranges of experts whose built weights, and as many again for gradients, fit two whole weights."""
        size = experts_at_once(self.dims, self.program.built) or max(self.experts, 1)
        for first in range(0, self.experts, size):
            yield TritonChunk(self, first, min(first + size, self.experts))


@dataclass
class TritonChunk:
    """The products for experts ``first:last``; see `mpoe_kernels.engine.driver.Chunk`."""

    whole: Pass
    first: int
    last: int
    offsets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = self.whole.offsets[self.first : self.last + 1]

    def given(self, name: str) -> Operand:
        operand = self.whole.values[name]
        return operand.experts(self.first, self.last) if is_block(name) else operand

    def _target(self, name: str) -> Operand | None:
        return self.given(name) if name in self.whole.values else None

    def _new(self, name: str, like: Tensor) -> Operand:
        return scratch(value_of(name), self.last - self.first, self.whole.dims, like)

    def rows(self, product: Product, rows: Operand, operand: Operand) -> Operand:
        whole, out = self.whole, self._target(product.result)
        if out is None:
            axes = whole.program.axes[product.result]
            data = rows.data.new_empty(whole.slots, whole.dims.elements(frozenset(axes)))
            out = activations(data, axes, whole.dims)
        last = product.result == "y"
        return rows_times_block(
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
            tail=self.last == whole.experts,
        )

    def gradient(self, product: Product, rows: Operand, grads: Operand) -> Operand:
        index = self.whole.row_index if product.first == "x" else None
        name, central = value_of(product.result), product.result == "d C"
        out = None if central else self._target(product.result) or self._new(name, rows.data)
        found = block_gradient(rows, grads, name, self.whole.dims, self.offsets, row_index=index, out=out)
        if central:
            total = self.whole.values["d C"]
            total.data.add_(found.data.view_as(total.data))
        return found

    def merge(self, product: Product, first: Operand, second: Operand) -> Operand:
        out = self._target(product.result) or self._new(product.result, first.data)
        # The operand that holds the result's slowest axis gives the rows.
        slowest = max(out.axes, key=lambda axis: out.strides[axis])
        p, q = (first, second) if slowest in first.axes else (second, first)
        return merge_blocks(p, q, out, self.whole.dims, self.offsets, accumulate=product.result == "d C")


def blocks_of(left: Tensor, central: Tensor, right: Tensor) -> dict[str, Operand]:
    """Blocks by their names."""
    return {"L": block(left, "L"), "C": block(central, "C"), "R": block(right, "R")}


def x_rows(x: Tensor, dims: BlockDims) -> Operand:
    """Rows ``[.., I]``."""
    return activations(x, ("iL", "iC", "iR"), dims, dims.in_features)


def y_rows(y: Tensor, dims: BlockDims) -> Operand:
    """Rows ``[.., F]``."""
    return activations(y, ("jL", "jC", "jR"), dims, dims.out_features)


@dataclass
class BlockGradients:
    """Where a backward puts the gradients of the blocks that need one; None for the others.

    Left and right ``[E, ...]`` begin as zeros, because experts without slots get no gradient; the central one is a
    float32 sum over the experts.
    """

    left: Tensor | None
    central: Tensor | None
    right: Tensor | None

    @classmethod
    def zeros(
        cls, left: Tensor, central: Tensor, right: Tensor, need: tuple[bool, bool, bool] = (True, True, True)
    ) -> BlockGradients:
        dleft, dright = (
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) if needed else None
            for t, needed in ((left, need[0]), (right, need[2]))
        )
        total = torch.zeros(central.shape, dtype=torch.float32, device=central.device) if need[1] else None
        return cls(dleft, total, dright)

    def operands(self) -> dict[str, Operand]:
        named = {"L": self.left, "C": self.central, "R": self.right}
        return {f"d {name}": block(data, name) for name, data in named.items() if data is not None}

    def results(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.left, None if self.central is None else self.central.to(dtype), self.right
