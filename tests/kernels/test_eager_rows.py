"""How the eager backend reads blocks."""

from __future__ import annotations

import pytest
import torch

from mpoe_kernels.linear.eager.rows import Named, select_experts


@pytest.mark.parametrize(("first", "second"), [(("iL",), ("jL", "a")), (("a",), ("iL", "jL")), (("jL",), ("iL", "a"))])
def test_scattered_experts_are_taken_from_the_stack(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """They are copied only where a GEMM cannot read the blocks as they are: with the middle axis alone on one side."""
    stacked = torch.randn(5, 3, 2, 4)
    named = Named(stacked, ("iL", "jL", "a"), [0, 2, 3])
    for expert, block in zip((0, 2, 3), named.each(first, second), strict=True):
        assert torch.equal(block, Named(stacked[expert : expert + 1], named.axes).matrices(first, second)[0])
        is_view = block.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
        assert is_view == (first != ("jL",))
    assert torch.equal(named.alone().data, stacked[[0, 2, 3]])


@pytest.mark.parametrize(("experts", "is_view"), [([2], True), ([1, 2, 3], True), ([0, 2, 3], False), ([1, 3], False)])
def test_consecutive_experts_are_not_copied(experts: list[int], is_view: bool) -> None:
    stacked = torch.randn(5, 3)
    found = select_experts(stacked, experts)
    assert torch.equal(found, stacked[experts])
    assert (found.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()) == is_view
