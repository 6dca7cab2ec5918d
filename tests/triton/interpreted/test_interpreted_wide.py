"""Products of rows and whole weights with wide tiles and descriptors, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.triton import configs, launch
from mpoe_kernels.linear.triton.configs import Tile
from mpoe_kernels.linear.triton.cost import WIDE, ways, wide_reasons
from mpoe_kernels.contract import HARDWARE, BlockDims, contraction
from mpoe_kernels.triton import start
from mpoe_kernels.triton.architecture import target_named

from .linear_runs import Case

# 12 x 16; and 24 x 40, whose last rows and columns are padding.
EVEN = MPOShape((2, 3, 2), (2, 4, 2), (3, 3))
PADDED = MPOShape((2, 3, 4), (5, 4, 2), (3, 5), in_features=23, out_features=37)
ODD = MPOShape((2, 3, 2), (2, 3, 2), (3, 3))


def descriptors(case: Case, architecture: str) -> list[str]:
    """The descriptors of the products with rows, forward and backward."""
    with start.recorded(architecture) as launched:
        y, h, z = case.forward(WIDE)
        case.backward(WIDE, y, h, z, [True] * 5)
    return [one.arguments["BY_DESCRIPTOR"] for one in launched if one.kernel.fn.__name__ == "rows_kernel"]


@pytest.mark.parametrize("shape", [EVEN, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("gathered", [True, False])
def test_against_reference(shape: MPOShape, gathered: bool) -> None:
    Case(shape, torch.bfloat16, gathered=gathered).check(WIDE)


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile along every dimension, with idle experts and empty slots."""
    monkeypatch.setattr(launch, "tile_for", lambda *_: Tile(16, 16, 16, 1, 1))
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 3)
    Case(PADDED, torch.bfloat16, tokens=21, experts=4, kind="some_idle", capacity=12).check(WIDE)


def test_no_tokens() -> None:
    Case(EVEN, torch.bfloat16, tokens=0, top_k=1).check(WIDE)


def test_a_planted_mistake_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that ends one line too early."""
    launched = launch.start

    def wrong(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        launched(
            kernel, grid, **(arguments | {"K": arguments["K"] - 1} if arguments.get("BY_DESCRIPTOR") else arguments)
        )

    monkeypatch.setattr(launch, "start", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        Case(EVEN, torch.bfloat16).check(WIDE)


def test_only_where_the_card_and_the_sizes_allow() -> None:
    even, odd = Case(EVEN, torch.bfloat16), Case(ODD, torch.bfloat16)
    assert set(descriptors(even, "sm_90")) == set(descriptors(even, "sm_100")) == {"kn", "nk"}
    assert set(descriptors(odd, "sm_90")) == {""}


def test_reasons_and_the_candidate() -> None:
    def plan(shape: MPOShape, strategy: str = "rebuild", dtype: torch.dtype = torch.bfloat16):
        return contraction(strategy, BlockDims.of_shape(shape), 8, 4096, dtype, "forward")

    hopper, ampere = target_named("sm_90"), target_named("sm_80")
    assert wide_reasons(plan(EVEN), hopper) == []
    assert wide_reasons(plan(EVEN), ampere) == ["sm_80 has no descriptors; sm_90, sm_100 have"]
    assert wide_reasons(plan(ODD), hopper) == ["a line of 12 elements is no multiple of 16 bytes"]
    (reason,) = wide_reasons(plan(EVEN, "chain"), hopper)
    assert reason == "strategy 'chain' builds no whole weights"
    assert wide_reasons(plan(EVEN, dtype=torch.float32), hopper) == ["the tiles are for elements of 2 bytes"]
    assert WIDE in ways(plan(EVEN), hopper, HARDWARE["h100"])
    assert WIDE not in ways(plan(EVEN), ampere, HARDWARE["a100"])


def test_wide_tiles_are_wider_than_those_of_addresses() -> None:
    for architecture in ("sm_90", "sm_100"):
        tables = configs.TILES[architecture]
        assert tables["wide rows"][0].n == 2 * tables["rows"][0].n == 256
