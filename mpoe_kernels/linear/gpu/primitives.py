"""The interface of a GPU backend: launches of one product each, whose operands are passed as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.gpu.operands import Operand


@dataclass(frozen=True)
class Pair:
    """Two operands of some experts, and the destination of their contraction.

    Attributes:
        first, second: the operands, contracted along their common axes.
        out: memory of the result, with axes of both.
        dims: sizes of the axes.
        offsets: ``[E + 1]`` slots of the experts, or the part of it that belongs to these experts.
        row_index: ``[N]``: slot s reads row ``row_index[s]`` of ``first``.
    """

    first: Operand
    second: Operand
    out: Operand
    dims: BlockDims
    offsets: Tensor
    row_index: Tensor | None = None

    @property
    def experts(self) -> int:
        """How many."""
        return self.offsets.shape[0] - 1

    @property
    def summed(self) -> frozenset[str]:
        """Axes that both operands have."""
        return self.first.axes & self.second.axes

    @property
    def first_alone(self) -> frozenset[str]:
        """Axes of the result that only the first operand has."""
        return self.first.axes - self.second.axes

    @property
    def second_alone(self) -> frozenset[str]:
        """Axes of the result that only the second operand has."""
        return self.second.axes - self.first.axes


@dataclass(frozen=True)
class Rows(Pair):
    """Product of rows and every expert's block, or the one shared block.

    ``out`` is activations ``[N, ...]`` whose axes are those that only one operand has.

    Attributes:
        bias, activation: epilogue; ``pre`` receives the pre-activation.
        pre: see ``bias``.
        tail: clear the slots past the last offset.
        out_index: ``[N]``, row of ``out`` that each slot writes; None: its own.
        gates: ``[N]``, factors of the rows of ``out``, with ``out_index``; applied after rounding.
    """

    bias: Tensor | None = None
    activation: str = "none"
    pre: Tensor | None = None
    tail: bool = True
    out_index: Tensor | None = None
    gates: Tensor | None = None

    @property
    def slots(self) -> int:
        """N."""
        return self.out.data.shape[0]


@dataclass(frozen=True)
class Sum(Pair):
    """The computation of a block: from two operands of every expert, or from the rows before it and the gradient of the
    rows after it.

    An ``out`` that the experts share (outer 0) gets the sum over them.

    Attributes:
        add: accumulate into the sum over other experts in a shared ``out``; otherwise its contents are overwritten.
        clear: for two blocks, idle experts' part of ``out`` becomes zero; otherwise it is undefined.
        room: bytes available for partial sums; None: unlimited.
    """

    add: bool = False
    clear: bool = False
    room: int | None = None

    @property
    def shared(self) -> bool:
        """Whether the experts share the result."""
        return self.out.outer == 0


class Primitives(Protocol):
    """One launch for each product of a program, and the memory between them."""

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory ``[rows, columns]`` for built operands, or for rows between two operands."""

    def rows(self, product: Rows) -> None:
        """Contract rows with blocks."""

    def gradient(self, product: Sum) -> None:
        """Gradient of the block ``out`` from the rows before it and the gradient of the rows after it."""

    def merge(self, product: Sum) -> None:
        """Contract two blocks of every busy expert, which supply the rows and the columns."""


class Surrounding(Protocol):
    """The operations around the products of a program."""

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """Memory for the gradient of a block that the experts share; ``grows``: it is accumulated over more than one
        gradient of rows."""

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """That memory, as the gradient's dtype."""

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(dz [N, F], dbias [F] or None)`` from the gradient of the result and the tensor saved for the
        activation."""

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        """``out[t] = sum of rows[s] over the slots s with row_index[s] = t``, ``[T, F]``; deterministic, no atomics."""

    def collect_rows(self, rows: Tensor, slot_of_token: Tensor) -> Tensor:
        """``out[t] = sum over k of rows[slot_of_token[t, k]]``, ``[T, F]``, over entries that are not -1;
        deterministic, no atomics."""
