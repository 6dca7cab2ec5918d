"""How many kernels a feed-forward layer launches on an H100, with the strategies that the backend chooses there."""

from __future__ import annotations

import math

import pytest
import triton_predict

from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.contract import HARDWARE

LONG = 1.5e6  # bytes that one multiprocessor reads from the cache in about 20 microseconds
# Shape, experts, tokens -> maximum number of launches, forward and backward.
LIMITS = {
    ("separable", 8, 4096): (8, 20),
    ("separable", 64, 4096): (8, 20),
    ("paper full", 64, 4096): (40, 120),
    ("paper full", 64, 32768): (40, 120),
}


@pytest.mark.parametrize(("name", "experts", "tokens"), LIMITS)
def test_a_layer_starts_few_kernels(name: str, experts: int, tokens: int) -> None:
    for phase, limit in zip(("forward", "backward"), LIMITS[name, experts, tokens], strict=True):
        strategies, launches = triton_predict.layer(name, experts, tokens, phase)
        assert 0 < len(launches) <= limit, f"{phase}: {strategies}"


def test_nothing_long_runs_on_a_few_multiprocessors() -> None:
    """A small grid has little work: otherwise its product is split, or smaller tiles fill the card."""
    units, seen = HARDWARE["h100"].units, 0
    for name in catalogue.shapes():
        for launch in triton_predict.layer(name, 8, 4096, "backward")[1]:
            if launch.kernel.fn.__name__ not in ("outer_kernel", "blocks_kernel"):
                continue
            a = launch.arguments
            inner = a["K"] if "K" in a else a["g"].shape[0] * a["S"] / a["EXPERTS"]
            if math.prod(launch.grid) < units / 2:
                read = (a["BM"] + a["BN"]) * inner / a["SPLITS"] * 2
                assert read <= LONG, f"{name}: a program of {launch.grid} reads {read:.0f} bytes"
                seen += 1
    assert seen, "no product has a small grid"
