"""What a GPU backend supplies: launches, each of one product, whose operands are one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.planner.orders import BlockDims


@dataclass(frozen=True)
class Pair:
    """Two operands of some experts, and where their contraction goes.

    Attributes:
        first, second: what is contracted along the axes that both have.
        out: memory of the result, with axes of either.
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
        """Axes that both have."""
        return self.first.axes & self.second.axes

    @property
    def first_alone(self) -> frozenset[str]:
        """Axes of the result that only the first operand has."""
        return self.first.axes - self.second.axes

    @property
    def second_alone(self) -> frozenset[str]:
        """Axes of the result that only the second operand has."""
        return self.second.axes - self.first.axes

    def centre_last(self) -> tuple[Operand, Operand]:
        """The operands, the one last that has the central block's own axes."""
        return (self.second, self.first) if "iC" in self.first.axes else (self.first, self.second)


@dataclass(frozen=True)
class Rows(Pair):
    """Rows through every expert's block, or through the one block they share.

    ``out`` is activations ``[N, ...]`` whose axes are those that only one operand has.

    Attributes:
        bias, activation: epilogue; ``pre`` receives the pre-activation.
        pre: see ``bias``.
        tail: clear the slots past the last offset.
        out_index: ``[N]``, row of ``out`` that each slot gives; None: its own.
        gates: ``[N]``, factors of the rows of ``out``, with ``out_index``; they take what is rounded already.
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
    """What a block is made from: two operands of every expert, or rows before it and the gradient of those after it.

    An ``out`` that the experts share (outer 0) gets the sum over them.

    Attributes:
        add: to the sum over other experts that a shared ``out`` holds; else what it held counts for nothing.
        clear: of two blocks, idle experts' part of ``out`` becomes zero; else it is undefined.
        room: bytes that partial sums may take; None: any number.
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
        """Memory ``[rows, columns]`` for what is built, or for rows between two operands."""

    def rows(self, product: Rows) -> None:
        """Contract rows with blocks."""

    def gradient(self, product: Sum) -> None:
        """Gradient of the block ``out`` from the rows before it and the gradient of the rows after it."""

    def merge(self, product: Sum) -> None:
        """Contract two blocks of every busy expert, which give the rows and the columns."""

    def weight(self, half: Sum, whole: Sum) -> bool:
        """Both products in one launch: a half of every busy expert, and its weight from that half and a block.

        Returns:
            False: nothing was launched, as it takes two launches here.
        """


class Surrounding(Protocol):
    """What surrounds the products of a program."""

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """Memory for the gradient of a block that the experts share; ``grows``: not by one gradient of rows alone."""

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """That memory, as the gradient's dtype."""

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(dz [N, F], dbias [F] or None)`` from the gradient of the result and what the activation saved."""

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        """``out[t] = sum of rows[s] over the slots s with row_index[s] = t``, ``[T, F]``; deterministic, no atomics."""

    def collect_rows(self, rows: Tensor, slot_of_token: Tensor) -> Tensor:
        """``out[t] = sum over k of rows[slot_of_token[t, k]]``, ``[T, F]``, of those that are not -1; likewise."""
