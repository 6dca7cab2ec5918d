"""Walks a program: the one place where products of a contraction are computed one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from mpoe_kernels.planner.program import GRADIENT, MERGE, ROWS, Product, Program


class Chunk(Protocol):
    """What a backend supplies: the tensors of some experts, as it likes to hold them, and the products of two.

    Results that a caller wants (``y``, ``d L``, ...) go where it wants them; what others return lives until its last
    reader has run.
    """

    def given(self, name: str) -> Any:
        """A tensor that no product makes: rows, blocks, ``d y``, or rows that the forward kept."""

    def rows(self, product: Product, rows: Any, operand: Any) -> Any:
        """Rows through an operand: of each expert through its own, or all through the shared one."""

    def gradient(self, product: Product, rows: Any, grads: Any) -> Any:
        """Gradient of the operand that ``rows`` met, from the gradient of what came out."""

    def merge(self, product: Product, first: Any, second: Any) -> Any:
        """Two operands of every expert into one; ``d C`` is summed over the experts."""


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
