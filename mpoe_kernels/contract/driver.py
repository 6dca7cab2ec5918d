"""Runs a program: the only place where the products of a contraction are computed one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from mpoe_kernels.contract.program import GRADIENT, MERGE, ROWS, Product, Program


class Chunk(Protocol):
    """The interface of a backend: the tensors of some experts, in its own representation, and the products of two of
    them.

    Results for the caller (``y``, ``d L``, ...) are written to their destination; other results live until their last
    reader has run.
    """

    def given(self, name: str) -> Any:
        """A tensor that is not the result of a product: rows, blocks, ``d y``, or rows saved by the forward."""

    def rows(self, product: Product, rows: Any, operand: Any) -> Any:
        """Product of rows and an operand: each expert's rows with its own operand, or all rows with the shared one."""

    def gradient(self, product: Product, rows: Any, grads: Any) -> Any:
        """Gradient of the operand that ``rows`` were multiplied by, from the gradient of the result."""

    def merge(self, product: Product, first: Any, second: Any) -> Any:
        """Merge two operands of every expert into one; ``d C`` is summed over the experts."""


def run(program: Program, chunks: Iterable[Chunk]) -> None:
    """Compute all products of a program, for one chunk of experts after the other.

    No weight of one chunk is alive when the next one's are built.
    """
    for chunk in chunks:
        _walk(program, chunk)


def _walk(program: Program, chunk: Chunk) -> None:
    compute = {ROWS: chunk.rows, GRADIENT: chunk.gradient, MERGE: chunk.merge}
    values: dict[str, Any] = {}
    for product in program.products:
        for name in (product.first, product.second):
            if name not in values:
                values[name] = chunk.given(name)
        values[product.result] = compute[product.kind](product, values[product.first], values[product.second])
        for name in product.last_reads:
            del values[name]
