"""Rows of an MPO table by the emulated CUDA kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape
from mpoe_kernels.reference import mpo_embedding_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory
from mpoe_kernels.testing.cases import SMALL_SHAPES, random_blocks

from .emulation import OPS, REFUSED, SCHEDULES, Schedule, library, schedule

NAMES = ("y", "dleft", "dcentral", "dright")
WIDE = MPOShape((8, 6, 8), (8, 2, 8), max_bond=16)  # multiples of 16 bytes


def run(shape: MPOShape, blocks: list[Tensor], ids: Tensor, grad: Tensor) -> list[Tensor]:
    """``y`` and the gradients of the blocks; results are initialised with NaN."""
    library()
    sizes = (shape.in_features, shape.out_features, False)
    with poisoned_memory():
        y = OPS.embedding_forward(ids, *blocks, *sizes)
        return [y, *OPS.embedding_backward(grad, ids, *blocks, *sizes)]


def reference(shape: MPOShape, blocks: list[Tensor], ids: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [block.to(dtype).requires_grad_() for block in blocks]
    inside = (ids >= 0) & (ids < shape.in_features)
    y = mpo_embedding_reference(ids * inside, MPOBlocks(*leaves, shape.in_features, shape.out_features))
    y = y * inside[:, None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def check(shape: MPOShape, dtype: torch.dtype, tokens: int = 11) -> None:
    blocks = random_blocks(shape, 1)
    rounded = [t.to(dtype) for t in (blocks.left, blocks.central, blocks.right)]
    ids = torch.randint(shape.in_features, (tokens,))
    if tokens > 4:
        ids[3] = ids[1]
        ids[0], ids[4] = -1, shape.in_features  # outside the table: rows of zeros, no gradient
    grad = torch.randn(tokens, shape.out_features).to(dtype)
    actual = run(shape, rounded, ids, grad)
    truth, same = (reference(shape, rounded, ids, grad, t) for t in (torch.float64, dtype))
    for name, a, t, s in zip(NAMES, actual, truth, same, strict=True):
        assert_calibrated(a, t, s, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_every_shape(name: str, dtype: torch.dtype) -> None:
    check(SMALL_SHAPES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_asynchronous_copies_and_many_tokens(dtype: torch.dtype) -> None:
    check(WIDE, dtype, tokens=150)


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
def test_schedules(timing: Schedule) -> None:
    with schedule(*timing):
        check(SMALL_SHAPES["light"], torch.bfloat16)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    check(SMALL_SHAPES["paper"], torch.float32, tokens)


def test_digits_beyond_the_counting_sort_are_refused() -> None:
    shape = MPOShape((2, 5000, 2), (1, 1, 1))
    blocks = random_blocks(shape, 1)
    rounded = [t.float() for t in (blocks.left, blocks.central, blocks.right)]
    with pytest.raises(REFUSED, match="5000 values"):
        run(shape, rounded, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1))
