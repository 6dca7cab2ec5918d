"""Calls of the linear op: with and without what they may leave out, and arguments of any layout."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch import Tensor

from mpoe_kernels import grouped_mpo_linear
from tests.cases import SMALL_SHAPES

from .linear_runs import Case


def test_slots_of_tokens_take_the_place_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two choices per token, some of them dropped."""
    case = Case(SMALL_SHAPES["separable"], tokens=7, experts=3, top_k=2, capacity=3)
    assert (case.routing.slot_of_token < 0).any()
    saved, case.inverse = case.forward("separable"), False
    sorted_rows = case.backward("separable", saved)
    monkeypatch.setattr(torch.Tensor, "index_put_", lambda *_, **__: pytest.fail("sorts"))
    case.inverse = True
    collected = case.backward("separable", saved)
    for found, wanted in zip(collected, sorted_rows, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["rebuild", "chain", None])
@pytest.mark.parametrize("name", ["bias", "row_index", "expert_offsets"])
def test_arguments_that_lie_apart(name: str, strategy: str | None) -> None:
    """Every other element of a longer tensor; reading the elements in between would change the result."""
    shape = SMALL_SHAPES["light"]
    arguments = {
        "bias": torch.randn(shape.out_features),
        "row_index": torch.tensor([0, 2, 1, 4, 3]),
        "expert_offsets": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    blocks, x = random_blocks(shape, 2, torch.float32), torch.randn(5, shape.in_features)

    def run(**changed: Tensor) -> Tensor:
        options = {"backend": "triton", "strategy": strategy, "activation": "gelu"}
        return grouped_mpo_linear(x, blocks, **{**arguments, **changed}, **options)

    apart = torch.stack([arguments[name], torch.zeros_like(arguments[name])], 1)[:, 0]
    assert torch.equal(run(**{name: apart}), run())
