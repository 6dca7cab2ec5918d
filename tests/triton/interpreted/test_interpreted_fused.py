"""The fused kernels: what they launch, and tiles that cut a weight into many pieces."""

from __future__ import annotations

import pytest
import torch

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.grouped import ON_CHIP
from mpoe_kernels.linear.triton import fused_launch, fused_tiles
from mpoe_kernels.linear.triton.fused_tiles import FusedTile
from mpoe_kernels.testing.launches import recorded

from .linear_runs import Case

# Factors that are not powers of two, in both directions.
UNEVEN = MPOShape((5, 3, 3), (3, 2, 6), max_bond=9)


def names(case: Case, strategy: str, backward: bool = False) -> list[str]:
    """Kernels that a case launches on a GPU."""
    saved = case.forward(strategy)
    with recorded("sm_90") as started:
        if backward:
            case.backward(strategy, saved)
        else:
            case.forward(strategy)
    return [one.name for one in started]


def test_decoding_is_one_launch() -> None:
    case = Case(UNEVEN, torch.bfloat16, tokens=4, experts=2)
    assert names(case, ON_CHIP) == ["fused_kernel"]


def test_backward_has_a_launch_for_each_gradient() -> None:
    found = names(Case(UNEVEN, torch.bfloat16, tokens=4, experts=2, activation="relu"), ON_CHIP, backward=True)
    assert [name for name in found if "fused" in name or "gradient" in name] == [
        "fused_kernel",
        "gradient_kernel",
        "gradient_kernel",
    ]


def test_many_small_tiles_and_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_tiles, "shipped_fused", lambda *_: (FusedTile(16, 16, 16, 1 << 20, 1, 1),))
    monkeypatch.setattr(fused_launch, "parts_of", lambda _, programs, most: max(1, min(16, most, 16 // programs)))
    for shape in (UNEVEN, UNEVEN.mirrored()):
        Case(shape, tokens=20, experts=2, capacity=None, top_k=1).check(ON_CHIP)
