"""A step of a contraction: GEMMs of one size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """GEMMs of one size.

    Attributes:
        name: what it computes, e.g. ``LC = L C``, ``x W``, ``d L``.
        kind: ``gemm`` (one for all slots), ``grouped_gemm`` (one for each busy expert) or ``copy``.
        m, n, k: sizes of one GEMM; m, or k for the gradient of an operand, is the mean over busy experts.
        batch: number of GEMMs.
        read_bytes, write_bytes: operands and results of all of them.
        cached_bytes: the part of both that stays in a cache of ``working_set`` bytes: built weights, intermediate
            rows, and every reading but the first of the shared central block.
        working_set: bytes.
    """

    name: str
    kind: str
    m: float
    n: float
    k: float
    batch: int
    read_bytes: int
    write_bytes: int
    cached_bytes: int = 0
    working_set: int = 0

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * self.k * self.batch

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes

    def memory_bytes(self, cache_bytes: float) -> int:
        """Bytes that cross to and from memory, given a last-level cache of ``cache_bytes``."""
        return self.bytes - (self.cached_bytes if self.working_set <= cache_bytes else 0)
