"""Kernels that must not be shipped, for tests of the check that keeps them out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """``[SIZE, SIZE]`` tiles: few warps cannot hold large ones in registers, many stages fill shared memory."""
    line = tl.arange(0, SIZE)
    at = line[:, None] * SIZE + line[None, :]
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for step in tl.range(0, 16, num_stages=STAGES):
        shift = step * SIZE * SIZE
        acc = tl.dot(tl.load(a + shift + at), tl.load(b + shift + at), acc)
    tl.store(out + at, acc)
