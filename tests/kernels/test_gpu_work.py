"""When a product's inner size is split or its tiles shrink, with an H100's figures."""

from __future__ import annotations

import pytest
import torch

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.gpu.cost import budget, experts_at_once, room
from mpoe_kernels.linear.gpu.work import LEAST_STEPS, MOST_SPLITS, WORTH, Work, rate
from mpoe_kernels.contract import HARDWARE, program_of
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.contract.program import COMPOSITES, value_of

CARD = HARDWARE["h100"]
TILE = (64, 64, 32)


def work(batch: int, inner: int, m: int = 64, n: int = 64, elements: int = 64 * 64 * 8) -> Work:
    return Work(m, n, inner, batch, elements, torch.bfloat16)


@pytest.mark.parametrize(
    ("card", "unit", "tile", "percent"),
    [
        ("h100", "warp", (128, 128), 50),
        ("h100", "warp", (64, 64), 33),
        ("h100", "warp", (16, 64), 15),
        ("h100", "warpgroup", (64, 64), 50),
        ("h100", "warpgroup", (128, 128), 65),
        ("h100", "warpgroup", (128, 256), 65),
        ("a100", "warp", (128, 128), 65),
        ("b200", "multiprocessor", (128, 128), 50),
    ],
)
def test_shared_memory_bounds_small_tiles(card: str, unit: str, tile: tuple[int, int], percent: int) -> None:
    """By hand: 128 bytes per clock against 2048 (A100), 4096 (H100) or 8192 (B200) FLOPs; at most 65% are reached."""
    hardware = HARDWARE[card]
    reached = rate((*tile, 32), torch.bfloat16, hardware, unit) / hardware.peak_flops.bfloat16
    assert round(100 * reached) == percent


def test_a_full_card_is_not_split() -> None:
    assert work(CARD.units, 1 << 20).best_splits(TILE, CARD) == 1


def test_one_long_tile_of_each_expert_is_split_over_the_card() -> None:
    found = work(8, 36864).best_splits(TILE, CARD)
    assert 8 * found >= CARD.units / 2
    assert work(1, 36864).best_splits(TILE, CARD) == MOST_SPLITS


def test_what_is_short_is_not_worth_another_launch() -> None:
    assert work(8, 256).best_splits(TILE, CARD) == 1
    huge = work(8, 36864, elements=10**9)
    assert huge.best_splits(TILE, CARD) == 1, "partial results would take longer than the sum"


@pytest.mark.parametrize("inner", [129, 1000, 10001, 50000])
def test_every_part_keeps_some_steps_and_pays(inner: int) -> None:
    found = work(3, inner)
    splits = found.best_splits(TILE, CARD)
    assert (splits > 1) == (inner > 10000)
    if splits > 1:
        assert inner // splits >= LEAST_STEPS * TILE[2]
        assert found.seconds(TILE, splits, CARD) < WORTH * found.seconds(TILE, 1, CARD)


@pytest.mark.parametrize(("most", "expected"), [(0, 1), (1, 1), (3, 2), (8, 8)])
def test_partial_results_stay_within_their_memory(most: int, expected: int) -> None:
    assert work(8, 36864).best_splits(TILE, CARD, most) == expected


def test_smaller_tiles_come_before_a_split() -> None:
    tiles = [(128, 128, 32), (64, 64, 32)]
    assert work(4, 512, m=256, n=256).best_tile(tiles, CARD) == (64, 64, 32)
    assert work(CARD.units, 512, m=256, n=256).best_tile(tiles, CARD) == (128, 128, 32)


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("strategy", ["rebuild", "half_left", "half_right", "chain"])
def test_room_is_what_the_budget_leaves(strategy: str, experts: int) -> None:
    dims = BlockDims.of_shape(MPOShape.paper(768, 3072))
    program = program_of(dims, strategy, "backward")
    at_once = experts_at_once(dims, program.built, experts)
    for product in program.products:
        alive = {value_of(product.first), value_of(product.second), value_of(product.result)} & set(COMPOSITES)
        free = room(dims, product, program.built, at_once, experts)
        taken = at_once * sum(dims.elements(INDICES[name]) for name in alive)
        assert taken + free <= budget(dims, experts) + dims.weight_elements // 8
        assert free >= dims.weight_elements // 8
