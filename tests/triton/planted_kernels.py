"""Kernels that must not be shipped, for tests of the check that keeps them out."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """``[SIZE, SIZE]`` tiles: few warps cannot hold large ones in registers, many stages fill
    shared memory."""
    line = tl.arange(0, SIZE)
    at = line[:, None] * SIZE + line[None, :]
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for step in tl.range(0, 16, num_stages=STAGES):
        shift = step * SIZE * SIZE
        acc = tl.dot(tl.load(a + shift + at), tl.load(b + shift + at), acc)
    tl.store(out + at, acc)


@triton.jit
def waiting_kernel(out, SIZE: tl.constexpr):
    """A program waits until the one before it has written."""
    program = tl.program_id(0)
    if program > 0:
        while tl.atomic_add(out, 0, sem="acquire") < program * SIZE:
            pass
    tl.store(out + 1 + program, program)
    tl.atomic_add(out, SIZE, sem="release")


@triton.jit
def counting_kernel(out, SIZE: tl.constexpr):
    """Counts in its own shared memory."""
    tl.store(out + tl.arange(0, SIZE), tl.histogram(tl.arange(0, SIZE) // 2, SIZE))
